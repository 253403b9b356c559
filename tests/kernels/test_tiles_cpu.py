"""Products of tiles are what they say, whatever vectors the CPU has, and a column's do not depend on the others.

Red when: a row or a column is left out or lands in another's place; a power of two is inexact; a part of a softmax is merged
with a wrong weight; a target without AVX-512, or without AVX2, computes something else; or the width of a tile changes a
column's bits.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sglang_clusterkv.kernels.cpu_math import address_of, njit
from sglang_clusterkv.kernels.tiles_cpu import (
    DOUBLE,
    STEP,
    TOGETHER,
    WIDTH,
    add_rows_to_tile,
    aligned,
    exponentials_of_tile,
    merge_tiles,
    multiply_rows,
    start_parts,
)

CHANNELS, ROWS = 80, 21
WIDTHS = (STEP, DOUBLE, WIDTH)


@njit
def address(array, row):  # type: ignore[no-untyped-def]
    return address_of(array, row, 0)


@njit
def starts_a_line(floats):  # type: ignore[no-untyped-def]
    array = aligned(floats)
    return array.ctypes.data % 64 == 0 and len(array) == floats


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def parts_of(width: int, logits: np.ndarray, values: np.ndarray, blocks: list[int]) -> list[np.ndarray]:
    """Largest logits, totals and sums of a softmax to the base 2 over blocks of rows, one after another."""

    @njit
    def one(where, count, logits, most, total, keep, sums):
        exponentials_of_tile(width, count, logits, most, total, keep)
        add_rows_to_tile(width, CHANNELS, where, count, logits, keep, sums)

    @njit
    def start(most, total, sums):
        start_parts(most, total, sums)

    found = [
        np.empty((1, WIDTH), np.float32),
        np.empty((1, WIDTH), np.float32),
        np.empty((CHANNELS, WIDTH), np.float32),
    ]
    keep = np.empty((1, WIDTH), np.float32)
    start(*found)
    for begin, end in zip([0, *blocks], [*blocks, len(logits)], strict=True):
        where = np.array([address(values, row) for row in range(begin, end)])
        one(where, end - begin, logits[begin:end].copy(), found[0], found[1], keep, found[2])
    return found


def check_products(width: int) -> None:
    rows, tile = numbers(ROWS, 1, CHANNELS), numbers(CHANNELS, WIDTH)

    @njit
    def products(where, count, tile, out):
        multiply_rows(width, 0, where, count, tile.shape[0], tile, out, where)

    @njit
    def products_of_known_length(where, count, tile, out):
        multiply_rows(width, 0, where, count, CHANNELS, tile, out, where)

    order = np.random.default_rng(0).permutation(ROWS)
    where = np.array([address(rows, row) for row in [*order, *[0] * TOGETHER]])
    out = np.full((ROWS + TOGETHER, WIDTH), np.nan, np.float32)
    products(where, ROWS, tile, out)
    known = np.full_like(out, np.nan)
    products_of_known_length(where, ROWS, tile, known)
    np.testing.assert_array_equal(known[:ROWS], out[:ROWS])
    expected = rows[order, 0].astype(np.float64) @ tile[:, :width]
    np.testing.assert_allclose(out[:ROWS, :width], expected, atol=2e-5)
    assert np.isnan(out[:, width:]).all()

    @njit
    def products_in_two(where, count, tile, out):
        multiply_rows(width, 0, where, count, 30, tile, out, where)
        multiply_rows(width, 1, where + 4 * 30, count, tile.shape[0] - 30, tile[30:], out, where)

    halves = np.full_like(out, np.nan)
    products_in_two(where, ROWS, tile, halves)
    np.testing.assert_array_equal(halves[:ROWS], out[:ROWS])
    few = np.empty_like(out)
    for begin, end in ((0, 5), (5, 6), (6, ROWS)):
        products(where[begin:], end - begin, tile, few[begin:])
    np.testing.assert_array_equal(few[:ROWS, :width], out[:ROWS, :width])


def check_softmax(width: int) -> None:
    logits, values = 20 * numbers(ROWS, WIDTH), numbers(ROWS, 1, CHANNELS)
    logits[:9, 3] = -1e30  # hidden
    logits[4, 5] = logits[:, 5].min() - 200  # a weight that is no normal number
    weights = np.exp2(logits.astype(np.float64) - logits.max(0))
    expected = values[:, 0].T.astype(np.float64) @ weights
    most, total, sums = parts_of(width, logits, values, [7, 12])
    np.testing.assert_array_equal(most[0, :width], logits.max(0)[:width])
    np.testing.assert_allclose(total[0, :width], weights.sum(0)[:width], rtol=1e-6)
    np.testing.assert_allclose(sums[:, :width], expected[:, :width], rtol=1e-5, atol=1e-5)

    @njit
    def merge(most, total, sums, more_most, more_total, more_sums):
        merge_tiles(width, CHANNELS, most, total, sums, more_most, more_total, more_sums)

    first, second = (parts_of(width, logits[part], values[part], []) for part in (slice(0, 8), slice(8, ROWS)))
    for a, b in ((first, second), ([x.copy() for x in second], [x.copy() for x in first])):
        merged = [x.copy() for x in a]
        merge(*merged, *b)
        np.testing.assert_array_equal(merged[0][0, :width], most[0, :width])
        np.testing.assert_allclose(merged[1][0, :width], weights.sum(0)[:width], rtol=1e-6)
        np.testing.assert_allclose(merged[2][:, :width], expected[:, :width], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_products_are_those_of_the_rows_that_are_listed(width: int) -> None:
    check_products(width)


@pytest.mark.parametrize("width", WIDTHS)
def test_parts_of_a_softmax_are_that_softmax(width: int) -> None:
    check_softmax(width)


def test_a_column_is_the_same_in_a_tile_of_any_width() -> None:
    logits, values = numbers(ROWS, WIDTH), numbers(ROWS, 1, CHANNELS)
    whole = parts_of(WIDTH, logits, values, [10])
    for width in WIDTHS[:-1]:
        for mine, expected in zip(parts_of(width, logits, values, [10]), whole, strict=True):
            np.testing.assert_array_equal(mine[:, :width], expected[:, :width])


def test_scratch_begins_a_line_of_memory() -> None:
    assert all(starts_a_line(floats) for floats in (1, 17, 640, 3000))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names the features of x86")
@pytest.mark.parametrize("features", ["+sse4.2,+ssse3,+avx,+avx2,+fma", "+sse2"])
def test_other_targets_compute_the_same(features: str) -> None:
    environment = {
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": features,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    code = (
        "from tests.kernels.test_tiles_cpu import *\nfor width in WIDTHS: check_products(width), check_softmax(width)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
