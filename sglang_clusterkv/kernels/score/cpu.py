"""Score on the CPU: one pass over the clusters' rows, unpacked in registers; masses and totals from stored exponentials.

Where the reference keeps logits, this keeps exponentials relative to the largest logit of a query head, so that the
estimate needs no second exponential. Logs of masses are taken from exponentials too; only where these are too small is one
made from logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import (
    FAST,
    dot_group,
    fast_exp,
    fast_log,
    float_of_bf16,
    njit,
)
from sglang_clusterkv.kernels.row_cpu import KEYS, decode_row, load_row
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.tier import BASE_HOST


@functools.cache
def score_kernel(channels: int, group: int, row_format: int, per_scale: int, is_bf16: bool) -> Callable[..., None]:
    """Compile the kernel for one head_dim, group size, row format and pool dtype.

    Its outputs, for request b, kv head h, query head g, cluster c: size [B, H, C], begin [B, H, C] (in the request's list
    of recallable tokens), dot [B, H, G, C] (scale q.centroid), weight [B, H, G, C] (size times exp(estimate logit less
    size - peak)), log_mass [B, H, C], base_logit [B, H, G, W], peak and total [B, H, G]. sinks: [H, G], `NEGLIGIBLE` where
    there are none.
    """
    quarter = channels // 4
    # Of the closure, not the module: so numba's cache knows of a change.
    cap, least = np.float32(SPREAD_CAP), np.float32(NO_MASS)

    @njit(cache=True, fastmath=FAST, nogil=True)
    def kernel(
        q: Any, keys: Any, host: Any, words: Any, halves: Any, octets: Any, row_scales: Any, spread: Any, cluster_end: Any,
        vectors: Any, pages: Any, segment_begin: Any, segment_count: Any, page_count: Any, base_slots: Any, base_count: Any,
        sinks: Any, scale: Any, choice_spread: Any, estimate_spread: Any, page_size: Any, per_page: Any,
        size: Any, begin: Any, dot: Any, weight: Any, log_mass: Any, base_logit: Any, peak: Any, total: Any,
    ) -> None:  # fmt: skip
        row = np.empty(channels, np.float32)
        dots = np.empty(group, np.float32)
        bonus = np.empty((group, weight.shape[3]), np.float32)
        chance = np.empty((group, weight.shape[3]), np.float32)
        normaliser = np.empty(group, np.float32)
        share = np.empty(group, np.float32)
        log_group = np.float32(np.log(np.float32(group)))
        for b in range(q.shape[0]):
            clusters = page_count[b] * per_page
            tokens = base_count[b]
            for h in range(q.shape[1]):
                for s in range(segment_count[b]):
                    first = segment_begin[b, s]
                    last = segment_begin[b, s + 1] if s + 1 < segment_count[b] else page_count[b]
                    for part in range(4):
                        page = pages[b, first + part]
                        for d in range(quarter):
                            row[part * quarter + d] = float_of_bf16(vectors[page, h, 0, d])
                    for g in range(group):
                        value = np.float32(0.0)
                        for d in range(channels):
                            value += q[b, h, g, d] * row[d]
                        peak[b, h, g] = value  # q.mean of this segment, until the peaks are known
                    for part in range(4):
                        page = pages[b, first + part]
                        for d in range(quarter):
                            row[part * quarter + d] = float_of_bf16(vectors[page, h, 2, d])
                    for g in range(group):
                        value = np.float32(0.0)
                        for d in range(channels):
                            value += q[b, h, g, d] * q[b, h, g, d] * row[d]
                        total[b, h, g] = np.float32(0.5) * scale * scale * value  # likewise
                    previous = 0
                    for p in range(first, last):
                        for j in range(per_page):
                            cluster = pages[b, p] * per_page + j
                            c = p * per_page + j
                            end = np.int64(cluster_end[cluster, h])
                            size[b, h, c] = end - previous
                            begin[b, h, c] = first * page_size + previous
                            previous = end
                            decode_row(
                                words, halves, octets, row_scales, cluster, h, row_format, channels, per_scale, row
                            )
                            wide = float_of_bf16(spread[cluster, h])
                            dot_group(q[b, h], row, group, channels, dots)
                            for g in range(group):
                                dot[b, h, g, c] = scale * (dots[g] + peak[b, h, g])
                                bonus[g, c] = wide * total[b, h, g]
                away = 0
                for t in range(tokens):
                    away += load_row(keys, host, KEYS, base_slots[b, t], h, is_bf16, channels, row)
                    dot_group(q[b, h], row, group, channels, dots)
                    for g in range(group):
                        base_logit[b, h, g, t] = scale * dots[g]
                if host is not None:
                    host.reads[BASE_HOST] += away
                for g in range(group):
                    # Two peaks: where clusters are wide, the choice's is so much higher that the estimate would vanish.
                    # Neither knows of the other's weight, for either may be the larger.
                    base_peak = sinks[h, g]
                    for t in range(tokens):
                        base_peak = max(base_peak, base_logit[b, h, g, t])
                    highest = base_peak
                    choice_peak = base_peak
                    for c in range(clusters):
                        choice_peak = max(choice_peak, dot[b, h, g, c] + bonus[g, c] * choice_spread)
                        highest = max(highest, dot[b, h, g, c] + min(bonus[g, c], cap) * estimate_spread)
                    base = fast_exp(sinks[h, g] - base_peak)
                    for t in range(tokens):
                        base += fast_exp(base_logit[b, h, g, t] - base_peak)
                    estimated = base * fast_exp(base_peak - highest)
                    chosen = base * fast_exp(base_peak - choice_peak)
                    for c in range(clusters):
                        count = np.float32(size[b, h, c])
                        value = count * fast_exp(dot[b, h, g, c] + min(bonus[g, c], cap) * estimate_spread - highest)
                        weight[b, h, g, c] = value
                        estimated += value
                        value = fast_exp(dot[b, h, g, c] + bonus[g, c] * choice_spread - choice_peak)
                        chance[g, c] = value
                        chosen += count * value
                    peak[b, h, g] = highest
                    total[b, h, g] = highest + np.log(estimated)
                    normaliser[g] = choice_peak + np.log(chosen)
                    share[g] = np.float32(1.0) / (chosen * np.float32(group))
                for c in range(clusters):
                    mass = np.float32(0.0)
                    for g in range(group):
                        mass += chance[g, c] * share[g]
                    chance[0, c] = mass
                    log_mass[b, h, c] = fast_log(max(mass, least))
                for c in range(clusters):
                    if size[b, h, c] == 0:
                        log_mass[b, h, c] = -np.inf
                    elif chance[0, c] < least:
                        # Exponentials of some heads were cut off.
                        largest = np.float32(-np.inf)
                        for g in range(group):
                            dots[g] = dot[b, h, g, c] + bonus[g, c] * choice_spread - normaliser[g]
                            largest = max(largest, dots[g])
                        mass = np.float32(0.0)
                        for g in range(group):
                            mass += fast_exp(dots[g] - largest)
                        log_mass[b, h, c] = largest + np.log(mass) - log_group

    return kernel
