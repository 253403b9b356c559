"""The other tables of docs/quality.md: tasks, turns, precision, drift, layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from benchmarks.cited.numbers import between, percent, small
from benchmarks.cited.tables import QUALITY, README, Rows, cells_of, figures, sentence

TASKS = [f"quality-tasks-20261128-{time}" for time in ("023700", "143426", "144125", "181247", "141145")]
TOGETHER = [f"quality-tasks-20261130-{time}" for time in ("111701", "121114")]
DRIFT = [f"quality-drift-20261130-{time}" for time in ("125525", "130954")]
RULER = [f"quality-ruler-20261128-{time}" for time in ("054637", "140435", "201047")]
RULER_NOW = "quality-ruler-20261130-155627"
RULER_QWEN = "quality-ruler-20261128-204831"
RULER_PROMPTS, RULER_QWEN_PROMPTS = "quality-ruler-prompts-20261129-100825", "quality-ruler-prompts-20261129-101438"


def _answers(*found: Any) -> list[Any]:
    from benchmarks.quality.scores import Answer

    return [Answer(**answer) for one in found for answer in one["answers"]]


def _scores(answers: list[Any]) -> dict[tuple[str, int], list[str]]:
    """Questions of each cell, then the score of dense and of each arm."""
    from benchmarks.quality.scores import DENSE, arms_in, cells_in, mean_score

    arms = [DENSE, *arms_in(answers)]
    return {
        cell: [
            str(sum(answer.arm == DENSE and answer.cell == cell for answer in answers)),
            *(percent(mean_score(answers, arm, cell)) for arm in arms),
        ]
        for cell in cells_in(answers)
    }


@figures("tasks", QUALITY, *TASKS)
def _(*found: Any) -> Rows:
    scores = _scores(_answers(*found))
    return [[task, f"{length:,}", *scores[task, length]] for task, length in sorted(scores, key=lambda cell: cell[1])]


@figures("tasks-together", QUALITY, *TOGETHER)
def _(*found: Any) -> Rows:
    return [[task, f"{length:,}", *line] for (task, length), line in _scores(_answers(*found)).items()]


def _pooled_together(*found: Any) -> str:
    from benchmarks.quality.scores import change, judged

    answers = _answers(*found)
    all_: Any = change(answers, "ours 256", judged(answers))
    return f"{all_.points:+.1f} points against dense (95 % interval {all_.low:+.1f} to {all_.high:+.1f}), n = {all_.samples}"


@sentence(QUALITY, *TOGETHER)
def _(*found: Any) -> str:
    return _pooled_together(*found)


@sentence(README, *TOGETHER)
def _(*found: Any) -> str:
    return _pooled_together(*found)


@figures("ruler", QUALITY, *RULER, RULER_PROMPTS)
def _(*found: Any) -> Rows:
    from benchmarks.quality.scores import prompts_text, with_prompts

    answers = with_prompts(_answers(*found[:-1]), found[-1]["prompts"])
    scores = _scores(answers)
    cells = sorted(scores, key=lambda cell: cell[1])
    return [[cell[0], prompts_text(answers, cell), f"{cell[1]:,}", *scores[cell]] for cell in cells]


@figures("ruler-now", QUALITY, RULER_NOW)
def _(found: Any) -> Rows:
    from benchmarks.quality.scores import prompts_text

    answers = _answers(found)
    scores = _scores(answers)
    return [[None, prompts_text(answers, cell), f"{cell[1]:,}", *scores[cell]] for cell in sorted(scores)]


def _pooled(*found: Any) -> tuple[Any, Any]:
    from benchmarks.quality.scores import change, judged

    answers = _answers(*found)
    return tuple(change(answers, arm, judged(answers)) for arm in ("ours 256", "ours 512"))  # type: ignore[return-value]


@sentence(QUALITY, *TASKS, *RULER)
def _(*found: Any) -> str:
    small_budget, large = _pooled(*found)
    return (
        f"n = {large.samples}: {small_budget.points:+.1f} points against dense (95 % interval {small_budget.low:+.1f} to "
        f"{small_budget.high:+.1f}) at a budget of 256, {large.points:+.1f} ({large.low:+.1f} to {large.high:+.1f}) at 512"
    )


@sentence(README, *TASKS, *RULER)
def _(*found: Any) -> str:
    small_budget, large = _pooled(*found)
    return (
        f"(n = {large.samples}): {small_budget.points:+.1f} points against dense, 95 % interval {small_budget.low:+.1f} to "
        f"{small_budget.high:+.1f}, at a budget of 256, {large.points:+.1f} ({large.low:+.1f} to {large.high:+.1f}) at 512"
    )


@sentence(QUALITY, RULER_QWEN, RULER_QWEN_PROMPTS)
def _(found: Any, counted: Any) -> str:
    from benchmarks.quality.scores import prompts_text, with_prompts

    answers = with_prompts(_answers(found), counted["prompts"])
    right = [sum(answer.score for answer in answers if answer.arm == arm) for arm in ("dense", "ours 256")]
    tokens = prompts_text(answers, answers[0].cell)
    return "prompts of {} tokens: dense {:.0f} of 4, ours {:.0f} of 4 at a budget of 256".format(tokens, *right)


@figures("turns", QUALITY, "quality-turns-20261128-090357")
def _(found: Any) -> Rows:
    scores = list(_scores(_answers(found)).values())
    return [[None, *(line[1 + arm] for line in scores)] for arm in range(3)]


@figures("bf16", QUALITY, "quality-precision-20261128-024635")
def _(found: Any) -> Rows:
    return [[None, between(line["kl"], line["kl_interval"], 5), percent(line["same"], 1)] for line in found["lines"]]


@figures("kv", QUALITY, "quality-kv-20261130-000011")
def _(found: Any) -> Rows:
    return [[None, between(line["kl"], line["kl_interval"], 5), percent(line["same"], 1)] for line in found["lines"]]


@figures("extends", QUALITY, "quality-extends-20261130-001436")
def _extends(found: Any) -> Rows:
    from benchmarks.quality.extends import table

    lines = table(found["documents"], found["first_token_s"]).split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [[None, *(cell if "%" in cell else _pointed(cell.split()[0]) for cell in cells[1:])] for cells in rows]


def _drift_tables(found: Sequence[Any]) -> list[list[list[str]]]:
    """What the benchmark itself prints of the documents of some results."""
    from benchmarks.quality.drift import table

    blocks = [
        block.splitlines()
        for block in table([document for one in found for document in one]).split("\n\n")
        if block.startswith("|")
    ]
    return [[cells_of(line) for line in block[2:]] for block in blocks]


def _pointed(cell: str) -> str:
    """Without the zeros before points of numbers below one."""
    return re.sub(r"\b0(\.\d{5})", r"\1", cell)


@figures("drift", QUALITY, *DRIFT)
def _(*found: Any) -> Rows:
    return [
        [re.sub(r"\d{4}", lambda number: f"{int(number[0]):,}", cells[0]), *map(_pointed, cells[1:])]
        for cells in _drift_tables(found)[0]
    ]


@figures("drift-afresh", QUALITY, *DRIFT)
def _(*found: Any) -> Rows:
    return [[None, *map(_pointed, cells[1:])] for cells in _drift_tables(found)[1]]


@figures("layers", QUALITY, "quality-attention-20261128-084441")
def _(found: Any) -> Rows:
    import numpy as np

    rows: Rows = []
    for arm in found.values():
        error, mass = ([np.mean(part) for part in np.split(np.array(arm[key]), 5)] for key in ("error", "mass"))
        figures_of_arm = [np.mean(error), *error, np.mean(mass), mass[0], mass[-1]]
        rows.append([arm["policy"], str(arm["budget"]), *(small(float(value), 3) for value in figures_of_arm)])
    return rows


# The later file's arm takes the place of the earlier one's.
HISTORIES = [f"quality-histories-smollm2-20261129-{time}" for time in ("135300", "171505")]
HISTORIES += [f"quality-histories-tiny-20261129-{time}" for time in ("122535", "173025", "121730")]


@figures("histories", QUALITY, *HISTORIES)
def _(*found: Any) -> Rows:
    models = found[:2], found[2:]
    by_name = [{name: arm for one in files for name, arm in one["arms"].items()} for files in models]
    return [
        [
            None,
            None,
            percent(arm["equal"], 1),
            percent(arm["within_1e-4"], 1),
            *(f"{arm[key]:.2g}".removeprefix("0").replace("e-0", "e-") or "0" for key in ("p50", "p99", "most")),
            *(f"{arm[key]:,.0f}" for key in ("clustered", "computed")),
            f"{arm['second_token_ms']:.0f}" if arm["second_token_ms"] else "",
        ]
        for arms in by_name
        for arm in arms.values()
    ]
