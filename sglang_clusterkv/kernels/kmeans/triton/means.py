"""The second half of a pass of k-means: each centroid moves to the mean of its members."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.kernels.kmeans.triton.call import MEANS, Call, case
from sglang_clusterkv.kernels.kmeans.triton.centroids import store_centroids
from sglang_clusterkv.kernels.kmeans.triton.segments import (
    LENGTHS,
    cluster_range,
    head_pointer,
    load_rows,
    segment_range,
)


@triton.jit(do_not_specialize=LENGTHS)
def update_kernel(
    keys_ptr, layer_offsets_ptr, slot_stride, head_stride, slots_ptr, token_begin_ptr, cluster_begin_ptr,
    center_ptr, members_ptr, cluster_end_ptr, centroids_ptr, norms_ptr, tokens_of_call, clusters,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Mean of the members of MEANS clusters, relative to the segment's mean; an empty cluster keeps its centroid.

    One program reads the keys of its clusters' members once, the i-th of all of them together.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, _ = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    cluster = tl.program_id(0) * MEANS + tl.arange(0, MEANS)
    if tl.program_id(0) * MEANS >= count:
        return
    channels = tl.arange(0, DP)
    layer_ptr = head_pointer(keys_ptr, layer_offsets_ptr, n, head_stride, H)
    begin, size = cluster_range(cluster_end_ptr + n.to(tl.int64) * clusters + cluster_begin, cluster, count)
    place = (n.to(tl.int64) * tl.num_programs(2) + segment) * D
    center = tl.load(center_ptr + place + channels, mask=channels < D, other=0.0)
    members_ptr += n.to(tl.int64) * tokens_of_call + token_begin
    sums = tl.zeros((MEANS, DP), tl.float32)
    for i in range(tl.max(size)):
        live = i < size
        member = tl.load(members_ptr + begin + i, mask=live, other=0)
        slots = tl.load(slots_ptr + token_begin + member, mask=live, other=0)
        rows = load_rows(layer_ptr, slots, channels, live, slot_stride, D) - center[None, :]
        sums += tl.where(live[:, None], rows, 0.0)
    means = tl.div_rn(sums, tl.maximum(size, 1).to(tl.float32)[:, None])
    place = n.to(tl.int64) * clusters + cluster_begin + cluster
    store_centroids(centroids_ptr, norms_ptr, place, size > 0, means, channels, D)


def update(call: Call) -> None:
    """Move all centroids to their members' means."""
    segments, found = call.segments, call.found
    update_kernel[call.grid(segments.max_clusters, MEANS)](
        *call.pool, segments.read_slots, *call.ranges, found.center, found.members, found.cluster_end, call.centroids,
        call.norms, call.tokens, segments.clusters, **call.sizes, MEANS=MEANS, num_warps=4,
    )  # fmt: skip


COMPILE_CASES = [case(update_kernel, 128, {"MEANS": MEANS}, programs_per_sm=4)]
