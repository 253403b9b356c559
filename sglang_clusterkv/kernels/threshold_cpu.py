"""Exact selection without a sort in CPU kernels: the threshold of a weighted top-k, by radix."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import part

BINS = 2048  # three levels of 11, 11 and 10 bits


@part
def threshold(keys: Any, weights: Any, count: int, limit: int, bins: Any, near: Any) -> tuple[int, int]:
    """The key t such that the keys above t weigh less than `limit`, and those from t on `limit` or more.

    Args:
        keys: uint32 [count or more]; a non-negative float32's bits order as the float does.
        weights: int32 [count or more].
        count: keys that count.
        limit: at least 1.
        bins: int32 [BINS], scratch.
        near: int32 [count or more], scratch: the keys of the first level's bin, which later levels look at.

    Returns:
        (t, weight that keys equal to t may still take); (0, a large number) where all keys weigh less than `limit`.
    """
    above = 0
    bins[:] = 0
    for i in range(count):
        bins[keys[i] >> np.uint32(21)] += weights[i]
    bin_at = BINS - 1
    while above + bins[bin_at] < limit:
        above += bins[bin_at]
        bin_at -= 1
        if bin_at < 0:
            return 0, 1 << 30
    prefix, listed = bin_at, 0
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
        bin_at = mask
        while above + bins[bin_at] < limit:
            above += bins[bin_at]
            bin_at -= 1
        prefix = (prefix << width) | bin_at
    return prefix, limit - above
