"""Long documents with facts hidden in them, questions about the facts, and the text that follows.

Three kinds: prose; source code, where a model is surer of the next token; random digits, where nothing tells it. Prose is the
Debian administrator's handbook where its package is installed (`apt install debian-handbook`), else Python's own language
reference, which every Python carries; or any file. Code is Python's standard library.
"""

from __future__ import annotations

import platform
import random
import sysconfig
from html.parser import HTMLParser
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
PLACES = ("Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Perth")
QUESTIONS = 4
PROSE, CODE, DIGITS = KINDS = ("prose", "code", "digits")
NUMBERS = 40_000  # of five digits; a token per digit makes some thirty documents of them
CODE_CHARACTERS = 500_000  # of source, in the order of the files' names; all of it takes a tokenizer long


class Document(NamedTuple):
    """Token ids of a document and of what is decoded after it."""

    prompt: list[int]
    decoded: list[int]
    natural: slice  # places in `decoded` of the text's own continuation
    answers: list[slice]  # places in `decoded` of each answer's number


class _Prose(HTMLParser):
    """The text of an HTML page: paragraphs, headings and lists, without index entries and navigation."""

    _INSIDE = frozenset({"p", "h1", "h2", "h3", "h4", "li", "pre", "dt", "dd"})
    _VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._open: list[bool] = []  # of each open element: whether its text counts

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self._VOID:
            return
        kind = dict(attrs).get("class") or ""
        inside = tag in self._INSIDE or kind == "para" or (bool(self._open) and self._open[-1])
        hidden = tag in ("script", "style") or kind in ("docnav", "previous", "next", "toc")
        self._open.append(inside and not hidden)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._VOID or not self._open:
            return
        if self._open.pop() and tag in (*self._INSIDE, "div"):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1]:
            self.parts.append(" ".join(data.split()) + " " if data.strip() else "")


def read_text(path: str | None = None) -> tuple[str, str]:
    """(what the text is, the text): of a file, else the handbook, else Python's reference; SystemExit with the fix."""
    if path is not None:
        try:
            return Path(path).name, Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"--text {path} cannot be read ({error}): name a file of UTF-8 text") from None
    if HANDBOOK.is_dir():
        prose = _Prose()
        for page in sorted(HANDBOOK.glob("*.html")):
            prose.feed(page.read_text(encoding="utf-8"))
        return "Debian administrator's handbook", "".join(prose.parts)
    return "Python language reference", "\n\n".join(topics[name] for name in sorted(topics))


def read_kind(kind: str, path: str | None = None) -> tuple[str, str]:
    """(what the text is, the text) of one of `KINDS`; `path` as `read_text` takes it, for prose."""
    if kind == CODE:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = ""
        while files and len(text) < CODE_CHARACTERS:
            text += files.pop(0).read_text(encoding="utf-8", errors="replace") + "\n"
        return f"source code (Python {platform.python_version()}'s standard library)", text
    if kind == DIGITS:
        rng = random.Random(0)
        return "random digits", " ".join(str(rng.randrange(10000, 100000)) for _ in range(NUMBERS))
    return read_text(path)


def make_documents(tokenizer: Any, text: str, count: int, tokens: int, natural: int) -> list[Document]:
    """Cut `count` documents from a text, hide a number of six places in each, and ask for four of them afterwards.

    Args:
        tokenizer: of the model.
        text: long enough for all.
        count: documents.
        tokens: of each prompt.
        natural: tokens of the text that are decoded after it, before the questions.

    Raises SystemExit, with the fix, where the text is too short.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if len(ids) < count * (tokens + natural):
        raise SystemExit(
            f"the text has {len(ids)} tokens, {count * (tokens + natural)} are needed: use fewer or shorter documents"
        )
    return [
        _document(tokenizer, ids[i * (tokens + natural) :][: tokens + natural], tokens, random.Random(i))
        for i in range(count)
    ]


def _document(tokenizer: Any, ids: list[int], tokens: int, rng: random.Random) -> Document:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    numbers = {place: str(rng.randrange(10000, 100000)) for place in PLACES}
    facts = [encode(f" The magic number of {place} is {number}.") for place, number in numbers.items()]
    body = ids[: tokens - sum(map(len, facts))]
    # One in each sixth of the document, outside its ends, which every policy reads.
    for i, fact in reversed(list(enumerate(facts))):
        at = int((i + 0.2 + 0.6 * rng.random()) * len(body) / len(facts))
        body[at:at] = fact
    following = ids[len(body) - sum(map(len, facts)) :][: len(ids) - tokens]
    decoded, answers = list(following), []
    for place in rng.sample(PLACES, QUESTIONS):
        decoded += encode(f"\n\nQuestion: What is the magic number of {place}?\nAnswer: The magic number of {place} is")
        number = encode(f" {numbers[place]}")
        answers.append(slice(len(decoded), len(decoded) + len(number)))
        decoded += number + encode(".")
    return Document(body, decoded, slice(0, len(following)), answers)
