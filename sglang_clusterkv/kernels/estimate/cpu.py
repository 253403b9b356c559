"""Estimate on the CPU: from the exponentials that score and refine kept, so that only mean values are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import FAST, bits_of_float, dot_of_few, fast_exp, float_of_bf16, part
from sglang_clusterkv.kernels.threshold_cpu import threshold
from sglang_clusterkv.kernels.vectors_cpu import INT4, TOGETHER, add_rows, dot_rows
from sglang_clusterkv.memory.codec import CODE_LOSS
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP
from sglang_clusterkv.memory.movement import CODED_WEIGHT, RANK


@functools.cache
def estimate_pair(channels: int, group: int, row_format: int, code_bits: int) -> Callable[..., None]:
    """Compile the estimate of one (request b, kv head h) for one head_dim, group size, row format and code width.

    Inputs `size`, `spread`, `variances`, `weight`, `peak`, `total` as score leaves them, `by_code` as refine does, `taken`
    [B, H, C] and `rest` as recall does. Outputs: estimate [B, H, G, D] and estimate_lse [B, H, G], as
    `merge.reference.Partial`; -inf where nothing is left.
    """
    quarter = channels // 4
    least, cap, loss = np.float32(NO_MASS), np.float32(SPREAD_CAP), np.float32(CODE_LOSS[code_bits])
    coded = np.float32(CODED_WEIGHT)

    @part(fastmath=FAST)
    def remaining(size: Any, taken: Any, weight: Any, clusters: Any, share: Any, left: Any, mass: Any) -> None:
        """What is left of a query head's clusters; its share of their masses is added to `mass`."""
        for c in range(clusters):
            part = np.float32(size[c] - taken[c]) / max(np.float32(size[c]), np.float32(1.0))
            value = weight[c] * part
            left[c] = value
            mass[c] += value * share

    @part(fastmath=FAST)
    def exponentials(x: Any, count: Any) -> None:
        """exp in place."""
        for i in range(count):
            x[i] = fast_exp(x[i])

    @part(fastmath=FAST)
    def by_codes(b: Any, h: Any, lists: Any, n: Any, u: Any, left: Any, reach: Any, factors: Any, named: Any) -> None:
        """What is left of clusters with candidates that were not recalled, by what these weigh on average; and their reach.

        A cluster's candidates lie together, clusters in their order. factors [G, C] and named [C] are overwritten.
        """
        by_code, rest, of_cluster, number = u.by_code[b, h], u.rest[b, h], u.of_cluster[b, h], u.candidates[b, h]
        size, taken, spread, variances = u.size[b, h], u.taken[b, h], u.spread[b, h], u.variances[b, h]
        share = np.empty(group, np.float32)
        for g in range(group):
            share[g] = np.exp(u.total[b, h, g] - u.peak[b, h, g])
        found, end, segments, s, behind = 0, 0, lists.segment_count[b], -1, 0
        while end < number:
            begin, c = end, np.int64(of_cluster[end])
            end = min(begin + size[c], number)
            while of_cluster[end - 1] != c:  # the cluster of which not all are candidates
                end -= 1
            tokens = end - begin - taken[c]
            if tokens > 0:
                while c >= behind:
                    s += 1
                    behind = lists.segment_begin[b, s + 1] * n.per_page if s + 1 < segments else len(size)
                each = np.float32(size[c] - taken[c]) / np.float32(tokens)
                for g in range(group):
                    left[g, np.uint64(c)] = dot_of_few(by_code[g], rest, begin, end - begin) * each * share[g]
                    factors[g, np.uint64(found)] = loss * min(spread[np.uint64(c)] * variances[s, g], cap)
                reach[np.uint64(c)] = coded * spread[np.uint64(c)]
                named[np.uint64(found)] = c
                found += 1
        for g in range(group):
            exponentials(factors[g], found)
            for i in range(found):
                left[g, np.uint64(named[i])] *= factors[g, i]

    @part(fastmath=FAST)
    def sum_of(left: Any, clusters: Any) -> Any:
        """What is left of all clusters of a query head."""
        total = np.float32(0.0)
        for c in range(clusters):
            total += left[c]
        return total

    @part(fastmath=FAST)
    def rest_of(left: Any, has_own: Any) -> Any:
        """The sum of what is left of a segment's clusters that have no mean value of their own here."""
        total = np.float32(0.0)
        for c in range(len(left)):
            total += np.float32(0.0) if has_own[c] else left[c]
        return total

    @part(fastmath=FAST)
    def reaches(spread: Any, weight: Any, clusters: Any, reach: Any) -> None:
        """How far the values of clusters move."""
        for c in range(clusters):
            reach[c] = weight * spread[c]

    @part(fastmath=FAST)
    def width(left: Any, reach: Any) -> Any:
        """How far a segment's clusters move, by what is left of them."""
        total = np.float32(0.0)
        for c in range(len(left)):
            total += left[c] * reach[c]
        return total

    @part(fastmath=FAST)
    def move(
        q: Any, reach: Any, left: Any, pages: Any, segment_begin: Any, segments: Any, page_count: Any, h: Any, index: Any,
        n: Any, rows: Any, products: Any, weights: Any, output: Any,
    ) -> None:  # fmt: skip
        """Adds to each query head's output by how much the values of what is left move with it."""
        listed = 0
        for s in range(segments):
            first = segment_begin[s]
            last = segment_begin[s + 1] if s + 1 < segments else page_count
            one, end, behind = first * n.per_page, last * n.per_page, first + SEGMENT_VECTOR_PAGES
            count = min(last - behind, RANK)
            for g in range(group):
                share = n.scale * width(left[g, one:end], reach[one:end])
                for i in range(count):
                    weights[g, listed + i] = share
            for i in range(count):
                rows[listed + i] = pages[behind + i]
            listed += count
        if listed == 0:
            return
        for i in range(TOGETHER):
            rows[listed + i] = rows[listed - 1]
        dot_rows(INT4, channels, group, index.vectors, index.meets_scales, rows, 0, listed, h, q, products)
        for g in range(group):
            for i in range(listed):
                weights[g, i] *= products[g, i]
        add_rows(INT4, channels, group, index.adds, index.adds_scales, rows, 0, listed, h, weights, output)

    @part(fastmath=FAST)
    def estimate(b: Any, h: Any, t: Any, q: Any, index: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
        clusters = lists.page_count[b] * n.per_page
        size, taken, keys, mass = u.size[b, h], u.taken[b, h], scratch.keys[t], scratch.chance[t, 0]
        left, rows, own, pages = scratch.left[t], scratch.rows[t], scratch.own[t], lists.pages[b]
        reach = scratch.reach[t]
        output, rest, sums = u.estimate[b, h], np.empty(group, np.float32), np.empty(group, np.float32)
        mass[:clusters] = 0.0
        for g in range(group):
            share = np.exp(u.peak[b, h, g] - u.total[b, h, g]) / np.float32(group)
            remaining(size, taken, u.weight[b, h, g], clusters, share, left[g], mass)
        if n.moves:
            reaches(u.spread[b, h], n.moved, clusters, reach)
        if n.by_code:
            by_codes(b, h, lists, n, u, left, reach, own, scratch.near[t])
        for g in range(group):
            sums[g] = sum_of(left[g], clusters)
            for d in range(channels):
                output[g, d] = 0.0
        vectors, per_page = index.vectors, n.per_page
        segment_begin, segments, page_count = lists.segment_begin[b], lists.segment_count[b], lists.page_count[b]
        border, room = np.int64(0), np.int64(1 << 30)
        if clusters > n.own:
            for c in range(clusters):
                keys[c] = bits_of_float(np.float32(0.0) if mass[c] < least else mass[c])
            border, room = threshold(keys, scratch.ones, clusters, n.own, scratch.bins[t], scratch.near[t])
        else:
            keys[:clusters] = 1
        near, mean_value, listed = scratch.near[t], scratch.unpacked[t, 0, 0], 0
        for s in range(segments):
            first = segment_begin[s]
            last = segment_begin[s + 1] if s + 1 < segments else page_count
            one, count = first * per_page, (last - first) * per_page
            chosen, sizes, gone = keys[one : one + count], size[one : one + count], taken[one : one + count]
            before = listed
            for c in range(count):
                key = np.int64(chosen[c])
                tied = np.int64(key == border) & np.int64(room > 0)
                own_value = np.int64(key > border) | tied
                room -= tied
                chosen[c] = own_value
                near[np.uint64(listed)] = one + c
                listed += own_value & np.int64(sizes[c] > gone[c])
            for i in range(before, listed):
                c = np.int64(near[i])
                page = c // per_page
                rows[i] = pages[page] * per_page + c - page * per_page
            for g in range(group):
                of_head, of_own, rest[g] = left[g], own[g], rest_of(left[g, one : one + count], chosen)
                for i in range(before, listed):
                    of_own[i] = of_head[np.uint64(near[i])]
            for k in range(4):
                page = pages[first + k]
                for d in range(quarter):
                    mean_value[k * quarter + d] = float_of_bf16(vectors[page, h, 1, d])
            for g in range(group):
                for d in range(channels):
                    output[g, d] += rest[g] * mean_value[d]
        add_rows(
            row_format, channels, group, index.value_rows, index.value_scales, rows, 0, listed, h, own, output
        )  # fmt: skip
        if n.moves:
            move(
                q[b, h], reach, left, pages, segment_begin, segments, page_count, h, index, n, rows,
                scratch.chance[t], own, output,
            )  # fmt: skip
        for g in range(group):
            u.estimate_lse[b, h, g] = u.peak[b, h, g] + np.log(sums[g])
            inverse = np.float32(1.0) / sums[g] if sums[g] > 0 else np.float32(0.0)
            for d in range(channels):
                output[g, d] *= inverse

    return estimate
