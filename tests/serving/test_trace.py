"""How a trace gets into its own request's response: over made-up requests, with SGLang's own code behind it.

Red when: a message with a traced request's fields has another request in it, the trace is not with the last token, a stream
that sends new tokens alone loses it, an abort gets one, one that failed ends the scheduler, a wrong ask passes, or one stays.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.tokenizer_manager import TokenizerManager, _slice_streaming_output_meta_info
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_clusterkv.clusters.trace import Trace
from sglang_clusterkv.serving import trace
from sglang_clusterkv.serving.trace import KEY


class Req:
    """What is read of SGLang's."""

    def __init__(self, tokens: int, reason: str | None = None) -> None:
        self.output_ids_through_stop = list(range(tokens))
        self.finished_reason = None if reason is None else SimpleNamespace(to_json=lambda: {"type": reason})
        self.customized_info: dict[str, list[Any]] | None = None

    def finished(self) -> bool:
        return self.finished_reason is not None


@pytest.fixture(autouse=True)
def documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces are put together elsewhere."""
    monkeypatch.setattr(trace, "_engine", SimpleNamespace(faults=SimpleNamespace(note=lambda *_: None)))
    monkeypatch.setattr(trace, "_document", lambda engine, req, kept: {"of": len(req.output_ids_through_stop)})
    trace._traces.clear()


def sent(reqs: list[Req], skip: Req | None = None) -> list[list[Req]]:
    """The messages that a batch's output makes."""
    messages: list[list[Req]] = []
    trace.around_output(lambda _, some, *rest: messages.append(list(some)), None, reqs, False, skip)
    return messages


def test_traced_requests_have_a_message_of_their_own() -> None:
    plain, other = Req(3), Req(5, "stop")
    traced, also = Req(4), Req(2, "length")
    assert sent([plain, other]) == [[plain, other]]
    trace._traces[traced] = trace._traces[also] = Trace(4)
    assert sent([plain, traced, other, also]) == [[plain, other], [traced, also]]
    assert plain.customized_info is other.customized_info is None
    assert traced.customized_info == {KEY: [None] * 4}
    assert also.customized_info == {KEY: [None, {"of": 2}]}
    assert list(trace._traces) == [traced]


def test_a_trace_goes_with_its_request() -> None:
    req = Req(3)
    trace._traces[req] = Trace(4)
    del req
    assert not trace._traces


def test_an_abort_has_none_and_keeps_none() -> None:
    for req in (Req(5, "abort"), Req(0, "abort"), Req(0, "length")):
        trace._traces[req] = Trace(4)
        sent([req])
        assert not any(req.customized_info[KEY]) and not trace._traces


def test_what_a_request_does_not_get_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    refused, broken = Req(2, "stop"), Req(2, "stop")
    trace._traces[refused] = Trace(4)
    trace._traces[refused].refused = "Too many."
    sent([refused])
    assert refused.customized_info[KEY][-1]["error"] == "Too many."
    noted = []
    monkeypatch.setattr(
        trace, "_engine", SimpleNamespace(faults=SimpleNamespace(note=lambda *what: noted.append(what)))
    )
    monkeypatch.setattr(trace, "_document", lambda *_: 1 // 0)
    trace._traces[broken] = Trace(4)
    sent([broken])
    assert "failed" in broken.customized_info[KEY][-1]["error"]
    assert [operation for operation, _ in noted] == ["trace"]


@pytest.mark.parametrize("incremental", [False, True])
def test_a_stream_ends_with_it(incremental: bool) -> None:
    """Each message has the values of its new tokens; SGLang's tokenizer gathers them, and cuts them again where it must."""
    state = SimpleNamespace(customized_info_accumulated={}, customized_info_reported_keys=set())
    req = Req(0)
    trace._traces[req] = Trace(4)
    offset, meta = 0, {}
    for tokens, reason in ((1, None), (3, None), (6, "length")):
        req.output_ids_through_stop = list(range(tokens))
        req.finished_reason = reason and SimpleNamespace(to_json=lambda: {"type": "length"})
        sent([req])
        new = {KEY: [req.customized_info[KEY][offset:tokens]]}
        meta = {}
        TokenizerManager.update_request_meta_info(SimpleNamespace(
            _accumulate_request_meta_info=TokenizerManager._accumulate_request_meta_info
        ), meta, state, new, 0, None)  # fmt: skip
        if incremental:
            _slice_streaming_output_meta_info(meta, offset, state.customized_info_accumulated.keys())
        assert len(meta[KEY]) == tokens - (offset if incremental else 0)
        assert [value is not None for value in meta[KEY]] == [False] * (len(meta[KEY]) - 1) + [reason is not None]
        offset = tokens
    assert meta[KEY][-1] == {"of": 6}


def test_only_a_yes_or_no_is_an_ask() -> None:
    def problem(params: Any, is_on: bool) -> str | None:
        return trace.problem_of(SamplingParams(custom_params=params), is_on)

    for params in (None, {}, {"other": 1}, {KEY: False}):
        assert problem(params, False) is problem(params, True) is None
    for ask in (True, {"quest": True}, {"quest": False}):
        assert problem({KEY: ask}, True) is None
        off = problem({KEY: ask}, False)
        assert off is not None and "keeps no traces" in off and "--clusterkv-config" in off
    for params in (
        {KEY: 1},
        {KEY: "true"},
        {KEY: None},
        {KEY: {}},
        {KEY: {"quest": 1}},
        {KEY: {"quest": True, "x": 1}},
    ):
        assert "neither true nor false" in str(problem(params, True))
        assert "neither true nor false" in str(problem(params, False))
