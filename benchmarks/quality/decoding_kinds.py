"""Four kinds of decoding over one length of context, from the kind that looks near to the kinds that look far.

- continuation: the text goes on.
- needles: a question about four facts of the document's older half, all answered in one answer.
- chat: short turns about a station that the first lines describe, with a document of most of the context behind them.
- agent: rows of a tool's result are copied that lies 5,000 tokens back, behind other results.

A `Reply` is prefilled up to its answer; the answer's tokens are the decode steps that are looked at.
"""

from __future__ import annotations

import json
import random
from typing import Any, NamedTuple

from benchmarks.chat import QUESTIONS, SYSTEM
from benchmarks.quality.documents import CODE, read_kind
from benchmarks.quality.prompts import Prompts
from sglang_clusterkv.tools.haystack import CITIES, magic_number

CONTINUATION, NEEDLES, CHAT, AGENT = KINDS = ("continuation", "needles", "chat", "agent")
ASKED = 4  # facts of one question
BACK = 5000  # tokens between a tool's result and the answer that copies from it
RESULT_TOKENS = 1200  # of another tool result, at most
COPIED = 4  # rows of one answer
SOURCE_CHARACTERS = 100_000
KEEPERS = ("Ada", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas")


class Reply(NamedTuple):
    """One answer to decode."""

    prompt: list[int]
    answer: list[int]
    exact: list[int]  # places in `answer` of tokens that only the old text tells


class Numbered(NamedTuple):
    """A document with facts in its older half, and how its text goes on."""

    prompt: list[int]
    following: list[int]
    facts: list[tuple[str, int]]  # city, number


def numbered_document(prompts: Prompts, tokens: int, natural: int, seed: int) -> Numbered:
    """Exactly `tokens` tokens of prose, every fact in its older half, and `natural` more of the same text.

    Raises ValueError where the text is too short or the facts do not fit.
    """
    rng = random.Random(f"{seed}/numbered/{tokens}")
    facts = list(zip(CITIES, rng.sample(range(10000, 100000), len(CITIES)), strict=True))
    pieces = [prompts.encode(f" {magic_number(*fact).sentence}") for fact in facts]
    head = prompts.encode(prompts.template.before)
    room = tokens - len(head) - sum(map(len, pieces))
    body = prompts.prose(rng, room + natural, [])
    following = body[room:]
    body = body[:room]
    for i, piece in reversed(list(enumerate(pieces))):
        at = int((i + 0.2 + 0.6 * rng.random()) * len(body) / (2 * len(pieces)))
        body[at:at] = piece
    return Numbered(head + body, following, facts)


def needle_replies(prompts: Prompts, document: Numbered, count: int, seed: int) -> list[Reply]:
    """Questions about four facts each, with the right answers; `exact` are the numbers' tokens."""
    rng = random.Random(f"{seed}/needles")
    replies = []
    for _ in range(count):
        facts = rng.sample(document.facts, ASKED)
        cities = ", ".join(city for city, _ in facts[:-1]) + f" and {facts[-1][0]}"
        template = prompts.template
        question = f"{template.ask}What are the magic numbers of {cities}?{template.answer}"
        answer: list[int] = []
        exact: list[int] = []
        for i, (city, number) in enumerate(facts):
            answer += prompts.encode(f"{' ' if i else ''}The magic number of {city} is")
            digits = prompts.encode(f" {number}")
            exact += range(len(answer), len(answer) + len(digits))
            answer += [*digits, *prompts.encode(".")]
        replies.append(Reply(document.prompt + prompts.encode(question), answer, exact))
    return replies


def chat_opening(prompts: Prompts, tokens: int, seed: int) -> list[int]:
    """The first message of a chat up to its first question: the station, then prose, `tokens` tokens in all."""
    head = prompts.encode(f"{prompts.template.before}{SYSTEM}\n\nThis is in the station's library:\n\n")
    return head + prompts.prose(random.Random(f"{seed}/chat"), tokens - len(head), [])


def chat_questions(prompts: Prompts, turns: int) -> list[list[int]]:
    """The turns' questions, each from the end of what was said to the beginning of its answer."""
    template = prompts.template
    return [
        prompts.encode(f"{template.ask_again if i else template.ask}{question}{template.answer}")
        for i, question in enumerate(QUESTIONS[:turns])
    ]


def agent_replies(prompts: Prompts, tokens: int, count: int, seed: int, back: int = BACK) -> list[Reply]:
    """An agent's session of about `tokens` tokens, of which each answer copies rows of one result; `exact` are all of them.

    Args:
        prompts: of the model.
        tokens: of the session up to the answers.
        count: answers, each of other rows.
        seed: of the rows.
        back: tokens between the result's end and the answer.

    Raises ValueError where `tokens` does not hold the result and what lies behind it.
    """
    rng = random.Random(f"{seed}/agent")
    rows = [json.dumps(row) for row in _stations(rng)]
    task = "Read the station list and the sources. Then copy the rows that I ask for. Call one tool at a time."
    listing = _call(prompts, "stations.jsonl", prompts.encode("\n".join(rows)))
    sources = _Sources(prompts)
    head = prompts.encode(f"{prompts.template.before}{task}{prompts.template.answer}")
    before = tokens - back - len(head) - len(listing)
    if before < 0:
        raise ValueError(
            f"{tokens} tokens do not hold a result of {len(listing)} and {back} behind it: use more tokens"
        )
    session = head + sources.calls(before) + listing + sources.calls(back)
    replies = []
    for _ in range(count):
        asked = rng.sample(rows, COPIED)
        names = ", ".join(json.loads(row)["station"] for row in asked)
        template = prompts.template
        question = f"I have read the files.{template.ask_again}Copy the rows of {names} from stations.jsonl."
        question += template.answer
        answer = prompts.encode("\n".join(asked))
        replies.append(Reply(session + prompts.encode(question), answer, list(range(len(answer)))))
    return replies


def _stations(rng: random.Random) -> list[dict[str, Any]]:
    """Rows of the tool's result; nothing else hints at their numbers."""
    keepers = rng.sample(KEEPERS, len(CITIES))
    return [
        {"station": city, "port": rng.randrange(10000, 60000), "keeper": keeper, "mast_cm": rng.randrange(1000, 9999)}
        for city, keeper in zip(CITIES, keepers, strict=True)
    ]


def _call(prompts: Prompts, path: str, result: list[int]) -> list[int]:
    """A call and its result, from the beginning of one answer to that of the next."""
    call = json.dumps({"name": "read_file", "arguments": {"path": path}})
    begin = f"<tool_call>\n{call}\n</tool_call>{prompts.template.ask_again}<tool_response>\n"
    return prompts.encode(begin) + result + prompts.encode(f"\n</tool_response>{prompts.template.answer}")


class _Sources:
    """Results of reading source files, as many tokens as are asked for."""

    def __init__(self, prompts: Prompts) -> None:
        self._prompts = prompts
        self._ids = prompts.encode(read_kind(CODE)[1][:SOURCE_CHARACTERS])
        self._calls = 0

    def calls(self, tokens: int) -> list[int]:
        """Calls with their results, so many tokens or, where the rest is too short for a call, a few less."""
        found: list[int] = []
        while (left := tokens - len(found)) > 0:
            path = f"module_{self._calls}.py"
            room = min(RESULT_TOKENS, left - len(_call(self._prompts, path, [])))
            body = self._ids[self._calls * RESULT_TOKENS :][: max(0, room)]
            if room <= 0:
                break
            if len(body) < room:
                raise ValueError(f"the source text has {len(self._ids)} tokens, more are asked for: use fewer")
            found += _call(self._prompts, path, body)
            self._calls += 1
        return found
