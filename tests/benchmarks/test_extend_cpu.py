"""benchmarks/extend_cpu.py: both sides of its table compute the same, and it has a row for each cell.

Red when: what torch is timed with is another attention or another product than ours.
"""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.extend_cpu import Shape, attention, cell, products, table
from sglang_clusterkv.kernels.threads_cpu import set_threads

SMALL = Shape(2, 2, 32, ((40, 64), (64, 100)))


def test_both_sides_compute_the_same() -> None:
    for cached, new in ((50, 7), (0, 20)):
        calls, work = attention(SMALL, cached, new)
        ours, theirs = (call() for call in calls)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert work == 2 * 4 * 32 * sum(range(cached + 1, cached + new + 1))
    calls, work = products(SMALL, 9)
    for mine, others in zip(*(call() for call in calls), strict=True):
        torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-4)
    assert work == 9 * (40 * 64 + 64 * 100)


def test_a_row_for_each_cell() -> None:
    lines = table([(50, 7), (0, 20)], 1, SMALL).splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["50 + 7", "0 + 20"]
    set_threads(None)


def test_a_cell_without_new_tokens_is_refused() -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        cell("300+0")
