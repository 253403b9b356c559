"""Agents' sessions against an OpenAI-compatible server: who asks when, and how long each answer took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
from tqdm import tqdm

from benchmarks.agents.sessions import TOOLS, Message, Session


class Asked(NamedTuple):
    """One request; times are seconds (time.perf_counter)."""

    session: str
    sub_agent: bool
    turn: int  # from 0
    sent: float
    first: float  # of the answer's text
    last: float
    prompt_tokens: int
    cached_tokens: int | None  # None: the server does not say
    tokens: int  # of the answer

    @property
    def first_token_s(self) -> float:
        """Time to first token."""
        return self.first - self.sent

    @property
    def token_ms(self) -> float | None:
        """Time per token behind the first; None where there is none."""
        return (
            1000 * (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 and self.last > self.first else None
        )


class Reply(NamedTuple):
    """What an answer brought into its session."""

    text: str
    calls: list[Any]  # of tools, by the model itself
    asked: Asked


class Driver:
    """Asks a server.

    Args:
        base_url: of the OpenAI routes, with /v1.
        answer_tokens: of each answer.
        model: name of the served model; None: the server's first.
        exact: ask for answers of exactly so many tokens, by `ignore_eos`, which SGLang, vLLM and llama.cpp know.
        timeout_s: per request.
    """

    def __init__(
        self,
        base_url: str,
        answer_tokens: int,
        *,
        model: str | None = None,
        api_key: str = "EMPTY",
        exact: bool = True,
        timeout_s: float = 3600,
    ) -> None:
        self._client = openai.OpenAI(base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=0)
        self._model = model or self._client.models.list().data[0].id
        self._answer_tokens, self._more = answer_tokens, {"ignore_eos": True} if exact else {}

    def run(self, sessions: Sequence[Session], bar: tqdm | None = None) -> list[Asked]:
        """All sessions at once; raises what the first one that fails raises."""
        done: list[Asked] = []

        def note(asked: Asked) -> None:
            done.append(asked)
            if bar is not None:
                bar.update()

        with ThreadPoolExecutor(len(sessions)) as pool:
            for session in [pool.submit(self._session, session, False, note) for session in sessions]:
                session.result()
        return done

    def _session(self, session: Session, sub_agent: bool, note: Any) -> str:
        """A session from its first turn to its last; returns the last answer."""
        messages = session.opening()
        for turn in range(session.turns):
            reply = self._ask(session, sub_agent, turn, messages)
            note(reply.asked)
            if turn < len(session.results):
                messages += self._called(session, turn, reply, note)
        return reply.text

    def _called(self, session: Session, turn: int, reply: Reply, note: Any) -> list[Message]:
        """What the history gets of a turn: the answer, the model's call of a tool or the recorded one, and its result."""
        result = session.results[turn]
        if result is None:
            with ThreadPoolExecutor(len(session.sub_agents)) as pool:
                said = pool.map(lambda agent: self._session(agent, True, note), session.sub_agents)
            result = "\n".join(said)
        name, arguments = session.call(turn)
        call = reply.calls[0] if reply.calls else {"name": name, "arguments": arguments}
        identity = f"call_{session.name}_{turn}"
        return [
            {
                "role": "assistant",
                "content": reply.text,
                "tool_calls": [{"id": identity, "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": identity, "content": result},
        ]

    def _ask(self, session: Session, sub_agent: bool, turn: int, messages: list[Message]) -> Reply:
        sent = time.perf_counter()
        first = last = None
        text, usage = [], None
        calls: dict[int, dict[str, str]] = {}
        stream = self._client.chat.completions.create(
            model=self._model,
            messages=messages,
            tools=TOOLS,
            max_tokens=self._answer_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self._more,
        )
        for chunk in stream:
            usage = chunk.usage or usage
            delta = chunk.choices[0].delta if chunk.choices else None
            if delta is None or not (delta.content or delta.tool_calls):
                continue
            last = time.perf_counter()
            first = first or last
            text.append(delta.content or "")
            for part in delta.tool_calls or ():
                call = calls.setdefault(part.index, {"name": "", "arguments": ""})
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
        ended = time.perf_counter()
        assert usage is not None, "the server sent no usage with its stream"
        details = usage.prompt_tokens_details
        asked = Asked(
            session=session.name,
            sub_agent=sub_agent,
            turn=turn,
            sent=sent,
            first=first or ended,
            last=last or ended,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=None if details is None else details.cached_tokens,
            tokens=usage.completion_tokens,
        )
        return Reply("".join(text), [calls[index] for index in sorted(calls)], asked)
