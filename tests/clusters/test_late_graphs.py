"""Replayed decode graphs read their lists late: after the host has launched the next head, and before that head's work.

Red when: what a head does to captured lists comes before the replay that was launched earlier, lists are not those of their
step, requests beyond a batch stay in them, or two steps share the memory that lists are staged in. The state machine
(test_machine.py) has such worlds too; here two mutants are shown to be noticed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sglang_clusterkv.memory.step import ListShape, RowBorders, empty_lists, pack_rows
from tests.support.mutants import MUTANTS
from tests.support.world import World, stream

NEVER = np.iinfo(np.int32).max


def some_steps() -> World:
    """Batches of one to three requests, of which captured steps hold two; the third has too few tokens to cluster."""
    world = World(graphs=2, lags=True, pages_per_call=40)
    requests = [world.submit(text) for text in (stream(1, 500), stream(1, 300) + stream(3, 200), stream(2, 60))]
    for request in requests:
        world.extend(request)
    a, b, c = requests
    for _ in range(6):
        world.decode(a, c)
        world.decode(b)
        world.decode(a, b, c)
    world.settle()
    return world


def test_late_replays_read_the_lists_of_their_step() -> None:
    counts = some_steps().replays.counts  # type: ignore[union-attr]
    assert counts["replay"] >= 10 and counts["eager"] >= 5 and counts["late"] > 10, counts


@pytest.mark.parametrize("name", [name for name in MUTANTS if "replay" in name or "captured" in name])
def test_a_mutant_is_noticed(name: str) -> None:
    with MUTANTS[name].broken(), pytest.raises(AssertionError, match="a replay reads"):
        some_steps()


def test_each_step_stages_its_lists_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may be a step ahead of the copy to the device."""
    from sglang_clusterkv.kernels.lists import triton as lists_triton

    packed: list[torch.Tensor] = []

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            return lambda first, *rest, **named: packed.append(first)

    monkeypatch.setattr(lists_triton, "lists_kernel", Kernel())
    lists = empty_lists(ListShape(1, 8, 2, 200, 64, 200), torch.device("cpu"))
    for length in (100, 101):
        borders = RowBorders(
            np.array([1]), np.array([length]), np.array([1]), np.array([[16]], np.int32), np.array([[80]], np.int32),
            np.array([[0, 64]], np.int32),
        )  # fmt: skip
        step = pack_rows(borders, np.array([True]), 16, 2, 8)
        lists_triton.make(step, torch.zeros((2, 128), dtype=torch.int32), 16, lists)
        step.values.fill(NEVER)
    assert packed[0].data_ptr() != packed[1].data_ptr()
    assert [int(values[5]) for values in packed] == [36, 37], "and it is not the host's"
