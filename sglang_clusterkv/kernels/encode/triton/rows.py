"""Stored rows in the kernels of encode: where they lie, how they are written, and how a decode step reads them.

Tiles of channels are ordered by slices, as rows and codes are packed: column j * PAD + i of a tile is channel
j * D/8 + i, PAD being D/8 or the next power of two; the columns between are zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.kernels.triton_fp8 import widened


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
    return widened(
        tl.load(layer_ptr + slots[:, None] * slot_stride + channels[None, :], mask=mask, other=0.0), tl.float32
    )


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
