"""Refine on the CPU: codes of candidate clusters lie together; each meets all query heads of the group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import (
    FAST,
    LANES,
    ROWS_AHEAD,
    bits_of_float,
    code_level,
    dot_group,
    fast_exp,
    float_of_bf16,
    njit,
    prefetch_row,
    unpack_codes,
)
from sglang_clusterkv.kernels.threshold_cpu import BINS, threshold
from sglang_clusterkv.memory.codec import INNER_LEVEL, OUTER_LEVEL
from sglang_clusterkv.memory.masses import NO_MASS

_INNER, _OUTER = np.float32(INNER_LEVEL), np.float32(OUTER_LEVEL)


@functools.cache
def value_kernel(channels: int, group: int, code_bits: int) -> Callable[..., None]:
    """Compile the candidates' scores for one head_dim, group size and code width.

    Outputs, for the k-th candidate of (b, h), candidates in order of cluster: value [B, H, K] (mean over the group of
    exp(logit - total), 0 below `NO_MASS`), place [B, H, K] (position in the request's list of recallable tokens),
    of_cluster [B, H, K]. `codes` is uint16 [S, H, D/8] for two bits, uint8 for one.
    """
    eighth = channels // 8
    code_bytes = channels * code_bits // 8
    mean, least = np.float32(1.0 / group), np.float32(NO_MASS)

    @njit(cache=True, fastmath=FAST, nogil=True)
    def kernel(
        rotated: Any, codes: Any, code_scales: Any, members: Any, pages: Any, page_count: Any, page_size: Any,
        per_page: Any, segment_begin: Any, segment_count: Any, scale: Any, dot: Any, begin: Any, taken: Any, total: Any,
        value: Any, place: Any, of_cluster: Any,
    ) -> None:  # fmt: skip
        row = np.empty(channels, np.float32)
        dots = np.empty(group, np.float32)
        slots = np.empty(value.shape[2], np.int64)
        logits = np.empty((group, value.shape[2]), np.float32)
        for b in range(rotated.shape[0]):
            for h in range(rotated.shape[1]):
                count = 0
                for s in range(segment_count[b]):
                    first = segment_begin[b, s]
                    last = segment_begin[b, s + 1] if s + 1 < segment_count[b] else page_count[b]
                    for c in range(first * per_page, last * per_page):
                        for r in range(taken[b, h, c]):
                            entry = begin[b, h, c] + r
                            slots[count] = pages[b, entry // page_size] * page_size + entry % page_size
                            of_cluster[b, h, count] = c
                            place[b, h, count] = first * page_size
                            count += 1
                for k in range(count):
                    slot, c = slots[k], of_cluster[b, h, k]
                    ahead = slots[min(k + 2 * ROWS_AHEAD, count - 1)]
                    prefetch_row(codes, ahead, h, code_bytes)
                    prefetch_row(code_scales, ahead, h, 1)
                    prefetch_row(members, ahead, h, 1)
                    for j in range(8):
                        if eighth % LANES == 0:
                            for i in range(0, eighth, LANES):
                                unpack_codes(codes, slot, h, i, j * code_bits, _INNER, _OUTER, row, j * eighth + i)
                        else:
                            for i in range(eighth):
                                row[j * eighth + i] = code_level(codes[slot, h, i], j * code_bits, _INNER, _OUTER)
                    dot_group(rotated[b, h], row, group, channels, dots)
                    factor = scale * float_of_bf16(code_scales[slot, h])
                    for g in range(group):
                        logits[g, k] = dot[b, h, g, c] + factor * dots[g] - total[b, h, g]
                    place[b, h, k] += members[slot, h]
                for k in range(count):
                    value[b, h, k] = 0.0
                for g in range(group):
                    for k in range(count):
                        value[b, h, k] += mean * fast_exp(logits[g, k])
                for k in range(count):
                    value[b, h, k] = np.float32(0.0) if value[b, h, k] < least else value[b, h, k]

    return kernel


@njit(cache=True, nogil=True)
def recall_kernel(
    value: Any, place: Any, of_cluster: Any, candidates: Any, pages: Any, page_size: Any, budget: Any, taken: Any,
    slots: Any, counts: Any,
) -> None:  # fmt: skip
    """Recall the `budget` best candidates (ties: the lower place).

    taken [B, H, C] int32 is overwritten by the tokens recalled of each cluster; slots [B, H, budget] int64 and counts
    [B, H] int32 list them.
    """
    bins = np.empty(BINS, np.int64)
    keys = np.empty(value.shape[2], np.uint32)
    tied = np.empty(value.shape[2], np.uint32)
    ones = np.ones(value.shape[2], np.int32)
    for b in range(value.shape[0]):
        for h in range(value.shape[1]):
            number = candidates[b, h]
            for k in range(number):
                keys[k] = bits_of_float(value[b, h, k])
            border, room = threshold(keys, ones, number, budget, bins)
            ties = 0
            for k in range(number):
                if np.int64(keys[k]) == border:
                    tied[ties] = np.uint32(0xFFFFFFFF) - np.uint32(place[b, h, k])
                    ties += 1
            lowest = 0
            if ties > room:
                lowest, _ = threshold(tied, ones, ties, room, bins)
            taken[b, h, :] = 0
            count = 0
            for k in range(number):
                key = np.int64(keys[k])
                if key > border or (key == border and 0xFFFFFFFF - place[b, h, k] >= lowest):
                    at = np.int64(place[b, h, k])
                    slots[b, h, count] = pages[b, at // page_size] * page_size + at % page_size
                    taken[b, h, of_cluster[b, h, k]] += 1
                    count += 1
            counts[b, h] = count


@njit(cache=True, nogil=True)
def recall_all_kernel(
    members: Any, pages: Any, page_count: Any, page_size: Any, per_page: Any, segment_begin: Any, segment_count: Any,
    begin: Any, taken: Any, slots: Any, counts: Any,
) -> None:  # fmt: skip
    """Recall every candidate: whole clusters, the last one trimmed; outputs as `recall_kernel`."""
    for b in range(taken.shape[0]):
        for h in range(taken.shape[1]):
            count = 0
            for s in range(segment_count[b]):
                first = segment_begin[b, s]
                last = segment_begin[b, s + 1] if s + 1 < segment_count[b] else page_count[b]
                for c in range(first * per_page, last * per_page):
                    for r in range(taken[b, h, c]):
                        entry = begin[b, h, c] + r
                        listed = pages[b, entry // page_size] * page_size + entry % page_size
                        at = first * page_size + np.int64(members[listed, h])
                        slots[b, h, count] = pages[b, at // page_size] * page_size + at % page_size
                        count += 1
            counts[b, h] = count
