"""Products in integers are those of the queries' rounded channels with the rows that the codec decodes.

Red when: a level, a digit or a scale meets another channel's, group's or row's; a sum passes its bits at the largest levels and
queries; a block's end reads or leaves another row; or a target with other instructions finds other bits.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.cpu_math import bits, njit
from sglang_clusterkv.kernels.levels_cpu import (
    BLOCK,
    DIGITS,
    MOST,
    dot_levels,
    scales_of,
    serves,
    split_queries,
    unpack_levels,
)
from sglang_clusterkv.kernels.vectors_cpu import BF16, INT4
from sglang_clusterkv.memory.codec import SLICES, RowCodec

ROWS, LISTED, HEADS, HEAD = 70, 37, 2, 1
CASES = [(64, 3), (96, 2), (64, 13), (160, 1), (256, 4)]  # 13: more heads than one pass over the rows takes
pytestmark = pytest.mark.skipif(not serves(INT4, 64), reason="this machine has no such instructions")


def products(channels: int, packed: np.ndarray, scales: np.ndarray, q: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """float32 [G, LISTED]."""
    group = len(q)
    splitting = split_queries(channels, group)

    @njit
    def split(q, digits, start, unit, flat):
        splitting(q, digits, start, unit, flat)

    @njit
    def dots(packed, scales, listed, begin, count, digits, start, unit, levels, factors, out):
        unpack_levels(channels, packed, scales, listed, begin, count, HEAD, levels, factors)
        dot_levels(channels, group, levels, factors, count, digits, start, unit, out)

    digits, start = np.zeros((group, DIGITS, channels), np.int8), np.zeros((group, SLICES), np.int32)
    unit = np.zeros(group, np.float32)
    split(q, digits, start, unit, np.zeros((DIGITS, channels), np.int8))
    room = LISTED + BLOCK
    found = np.full((group, room), np.nan, np.float32)
    for begin, count in ((0, 5), (5, 1), (6, LISTED - 6)):
        levels, factors = np.zeros(room * channels, np.uint8), np.zeros(room * SLICES, np.float32)
        part = np.full((group, room), np.nan, np.float32)
        dots(packed, scales, listed, begin, count, digits, start, unit, levels, factors, part)
        written = -(-count // BLOCK) * BLOCK
        assert np.isfinite(part[:, :count]).all() and np.isnan(part[:, written:]).all()
        found[:, begin : begin + count] = part[:, :count]
    return found[:, :LISTED]


def rows_of(channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(packed, scales, the rows in float64); of one row all levels are the largest, of one the least, of one zero."""
    x = torch.randn(ROWS, HEADS, channels, generator=torch.Generator().manual_seed(channels))
    x[:3] = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1)
    codec = RowCodec("int4", channels)
    packed, scales = codec.encode(x)
    packed[1] = 0x88  # -8, which no encoder writes
    assert scales is not None and scales.shape[-1] == scales_of(channels)
    return packed.numpy(), bits(scales), codec.decode(packed, scales).double().numpy()


def check(channels: int, group: int) -> str:
    """Compare; a digest of what was found."""
    packed, scales, rows = rows_of(channels)
    random = np.random.default_rng(1)
    listed = np.concatenate([np.arange(3), random.permutation(ROWS)[: LISTED - 3], np.zeros(2 * BLOCK, np.int64)])
    q = random.standard_normal((group, channels)).astype(np.float32)
    q[0] = 3.0 * np.where(np.arange(channels) % 5, 1, -1)
    if group > 1:
        q[-1] = 0.0
    found = products(channels, packed, scales, q, listed)
    unit = np.abs(q).max(1, keepdims=True).astype(np.float64) / MOST
    rounded = np.rint(q / np.where(unit > 0, unit, 1)) * unit
    of_listed = rows[listed[:LISTED], HEAD]
    np.testing.assert_allclose(found, rounded @ of_listed.T, rtol=2e-6, atol=1e-5)
    largest = np.abs(of_listed).sum(1)
    assert (np.abs(found - q.astype(np.float64) @ of_listed.T) <= 2 * unit * largest).all()
    return hashlib.sha256(found.tobytes()).hexdigest()


@pytest.mark.parametrize(("channels", "group"), CASES)
def test_products_are_of_levels_and_rounded_queries(channels: int, group: int) -> None:
    check(channels, group)


def test_rows_that_it_serves() -> None:
    assert not serves(BF16, 64) and not serves(INT4, 80) and not serves(INT4, 32) and not serves(INT4, 288)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names the features of x86")
def test_other_targets_find_the_same_bits() -> None:
    code = "from tests.kernels.test_levels_cpu import *; print(check(64, 3), check(128, 4))"
    own = {"PYTHONPATH": str(Path(__file__).parents[2])}
    narrow = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse4.2,+ssse3,+avx,+avx2,+fma"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own | narrow, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == [check(64, 3), check(128, 4)]
