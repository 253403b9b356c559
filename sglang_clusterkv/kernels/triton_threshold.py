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
def added(first, second, third, other_first, other_second, other_third):
    """The sum of two triples."""
    return first + other_first, second + other_second, third + other_third


@triton.jit
def counted_from(keys, weights, border):
    """int64, shaped as `keys`: weight << 32 | 1 of each key from `border` (0 or more) on, 0 of the others.

    Weight and number of elements in one sum: a search ends as soon as one element is left, which is usual.
    """
    return tl.where(keys >= border, (weights.to(tl.int64) << 32) + 1, 0)


@triton.jit
def narrowed(low, high, from_low, above, step, first, second, third, limit):
    """A bracket (low, high, from_low, above) after a round; from_low, above: the sums from `low` and from `high` on.

    first, second, third: the sums from low + step, low + 2 step and low + 3 step on, or from `high` where that is less. All of
    these are below 2^31.
    """
    past_first = (first >> 32) >= limit
    past_second = (second >> 32) >= limit
    past_third = (third >> 32) >= limit
    # From the top: the lowest border that is not reached is the new `high`.
    above = tl.where(past_third, above, third)
    new_high = tl.where(past_third, high, tl.minimum(low + 3 * step, high))
    above = tl.where(past_second, above, second)
    new_high = tl.where(past_second, new_high, tl.minimum(low + 2 * step, high))
    above = tl.where(past_first, above, first)
    new_high = tl.where(past_first, new_high, tl.minimum(low + step, high))
    from_low = tl.where(past_first, first, from_low)
    from_low = tl.where(past_second, second, from_low)
    from_low = tl.where(past_third, third, from_low)
    passed = past_first.to(tl.int32) + past_second.to(tl.int32) + past_third.to(tl.int32)
    return low + passed * step, new_high, from_low, above


@triton.jit
def bracket(keys, weights, limit, BITS: tl.constexpr = 0):
    """Between which keys the `limit` highest end: (low, high, room, between).

    Everything from `high` on weighs less than `limit` and is taken whole. What lies in [low, high) takes the remaining
    `room`, and is one element or several that tie: `between` elements. Where all weigh no more than `limit`, both are 0: all
    is taken whole.

    Args:
        keys: int32 [n], below 2^31 - 1; negative ones never count.
        weights: int32 [n], not negative, their sum below 2^31; None: each weighs 1.
        limit: int32, at least 1.
        BITS: that the sum of all weights has at most, where what is left of 32 can tell how many elements there are but one:
            weights and elements are summed as one number then. 0: they are not.
    """
    # Besides the weights elements are counted: the search ends as soon as one is left, which is usual.
    from_low = tl.sum((keys >= 0).to(tl.int32), 0)
    weight = from_low if weights is None else tl.sum(tl.where(keys >= 0, weights, 0), 0)
    low = tl.min(tl.where(keys >= 0, keys, 0x7FFFFFFF), 0)
    high = tl.max(keys, 0) + 1
    above = from_low * 0  # elements from `high` on
    taken = weight * 0  # their weight
    if weight <= limit:
        low = 0
        high = 0
        above = from_low
        taken = weight
    while (high - low > 1) & (from_low - above > 1):
        middle = low + (high - low) // 2  # above 0, so that negative keys need no other test
        if BITS:  # the lowest key is below the middle
            both = tl.sum(tl.where(keys >= middle, weights + (1 << BITS), 0).to(tl.uint32), 0)
            upper = (both >> BITS).to(tl.int32)
            weight = (both & ((1 << BITS) - 1)).to(tl.int32)
        else:
            upper = tl.sum((keys >= middle).to(tl.int32), 0)
            weight = upper if weights is None else tl.sum(tl.where(keys >= middle, weights, 0), 0)
        if weight >= limit:
            low = middle
            from_low = upper
        else:
            high = middle
            above = upper
            taken = weight
    return low, high, tl.maximum(limit - taken, 0), from_low - above


@triton.jit
def bracket_in_memory(read: tl.constexpr, arguments, count, limit, BLOCK: tl.constexpr):
    """`bracket` of `count` keys that are read again in each round, BLOCK at a time.

    read: a function of (arguments, first, BLOCK) that gives the keys and weights of the BLOCK elements from `first` on; a key
    is -1 beyond `count`.
    """
    totals = tl.zeros((BLOCK,), tl.int64)
    lowest = tl.full((BLOCK,), 0x7FFFFFFF, tl.int32)
    highest = tl.full((BLOCK,), -1, tl.int32)
    for first in range(0, count, BLOCK):
        keys, weights = read(arguments, first, BLOCK)
        totals += counted_from(keys, weights, 0)
        lowest = tl.minimum(lowest, tl.where(keys >= 0, keys, 0x7FFFFFFF))
        highest = tl.maximum(highest, keys)
    from_low = tl.sum(totals, 0)
    low, high, above = tl.min(lowest, 0), tl.max(highest, 0) + 1, from_low * 0
    if (from_low >> 32) <= limit:
        low = 0
        high = 0
        above = from_low
    while (high - low > 1) & (((from_low - above) & 0xFFFFFFFF) > 1):
        step = (high - low) // 4 + 1
        first_sum = tl.zeros((BLOCK,), tl.int64)
        second_sum = tl.zeros((BLOCK,), tl.int64)
        third_sum = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, count, BLOCK):
            keys, weights = read(arguments, first, BLOCK)
            first_sum += counted_from(keys, weights, tl.minimum(low + step, high))
            second_sum += counted_from(keys, weights, tl.minimum(low + 2 * step, high))
            third_sum += counted_from(keys, weights, tl.minimum(low + 3 * step, high))
        sums = tl.reduce((first_sum, second_sum, third_sum), 0, added)
        low, high, from_low, above = narrowed(low, high, from_low, above, step, sums[0], sums[1], sums[2], limit)
    return low, high, tl.maximum(limit - (above >> 32).to(tl.int32), 0)
