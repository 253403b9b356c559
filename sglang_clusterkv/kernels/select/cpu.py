"""Select on the CPU: a radix threshold over the logs of masses, weighted by size, instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import bits_of_float, part
from sglang_clusterkv.kernels.threshold_cpu import threshold

_INFINITY = np.uint32(0x7F800000)  # its bits


@part
def select_pair(b: Any, h: Any, t: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
    """Members taken of each cluster of one (request, kv head), `taken` [B, H, C], and their number, `candidates` [B, H].

    By log_mass [B, H, C], of the mass per token, at most 0 but for rounding, and size [B, H, C].
    """
    log_mass, size, taken, keys = u.log_mass[b, h], u.size[b, h], u.taken[b, h], scratch.keys[t]
    clusters = lists.page_count[b] * n.per_page
    for c in range(clusters):
        # Bits of a number's size order as it does; here the smaller one is the larger mass. NaN is above all.
        below = -log_mass[c] if log_mass[c] < 0 else np.float32(0.0)
        keys[c] = _INFINITY - bits_of_float(below)
    border, room = threshold(keys, size, clusters, n.limit, scratch.bins[t], scratch.near[t])
    total = 0
    for c in range(clusters):
        count = np.int64(size[c])
        key = np.int64(keys[c])
        if key < border:
            count = 0
        elif key == border:
            count = min(count, room)
            room -= count
        taken[c] = count
        total += count
    u.candidates[b, h] = total
