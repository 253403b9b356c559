"""Traces of a real server: who gets one, what is in it, and that nothing of it is left.

Red when: a request that did not ask gets a trace or sees that somebody did, an answer changes because it is traced, a trace
tells of other tokens or segments than its request's, a stream gives it anywhere but with the last token, more steps come than
`trace_tokens`, a wrong ask gets in, more are traced at once than may be, or an abort leaves a trace behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import requests

from benchmarks.servers import Server
from sglang_clusterkv.clusters.tracing import MOST_AT_ONCE
from tests.support.tiny_model import SHAPE
from tests.support.traces import quest_pages, read_trace
from tests.support.traffic import CONFIG, Request, alone, assert_well, prompt

pytestmark = pytest.mark.server

KEY = "clusterkv_trace"
ASK = {"custom_params": {KEY: True}}
TOKENS = 24


@pytest.fixture
def server(tiny_server: Server) -> Iterator[Server]:
    """Idle, its cache empty; nothing is left when the test is over."""
    tiny_server.flush()
    yield tiny_server
    assert_well(tiny_server)
    assert tiny_server.counts()["traces_held"] == 0


def several(server: Server, prompts: list[list[int]], asks: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Requests that reach the scheduler together, each with its own sampling parameters."""
    sampling = [{"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} | ask for ask in asks]
    body = {"input_ids": prompts, "sampling_params": sampling}
    answer = requests.post(f"{server.url}/generate", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()


def assert_its_own(answer: dict[str, Any], ids: list[int], tokens: int) -> dict[str, Any]:
    """The answer's trace, which tells of this request alone."""
    *before, trace = answer["meta_info"][KEY]
    assert before == [None] * (tokens - 1)
    assert trace["token_ids"] == ids + answer["output_ids"]
    assert trace["request"]["rid"] == answer["meta_info"]["id"]
    assert trace["request"]["prompt_tokens"] == len(ids) and trace["request"]["answer_tokens"] == tokens
    assert trace["server"]["layers"] == SHAPE["num_hidden_layers"]
    assert trace["server"]["kv_heads"] == SHAPE["num_key_value_heads"]
    assert trace["server"]["clusterkv"]["budget_tokens"] == CONFIG["budget_tokens"]
    last = len(ids) + tokens - 2
    told = [step["token"] for step in trace["steps"]]
    assert told == list(range(last + 1 - len(told), last + 1))
    assert len(told) + trace["request"]["dropped_steps"] == tokens - 1
    bases = {step["token"]: step["base"] for step in trace["steps"]}
    for step in read_trace(trace):
        # Sinks, gaps and window are read anyway; all else up to the query is clustered.
        clustered = set(range(step.token + 1)).difference(*(range(*part) for part in bases[step.token]))
        for layer in step.positions:
            for positions in layer:
                assert 0 < len(positions) <= CONFIG["budget_tokens"]
                assert clustered.issuperset(positions.tolist())
        assert (abs(step.mass.sum(-1) - 1) < 0.01).all()
    for step in trace["steps"]:
        assert step["dense"] or step["bytes_read"] < step["bytes_dense"]
    return trace


def test_one_of_several_is_traced_and_the_others_see_nothing(server: Server) -> None:
    shared = prompt(40)
    prompts = [prompt(41), shared, shared[:512] + prompt(42)[:400], prompt(43)]
    expected = [alone(server, ids, TOKENS) for ids in prompts]
    server.flush()
    answers = several(server, prompts, [{}, ASK, {}, {"custom_params": {KEY: False}}], TOKENS)
    assert [answer["output_ids"] for answer in answers] == expected
    assert [KEY in answer["meta_info"] for answer in answers] == [False, True, False, False]
    trace = assert_its_own(answers[1], shared, TOKENS)
    assert len(read_trace(trace)) > TOKENS - 6, trace["steps"]
    assert trace["request"]["cached_tokens"] == 0
    assert "quest" not in trace
    quest = sampling(TOKENS) | {"custom_params": {KEY: {"quest": True}}}
    again = assert_its_own(server.generate(shared, TOKENS, sampling_params=quest), shared, TOKENS)
    assert again["request"]["cached_tokens"] > 900
    pages = [pages for step in quest_pages(again, 0) for pages in step]
    assert {len(set(of_step)) for of_step in pages} == {CONFIG["budget_tokens"] // again["server"]["page_size"]}
    assert max(max(of_step) for of_step in pages) < len(shared) // again["server"]["page_size"]


def sampling(tokens: int) -> dict[str, Any]:
    """Of a traced request."""
    return {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True} | ASK


def test_a_long_answer_keeps_its_newest_steps(server: Server) -> None:
    ids, tokens = prompt(50), 90
    trace = assert_its_own(server.generate(ids, tokens, sampling_params=sampling(tokens)), ids, tokens)
    assert len(trace["steps"]) == CONFIG["trace_tokens"]
    assert trace["request"]["dropped_steps"] == tokens - 1 - CONFIG["trace_tokens"]


def test_a_stream_brings_it_with_the_last_token(server: Server) -> None:
    ids = prompt(60)
    plain = Request(server, prompt(61), TOKENS)
    traced = Request(server, ids, TOKENS, **ASK)
    answer = {"output_ids": traced.result(), "meta_info": traced.meta}
    assert_its_own(answer, ids, TOKENS)
    plain.result()
    assert KEY not in plain.meta


def test_a_chat_brings_it_where_meta_info_is_asked_for(server: Server) -> None:
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "word " * 1100}],
        "max_tokens": 8,
        "ignore_eos": True,
        "temperature": 0,
        "return_meta_info": True,
        **ASK,
    }
    answer = requests.post(f"{server.url}/v1/chat/completions", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    trace = answer.json()["choices"][0]["meta_info"][KEY][-1]
    assert trace["request"]["answer_tokens"] == 8 and read_trace(trace)


def test_what_is_no_yes_or_no_is_refused(server: Server) -> None:
    wrong = sampling(4) | {"custom_params": {KEY: "yes"}}
    answer = requests.post(
        f"{server.url}/generate", json={"input_ids": prompt(70), "sampling_params": wrong}, timeout=600
    )
    assert answer.status_code == 400
    assert "clusterkv_trace in custom_params is neither true nor false" in answer.text


def test_no_more_are_traced_at_once_than_may_be(server: Server) -> None:
    """Long answers, so that some are retracted: the pool has less room than the requests need in the end."""
    prompts = [prompt(80 + number) for number in range(MOST_AT_ONCE + 2)]
    expected = [alone(server, ids, 40) for ids in prompts]
    server.flush()
    answers = several(server, prompts, [ASK] * len(prompts), 40)
    traces = [answer["meta_info"][KEY][-1] for answer in answers]
    refused = [trace["error"] for trace in traces if "error" in trace]
    assert len(refused) == 2 and all("ask again" in sentence for sentence in refused)
    for ids, answer, trace in zip(prompts, answers, traces, strict=True):
        if "error" not in trace:
            assert_its_own(answer, ids, 40)
    assert [answer["output_ids"] for answer in answers] == expected


def test_an_aborted_request_leaves_no_trace(server: Server) -> None:
    aborted = Request(server, prompt(90), 2000, **ASK)
    aborted.wait_for(20)
    assert server.counts()["traces_held"] == 1
    aborted.abort()
    aborted.join()
    assert aborted.was_aborted
    assert not any(aborted.meta.get(KEY, []))
