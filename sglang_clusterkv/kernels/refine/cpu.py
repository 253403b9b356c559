"""Refine on the CPU: codes of candidate clusters lie together; each meets all query heads of the group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.ahead_cpu import ask
from sglang_clusterkv.kernels.codes_cpu import dot_codes, serves, split_rotated
from sglang_clusterkv.kernels.cpu_math import FAST, bits_of_float, fast_exp, float_of_bf16, part
from sglang_clusterkv.kernels.levels_cpu import BLOCK
from sglang_clusterkv.kernels.threshold_cpu import threshold
from sglang_clusterkv.kernels.vectors_cpu import CODES_1, CODES_2, dot_rows
from sglang_clusterkv.memory.masses import MOST_MASS, NO_MASS

_TILE = 128  # candidates that go from their codes to their masses together


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


@part(fastmath=FAST)
def list_pair(b: Any, h: Any, t: Any, index: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
    """List the candidates of one (request b, kv head h), in order of cluster, and ask for what `value_pair` reads of them.

    entry [B, H, K] is the slot of a candidate's code, of_cluster [B, H, K] its cluster, and place [B, H, K] where its segment
    begins in the request's list of recallable tokens, until `value_pair` adds the rest.
    """
    size, begin, taken = u.size[b, h], u.begin[b, h], u.taken[b, h]
    entry, place, of_cluster = u.entry[b, h], u.place[b, h], u.of_cluster[b, h]
    pages, page_size, per_page = lists.pages[b], n.page_size, n.per_page
    segment_begin, segments, page_count = lists.segment_begin[b], lists.segment_count[b], lists.page_count[b]
    chosen = scratch.near[t]
    code_bytes, heads = index.codes.shape[2], index.codes.shape[1]
    clusters = 0
    for c in range(page_count * per_page):
        chosen[np.uint64(clusters)] = c
        clusters += np.int64(taken[c] > 0) & np.int64(size[c] > 0)
    count, s, behind, base = 0, -1, 0, 0
    for i in range(clusters):
        c = np.int64(chosen[i])
        while c >= behind:
            s += 1
            base = segment_begin[s] * page_size
            behind = (segment_begin[s + 1] if s + 1 < segments else page_count) * per_page
        first, left = np.int64(begin[c]), np.int64(taken[c])
        page = first // page_size
        offset = first - page * page_size
        while left > 0:
            run, slot = min(left, page_size - offset), pages[page] * page_size + offset
            ask(index.codes, slot, h, ((run - 1) * heads + 1) * code_bytes)
            ask(index.code_scales, slot, h, ((run - 1) * heads + 1) * 2)
            ask(index.members, slot, h, ((run - 1) * heads + 1) * 2)
            for k in range(run):
                at = np.uint64(count + k)
                entry[at], of_cluster[at], place[at] = slot + k, c, base
            count += run
            left -= run
            page += 1
            offset = 0
    last = entry[max(count - 1, 0)]
    for k in range(BLOCK):
        entry[count + k] = last


@functools.cache
def value_pair(channels: int, group: int, code_bits: int) -> Callable[..., None]:
    """Compile the candidates' scores of one (request b, kv head h) for one head_dim, group size and code width.

    Outputs, for the k-th candidate that `list_pair` listed: value [B, H, K] (the group's largest exp(logit - total), 0
    below `NO_MASS`), place [B, H, K] (position in the request's list of recallable tokens); and by_code [B, H, G, K],
    exp(logit - total), `MOST_MASS` at most.
    """
    row_format = CODES_2 if code_bits == 2 else CODES_1
    least, most = np.float32(NO_MASS), np.float32(MOST_MASS)
    split, dots = (
        _in_integers(channels, group) if serves(code_bits, channels) else _in_floats(channels, group, row_format)
    )

    @part(fastmath=FAST)
    def scaled(h: Any, entry: Any, index: Any, n: Any, factors: Any, place: Any, value: Any) -> None:
        """Factors of candidates' products; their places are completed."""
        code_scales, members, of_head = index.code_scales, index.members, np.uint64(h)
        for k in range(len(entry)):
            slot = np.uint64(entry[k])
            factors[k] = n.scale * float_of_bf16(code_scales[slot, of_head])
            place[k] += members[slot, of_head]
            value[k] = 0.0

    @part(fastmath=FAST)
    def masses(of_head: Any, dot: Any, of_cluster: Any, factors: Any, total: Any, value: Any) -> None:
        """Products to masses of a query head; values become these where they are larger."""
        for k in range(len(of_head)):
            of_head[k] = dot[np.uint64(of_cluster[k])] + factors[k] * of_head[k] - total
        for k in range(len(of_head)):
            mass = fast_exp(of_head[k])
            value[k] = max(value[k], mass)
            of_head[k] = min(mass, most)

    @part(fastmath=FAST)
    def value_of(
        b: Any, h: Any, t: Any, rotated: Any, index: Any, lists: Any, n: Any, u: Any, scratch: Any
    ) -> None:  # fmt: skip
        entry, by_code, factors, count = (
            u.entry[b, h],
            u.by_code[b, h],
            scratch.factors[t],
            np.int64(u.candidates[b, h]),
        )
        value, place, of_cluster = u.value[b, h], u.place[b, h], u.of_cluster[b, h]
        split(b, h, t, rotated, scratch)
        for begin in range(0, count, _TILE):
            some = min(_TILE, count - begin)
            dots(b, h, t, begin, some, rotated, entry, index, scratch, by_code)
            tile = slice(begin, begin + some)
            of_tile, clusters = value[tile], of_cluster[tile]
            scaled(h, entry[tile], index, n, factors, place[tile], of_tile)
            for g in range(group):
                masses(by_code[g, tile], u.dot[b, h, g], clusters, factors, u.total[b, h, g], of_tile)
            for k in range(some):
                of_tile[k] = np.float32(0.0) if of_tile[k] < least else of_tile[k]

    return value_of


def _in_integers(channels: int, group: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """What comes before a pair's products with codes, and these."""
    splitting = split_rotated(channels, group)

    @part
    def split(b: Any, h: Any, t: Any, rotated: Any, scratch: Any) -> None:
        splitting(
            rotated[b, h], scratch.code_digits[t], scratch.code_start[t], scratch.code_unit[t], scratch.ordered[t]
        )  # fmt: skip

    @part
    def dots(
        b: Any, h: Any, t: Any, begin: Any, count: Any, rotated: Any, entry: Any, index: Any, scratch: Any, out: Any
    ) -> None:  # fmt: skip
        dot_codes(
            channels, group, index.codes, entry, begin, count, h, scratch.code_digits[t], scratch.code_start[t],
            scratch.code_unit[t], out,
        )  # fmt: skip

    return split, dots


def _in_floats(channels: int, group: int, row_format: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Likewise."""

    @part
    def split(b: Any, h: Any, t: Any, rotated: Any, scratch: Any) -> None:
        pass

    @part(fastmath=FAST)
    def dots(
        b: Any, h: Any, t: Any, begin: Any, count: Any, rotated: Any, entry: Any, index: Any, scratch: Any, out: Any
    ) -> None:  # fmt: skip
        dot_rows(
            row_format, channels, group, index.codes, index.code_scales, entry, begin, count, h, rotated[b, h], out
        )  # fmt: skip

    return split, dots


@part
def recall_pair(b: Any, h: Any, t: Any, lists: Any, n: Any, u: Any, scratch: Any) -> None:
    """Recall the best candidates of one (request, kv head), `budget` of them (ties: the lower place).

    taken [B, H, C] is overwritten by the tokens recalled of each cluster; recalled [B, H, R] and recalled_count [B, H] list
    them. rest [B, H, K]: 1 for a candidate that was not recalled, 0 for the others.
    """
    keys, tied, ones, value, place = scratch.keys[t], scratch.tied[t], scratch.ones, u.value[b, h], u.place[b, h]
    rest = u.rest[b, h]
    taken, of_cluster, recalled, pages = u.taken[b, h], u.of_cluster[b, h], u.recalled[b, h], lists.pages[b]
    number, near = np.int64(u.candidates[b, h]), scratch.near[t]
    for k in range(number):
        keys[k] = bits_of_float(value[k])
    border, room = threshold(keys, ones, number, n.budget, scratch.bins[t], near)
    ties = 0
    for k in range(number):
        if np.int64(keys[k]) == border:
            tied[ties] = np.uint32(0xFFFFFFFF) - np.uint32(place[k])
            ties += 1
    lowest = 0
    if ties > room:
        lowest, _ = threshold(tied, ones, ties, room, scratch.bins[t], near)
    taken[:] = 0
    count = 0
    for k in range(number):
        key = np.int64(keys[k])
        chosen = (key > border) | ((key == border) & (0xFFFFFFFF - np.int64(place[k]) >= lowest))
        near[np.uint64(count)] = k
        rest[k] = np.float32(0.0) if chosen else np.float32(1.0)
        count += np.int64(chosen)
    for i in range(count):
        k = np.uint64(near[i])
        taken[np.uint64(of_cluster[k])] += 1
        at = np.int64(place[k])
        page = at // n.page_size
        recalled[i] = pages[page] * n.page_size + at - page * n.page_size
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
