"""Select on the CPU: a radix threshold over the masses, weighted by size, instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import bits_of_float, njit
from sglang_clusterkv.kernels.threshold_cpu import BINS, threshold


@njit(cache=True, nogil=True)
def select_kernel(
    mass: Any, size: Any, page_count: Any, per_page: Any, limit: Any, taken: Any, candidates: Any
) -> None:
    """Members taken of each cluster, `taken` [B, H, C] int32, and their number, `candidates` [B, H] int32.

    mass [B, H, C] float32 per token, size [B, H, C] int32, page_count [B].
    """
    bins = np.empty(BINS, np.int64)
    keys = np.empty(mass.shape[2], np.uint32)
    for b in range(mass.shape[0]):
        clusters = page_count[b] * per_page
        for h in range(mass.shape[1]):
            for c in range(clusters):
                keys[c] = bits_of_float(mass[b, h, c])
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
