"""Outliers in k-means: the clusters that cost least to leave go to the farthest keys, as many as gain by it.

See `kmeans.reference.give_to_outliers`, which ranks by sorting; here programs bisect over the floats' bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.kmeans.triton.call import MEANS, ROWS, Call, case, channels_of
from sglang_clusterkv.kernels.kmeans.triton.centroids import (
    scores_of,
    scoring_constants,
    scoring_options,
    store_centroids,
)
from sglang_clusterkv.kernels.kmeans.triton.segments import (
    LENGTHS,
    cluster_range,
    head_pointer,
    load_rows,
    segment_range,
)

_RANKED = 1024  # numbers per step where the largest are searched


@triton.jit(do_not_specialize=LENGTHS)
def cost_kernel(
    cluster_begin_ptr, cluster_end_ptr, centroids_ptr, norms_ptr, cheapness_ptr, clusters,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, CENTROIDS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """How cheap each cluster is to leave: a number, not negative, that falls as `reference.costs_to_leave` rises.

    It is the float whose bits, added to those of the cost, are those of infinity. One program has ROWS clusters.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= count:
        return
    channels = tl.arange(0, DP)
    row = n.to(tl.int64) * clusters + cluster_begin
    cluster_end_ptr += row
    centroids_ptr += row * (2 * D)
    norms_ptr += row
    _, own_size = cluster_range(cluster_end_ptr, own, count)
    source = centroids_ptr + own[:, None] * (2 * D) + channels[None, :]
    mask = (own < count)[:, None] & (channels < D)[None, :]
    x_high = tl.load(source, mask=mask, other=0.0)
    x_low = tl.load(source + D, mask=mask, other=0.0)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, count, CENTROIDS):
        other = first + tl.arange(0, CENTROIDS)
        other_begin, size = cluster_range(cluster_end_ptr, other, count)
        score = scores_of(x_high, x_low, centroids_ptr, norms_ptr, other, count, channels, D, DOT)
        equal = (size[None, :] == own_size[:, None]) & (other[None, :] < own[:, None])
        larger = ((size[None, :] > own_size[:, None]) | equal) & (other < count)[None, :]
        best = tl.maximum(best, tl.max(tl.where(larger, score, float("-inf")), 1))
    norm = tl.load(norms_ptr + own, mask=own < count, other=0.0)
    cost = tl.where(own_size > 0, own_size.to(tl.float32) * tl.maximum(norm - best, 0.0), 0.0)
    cost = tl.where(cost == cost, cost, float("inf"))
    cheapness = (0x7F800000 - cost.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    tl.store(cheapness_ptr + row + own, cheapness, mask=own < count)


@triton.jit
def count_in(numbers_ptr, count, low, RANKED: tl.constexpr):
    """How many of `count` floats, not negative, have at least the bits `low`."""
    step = tl.arange(0, RANKED)
    found = tl.zeros((RANKED,), tl.int32)
    for first in range(0, count, RANKED):
        number = tl.load(numbers_ptr + first + step, mask=first + step < count, other=-1.0)
        found += (number.to(tl.int32, bitcast=True) >= low).to(tl.int32)
    return tl.sum(found)


@triton.jit(do_not_specialize=LENGTHS)
def gain_kernel(
    distance_ptr, cheapness_ptr, token_begin_ptr, cluster_begin_ptr, outlier_begin_ptr, gains_ptr, tokens_of_call, clusters,
    RANKED: tl.constexpr,
):  # fmt: skip
    """How many moves gain, at most as many as the segment may have outliers.

    As many as there are distances above some number and costs up to it: one program bisects for that number.
    """
    n, segment = tl.program_id(0), tl.program_id(1)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    _, wanted = segment_range(outlier_begin_ptr, segment)
    distance_ptr += n.to(tl.int64) * tokens_of_call + token_begin
    cheapness_ptr += n.to(tl.int64) * clusters + cluster_begin
    INFINITY: tl.constexpr = 0x7F800000
    low = wanted * 0 - 1  # here there are more distances above than costs up to it
    high = low + 1 + INFINITY
    gains = low * 0
    while high - low > 1:
        middle = low + (high - low) // 2
        above = count_in(distance_ptr, tokens, middle + 1, RANKED)
        up_to = count_in(cheapness_ptr, count, INFINITY - middle, RANKED)
        gains = tl.maximum(gains, tl.minimum(above, up_to))
        if above > up_to:
            low = middle
        else:
            high = middle
    tl.store(gains_ptr + n * tl.num_programs(1) + segment, tl.minimum(gains, wanted))


@triton.jit(do_not_specialize=LENGTHS)
def largest_kernel(
    numbers_ptr, begin_ptr, outlier_begin_ptr, gains_ptr, largest_ptr, length, outliers, RANKED: tl.constexpr,
):  # fmt: skip
    """Where a segment's largest numbers are, in ascending order, as many as gain; the earlier of equals.

    Numbers are not negative. One program bisects over the floats' bits, then lists.
    """
    n, segment = tl.program_id(0), tl.program_id(1)
    begin, count = segment_range(begin_ptr, segment)
    outlier_begin, _ = segment_range(outlier_begin_ptr, segment)
    wanted = tl.load(gains_ptr + n * tl.num_programs(1) + segment)
    if wanted == 0:
        return
    numbers_ptr += n.to(tl.int64) * length + begin
    low = wanted * 0  # at least `wanted` numbers are as large
    high = low + 0x7F800001  # above infinity
    while high - low > 1:
        middle = low + (high - low) // 2
        if count_in(numbers_ptr, count, middle, RANKED) >= wanted:
            low = middle
        else:
            high = middle
    room = wanted - count_in(numbers_ptr, count, low + 1, RANKED)  # for those that equal the last one
    target = largest_ptr + n.to(tl.int64) * outliers + outlier_begin
    step = tl.arange(0, RANKED)
    for first in range(0, count, RANKED):
        number = tl.load(numbers_ptr + first + step, mask=first + step < count, other=-1.0)
        order = number.to(tl.int32, bitcast=True)
        equal = (order == low).to(tl.int32)
        taken = ((order > low) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))).to(tl.int32)
        tl.store(target + tl.cumsum(taken, 0) - taken, (first + step).to(tl.int16), mask=taken > 0)
        target += tl.sum(taken)
        room -= tl.sum(equal)


@triton.jit(do_not_specialize=LENGTHS)
def outlier_kernel(
    keys_ptr, layer_offsets_ptr, slot_stride, head_stride, slots_ptr, token_begin_ptr, cluster_begin_ptr,
    outlier_begin_ptr, gains_ptr, center_ptr, far_ptr, moved_ptr, centroids_ptr, norms_ptr, clusters, outliers,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Put the i-th centroid that moves where the i-th far key is; one program moves MEANS of them."""
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, _ = segment_range(token_begin_ptr, segment)
    cluster_begin, _ = segment_range(cluster_begin_ptr, segment)
    outlier_begin, _ = segment_range(outlier_begin_ptr, segment)
    i = tl.program_id(0) * MEANS + tl.arange(0, MEANS)
    live = i < tl.load(gains_ptr + n * tl.num_programs(2) + segment)
    channels = tl.arange(0, DP)
    layer_ptr = head_pointer(keys_ptr, layer_offsets_ptr, n, head_stride, H)
    place = (n.to(tl.int64) * tl.num_programs(2) + segment) * D
    center = tl.load(center_ptr + place + channels, mask=channels < D, other=0.0)
    row = n.to(tl.int64) * outliers + outlier_begin + i
    far = tl.load(far_ptr + row, mask=live, other=0)
    place = n.to(tl.int64) * clusters + cluster_begin + tl.load(moved_ptr + row, mask=live, other=0)
    slots = tl.load(slots_ptr + token_begin + far, mask=live, other=0)
    keys = load_rows(layer_ptr, slots, channels, live, slot_stride, D) - center[None, :]
    store_centroids(centroids_ptr, norms_ptr, place, live, keys, channels, D)


def move_to_outliers(call: Call) -> None:
    """Move the centroids that cost least to the farthest keys."""
    segments, rows, clusters, device = call.segments, call.rows, call.segments.clusters, call.distance.device
    cheapness = torch.empty((rows, clusters), device=device)
    gains = torch.empty((rows, segments.count), dtype=torch.int32, device=device)
    far, moved = (torch.empty((rows, segments.outliers), dtype=torch.int16, device=device) for _ in range(2))
    cost_kernel[call.grid(segments.max_clusters, ROWS)](
        segments.cluster_begin, call.found.cluster_end, call.centroids, call.norms, cheapness, clusters,
        **channels_of(call.head_dim), ROWS=ROWS, **scoring_constants(call.head_dim), **scoring_options(call.head_dim),
    )  # fmt: skip
    gain_kernel[(rows, segments.count)](
        call.distance, cheapness, *call.ranges, segments.outlier_begin, gains, call.tokens, clusters,
        RANKED=_RANKED, num_warps=4,
    )  # fmt: skip
    for numbers, begin, largest in (
        (call.distance, segments.token_begin, far),
        (cheapness, segments.cluster_begin, moved),
    ):
        largest_kernel[(rows, segments.count)](
            numbers, begin, segments.outlier_begin, gains, largest, numbers.shape[1], segments.outliers,
            RANKED=_RANKED, num_warps=4,
        )  # fmt: skip
    outlier_kernel[call.grid(segments.max_outliers, MEANS)](
        *call.pool, segments.read_slots, *call.ranges, segments.outlier_begin, gains, call.found.center, far, moved,
        call.centroids, call.norms, clusters, segments.outliers, **call.sizes, MEANS=MEANS, num_warps=4,
    )  # fmt: skip


COMPILE_CASES = [
    case(
        cost_kernel,
        128,
        {"ROWS": ROWS, **scoring_constants(128)},
        **scoring_options(128),
        tensor_cores=12,
        programs_per_sm=2,
    ),
    case(gain_kernel, 128, {"RANKED": _RANKED}, programs_per_sm=8),
    case(largest_kernel, 128, {"RANKED": _RANKED}, programs_per_sm=8),
    case(outlier_kernel, 128, {"MEANS": MEANS}, programs_per_sm=8),
]
