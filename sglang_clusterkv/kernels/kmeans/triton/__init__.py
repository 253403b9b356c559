"""k-means in Triton: the keys of whole segments, of every layer and kv head, where they lie in the pool.

One launch of a kernel covers all layers, kv heads and segments of a call: its grid is (tile, layer * H + head, segment),
and what a segment is shorter than the longest are programs that return at once. Lengths are runtime values, so that a
prompt's length compiles nothing. Sums run in the order of the member lists, which ascend: no atomics, the same clusters
for the same segment in every batch.

L = layers, H = kv heads, N = L * H, S = segments of the call, T = their tokens, C = their clusters, D = head_dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.kmeans.reference import outlier_count

_ROWS = 64  # keys per program where a tile of keys is read
_MEANS = 16  # clusters per program where members are summed
_LISTS = 128  # clusters per program where members are listed
_SCANNED = 32  # labels per step there
_RANKED = 1024  # numbers per step where the largest are searched
# These differ from call to call: no variant for 1 and multiples of 16.
LENGTHS = ("tokens_of_call", "clusters", "outliers", "length", "tiles")
_DOT = tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16  # the interpreter multiplies the bits of bf16


class Pool(NamedTuple):
    """Keys or values of all layers, addressed from the first layer's buffer.

    Every layer's buffer has the strides of the first, and lies a whole number of 16 bytes from it.
    """

    first: torch.Tensor  # [slots, H, D], fp32, fp16 or bf16; channels are contiguous
    layer_offsets: torch.Tensor  # int64 [L], elements from the first layer's buffer to each


class Segments(NamedTuple):
    """The segments of one call; segment s has the tokens token_begin[s] to token_begin[s + 1] of `slots`."""

    slots: torch.Tensor  # int64 [T]
    token_begin: torch.Tensor  # int32 [S + 1]
    cluster_begin: torch.Tensor  # int32 [S + 1]
    outlier_begin: torch.Tensor  # int32 [S + 1]
    max_tokens: int
    max_clusters: int
    max_outliers: int
    clusters: int  # C
    outliers: int

    @property
    def count(self) -> int:
        """S."""
        return self.token_begin.numel() - 1


class Clustering(NamedTuple):
    """What k-means finds; scratch of a call."""

    center: torch.Tensor  # fp32 [N, S, D], mean key
    labels: torch.Tensor  # int16 [N, T], cluster in its segment
    members: torch.Tensor  # int16 [N, T], offsets in the segment, sorted by cluster, ascending inside
    cluster_end: torch.Tensor  # int32 [N, C], end of each cluster in its segment's members


def pool_of(buffers: list[torch.Tensor]) -> Pool:
    """Address all layers' buffers ([slots, H, D] each) from the first; costs a copy to the device: keep it."""
    first = buffers[0]
    item = first.element_size()
    offsets = [buffer.data_ptr() - first.data_ptr() for buffer in buffers]
    assert all(offset % 16 == 0 for offset in offsets), (
        f"layers' buffers are not 16-byte aligned to each other: {offsets}"
    )
    strides = {buffer.stride() for buffer in buffers}
    assert len(strides) == 1 and first.stride(2) == 1, f"layers' buffers have strides {sorted(strides)}"
    return Pool(first, torch.tensor([offset // item for offset in offsets], dtype=torch.int64).to(first.device))


def segments_of(slots: list[torch.Tensor], tokens_per_cluster: int, outlier_share: float = 0.0) -> Segments:
    """Put segments together for one call; does not wait for the device.

    Args:
        slots: int64 [M] per segment, in sequence order.
        tokens_per_cluster: on average; a segment of M tokens has M // tokens_per_cluster clusters.
        outlier_share: of them, given to outliers.
    """
    tokens = [segment.numel() for segment in slots]
    clusters = [count // tokens_per_cluster for count in tokens]
    assert min(clusters) > 0, f"a segment of {min(tokens)} tokens has no cluster"
    outliers = [outlier_count(count, outlier_share) for count in clusters]
    # Rows of whole 16 bytes: Triton compiles kernels anew for a pointer that is aligned otherwise.
    unused = [0] * (-(len(slots) + 1) % 4)
    lengths = torch.tensor([[0, *numbers, *unused] for numbers in (tokens, clusters, outliers)], dtype=torch.int32)
    begins = lengths.cumsum(1, dtype=torch.int32)
    device = slots[0].device
    if device.type != "cpu":
        begins = begins.pin_memory().to(device, non_blocking=True)
    longest, sums = (max(tokens), max(clusters), max(outliers)), (sum(clusters), sum(outliers))
    return Segments(torch.cat(slots), *begins[:, : len(slots) + 1].unbind(), *longest, *sums)


@triton.jit
def segment_range(begin_ptr, segment):
    """Begin and length of a segment in its call, int64 and int32."""
    begin = tl.load(begin_ptr + segment)
    return begin.to(tl.int64), tl.load(begin_ptr + segment + 1) - begin


@triton.jit
def load_rows(layer_ptr, slots, channels, row_mask, slot_stride, D: tl.constexpr):
    """Rows of one head at these slots, as fp32 [rows, channels]; zero outside of the mask."""
    mask = row_mask[:, None] & (channels < D)[None, :]
    return tl.load(layer_ptr + slots[:, None] * slot_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def head_pointer(first_ptr, layer_offsets_ptr, n, head_stride, H: tl.constexpr):
    """Where the rows of layer n // H, head n % H begin in the pool."""
    return first_ptr + tl.multiple_of(tl.load(layer_offsets_ptr + n // H), 8) + (n % H) * head_stride


@triton.jit
def store_centroids(centroids_ptr, norms_ptr, place, mask, centroids, channels, D: tl.constexpr):
    """Store fp32 [clusters, channels] as two bf16 that sum to it up to 2^-16, and its squared length."""
    high = centroids.to(tl.bfloat16)
    target = centroids_ptr + place[:, None] * (2 * D) + channels[None, :]
    both = mask[:, None] & (channels < D)[None, :]
    tl.store(target, high, mask=both)
    tl.store(target + D, (centroids - high.to(tl.float32)).to(tl.bfloat16), mask=both)
    tl.store(norms_ptr + place, tl.sum(centroids * centroids, 1), mask=mask)


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


@triton.jit
def scores_of(
    x_high, x_low, centroids_ptr, norms_ptr, cluster, count, channels, D: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """2 x.c - |c|^2 of rows x against some centroids, [rows, clusters]; -inf past the last cluster.

    A row is the sum of two bf16, as centroids are stored, and the product of the two small parts is left out: 16 bits of
    mantissa.
    """
    source = centroids_ptr + cluster[None, :] * (2 * D) + channels[:, None]
    mask = (cluster < count)[None, :] & (channels < D)[:, None]
    high = tl.load(source, mask=mask, other=0.0).to(DOT)
    low = tl.load(source + D, mask=mask, other=0.0).to(DOT)
    norm = tl.load(norms_ptr + cluster, mask=cluster < count, other=float("inf"))
    dot = tl.dot(x_low.to(DOT), high)
    dot = tl.dot(x_high.to(DOT), low, dot)
    dot = tl.dot(x_high.to(DOT), high, dot)
    return 2.0 * dot - norm[None, :]


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


@triton.jit(do_not_specialize=LENGTHS)
def list_kernel(
    labels_ptr, token_begin_ptr, cluster_begin_ptr, members_ptr, cluster_end_ptr, tokens_of_call, clusters,
    LISTS: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """Member lists of LISTS clusters, by counting.

    One program reads all labels of the segment's head twice: to count, then to give each token of its clusters its place.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    lowest = tl.program_id(0) * LISTS
    if lowest >= count:
        return
    cluster = lowest + tl.arange(0, LISTS)
    step = tl.arange(0, SCANNED)
    row = n.to(tl.int64) * tokens_of_call + token_begin
    sizes = tl.zeros((LISTS,), tl.int32)
    before = tl.zeros((SCANNED,), tl.int32)
    for first in range(0, tokens, SCANNED):
        label = tl.load(labels_ptr + row + first + step, mask=first + step < tokens, other=-1).to(tl.int32)
        before += ((label >= 0) & (label < lowest)).to(tl.int32)
        sizes += tl.sum((label[:, None] == cluster[None, :]).to(tl.int32), 0)
    end = tl.sum(before) + tl.cumsum(sizes, 0)
    tl.store(cluster_end_ptr + n.to(tl.int64) * clusters + cluster_begin + cluster, end, mask=cluster < count)

    begin = end - sizes
    for first in range(0, tokens, SCANNED):
        label = tl.load(labels_ptr + row + first + step, mask=first + step < tokens, other=-1).to(tl.int32)
        own = (label[:, None] == cluster[None, :]).to(tl.int32)
        place = tl.sum(own * (begin[None, :] + tl.cumsum(own, 0) - own), 1)
        tl.store(members_ptr + row + place, (first + step).to(tl.int16), mask=tl.sum(own, 1) > 0)
        begin += tl.sum(own, 0)


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


@triton.jit
def cluster_range(end_ptr, cluster, count):
    """Begin and size of clusters in their segment's member list, int32; size 0 past the last cluster."""
    live = cluster < count
    end = tl.load(end_ptr + cluster, mask=live, other=0)
    begin = tl.load(end_ptr + cluster - 1, mask=live & (cluster > 0), other=0)
    return begin, end - begin


def cluster(keys: Pool, segments: Segments, passes: int) -> Clustering:
    """Cluster the keys of some segments, for every layer and kv head; see `reference.labels_of`.

    Three launches in a pass and five for outliers, without waiting for the device. Scratch: 4 D + 8 bytes per cluster and
    head, 8 bytes per token and head.

    Args:
        keys: the pool's.
        segments: of at most 32,767 tokens.
        passes: assignments made, at least 1.
    """
    assert segments.max_tokens <= 32767, f"{segments.max_tokens} tokens: offsets in a segment are int16"
    layers, (_, heads, head_dim) = keys.layer_offsets.numel(), keys.first.shape
    rows, tokens, clusters = layers * heads, segments.slots.numel(), segments.clusters
    device = keys.first.device
    result = Clustering(
        center=torch.empty((rows, segments.count, head_dim), device=device),
        labels=torch.empty((rows, tokens), dtype=torch.int16, device=device),
        members=torch.empty((rows, tokens), dtype=torch.int16, device=device),
        cluster_end=torch.empty((rows, clusters), dtype=torch.int32, device=device),
    )
    centroids = torch.empty((rows, clusters, 2, head_dim), dtype=torch.bfloat16, device=device)
    norms = torch.empty((rows, clusters), device=device)
    distance = torch.empty((rows, tokens), device=device)
    cheapness = torch.empty((rows, clusters), device=device)
    gains = torch.empty((rows, segments.count), dtype=torch.int32, device=device)
    far, moved = (torch.empty((rows, segments.outliers), dtype=torch.int16, device=device) for _ in range(2))
    pool = (keys.first, keys.layer_offsets, keys.first.stride(0), keys.first.stride(1))
    ranges = (segments.token_begin, segments.cluster_begin)
    sizes = {"H": heads, "D": head_dim, "DP": triton.next_power_of_2(head_dim)}

    def grid(longest: int, tile: int) -> tuple[int, int, int]:
        return triton.cdiv(longest, tile), rows, segments.count

    center_kernel[grid(1, 1)](
        *pool, segments.slots, segments.token_begin, result.center, **sizes, ROWS=_ROWS, num_warps=4
    )
    start_kernel[grid(segments.max_clusters, _MEANS)](
        *pool, segments.slots, *ranges, result.center, centroids, norms, clusters, **sizes, MEANS=_MEANS, num_warps=4
    )
    for done in range(1, passes + 1):
        assign_kernel[grid(segments.max_tokens, _ROWS)](
            *pool, segments.slots, *ranges, result.center, centroids, norms, result.labels, distance, tokens, clusters,
            **sizes, ROWS=_ROWS, CENTROIDS=_centroids(head_dim), DOT=_DOT, num_warps=_warps(head_dim), num_stages=2,
        )  # fmt: skip
        list_kernel[grid(segments.max_clusters, _LISTS)](
            result.labels, *ranges, result.members, result.cluster_end, tokens, clusters,
            LISTS=_LISTS, SCANNED=_SCANNED, num_warps=4,
        )  # fmt: skip
        if done < passes:
            update_kernel[grid(segments.max_clusters, _MEANS)](
                *pool, segments.slots, *ranges, result.center, result.members, result.cluster_end, centroids, norms,
                tokens, clusters, **sizes, MEANS=_MEANS, num_warps=4,
            )  # fmt: skip
        if segments.outliers and done == passes - 1:
            cost_kernel[grid(segments.max_clusters, _ROWS)](
                segments.cluster_begin, result.cluster_end, centroids, norms, cheapness, clusters,
                D=head_dim, DP=sizes["DP"], ROWS=_ROWS, CENTROIDS=_centroids(head_dim), DOT=_DOT,
                num_warps=_warps(head_dim), num_stages=2,
            )  # fmt: skip
            gain_kernel[(rows, segments.count)](
                distance, cheapness, *ranges, segments.outlier_begin, gains, tokens, clusters,
                RANKED=_RANKED, num_warps=4,
            )  # fmt: skip
            for numbers, begin, largest in (
                (distance, segments.token_begin, far),
                (cheapness, segments.cluster_begin, moved),
            ):
                largest_kernel[(rows, segments.count)](
                    numbers, begin, segments.outlier_begin, gains, largest, numbers.shape[1], segments.outliers,
                    RANKED=_RANKED, num_warps=4,
                )  # fmt: skip
            outlier_kernel[grid(segments.max_outliers, _MEANS)](
                *pool, segments.slots, *ranges, segments.outlier_begin, gains, result.center, far, moved, centroids, norms,
                clusters, segments.outliers, **sizes, MEANS=_MEANS, num_warps=4,
            )  # fmt: skip
    return result


def _warps(head_dim: int) -> int:
    """Of a program that assigns _ROWS keys."""
    return 8 if head_dim > 128 else 4


def _centroids(head_dim: int) -> int:
    """Centroids per step of an assignment; at 256, 32 of them spill registers on sm_80."""
    return 16 if head_dim > 128 else 32


def _case(kernel: Any, head_dim: int, tiles: dict[str, int], **holds: Any) -> CompileCase:
    """A case of one kernel at Llama's shape, or at another head_dim."""
    types = {
        "keys_ptr": "*bf16", "layer_offsets_ptr": "*i64", "slot_stride": "i32", "head_stride": "i32",
        "slots_ptr": "*i64", "token_begin_ptr": "*i32", "cluster_begin_ptr": "*i32", "center_ptr": "*fp32",
        "centroids_ptr": "*bf16", "norms_ptr": "*fp32", "labels_ptr": "*i16", "members_ptr": "*i16", "cluster_end_ptr": "*i32",
        "distance_ptr": "*fp32", "cheapness_ptr": "*fp32", "numbers_ptr": "*fp32", "begin_ptr": "*i32",
        "outlier_begin_ptr": "*i32", "largest_ptr": "*i16", "gains_ptr": "*i32", "far_ptr": "*i16", "moved_ptr": "*i16",
        "length": "i32", "outliers": "i32", "tokens_of_call": "i32", "clusters": "i32",
    }  # fmt: skip
    sizes = {"H": 8, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "DOT": _DOT, **tiles}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return CompileCase(
        f"kmeans {kernel.__name__.removesuffix('_kernel')} D={head_dim}",
        kernel,
        signature,
        {name: sizes[name] for name in kernel.arg_names if name in sizes},
        tuple(name for name in signature if name.endswith(("_ptr", "_stride"))),
        **holds,
    )


def _assign_case(head_dim: int, **holds: Any) -> CompileCase:
    tiles = {"ROWS": _ROWS, "CENTROIDS": _centroids(head_dim)}
    return _case(assign_kernel, head_dim, tiles, num_warps=_warps(head_dim), num_stages=2, tensor_cores=12, **holds)


COMPILE_CASES = [
    _assign_case(64, async_loads_128=8, programs_per_sm=2),
    _assign_case(128, async_loads_128=16, programs_per_sm=2),
    _assign_case(256, async_loads_128=8),
    _case(center_kernel, 128, {"ROWS": _ROWS}, programs_per_sm=2),
    _case(start_kernel, 128, {"MEANS": _MEANS}, programs_per_sm=8),
    _case(list_kernel, 128, {"LISTS": _LISTS, "SCANNED": _SCANNED}, programs_per_sm=2),
    _case(update_kernel, 128, {"MEANS": _MEANS}, programs_per_sm=4),
    _case(
        cost_kernel,
        128,
        {"ROWS": _ROWS, "CENTROIDS": _centroids(128)},
        num_warps=_warps(128),
        num_stages=2,
        tensor_cores=12,
        programs_per_sm=2,
    ),  # fmt: skip
    _case(gain_kernel, 128, {"RANKED": _RANKED}, programs_per_sm=8),
    _case(largest_kernel, 128, {"RANKED": _RANKED}, programs_per_sm=8),
    _case(outlier_kernel, 128, {"MEANS": _MEANS}, programs_per_sm=8),
]
