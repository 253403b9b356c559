"""Refine on the CPU: codes of candidate clusters lie together; each meets all query heads of the group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import FAST, bits_of_float, fast_exp, float_of_bf16, part
from sglang_clusterkv.kernels.threshold_cpu import threshold
from sglang_clusterkv.kernels.vectors_cpu import CODES_1, CODES_2, TOGETHER, dot_rows
from sglang_clusterkv.memory.masses import MOST_MASS, NO_MASS


@functools.cache
def rotate_pair(channels: int, group: int) -> Callable[..., None]:
    """Compile the rotation of one (request, kv head)'s queries (memory/rotation.py): q [B, H, G, D] -> rotated, likewise."""
    block = channels & -channels

    @part(fastmath=FAST)
    def rotate(b: Any, h: Any, q: Any, signs: Any, rotated: Any) -> None:
        for g in range(group):
            row = rotated[b, h, g]
            for d in range(channels):
                row[d] = q[b, h, g, d] * signs[d]  # with 1 / sqrt(block)
            width = 1
            while width < block:
                for first in range(0, channels, 2 * width):
                    for d in range(first, first + width):
                        x, y = row[d], row[d + width]
                        row[d] = x + y
                        row[d + width] = x - y
                width *= 2

    return rotate


@functools.cache
def value_pair(channels: int, group: int, code_bits: int) -> Callable[..., None]:
    """Compile the candidates' scores of one (request b, kv head h) for one head_dim, group size and code width.

    Outputs, for the k-th candidate, candidates in order of cluster: value [B, H, K] (mean over the group of
    exp(logit - total), 0 below `NO_MASS`), place [B, H, K] (position in the request's list of recallable tokens),
    of_cluster [B, H, K]; and by_code [B, H, G, K], exp(logit - total), `MOST_MASS` at most.
    """
    row_format = CODES_2 if code_bits == 2 else CODES_1
    mean, least, most = np.float32(1.0 / group), np.float32(NO_MASS), np.float32(MOST_MASS)

    @part(fastmath=FAST)
    def listed(b: Any, h: Any, lists: Any, n: Any, u: Any, slots: Any) -> Any:
        """Slots of the candidates' codes; place is where their segment begins, for now."""
        size, begin, taken, place, of_cluster = (
            u.size[b, h],
            u.begin[b, h],
            u.taken[b, h],
            u.place[b, h],
            u.of_cluster[b, h],
        )
        pages, page_size, per_page = lists.pages[b], n.page_size, n.per_page
        segment_begin, segments, page_count = lists.segment_begin[b], lists.segment_count[b], lists.page_count[b]
        count = 0
        for s in range(segments):
            first = segment_begin[s]
            last = segment_begin[s + 1] if s + 1 < segments else page_count
            for c in range(first * per_page, last * per_page):
                if taken[c] > 0 and size[c] > 0:
                    entry = np.int64(begin[c])
                    page = entry // page_size
                    offset = entry - page * page_size
                    for _ in range(taken[c]):
                        slots[count] = pages[page] * page_size + offset
                        of_cluster[count] = c
                        place[count] = first * page_size
                        count += 1
                        offset += 1
                        if offset == page_size:
                            page += 1
                            offset = 0
        return count

    @part(fastmath=FAST)
    def value_of(
        b: Any, h: Any, t: Any, rotated: Any, index: Any, lists: Any, n: Any, u: Any, scratch: Any
    ) -> None:  # fmt: skip
        slots, by_code, factors = scratch.slots[t], u.by_code[b, h], scratch.factors[t]
        count = listed(b, h, lists, n, u, slots)
        for i in range(TOGETHER):
            slots[count + i] = slots[max(count - 1, 0)]
        dot_rows(
            row_format, channels, group, index.codes, index.code_scales, slots, 0, count, h, rotated[b, h], by_code
        )  # fmt: skip
        value, place, of_cluster = u.value[b, h], u.place[b, h], u.of_cluster[b, h]
        code_scales, members = index.code_scales, index.members
        for k in range(count):
            slot = np.uint64(slots[k])
            factors[k] = n.scale * float_of_bf16(code_scales[slot, np.uint64(h)])
            place[k] += members[slot, np.uint64(h)]
            value[k] = 0.0
        for g in range(group):
            of_head, dot, total = by_code[g], u.dot[b, h, g], u.total[b, h, g]
            for k in range(count):
                of_head[k] = dot[np.uint64(of_cluster[k])] + factors[k] * of_head[k] - total
            for k in range(count):
                mass = fast_exp(of_head[k])
                value[k] += mean * mass
                of_head[k] = min(mass, most)
        for k in range(count):
            value[k] = np.float32(0.0) if value[k] < least else value[k]

    return value_of


@part
def recall_pair(b: Any, h: Any, t: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
    """Recall the best candidates of one (request, kv head), `budget` of them (ties: the lower place).

    taken [B, H, C] is overwritten by the tokens recalled of each cluster; recalled [B, H, R] and recalled_count [B, H] list
    them. rest [B, H, K]: 1 for a candidate that was not recalled, 0 for the others.
    """
    keys, tied, ones, value, place = scratch.keys[t], scratch.tied[t], scratch.ones, u.value[b, h], u.place[b, h]
    rest = u.rest[b, h]
    taken, of_cluster, recalled, pages = u.taken[b, h], u.of_cluster[b, h], u.recalled[b, h], lists.pages[b]
    number = u.candidates[b, h]
    for k in range(number):
        keys[k] = bits_of_float(value[k])
    border, room = threshold(keys, ones, number, n.budget, scratch.bins[t], scratch.near[t])
    ties = 0
    for k in range(number):
        if np.int64(keys[k]) == border:
            tied[ties] = np.uint32(0xFFFFFFFF) - np.uint32(place[k])
            ties += 1
    lowest = 0
    if ties > room:
        lowest, _ = threshold(tied, ones, ties, room, scratch.bins[t], scratch.near[t])
    taken[:] = 0
    count = 0
    for k in range(number):
        key = np.int64(keys[k])
        rest[k] = 1.0
        if key > border or (key == border and 0xFFFFFFFF - place[k] >= lowest):
            at = np.int64(place[k])
            page = at // n.page_size
            recalled[count] = pages[page] * n.page_size + at - page * n.page_size
            taken[of_cluster[k]] += 1
            rest[k] = 0.0
            count += 1
    u.recalled_count[b, h] = count


@part
def recall_all_pair(b: Any, h: Any, index: Any, lists: Any, n: Any, u: Any) -> None:
    """Recall every candidate: whole clusters, the last one trimmed; outputs as `recall_pair`."""
    taken, pages, page_size = u.taken[b, h], lists.pages[b], n.page_size
    begin, recalled, members = u.begin[b, h], u.recalled[b, h], index.members
    segment_begin, segments, page_count = lists.segment_begin[b], lists.segment_count[b], lists.page_count[b]
    count = 0
    for s in range(segments):
        first = segment_begin[s]
        last = segment_begin[s + 1] if s + 1 < segments else page_count
        for c in range(first * n.per_page, last * n.per_page):
            for r in range(taken[c]):
                entry = begin[c] + r
                listed = pages[entry // page_size] * page_size + entry % page_size
                at = first * page_size + np.int64(members[listed, h])
                recalled[count] = pages[at // page_size] * page_size + at % page_size
                count += 1
    u.recalled_count[b, h] = count
