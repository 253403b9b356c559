"""Traces of requests: who asked for one, and how it gets to whom.

A request asks in its `custom_params`, which SGLang hands to the scheduler with it. Its trace comes back in its own response, as
`meta_info["clusterkv_trace"]`, with its last token: there is no other way to a trace, so nobody else sees it. It is kept with
SGLang's record of the request and goes with it, however that ends. Traced requests are streamed in messages of their own, for
a message to the tokenizer has each of its fields for all of its requests.
"""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import msgspec
import pybase64

from sglang_clusterkv import __version__
from sglang_clusterkv.clusters import tracing
from sglang_clusterkv.clusters.trace import FORMAT, VERSION, Step, Trace, document
from sglang_clusterkv.memory.step_bytes import kv_bytes, sparse_bytes
from sglang_clusterkv.serving import active

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_clusterkv.clusters.engine import ClusterEngine

logger = logging.getLogger(__name__)

KEY = "clusterkv_trace"  # in custom_params, and in meta_info
QUEST = "quest"  # asks for what Quest would have read, in an object instead of true
_NOT_TRUE = (
    f'{KEY} in custom_params is neither true nor false, nor {{"{QUEST}": true}}: set it to one of these, '
    "or leave it out."
)
_OFF = (
    f"This server keeps no traces: start it with 'trace' set to true in --clusterkv-config, or leave {KEY} out of "
    "custom_params."
)
_TOO_MANY = f"{tracing.MOST_AT_ONCE} requests were traced already when this one began: ask again once they are done."
_FAILED = "The server failed to put this trace together; its log has the reason."

_traces: WeakKeyDictionary[Any, Trace] = WeakKeyDictionary()  # by SGLang's Req, until its response
_engine: ClusterEngine | None = None


def is_on() -> bool:
    """Whether this process keeps traces."""
    config = active.active_config()
    return config is not None and config.trace


def problem_of(sampling: Any, is_on: bool) -> str | None:
    """What is wrong with how a request asks for a trace, in a sentence; None where nothing is."""
    asked = _asked(sampling)
    wanted = asked.get(QUEST) if isinstance(asked, dict) and len(asked) == 1 else asked
    if not isinstance(wanted, bool):
        return _NOT_TRUE
    return _OFF if asked and not is_on else None


def _asked(sampling: Any) -> Any:
    params = getattr(sampling, "custom_params", None)
    return params.get(KEY, False) if isinstance(params, dict) else False


def start(engine: ClusterEngine, reqs: list[Any]) -> None:
    """Requests of a prefill batch are launched (before it is): those that ask for it are traced from now on."""
    global _engine
    if not engine.config.trace:
        return
    _engine = engine
    for req in reqs:
        asked = _asked(req.sampling_params)
        if asked and not req.finished_output:
            quest = isinstance(asked, dict) and asked[QUEST]
            trace = _traces.setdefault(req, Trace(engine.config.trace_tokens, quest))
            if trace.refused is None and not engine.tracing.start(req.kv.req_pool_idx, trace):
                trace.refused = _TOO_MANY


def held() -> dict[str, int]:
    """For /server_info: requests whose trace is kept now; nothing where traces are off."""
    return {"traces_held": len(_traces)} if is_on() else {}


def around_output(
    original: Callable[..., Any],
    streamer: Any,
    reqs: list[Any],
    return_logprob: bool,
    skip_req: Any = None,
) -> None:
    """What a batch gave goes out (AROUND stream_output): traced requests in a message of their own."""
    traced = [req for req in reqs if req in _traces] if _traces else []
    if not traced:
        original(streamer, reqs, return_logprob, skip_req)
        return
    others = [req for req in reqs if req not in traced]
    if others:
        original(streamer, others, return_logprob, skip_req)
    for req in traced:
        if req is not skip_req:
            _attach(req)
    original(streamer, traced, return_logprob, skip_req)


def _attach(req: Any) -> None:
    """Set what SGLang sends with each token of a request: nothing, and the trace with the last one."""
    ids = req.output_ids_through_stop
    values: list[Any] = [None] * len(ids)
    if req.finished():
        trace = _traces.pop(req)
        if ids and req.finished_reason.to_json()["type"] != "abort":
            values[-1] = _answer(req, trace)
    req.customized_info = (req.customized_info or {}) | {KEY: values}


def _answer(req: Any, trace: Trace) -> dict[str, Any]:
    """The trace of a request that ended."""
    assert _engine is not None
    problem = trace.refused
    if problem is None:
        try:
            return _document(_engine, req, trace)
        except Exception as error:
            _engine.faults.note("trace", error)
            problem = _FAILED
    return {"format": FORMAT, "version": VERSION, "error": problem}


def _document(engine: ClusterEngine, req: Any, trace: Trace) -> dict[str, Any]:
    from sglang.srt.runtime_context import get_server_args

    prompt, answer = list(req.origin_input_ids), list(req.output_ids_through_stop)
    engine.tracing.collect(trace, len(prompt) + len(answer) - 1)
    geometry = engine.index.geometry
    item_bytes = engine.key_buffers[0].element_size()

    def step_bytes(step: Step, recalling: int) -> tuple[int, int]:
        whole = kv_bytes(step.token + 1, geometry.head_dim, item_bytes)
        sparse = whole
        if step.dense is None:
            sparse = sparse_bytes(
                engine.config,
                geometry.head_dim,
                item_bytes,
                clustered=step.clustered,
                base=step.base_tokens,
                segments=step.segments,
            )
        heads = geometry.kv_heads
        read = recalling * sparse + (geometry.layers - recalling) * whole
        return heads * read, heads * geometry.layers * whole

    arguments = get_server_args()
    return document(
        trace,
        prompt=prompt,
        answer=answer,
        server={
            "model": arguments.served_model_name or arguments.model_path,
            "clusterkv": msgspec.to_builtins(engine.config),
            "page_size": geometry.page_size,
            "layers": geometry.layers,
            "kv_heads": geometry.kv_heads,
            "sglang": version("sglang"),
            "sglang_clusterkv": __version__,
        },
        request={"rid": req.rid, "cached_tokens": req.cached_tokens},
        step_bytes=step_bytes,
        row_of=engine.index.row_of,
        encode=lambda data: pybase64.b64encode(data).decode("ascii"),
    )
