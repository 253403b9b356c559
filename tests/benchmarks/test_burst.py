"""What benchmarks.burst counts, against a server that is made up.

Red when: tokens of other prompts count as the copies', or their clusters do; what the copies found cached counts as prefilled;
a row hides that its runs differ.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import burst
from benchmarks.burst import OTHERS, Burst, equal_before_others, equal_prompts, first_alone, table
from sglang_clusterkv.tools.haystack import FACTS, make_document

DOCUMENT = make_document(300, FACTS)
QUESTIONS = [fact.question for fact in FACTS[:3]]


class MadeUp:
    """Every word is a token and half of a prompt's are clustered; a list shares nothing, a later list finds what was there."""

    url = "http://nowhere"

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.clustered = 0

    def post(self, url: str, json: dict[str, Any], timeout: float) -> SimpleNamespace:
        found = []
        cached = set(self.known)
        for text in json["text"]:
            words = len(text.split())
            hit = len(DOCUMENT.split()) if any(text.startswith(known) for known in cached) else 0
            self.clustered += 0 if hit else words // 2
            self.known.add(text[: len(DOCUMENT)])
            found.append({"meta_info": {"prompt_tokens": words, "cached_tokens": hit}})
        return SimpleNamespace(status_code=200, json=lambda: found)

    def generate(self, text: str, tokens: int) -> dict[str, Any]:
        (reply,) = self.post("", {"text": [text]}, 0).json()
        return reply

    def counts(self) -> dict[str, Any]:
        return {"tokens_clustered": self.clustered}

    def flush(self) -> None:
        self.known.clear()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    found = MadeUp()
    monkeypatch.setattr(burst.requests, "post", found.post)
    monkeypatch.setattr(burst.time, "sleep", lambda seconds: None)
    return found


def test_copies_are_counted_and_others_are_not(server: MadeUp) -> None:
    words = len((DOCUMENT + QUESTIONS[0]).split())
    for ask in (equal_prompts, equal_before_others):
        found = burst.burst(server, ask, DOCUMENT, QUESTIONS)  # type: ignore[arg-type]
        assert found.prefilled == 3 * words, ask.__name__
        assert found.clustered == 3 * (words // 2), ask.__name__
        assert found.later_cached > 0 and found.later_clustered == 0


def test_what_is_found_is_not_prefilled(server: MadeUp) -> None:
    found = burst.burst(server, first_alone, DOCUMENT, QUESTIONS)  # type: ignore[arg-type]
    words = [len((DOCUMENT + question).split()) for question in QUESTIONS]
    assert found.prefilled == sum(words) - 2 * len(DOCUMENT.split())
    assert found.clustered == words[0] // 2


def test_others_share_nothing_and_are_as_long() -> None:
    texts = [DOCUMENT, *burst.other_prompts(DOCUMENT)]
    assert len(texts) == 1 + OTHERS and len({text[:9] for text in texts}) == len(texts)
    assert all(abs(len(text) - len(DOCUMENT)) < 200 for text in texts)


def test_a_row_has_the_least_and_the_most_of_its_runs() -> None:
    runs = [Burst(3000, 2000, 1.25, 992, 0), Burst(1500, 1000, 0.75, 992, 64)]
    row = table({"lpm": {"fork": runs}}, 1000, 900).splitlines()[-1]
    assert row == "| lpm | fork | 1.5 to 3.0 times | 1.1 to 2.2 times | 0.8 to 1.2 | 992 | 0 to 64 |"
