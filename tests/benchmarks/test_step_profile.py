"""Samples of a step, counted by what they stand in.

Red when: a function that a part is known by is not where it is said to be (all its samples would count elsewhere), a sample is
counted twice or not at all, one of another thread counts, or seconds for which there is no room end otherwise than in a
sentence.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest

from benchmarks import step_profile
from benchmarks.step_profile import ATTENTION, COMPILED, FORWARD, LAYER, PARTS, SAMPLE, STEP, Function, count, table

THREADS = Function("threading", "Thread.run")


def stack(*functions: Function, samples: int) -> str:
    """A line as py-spy writes it, with frames of others between."""
    shown = [f"{name} (a folder/{file}.py:7)" for name, file in (function.frame for function in functions)]
    return (
        ";wrapper (hooks.py:3);".join(["<module> (<string>:1)", *shown, "leaf (torch/nn/modules/module.py)"])
        + f" {samples}"
    )


@pytest.mark.parametrize("function", step_profile.NAMED, ids=lambda function: function.name)
def test_every_function_is_where_it_is_said_to_be(function: Function) -> None:
    found: Any = importlib.import_module(function.module)
    for name in function.name.split("."):
        found = getattr(found, name)
    inner = inspect.unwrap(found)
    assert (inner.__qualname__, inner.__module__) == (function.name, function.module)


def test_a_sample_counts_for_the_first_part_that_it_stands_in() -> None:
    raw = [
        stack(STEP, FORWARD, LAYER, ATTENTION, COMPILED, samples=5),
        stack(STEP, FORWARD, LAYER, ATTENTION, samples=2),
        stack(STEP, FORWARD, LAYER, COMPILED, samples=9),
        stack(STEP, FORWARD, LAYER, samples=1),
        stack(STEP, FORWARD, samples=3),
        stack(STEP, SAMPLE, samples=4),
        stack(STEP, samples=6),
        stack(THREADS, COMPILED, samples=100),  # another thread helps
    ]
    found = count("\n".join(raw))
    assert found == {part.title: 0 for part in PARTS} | {
        "attention": 5,
        "attention's calls": 2,
        "layers: products, norms, rotation, gate": 9,
        "layers' calls": 1,
        "SGLang's forward": 3,
        "sampling": 4,
        "SGLang's scheduler": 6,
    }


@pytest.mark.parametrize(("context", "room"), [(8192, 491), (32768, 2048)])
def test_more_seconds_than_there_is_room_for_are_told(monkeypatch: pytest.MonkeyPatch, context: int, room: int) -> None:
    monkeypatch.setattr(step_profile, "together", lambda *arguments: [])
    monkeypatch.setattr(step_profile, "decode_ms", lambda streams: 20.0)
    with pytest.raises(SystemExit, match=rf"behind the prompt is room for {room}: --seconds \d+") as told:
        step_profile.measure(None, [[1] * 7700], 60, context)  # type: ignore[arg-type]
    fits = int(str(told.value).split()[-1])
    assert 1000 * (fits + 2) / 20 + 50 <= room


def test_the_table_has_all_of_a_step_the_largest_part_first() -> None:
    found = {"step_ms": 20.0, "samples": {part.title: i for i, part in enumerate(PARTS)}}
    rows = [row.strip("| ").split(" | ") for row in table(found).splitlines()[2:]]
    assert [row[0] for row in rows] == [part.title for part in reversed(PARTS)]
    assert sum(float(row[1].removesuffix(" %")) for row in rows) == pytest.approx(100, abs=0.5)
    assert sum(float(row[2]) for row in rows) == pytest.approx(20, abs=0.1)
