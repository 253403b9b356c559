"""Select on the CPU: a radix threshold over the logs of masses, weighted by size, instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import bits_of_float, njit
from sglang_clusterkv.kernels.threshold_cpu import BINS, threshold

_INFINITY = np.uint32(0x7F800000)  # its bits


@njit(cache=True, nogil=True)
def select_kernel(
    log_mass: Any, size: Any, page_count: Any, per_page: Any, limit: Any, taken: Any, candidates: Any
) -> None:
    """Members taken of each cluster, `taken` [B, H, C] int32, and their number, `candidates` [B, H] int32.

    log_mass [B, H, C] float32, of the mass per token, at most 0 but for rounding, size [B, H, C] int32, page_count [B].
    """
    bins = np.empty(BINS, np.int64)
    keys = np.empty(log_mass.shape[2], np.uint32)
    for b in range(log_mass.shape[0]):
        clusters = page_count[b] * per_page
        for h in range(log_mass.shape[1]):
            for c in range(clusters):
                # Bits of a number's size order as it does; here the smaller one is the larger mass. NaN is above all.
                below = -log_mass[b, h, c] if log_mass[b, h, c] < 0 else np.float32(0.0)
                keys[c] = _INFINITY - bits_of_float(below)
            border, room = threshold(keys, size[b, h], clusters, limit, bins)
            total = 0
            for c in range(clusters):
                count = np.int64(size[b, h, c])
                if np.int64(keys[c]) < border:
                    count = 0
                elif np.int64(keys[c]) == border:
                    count = min(count, room)
                    room -= count
                taken[b, h, c] = count
                total += count
            candidates[b, h] = total
