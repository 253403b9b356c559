"""What agents ask: sessions of one long first prompt and many short turns, the same for the same arguments.

A session is an agent that works through a log book: its first prompt has instructions and the book; each turn is a request, an
answer of about .3 % of the first prompt's length, a call of a tool, and the tool's result of about 1 %. Every second session
delegates once: two sub-agents get the same first prompt and a task each, and what they answer last is the tool's result.
All lengths follow from that of the first prompt.
"""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from sglang_clusterkv.tools.haystack import CHARS_PER_TOKEN, log_book

Message = dict[str, Any]

TURNS, SUB_TURNS, SUB_AGENTS = 13, 4, 2
DELEGATES_AT = 4  # turn, counted from 0
RESULT_SHARE, ANSWER_SHARE = 0.01, 0.003  # of the first prompt's tokens
LEAST_RESULT, LEAST_ANSWER = 16, 8  # tokens
AROUND = 60  # tokens of a turn beside the tool's result and the answer: roles, the call
LAST_DAY = 9000  # of four digits, which log books of any length have

SYSTEM = (
    "You are one of several agents who check the log book of a research station. Read pages of other books with the tools that "
    "you have, say briefly what you find, and go on. This is the log book:\n\n"
)
TASK = (
    "Compare the pages of book {book}, one by one, with what the log book says about day {day} and the days after it."
)


def _tool(name: str, description: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


READ, DELEGATE = "read_page", "delegate"
TOOLS = [
    _tool(READ, "Read one page of a book.", "page"),
    _tool(DELEGATE, "Give a task to another agent, who has the same log book.", "task"),
]


class Session(NamedTuple):
    """One agent's work.

    Attributes:
        name: unique among the sessions of a run.
        first_prompt: instructions and the book.
        task: the user's message.
        results: what the tools answer, after each turn but the last; None where the sub-agents' answers are the result.
        sub_agents: of the one turn that delegates; they have the first prompt of this session.
    """

    name: str
    first_prompt: str
    task: str
    results: tuple[str | None, ...]
    sub_agents: tuple[Session, ...] = ()

    @property
    def turns(self) -> int:
        """Requests, without those of the sub-agents."""
        return len(self.results) + 1

    @property
    def requests(self) -> int:
        """Requests, those of the sub-agents included."""
        return self.turns + sum(agent.requests for agent in self.sub_agents)

    def opening(self) -> list[Message]:
        """The messages of the first request."""
        return [{"role": "system", "content": self.first_prompt}, {"role": "user", "content": self.task}]

    def call(self, turn: int) -> tuple[str, str]:
        """The tool that is called after a turn, and its arguments as JSON: as recorded, for a server whose model calls none."""
        if self.results[turn] is None:
            return DELEGATE, json.dumps({"task": self.sub_agents[0].task})
        return READ, json.dumps({"page": f"{self.name}-{turn + 1}"})


def answer_tokens(tokens: int) -> int:
    """Of each answer, where the first prompt has so many."""
    return max(LEAST_ANSWER, round(ANSWER_SHARE * tokens))


def result_tokens(tokens: int) -> int:
    """Of each tool's result, about."""
    return max(LEAST_RESULT, round(RESULT_SHARE * tokens))


def pool_tokens(sessions: list[Session], tokens: int) -> int:
    """KV slots with which no session of a run evicts another's, generously."""
    turn = answer_tokens(tokens) + result_tokens(tokens) + AROUND
    return sum(
        round(1.3 * tokens) + turn * (session.requests + SUB_AGENTS) + AROUND * len(session.sub_agents)
        for session in sessions
    )


def make_sessions(count: int, tokens: int, seed: int, turns: int = TURNS) -> list[Session]:
    """Sessions with first prompts of about `tokens` tokens of the demo model, no two alike; every second one delegates."""
    made = []
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        name = f"s{number + 1}"
        book = _text(tokens - len(SYSTEM) / CHARS_PER_TOKEN, draw)
        session = _session(name, SYSTEM + book, tokens, turns, draw)
        if number % 2 and turns > 1:
            at = min(DELEGATES_AT, turns - 2)
            results = (*session.results[:at], None, *session.results[at + 1 :])
            agents = [
                _session(f"{name}.{agent + 1}", session.first_prompt, tokens, min(SUB_TURNS, turns), draw)
                for agent in range(SUB_AGENTS)
            ]
            session = session._replace(results=results, sub_agents=tuple(agents))
        made.append(session)
    return made


def _session(name: str, first_prompt: str, tokens: int, turns: int, draw: random.Random) -> Session:
    task = TASK.format(book=name, day=draw.randrange(1, LAST_DAY))
    results = tuple(_text(result_tokens(tokens), draw) for _ in range(turns - 1))
    return Session(name, first_prompt, task, results)


def _text(tokens: float, draw: random.Random) -> str:
    """So many tokens of a log book, about."""
    chars = int(tokens * CHARS_PER_TOKEN)
    return "".join(log_book(chars, draw.randrange(2**31), draw.randrange(1000, LAST_DAY)))[:chars]
