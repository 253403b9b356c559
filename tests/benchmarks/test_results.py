"""What README and docs print is what was measured, and nothing else is kept.

Red when: a figure of a table or a checked sentence is not that of its result, a table names no result, a result is cited that
is not kept or kept that is not cited, older code's figures are printed without a word, or a new result does not say which
commit and which code it measured.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import cited, results_file
from benchmarks.results_file import code_of, commit_of, commit_text, write_results

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
RESULTS = ROOT / "benchmarks" / "results"
LATENCY = "latency-7700-b8-20261130-122534"
PERFORMANCE = "docs/performance.md"


@pytest.fixture
def texts() -> dict[str, str]:
    return cited.documents(ROOT)


def change(texts: dict[str, str], document: str, old: str, new: str) -> dict[str, str]:
    assert old in texts[document]
    return texts | {document: texts[document].replace(old, new, 1)}


# -- this tree --------------------------------------------------------------------------------------------------------


def test_documents_print_what_was_measured() -> None:
    assert cited.check(ROOT) == []


# -- figures ----------------------------------------------------------------------------------------------------------


def test_a_changed_figure_is_named_with_its_file_and_what_it_must_be(texts: dict[str, str]) -> None:
    problems = cited.check_figures(change(texts, PERFORMANCE, "| clusterkv | 20 |", "| clusterkv | 21 |"), RESULTS)
    (line,) = (i for i, text in enumerate(texts[PERFORMANCE].splitlines(), 1) if text.startswith("| clusterkv | 20 |"))
    assert problems == [f"{PERFORMANCE}:{line}, column 2: '21' is printed, '20' follows from {LATENCY}"]


@pytest.mark.parametrize("name", sorted(cited.TABLES))
def test_every_table_has_figures_that_are_compared(texts: dict[str, str], name: str) -> None:
    """One wrong digit in the table's last row is found, in each document that has it."""
    for document in cited.TABLES[name].documents:
        (table,) = (table for table in cited.tables_of(texts[document]) if table.name == name)
        wrong = [*table.rows[:-1], [cell[:-1] + "?" if cell else cell for cell in table.rows[-1]]]
        found = list(cited.differing(table._replace(rows=wrong), cited.expected(name, RESULTS)))
        assert found and {row for row, *_ in found} == {len(table.rows) - 1}
        fewer = list(cited.differing(table._replace(rows=table.rows[:-1]), cited.expected(name, RESULTS)))
        assert [row for row, *_ in fewer] == [-1]


def test_a_changed_sentence_is_named(texts: dict[str, str]) -> None:
    problems = cited.check_figures(change(texts, PERFORMANCE, "at 1,000: 1.14.", "at 1,000: 1.10."), RESULTS)
    assert problems == [f"{PERFORMANCE}: by {LATENCY} it must say: Time per token at 7,700 over that at 1,000: 1.14."]


@pytest.mark.parametrize(
    "old, new, problem",
    [
        ("<!-- figures: operations -->\n", "", "a table without '<!-- figures: NAME -->'"),
        ("<!-- figures: operations -->", "<!-- no figures -->", "no table '<!-- figures: operations -->'"),
        ("<!-- figures: operations -->", "<!-- figures: nonsense -->", "has no figures 'nonsense'"),
        ("<!-- figures: operations -->", "<!-- figures: latency -->", "or it is there twice"),
        (f"Figures: `{LATENCY}`", f"`{LATENCY}`", "no paragraph 'Figures: ...' below the table 'latency'"),
        (f"Figures: `{LATENCY}`", "Figures: `another`", f"'latency' does not name {LATENCY}"),
    ],
)
def test_every_table_says_where_its_figures_are_from(texts: dict[str, str], old: str, new: str, problem: str) -> None:
    found = cited.check_figures(change(texts, PERFORMANCE, old, new), RESULTS)
    assert any(problem in line for line in found), found


def test_write_puts_the_figures_back(tmp_path: Path, texts: dict[str, str]) -> None:
    for document, text in change(texts, PERFORMANCE, "| score | 1.4 | 22 % |", "| score | 1.6 | 22 % |").items():
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text(text)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(RESULTS)
    assert cited.write(tmp_path) == 1
    assert cited.documents(tmp_path) == texts


# -- citations --------------------------------------------------------------------------------------------------------


def make(folder: Path, name: str, **about: object) -> None:
    (folder / f"{name}.json").write_text(json.dumps(about))
    (folder / f"{name}.md").write_text("")


def test_what_is_cited_is_kept_and_what_is_kept_is_cited(tmp_path: Path) -> None:
    one, other = "latency-20260101-000000", "latency-20260102-000000-2"
    make(tmp_path, one)
    make(tmp_path, other)
    (tmp_path / f"{one}.svg").write_text("")
    shown = {"docs/a.md": f"Figures: `{one}`\n\n![x](../benchmarks/results/{one}.svg)\n\nand {other}."}
    assert cited.check_citations(shown, tmp_path) == []
    found = cited.check_citations({"docs/a.md": f"{one}.md"}, tmp_path)
    assert found == [f"no document cites {file}" for file in (f"{one}.svg", f"{other}.json", f"{other}.md")]
    gone = cited.check_citations(shown, RESULTS)
    for problem in (f"docs/a.md cites {other}, of which results/ has no json", f"docs/a.md shows {one}.svg"):
        assert any(line.startswith(problem) for line in gone)


# -- age --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "about, text, problem",
    [
        ({}, "Figures: `{}`. Since\nthen: all is new.", None),
        ({}, "Figures: `{}`.", "must say what changed"),
        ({}, "`{}`. Since then: all is new.", "no paragraph"),
        ({"commit": "abcdef0123", "code": "now"}, "Figures: `{}`, of abcdef0.", None),
        ({"commit": "abcdef0123", "code": "now"}, "Figures: `{}`.", "its commit, abcdef0"),
        ({"commit": "abcdef0123", "code": "old"}, "Figures: `{}`, of abcdef0.", "must say what changed"),
        ({"commit": "abcdef0123", "code": "old"}, "Figures: `{}`, of abcdef0. Since then: speed.", None),
    ],
)
def test_older_figures_are_said_to_be_older(
    tmp_path: Path, about: dict[str, str], text: str, problem: str | None
) -> None:
    name = "latency-20260101-000000"
    make(tmp_path, name, **about)
    found = cited.check_age({"a.md": f"A text.\n\n{text.format(name)}\n\nAnother."}, tmp_path, code="now")
    assert len(found) == (problem is not None) and all(problem in line for line in found if problem)


# -- what a new result says of its code -------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_and_whether_the_tree_differs_from_it(tmp_path: Path) -> None:
    assert commit_of(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init", "-q")
    assert commit_of(tmp_path)["commit"] is None  # no commit yet
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "x.md").write_text("of the run before")
    assert commit_of(tmp_path) == {"commit": head, "dirty": False}
    assert commit_of(tmp_path / "benchmarks")["commit"] is None  # a copy in somebody else's checkout
    (tmp_path / "new.py").write_text("")
    assert commit_of(tmp_path) == {"commit": head, "dirty": True}
    (tmp_path / "new.py").unlink()
    (tmp_path / "code.py").write_text("2\n")
    assert commit_of(tmp_path) == {"commit": head, "dirty": True}


@pytest.mark.parametrize(
    "found, text",
    [
        ({"commit": "0123456789abcdef", "dirty": False}, "commit 0123456789"),
        ({"commit": "0123456789abcdef", "dirty": True}, "commit 0123456789, with changes that are in no commit"),
        ({"commit": None, "dirty": None}, "no git checkout, sglang-clusterkv "),
    ],
)
def test_a_result_names_commit_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, object], text: str
) -> None:
    monkeypatch.setattr(results_file, "MEASURED", found)
    monkeypatch.setattr(results_file, "CODE", "a digest")
    path = write_results("x", title="A", setting="s", command="c", body="b", data={}, folder=tmp_path)
    about = json.loads(path.with_suffix(".json").read_text())
    assert (about["commit"], about["dirty"], about["code"]) == (found["commit"], found["dirty"], "a digest")
    assert f"; {text}" in path.read_text() and commit_text(found).startswith(text)


def test_the_digest_is_of_code_and_not_of_words_and_places(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text('"""A."""\n\nimport os\n\n\ndef f(x):\n    """Does."""\n    return f"{x} y"  # why\n')
    (package / "b.py").write_text("def g(x):\n    return x\n")
    digest = code_of(package)
    (package / "a.py").unlink()
    (package / "sub").mkdir()
    moved = 'from somewhere import (\n    os,\n)\n\n\ndef f(x):\n\n    return f"{x} y"\n'
    (package / "sub" / "c.py").write_text(moved)
    assert code_of(package) == digest
    for changed in (moved.replace("y", "z"), moved.replace("return", "yield"), moved + "\nA = 1\n"):
        (package / "sub" / "c.py").write_text(changed)
        assert code_of(package) != digest
    shutil.rmtree(package / "sub")
    assert code_of(package) != digest
