"""Describe clusters and code tokens in Triton, and write them where the index keeps them, at the rows of the segment's pages.

Tiles of channels are ordered by slices, as rows and codes are packed: column j * PAD + i of a tile is channel
j * D/8 + i, PAD being D/8 or the next power of two; the columns between are zero.

Grid, names and order of sums as in `kmeans.triton`; the definition: `reference` and `clusters/build.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.kmeans.triton import (
    LENGTHS,
    Clustering,
    Pool,
    Segments,
    cluster_range,
    head_pointer,
    segment_range,
)
from sglang_clusterkv.memory.codec import INNER_LEVEL, LEVEL_BORDER, OUTER_LEVEL, SLICES, RowCodec, TokenCodec
from sglang_clusterkv.memory.rotation import rotation_matrix

_CLUSTERS = 16  # clusters per program
_TOKENS = 64  # tokens per program where codes are made
_CHANNELS = 32  # channels that are rotated at a time, of the padded ones
_COPIED = 256  # tokens per program where member lists are copied
_DESCRIBED = 64  # clusters per step of the last pass over a segment

INNER: tl.constexpr = tl.constexpr(INNER_LEVEL)
OUTER: tl.constexpr = tl.constexpr(OUTER_LEVEL)
BORDER: tl.constexpr = tl.constexpr(LEVEL_BORDER)


class Target(NamedTuple):
    """The index's arrays of all layers, as kernels write them; see `clusters.index.LayerView` for their meaning."""

    key_rows: torch.Tensor  # [L, clusters of the pool, H, ...]: int32 words of int4, int8, or int16 (bits of bf16)
    key_scales: torch.Tensor | None  # int16 (bits of bf16) [L, clusters of the pool, H, scales]; None for rows in bf16
    value_rows: torch.Tensor  # as the keys'
    value_scales: torch.Tensor | None
    spread: torch.Tensor  # int16 (bits of bf16) [L, clusters of the pool, H]
    cluster_end: torch.Tensor  # int16, likewise
    segment_vectors: torch.Tensor  # int16 (bits of bf16) [L, pages, H, 3, D/4]
    members: torch.Tensor  # int16 [L, slots, H]
    codes: torch.Tensor | None  # int16 or uint8 [L, slots, H, D/8]
    code_scales: torch.Tensor | None  # int16 (bits of bf16) [L, slots, H]


_PACKED_DTYPES = {"int4": torch.int32, "int8": torch.int8, "bf16": torch.int16}


def target_of(arrays: dict[str, torch.Tensor], rows: RowCodec, tokens: TokenCodec) -> Target:
    """View the arrays of `memory.device.index_shapes` as the kernels write them."""

    def half_words(name: str) -> torch.Tensor | None:
        return arrays[name].view(torch.int16) if name in arrays else None

    return Target(
        key_rows=arrays["key_rows"].view(_PACKED_DTYPES[rows.name]),
        key_scales=half_words("key_scales"),
        value_rows=arrays["value_rows"].view(_PACKED_DTYPES[rows.name]),
        value_scales=half_words("value_scales"),
        spread=arrays["spread"].view(torch.int16),
        cluster_end=arrays["cluster_end"],
        segment_vectors=arrays["segment_vectors"].view(torch.int16),
        members=arrays["members"],
        codes=half_words("codes") if tokens.bits == 2 else arrays.get("codes"),
        code_scales=half_words("code_scales"),
    )


# Of calls and of pools: no variants for 1 and multiples of 16.
SIZES = (*LENGTHS, "rows_of_layer", "slots_of_layer", "pages_of_layer")


@triton.jit
def bf16_bits(x):
    """Bits of the nearest bf16, ties to even, as int16 (a cast would truncate in the interpreter)."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
    return (nearest >> 16).to(tl.int16)


@triton.jit
def bf16_value(bits):
    """What bf16 bits (int16) stand for, fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round_even(x):
    """Nearest integer, ties to even, of |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def sliced_channels(columns, D: tl.constexpr, PAD: tl.constexpr):
    """Channel of each column of a tile, and whether the column has one."""
    if PAD * 8 == D:
        channels = columns
    else:
        channels = columns // PAD * (D // 8) + columns % PAD
    return channels, columns % PAD < D // 8


@triton.jit
def load_columns(layer_ptr, slots, channels, mask, slot_stride):
    """Rows of one head at these slots, fp32 [rows, columns]; zero outside of the mask."""
    return tl.load(layer_ptr + slots[:, None] * slot_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pool_row(slots_ptr, cluster, live, PAGE: tl.constexpr, PER_PAGE: tl.constexpr):
    """Row of the index where a segment's clusters are stored, int64; `slots_ptr` is the segment's first slot."""
    slot = tl.load(slots_ptr + cluster // PER_PAGE * PAGE, mask=live, other=0)
    return slot // PAGE * PER_PAGE + cluster % PER_PAGE


@triton.jit
def store_rows(
    rows_ptr, scales_ptr, row, live, x,
    FORMAT: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, SCALES: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Write fp32 [CLUSTERS, 8 * PAD] in the row format FORMAT; `row` int64 [CLUSTERS] counts rows of all layers and heads."""
    channels, real = sliced_channels(tl.arange(0, 8 * PAD), D, PAD)
    mask = live[:, None] & real[None, :]
    if FORMAT == "bf16":
        tl.store(rows_ptr + row[:, None] * D + channels[None, :], bf16_bits(x), mask=mask)
    else:
        limit: tl.constexpr = 7.0 if FORMAT == "int4" else 127.0
        groups = tl.reshape(x, (CLUSTERS, SCALES, 8 * PAD // SCALES))
        bits = bf16_bits(tl.div_rn(tl.max(tl.abs(groups), 2), limit))
        scale = bf16_value(bits)[:, :, None]
        levels = tl.where(scale > 0, tl.div_rn(groups, tl.where(scale > 0, scale, 1.0)), 0.0)
        levels = tl.minimum(tl.maximum(round_even(levels), -limit - 1), limit).to(tl.int32)
        if FORMAT == "int4":
            shifts = 4 * tl.arange(0, 8)
            nibbles = (tl.reshape(levels, (CLUSTERS, 8, PAD)) & 15) << shifts[None, :, None]
            words = tl.arange(0, PAD)
            tl.store(
                rows_ptr + row[:, None] * (D // 8) + words[None, :],
                tl.sum(nibbles, 1),
                mask=live[:, None] & (words < D // 8)[None, :],
            )
        else:
            levels = tl.reshape(levels, (CLUSTERS, 8 * PAD)).to(tl.int8)
            tl.store(rows_ptr + row[:, None] * D + channels[None, :], levels, mask=mask)
        group = tl.arange(0, SCALES)
        tl.store(scales_ptr + row[:, None] * SCALES + group[None, :], bits, mask=live[:, None])


@triton.jit
def load_decoded(
    rows_ptr, scales_ptr, row, live, columns,
    FORMAT: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Some columns of rows as a decode step reads them, fp32; zero where a column has no channel."""
    channels, real = sliced_channels(columns, D, PAD)
    mask = live[:, None] & real[None, :]
    # One return: Triton compiles what follows a branch that returned, here a division by no SCALES.
    if FORMAT == "bf16":
        decoded = bf16_value(tl.load(rows_ptr + row[:, None] * D + channels[None, :], mask=mask, other=0))
    else:
        if FORMAT == "int4":
            words = tl.load(rows_ptr + row[:, None] * (D // 8) + (columns % PAD)[None, :], mask=mask, other=0)
            levels = words << (28 - 4 * (columns // PAD))[None, :] >> 28
        else:
            levels = tl.load(rows_ptr + row[:, None] * D + channels[None, :], mask=mask, other=0).to(tl.int32)
        group = columns // (8 * PAD // SCALES)
        scales = tl.load(scales_ptr + row[:, None] * SCALES + group[None, :], mask=mask, other=0)
        decoded = levels.to(tl.float32) * bf16_value(scales)
    return decoded


@triton.jit(do_not_specialize=SIZES)
def describe_kernel(
    keys_ptr, key_offsets_ptr, values_ptr, value_offsets_ptr, slot_stride, head_stride,
    slots_ptr, token_begin_ptr, cluster_begin_ptr, center_ptr, members_ptr, cluster_end_ptr,
    key_rows_ptr, key_scales_ptr, value_rows_ptr, value_scales_ptr, ends_ptr, variance_ptr, parts_ptr,
    tokens_of_call, clusters, tiles, rows_of_layer,
    H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Centroids, mean values and ends of CLUSTERS clusters, written to their rows.

    One program reads the keys of its clusters' members twice and their values once. It leaves each cluster's variance, and
    the sums of its squares and of its values by channel, for `finish_kernel`.
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
    keys_ptr = head_pointer(keys_ptr, key_offsets_ptr, n, head_stride, H)
    values_ptr = head_pointer(values_ptr, value_offsets_ptr, n, head_stride, H)
    longest = tl.max(size)

    sums = tl.zeros((CLUSTERS, 8 * PAD), tl.float32)
    values = tl.zeros((CLUSTERS, 8 * PAD), tl.float32)
    for i in range(longest):
        mask = (i < size)[:, None] & real[None, :]
        member = tl.load(members_ptr + begin + i, mask=i < size, other=0)
        slots = tl.load(slots_ptr + member, mask=i < size, other=0)
        keys = load_columns(keys_ptr, slots, channels, mask, slot_stride)
        sums += tl.where(mask, keys - center[None, :], 0.0)
        values += load_columns(values_ptr, slots, channels, mask, slot_stride)
    inverse = tl.maximum(size, 1).to(tl.float32)[:, None]
    centroid = tl.div_rn(sums, inverse)

    squares = tl.zeros((CLUSTERS, 8 * PAD), tl.float32)
    for i in range(longest):
        mask = (i < size)[:, None] & real[None, :]
        member = tl.load(members_ptr + begin + i, mask=i < size, other=0)
        slots = tl.load(slots_ptr + member, mask=i < size, other=0)
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


@triton.jit(do_not_specialize=SIZES)
def members_kernel(
    slots_ptr, token_begin_ptr, members_ptr, index_members_ptr, tokens_of_call, slots_of_layer,
    H: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Member lists, written to the segment's slots; one program copies TOKENS of one head."""
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    position = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    live = position < tokens
    member = tl.load(members_ptr + n.to(tl.int64) * tokens_of_call + token_begin + position, mask=live, other=0)
    slot = tl.load(slots_ptr + token_begin + position, mask=live, other=0)
    tl.store(index_members_ptr + ((n // H).to(tl.int64) * slots_of_layer + slot) * H + n % H, member, mask=live)


@triton.jit(do_not_specialize=SIZES)
def code_kernel(
    keys_ptr, layer_offsets_ptr, slot_stride, head_stride,
    slots_ptr, token_begin_ptr, center_ptr, labels_ptr, members_ptr, key_rows_ptr, key_scales_ptr,
    rotation_ptr, codes_ptr, scales_ptr,
    tokens_of_call, rows_of_layer, slots_of_layer,
    H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Codes of TOKENS tokens in the order of the member list, written to the segment's slots.

    One program reads its tokens' keys and their clusters' rows once and the rotation once, CHANNELS channels at a time.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    position = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    if tl.program_id(0) * TOKENS >= tokens:
        return
    live = position < tokens
    head = n.to(tl.int64) * tokens_of_call + token_begin
    member = tl.load(members_ptr + head + position, mask=live, other=0)
    cluster = tl.load(labels_ptr + head + member, mask=live, other=0).to(tl.int32)
    slots_ptr += token_begin
    slots = tl.load(slots_ptr + member, mask=live, other=0)
    row = ((n // H).to(tl.int64) * rows_of_layer + pool_row(slots_ptr, cluster, live, PAGE, PER_PAGE)) * H + n % H
    keys_ptr = head_pointer(keys_ptr, layer_offsets_ptr, n, head_stride, H)
    center_ptr += (n.to(tl.int64) * tl.num_programs(2) + segment) * D

    columns = tl.arange(0, 8 * PAD)
    to, to_real = sliced_channels(columns, D, PAD)
    y = tl.zeros((TOKENS, 8 * PAD), tl.float32)
    for first in tl.range(0, 8 * PAD, CHANNELS):
        part = first + tl.arange(0, CHANNELS)
        channels, real = sliced_channels(part, D, PAD)
        mean = bf16_value(bf16_bits(tl.load(center_ptr + channels, mask=real, other=0.0)))
        keys = load_columns(keys_ptr, slots, channels, live[:, None] & real[None, :], slot_stride)
        stored = load_decoded(key_rows_ptr, key_scales_ptr, row, live, part, FORMAT, D, PAD, SCALES) + mean[None, :]
        both = real[:, None] & to_real[None, :]
        rotation = tl.load(rotation_ptr + to[None, :] * D + channels[:, None], mask=both, other=0.0)
        y = tl.dot(keys - stored, rotation, y, input_precision="tf32x3")

    slot = tl.load(slots_ptr + position, mask=live, other=0)
    place = ((n // H).to(tl.int64) * slots_of_layer + slot) * H + n % H
    size = tl.abs(y)
    negative = (y < 0).to(tl.int32)
    if BITS == 1:
        crumbs = negative
        scale = tl.sum(size, 1) / D
    else:
        border = BORDER * tl.sqrt_rn(tl.sum(y * y, 1) / D)
        outer = size >= border[:, None]
        level = tl.where(to_real[None, :], tl.where(outer, OUTER, INNER), 0.0)
        crumbs = outer.to(tl.int32) + 2 * negative
        scale = tl.sum(size * level, 1) / tl.sum(level * level, 1)
    shifts = BITS * tl.arange(0, 8)
    words = tl.sum(tl.reshape(crumbs, (TOKENS, 8, PAD)) << shifts[None, :, None], 1)
    word = tl.arange(0, PAD)
    mask = live[:, None] & (word < D // 8)[None, :]
    tl.store(codes_ptr + place[:, None] * (D // 8) + word[None, :], words.to(codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + place, bf16_bits(scale), mask=live)


def write(
    keys: Pool, values: Pool, segments: Segments, found: Clustering, target: Target,
    *, page_size: int, clusters_per_page: int, rows: RowCodec, tokens: TokenCodec,
) -> None:  # fmt: skip
    """Describe the clusters of some segments, code their tokens, and write all of it to the index.

    Four launches, three without codes; does not wait for the device.

    Args:
        keys: the pool's, of L layers.
        values: likewise, with the strides of the keys.
        segments: of whole pages, four or more each.
        found: their clusters.
        target: the index's arrays of the same L layers; those of codes are None where none are kept.
        page_size: tokens per page.
        clusters_per_page: cluster rows per page.
        rows: format of centroids and mean values.
        tokens: format of the codes.
    """
    layers, (_, heads, head_dim) = keys.layer_offsets.numel(), keys.first.shape
    strides = keys.first.stride()[:2]
    assert values.first.stride()[:2] == strides, f"keys have strides {strides}, values {values.first.stride()[:2]}"
    n, clusters, device = layers * heads, segments.clusters, keys.first.device
    tiles = triton.cdiv(segments.max_clusters, _CLUSTERS)
    variance = torch.empty((n, clusters), device=device)
    parts = torch.empty((n, segments.count, tiles, 2, head_dim), device=device)
    ranges = (segments.token_begin, segments.cluster_begin)
    rows_of_layer, slots_of_layer = target.key_rows.shape[1], target.members.shape[1]
    pages = {"PAGE": page_size, "PER_PAGE": clusters_per_page}
    sizes = {"H": heads, "D": head_dim}
    padded = triton.next_power_of_2(head_dim // SLICES)
    slices = {"PAD": padded}
    form = {"FORMAT": rows.name, "SCALES": rows.scales}

    def grid(longest: int, tile: int) -> tuple[int, int, int]:
        return triton.cdiv(longest, tile), n, segments.count

    describe_kernel[grid(segments.max_clusters, _CLUSTERS)](
        keys.first, keys.layer_offsets, values.first, values.layer_offsets, *strides, segments.slots, *ranges,
        found.center, found.members, found.cluster_end,
        target.key_rows, target.key_scales, target.value_rows, target.value_scales, target.cluster_end, variance, parts,
        segments.slots.numel(), clusters, tiles, rows_of_layer,
        **sizes, **slices, **pages, **form, CLUSTERS=_CLUSTERS, num_warps=_warps(head_dim),
    )  # fmt: skip
    finish_kernel[grid(1, 1)](
        segments.slots, *ranges, found.center, variance, parts, target.spread, target.segment_vectors,
        clusters, tiles, rows_of_layer, target.segment_vectors.shape[1],
        **sizes, DP=triton.next_power_of_2(head_dim), **pages, CLUSTERS=_CLUSTERS, DESCRIBED=_DESCRIBED, num_warps=1,
    )  # fmt: skip
    members_kernel[grid(segments.max_tokens, _COPIED)](
        segments.slots, segments.token_begin, found.members, target.members, segments.slots.numel(), slots_of_layer,
        H=heads, TOKENS=_COPIED, num_warps=4,
    )  # fmt: skip
    if target.codes is not None:
        code_kernel[grid(segments.max_tokens, _TOKENS)](
            keys.first, keys.layer_offsets, *strides, segments.slots, segments.token_begin, found.center,
            found.labels, found.members, target.key_rows, target.key_scales, rotation_matrix(head_dim, str(device)),
            target.codes, target.code_scales, segments.slots.numel(), rows_of_layer, slots_of_layer,
            **sizes, **slices, **pages, **form, BITS=tokens.bits, TOKENS=_TOKENS, CHANNELS=min(_CHANNELS, SLICES * padded),
            num_warps=8, num_stages=2,
        )  # fmt: skip


def _warps(head_dim: int) -> int:
    """Of a program that describes _CLUSTERS clusters."""
    return 8 if head_dim > 128 else 4


def _case(kernel: Any, head_dim: int, row_format: str = "int4", bits: int = 2, **holds: Any) -> CompileCase:
    """A case of one kernel at Llama's shape, or at another head_dim or format."""
    codec = RowCodec(row_format, head_dim)
    packed, scales = {"int4": "*i32", "int8": "*i8", "bf16": "*i16"}[row_format], ("key_scales_ptr", "value_scales_ptr")
    types = {
        "keys_ptr": "*bf16", "key_offsets_ptr": "*i64", "values_ptr": "*bf16", "value_offsets_ptr": "*i64",
        "layer_offsets_ptr": "*i64", "slot_stride": "i32", "head_stride": "i32", "slots_ptr": "*i64",
        "token_begin_ptr": "*i32", "cluster_begin_ptr": "*i32", "center_ptr": "*fp32", "labels_ptr": "*i16",
        "members_ptr": "*i16", "cluster_end_ptr": "*i32", "key_rows_ptr": packed, "value_rows_ptr": packed,
        "ends_ptr": "*i16", "variance_ptr": "*fp32", "parts_ptr": "*fp32", "spread_ptr": "*i16", "vectors_ptr": "*i16",
        "index_members_ptr": "*i16", "rotation_ptr": "*fp32", "codes_ptr": "*i16" if bits == 2 else "*u8",
        "scales_ptr": "*i16", "tokens_of_call": "i32", "clusters": "i32", "tiles": "i32", "rows_of_layer": "i32",
        "slots_of_layer": "i32", "pages_of_layer": "i32", **dict.fromkeys(scales if codec.scales else (), "*i16"),
    }  # fmt: skip
    sizes = {
        "H": 8, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "PAGE": 16, "PER_PAGE": 2,
        "PAD": triton.next_power_of_2(head_dim // SLICES), "FORMAT": row_format, "SCALES": codec.scales,
        "BITS": bits, "CLUSTERS": _CLUSTERS, "DESCRIBED": _DESCRIBED,
        "TOKENS": _TOKENS if kernel is code_kernel else _COPIED, "CHANNELS": _CHANNELS,
        **dict.fromkeys(() if codec.scales else scales),
    }  # fmt: skip
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return CompileCase(
        f"encode {kernel.__name__.removesuffix('_kernel')} {row_format} {bits} D={head_dim}",
        kernel,
        signature,
        {name: sizes[name] for name in kernel.arg_names if name in sizes},
        tuple(name for name in signature if name.endswith(("_ptr", "_stride"))),
        **holds,
    )


COMPILE_CASES = [
    _case(describe_kernel, 128, programs_per_sm=2),
    _case(describe_kernel, 256, "int8", num_warps=_warps(256)),
    _case(describe_kernel, 256, "bf16", num_warps=_warps(256)),
    _case(finish_kernel, 128, num_warps=1),
    _case(members_kernel, 128, programs_per_sm=8),
    _case(code_kernel, 128, num_warps=8, num_stages=2, tensor_cores=1, async_loads_128=14),
    _case(code_kernel, 96, "int8", 1, num_warps=8, num_stages=2, tensor_cores=1),
    _case(code_kernel, 128, "bf16", num_warps=8, num_stages=2, tensor_cores=1),
    _case(code_kernel, 256, "int4", 2, num_warps=8, num_stages=2, tensor_cores=1),
]
