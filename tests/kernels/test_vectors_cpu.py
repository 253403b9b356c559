"""Dot products with packed rows and sums of them are what their codecs say, whatever vectors the CPU has.

Red when: a format is unpacked wrongly, or for one head_dim only; a sum lands in another row's place; a row's result depends on
the rows beside it; or a target without AVX-512, or without AVX2, computes something else.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.cpu_math import bits, njit
from sglang_clusterkv.kernels.vectors_cpu import (
    BF16,
    CODES_1,
    CODES_2,
    E4M3,
    E5M2,
    FLOAT32,
    INT4,
    INT8,
    ROW_FORMATS,
    TOGETHER,
    add_rows,
    dot_rows,
    unpack_rows,
)
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec

ROWS, LISTED, HEADS, HEAD = 60, 37, 2, 1
CASES = [
    (INT4, 64, 3), (INT4, 80, 2), (INT4, 256, 1), (INT8, 64, 7), (BF16, 96, 2), (FLOAT32, 64, 3), (CODES_2, 128, 4),
    (CODES_2, 80, 1), (CODES_1, 48, 5), (E4M3, 64, 3), (E5M2, 80, 2),
]  # fmt: skip
FP8 = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def rows_of(row_format: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(packed, scales, the rows in float64)."""
    x = torch.randn(ROWS, HEADS, channels, generator=torch.Generator().manual_seed(channels))
    none = np.zeros((1, 1, 1), np.uint16)
    if row_format == FLOAT32:
        return x.numpy(), none, x.double().numpy()
    if row_format in FP8:
        rounded = (x / 100).to(FP8[row_format])  # denormal numbers among them
        return bits(rounded), none, rounded.double().numpy()
    if row_format in (CODES_1, CODES_2):
        codec = TokenCodec(2 if row_format == CODES_2 else 1, channels)
        codes, _ = codec.encode(x)
        return codes.numpy(), none, codec.decode(codes, torch.ones(ROWS, HEADS)).double().numpy()
    name = next(name for name, number in ROW_FORMATS.items() if number == row_format)
    codec = RowCodec(name, channels)
    packed, scales = codec.encode(x)
    decoded = codec.decode(packed, scales).double().numpy()
    return packed.numpy(), none if scales is None else bits(scales), decoded


def check(row_format: int, channels: int, group: int) -> None:
    packed, scales, rows = rows_of(row_format, channels)
    random = np.random.default_rng(1)
    listed = np.concatenate([random.permutation(ROWS)[:LISTED], np.zeros(TOGETHER, np.int64)])
    q = random.standard_normal((group, channels)).astype(np.float32)
    weights = random.random((group, LISTED)).astype(np.float32)

    @njit
    def dots(packed, scales, listed, begin, count, q, out):
        dot_rows(row_format, channels, group, packed, scales, listed, begin, count, HEAD, q, out)

    @njit
    def sums(packed, scales, listed, begin, count, weights, out):
        add_rows(row_format, channels, group, packed, scales, listed, begin, count, HEAD, weights, out)

    found = np.full((group, LISTED + TOGETHER), np.nan, np.float32)
    dots(packed, scales, listed, 0, LISTED, q, found)
    np.testing.assert_allclose(found[:, :LISTED], q @ rows[listed[:LISTED], HEAD].T, rtol=1e-5, atol=2e-5)
    pieces = np.full_like(found, np.nan)
    for begin, count in ((0, 5), (5, 1), (6, LISTED - 6)):
        dots(packed, scales, listed, begin, count, q, pieces)
    np.testing.assert_array_equal(found[:, :LISTED], pieces[:, :LISTED])

    @njit
    def unpack(packed, scales, listed, begin, count, out):
        unpack_rows(row_format, channels, packed, scales, listed, begin, count, HEAD, out)

    @njit
    def dots_of_unpacked(rows, order, count, q, out):
        dot_rows(FLOAT32, channels, group, rows, rows, order, 0, count, 0, q, out)

    unpacked = np.full((LISTED + TOGETHER, 1, channels), np.nan, np.float32)
    unpack(packed, scales, listed, 3, LISTED - 3, unpacked)
    np.testing.assert_allclose(unpacked[: LISTED - 3, 0], rows[listed[3:LISTED], HEAD], rtol=1e-6)
    assert np.isnan(unpacked[LISTED - 3 :]).all(), "more rows than were asked for"
    dots_of_unpacked(unpacked, np.arange(LISTED + TOGETHER), LISTED - 3, q, pieces)
    np.testing.assert_array_equal(found[:, 3:LISTED], pieces[:, : LISTED - 3])

    total = np.ones((group, channels), np.float32)
    sums(packed, scales, listed, 0, LISTED, weights, total)
    np.testing.assert_allclose(total, 1 + weights @ rows[listed[:LISTED], HEAD], rtol=1e-5, atol=5e-5)
    pieces = np.ones((group, channels), np.float32)
    for begin, count in ((0, 5), (5, 0), (5, LISTED - 5)):
        sums(packed, scales, listed, begin, count, weights, pieces)
    np.testing.assert_array_equal(total, pieces)


def check_all_codes(row_format: int) -> None:
    """Each of the 256 codes of fp8, among zeros: as torch converts it, infinities and what is no number too."""
    codes = np.arange(256, dtype=np.uint8).reshape(16, 1, 16)
    channels, listed = 16, np.concatenate([np.arange(16), np.zeros(TOGETHER, np.int64)])

    @njit
    def sums(packed, scales, listed, weights, out):
        add_rows(row_format, channels, 1, packed, scales, listed, 0, 1, 0, weights, out)

    expected = torch.from_numpy(codes).view(FP8[row_format]).float().numpy()
    for row in range(16):
        total = np.zeros((1, channels), np.float32)
        sums(codes, np.zeros((1, 1, 1), np.uint16), listed[row:], np.ones((1, 16), np.float32), total)
        np.testing.assert_array_equal(total[0], expected[row, 0])


@pytest.mark.parametrize("row_format", FP8)
def test_all_codes_of_fp8_are_what_torch_makes_of_them(row_format: int) -> None:
    check_all_codes(row_format)


@pytest.mark.parametrize(("row_format", "channels", "group"), CASES)
def test_rows_are_what_the_codec_says(row_format: int, channels: int, group: int) -> None:
    check(row_format, channels, group)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names the features of x86")
@pytest.mark.parametrize("features", ["+sse4.2,+ssse3,+avx,+avx2,+fma", "+sse2"])
def test_other_targets_compute_the_same(features: str) -> None:
    environment = {
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": features,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    code = (
        "from tests.kernels.test_vectors_cpu import *\n"
        "for case in ((INT4, 64, 3), (CODES_2, 80, 2)): check(*case)\n"
        "for row_format in FP8: check_all_codes(row_format)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
