"""The first half of a pass of k-means: the cluster of each key."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.kmeans.triton.call import ROWS, Call, case
from sglang_clusterkv.kernels.kmeans.triton.centroids import scores_of, scoring_constants, scoring_options
from sglang_clusterkv.kernels.kmeans.triton.segments import LENGTHS, head_pointer, load_rows, segment_range


@triton.jit(do_not_specialize=LENGTHS)
def assign_kernel(
    keys_ptr, layer_offsets_ptr, slot_stride, head_stride, slots_ptr, token_begin_ptr, cluster_begin_ptr,
    center_ptr, centroids_ptr, norms_ptr, labels_ptr, distance_ptr, tokens_of_call, clusters,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, CENTROIDS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Label of each key: the centroid with the largest 2 x.c - |c|^2, the lower of equals; and their squared distance.

    One program reads ROWS keys of one head once and all centroids of the segment's head. A distance that is not a number
    counts as none.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tokens:
        return
    live = position < tokens
    channels = tl.arange(0, DP)
    layer_ptr = head_pointer(keys_ptr, layer_offsets_ptr, n, head_stride, H)
    slots = tl.load(slots_ptr + token_begin + position, mask=live, other=0)
    place = (n.to(tl.int64) * tl.num_programs(2) + segment) * D
    center = tl.load(center_ptr + place + channels, mask=channels < D, other=0.0)
    x = load_rows(layer_ptr, slots, channels, live, slot_stride, D) - center[None, :]
    x_high = x.to(tl.bfloat16)
    x_low = (x - x_high.to(tl.float32)).to(tl.bfloat16)

    centroids_ptr += (n.to(tl.int64) * clusters + cluster_begin) * (2 * D)
    norms_ptr += n.to(tl.int64) * clusters + cluster_begin
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    label = tl.zeros((ROWS,), tl.int32)  # also of NaN keys, whose scores count as -inf: a label is an address
    for first in range(0, count, CENTROIDS):
        cluster = first + tl.arange(0, CENTROIDS)
        score = scores_of(x_high, x_low, centroids_ptr, norms_ptr, cluster, count, channels, D, DOT)
        score = tl.where(score == score, score, float("-inf"))
        largest, index = tl.max(score, 1, return_indices=True)
        label = tl.where(largest > best, first + index, label)
        best = tl.maximum(largest, best)
    row = n.to(tl.int64) * tokens_of_call + token_begin + position
    tl.store(labels_ptr + row, label.to(tl.int16), mask=live)
    distance = tl.maximum(tl.sum(x * x, 1) - best, 0.0)
    tl.store(distance_ptr + row, tl.where((distance == distance) & (best > float("-inf")), distance, 0.0), mask=live)


def assign(call: Call) -> None:
    """Label all keys, and note how far each is from its centroid."""
    segments, found = call.segments, call.found
    assign_kernel[call.grid(segments.max_tokens, ROWS)](
        *call.pool, segments.read_slots, *call.ranges, found.center, call.centroids, call.norms, found.labels, call.distance,
        call.tokens, segments.clusters,
        **call.sizes, ROWS=ROWS, **scoring_constants(call.head_dim), **scoring_options(call.head_dim),
    )  # fmt: skip


def _case(head_dim: int, **holds: Any) -> CompileCase:
    tiles = {"ROWS": ROWS, **scoring_constants(head_dim)}
    return case(assign_kernel, head_dim, tiles, **scoring_options(head_dim), tensor_cores=12, **holds)


COMPILE_CASES = [
    _case(64, async_loads_128=8, programs_per_sm=2),
    _case(128, async_loads_128=16, programs_per_sm=2),
    _case(256, async_loads_128=8),
    _case(128, pool="e4m3", async_loads_128=16, programs_per_sm=2),
]
