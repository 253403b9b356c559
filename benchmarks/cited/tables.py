"""Which tables and sentences of README and docs were measured: each a function from its results to what must stand there."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

README, PERFORMANCE, QUALITY = "README.md", "docs/performance.md", "docs/quality.md"
MEMORY = "docs/memory.md"
MEASURED = (README, PERFORMANCE, QUALITY, MEMORY)  # in which every table says whether it is measured

Rows = list[list[str | None]]  # None: a cell that is no figure


class Figures(NamedTuple):
    """Tables of one name, the results that they are made of, and what they must hold."""

    documents: tuple[str, ...]
    files: tuple[str, ...]
    rows: Callable[..., Rows]


class Sentence(NamedTuple):
    """Text of a document that follows from results."""

    document: str
    files: tuple[str, ...]
    text: Callable[..., str]


TABLES: dict[str, Figures] = {}
SENTENCES: list[Sentence] = []


def figures(name: str, document: str | tuple[str, ...], *files: str) -> Callable[[Callable[..., Rows]], None]:
    """Register a table; the function gets what each file has measured."""

    def register(rows: Callable[..., Rows]) -> None:
        documents = (document,) if isinstance(document, str) else document
        TABLES[name] = Figures(documents, files, rows)

    return register


def sentence(document: str, *files: str) -> Callable[[Callable[..., str]], None]:
    """Register a sentence, likewise."""

    def register(text: Callable[..., str]) -> None:
        SENTENCES.append(Sentence(document, files, text))

    return register


def cells_of(line: str) -> list[str]:
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.count("|") > 1 else []
