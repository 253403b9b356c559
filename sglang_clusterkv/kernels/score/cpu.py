"""Score on the CPU: one pass over a pair's clusters, unpacked in registers; masses and totals from stored exponentials.

Where the reference keeps logits, this keeps exponentials relative to the largest logit of a query head, so that the
estimate needs no second exponential. Logs of masses are taken from exponentials too; only where these are too small is one
made from logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import FAST, fast_exp, fast_log, float_of_bf16, part
from sglang_clusterkv.kernels.row_cpu import KEYS, pool_kernels
from sglang_clusterkv.kernels.vectors_cpu import TOGETHER, dot_rows
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.tier import BASE_HOST


@functools.cache
def score_pair(channels: int, group: int, row_format: int, is_bf16: bool) -> Callable[..., None]:
    """Compile the scores of one (request b, kv head h) for one head_dim, group size, row format and pool dtype.

    Its outputs, for query head g and cluster c: size [B, H, C], begin [B, H, C] (in the request's list of recallable
    tokens), dot [B, H, G, C] (scale q.centroid), weight [B, H, G, C] (size times exp(estimate logit less size - peak)),
    log_mass [B, H, C], base_logit [B, H, G, W], peak and total [B, H, G].
    sinks: [H, G], `NEGLIGIBLE` where there are none.
    """
    quarter = channels // 4
    cap, least = np.float32(SPREAD_CAP), np.float32(NO_MASS)
    dots, _ = pool_kernels(channels, group, is_bf16)

    @part(fastmath=FAST)
    def of_segment(q: Any, vectors: Any, pages: Any, first: Any, h: Any, mean: Any, wide: Any) -> None:
        """q . mean key and q squared . variance of the segment that begins at a page of the list, for each query head."""
        for g in range(group):
            mean[g] = 0.0
            wide[g] = 0.0
        for k in range(4):
            page = pages[first + k]
            for g in range(group):
                dot = np.float32(0.0)
                square = np.float32(0.0)
                for d in range(quarter):
                    x = q[g, k * quarter + d]
                    dot += x * float_of_bf16(vectors[page, h, 0, d])
                    square += x * x * float_of_bf16(vectors[page, h, 2, d])
                mean[g] += dot
                wide[g] += square

    @part(fastmath=FAST)
    def of_clusters(b: Any, h: Any, q: Any, index: Any, lists: Any, n: Any, u: Any, rows: Any, bonus: Any) -> None:
        """Sizes and begins of all clusters, their dots and bonuses."""
        mean, wide = np.empty(group, np.float32), np.empty(group, np.float32)
        pages, per_page = lists.pages[b], n.per_page
        cluster_end, spread, vectors = index.cluster_end, index.spread, index.vectors
        segment_begin, segments, page_count = lists.segment_begin[b], lists.segment_count[b], lists.page_count[b]
        size, begin, dot = u.size[b, h], u.begin[b, h], u.dot[b, h]
        clusters = page_count * per_page
        for p in range(page_count):
            for j in range(per_page):
                rows[p * per_page + j] = pages[p] * per_page + j
        for i in range(TOGETHER):
            rows[clusters + i] = rows[clusters - 1]
        for s in range(segments):
            first = segment_begin[s]
            last = segment_begin[s + 1] if s + 1 < segments else page_count
            of_segment(q[b, h], vectors, pages, first, h, mean, wide)
            one, end = first * per_page, last * per_page
            dot_rows(
                row_format, channels, group, index.key_rows, index.key_scales, rows, one, end - one, h, q[b, h], dot
            )  # fmt: skip
            previous = 0
            for c in range(one, end):
                until = np.int64(cluster_end[rows[c], h])
                size[c] = until - previous
                begin[c] = first * n.page_size + previous
                previous = until
                bonus[0, c] = float_of_bf16(spread[rows[c], h])
            for g in range(group - 1, -1, -1):
                variance = np.float32(0.5) * n.scale * n.scale * wide[g]
                for c in range(one, end):
                    dot[g, c] = n.scale * (dot[g, c] + mean[g])
                    bonus[g, c] = bonus[0, c] * variance

    @part(fastmath=FAST)
    def exponentials(
        size: Any, dot: Any, bonus: Any, base_logit: Any, sink: Any, clusters: Any, tokens: Any, n: Any, weight: Any,
        chance: Any,
    ) -> Any:  # fmt: skip
        """Of one query head: (peak of the estimate, its sum, peak of the choice, its sum).

        Two peaks: where clusters are wide, the choice's is so much higher that the estimate would vanish. Neither knows of the
        other's weight, for either may be the larger.
        """
        base_peak = sink
        for t in range(tokens):
            base_peak = max(base_peak, base_logit[t])
        highest = base_peak
        choice_peak = base_peak
        for c in range(clusters):
            choice_peak = max(choice_peak, dot[c] + bonus[c] * n.choice_spread)
            highest = max(highest, dot[c] + min(bonus[c], cap) * n.estimate_spread)
        base = fast_exp(sink - base_peak)
        for t in range(tokens):
            base += fast_exp(base_logit[t] - base_peak)
        estimated = base * fast_exp(base_peak - highest)
        chosen = base * fast_exp(base_peak - choice_peak)
        for c in range(clusters):
            count = np.float32(size[c])
            value = count * fast_exp(dot[c] + min(bonus[c], cap) * n.estimate_spread - highest)
            weight[c] = value
            estimated += value
            value = fast_exp(dot[c] + bonus[c] * n.choice_spread - choice_peak)
            chance[c] = value
            chosen += count * value
        return highest, estimated, choice_peak, chosen

    @part(fastmath=FAST)
    def score(
        b: Any,
        h: Any,
        t: Any,
        q: Any,
        sinks: Any,
        keys: Any,
        host: Any,
        index: Any,
        lists: Any,
        n: Any,
        u: Any,
        scratch: Any,
    ) -> None:
        bonus, chance = scratch.bonus[t], scratch.chance[t]
        clusters, tokens = lists.page_count[b] * n.per_page, lists.base_count[b]
        of_clusters(b, h, q, index, lists, n, u, scratch.rows[t], bonus)
        slots, base_logit, base_slots = scratch.slots[t], u.base_logit[b, h], lists.base_slots[b]
        for i in range(tokens + TOGETHER):
            slots[i] = base_slots[min(i, tokens - 1)]
        u.reads[b, h, BASE_HOST] = dots(keys, host, KEYS, slots, 0, tokens, h, q[b, h], base_logit)
        normaliser, share = np.empty(group, np.float32), np.empty(group, np.float32)
        for g in range(group):
            for i in range(tokens):
                base_logit[g, i] *= n.scale
            highest, estimated, choice_peak, chosen = exponentials(
                u.size[b, h], u.dot[b, h, g], bonus[g], base_logit[g], sinks[h, g], clusters, tokens, n,
                u.weight[b, h, g], chance[g],
            )  # fmt: skip
            u.peak[b, h, g] = highest
            u.total[b, h, g] = highest + np.log(estimated)
            normaliser[g] = choice_peak + np.log(chosen)
            share[g] = np.float32(1.0) / (chosen * np.float32(group))
        size, dot, log_mass, mass = u.size[b, h], u.dot[b, h], u.log_mass[b, h], chance[0]
        log_group = np.float32(np.log(np.float32(group)))
        for c in range(clusters):
            mass[c] *= share[0]
        for g in range(1, group):
            for c in range(clusters):
                mass[c] += chance[g, c] * share[g]
        for c in range(clusters):
            log_mass[c] = fast_log(max(mass[c], least))
        for c in range(clusters):
            if size[c] == 0:
                log_mass[c] = -np.inf
            elif mass[c] < least:
                # Exponentials of some heads were cut off.
                largest = np.float32(-np.inf)
                for g in range(group):
                    largest = max(largest, dot[g, c] + bonus[g, c] * n.choice_spread - normaliser[g])
                value = np.float32(0.0)
                for g in range(group):
                    value += fast_exp(dot[g, c] + bonus[g, c] * n.choice_spread - normaliser[g] - largest)
                log_mass[c] = largest + np.log(value) - log_group

    return score
