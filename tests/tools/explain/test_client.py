"""`sglang-clusterkv explain --json` against a small made-up server: what is asked, what is written, what is said when it fails.

Red when: the texts of a trace's tokens are not the prompt and the answer, a character of several tokens is lost, a trace is
asked for without custom_params, two answers are said to part elsewhere than they do, a divergence exceeds the true one, or a
server's refusal, a wrong server or a file that is none ends in a traceback.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.servers import free_port
from sglang_clusterkv.tools import cli
from sglang_clusterkv.tools.explain import page
from sglang_clusterkv.tools.explain.client import Answer, compared, divergence, pieces_of
from sglang_clusterkv.tools.haystack import FACTS

ANSWER = "It is 29772, naïvely 😀😀😀 日本."
TOP = {65: math.log(0.6), 66: math.log(0.3)}
ASKED = ("--document", "document.txt", "--question", "What?")


class FakeServer:
    """A server whose tokens are the bytes of UTF-8, with a template of two characters."""

    def __init__(self) -> None:
        self.answer = ANSWER
        self.template = "<>"
        self.top = TOP
        self.trace: Any = {"format": "clusterkv-trace", "version": 1}
        self.bodies: list[dict[str, Any]] = []
        self.refusal: tuple[int, Any] | None = None
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = False
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def reply_to(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON."""
        if path == "/tokenize":
            text = self.template[0] + body["messages"][-1]["content"] + self.template[1]
            return 200, {"tokens": list(text.encode())}
        if path == "/detokenize":
            assert body["skip_special_tokens"] is False
            return 200, {"text": [bytes(ids).decode(errors="replace") for ids in body["tokens"]]}
        if path != "/generate":
            return 404, {"detail": "Not Found"}
        self.bodies.append(body)
        if self.refusal is not None:
            return self.refusal
        ids = list(self.answer.encode())[: body["sampling_params"]["max_new_tokens"]]
        meta: dict[str, Any] = {}
        if body["sampling_params"].get("custom_params") and self.trace is not None:
            told = self.trace | {"token_ids": body["input_ids"] + ids} if "format" in self.trace else self.trace
            meta["clusterkv_trace"] = [None] * (len(ids) - 1) + [told]
        if body.get("return_logprob"):
            meta["output_token_logprobs"] = [[-0.5, id_, None] for id_ in ids]
            meta["output_top_logprobs"] = [[[value, id_, None] for id_, value in self.top.items()] for _ in ids]
        return 200, {"output_ids": ids, "meta_info": meta}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = self.path == "/v1/models"
                self.reply(200, {"data": [{"id": "fake/model"}]}) if known else self.reply(404, {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(*fake.reply_to(self.path, body))

            def reply(self, status: int, body: Any) -> None:
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                with contextlib.suppress(ConnectionError):
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


def running() -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    yield from running()


@pytest.fixture
def other() -> Iterator[FakeServer]:
    yield from running()


@pytest.fixture(autouse=True)
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A document where the command runs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "document.txt"
    path.write_text("The magic number of Lima is 29772. <b>bold</b> 日本 😀\n", encoding="utf-8")
    return path


def explain(server: FakeServer, *arguments: str, question: str = "What is it?") -> int:
    return cli.main(
        [
            "explain",
            "--base-url",
            server.url,
            "--document",
            "document.txt",
            "--question",
            question,
            "--json",
            *arguments,
        ]
    )


def written(path: str = "clusterkv-explain.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def test_a_trace_is_asked_for_and_written_with_its_texts(
    fake: FakeServer, document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(fake) == 0
    assert capsys.readouterr().out.strip() == str(Path("clusterkv-explain.json").resolve())
    (body,) = fake.bodies
    assert body["sampling_params"] == {
        "temperature": 0,
        "max_new_tokens": 64,
        "custom_params": {"clusterkv_trace": True},
    }
    trace = written()
    prompt = f"<{document.read_text(encoding='utf-8')}\n\nWhat is it?>"
    assert trace["token_ids"] == list((prompt + ANSWER).encode())
    assert len(trace["pieces"]) == len(trace["token_ids"])
    assert "".join(trace["pieces"]) == prompt + ANSWER
    assert "compare" not in trace and "return_logprob" not in body


def test_without_a_document_it_is_the_demos(fake: FakeServer) -> None:
    assert cli.main(["explain", "--base-url", fake.url, "--json"]) == 0
    text = "".join(written()["pieces"])
    assert FACTS[1].sentence in text and text.endswith(f"\n\n{FACTS[1].question}>{ANSWER}")


def test_a_page_is_written_unless_the_trace_alone_is_asked_for(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages: list[tuple[dict[str, Any], Path]] = []
    monkeypatch.setattr(page, "write_page", lambda trace, out: pages.append((trace, out)))
    assert cli.main(["explain", "--base-url", fake.url, *ASKED]) == 0
    ((trace, out),) = pages
    assert out == Path("clusterkv-explain.html") and "".join(trace["pieces"]).endswith(ANSWER)
    assert capsys.readouterr().out.strip() == str(out.resolve())


def test_pieces_of_an_answer_that_ends_within_a_character(fake: FakeServer) -> None:
    assert explain(fake, "--max-tokens", str(len(b"It is 29772, na") + 1), "--out", "cut.json") == 0
    assert "".join(written("cut.json")["pieces"]).endswith("It is 29772, na\ufffd")


def test_a_piece_is_what_a_token_adds() -> None:
    assert pieces_of(["", "a", "a\ufffd", "a😀"], ["a", "a\ufffd", "a😀", "a😀b"]) == ["a", "", "😀", "b"]


def test_a_chat_is_replayed_up_to_its_last_question(fake: FakeServer) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which number?"},
        {"role": "assistant", "content": "29772"},
    ]
    for content in (chat, {"messages": chat}):
        Path("chat.json").write_text(json.dumps(content), encoding="utf-8")
        assert cli.main(["explain", "--base-url", fake.url + "/v1", "--chat", "chat.json", "--json"]) == 0
        assert "".join(written()["pieces"]) == "<Which number?>" + ANSWER


def test_quests_choice_is_asked_for_where_it_is_wanted(fake: FakeServer) -> None:
    assert explain(fake, "--quest") == 0
    assert fake.bodies[-1]["sampling_params"]["custom_params"] == {"clusterkv_trace": {"quest": True}}


def test_a_second_server_answers_the_same_prompt(fake: FakeServer, other: FakeServer) -> None:
    other.answer = ANSWER.replace("29772", "29999")
    other.top = {65: math.log(0.5), 66: math.log(0.4)}
    assert explain(fake, "--compare", other.url) == 0
    trace, compare = written(), written()["compare"]
    assert other.bodies[0]["input_ids"] == fake.bodies[0]["input_ids"]
    assert "custom_params" not in other.bodies[0]["sampling_params"]
    assert "".join(compare["pieces"]) == other.answer and compare["model"] == "fake/model"
    assert compare["first_difference"] == ANSWER.index("772")
    assert len(compare["logprobs"]) == len(compare["token_ids"]) == len(compare["kl"])
    expected = 0.5 * math.log(0.5 / 0.6) + 0.4 * math.log(0.4 / 0.3) + 0.1 * math.log(0.1 / 0.1)
    told = compare["kl"][: compare["first_difference"] + 1]
    assert told == pytest.approx([expected] * len(told))
    assert set(compare["kl"][len(told) :]) == {None}
    assert "compare" in trace


def test_answers_part_where_they_do() -> None:
    def answer(*ids: int) -> Answer:
        return Answer(list(ids), [-1.0] * len(ids), [TOP] * len(ids), None)

    assert compared(answer(1, 2), answer(1, 2))["first_difference"] is None
    assert compared(answer(1, 2, 3), answer(1, 2))["first_difference"] == 2
    assert compared(answer(1), answer(1, 2))["first_difference"] == 1
    assert compared(answer(1, 2), answer(3, 2))["first_difference"] == 0
    assert compared(answer(1, 2, 3), answer(1, 4, 3))["kl"] == [0.0, 0.0, None]


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=3, max_size=12),
    st.integers(1, 12),
    st.integers(1, 12),
)
def test_a_divergence_is_a_lower_bound(weights: list[tuple[float, float]], of_p: int, of_q: int) -> None:
    p, q = ([weight / sum(column) for weight in column] for column in zip(*weights, strict=True))
    true = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    def top(probabilities: list[float], count: int) -> dict[int, float]:
        order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])[:count]
        return {token: math.log(probabilities[token]) for token in order}

    found = divergence(top(p, of_p), top(q, of_q))
    if found is not None:
        assert 0 <= found <= true + 1e-5
    everything = divergence(top(p, len(p)), top(q, len(q)))
    assert everything == pytest.approx(true, abs=1e-9)


def test_what_shares_no_token_has_no_divergence() -> None:
    assert divergence({1: 0.0}, {2: 0.0}) is None
    assert divergence({1: 0.0}, {1: -math.inf}) is None


def said(fake_url: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an explain that fails."""
    assert cli.main(["explain", "--base-url", fake_url, "--json", *arguments]) == 1
    output = capsys.readouterr()
    assert not output.out and output.err.count("\n") == 1 and output.err.startswith("sglang-clusterkv: ")
    return output.err


def test_a_refusal_is_passed_on(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refusal = (400, {"error": {"message": "This server keeps no traces: start it with 'trace' set to true."}})
    assert "This server keeps no traces" in said(fake.url, capsys, *ASKED)


def test_a_server_without_traces_is_named(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.trace = None
    assert "--attention-backend clusterkv" in said(fake.url, capsys, *ASKED)
    fake.trace = {"error": "4 requests were traced already"}
    assert "4 requests were traced already" in said(fake.url, capsys, *ASKED)


def test_what_is_no_such_server_is_said(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.refusal = (200, "<html>")
    assert "did not answer with JSON" in said(fake.url, capsys, *ASKED)
    fake.refusal = (200, {"choices": []})
    assert "answered without meta_info" in said(fake.url, capsys, *ASKED)
    fake.refusal = (502, "<html>bad gateway</html>")
    assert "bad gateway" in said(fake.url, capsys, *ASKED)
    assert "no server answers" in said("http://127.0.0.1:9", capsys, *ASKED)


def test_a_server_of_another_model_is_refused(
    fake: FakeServer, other: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    other.template = "[]"
    assert "same model" in said(fake.url, capsys, *ASKED, "--compare", other.url)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ('{"a": 1}', "no list of messages"),
        ('["a"]', "no list of messages"),
        ('[{"role": "assistant", "content": "x"}]', "asks nothing"),
    ],
)
def test_a_file_that_is_no_chat_is_said(
    fake: FakeServer, capsys: pytest.CaptureFixture[str], content: str | None, sentence: str
) -> None:
    if content is not None:
        Path("chat.json").write_text(content, encoding="utf-8")
    assert sentence in said(fake.url, capsys, "--chat", "chat.json")


def test_a_document_needs_a_question_and_text(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--question" in said(fake.url, capsys, "--document", "document.txt")
    Path("document.txt").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in said(fake.url, capsys, *ASKED)
    Path("document.txt").unlink()
    assert "cannot read" in said(fake.url, capsys, *ASKED)


def test_a_place_that_cannot_be_written_is_said(fake: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert "pass another --out" in said(fake.url, capsys, *ASKED, "--out", "missing/trace.json")


def test_a_second_server_that_is_not_there_is_said_to_be_the_second(
    fake: FakeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said(fake.url, capsys, *ASKED, "--compare", f"http://127.0.0.1:{free_port()}")
    assert "no server answers" in line and "--compare" in line and "--base-url" not in line
