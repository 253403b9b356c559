"""What is written of a segment's clusters: rows, ends and spreads; and the segment's own vectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.encode.triton.call import SIZES, Call, case
from sglang_clusterkv.kernels.encode.triton.rows import (
    bf16_bits,
    bf16_value,
    load_columns,
    pool_row,
    sliced_channels,
    store_rows,
)
from sglang_clusterkv.kernels.kmeans.triton.segments import cluster_range, head_pointer, segment_range

_CLUSTERS = 16  # clusters per program
_DESCRIBED = 64  # clusters per step of the last pass over a segment


@triton.jit(do_not_specialize=SIZES)
def describe_kernel(
    keys_ptr, key_offsets_ptr, values_ptr, value_offsets_ptr, slot_stride, head_stride,
    slots_ptr, read_slots_ptr, token_begin_ptr, cluster_begin_ptr, center_ptr, members_ptr, cluster_end_ptr,
    key_rows_ptr, key_scales_ptr, value_rows_ptr, value_scales_ptr, ends_ptr, variance_ptr, parts_ptr,
    tokens_of_call, clusters, tiles, rows_of_layer,
    H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Centroids, mean values and ends of CLUSTERS clusters, written to their rows.

    One program reads the keys of its clusters' members twice and their values once, at `read_slots_ptr`, or where that is None
    at the segment's slots. It leaves each cluster's variance, and the sums of its squares and of its values by channel, for
    `finish_kernel`.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, _ = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    cluster = tl.program_id(0) * CLUSTERS + tl.arange(0, CLUSTERS)
    if tl.program_id(0) * CLUSTERS >= count:
        return
    channels, real = sliced_channels(tl.arange(0, 8 * PAD), D, PAD)
    begin, size = cluster_range(cluster_end_ptr + n.to(tl.int64) * clusters + cluster_begin, cluster, count)
    center_ptr += (n.to(tl.int64) * tl.num_programs(2) + segment) * D
    center = tl.load(center_ptr + channels, mask=real, other=0.0)
    members_ptr += n.to(tl.int64) * tokens_of_call + token_begin
    slots_ptr += token_begin
    if read_slots_ptr is None:
        source_ptr = slots_ptr
    else:
        source_ptr = read_slots_ptr + token_begin
    keys_ptr = head_pointer(keys_ptr, key_offsets_ptr, n, head_stride, H)
    values_ptr = head_pointer(values_ptr, value_offsets_ptr, n, head_stride, H)
    longest = tl.max(size)

    sums = tl.zeros((CLUSTERS, 8 * PAD), tl.float32)
    values = tl.zeros((CLUSTERS, 8 * PAD), tl.float32)
    for i in range(longest):
        mask = (i < size)[:, None] & real[None, :]
        member = tl.load(members_ptr + begin + i, mask=i < size, other=0)
        slots = tl.load(source_ptr + member, mask=i < size, other=0)
        keys = load_columns(keys_ptr, slots, channels, mask, slot_stride)
        sums += tl.where(mask, keys - center[None, :], 0.0)
        values += load_columns(values_ptr, slots, channels, mask, slot_stride)
    inverse = tl.maximum(size, 1).to(tl.float32)[:, None]
    centroid = tl.div_rn(sums, inverse)

    squares = tl.zeros((CLUSTERS, 8 * PAD), tl.float32)
    for i in range(longest):
        mask = (i < size)[:, None] & real[None, :]
        member = tl.load(members_ptr + begin + i, mask=i < size, other=0)
        slots = tl.load(source_ptr + member, mask=i < size, other=0)
        keys = load_columns(keys_ptr, slots, channels, mask, slot_stride)
        apart = tl.where(mask, (keys - center[None, :]) - centroid, 0.0)
        squares += apart * apart

    live = cluster < count
    row = ((n // H).to(tl.int64) * rows_of_layer + pool_row(slots_ptr, cluster, live, PAGE, PER_PAGE)) * H + n % H
    shift = center - bf16_value(bf16_bits(center))  # rows are relative to the mean as stored
    relative = tl.where(real[None, :], centroid + shift[None, :], 0.0)
    store_rows(key_rows_ptr, key_scales_ptr, row, live, relative, FORMAT, D, PAD, SCALES, CLUSTERS)
    mean_value = tl.div_rn(values, inverse)
    store_rows(value_rows_ptr, value_scales_ptr, row, live, mean_value, FORMAT, D, PAD, SCALES, CLUSTERS)
    tl.store(ends_ptr + row, (begin + size).to(tl.int16), mask=live)
    variance = tl.div_rn(tl.sum(squares, 1), tl.maximum(size, 1).to(tl.float32))
    tl.store(variance_ptr + n.to(tl.int64) * clusters + cluster_begin + cluster, variance, mask=live)
    part = (n.to(tl.int64) * tl.num_programs(2) + segment) * tiles + tl.program_id(0)
    tl.store(parts_ptr + part * (2 * D) + channels, tl.sum(squares, 0), mask=real)
    tl.store(parts_ptr + part * (2 * D) + D + channels, tl.sum(values, 0), mask=real)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    slots_ptr, token_begin_ptr, cluster_begin_ptr, center_ptr, variance_ptr, parts_ptr, spread_ptr, vectors_ptr,
    clusters, tiles, rows_of_layer, pages_of_layer,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr,
    CLUSTERS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Mean key, mean value and variance of a segment's head on its first four pages, and its clusters' spreads.

    One program sums what the programs of `describe_kernel` left of one head of one segment, in their order.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    channels = tl.arange(0, DP)
    real = channels < D
    row = n.to(tl.int64) * tl.num_programs(2) + segment
    parts_ptr += row * tiles * (2 * D)
    squares = tl.zeros((DP,), tl.float32)
    values = tl.zeros((DP,), tl.float32)
    for tile in range(tl.cdiv(count, CLUSTERS)):
        squares += tl.load(parts_ptr + tile * (2 * D) + channels, mask=real, other=0.0)
        values += tl.load(parts_ptr + tile * (2 * D) + D + channels, mask=real, other=0.0)
    center = tl.load(center_ptr + row * D + channels, mask=real, other=0.0)
    variance = squares / tokens

    slots_ptr += token_begin
    page = tl.load(slots_ptr + channels // (D // 4) * PAGE, mask=real, other=0) // PAGE
    place = (((n // H).to(tl.int64) * pages_of_layer + page) * H + n % H) * (3 * D // 4) + channels % (D // 4)
    tl.store(vectors_ptr + place, bf16_bits(center), mask=real)
    tl.store(vectors_ptr + place + D // 4, bf16_bits(values / tokens), mask=real)
    tl.store(vectors_ptr + place + D // 2, bf16_bits(variance), mask=real)

    total = tl.sum(variance)
    divisor = tl.where(total > 0, total, 1.0)
    for first in range(0, count, DESCRIBED):
        cluster = first + tl.arange(0, DESCRIBED)
        live = cluster < count
        own = tl.load(variance_ptr + n.to(tl.int64) * clusters + cluster_begin + cluster, mask=live, other=0.0)
        spread = tl.where(total > 0, own / divisor, 0.0)
        layer_row = (n // H).to(tl.int64) * rows_of_layer + pool_row(slots_ptr, cluster, live, PAGE, PER_PAGE)
        tl.store(spread_ptr + layer_row * H + n % H, bf16_bits(spread), mask=live)


def describe(call: Call) -> None:
    """Write all clusters' rows, ends and spreads, and the segments' vectors."""
    segments, found, target = call.segments, call.found, call.target
    clusters, head_dim, device = segments.clusters, call.head_dim, call.keys.first.device
    tiles = triton.cdiv(segments.max_clusters, _CLUSTERS)
    variance = torch.empty((call.rows, clusters), device=device)
    parts = torch.empty((call.rows, segments.count, tiles, 2, head_dim), device=device)
    describe_kernel[call.grid(segments.max_clusters, _CLUSTERS)](
        call.keys.first, call.keys.layer_offsets, call.values.first, call.values.layer_offsets, *call.strides,
        segments.slots, call.read_slots, *call.ranges, found.center, found.members, found.cluster_end,
        target.key_rows, target.key_scales, target.value_rows, target.value_scales, target.cluster_end, variance, parts,
        call.tokens, clusters, tiles, call.rows_of_layer,
        **call.sizes, **call.pages, **call.form, CLUSTERS=_CLUSTERS, num_warps=_warps(head_dim),
    )  # fmt: skip
    finish_kernel[call.grid(1, 1)](
        segments.slots, *call.ranges, found.center, variance, parts, target.spread, target.segment_vectors,
        clusters, tiles, call.rows_of_layer, target.segment_vectors.shape[1],
        **call.sizes, DP=triton.next_power_of_2(head_dim), **call.pages, CLUSTERS=_CLUSTERS, DESCRIBED=_DESCRIBED,
        num_warps=1,
    )  # fmt: skip


def _warps(head_dim: int) -> int:
    """Of a program that describes _CLUSTERS clusters."""
    return 8 if head_dim > 128 else 4


_TILES = {"CLUSTERS": _CLUSTERS, "DESCRIBED": _DESCRIBED}
COMPILE_CASES = [
    case(describe_kernel, 128, _TILES, programs_per_sm=2),
    case(describe_kernel, 256, _TILES, "int8", num_warps=_warps(256)),
    case(describe_kernel, 256, _TILES, "bf16", num_warps=_warps(256)),
    case(describe_kernel, 128, _TILES, copied=True, programs_per_sm=2),
    case(describe_kernel, 256, _TILES, copied=True, num_warps=_warps(256)),
    case(finish_kernel, 128, _TILES, num_warps=1),
]
