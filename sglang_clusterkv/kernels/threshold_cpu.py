"""Exact selection without a sort in CPU kernels: the threshold of a weighted top-k, by radix."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import njit

BINS = 2048  # three levels of 11, 11 and 10 bits


@njit(cache=True)
def threshold(keys: Any, weights: Any, count: int, limit: int, bins: Any) -> tuple[int, int]:
    """The key t such that the keys above t weigh less than `limit`, and those from t on `limit` or more.

    Args:
        keys: uint32 [count or more]; a non-negative float32's bits order as the float does.
        weights: int32 [count or more].
        count: keys that count.
        limit: at least 1.
        bins: int64 [BINS], scratch.

    Returns:
        (t, weight that keys equal to t may still take); (0, a large number) where all keys weigh less than `limit`.
    """
    prefix, above = np.uint32(0), 0
    for level in range(3):
        shift = np.uint32((21, 10, 0)[level])
        width = np.uint32((11, 11, 10)[level])
        mask = np.uint32((1 << width) - 1)
        bins[:] = 0
        for i in range(count):
            key = keys[i]
            if level == 0 or (key >> (shift + width)) == prefix:
                bins[(key >> shift) & mask] += weights[i]
        bin_at = np.int64(mask)
        while above + bins[bin_at] < limit:
            above += bins[bin_at]
            bin_at -= 1
            if bin_at < 0:
                return 0, 1 << 30
        prefix = (prefix << width) | np.uint32(bin_at)
    return np.int64(prefix), limit - above
