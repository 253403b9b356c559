"""Exact selection without a sort in CPU kernels: the threshold of a weighted top-k, by radix."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import part

BINS = 2048  # three levels of 11, 11 and 10 bits
_CHUNK = 64  # bins whose sum is looked at before they are


@part
def _border(bins: Any, count: int, above: int, limit: int) -> tuple[int, int]:
    """(The highest bin with which those from the top weigh `limit` or more, together with `above`; weight above it).

    The bin is -1 where all of the first `count` bins, a multiple of `_CHUNK`, weigh less.
    """
    first = count - _CHUNK
    while first >= 0:
        chunk, total = bins[first : first + _CHUNK], 0
        for i in range(_CHUNK):
            total += chunk[i]
        if above + total >= limit:
            break
        above += total
        first -= _CHUNK
    if first < 0:
        return -1, above
    chunk, at = bins[first : first + _CHUNK], _CHUNK - 1
    while above + chunk[at] < limit:
        above += chunk[at]
        at -= 1
    return first + at, above


@part
def threshold(keys: Any, weights: Any, count: int, limit: int, bins: Any, near: Any) -> tuple[int, int]:
    """See `threshold_and_near`, of which these are the first two."""
    key, room, _ = threshold_and_near(keys, weights, count, limit, bins, near)
    return key, room


@part
def threshold_and_near(
    keys: Any, weights: Any, count: int, limit: int, bins: Any, near: Any
) -> tuple[int, int, int]:  # fmt: skip
    """The key t such that the keys above t weigh less than `limit`, and those from t on `limit` or more.

    Args:
        keys: uint32 [count or more]; a non-negative float32's bits order as the float does.
        weights: int32 [count or more].
        count: keys that count.
        limit: at least 1.
        bins: int32 [BINS], scratch.
        near: int32 [count or more], scratch: the keys of the first level's bin, which later levels look at.

    Returns:
        (t, weight that keys equal to t may still take, how many keys `near` has in their order, all that equal t among them);
        (0, a large number, 0) where all keys weigh less than `limit`.
    """
    bins[:] = 0
    for i in range(count):
        bins[keys[i] >> np.uint32(21)] += weights[i]
    prefix, above = _border(bins, BINS, 0, limit)
    if prefix < 0:
        return 0, 1 << 30, 0
    listed = 0
    for i in range(count):
        near[listed] = i
        listed += np.int64(np.int64(keys[i] >> np.uint32(21)) == prefix)
    for level in range(2):
        shift, width = (10, 11) if level == 0 else (0, 10)
        mask = (1 << width) - 1
        bins[: mask + 1] = 0
        for i in range(listed):
            key = np.int64(keys[near[i]])
            if key >> (shift + width) == prefix:
                bins[(key >> shift) & mask] += weights[near[i]]
        bin_at, above = _border(bins, mask + 1, above, limit)
        prefix = (prefix << width) | bin_at
    return prefix, limit - above, listed
