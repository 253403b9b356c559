"""Products of codes in integers are those of the queries' rounded channels with the levels that the codec decodes.

Red when: a crumb, a digit or a level meets another channel or row; a sum passes its bits at the largest levels and queries; a
block's end reads or leaves another row; or a code's levels stop being a whole number of steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.codes_cpu import PIECES, dot_codes, serves, split_rotated
from sglang_clusterkv.kernels.cpu_math import njit
from sglang_clusterkv.kernels.levels_cpu import BLOCK, DIGITS, MOST
from sglang_clusterkv.memory.codec import TokenCodec

ROWS, LISTED, HEADS, HEAD = 70, 37, 2, 1
CASES = [(64, 3), (128, 4), (192, 2), (256, 2), (64, 9)]  # 9: more heads than one pass over the rows takes


@pytest.mark.skipif(not serves(2, 64), reason="this machine has no such instructions")
@pytest.mark.parametrize(("channels", "group"), CASES)
def test_products_are_of_levels_and_rounded_queries(channels: int, group: int) -> None:
    random, splitting, codec = np.random.default_rng(channels), split_rotated(channels, group), TokenCodec(2, channels)
    packed = random.integers(0, 256, (ROWS, HEADS, codec.code_bytes), np.uint8)  # every byte is four codes
    packed[:4] = np.array([0x55, 0xFF, 0x00, 0xAA])[:, None, None]  # all outer, all outer and negative, ...
    levels = codec.decode(torch.from_numpy(packed), torch.ones(ROWS, HEADS)).double().numpy()
    listed = np.concatenate([np.arange(4), random.permutation(ROWS)[: LISTED - 4], np.zeros(BLOCK, np.int64)])
    q = random.standard_normal((group, channels)).astype(np.float32)
    q[0] = 3.0 * np.where(np.arange(channels) % 5, 1, -1)
    q[1] = 3.0
    if group > 2:
        q[-1] = 0.0

    @njit
    def products(packed, listed, begin, count, q, digits, start, unit, ordered, out):
        splitting(q, digits, start, unit, ordered)
        dot_codes(channels, group, packed, listed, begin, count, HEAD, digits, start, unit, out)

    digits, start = np.zeros((group, DIGITS, channels), np.int8), np.zeros((group, PIECES), np.int32)
    scratch = digits, start, np.zeros(group, np.float32), np.zeros(channels, np.float32)
    found = np.full((group, LISTED + BLOCK), np.nan, np.float32)
    for begin, count in ((0, 5), (5, 1), (6, LISTED - 6)):
        some = np.full_like(found, np.nan)
        products(packed, listed, begin, count, q, *scratch, some)
        end = begin + -(-count // BLOCK) * BLOCK
        assert np.isfinite(some[:, begin : begin + count]).all()
        assert np.isnan(some[:, :begin]).all() and np.isnan(some[:, end:]).all()
        found[:, begin : begin + count] = some[:, begin : begin + count]
    found = found[:, :LISTED]
    unit = np.abs(q).max(1, keepdims=True).astype(np.float64) / MOST
    rounded = np.rint(q / np.where(unit > 0, unit, 1)) * unit
    of_listed = levels[listed[:LISTED], HEAD]
    np.testing.assert_allclose(found, rounded @ of_listed.T, rtol=2e-6, atol=2e-5)
    assert (np.abs(found - q.astype(np.float64) @ of_listed.T) <= 2 * unit * np.abs(of_listed).sum(1) + 2e-5).all()


def test_codes_that_it_serves() -> None:
    assert not serves(1, 64) and not serves(2, 80) and not serves(2, 32) and not serves(2, 320)
