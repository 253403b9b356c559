"""Score on the CPU: one pass over a pair's clusters, unpacked in registers; masses and totals from stored exponentials.

Where the reference keeps logits, this keeps exponentials relative to the largest logit of a query head, so that the
estimate needs no second exponential. Logs of masses are taken from exponentials too; only where these are too small is one
made from logits.

Of a segment that several requests see, `shared_pair` unpacks the clusters once and leaves each request's products and what
else it reads of the index; score then goes on from these as from its own, which are the same to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import FAST, fast_exp, fast_log, float_of_bf16, larger, part
from sglang_clusterkv.kernels.row_cpu import KEYS, pool_kernels
from sglang_clusterkv.kernels.vectors_cpu import FLOAT32, TOGETHER, dot_rows, unpack_rows
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.tier import BASE_HOST

UNPACKED = 32  # rows that are unpacked together: with head_dim 128 they take half of a first-level cache


@part(fastmath=FAST)
def _listed(
    pages: Any, begin: Any, count: Any, per_page: Any, h: Any, index: Any, rows: Any, size: Any, spread: Any
) -> None:  # fmt: skip
    """Rows, sizes and spreads of the clusters of `count` pages of a list; rows has `TOGETHER` more entries."""
    previous = np.int64(0)
    for p in range(count):
        first = pages[begin + p] * per_page
        for j in range(per_page):
            row, c = np.uint64(first + j), np.uint64(p * per_page + j)
            until = np.int64(index.cluster_end[row, np.uint64(h)])
            rows[c] = first + j
            size[c] = until - previous
            spread[c] = float_of_bf16(index.spread[row, np.uint64(h)])
            previous = until
    for i in range(TOGETHER):
        rows[count * per_page + i] = rows[count * per_page - 1]


@functools.cache
def shared_pair(channels: int, group: int, row_format: int) -> Callable[..., None]:
    """Compile the products of the clusters of one (shared segment k, kv head h) with the queries of all its requests.

    For one head_dim, group size and row format. Outputs, of each of these requests: size and spread [B, H, C], and weight
    [B, H, G, C], which holds q . row until score has the weights.
    """

    @part(fastmath=FAST)
    def shared(k: Any, h: Any, t: Any, q: Any, index: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
        begin, end, per_page = lists.shared_first[k], lists.shared_first[k + 1], n.per_page
        rows, size, spread = scratch.rows[t], scratch.near[t], scratch.own[t, 0]
        unpacked, order, found = scratch.unpacked[t], scratch.order, scratch.logits[t]
        b, s = lists.shared_request[begin], lists.shared_ordinal[begin]
        first = lists.segment_begin[b, s]
        last = lists.segment_begin[b, s + 1] if s + 1 < lists.segment_count[b] else lists.page_count[b]
        clusters = (last - first) * per_page
        _listed(lists.pages[b], first, last - first, per_page, h, index, rows, size, spread)
        for i in range(begin, end):
            b = lists.shared_request[i]
            one = lists.segment_begin[b, lists.shared_ordinal[i]] * per_page
            sizes, spreads = u.size[b, h, one : one + clusters], u.spread[b, h, one : one + clusters]
            for c in range(clusters):
                sizes[c] = size[c]
            for c in range(clusters):
                spreads[c] = spread[c]
        for tile in range(0, clusters, UNPACKED):
            count = min(UNPACKED, clusters - tile)
            unpack_rows(row_format, channels, index.key_rows, index.key_scales, rows, tile, count, h, unpacked)
            for i in range(begin, end):
                b = lists.shared_request[i]
                one = lists.segment_begin[b, lists.shared_ordinal[i]] * per_page + tile
                dot_rows(FLOAT32, channels, group, unpacked, unpacked, order, 0, count, 0, q[b, h], found)
                for g in range(group):
                    products = u.weight[b, h, g, one : one + count]
                    for c in range(count):
                        products[c] = found[g, c]

    return shared


@functools.cache
def score_pair(channels: int, group: int, row_format: int, pool: int) -> Callable[..., None]:
    """Compile the scores of one (request b, kv head h) for one head_dim, group size, row format and pool format.

    Its outputs, for query head g and cluster c: size [B, H, C], begin [B, H, C] (in the request's list of recallable
    tokens), dot [B, H, G, C] (scale q.centroid), weight [B, H, G, C] (size times exp(estimate logit less size - peak)),
    log_mass [B, H, C], base_logit [B, H, G, W], peak and total [B, H, G]; variances [B, H, S, G], the bonus of a cluster of
    spread 1 of segment s.
    sinks: [H, G], `NEGLIGIBLE` where there are none.
    """
    quarter = channels // 4
    cap, least = np.float32(SPREAD_CAP), np.float32(NO_MASS)
    dots, _ = pool_kernels(channels, group, pool)

    @part(fastmath=FAST)
    def of_segment(
        b: Any, h: Any, q: Any, squares: Any, first: Any, index: Any, lists: Any, tile: Any, order: Any, found: Any
    ) -> None:
        """found[g] = (q . mean key, q squared . variance) of the segment that begins at a page of the list."""
        vectors = index.vectors
        for k in range(4):
            page = lists.pages[b, first + k]
            for d in range(quarter):
                tile[0, 0, k * quarter + d] = float_of_bf16(vectors[page, h, 0, d])
                tile[1, 0, k * quarter + d] = float_of_bf16(vectors[page, h, 2, d])
        dot_rows(FLOAT32, channels, group, tile, tile, order, 0, 1, 0, q[b, h], found)
        dot_rows(FLOAT32, channels, group, tile, tile, order, 1, 1, 0, squares, found)

    @part(fastmath=FAST)
    def of_clusters(products: Any, spread: Any, mean: Any, variance: Any, n: Any, dot: Any, peaks: Any) -> None:
        """dot = scale (products + mean), and peaks = the largest logits of the choice and of the estimate until now."""
        choice, estimate = peaks[0], peaks[1]
        for c in range(len(dot)):
            x = n.scale * (products[c] + mean)
            dot[c] = x
            bonus = spread[c] * variance
            choice = larger(choice, x + bonus * n.choice_spread)
            estimate = larger(estimate, x + min(bonus, cap) * n.estimate_spread)
        peaks[0], peaks[1] = choice, estimate

    @part(fastmath=FAST)
    def exponentials(
        size: Any, dot: Any, spread: Any, variance: Any, peaks: Any, n: Any, weight: Any, chance: Any, sums: Any
    ) -> None:  # fmt: skip
        """Weights and chances of a segment's clusters, and their sums added to `sums`: of the choice and of the estimate.

        Two peaks: where clusters are wide, the choice's is so much higher that the estimate would vanish. Neither knows of the
        other's weight, for either may be the larger.
        """
        choice_peak, highest = peaks[0], peaks[1]
        chosen, estimated = np.float32(0.0), np.float32(0.0)
        for c in range(len(dot)):
            count, bonus = np.float32(size[c]), spread[c] * variance
            value = count * fast_exp(dot[c] + min(bonus, cap) * n.estimate_spread - highest)
            weight[c] = value
            estimated += value
            value = fast_exp(dot[c] + bonus * n.choice_spread - choice_peak)
            chance[c] = value
            chosen += count * value
        sums[0] += chosen
        sums[1] += estimated

    @part(fastmath=FAST)
    def small_masses(
        b: Any, h: Any, clusters: Any, mass: Any, variances: Any, normaliser: Any, lists: Any, n: Any, u: Any
    ) -> None:  # fmt: skip
        """Logs of the masses of which exponentials of some heads were cut off."""
        size, dot, log_mass, spread = u.size[b, h], u.dot[b, h], u.log_mass[b, h], u.spread[b, h]
        log_group, logits = np.float32(np.log(np.float32(group))), np.empty(group, np.float32)
        s, end = -1, 0
        for c in range(clusters):
            if c == end:
                s += 1
                next_segment = s + 1 < lists.segment_count[b]
                end = lists.segment_begin[b, s + 1] * n.per_page if next_segment else clusters
            if mass[c] < least and size[c] > 0:
                largest = np.float32(-np.inf)
                for g in range(group):
                    bonus = spread[c] * variances[s, g]
                    logits[g] = dot[g, c] + bonus * n.choice_spread - normaliser[g]
                    largest = max(largest, logits[g])
                value = np.float32(0.0)
                for g in range(group):
                    value += fast_exp(logits[g] - largest)
                log_mass[c] = largest + np.log(value) - log_group

    @part(fastmath=FAST)
    def masses(clusters: Any, size: Any, chance: Any, share: Any, log_mass: Any) -> Any:
        """Logs of the mean masses, which are left in chance[0]; whether some are too small for it."""
        mass = chance[0]
        for c in range(clusters):
            mass[c] *= share[0]
        for g in range(1, group):
            of_head = chance[g]
            for c in range(clusters):
                mass[c] += of_head[c] * share[g]
        small = np.float32(0.0)
        for c in range(clusters):
            found = fast_log(max(mass[c], least))
            log_mass[c] = np.float32(-np.inf) if size[c] == 0 else found
            small += np.float32(1.0) if mass[c] < least else np.float32(0.0)
        return small > 0

    @part(fastmath=FAST)
    def base_peak_of(of_head: Any, tokens: Any, sink: Any, scale: Any) -> Any:
        """Scales the logits of what is always attended; returns the largest, a learned sink's among them."""
        peak = sink
        for i in range(tokens):
            x = of_head[i] * scale
            of_head[i] = x
            peak = larger(peak, x)
        return peak

    @part(fastmath=FAST)
    def score(
        b: Any, h: Any, t: Any, q: Any, sinks: Any, keys: Any, host: Any, index: Any, lists: Any, n: Any, u: Any,
        scratch: Any,
    ) -> None:  # fmt: skip
        rows, chance, tile, order = scratch.rows[t], scratch.chance[t], scratch.unpacked[t], scratch.order
        squares, found, variances = scratch.squares[t], scratch.vectors[t], u.variances[b, h]
        per_page, segments, page_count = n.per_page, lists.segment_count[b], lists.page_count[b]
        segment_begin, clusters, tokens = lists.segment_begin[b], page_count * per_page, lists.base_count[b]
        size, begin, spread, dot = u.size[b, h], u.begin[b, h], u.spread[b, h], u.dot[b, h]
        slots, base_logit, base_slots = scratch.slots[t], u.base_logit[b, h], lists.base_slots[b]
        for i in range(tokens):
            slots[i] = base_slots[i]
        for i in range(TOGETHER):
            slots[tokens + i] = base_slots[tokens - 1]
        u.reads[b, h, BASE_HOST] = dots(keys, host, KEYS, slots, 0, tokens, h, q[b, h], base_logit)
        peaks, base_peak = np.empty((group, 2), np.float32), np.empty(group, np.float32)
        for g in range(group):
            base_peak[g] = base_peak_of(base_logit[g], tokens, sinks[h, g], n.scale)
            peaks[g, 0], peaks[g, 1] = base_peak[g], base_peak[g]
            for d in range(channels):
                squares[g, d] = q[b, h, g, d] * q[b, h, g, d]

        for s in range(segments):
            first = segment_begin[s]
            last = segment_begin[s + 1] if s + 1 < segments else page_count
            one, count = first * per_page, (last - first) * per_page
            end, sizes, spreads = one + count, size[one : one + count], spread[one : one + count]
            if not lists.is_shared[b, s]:
                _listed(lists.pages[b], first, last - first, per_page, h, index, rows[one:], sizes, spreads)
                dot_rows(
                    row_format, channels, group, index.key_rows, index.key_scales, rows, one, count, h, q[b, h], chance
                )  # fmt: skip
            until, begins = first * n.page_size, begin[one : one + count]
            for c in range(count):
                begins[c] = until
                until += np.int64(sizes[c])
            of_segment(b, h, q, squares, first, index, lists, tile, order, found)
            for g in range(group):
                products = u.weight[b, h, g, one:end] if lists.is_shared[b, s] else chance[g, one:end]
                variances[s, g] = np.float32(0.5) * n.scale * n.scale * found[g, 1]
                of_clusters(products, spreads, found[g, 0], variances[s, g], n, dot[g, one:end], peaks[g])

        normaliser, share, sums = np.empty(group, np.float32), np.empty(group, np.float32), np.empty(2, np.float32)
        for g in range(group):
            base = fast_exp(sinks[h, g] - base_peak[g])
            for i in range(tokens):
                base += fast_exp(base_logit[g, i] - base_peak[g])
            sums[0], sums[1] = base * fast_exp(base_peak[g] - peaks[g, 0]), base * fast_exp(base_peak[g] - peaks[g, 1])
            for s in range(segments):
                one = segment_begin[s] * per_page
                end = segment_begin[s + 1] * per_page if s + 1 < segments else clusters
                exponentials(
                    size[one:end], dot[g, one:end], spread[one:end], variances[s, g], peaks[g], n,
                    u.weight[b, h, g, one:end], chance[g, one:end], sums,
                )  # fmt: skip
            u.peak[b, h, g] = peaks[g, 1]
            u.total[b, h, g] = peaks[g, 1] + np.log(sums[1])
            normaliser[g] = peaks[g, 0] + np.log(sums[0])
            share[g] = np.float32(1.0) / (sums[0] * np.float32(group))
        if masses(clusters, size, chance, share, u.log_mass[b, h]):
            small_masses(b, h, clusters, chance[0], variances, normaliser, lists, n, u)

    return score
