"""Ask a server one question and get the trace of its answer: `sglang-clusterkv explain`. docs/explain.md has the format."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sglang_clusterkv.tools.haystack import FACTS, make_document
from sglang_clusterkv.tools.json_server import Advice, JsonServer, ServerError

KEY = "clusterkv_trace"
DEMO_TOKENS = 6000  # as in examples/agent.py
_TOP = 20  # log-probabilities per token of each server, where two are compared
_WINDOW = 12  # tokens that are detokenized together with each: a character may take several
_BROKEN = "\ufffd"  # what part of a character is detokenized to


_ADVICE = Advice(
    kind="a SGLang server",
    shorter="a shorter document",
    fewer="ask again later",
    request="--max-tokens",
)


class ExplainError(ServerError):
    """Something that the user can change; the message is one sentence with the fix."""


class Answer(NamedTuple):
    """What a server answered."""

    token_ids: list[int]
    logprobs: list[float]  # of these; empty where they were not asked for
    top: list[dict[int, float]]  # log-probabilities of the likeliest tokens at each, by id
    trace: dict[str, Any] | None


class Server(JsonServer):
    """A SGLang server.

    Args:
        base_url: with or without /v1.
        api_key: sent as a bearer token.
        timeout_s: per request.
        option: that the address was given with, for what is said of it.
    """

    def __init__(
        self, base_url: str, api_key: str = "EMPTY", timeout_s: float = 600, option: str = "--base-url"
    ) -> None:
        super().__init__(base_url, api_key, timeout_s, _ADVICE._replace(option=option))

    def model(self) -> str:
        """The name of the served model."""
        return str(self._field(self.request("/v1/models"), "data", 0, "id"))

    def tokenize(self, messages: list[dict[str, Any]]) -> list[int]:
        """The token ids of a chat's prompt, by the server's chat template."""
        return list(self._field(self.request("/tokenize", {"messages": messages}), "tokens"))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, special ones included; that of a character of several tokens is at its last one."""
        windows = [list(ids[max(0, end - _WINDOW) : end]) for end in range(1, len(ids) + 1)]
        listed = [part for window in windows for part in (window[:-1] or window, window)]
        if not listed:
            return []
        body = {"tokens": listed, "skip_special_tokens": False}
        texts = self._field(self.request("/detokenize", body), "text")
        before = ["" if len(window) == 1 else texts[2 * at] for at, window in enumerate(windows)]
        return pieces_of(before, texts[1::2])

    def answer(
        self, prompt: list[int], max_tokens: int, *, trace: bool = False, quest: bool = False, logprobs: bool = False
    ) -> Answer:
        """A greedy answer.

        Args:
            prompt: token ids.
            max_tokens: of the answer.
            trace: whether a trace is asked for.
            quest: whether it is to tell what Quest would have read.
            logprobs: whether log-probabilities are.
        """
        sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": max_tokens}
        if trace:
            sampling["custom_params"] = {KEY: {"quest": True} if quest else True}
        body: dict[str, Any] = {"input_ids": prompt, "sampling_params": sampling}
        if logprobs:
            body |= {"return_logprob": True, "top_logprobs_num": _TOP}
        reply = self.request("/generate", body)
        meta = self._field(reply, "meta_info")
        found = (meta.get(KEY) or [None])[-1]
        if trace and not isinstance(found, dict):
            raise ExplainError(
                f"{self.url} sent no trace: start it with --attention-backend clusterkv and --clusterkv-config "
                "'{\"trace\": true}'"
            )
        if trace and "error" in found:
            raise ExplainError(f"{self.url} keeps no trace of this request: {found['error']}")
        given = meta.get("output_token_logprobs") or []
        top = meta.get("output_top_logprobs") or []
        return Answer(
            token_ids=list(self._field(reply, "output_ids")),
            logprobs=[float(entry[0]) for entry in given],
            top=[{int(entry[1]): float(entry[0]) for entry in entries or ()} for entries in top],
            trace=found if trace else None,
        )

    def _field(self, reply: Any, *path: str | int) -> Any:
        try:
            for name in path:
                reply = reply[name]
        except (KeyError, IndexError, TypeError) as error:
            raise ExplainError(
                f"{self.url} answered without {path[-1]}: {self.advice.option} must be a SGLang server"
            ) from error
        return reply


def pieces_of(before: Sequence[str], with_it: Sequence[str]) -> list[str]:
    """The text of each token, from that of some tokens before it, without and with it."""
    pieces = []
    for at, (start, whole) in enumerate(zip(before, with_it, strict=True)):
        start = start.rstrip(_BROKEN)
        goes_on = whole.endswith(_BROKEN) and at < len(before) - 1
        pieces.append("" if goes_on or not whole.startswith(start) else whole[len(start) :])
    return pieces


def read_chat(path: Path) -> list[dict[str, Any]]:
    """OpenAI messages from a JSON file, up to the last that is not the assistant's: the answer to it is asked for.

    Raises ExplainError for a file that has none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExplainError(f"cannot read {path} ({error.strerror}): pass a JSON file with messages") from error
    except ValueError as error:
        raise ExplainError(f"{path} is not JSON ({error}): pass OpenAI messages") from error
    messages = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise ExplainError(f"{path} has no list of messages with roles: pass OpenAI messages")
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise ExplainError(f"{path} asks nothing: the last message must be the user's")
    return messages


def read_document(path: Path) -> str:
    """A text file. Raises ExplainError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExplainError(f"cannot read {path} ({reason}): pass a text file with --document") from error


def messages_of(document: Path | None, question: str | None, chat: Path | None) -> list[dict[str, Any]]:
    """What is asked: to go on with a chat, or a question about a document; without either, one of the demo's about the demo's.

    Raises ExplainError for files that cannot be read, and for a document without a question.
    """
    if chat is not None:
        return read_chat(chat)
    if document is None:
        fact = FACTS[1]
        text, question = make_document(DEMO_TOKENS, FACTS), question or fact.question
    elif question:
        text = read_document(document)
    else:
        raise ExplainError("a document alone asks nothing: pass --question as well")
    return [{"role": "user", "content": f"{text}\n\n{question}"}]


def ask(
    server: Server,
    messages: list[dict[str, Any]],
    max_tokens: int,
    compare: Server | None = None,
    *,
    quest: bool = False,
) -> dict[str, Any]:
    """The trace of a server's answer, with the texts of its tokens.

    With `compare` also what another server answers, with `quest` which pages Quest would have read.
    """
    prompt = server.tokenize(messages)
    other = None
    if compare is not None and compare.tokenize(messages) != prompt:
        raise ExplainError(f"{compare.url} reads this prompt as other tokens: --compare must serve the same model")
    answer = server.answer(prompt, max_tokens, trace=True, quest=quest, logprobs=compare is not None)
    assert answer.trace is not None
    trace = answer.trace | {"pieces": server.pieces(answer.trace["token_ids"])}
    if compare is not None:
        other = compare.answer(prompt, max_tokens, logprobs=True)
        pieces = compare.pieces([*prompt, *other.token_ids])[len(prompt) :]
        trace["compare"] = compared(answer, other) | {"model": compare.model(), "pieces": pieces}
    return trace


def compared(mine: Answer, other: Answer) -> dict[str, Any]:
    """Where two answers to one prompt part, and how far their servers' next tokens are apart up to there."""
    shorter = min(len(mine.token_ids), len(other.token_ids))
    parted = (at for at in range(shorter) if mine.token_ids[at] != other.token_ids[at])
    same_end = len(mine.token_ids) == len(other.token_ids)
    difference = next(parted, None if same_end else shorter)
    last = shorter - 1 if difference is None else difference
    divergences = [
        divergence(p, q) if at <= last else None for at, (p, q) in enumerate(zip(other.top, mine.top, strict=False))
    ]
    return {
        "token_ids": other.token_ids,
        "logprobs": other.logprobs,
        "traced_logprobs": mine.logprobs,
        "kl": divergences + [None] * (len(other.token_ids) - len(divergences)),
        "first_difference": difference,
    }


def divergence(p: dict[int, float], q: dict[int, float]) -> float | None:
    """A lower bound of the KL divergence of q from p, from the log-probabilities of some tokens each, in nats.

    Tokens that both name count one by one, all others as one outcome, which can only make it smaller. None where they share no
    token, or one that p has is impossible in q.
    """
    common = p.keys() & q.keys()
    if not common or any(q[token] == -math.inf < p[token] for token in common):
        return None
    total = sum(math.exp(p[token]) * (p[token] - q[token]) for token in common if p[token] > -math.inf)
    rest_p, rest_q = (1.0 - sum(math.exp(side[token]) for token in common) for side in (p, q))
    # Below float32's rounding of log-probabilities there is no rest that could be told.
    if rest_p > 1e-6 and rest_q > 1e-6:
        total += rest_p * math.log(rest_p / rest_q)
    return max(0.0, total)
