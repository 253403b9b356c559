"""Estimate on the CPU: from the exponentials that score kept, so that only mean values are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_clusterkv.kernels.cpu_math import FAST, ROWS_AT_ONCE, add_rows, bits_of_float, float_of_bf16, njit
from sglang_clusterkv.kernels.row_cpu import decode_row
from sglang_clusterkv.kernels.threshold_cpu import BINS, threshold
from sglang_clusterkv.memory.masses import NO_MASS


@functools.cache
def estimate_kernel(channels: int, group: int, row_format: int, per_scale: int) -> Callable[..., None]:
    """Compile the estimate for one head_dim, group size and row format.

    Inputs `size`, `weight`, `peak`, `total` as score leaves them, `taken` [B, H, C] as recall leaves it. Outputs: output
    [B, H, G, D] and lse [B, H, G], as `merge.reference.Partial`; -inf where nothing is left.
    """
    quarter = channels // 4
    least = np.float32(NO_MASS)

    @njit(cache=True, fastmath=FAST, nogil=True)
    def kernel(
        words: Any, halves: Any, octets: Any, row_scales: Any, vectors: Any, pages: Any, segment_begin: Any, segment_count: Any,
        page_count: Any, per_page: Any, own_limit: Any, size: Any, taken: Any, weight: Any, peak: Any, total: Any,
        output: Any, lse: Any,
    ) -> None:  # fmt: skip
        row = np.empty(channels, np.float32)
        rows = np.zeros((ROWS_AT_ONCE, channels), np.float32)
        weights = np.empty((group, ROWS_AT_ONCE), np.float32)
        rest = np.empty(group, np.float32)
        sums = np.empty(group, np.float32)
        share = np.empty(group, np.float32)
        keys = np.empty(size.shape[2], np.uint32)
        ones = np.ones(size.shape[2], np.int32)
        left = np.empty((group, size.shape[2]), np.float32)
        bins = np.empty(BINS, np.int64)
        for b in range(size.shape[0]):
            clusters = page_count[b] * per_page
            for h in range(size.shape[1]):
                for g in range(group):
                    share[g] = np.exp(peak[b, h, g] - total[b, h, g]) / np.float32(group)
                    sums[g] = 0.0
                    for c in range(clusters):
                        count = np.float32(size[b, h, c])
                        part = np.float32(size[b, h, c] - taken[b, h, c]) / max(count, np.float32(1.0))
                        value = weight[b, h, g, c] * part
                        left[g, c] = value
                        sums[g] += value
                    for d in range(channels):
                        output[b, h, g, d] = 0.0
                border, room = np.int64(0), np.int64(1 << 30)
                if clusters > own_limit:
                    for c in range(clusters):
                        mass = np.float32(0.0)
                        for g in range(group):
                            mass += left[g, c] * share[g]
                        keys[c] = bits_of_float(np.float32(0.0) if mass < least else mass)
                    border, room = threshold(keys, ones, clusters, own_limit, bins)
                else:
                    keys[:clusters] = 1
                for s in range(segment_count[b]):
                    first = segment_begin[b, s]
                    last = segment_begin[b, s + 1] if s + 1 < segment_count[b] else page_count[b]
                    for g in range(group):
                        rest[g] = 0.0
                    waiting = 0
                    for c in range(first * per_page, last * per_page):
                        key = np.int64(keys[c])
                        if key > border or (key == border and room > 0):
                            if key == border:
                                room -= 1
                            if size[b, h, c] == taken[b, h, c]:
                                continue
                            cluster = pages[b, c // per_page] * per_page + c % per_page
                            decode_row(
                                words, halves, octets, row_scales, cluster, h, row_format, channels, per_scale,
                                rows[waiting],
                            )  # fmt: skip
                            for g in range(group):
                                weights[g, waiting] = left[g, c]
                            waiting += 1
                            if waiting == ROWS_AT_ONCE:
                                add_rows(weights, 0, rows, group, channels, output[b, h])
                                waiting = 0
                        else:
                            for g in range(group):
                                rest[g] += left[g, c]
                    for k in range(waiting, ROWS_AT_ONCE):
                        for g in range(group):
                            weights[g, k] = 0.0
                    add_rows(weights, 0, rows, group, channels, output[b, h])
                    for part in range(4):
                        page = pages[b, first + part]
                        for d in range(quarter):
                            row[part * quarter + d] = float_of_bf16(vectors[page, h, 1, d])
                    for g in range(group):
                        for d in range(channels):
                            output[b, h, g, d] += rest[g] * row[d]
                for g in range(group):
                    lse[b, h, g] = peak[b, h, g] + np.log(sums[g])
                    inverse = np.float32(1.0) / sums[g] if sums[g] > 0 else np.float32(0.0)
                    for d in range(channels):
                        output[b, h, g, d] *= inverse

    return kernel
