"""Refuse, with a sentence, what a request brings that the model has no place for: token ids first of all.

One scheduler serves everybody, and a forward looks up the ids of all its requests together. So each request is checked where
a scheduler receives it, before anything reads it: whichever process made it, and by what the model takes. What a request
says of itself (a session, pictures, embeddings) exempts it from nothing. SGLang itself checks lengths, `logit_bias`,
`token_ids_logprob` and the numbers for sampling; here is the rest of what is looked up by number. And what a client sends in
place of a text or a number gets as far as here: types are those that SGLang's own records declare.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import msgspec
import numpy as np

from sglang_clusterkv.serving import trace

if TYPE_CHECKING:
    from collections.abc import Iterable

BEHIND_PROMPT = -1  # the least `logprob_start_len`: log-probabilities of the answer alone
_WITHIN = ("sampling_params", "session_params")  # records in a request's record
# Fields of which SGLang takes more than it declares.
_WIDER: dict[str, Any] = {"custom_params": dict | None, "logit_bias": dict[str | int, float | bool] | None}


@dataclass(frozen=True)
class Takes:
    """What a model takes."""

    ids: range  # tokens with an embedding, those of LoRA adapters included
    logits: range  # tokens that it can answer
    placeholders: frozenset[int] = frozenset()  # ids that stand for pictures, sound or video
    traces: bool = False  # whether the server keeps traces for requests that ask for one


@dataclass(frozen=True)
class _Sender:
    """Of a refused request: what SGLang reads to answer it."""

    http_worker_ipc: str | None
    origin_input_ids: tuple[int, ...] = ()
    cached_tokens: int = 0
    reasoning_tokens: int = 0


def admit(scheduler: Any, received: Iterable[Any]) -> list[Any]:
    """What a scheduler received, without the requests that are refused; their senders get a 400 with the sentence."""
    from sglang.srt.managers.io_struct import BatchTokenizedEmbeddingReqInput, BatchTokenizedGenerateReqInput

    admitted = []
    for message in received:
        if isinstance(message, BatchTokenizedGenerateReqInput | BatchTokenizedEmbeddingReqInput):
            message.batch = [request for request in message.batch if _admitted(scheduler, request)]
            if message.batch:
                admitted.append(message)
        elif _admitted(scheduler, message):
            admitted.append(message)
    return admitted


def _admitted(scheduler: Any, request: Any) -> bool:
    from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput

    if not isinstance(request, TokenizedGenerateReqInput | TokenizedEmbeddingReqInput):
        return True
    try:
        problem = problem_of(request, takes_of(scheduler)) or _problem_of_session(request, scheduler)
    except Exception as error:  # one that cannot be checked is not let in either
        problem = f"The request cannot be checked: {error}."
    if problem is not None:
        _refuse(scheduler, request, problem)
    return problem is None


def takes_of(scheduler: Any) -> Takes:
    """What the model of a scheduler takes; adapters may have come since the last request."""
    config = scheduler.model_config
    adapters = getattr(scheduler.tp_worker.model_runner, "lora_manager", None)
    added = getattr(adapters, "lora_added_tokens_size", None) or 0
    names = vars(config.hf_config).items() if config.is_multimodal else ()
    return Takes(
        ids=range(config.hf_text_config.vocab_size + added),
        logits=range(config.vocab_size),
        placeholders=frozenset(
            value for name, value in names if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
        ),
        traces=trace.is_on(),
    )


def problem_of(request: Any, takes: Takes) -> str | None:
    """What is wrong with a tokenized request, in a sentence; None where nothing is."""
    if getattr(request, "input_embeds", None) is not None or request.positional_embed_overrides is not None:
        return "Embeddings as input are not served with --attention-backend clusterkv: send text or token ids."
    if request.token_indices_to_pool is not None:
        return "Scores at chosen positions are not served with --attention-backend clusterkv: score whole prompts."
    if problem := problem_of_types(request):
        return problem
    session = getattr(request, "session_params", None)
    # SGLang puts a session's history before the ids, and looks itself whether any are left then.
    history = session is not None and session.id is not None and request.session_id is None
    placeholders = takes.placeholders if request.mm_inputs is not None else frozenset()
    return (
        problem_of_ids(request.input_ids, takes.ids, placeholders, may_be_empty=history)
        or _problem_of_answer(request, takes.logits)
        or _problem_of_start(request)
        or trace.problem_of(getattr(request, "sampling_params", None), takes.traces)
    )


def problem_of_types(record: Any) -> str | None:
    """What is of another type than a record of SGLang's declares, in the record and in those of `_WITHIN`; null passes.

    A whole number that was sent as 16.0 or true becomes one, and what is asked for its truth becomes true or false.
    """
    if not isinstance(record, msgspec.Struct):
        return None
    for name, kind in _checked_fields(type(record)):
        value = getattr(record, name)
        if value is None or (said := _misfit(value, kind)) is None:
            continue
        if kind is bool:
            setattr(record, name, bool(value))
            continue
        whole = isinstance(value, bool) or isinstance(value, float) and value.is_integer()
        if not whole or _misfit(int(value), kind) is not None:
            return f"{name} is of another type than it has to be: {said[:1].lower()}{said[1:]}."
        setattr(record, name, int(value))
    within = (problem_of_types(getattr(record, name, None)) for name in _WITHIN)
    return next((problem for problem in within if problem is not None), None)


def _misfit(value: Any, kind: Any) -> str | None:
    """Why a value is not of a type; None where it is. Callers in Python may have numpy's or torch's numbers, sets and enums."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        with suppress(TypeError, msgspec.ValidationError):
            msgspec.convert(msgspec.to_builtins(value, enc_hook=_number_of), kind)
            return None
        return str(error)
    return None


def _number_of(value: Any) -> Any:
    """numpy's and torch's numbers and lists as Python's; raises TypeError for anything else."""
    if isinstance(value, float):  # one of its own kind
        return float(value)
    if not hasattr(value, "tolist"):
        raise TypeError(f"{type(value).__name__} is no number")
    return value.tolist()


@functools.cache
def _checked_fields(record: type[msgspec.Struct]) -> tuple[tuple[str, Any], ...]:
    """Name and type of the fields whose type JSON has."""
    fields = [(field.name, _WIDER.get(field.name, field.type)) for field in msgspec.structs.fields(record)]
    return tuple((name, kind) for name, kind in fields if all(map(_is_plain, _parts(kind))))


def _parts(kind: Any) -> list[Any]:
    """The types that a type is put together of."""
    inner = get_args(kind)
    return [kind] if get_origin(kind) is Literal or not inner else [part for one in inner for part in _parts(one)]


def _is_plain(kind: Any) -> bool:
    return get_origin(kind) is Literal or kind in (str, int, float, bool, dict, NoneType)


def problem_of_ids(
    ids: Any, vocabulary: range, placeholders: frozenset[int] = frozenset(), *, may_be_empty: bool = False
) -> str | None:
    """What is wrong with a prompt's ids; `placeholders` pass beside those of the vocabulary."""
    if ids is None or (len(ids) == 0 and not may_be_empty):
        return "The prompt has no token: send at least one."
    array = np.asarray(ids)
    if array.size == 0:
        return None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        return "The prompt's token ids are not whole numbers in one list: send a list of ids."
    if array.min() >= vocabulary.start and array.max() < vocabulary.stop:
        return None
    outside = set(array[(array < vocabulary.start) | (array >= vocabulary.stop)].tolist()) - placeholders
    return _outside("Token id", outside, vocabulary) if outside else None


def _problem_of_answer(request: Any, logits: range) -> str | None:
    """What is wrong with the ids and counts that are looked up among the logits."""
    sampling = request.sampling_params
    # With a least length SGLang keeps these from being answered; without one it only compares.
    if getattr(sampling, "min_new_tokens", 0) and sampling.stop_token_ids:
        outside = {id_ for id_ in sampling.stop_token_ids if id_ not in logits}
        if outside:
            return _outside("Stop token id", outside, logits)
    if (getattr(request, "top_logprobs_num", 0) or 0) > len(logits):
        return f"top_logprobs_num is {request.top_logprobs_num}: the model has {len(logits)} tokens."
    return None


def _problem_of_start(request: Any) -> str | None:
    """What is wrong with the place from which a prompt's log-probabilities are asked for; SGLang looks for its end alone."""
    start = getattr(request, "logprob_start_len", None)
    if not getattr(request, "return_logprob", False) or start is None or start >= BEHIND_PROMPT:
        return None
    return f"logprob_start_len is {start}: use {BEHIND_PROMPT} or more."


def _problem_of_session(request: Any, scheduler: Any) -> str | None:
    """What is wrong with a request that replaces others of its session; SGLang forgets them by their ids, one by one."""
    params = getattr(request, "session_params", None)
    if params is None or params.id is None or request.session_id is not None or not params.replace:
        return None
    if params.rid is None:
        return "The request replaces another one of its session: name that one by its rid, or open another session."
    session = scheduler.session_controller.get(params.id)
    if session is None or params.rid not in session.req_nodes:
        return None
    behind = list(_ids_behind(session.req_nodes[params.rid]))
    if len(set(behind)) == len(behind) and session.req_nodes.keys() >= set(behind):
        return None
    return f"Requests behind {params.rid} had ids that others of the session have: open another session."


def _ids_behind(node: Any) -> Iterable[str]:
    for child in node.children:
        yield child.req.rid
        yield from _ids_behind(child)


def _outside(what: str, ids: set[int], vocabulary: range) -> str:
    named = min(ids) if min(ids) < vocabulary.start else max(ids)
    return (
        f"{what} {named} is outside the model's vocabulary: use ids from {vocabulary.start} to {vocabulary.stop - 1}."
    )


def _refuse(scheduler: Any, request: Any, problem: str) -> None:
    """Answer a request that nothing has been made for yet, and give back what was lent with it."""
    from sglang.srt.managers.embed_types import PositionalEmbeds
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.runtime_context import get_device

    for item in getattr(request.mm_inputs, "mm_items", ()):
        item.release_transport_proxies()
    if isinstance(request.positional_embed_overrides, PositionalEmbeds):
        request.positional_embed_overrides.reconstruct(get_device().gpu_id)
    reason = {"type": "abort", "message": problem, "status_code": HTTPStatus.BAD_REQUEST.value}
    answer = AbortReq(rid=request.rid, finished_reason=reason)
    send(scheduler, "send_abort_output", answer, _Sender(request.http_worker_ipc))


def send(scheduler: Any, by: str, answer: Any, sender: Any) -> None:
    """Answer whoever sent a request to a scheduler, by its method of this name."""
    method = getattr(scheduler, by, None)
    if method is None:  # SGLang 0.5.22
        method = scheduler.ipc_channels.send_to_tokenizer.send_output
    method(answer, sender)
