"""The start of k-means: the segment's mean key, and the first centroids."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.kernels.kmeans.triton.call import MEANS, ROWS, Call, case
from sglang_clusterkv.kernels.kmeans.triton.centroids import store_centroids
from sglang_clusterkv.kernels.kmeans.triton.segments import LENGTHS, head_pointer, load_rows, segment_range


@triton.jit
def center_kernel(
    keys_ptr, layer_offsets_ptr, slot_stride, head_stride, slots_ptr, token_begin_ptr, center_ptr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Mean key of a segment's head; one program reads all its keys once."""
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    layer_ptr = head_pointer(keys_ptr, layer_offsets_ptr, n, head_stride, H)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, DP)
    sums = tl.zeros((ROWS, DP), tl.float32)
    for first in range(0, tokens, ROWS):
        live = first + rows < tokens
        slots = tl.load(slots_ptr + token_begin + first + rows, mask=live, other=0)
        sums += load_rows(layer_ptr, slots, channels, live, slot_stride, D)
    place = (n.to(tl.int64) * tl.num_programs(2) + segment) * D
    tl.store(center_ptr + place + channels, tl.sum(sums, 0) / tokens, mask=channels < D)


@triton.jit(do_not_specialize=LENGTHS)
def start_kernel(
    keys_ptr, layer_offsets_ptr, slot_stride, head_stride, slots_ptr, token_begin_ptr, cluster_begin_ptr,
    center_ptr, centroids_ptr, norms_ptr, clusters,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """The evenly strided keys, relative to their mean, are the first centroids: key floor(j tokens / count) is the j-th."""
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    cluster = tl.program_id(0) * MEANS + tl.arange(0, MEANS)
    live = cluster < count
    channels = tl.arange(0, DP)
    layer_ptr = head_pointer(keys_ptr, layer_offsets_ptr, n, head_stride, H)
    place = (n.to(tl.int64) * tl.num_programs(2) + segment) * D
    center = tl.load(center_ptr + place + channels, mask=channels < D, other=0.0)
    # At most 32,767 tokens, so the product fits 32 bits.
    slots = tl.load(slots_ptr + token_begin + cluster * tokens // count, mask=live, other=0)
    rows = load_rows(layer_ptr, slots, channels, live, slot_stride, D) - center[None, :]
    store_centroids(
        centroids_ptr, norms_ptr, n.to(tl.int64) * clusters + cluster_begin + cluster, live, rows, channels, D
    )


def place_first(call: Call) -> None:
    """Find each segment's mean key and place its first centroids."""
    segments, center = call.segments, call.found.center
    center_kernel[call.grid(1, 1)](
        *call.pool, segments.read_slots, segments.token_begin, center, **call.sizes, ROWS=ROWS, num_warps=4
    )
    start_kernel[call.grid(segments.max_clusters, MEANS)](
        *call.pool, segments.read_slots, *call.ranges, center, call.centroids, call.norms, segments.clusters,
        **call.sizes, MEANS=MEANS, num_warps=4,
    )  # fmt: skip


COMPILE_CASES = [
    case(center_kernel, 128, {"ROWS": ROWS}, programs_per_sm=2),
    case(start_kernel, 128, {"MEANS": MEANS}, programs_per_sm=8),
]
