"""What benchmarks.host_tier counts, against a server that is made up.

Red when: the arms get caches of different bytes, new tokens count as prefilled again, a first turn counts as a later one,
traffic of earlier cells counts, a session forgets what was said, or the tier is said to win where it does not.
"""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import host_tier
from benchmarks.host_tier import (
    PAGE,
    TIER,
    TURNS,
    WITHOUT,
    Reply,
    Session,
    Shape,
    again,
    bytes_of,
    cell_of,
    kl_of,
    kl_table,
    make_sessions,
    parse_args,
    plan_of,
    run_turns,
    session_tokens,
    stream,
    table,
    token_bytes,
    wins_from,
)
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import Geometry, index_bytes
from sglang_clusterkv.tools.demo_model import default_out

SMOLLM2 = Shape(layers=30, kv_heads=3, head_dim=64)
CONFIGS = {WITHOUT: ClusterKVConfig(), TIER: ClusterKVConfig(host_ratio=4, host_kv_dtype="int8")}
COUNTS = {
    "read_bytes_decode": 10, "read_bytes_prefill": 20, "read_bytes_build": 0, "written_bytes": 30,
    "recalled_rows_host": 40, "recalled_rows_device": 60,
}  # fmt: skip


class MadeUp:
    """Answers with the number of the request; keeps every prompt of `kept` pages or less in its cache, and drops the others."""

    url = "http://nowhere"

    def __init__(self, forgets: bool = False) -> None:
        self.forgets = forgets
        self.prompts: list[list[int]] = []
        self._lock = threading.Lock()

    def post(self, url: str, json: dict[str, Any], stream: bool, timeout: float) -> Any:
        prompt, tokens = json["input_ids"], json["sampling_params"]["max_new_tokens"]
        with self._lock:
            known = [] if self.forgets else self.prompts
            cached = max((shared(prompt, other) for other in known), default=0) // PAGE * PAGE
            self.prompts.append(prompt)
        answer = [1000 + len(self.prompts)] * tokens
        meta = {"prompt_tokens": len(prompt), "cached_tokens": cached}
        return MadeUpStream([{"output_ids": answer[: i + 1], "meta_info": meta} for i in range(tokens)])


class MadeUpStream:
    status_code = 200

    def __init__(self, chunks: list[dict[str, Any]]) -> None:
        self._chunks = chunks

    def __enter__(self) -> MadeUpStream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def iter_lines(self, chunk_size: int) -> list[bytes]:
        return [b"data: " + json.dumps(chunk).encode() for chunk in self._chunks] + [b"", b"data: [DONE]"]


def shared(one: list[int], other: list[int]) -> int:
    found = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        found += 1
    return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = MadeUp()
    monkeypatch.setattr(host_tier.requests, "post", lambda *args, **fields: made.post(*args, **fields))
    return made


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_both_arms_take_the_same_bytes() -> None:
    args = parse_args(["--tokens", "7000", "--fits", "2"])
    plan = plan_of(SMOLLM2, CONFIGS, args)
    assert plan.tokens[WITHOUT] == 2 * session_tokens(7000, 32) + 512
    sizes = []
    for arm, config in CONFIGS.items():
        tokens = plan.tokens[arm]
        geometry = Geometry(30, 3, 64, PAGE, tokens // PAGE)
        host = 30 * 3 * (2 * 64 + 8) * tokens if arm == TIER else 0
        counts = {"bytes": index_bytes(config, geometry)} | ({"host_tier": {"bytes": host}} if host else {})
        sizes.append(sum(bytes_of(SMOLLM2, config, tokens, counts).values()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.005)
    # HOST_TIER's 1.83 times as many tokens, fp32 KV and int8 host rows.
    assert plan.tokens[TIER] / plan.tokens[WITHOUT] == pytest.approx(1.83, abs=0.01)


def test_bytes_of_a_token() -> None:
    heads = 30 * 3
    index = token_bytes(SMOLLM2, CONFIGS[WITHOUT]) - heads * 512
    assert token_bytes(SMOLLM2, CONFIGS[TIER]) == heads * (512 / 4 + 136) + index
    bf16 = SMOLLM2._replace(dtype=torch.bfloat16)
    auto = ClusterKVConfig(host_ratio=2)
    assert token_bytes(bf16, auto) == heads * (256 / 2 + 256) + index


def test_a_session_has_room_for_its_turns() -> None:
    assert session_tokens(100, 32) == PAGE * -(-(100 + 3 * 64) // PAGE)


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_a_reply_is_what_was_streamed(server: Any) -> None:
    reply = stream(server, list(range(40)), 3)
    assert (reply.prompt, reply.cached, reply.answer) == (40, 0, [1001] * 3)
    assert reply.first_s >= 0 and len(reply.gaps_s) == 2


def test_the_next_prompt_has_what_was_said(server: Any) -> None:
    session = Session(list(range(50)), [[7, 7], [8], [9]], answer=4)
    for _ in range(TURNS):
        session.turn(server)
    assert server.prompts[1] == [*range(50), 7, 7, *[1001] * 4, 8]
    assert server.prompts[2] == [*server.prompts[1], *[1002] * 4, 9]
    assert session.new == [52, 2, 2]


def test_what_a_cache_kept_is_not_prefilled_again(server: Any) -> None:
    document = list(range(10 * PAGE))
    for forgets, expected in ((False, 0), (True, 10 * PAGE)):
        server.forgets, server.prompts = forgets, []
        session = Session(document, [[7], [8], [9]], answer=4)
        for _ in range(TURNS):
            session.turn(server)
        found = [again(reply, new) for reply, new in zip(session.replies, session.new, strict=True)]
        assert found[0] == 0
        # Of a turn's own tokens a page that was not full is computed again.
        assert all(expected <= tokens <= expected + PAGE for tokens in found[1:]), found
    assert again(Reply(0.0, [], prompt=40, cached=32, answer=[]), new=20) == 0


def test_every_session_takes_every_turn_in_an_order_of_its_own(server: Any) -> None:
    sessions = [Session([number] * 20, [[100], [101], [102]], answer=2) for number in range(6)]
    seconds = run_turns(server, sessions, concurrency=1, seed=7)
    assert len(seconds) == TURNS and all(len(session.replies) == TURNS for session in sessions)
    orders = [[prompt[0] for prompt in server.prompts[6 * turn : 6 * turn + 6]] for turn in range(TURNS)]
    assert all(sorted(order) == list(range(6)) for order in orders) and orders[0] != orders[1] != orders[2]


def replied(first_s: float, prompt: int, cached: int) -> Reply:
    return Reply(first_s, [0.1, 0.3], prompt, cached, [1])


def test_a_cell_counts_later_turns_and_its_own_traffic() -> None:
    sessions = []
    for number in range(2):
        session = Session([], [], 1)
        session.replies = [replied(9.0, 100, 0), replied(1.0 + number, 120, 100), replied(3.0, 140, 40)]
        session.new = [100, 20, 20]
        sessions.append(session)
    before = {"host_tier": COUNTS, "faults": {}}
    after = {"host_tier": {name: 3 * count for name, count in COUNTS.items()}, "faults": {"plan": 0, "offload": 2}}
    cell = cell_of(sessions, [50.0, 4.0, 6.0], before, after)
    assert cell["first_turn_s"] == 9.0 and cell["later_first_s"] == 2.5
    assert cell["requests_per_s"] == 4 / 10.0
    assert cell["again"] == 2 * (0 + 80) and cell["again_share"] == 160 / 520
    assert cell["token_ms"] == pytest.approx(200.0)
    assert (cell["host_read_decode"], cell["host_read_prefill"], cell["host_written"]) == (20, 40, 60)
    assert cell["faults"] == {"offload": 2}
    without = cell_of(sessions, [50.0, 4.0, 6.0], {}, {"faults": {}})
    assert without["host_read_decode"] == without["recalled_host"] == 0


def cells(*speeds: float) -> dict[str, Any]:
    session = Session([], [], 1)
    session.replies, session.new = [replied(9.0, 100, 0), replied(1.0, 120, 100)], [100, 20]
    cell = cell_of([session], [1.0, 1.0], {}, {"faults": {}})
    sizes = {"device": 10**9, "clusters": 10**8, "host": 0}
    found = [cell | {"sessions": 2 * (i + 1), "requests_per_s": speed} for i, speed in enumerate(speeds)]
    return {"cells": found, "tokens": 5000, "bytes": sizes, "resident": 3 * 10**9}


def test_the_tier_wins_from_where_it_is_faster_to_the_end() -> None:
    assert wins_from({WITHOUT: cells(1, 1, 1, 1), TIER: cells(0.9, 1.1, 1.2, 2)}) == 4
    assert wins_from({WITHOUT: cells(1, 1, 1, 1), TIER: cells(2, 0.9, 1.2, 2)}) == 6
    assert wins_from({WITHOUT: cells(1, 1), TIER: cells(2, 1)}) is None


def test_the_table_names_what_it_compares() -> None:
    text = table({WITHOUT: cells(1, 1), TIER: cells(0.5, 2)}, fits=2)
    assert "- tier: 5,000 tokens in 1,100 MB (device 1,000, clusters 100)" in text
    assert "| 4 | 2 | tier | 1.00 | 1.00 | 2.000 |" in text
    assert "from 4 sessions on" in text


def test_sessions_share_no_prefix() -> None:
    if not (default_out() / "config.json").exists():
        pytest.skip("no demo model: sglang-clusterkv demo-model")
    tokenizer = AutoTokenizer.from_pretrained(default_out())
    sessions = make_sessions(tokenizer, 3, 300, 8)
    documents = [session._said for session in sessions]
    assert {len(document) for document in documents} == {300}
    assert max(shared(documents[0], other) for other in documents[1:]) < PAGE


# -- what rounding costs ----------------------------------------------------------------------------------------------


def test_kl_is_of_each_pair() -> None:
    p, q = (np.log(np.array([row])) for row in ([0.5, 0.5], [0.25, 0.75]))
    found = {
        "device": {"rows": {"dense": p, "ours": q}, "recalled_host": 0.0},
        "auto": {"rows": {"ours": q}, "recalled_host": 0.5},
        "int8": {"rows": {"ours": p}, "recalled_host": 0.75},
    }
    pairs = kl_of(found)["pairs"]
    forward = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert pairs["dense, device"]["kl"] == pytest.approx(forward) and pairs["dense, int8"]["kl"] == 0.0
    assert pairs["device, auto"]["kl"] == 0.0
    assert pairs["device, int8"]["kl"] == pytest.approx(0.25 * np.log(0.5) + 0.75 * np.log(1.5))
    text = kl_table(kl_of(found))
    assert "| int8 | dense | 0.00e+00 |" in text and "auto 50 %, int8 75 %" in text


def test_no_ratio_is_no_tier() -> None:
    with pytest.raises(SystemExit):
        parse_args(["--host-ratio", "1"])


def test_the_scheduler_is_the_largest_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(rss: int, children: tuple[Any, ...] = ()) -> Any:
        return SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=rss), children=lambda recursive: list(children))

    monkeypatch.setattr(host_tier.psutil, "Process", lambda pid: process(10, (process(30), process(20))))
    assert host_tier.resident_bytes(SimpleNamespace(process=SimpleNamespace(pid=1))) == 30  # type: ignore[arg-type]
