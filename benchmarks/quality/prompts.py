"""Task prompts in RULER's sense (arXiv 2404.06654) over natural prose at exact lengths: needles, variables, common words.

A prompt is two runs of token ids, the document and the question, so that a question can be prefilled with the document or go
through decode steps. The same arguments give the same prompt, and no prompt depends on another.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from sglang_clusterkv.tools.haystack import CITIES, Fact, magic_number

DEPTHS = (10, 30, 50, 70, 90)  # percent of the document before the needle that is asked for
DISTRACTORS = 5  # further cities with a number of their own
VALUES = 3  # numbers of one city
HOPS = 2  # assignments after the first
COMMON_WORDS = 4
COMMON_SHARE = 0.5  # of the list's entries, all common words together
RARE_WORDS = 300
WORD_USES = 10  # in the text, of a word that lists are made of: no names and no typing errors
WORDS = "common words"
JSON, COPY = "fields into JSON", "exact copy"
SHIPS = ["Aurora", "Boreas", "Cormorant", "Delfin", "Estrella", "Falcon"]
CARGOES = ["copper", "barley", "marble", "cotton", "pepper", "timber", "amber", "salt"]
CAPTAINS = ["Ingrid", "Matteo", "Nadia", "Oskar", "Paloma", "Rashid", "Sigrid", "Tomas"]
PORTS = ["Genoa", "Bergen", "Tunis", "Malaga", "Gdansk", "Smyrna", "Calais", "Bilbao"]
OWNERS = ["Yusuf", "Zelda", "Viktor", "Wanda", "Ulrich", "Xenia"]
# Questions over one document, by task, in `Prompts.make_together`.
TOGETHER = {"needle with distractors": 3, "needle with values": 1, "variables": 2, JSON: 3, COPY: 3}
_SLOT = "\0"


class Sample(NamedTuple):
    """One question about one document."""

    task: str
    length: int  # tokens of document and question
    number: int
    depth: int | None  # percent of the document before the needle that is asked for; None where there is no single one
    document: list[int]
    question: list[int]  # to the beginning of the answer, which is given
    expected: list[str]  # a correct answer contains each
    answer_tokens: int  # most that are decoded
    part: int = 0  # of a document that is asked more than one question: which question of its task


class _Parts(NamedTuple):
    """What a task puts around and into the prose."""

    needles: list[str]  # in the order in which they lie in the document, except for one at a depth
    question: str
    answer_begin: str
    expected: list[str]
    answer_tokens: int
    introduction: str = ""
    at_depth: bool = False  # the first needle lies at the sample's depth


class Template(NamedTuple):
    """What stands around a document, its questions and their answers."""

    before: str  # the document
    ask: str  # between the document and its first question
    answer: str  # between a question and its answer
    ask_again: str  # between an answer and the next question


PLAIN = Template("", "\n\nQuestion: ", "\nAnswer: ", "\n\nQuestion: ")


def _template(tokenizer: Any) -> Template:
    """A tokenizer's chat template, cut where the texts go."""
    messages = [{"role": role, "content": _SLOT} for role in ("user", "assistant", "user")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, _, ask_again, answer = text.split(_SLOT)
    return Template(before, "\n\n", answer, ask_again)


def sentences_of(text: str) -> list[str]:
    """Sentences of prose, of 30 to 300 characters, each with a space before it; those with digits and listings are left out."""
    found = []
    unwrapped = re.sub(r"(?<=[a-z,;])\n *(?=[a-z])", " ", text)
    for line in unwrapped.splitlines():
        for sentence in re.split(r"(?<=[.!?])\s+", line.strip()):
            whole = 30 <= len(sentence) <= 300 and sentence[0].isupper() and sentence[-1] in ".!?"
            if whole and not re.search(r"\d", sentence):
                found.append(f" {sentence}")
    return found


class Prompts:
    """Makes samples for one model and one text.

    Args:
        tokenizer: of the model.
        text: the prose; at least as long as the longest document.
        seed: of everything random.
        chat: by the tokenizer's chat template; else as a plain text to be continued.

    Raises ValueError where the text has too few words or sentences.
    """

    def __init__(self, tokenizer: Any, text: str, seed: int = 7, chat: bool = True) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._sentences = sentences_of(text)
        uses = Counter(re.findall(r"\b[a-z]{5,8}\b", text))
        self._words = sorted(word for word, count in uses.items() if count >= WORD_USES)
        if not self._sentences or len(self._words) < COMMON_WORDS + RARE_WORDS:
            raise ValueError(
                f"the text has {len(self._sentences)} sentences and {len(self._words)} words: use a longer one"
            )
        self.template = _template(tokenizer) if chat else PLAIN

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, without special tokens added."""
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def make(self, task: str, length: int, number: int) -> Sample:
        """One sample.

        Args:
            task: of `TASKS`.
            length: tokens of document and question together, exactly.
            number: which sample; it chooses depth, names, numbers and prose.

        Raises ValueError where the length is too short for the task, or the text for the length.
        """
        rng = random.Random(f"{self._seed}/{task}/{length}/{number}")
        depth = DEPTHS[number % len(DEPTHS)]
        words = rng.sample(self._words, COMMON_WORDS + RARE_WORDS)
        parts = _common_words(words[:COMMON_WORDS]) if task == WORDS else NEEDLES[task](rng)
        head = self.encode(self.template.before + parts.introduction)
        question = self._question(parts)
        room = length - len(head) - len(question)
        found = depth if parts.at_depth else None
        body = self._word_list(rng, room, words) if task == WORDS else self.prose(rng, room, parts.needles, found)
        return Sample(task, length, number, found, head + body, question, parts.expected, parts.answer_tokens)

    def make_together(self, length: int, number: int) -> list[Sample]:
        """Samples over one document that has the needles of all of them, `TOGETHER` of each task.

        Args:
            length: tokens of the document and the longest question.
            number: which document; it chooses names, numbers and prose.

        Raises ValueError as `make` does.
        """
        rng = random.Random(f"{self._seed}/together/{length}/{number}")
        cities = rng.sample(CITIES, 1 + DISTRACTORS + TOGETHER["needle with values"])
        facts = [magic_number(city, int(n)) for city, n in zip(cities, _numbers(rng, 1 + DISTRACTORS), strict=False)]
        made = {
            "needle with distractors": [_one_of(facts, i) for i in range(TOGETHER["needle with distractors"])],
            "needle with values": [_values_of(rng, city) for city in cities[1 + DISTRACTORS :]],
            "variables": [_variables(rng) for _ in range(TOGETHER["variables"])],
            JSON: [_fields(rng, ship) for ship in rng.sample(SHIPS, TOGETHER[JSON])],
            COPY: [_copy(rng, owner, self._words) for owner in rng.sample(OWNERS, TOGETHER[COPY])],
        }
        asked = [(task, i, parts) for task, several in made.items() for i, parts in enumerate(several)]
        questions = [self._question(parts) for *_, parts in asked]
        head = self.encode(self.template.before)
        # Sentences of one part stay in their order: as cards of several hands that are dealt in turn.
        hands = [list(dict.fromkeys(parts.needles)) for *_, parts in asked[TOGETHER["needle with distractors"] - 1 :]]
        turns = [i for i, hand in enumerate(hands) for _ in hand]
        rng.shuffle(turns)
        needles = [hands[i].pop(0) for i in turns]
        document = head + self.prose(rng, length - len(head) - max(map(len, questions)), needles)
        return [
            Sample(task, length, number, None, document, question, parts.expected, parts.answer_tokens, 1 + i)
            for (task, i, parts), question in zip(asked, questions, strict=True)
        ]

    def _question(self, parts: _Parts) -> list[int]:
        """To the beginning of its answer."""
        return self.encode(f"{self.template.ask}{parts.question}{self.template.answer}{parts.answer_begin}")

    def prose(self, rng: random.Random, room: int, sentences: Sequence[str], depth: int | None = None) -> list[int]:
        """Sentences from a random place of the text on, exactly `room` tokens with the needles among them.

        Args:
            rng: chooses the place and where the needles go.
            room: tokens.
            sentences: the needles.
            depth: of the first needle, in percent, the others go anywhere; None: all anywhere, in their order.

        Raises ValueError where the needles do not fit, or the text is too short.
        """
        needles = [self.encode(f" {needle}") for needle in sentences]
        left = room - sum(map(len, needles))
        if left < 0:
            raise ValueError(f"{room} tokens do not hold {len(needles)} needles: use a longer length")
        pieces: list[list[int]] = []
        first = rng.randrange(len(self._sentences))
        while left > 0:
            if len(pieces) == len(self._sentences):
                raise ValueError(f"the text is shorter than {room} tokens: use a longer one")
            ids = self.encode(self._sentences[(first + len(pieces)) % len(self._sentences)])[:left]
            pieces.append(ids)
            left -= len(ids)
        places = sorted(rng.randrange(len(pieces) + 1) for _ in needles)
        if depth is not None:
            places = [round(len(pieces) * depth / 100), *rng.sample(places, len(places) - 1)]
        placed = sorted(zip(places, needles, strict=True), key=lambda pair: pair[0])
        for place, needle in reversed(placed):
            pieces.insert(place, needle)
        return [token for piece in pieces for token in piece]

    def _word_list(self, rng: random.Random, room: int, words: Sequence[str]) -> list[int]:
        """A numbered list of `room` tokens, the first `COMMON_WORDS` of the words much more often than the others."""
        ids: list[int] = []
        number = 0
        while len(ids) < room:
            number += 1
            common = rng.random() < COMMON_SHARE
            word = rng.choice(words[:COMMON_WORDS] if common else words[COMMON_WORDS:])
            ids += self.encode(f" {number}. {word}")
        return ids[:room]


def _numbers(rng: random.Random, count: int) -> list[str]:
    """Different numbers of five digits."""
    return [str(number) for number in rng.sample(range(10000, 100000), count)]


def _needle(rng: random.Random) -> _Parts:
    """One sentence with a number, in prose that has nothing like it."""
    return _magic_number(rng.sample(CITIES, 1), _numbers(rng, 1))


def _needle_with_distractors(rng: random.Random) -> _Parts:
    """The same among sentences of the same form about other cities."""
    return _magic_number(rng.sample(CITIES, 1 + DISTRACTORS), _numbers(rng, 1 + DISTRACTORS))


def _magic_number(cities: list[str], numbers: list[str]) -> _Parts:
    """A needle per city; the first is asked for."""
    return _one_of([magic_number(city, int(number)) for city, number in zip(cities, numbers, strict=True)], 0)


def _one_of(facts: Sequence[Fact], asked: int) -> _Parts:
    """All facts as needles; one is asked for."""
    fact = facts[asked]
    begin = fact.sentence.removesuffix(f" {fact.answer}.")
    sentences = [each.sentence for each in facts]
    return _Parts(sentences, fact.question, begin, [fact.answer], answer_tokens=24, at_depth=True)


def _needle_values(rng: random.Random) -> _Parts:
    """Several sentences with one key and a value each; all values are asked for."""
    return _values_of(rng, rng.choice(CITIES))


def _values_of(rng: random.Random, city: str) -> _Parts:
    """The same of a city that is given."""
    numbers = _numbers(rng, VALUES)
    sentences = [f"One of the magic numbers of {city} is {number}." for number in numbers]
    question = f"What are all the magic numbers of {city}?"
    return _Parts(sentences, question, f"The magic numbers of {city} are", numbers, answer_tokens=16 * VALUES)


def _variables(rng: random.Random) -> _Parts:
    """A chain of assignments in their order, spread over the document; all variables of the value are asked for."""
    names = ["".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(HOPS + 1)]
    (value,) = _numbers(rng, 1)
    chain = [f"VAR {names[0]} = {value}.", *(f"VAR {after} = VAR {before}." for before, after in pairwise(names))]
    question = f"Find all variables that are assigned the value {value} in the text above."
    begin = f"The {len(names)} variables that are assigned the value {value} are VAR"
    return _Parts(chain, question, begin, names, answer_tokens=16 * len(names))


def _fields(rng: random.Random, ship: str) -> _Parts:
    """A sentence for each field of a ship; all are asked for as JSON."""
    cargo, captain, port, crew = rng.choice(CARGOES), rng.choice(CAPTAINS), rng.choice(PORTS), str(rng.randint(20, 99))
    sentences = [
        f"The cargo of the {ship} is {cargo}.",
        f"The captain of the {ship} is {captain}.",
        f"The home port of the {ship} is {port}.",
        f"The crew of the {ship} is {crew}.",
    ]
    question = f"What are the cargo, captain, home port and crew of the {ship}? Answer in JSON."
    begin = f'{{"ship": "{ship}", "cargo": "'
    return _Parts(sentences, question, begin, [cargo, captain, port, crew], answer_tokens=64)


def _copy(rng: random.Random, owner: str, words: Sequence[str]) -> _Parts:
    """A string of words and digits, which is asked for as it stands."""
    first, second, third = rng.sample(words, 3)
    key = f"{first}-{rng.randint(1000, 9999)}-{second}-{rng.randint(1000, 9999)}-{third}"
    begin = f"The access key of {owner} is"
    return _Parts([f"{begin} {key}."], f"What is the access key of {owner}?", begin, [key], answer_tokens=32)


def _common_words(common: Sequence[str]) -> _Parts:
    """The words that appear most often in a list."""
    introduction = "Below is a numbered list of words. Some appear more often than others. Memorize these.\n\n"
    question = f"What are the {len(common)} most common words in the above list?"
    begin = f"The {len(common)} words that appear most often in the list are"
    return _Parts([], question, begin, list(common), answer_tokens=12 * len(common), introduction=introduction)


NEEDLES: dict[str, Callable[[random.Random], _Parts]] = {
    "needle": _needle,
    "needle with distractors": _needle_with_distractors,
    "needle with values": _needle_values,
    "variables": _variables,
}
TASKS = [*NEEDLES, WORDS]
