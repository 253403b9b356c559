"""Select on the CPU: a radix threshold over the logs of masses, weighted by size, instead of a sort."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import bits_of_float, part
from sglang_clusterkv.kernels.threshold_cpu import threshold_and_near

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
    near = scratch.near[t]
    border, room, listed = threshold_and_near(keys, size, clusters, n.limit, scratch.bins[t], near)
    least, total = np.uint32(border), np.int64(0)
    for c in range(clusters):
        count = size[c] if keys[c] > least else np.int32(0)
        taken[c] = count
        total += count
    for i in range(listed):
        c = np.uint64(near[i])
        if keys[c] == least:
            count = min(np.int64(size[c]), room)
            taken[c] = count
            room -= count
            total += count
    u.candidates[b, h] = total
