"""Scores of answers and what a policy changes against dense on the same prompts, with paired bootstrap intervals.

    python -m benchmarks.quality.scores FILE...

prints the table of several results of `tasks`, `ruler` and `turns` (JSON) together: each policy against dense over all of them.
Results from before prompts were counted have their prompts' tokens from a file of `ruler --recount`, named with them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks.results_file import command_of, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JUDGED_FROM = 0.2  # a lower score of dense says nothing about a policy: such cells are listed, not judged
RESAMPLES = 10_000
DENSE = "dense"

Cell = tuple[str, int]  # a task and the length asked for, in tokens


class Answer(NamedTuple):
    """One arm's answer to one question; task, length, number and column pair the arms' answers."""

    arm: str  # policy and budget, or `DENSE`
    task: str
    length: int
    number: int
    column: str  # a part of a cell: a depth, a session
    document: str  # that the question is about
    score: float  # 0 to 1
    tokens: int  # of the answer
    text: str
    expected: list[str]
    prompt_tokens: int | None = None  # that were sent, the question with them; None: a result that does not say

    @property
    def cell(self) -> Cell:
        return self.task, self.length

    @property
    def question(self) -> tuple[str, int, int, str]:
        return self.task, self.length, self.number, self.column


class Change(NamedTuple):
    """An arm minus dense, paired by question, in points (hundredths of the score)."""

    points: float
    low: float
    high: float
    samples: int


def string_match(answer: str, expected: Sequence[str]) -> float:
    """Share of the expected strings that the answer contains, whatever their case; 12,345 counts as 12345."""
    said = answer.lower()
    unpunctuated = said.replace(",", "")
    return sum(value.lower() in said or value.lower() in unpunctuated for value in expected) / len(expected)


def arms_in(answers: Sequence[Answer]) -> list[str]:
    """All arms but dense, in their order."""
    return [arm for arm in dict.fromkeys(answer.arm for answer in answers) if arm != DENSE]


def cells_in(answers: Sequence[Answer]) -> list[Cell]:
    """All cells, in their order."""
    return list(dict.fromkeys(answer.cell for answer in answers))


def mean_score(answers: Sequence[Answer], arm: str, cell: Cell) -> float:
    """Of one arm in one cell; nan where it was not asked."""
    scores = [answer.score for answer in answers if answer.arm == arm and answer.cell == cell]
    return float(np.mean(scores)) if scores else float("nan")


def prompts_text(answers: Sequence[Answer], cell: Cell) -> str:
    """Tokens of a cell's prompts: their mean, and the least and the most of them where they differ."""
    counts = [answer.prompt_tokens for answer in answers if answer.arm == DENSE and answer.cell == cell]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or not known:
        return "not counted"
    least, most = min(known), max(known)
    return f"{most:,}" if least == most else f"{np.mean(known):,.0f} ({least:,} to {most:,})"


def judged(answers: Sequence[Answer]) -> list[Cell]:
    """Cells where dense scores `JUDGED_FROM` or more."""
    return [cell for cell in cells_in(answers) if mean_score(answers, DENSE, cell) >= JUDGED_FROM]


def bootstrap(differences: Sequence[float], groups: Sequence[object] | None = None) -> Change:
    """Mean of paired differences of scores, with its 95 % interval.

    Args:
        differences: one per question.
        groups: of each question; those of one group, as the turns over one document, are drawn together. None: each alone.
    """
    values = np.asarray(differences, dtype=np.float64)
    assert values.size, "no question to compare"
    names = list(range(values.size)) if groups is None else list(groups)
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    labels = np.array([order[name] for name in names])
    sums, counts = np.bincount(labels, weights=values), np.bincount(labels)
    picks = np.random.default_rng(7).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.quantile(sums[picks].sum(1) / counts[picks].sum(1), [0.025, 0.975])
    return Change(100 * float(values.mean()), 100 * float(low), 100 * float(high), values.size)


def change(answers: Sequence[Answer], arm: str, chosen: Sequence[Cell]) -> Change | None:
    """An arm minus dense, pooled over the questions of some cells; None where both answered none.

    Questions about one document are drawn together.
    """
    reference = {answer.question: answer.score for answer in answers if answer.arm == DENSE}
    pairs = [a for a in answers if a.arm == arm and a.cell in chosen and a.question in reference]
    if not pairs:
        return None
    return bootstrap([a.score - reference[a.question] for a in pairs], [a.document for a in pairs])


def length_ratio(answers: Sequence[Answer], arm: str, chosen: Sequence[Cell]) -> float | None:
    """Tokens of an arm's answers over those of dense's, in some cells."""
    own, dense = (sum(a.tokens for a in answers if a.arm == name and a.cell in chosen) for name in (arm, DENSE))
    return own / dense if dense else None


def table(answers: Sequence[Answer], sparse: dict[str, float]) -> str:
    """Markdown: mean scores by cell and arm, then each arm against dense over all judged cells, then the others.

    Args:
        answers: of all arms.
        sparse: share of each arm's decode steps that were sparse.
    """
    arms, kept = arms_in(answers), judged(answers)
    lines = [f"| task | prompt tokens | asked for | n | {' | '.join([DENSE, *arms])} |", "|---" * (5 + len(arms)) + "|"]
    for task, length in cells_in(answers):
        count = sum(answer.arm == DENSE and answer.cell == (task, length) for answer in answers)
        means = [f"{100 * mean_score(answers, arm, (task, length)):.0f} %" for arm in (DENSE, *arms)]
        tokens = prompts_text(answers, (task, length))
        lines.append(f"| {task} | {tokens} | {length:,} | {count} | {' | '.join(means)} |")
    lines += [
        "",
        "| policy | minus dense, points (95 %) | n | answers' length, of dense | sparse steps |",
        "|---" * 5 + "|",
    ]
    for arm in arms:
        found = change(answers, arm, kept)
        text = (
            "no cell is judged | 0"
            if found is None
            else (f"{found.points:+.1f} ({found.low:+.1f} to {found.high:+.1f}) | {found.samples}")
        )
        ratio = length_ratio(answers, arm, kept)
        lines.append(f"| {arm} | {text} | {'-' if ratio is None else f'{ratio:.2f}'} | {100 * sparse[arm]:.0f} % |")
    others = [f"{task} at {length:,}" for task, length in cells_in(answers) if (task, length) not in kept]
    if others:
        lines += ["", f"Listed, not judged (dense scores below {100 * JUDGED_FROM:.0f} %): {', '.join(others)}."]
    return "\n".join(lines)


def summary(answers: Sequence[Answer]) -> list[dict[str, object]]:
    """What `table` says of each arm, for the JSON."""
    kept = judged(answers)
    lines: list[dict[str, object]] = []
    for arm in arms_in(answers):
        found = change(answers, arm, kept)
        lines.append(
            {
                "arm": arm,
                "change": found._asdict() if found else None,
                "length_ratio": length_ratio(answers, arm, kept),
                "judged": [list(cell) for cell in kept],
            }
        )
    return lines


def report(
    name: str,
    answers: Sequence[Answer],
    sparse: dict[str, float],
    *,
    title: str,
    setting: str,
    figure: Figure,
    **more: Any,
) -> None:
    """Print the table of a command of this package and write its results.

    Args:
        name: of the command's module.
        answers: all arms'.
        sparse: share of sparse steps by arm.
        title, setting, figure: see `write_results`.
        more: for the JSON.
    """
    body = table(answers, sparse)
    print(f"\n{body}\n")
    data = {"summary": summary(answers), "sparse_steps": sparse, "answers": [answer._asdict() for answer in answers]}
    write_results(
        f"quality-{name}",
        title=title,
        setting=setting,
        command=command_of(f"benchmarks.quality.{name}"),
        body=body,
        data=more | data,
        figure=figure,
    )


def read_answers(files: Sequence[Path]) -> tuple[list[Answer], dict[str, float]]:
    """All answers of some results, and for each arm the least share of its steps that were sparse in one of them.

    Raises SystemExit where a file has no answers, a question twice, or prompts that were counted for another model.
    """
    answers: list[Answer] = []
    sparse: dict[str, float] = {}
    counted: list[dict[str, Any]] = []
    abouts = [json.loads(file.read_text()) for file in files]
    settings = [about.get("setting", "") for about in abouts if "prompts" not in about["results"]]
    for file, about in zip(files, abouts, strict=True):
        found = about["results"]
        if "prompts" in found:
            if any(setting.split(",")[0] != found["model"] for setting in settings):
                raise SystemExit(
                    f"{file} counts the tokens of {found['model']}: name it with results of that model only"
                )
            counted += found["prompts"]
            continue
        if "answers" not in found:
            raise SystemExit(f"{file} has no answers: name JSON results of benchmarks.quality.tasks, ruler or turns")
        asked = {(answer.arm, answer.question) for answer in answers}
        if any((a["arm"], (a["task"], a["length"], a["number"], a["column"])) in asked for a in found["answers"]):
            raise SystemExit(f"{file} has a question that an earlier file has: run tasks with --first for others")
        answers += [Answer(**answer) for answer in found["answers"]]
        for arm, share in found["sparse_steps"].items():
            sparse[arm] = min(share, sparse.get(arm, 1.0))
    return with_prompts(answers, counted), sparse


def with_prompts(answers: Sequence[Answer], counted: Sequence[dict[str, Any]]) -> list[Answer]:
    """Answers that do not say how long their prompts were, with the tokens that `ruler --recount` found for them."""
    tokens = {(prompt["task"], prompt["length"], prompt["number"]): prompt["tokens"] for prompt in counted}
    return [
        answer
        if answer.prompt_tokens is not None
        else answer._replace(prompt_tokens=tokens.get((answer.task, answer.length, answer.number)))
        for answer in answers
    ]


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="JSON results, each question in one of them")
    print(table(*read_answers(parser.parse_args().files)))


if __name__ == "__main__":
    main()
