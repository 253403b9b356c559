"""What is written of a segment's tokens, at their slots: member lists and codes."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.kernels.encode.triton.call import SIZES, Call, case
from sglang_clusterkv.kernels.encode.triton.rows import (
    bf16_bits,
    bf16_value,
    load_columns,
    load_decoded,
    pool_row,
    sliced_channels,
)
from sglang_clusterkv.kernels.kmeans.triton.segments import head_pointer, segment_range
from sglang_clusterkv.memory.codec import INNER_LEVEL, LEVEL_BORDER, OUTER_LEVEL, SLICES
from sglang_clusterkv.memory.rotation import rotation_matrix

_COPIED = 256  # tokens per program where member lists are copied
_TOKENS = 64  # tokens per program where codes are made
_CHANNELS = 32  # channels that are rotated at a time, of the padded ones

INNER: tl.constexpr = tl.constexpr(INNER_LEVEL)
OUTER: tl.constexpr = tl.constexpr(OUTER_LEVEL)
BORDER: tl.constexpr = tl.constexpr(LEVEL_BORDER)


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
    slots_ptr, read_slots_ptr, token_begin_ptr, center_ptr, labels_ptr, members_ptr, key_rows_ptr, key_scales_ptr,
    rotation_ptr, codes_ptr, scales_ptr,
    tokens_of_call, rows_of_layer, slots_of_layer,
    H: tl.constexpr, D: tl.constexpr, PAD: tl.constexpr, PAGE: tl.constexpr, PER_PAGE: tl.constexpr,
    FORMAT: tl.constexpr, SCALES: tl.constexpr, BITS: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Codes of TOKENS tokens in the order of the member list, written to the segment's slots.

    One program reads its tokens' keys and their clusters' rows once and the rotation once, CHANNELS channels at a time; keys at
    `read_slots_ptr`, or where that is None at the segment's slots.
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
    if read_slots_ptr is None:
        source_ptr = slots_ptr
    else:
        source_ptr = read_slots_ptr + token_begin
    slots = tl.load(source_ptr + member, mask=live, other=0)
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


def copy_members(call: Call) -> None:
    """Write the member lists to the segments' slots."""
    segments = call.segments
    members_kernel[call.grid(segments.max_tokens, _COPIED)](
        segments.slots, segments.token_begin, call.found.members, call.target.members, call.tokens, call.slots_of_layer,
        H=call.sizes["H"], TOKENS=_COPIED, num_warps=4,
    )  # fmt: skip


def code(call: Call) -> None:
    """Write all tokens' codes; after `describe`, for they are relative to the rows as stored."""
    segments, found, target = call.segments, call.found, call.target
    code_kernel[call.grid(segments.max_tokens, _TOKENS)](
        call.keys.first, call.keys.layer_offsets, *call.strides, segments.slots, call.read_slots, segments.token_begin,
        found.center, found.labels, found.members, target.key_rows, target.key_scales,
        rotation_matrix(call.head_dim, str(call.keys.first.device)), target.codes, target.code_scales,
        call.tokens, call.rows_of_layer, call.slots_of_layer,
        **call.sizes, **call.pages, **call.form, BITS=call.token_codec.bits, TOKENS=_TOKENS,
        CHANNELS=min(_CHANNELS, SLICES * call.form["PAD"]), num_warps=8, num_stages=2,
    )  # fmt: skip


_TILES = {"TOKENS": _TOKENS, "CHANNELS": _CHANNELS}
COMPILE_CASES = [
    case(members_kernel, 128, {"TOKENS": _COPIED}, programs_per_sm=8),
    case(code_kernel, 128, _TILES, num_warps=8, num_stages=2, tensor_cores=1, async_loads_128=14),
    case(code_kernel, 96, _TILES, "int8", 1, num_warps=8, num_stages=2, tensor_cores=1),
    case(code_kernel, 128, _TILES, "bf16", num_warps=8, num_stages=2, tensor_cores=1),
    case(
        code_kernel, 128, _TILES, copied=True, num_warps=8, num_stages=2, tensor_cores=1, async_loads_128=14
    ),  # fmt: skip
    case(code_kernel, 256, _TILES, "int4", 2, num_warps=8, num_stages=2, tensor_cores=1),
]
