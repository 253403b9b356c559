"""`benchmarks.agents` against a server that answers at once: what it asks, in which order, and what it makes of the times.

Red when: two runs or two servers get other prompts, sub-agents do not begin with their session's first prompt, an answer or a
tool's call and result are missing in the next request, a session goes on before its sub-agents have ended, a time is taken from
another moment, or a figure is of other requests than it says.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.agents.__main__ import main, parse
from benchmarks.agents.drive import Asked, Driver
from benchmarks.agents.report import clustered_again, quantile, summary, table
from benchmarks.agents.sessions import (
    DELEGATE,
    READ,
    SUB_AGENTS,
    SUB_TURNS,
    TURNS,
    answer_tokens,
    make_sessions,
    pool_tokens,
    result_tokens,
)
from sglang_clusterkv.tools.haystack import CHARS_PER_TOKEN

TOKENS = 2000
FIRST_S, NEXT_S = 0.08, 0.02


class FakeServer(ThreadingHTTPServer):
    """Streams three pieces of an answer, the first after FIRST_S; keeps what it was asked, with when it began and ended."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[dict[str, Any], float, float]] = []
        self.calls_tools = False
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self.reply(json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        begin = time.perf_counter()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append((body, begin, begin))
        self.event({"role": "assistant", "content": ""})
        for piece in range(3):
            time.sleep(NEXT_S if piece else FIRST_S)
            self.event({"content": f" {number}.{piece}"})
        if self.server.calls_tools:
            call = {
                "index": 0,
                "id": "x",
                "type": "function",
                "function": {"name": READ, "arguments": '{"page": "own"}'},
            }
            self.event({"tool_calls": [call]})
        with self.server.lock:
            self.server.asked[number] = (body, begin, time.perf_counter())
        usage = {
            "prompt_tokens": 100,
            "completion_tokens": 3,
            "total_tokens": 103,
            "prompt_tokens_details": {"cached_tokens": 40},
        }
        self.chunk({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, delta: dict[str, Any]) -> None:
        self.chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def chunk(self, fields: dict[str, Any]) -> None:
        whole = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "fake"} | fields
        self.wfile.write(f"data: {json.dumps(whole)}\n\n".encode())
        self.wfile.flush()

    def reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# -- what is asked


def test_sessions_are_the_same_for_the_same_seed_and_no_two_are_alike() -> None:
    sessions = make_sessions(4, TOKENS, 3)
    assert sessions == make_sessions(4, TOKENS, 3)
    others = make_sessions(4, TOKENS, 4)
    assert len({session.first_prompt for session in sessions + others}) == 8
    begins = {session.first_prompt[300:400] for session in sessions + others}
    assert len(begins) == 8, "the radix cache would find one's beginning in another's"


def test_lengths_follow_from_the_first_prompts() -> None:
    for tokens in (2000, 20_000):
        for session in make_sessions(4, tokens, 0):
            assert len(session.first_prompt) / CHARS_PER_TOKEN == pytest.approx(tokens, rel=0.02)
            assert session.turns == TURNS
            lengths = [len(result) / CHARS_PER_TOKEN for result in session.results if result is not None]
            assert lengths == pytest.approx([0.01 * tokens] * len(lengths), rel=0.1)
        assert answer_tokens(tokens) == max(8, 0.003 * tokens) and result_tokens(tokens) == 0.01 * tokens
    sessions = make_sessions(4, TOKENS, 0)
    assert pool_tokens(sessions, TOKENS) > 4 * TOKENS + sum(s.requests for s in sessions) * (8 + 20)


def test_every_second_session_has_sub_agents_with_its_first_prompt() -> None:
    sessions = make_sessions(4, TOKENS, 0)
    assert [len(session.sub_agents) for session in sessions] == [0, SUB_AGENTS, 0, SUB_AGENTS]
    for session in sessions[1::2]:
        assert session.results.count(None) == 1 and session.requests == TURNS + SUB_AGENTS * SUB_TURNS
        assert {agent.first_prompt for agent in session.sub_agents} == {session.first_prompt}
        tasks = {agent.task for agent in session.sub_agents} | {session.task}
        assert len(tasks) == 1 + SUB_AGENTS
    for turns in (1, 2, 3):
        assert [session.turns for session in make_sessions(2, TOKENS, 0, turns=turns)] == [turns, turns]


# -- how it is asked


def test_each_request_has_all_that_came_before(fake: FakeServer) -> None:
    sessions = make_sessions(2, 300, 0, turns=3)
    asked = Driver(fake.url, 8).run(sessions)
    assert len(asked) == len(fake.asked) == sum(session.requests for session in sessions)
    for session in (*sessions, *sessions[1].sub_agents):
        own = [found for found in fake.asked if found[0]["messages"][1]["content"] == session.task]
        assert len(own) == session.turns
        for before, after in zip(own, own[1:], strict=False):
            assert after[0]["messages"][: len(before[0]["messages"])] == before[0]["messages"]
            assert before[2] <= after[1], "a turn began before the last one had ended"
            said, result = after[0]["messages"][len(before[0]["messages"]) :]
            assert said["role"] == "assistant" and said["content"].endswith(".2")
            assert result["role"] == "tool" and result["tool_call_id"] == said["tool_calls"][0]["id"]
        assert own[0][0]["messages"][0] == {"role": "system", "content": session.first_prompt}
    for body, *_ in fake.asked:
        assert body["max_tokens"] == 8 and body["ignore_eos"] is True and body["temperature"] == 0
        assert {tool["function"]["name"] for tool in body["tools"]} == {READ, DELEGATE}


def test_a_session_waits_for_its_sub_agents_which_run_at_once(fake: FakeServer) -> None:
    session = make_sessions(2, 300, 0, turns=3)[1]
    Driver(fake.url, 8).run([session])
    spans = {}
    for agent in session.sub_agents:
        own = [found for found in fake.asked if found[0]["messages"][1]["content"] == agent.task]
        spans[agent.name] = own[0][1], own[-1][2]
    (begin_1, end_1), (begin_2, end_2) = spans.values()
    assert max(begin_1, begin_2) < min(end_1, end_2)
    own = [found for found in fake.asked if found[0]["messages"][1]["content"] == session.task]
    after = next(
        found
        for found in own
        if found[0]["messages"][-2:][0].get("tool_calls", [{}])[0].get("function", {}).get("name") == DELEGATE
    )
    assert after[1] >= max(end_1, end_2)
    assert after[0]["messages"][-1]["content"].count(".2") == SUB_AGENTS, "what they answered last is the result"


def test_the_models_own_call_is_taken_where_it_makes_one(fake: FakeServer) -> None:
    fake.calls_tools = True
    Driver(fake.url, 8, exact=False).run(make_sessions(1, 300, 0, turns=2))
    body = fake.asked[1][0]
    assert body["messages"][-2]["tool_calls"][0]["function"] == {"name": READ, "arguments": '{"page": "own"}'}
    assert "ignore_eos" not in body


def test_times_are_those_of_the_first_and_the_last_piece(fake: FakeServer) -> None:
    (asked,) = Driver(fake.url, 8).run(make_sessions(1, 300, 0, turns=1))
    assert FIRST_S <= asked.first_token_s < FIRST_S + 1
    # The first piece may be noticed later than the last one is.
    assert asked.token_ms is not None and 500 * NEXT_S <= asked.token_ms < 1000 * (NEXT_S + 0.5)
    assert (asked.prompt_tokens, asked.cached_tokens, asked.tokens) == (100, 40, 3)


def test_a_server_that_fails_ends_the_run(fake: FakeServer) -> None:
    driver = Driver(fake.url, 8)
    fake.shutdown()
    fake.server_close()
    with pytest.raises(Exception, match="onnection"):
        driver.run(make_sessions(3, 300, 0, turns=2))


# -- what it comes to


def one(turn: int, sent: float, first: float, last: float, sub_agent: bool = False, **fields: Any) -> Asked:
    known = {"session": "s", "prompt_tokens": 100, "cached_tokens": 60, "tokens": 11}
    return Asked(
        **(known | {"sub_agent": sub_agent, "turn": turn, "sent": sent, "first": first, "last": last} | fields)
    )


def test_figures_are_of_the_requests_that_they_name() -> None:
    asked = [one(0, 0, 4, 5), one(1, 5, 6, 8), one(1, 6, 9, 10), one(0, 7, 7.5, 9, sub_agent=True)]
    found = summary(asked)
    assert found["requests_per_s"] == 4 / 10
    spreads = found["first_token_s"]
    assert spreads["first"] == {"p50": 4, "p99": 4} and spreads["later"] == {"p50": 2, "p99": 3}
    assert spreads["sub_agents_first"] == {"p50": 0.5, "p99": 0.5}
    assert [spread["p99"] for spread in found["first_token_s_by_turn"]] == [4, 3]
    assert found["token_ms"]["p50"] == pytest.approx(125) and found["prefilled_tokens"] == 160
    assert clustered_again(found, 160 + 44 + 7) == 7 and clustered_again(found, 100) == 0
    silent = summary([one(0, 0, 1, 1, cached_tokens=None)])
    assert silent["prefilled_tokens"] is None and clustered_again(silent, 5) is None and silent["token_ms"] is None


def test_a_quantile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    assert quantile(values, 0.99) == 99 and quantile(values, 1) == 100 and quantile([3.0], 0.5) == 3
    assert quantile([1.0, 2.0], 0.99) == 2


def test_ratios_are_to_the_first_server_with_as_many_sessions() -> None:
    slow, fast = summary([one(0, 0, 4, 10)]), summary([one(0, 0, 1, 2)])
    rows = [
        slow | {"arm": "a", "sessions": 1},
        slow | {"arm": "a", "sessions": 8},
        fast | {"arm": "b", "sessions": 8, "clustered_again": 1234, "memory_bytes": 2_500_000_000},
    ]
    lines = table(rows, "a").splitlines()
    assert [line.split(" | ")[:4] for line in lines[2:]] == [
        ["| 1", "a", "0.100", "1.00"],
        ["| 8", "a", "0.100", "1.00"],
        ["| 8", "b", "0.500", "5.00"],
    ]
    assert lines[-1].endswith("| 40 % | 1,234 | 2.5 |".replace("40", "60"))


def test_the_command_measures_a_server_that_runs(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr("benchmarks.agents.__main__.write_results", lambda name, **fields: written.update(fields))
    argv = [
        "agents",
        "--base-url",
        fake.url,
        "--name",
        "fake",
        "--sessions",
        "1",
        "2",
        "--tokens",
        "300",
        "--turns",
        "2",
    ]
    monkeypatch.setattr("sys.argv", argv)
    main()
    out = capsys.readouterr().out
    assert "| 1 | fake |" in out and "| 2 | fake |" in out
    firsts = {body["messages"][0]["content"] for body, *_ in fake.asked}
    assert len(firsts) == 3, "a run found what another one left in the cache"
    assert [row["sessions"] for row in written["data"]["rows"]] == [1, 2]


def test_without_its_server_llama_cpp_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: Any) -> None:
    monkeypatch.setenv("SGLANG_CLUSTERKV_CACHE", str(tmp_path))
    with pytest.raises(SystemExit):
        parse(["--arms", "llama.cpp", "--model", str(tmp_path)] if (tmp_path / "config.json").write_text("{}") else [])
    assert "--build" in capsys.readouterr().err
