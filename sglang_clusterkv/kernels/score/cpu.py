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

from sglang_clusterkv.kernels.ahead_cpu import ask_rows
from sglang_clusterkv.kernels.cpu_math import FAST, exp_below_one, fast_exp, fast_log, float_of_bf16, larger, part
from sglang_clusterkv.kernels.row_cpu import KEYS, pool_kernels
from sglang_clusterkv.kernels.score.products_cpu import UNPACKED, products_of
from sglang_clusterkv.kernels.vectors_cpu import TOGETHER, row_bytes
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.tier import BASE_HOST


@part(fastmath=FAST)
def _described(
    rows: Any, count: Any, h: Any, first: Any, index: Any, ends: Any, size: Any, begin: Any, spread: Any
) -> None:  # fmt: skip
    """Sizes, begins and spreads of a segment's `count` clusters, of which the first begins at `first`, from their rows."""
    of_head = np.uint64(h)
    for c in range(count):
        row = np.uint64(rows[c])
        ends[c] = index.cluster_end[row, of_head]
        spread[c] = float_of_bf16(index.spread[row, of_head])
    size[0], begin[0] = ends[0], first
    for c in range(1, count):
        size[c] = ends[c] - ends[c - 1]
        begin[c] = first + ends[c - 1]


@functools.cache
def shared_pair(channels: int, group: int, row_format: int) -> Callable[..., None]:
    """Compile the products of the clusters of one (shared segment k, kv head h) with the queries of all its requests.

    For one head_dim, group size and row format. Outputs, of each of these requests: size, begin and spread [B, H, C], and
    weight [B, H, G, C], which holds q . row until score has the weights.
    """

    products = products_of(channels, group, row_format)
    unpack, of_unpacked = products.unpack, products.of_unpacked

    @part(fastmath=FAST)
    def shared(k: Any, h: Any, t: Any, q: Any, index: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
        begin, end, per_page = lists.shared_first[k], lists.shared_first[k + 1], n.per_page
        found = scratch.logits[t]
        b, s = lists.shared_request[begin], lists.shared_ordinal[begin]
        first = lists.segment_begin[b, s]
        last = lists.segment_begin[b, s + 1] if s + 1 < lists.segment_count[b] else lists.page_count[b]
        one, clusters = first * per_page, (last - first) * per_page
        rows, where = lists.rows[b, one:], slice(one, one + clusters)
        size, starts, spread = u.size[b, h, where], u.begin[b, h, where], u.spread[b, h, where]
        _described(rows, clusters, h, first * n.page_size, index, scratch.near[t], size, starts, spread)
        for i in range(begin + 1, end):
            b = lists.shared_request[i]
            other = lists.segment_begin[b, lists.shared_ordinal[i]]
            moved, where = (other - first) * n.page_size, slice(other * per_page, other * per_page + clusters)
            sizes, begins, spreads = u.size[b, h, where], u.begin[b, h, where], u.spread[b, h, where]
            for c in range(clusters):
                sizes[c] = size[c]
            for c in range(clusters):
                begins[c] = starts[c] + moved
            for c in range(clusters):
                spreads[c] = spread[c]
        for tile in range(0, clusters, UNPACKED):
            count = min(UNPACKED, clusters - tile)
            unpack(rows, tile, count, h, t, index, scratch)
            for i in range(begin, end):
                b = lists.shared_request[i]
                one = lists.segment_begin[b, lists.shared_ordinal[i]] * per_page + tile
                of_unpacked(b, h, t, count, q, u, scratch, found)
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
    size_of_key = row_bytes(pool, channels)
    of_listed = products_of(channels, group, row_format).of_listed

    @part(fastmath=FAST)
    def of_segment(
        b: Any, h: Any, q: Any, first: Any, index: Any, lists: Any, tile: Any, found: Any
    ) -> None:  # fmt: skip
        """found[g] = (q . mean key, q squared . variance) of the segment that begins at a page of the list."""
        vectors = index.vectors
        for k in range(4):
            page = lists.pages[b, first + k]
            for d in range(quarter):
                tile[0, 0, k * quarter + d] = float_of_bf16(vectors[page, h, 0, d])
                tile[1, 0, k * quarter + d] = float_of_bf16(vectors[page, h, 2, d])
        mean_key, variance = tile[0, 0], tile[1, 0]
        for g in range(group):
            of_mean, of_variance = np.float32(0.0), np.float32(0.0)
            for d in range(channels):
                x = q[b, h, g, d]
                of_mean += x * mean_key[d]
                of_variance += x * x * variance[d]
            found[g, 0], found[g, 1] = of_mean, of_variance

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
            value = count * exp_below_one(dot[c] + min(bonus, cap) * n.estimate_spread - highest)
            weight[c] = value
            estimated += value
            value = exp_below_one(dot[c] + bonus * n.choice_spread - choice_peak)
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
        rows, chance, tile = lists.rows[b], scratch.chance[t], scratch.unpacked[t]
        found, variances = scratch.vectors[t], u.variances[b, h]
        per_page, segments, page_count = n.per_page, lists.segment_count[b], lists.page_count[b]
        segment_begin, clusters, tokens = lists.segment_begin[b], page_count * per_page, lists.base_count[b]
        size, begin, spread, dot = u.size[b, h], u.begin[b, h], u.spread[b, h], u.dot[b, h]
        slots, base_logit, base_slots = scratch.slots[t], u.base_logit[b, h], lists.base_slots[b]
        for i in range(tokens):
            slots[i] = base_slots[i]
        for i in range(TOGETHER):
            slots[tokens + i] = base_slots[tokens - 1]
        u.reads[b, h, BASE_HOST] = dots(keys, host, KEYS, slots, 0, tokens, h, q[b, h], base_logit)
        if host is None and h + 1 < q.shape[1]:  # mostly this thread's next pair
            ask_rows(keys, slots, tokens, h + 1, size_of_key)
        peaks, base_peak = np.empty((group, 2), np.float32), np.empty(group, np.float32)
        for g in range(group):
            base_peak[g] = base_peak_of(base_logit[g], tokens, sinks[h, g], n.scale)
            peaks[g, 0], peaks[g, 1] = base_peak[g], base_peak[g]

        for s in range(segments):
            first = segment_begin[s]
            last = segment_begin[s + 1] if s + 1 < segments else page_count
            one, count = first * per_page, (last - first) * per_page
            end, sizes, spreads = one + count, size[one : one + count], spread[one : one + count]
            if not lists.is_shared[b, s]:
                begins = begin[one:end]
                _described(rows[one:], count, h, first * n.page_size, index, scratch.near[t], sizes, begins, spreads)
                of_listed(b, h, t, rows, one, count, q, index, u, scratch, chance)
            of_segment(b, h, q, first, index, lists, tile, found)
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
