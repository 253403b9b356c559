"""A made-up document with facts in it, and questions that only the facts answer: for needle tests, examples, benchmarks.

The same arguments give the same text, and a longer document begins with the shorter one, so that a radix cache can help.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

# The log book in the demo model's tokenizer. Plain prose has more characters per token.
CHARS_PER_TOKEN = 3.4

CITIES = ["Oslo", "Lima", "Cairo", "Quebec", "Hanoi", "Dublin", "Nairobi", "Warsaw", "Sydney", "Havana"]

_PEOPLE = ["Ada", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hugo"]
_PLACES = ["the harbour", "the workshop", "the lamp room", "the east pier", "the store", "the weather mast"]
_WORKS = ["painted the railing", "counted the ropes", "repaired the pump", "cleaned the lenses", "wrote letters"]
_SKIES = ["Fog came in before noon.", "The wind turned north.", "It rained until dusk.", "The sea was calm all day."]


class Fact(NamedTuple):
    sentence: str
    question: str
    answer: str  # a correct reply contains it


# What the examples ask about: a small model finds these.
FACTS = [
    Fact("The secret passcode of the vault is 48213.", "What is the secret passcode of the vault?", "48213"),
    Fact("The magic number of Lima is 29772.", "What is the magic number of Lima?", "29772"),
    Fact("The name of the station's cat is Biscuit.", "What is the name of the station's cat?", "Biscuit"),
    Fact("The magic number of Warsaw is 62337.", "What is the magic number of Warsaw?", "62337"),
]


def magic_number(city: str, number: int) -> Fact:
    """The needle: a sentence that nothing else in the document hints at."""
    return Fact(f"The magic number of {city} is {number}.", f"What is the magic number of {city}?", str(number))


def log_book(chars: float, seed: int = 7, first_day: int = 1) -> list[str]:
    """Entries of a station's log book, a line each, until they have `chars` characters or a little more."""
    rng = random.Random(seed)
    entries: list[str] = []
    written_chars, day = 0, first_day - 1
    while written_chars < chars:
        day += 1
        who, other = rng.sample(_PEOPLE, 2)
        entry = (
            f"Day {day}. {who} {rng.choice(_WORKS)} at {rng.choice(_PLACES)}, and {other} {rng.choice(_WORKS)}. "
            f"{rng.choice(_SKIES)} Supper was at {rng.randint(5, 9)} o'clock.\n"
        )
        entries.append(entry)
        written_chars += len(entry)
    return entries


def make_document(tokens: int, facts: Sequence[Fact]) -> str:
    """A log book of about `tokens` tokens of the demo model, the same every time, with the facts spread over it."""
    entries = log_book(tokens * CHARS_PER_TOKEN)
    for number, fact in enumerate(facts):
        entries.insert(int(len(entries) * (number + 0.5) / len(facts)), fact.sentence + "\n")
    return "".join(entries)


def haystack(chars: float, seed: int) -> list[str]:
    """Entries of a log book with `chars` characters or a little less, and as many tokens per character at any length."""
    # Where a digit is a token, a book from day 1 on gets denser. Four digits last for 300,000 tokens.
    return log_book(chars, seed, first_day=1000)[:-1]


def hide(fact: Fact, chars: float, depth: int, seed: int) -> str:
    """A document of about `chars` characters with one fact at a depth: 0 before its first entry, 100 after its last."""
    entries = haystack(chars - len(fact.sentence) - 1, seed)
    entries.insert(round(len(entries) * depth / 100), fact.sentence + "\n")
    return "".join(entries)
