"""What README and docs print, against the results that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cited.tables import MEASURED, README, SENTENCES, TABLES, Rows, cells_of
from benchmarks.results_file import CODE, RESULTS, ROOT

MARK = re.compile(r"^<!-- (?:figures: (?P<name>[\w-]+)|no figures) -->$")
NAME = re.compile(r"\b[a-z][a-z0-9.-]*?-\d{8}-\d{6}(?:-\d+)?\b")
PICTURE = re.compile(r"!\[[^]]*\]\(\S*?([\w.-]+\.svg)\)")
CITES = "Figures: "
SINCE = "Since then:"
SHORT_COMMIT = 7


@cache
def _about(name: str, folder: Path) -> Any:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def measured(name: str, folder: Path) -> Any:
    """What a result has measured; the oldest files have nothing else."""
    about = _about(name, folder)
    return about.get("results", about)


@cache
def expected(name: str, folder: Path) -> Rows:
    """What a table must hold."""
    return TABLES[name].rows(*(measured(file, folder) for file in TABLES[name].files))


class Table(NamedTuple):
    """A table of a document."""

    name: str | None  # None: no mark, "": not measured
    first: int  # line number of its first row below the head, from 0
    rows: list[list[str]]
    below: str  # the paragraph after it


def tables_of(text: str) -> Iterator[Table]:
    """All tables outside of code blocks."""
    lines = text.splitlines()
    code = False
    for i, line in enumerate(lines):
        code ^= line.startswith("```")
        if code or not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            continue
        end = next((j for j in range(i, len(lines)) if not lines[j].startswith("|")), len(lines))
        mark = MARK.match(lines[i - 2]) if i >= 2 else None
        below = "\n".join(lines[end:]).strip().split("\n\n")[0]
        yield Table(mark and (mark["name"] or ""), i + 1, [cells_of(row) for row in lines[i + 1 : end]], below)


def documents(root: Path) -> dict[str, str]:
    """README and docs by their name in the repository."""
    files = [root / README, *sorted((root / "docs").glob("*.md"))]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


def differing(table: Table, wanted: Rows) -> Iterator[tuple[int, int, str, str]]:
    """(row, column, printed, expected) of the cells that differ; row -1 where the shape does."""
    shape = [len(row) for row in table.rows]
    if shape != [len(row) for row in wanted]:
        yield -1, -1, f"rows of {shape} cells", f"rows of {[len(row) for row in wanted]}"
        return
    for i, (row, cells) in enumerate(zip(table.rows, wanted, strict=True)):
        for j, (printed, cell) in enumerate(zip(row, cells, strict=True)):
            if cell is not None and printed != cell:
                yield i, j, printed, cell


def check_figures(texts: dict[str, str], folder: Path = RESULTS) -> list[str]:
    """Cells and sentences that are not what their results say, and tables that do not say what they come from."""
    problems: list[str] = []
    missing = {(name, document) for name, figures_ in TABLES.items() for document in figures_.documents}
    for document in MEASURED:
        for table in tables_of(texts[document]):
            place = f"{document}:{table.first - 1}"
            if table.name is None:
                problems.append(f"{place}: a table without '<!-- figures: NAME -->' or '<!-- no figures -->' above it")
            elif table.name and (table.name, document) not in missing:
                problems.append(
                    f"{place}: benchmarks.cited has no figures '{table.name}' for this document, or it is there twice"
                )
            elif table.name:
                missing.remove((table.name, document))
                problems += _check_table(document, table, folder)
    problems += [f"{document}: no table '<!-- figures: {name} -->'" for name, document in sorted(missing)]
    for document, files, text in SENTENCES:
        wanted = text(*(measured(file, folder) for file in files))
        if wanted not in " ".join(texts[document].split()):
            problems.append(f"{document}: by {', '.join(files)} it must say: {wanted}")
    return problems


def _check_table(document: str, table: Table, folder: Path) -> Iterator[str]:
    assert table.name
    files = TABLES[table.name].files
    for i, j, printed, cell in differing(table, expected(table.name, folder)):
        place = f"{document}:{table.first + i + 1}" + (f", column {j + 1}" if j >= 0 else "")
        yield f"{place}: '{printed}' is printed, '{cell}' follows from {', '.join(files)}"
    if not table.below.startswith(CITES):
        yield f"{document}:{table.first - 1}: no paragraph '{CITES}...' below the table '{table.name}'"
    for file in files:
        if file not in NAME.findall(table.below):
            yield f"{document}:{table.first - 1}: the paragraph below the table '{table.name}' does not name {file}"


def check_citations(texts: dict[str, str], folder: Path = RESULTS) -> list[str]:
    """Citations without a file, and files without a citation."""
    cited = {(name, document) for document, text in texts.items() for name in NAME.findall(text)}
    pictures = {(name, document) for document, text in texts.items() for name in PICTURE.findall(text)}
    problems = [
        f"{document} cites {name}, of which {folder.name}/ has no {suffix}"
        for name, document in sorted(cited)
        for suffix in ("json", "md")
        if not (folder / f"{name}.{suffix}").exists()
    ]
    problems += [
        f"{document} shows {name}, which {folder.name}/ does not have"
        for name, document in sorted(pictures)
        if NAME.match(name) and not (folder / name).exists()
    ]
    names, shown = {name for name, _ in cited}, {name for name, _ in pictures}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".md") and file.stem in names:
            continue
        if file.name not in shown:
            problems.append(f"no document cites {file.name}")
    return problems


def check_age(texts: dict[str, str], folder: Path = RESULTS, code: str = CODE) -> list[str]:
    """Results of other code than this that are cited without a word of what changed since, or without their commit."""
    problems = []
    for document, text in texts.items():
        blocks = (" ".join(block.split()) for block in text.split("\n\n"))
        paragraphs = [block for block in blocks if block.startswith(CITES)]
        for name in sorted(set(NAME.findall(text))):
            if not (folder / f"{name}.json").exists():
                continue
            citing = [block for block in paragraphs if name in NAME.findall(block)]
            about = _about(name, folder)
            commit = about.get("commit")
            if not citing:
                problems.append(f"{document}: no paragraph '{CITES}...' names {name}")
            elif commit and not any(commit[:SHORT_COMMIT] in block for block in citing):
                problems.append(
                    f"{document}: the paragraph that names {name} does not name its commit, {commit[:SHORT_COMMIT]}"
                )
            elif about.get("code") != code and not any(SINCE in block for block in citing):
                problems.append(
                    f"{document}: {name} was not measured with this code, or names none: '{SINCE} ...' must say what changed"
                )
    return problems


def check(root: Path = ROOT) -> list[str]:
    """All of it."""
    texts, folder = documents(root), root / "benchmarks" / "results"
    return check_citations(texts, folder) + check_figures(texts, folder) + check_age(texts, folder)


def write(root: Path = ROOT) -> int:
    """Put the results' figures into the tables; how many cells changed."""
    changed = 0
    folder = root / "benchmarks" / "results"
    for document, text in documents(root).items():
        lines = text.splitlines()
        for table in tables_of(text):
            if not table.name or table.name not in TABLES:
                continue
            for i, j, _, cell in differing(table, expected(table.name, folder)):
                if i < 0:
                    continue
                row = cells_of(lines[table.first + i])
                row[j] = cell
                lines[table.first + i] = f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |")
                changed += 1
        (root / document).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return changed
