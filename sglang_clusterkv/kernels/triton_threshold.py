"""Exact selection without a sort in Triton kernels: the threshold of a weighted top-k, by bisection over the floats' bits.

All keys stay in the registers of one program, so that a halving costs a comparison per key and one sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def order_of(x):
    """Keys, int32, that order as the non-negative float32 `x` do; NaN above all, or below where its sign is set."""
    return tl.minimum(x.to(tl.int32, bitcast=True), 0x7FFFFFFE)


@triton.jit
def order_of_log(x):
    """Keys, int32, that order as the float32 `x` do, which are at most 0 but for rounding; NaN above all."""
    return 0x7F800000 - tl.where(x < 0, -x, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def bracket(keys, weights, limit):
    """Between which keys the `limit` highest end: (low, high, room).

    Everything from `high` on weighs less than `limit` and is taken whole. What lies in [low, high) takes the remaining
    `room`, and is one element or several that tie. Where all weigh no more than `limit`, both are 0: all is taken whole.

    Args:
        keys: int32 [n], below 2^31 - 1; negative ones never count.
        weights: int32 [n], not negative; their sum below 2^31.
        limit: int32, at least 1.
    """
    # Weight and number of elements in one sum: the search ends as soon as one element is left, which is usual.
    counted = (weights.to(tl.int64) << 32) + 1
    total = tl.sum(tl.where(keys >= 0, counted, 0), 0)
    low = tl.min(tl.where(keys >= 0, keys, 0x7FFFFFFF), 0)
    high = tl.max(keys, 0) + 1
    above = total * 0  # of the keys from `high` on
    from_low = total  # of the keys from `low` on
    if (total >> 32) <= limit:
        low = 0
        high = 0
        above = total
    while (high - low > 1) & (((from_low - above) & 0xFFFFFFFF) > 1):
        middle = low + (high - low) // 2  # above 0, so that negative keys need no other test
        upper = tl.sum(tl.where(keys >= middle, counted, 0), 0)
        if (upper >> 32) >= limit:
            low = middle
            from_low = upper
        else:
            high = middle
            above = upper
    return low, high, tl.maximum(limit - (above >> 32).to(tl.int32), 0)
