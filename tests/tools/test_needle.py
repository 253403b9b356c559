"""`sglang-clusterkv needle` against a small made-up server: what is asked, what is written, what is said when it fails.

Red when: a cell counts a number that was not in the answer, a question changes with the other questions, a length is off, a
picture is no picture, a result is written over, a refused length or a server's error ends in a traceback.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sglang_clusterkv.tools import cli
from sglang_clusterkv.tools.haystack import haystack, hide, magic_number

TEMPLATE_TOKENS = 20
CHARS_PER_TOKEN = 3.0
NEEDLE = re.compile(r"The magic number of (\w+) is (\d+)\.")

Answer = Callable[[str], str]
Refusal = tuple[int, Any]


def reads_well(prompt: str) -> str:
    """The answer of a model that finds every needle."""
    asked = re.findall(r"magic number of (\w+)\?", prompt)[-1]
    return f"It is {dict(NEEDLE.findall(prompt))[asked]}." if NEEDLE.search(prompt) else "I don't know."


class FakeServer:
    """An OpenAI-compatible server that counts characters as tokens and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = reads_well
        self.context_tokens: int | None = None
        self.refuse: Callable[[str, int], Refusal | None] = lambda prompt, tokens: None
        self.models: Any = {"data": [{"id": "fake/model"}]}
        self.completion: Callable[[str, int], Any] | None = None
        self.delay_s = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = False  # so that none outlives its test
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @property
    def prompts(self) -> list[str]:
        """The questions about documents, without the two requests that calibrate."""
        return [body["messages"][0]["content"] for body in self.bodies if body["max_tokens"] > 1]

    def chat(self, body: dict[str, Any]) -> Refusal:
        """Status and JSON for one request."""
        self.bodies.append(body)
        time.sleep(self.delay_s)
        prompt = body["messages"][0]["content"]
        tokens = TEMPLATE_TOKENS + round(len(prompt) / CHARS_PER_TOKEN)
        if refusal := self.refuse(prompt, tokens):
            return refusal
        if self.completion is not None:
            return 200, self.completion(prompt, tokens)
        message = {"role": "assistant", "content": self.answer(prompt)}
        return 200, {"choices": [{"message": message}], "usage": {"prompt_tokens": tokens}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.keys.add(self.headers["Authorization"])
                self.reply(200, fake.models) if self.path == "/v1/models" else self.reply(404, {"detail": "Not Found"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(
                    *(fake.chat(body) if self.path == "/v1/chat/completions" else (404, {"detail": "Not Found"}))
                )

            def reply(self, status: int, body: Any) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                with contextlib.suppress(ConnectionError):  # of a client that waits no longer
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default folder is made where the command runs."""
    monkeypatch.chdir(tmp_path)


def needle(server: FakeServer, *arguments: str, out: str = "result") -> int:
    return cli.main(["needle", "--base-url", server.url, "--lengths", "400,800", "--out", out, *arguments])


def rows_of(text: str) -> dict[str, list[str]]:
    """A Markdown table as cells by the first cell of their row."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells}


def test_the_table_has_a_row_per_depth_and_a_column_per_length(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle(fake, "--depths", "0,50,100", "--needles", "2") == 0
    output = capsys.readouterr().out
    rows = rows_of(output)
    assert rows["depth"] == ["400", "800"]
    assert [rows[f"{depth} %"] for depth in (0, 50, 100)] == [["2/2", "2/2"]] * 3
    assert rows["all"] == ["6/6", "6/6"]
    assert "fake/model: 12 of 12 needles found" in output
    assert Path("result/needle.md").read_text() == output


def test_only_an_answer_with_the_number_is_found(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    # Finds what lies in the first half, and writes it with a comma.
    def half_blind(prompt: str) -> str:
        match = NEEDLE.search(prompt)
        return f"{int(match[2]):,}" if match and match.start() < len(prompt) / 2 else "It is 12345."

    fake.answer = half_blind
    assert needle(fake, "--depths", "25,75") == 0
    rows = rows_of(capsys.readouterr().out)
    assert rows["25 %"] == ["1/1", "1/1"] and rows["75 %"] == ["0/1", "0/1"]


def test_prompts_have_the_wanted_length_by_the_servers_count(fake: FakeServer) -> None:
    assert needle(fake, "--lengths", "500,3000,20000", "--depths", "5") == 0
    answers = json.loads(Path("result/needle.json").read_text())["answers"]
    assert len(answers) == 15
    for answer in answers:
        # An entry of the log book, which is whole or not there, has about 40 tokens here.
        assert answer["length"] - 80 <= answer["prompt_tokens"] <= 1.005 * answer["length"], answer


def test_the_needle_lies_at_its_depth(fake: FakeServer) -> None:
    assert needle(fake, "--lengths", "4000", "--depths", "0,30,100") == 0
    places = []
    for prompt in fake.prompts:
        document = prompt.rsplit("\n\n", 1)[0]
        assert len(NEEDLE.findall(document)) == 1
        match = NEEDLE.search(document)
        assert match is not None
        places.append(match.start() / (len(document) - len(match[0])))
    assert sorted(places) == pytest.approx([0, 0.3, 1], abs=0.02)


def test_a_question_does_not_depend_on_the_others(fake: FakeServer) -> None:
    assert needle(fake, "--lengths", "800", "--depths", "50,", "--needles", "2") == 0
    alone = fake.prompts
    fake.bodies.clear()
    assert needle(fake, "--lengths", "800,1200", "--depths", "0,50,100", "--needles", "3", out="more") == 0
    assert set(alone) < set(fake.prompts)
    assert len(set(fake.prompts)) == 18
    fake.bodies.clear()
    assert needle(fake, "--lengths", "800", "--depths", "50,", "--seed", "8", out="seed") == 0
    assert not set(alone) & set(fake.prompts)


def test_requests_are_greedy_and_share_prefixes(fake: FakeServer) -> None:
    assert needle(fake, "--depths", "0,50,100", "--model", "other", "--api-key", "secret", "--max-tokens", "9") == 0
    assert all(body["temperature"] == 0 and body["model"] == "other" for body in fake.bodies)
    assert {body["max_tokens"] for body in fake.bodies} == {1, 9}
    assert fake.keys == {"Bearer secret"}
    deepest, middle = fake.prompts[:2]
    shared = next(i for i, (a, b) in enumerate(zip(deepest, middle, strict=False)) if a != b)
    assert shared > 0.4 * len(middle)
    # A longer document begins as a shorter one.
    assert "".join(haystack(9000, 1)).startswith("".join(haystack(3000, 1)))
    assert hide(magic_number("Oslo", 1), 3000, 100, 1).startswith("".join(haystack(2900, 1)))


def test_json_has_every_answer_and_stands_alone_on_stdout(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert needle(fake, "--depths", "2", "--json", "--api-key", "secret") == 0
    output = capsys.readouterr().out
    result = json.loads(output)
    assert result["found"] == result["asked"] == 4 and result["model"] == "fake/model"
    for answer, prompt in zip(result["answers"], fake.prompts, strict=True):
        assert prompt.endswith(answer["question"]) and answer["expected"] in answer["answer"] and answer["found"]
    assert Path("result/needle.json").read_text() == output
    assert "secret" not in output


def test_the_picture_is_a_png_of_the_cells(fake: FakeServer) -> None:
    pytest.importorskip("matplotlib")
    assert needle(fake, "--depths", "3") == 0
    fake.answer = lambda prompt: "no idea"
    assert needle(fake, "--depths", "3", out="none") == 0
    found, none = (Path(out, "needle.png").read_bytes() for out in ("result", "none"))
    assert found.startswith(b"\x89PNG\r\n\x1a\n") and none.startswith(b"\x89PNG\r\n\x1a\n")
    assert found != none


def test_without_matplotlib_it_says_how_to_get_it(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert needle(fake, "--depths", "2") == 0
    assert "pip install 'sglang-clusterkv[bench]'" in capsys.readouterr().err
    assert sorted(path.name for path in Path("result").iterdir()) == ["needle.json", "needle.md"]


def test_a_progress_bar_runs_on_stderr(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert needle(fake, "--depths", "3") == 0
    output, error = capsys.readouterr()
    assert "6/6" in error and "800 tokens, depth 0 %" in error
    assert "question/s" not in output and "written" not in output


def test_a_length_beyond_the_known_context_is_left_out(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.models = {"data": [{"id": "fake/model", "max_model_len": 820}]}
    assert needle(fake, "--depths", "2") == 0
    output, error = capsys.readouterr()
    rows = rows_of(output)
    assert rows["0 %"] == rows["100 %"] == ["1/1", "-"] and rows["prompt tokens"][1] == "-"
    assert "800 tokens are left out: with 32 for the answer they exceed the 820 of the context" in error
    assert "800 left out" in output
    assert len(fake.prompts) == 2
    assert json.loads(Path("result/needle.json").read_text())["skipped"][0]["length"] == 800


@pytest.mark.parametrize(
    "body",
    [
        {
            "object": "error",
            "message": "The input (850 tokens) is longer than the model's context length (600 tokens).",
        },
        {"error": {"message": "This model's maximum context length is 600 tokens.", "code": "context_length_exceeded"}},
        {"error": {"message": "Input length (850 tokens) exceeds the maximum allowed length (599 tokens)."}},
    ],
)
def test_a_length_that_the_server_refuses_is_left_out(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], body: dict[str, Any]
) -> None:
    fake.refuse = lambda prompt, tokens: (400, body) if tokens > 600 else None
    assert needle(fake, "--depths", "2") == 0
    output, error = capsys.readouterr()
    assert rows_of(output)["all"] == ["2/2", "-"]
    assert "800 tokens are left out: the server refused a prompt for its length" in error
    assert len(fake.prompts) == 3, "the other depths of a refused length are not tried"


def test_nothing_fits(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.models = {"data": [{"id": "fake/model", "max_model_len": 300}]}
    assert needle(fake) == 1
    assert "no length fits: pass others with --lengths" in capsys.readouterr().err
    assert not Path("result").exists()


def test_a_result_is_never_written_over(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert needle(fake, "--depths", "2") == 0
    before = {path.name: path.read_bytes() for path in Path("result").iterdir()}
    asked = len(fake.bodies)
    assert needle(fake, "--depths", "2", "--seed", "9") == 1
    assert "result exists already" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in Path("result").iterdir()}
    assert len(fake.bodies) == asked, "said before anything is asked"


def test_the_default_folder_is_a_new_one(fake: FakeServer) -> None:
    assert cli.main(["needle", "--base-url", f"{fake.url}/v1/", "--lengths", "400", "--depths", "50,"]) == 0
    (folder,) = Path().iterdir()
    assert re.fullmatch(r"needle-\d{8}-\d{6}", folder.name) and (folder / "needle.json").exists()


def one_sentence(error: str) -> str:
    """What was said at the end, which must be one line and no traceback."""
    assert "Traceback" not in error
    return [line for line in error.splitlines() if line.startswith("sglang-clusterkv: ")][0]


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert cli.main(["needle", "--base-url", f"127.0.0.1:{port}"]) == 1
    error = one_sentence(capsys.readouterr().err)
    assert f"no server answers at http://127.0.0.1:{port}/v1" in error and "--base-url" in error
    assert not list(Path().iterdir())


REFUSALS = [
    (401, {"error": {"message": "Unauthorized"}}, "--api-key"),
    (404, {"detail": "no such model"}, "--model"),
    (429, {"error": {"message": "slow down"}}, "fewer --needles"),
    (400, {"error": {"message": "temperature is not supported"}}, "temperature is not supported"),
    (500, "it broke", "it broke"),
]


@pytest.mark.parametrize(("status", "body", "says"), REFUSALS)
def test_a_refusal_is_one_sentence(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], status: int, body: Any, says: str
) -> None:
    fake.refuse = lambda prompt, tokens: (status, body)
    assert needle(fake) == 1
    assert says in one_sentence(capsys.readouterr().err)
    assert not Path("result").exists()


def test_a_timeout_is_one_sentence(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.delay_s = 1.5
    assert needle(fake, "--timeout", "1") == 1
    assert "within 1 s: pass a longer --timeout" in one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("models", ["<html>", {"hello": 1}, {"data": []}, []])
def test_something_else_answers(fake: FakeServer, capsys: pytest.CaptureFixture[str], models: Any) -> None:
    fake.models = models
    assert needle(fake) == 1
    assert one_sentence(capsys.readouterr().err)


@pytest.mark.parametrize("completion", ["<html>", {}, {"choices": []}, {"choices": [{"message": {"content": "x"}}]}])
def test_an_answer_without_its_parts(fake: FakeServer, capsys: pytest.CaptureFixture[str], completion: Any) -> None:
    fake.completion = lambda prompt, tokens: completion
    assert needle(fake) == 1
    assert "OpenAI-compatible" in one_sentence(capsys.readouterr().err)


def test_what_was_answered_before_an_error_is_kept(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refuse = lambda prompt, tokens: (500, "it broke") if len(fake.prompts) > 3 else None
    assert needle(fake, "--depths", "2") == 1
    output, error = capsys.readouterr()
    assert "it broke" in one_sentence(error)
    assert rows_of(output)["100 %"] == ["1/1", "1/1"] and rows_of(output)["0 %"] == ["1/1", "-"]
    assert json.loads(Path("result/needle.json").read_text())["asked"] == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--lengths", "10"],
        ["--lengths", "x"],
        ["--depths", "1"],
        ["--depths", "0,101"],
        ["--needles", "0"],
        ["--timeout", "0"],
    ],
)
def test_wrong_numbers_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["needle", *arguments])
    assert end.value.code == 2
    assert f"argument {arguments[0]}: " in capsys.readouterr().err
