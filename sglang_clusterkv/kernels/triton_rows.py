"""Unpacking of stored rows and codes in Triton kernels; memory/codec.py is the definition.

A row or a code has eight slices of head_dim / 8 channels; slice j of all 32-bit words of int4 rows is one shift and one
mask, whose result meets a contiguous slice of a query or of an accumulator in one `tl.dot`. So a kernel loads a tile of
words once and never moves a nibble between threads.

Triton's interpreter multiplies the raw bits of bf16 in `tl.dot`, so it computes in float32 (`dot_dtype`).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from sglang_clusterkv.memory.codec import INNER_LEVEL, OUTER_LEVEL, SLICES, RowCodec, channels_per_scale

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex

INT4, INT8, BF16 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ROW_FORMATS = {"int4": 0, "int8": 1, "bf16": 2}
_SLICES = tl.constexpr(SLICES)
_INNER, _OUTER = tl.constexpr(INNER_LEVEL), tl.constexpr(OUTER_LEVEL)
_SIGN = tl.constexpr(-(2**31))  # of a float32, as int32

_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _int4_assembly(exponent: int, offset: int, multiply_add: str) -> str:
    """PTX that makes the levels of two words' nibbles, in pairs of 16-bit numbers: slice j of both in the j-th register.

    Args:
        exponent: 16 bits of the number whose last place is 1, so that a nibble in its mantissa counts as it stands.
        offset: 16 bits of -(that number + 8).
        multiply_add: the instruction for pairs.
    """
    both, one = exponent | 8, {"bf16x2": 0x3F80, "f16x2": 0x3C00}[multiply_add.rsplit(".", 1)[1]]
    lines = [
        ".reg .b32 low, high, one, less, moved;",
        f"mov.b32 one, 0x{one:04x}{one:04x};",
        f"mov.b32 less, 0x{offset:04x}{offset:04x};",
        "prmt.b32 low, $8, $9, 0x5410;",
        "prmt.b32 high, $8, $9, 0x7632;",
    ]
    for j in range(8):
        half, shift = ("low", "high")[j // 4], 4 * (j % 4)
        lines.append(f"shr.u32 moved, {half}, {shift};" if shift else f"mov.b32 moved, {half};")
        lines.append(f"lop3.b32 moved, moved, 0x000f000f, 0x{both:04x}{both:04x}, 0x6a;")  # (a & b) ^ c
        lines.append(f"{multiply_add} ${j}, moved, one, less;")
    return "{" + " ".join(lines) + "}"


# 128 and 1024: the numbers of each type whose last place is 1.
_BF16_LEVELS = tl.constexpr(_int4_assembly(0x4300, 0xC308, "fma.rn.bf16x2"))
_FP16_LEVELS = tl.constexpr(_int4_assembly(0x6400, 0xE408, "fma.rn.f16x2"))


def _code_assembly() -> str:
    """PTX that makes the float16 levels of two words of 2-bit codes: slice j of both in the j-th register.

    A byte permutation looks them up: of the four levels' eight bytes it takes those that four digits name, which are 2c and
    2c + 1 for a crumb c. Crumbs of both words come into the bytes of one number first; 0x22 doubles each into two digits.
    """
    inner, outer = (struct.unpack("<H", struct.pack("<e", level))[0] for level in (INNER_LEVEL, OUTER_LEVEL))
    sign = 0x8000
    lines = [
        ".reg .b32 plus, minus, bytes, high, moved;",
        f"mov.b32 plus, 0x{outer << 16 | inner:08x};",
        f"mov.b32 minus, 0x{(outer | sign) << 16 | inner | sign:08x};",
        "prmt.b32 bytes, $8, $8, 0x3120;",
        "shr.u32 high, bytes, 16;",
    ]
    for j in range(8):
        half, shift = ("bytes", "high")[j // 4], 2 * (j % 4)
        lines.append(f"shr.u32 moved, {half}, {shift};" if shift else f"mov.b32 moved, {half};")
        lines.append("and.b32 moved, moved, 0x0303;")
        lines.append("mad.lo.u32 moved, moved, 0x22, 0x1010;")
        lines.append(f"prmt.b32 ${j}, plus, minus, moved;")
    return "{" + " ".join(lines) + "}"


_CODE_LEVELS = tl.constexpr(_code_assembly())


@triton.jit
def int4_slices(words, DOT: tl.constexpr):
    """Levels of the eight slices of int4 rows, -8 to 7, exact in every `DOT` dtype. words: int32, any shape.

    A nibble is put into the mantissa of a number whose last place is 1, and a fused multiply-add takes that number away: a
    conversion from an integer takes four times as long. In 16 bits two words' nibbles go together.
    """
    if tl.bfloat16 == DOT:
        return tl.inline_asm_elementwise(
            _BF16_LEVELS, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    elif tl.float16 == DOT:
        return tl.inline_asm_elementwise(
            _FP16_LEVELS, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        return (
            _int4_level(words, 0), _int4_level(words, 1), _int4_level(words, 2), _int4_level(words, 3),
            _int4_level(words, 4), _int4_level(words, 5), _int4_level(words, 6), _int4_level(words, 7),
        )  # fmt: skip


@triton.jit
def _int4_level(words, SLICE: tl.constexpr):
    """Levels of one slice as float32: as `int4_slices`, word by word."""
    LOW: tl.constexpr = SLICE < 5
    moved = words if LOW else words >> 20
    AT: tl.constexpr = 4 * SLICE if LOW else 4 * SLICE - 20
    mantissa = (moved & (15 << AT)) ^ (0x4B000000 | (8 << AT))
    UNIT: tl.constexpr = 1.0 / (1 << AT)
    return mantissa.to(tl.float32, bitcast=True) * UNIT - (8388608.0 * UNIT + 8.0)


@triton.jit
def code_slices(words, BITS: tl.constexpr, DOT: tl.constexpr):
    """Levels of the eight slices of codes, in units of the code's scale. words: int16 of two bits, uint8 of one; any shape."""
    if BITS == 2 and tl.float16 == DOT:
        return tl.inline_asm_elementwise(
            _CODE_LEVELS, "=r,=r,=r,=r,=r,=r,=r,=r,r", [words],
            (tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        return (
            code_levels(wide, 0, BITS, DOT), code_levels(wide, 1, BITS, DOT), code_levels(wide, 2, BITS, DOT),
            code_levels(wide, 3, BITS, DOT), code_levels(wide, 4, BITS, DOT), code_levels(wide, 5, BITS, DOT),
            code_levels(wide, 6, BITS, DOT), code_levels(wide, 7, BITS, DOT),
        )  # fmt: skip


@triton.jit
def code_levels(words, SLICE: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """Levels of one slice of codes, in units of the code's scale. words: int32 (16 bits used, or 8), any shape."""
    if BITS == 1:
        level = tl.full(words.shape, 1.0, tl.float32)
    else:
        level = tl.where((words & (1 << (2 * SLICE))) != 0, _OUTER, _INNER)
    sign = (words << (32 - BITS * (SLICE + 1))) & _SIGN
    return (level.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True).to(DOT)


@triton.jit
def load_words(rows, row, channel, mask, FORMAT: tl.constexpr, CHANNELS: tl.constexpr):
    """The packed words of int4 rows, int32 in the shape of `row` and `channel` together; 0 for other formats.

    rows: as `packed_view` gives them; row: int64, rows counted in [C, H] order; channel: int32 below CHANNELS / 8; mask: of
    both. Where CHANNELS is a multiple of 32, rows begin at multiples of 16 bytes and are loaded by so many.
    """
    if FORMAT == INT4:
        return tl.load(rows + row * (CHANNELS // _SLICES) + channel, mask=mask, other=0)
    else:
        return 0


@triton.jit
def load_slice(
    rows, row, channel, mask, SLICE: tl.constexpr, FORMAT: tl.constexpr, CHANNELS: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """Levels of slice `SLICE` of int8 or bf16 rows, without their scale; arguments as of `load_words`."""
    at = row * CHANNELS + SLICE * (CHANNELS // _SLICES) + channel
    return tl.load(rows + at, mask=mask, other=0).to(DOT)


@triton.jit
def first_columns(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEPT: tl.constexpr):
    """The first KEPT of COLUMNS columns, both powers of two: without what `tl.dot` padded."""
    if COLUMNS > KEPT:
        halves = tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1))
        first, _ = tl.split(halves)
        return first_columns(first, ROWS, COLUMNS // 2, KEPT)
    else:
        return x


@triton.jit
def slice_scales(scales, row, mask, SLICE: tl.constexpr, CHANNELS: tl.constexpr, PER_SCALE: tl.constexpr):
    """float32 scales of slice `SLICE`, in the shape of `row`; bf16 rows have none."""
    at: tl.constexpr = SLICE * (CHANNELS // _SLICES) // PER_SCALE
    return tl.load(scales + row * (CHANNELS // PER_SCALE) + at, mask=mask, other=0.0).to(tl.float32)


_PACKED_DTYPES = {"int4": torch.int32, "int8": torch.int8, "bf16": torch.bfloat16}


def packed_view(packed: torch.Tensor, codec: RowCodec) -> torch.Tensor:
    """Packed rows uint8 [..., packed_bytes] as kernels read them: words of int4, bytes of int8, numbers in bf16."""
    return packed.view(_PACKED_DTYPES[codec.name])


class LayerArrays(NamedTuple):
    """One layer of the index as kernels read it; scales are None for rows in bf16."""

    key_rows: torch.Tensor  # [C, H, ...], as `packed_view` gives it
    key_scales: torch.Tensor | None  # bf16 [C, H, scales]
    value_rows: torch.Tensor
    value_scales: torch.Tensor | None
    spread: torch.Tensor  # bf16 [C, H]
    cluster_end: torch.Tensor  # int16 [C, H]
    vectors: torch.Tensor  # bf16 [pages, H, 3, D/4]
    factors: torch.Tensor  # int32 [pages, H, 3, D/8], the same: int4 rows of movement
    members: torch.Tensor  # int16 [S, H]
    codes: torch.Tensor | None  # [S, H, D/8]: int16 for two bits, uint8 for one
    code_scales: torch.Tensor | None  # bf16 [S, H]


def layer_arrays(index: ClusterIndex, layer: int) -> LayerArrays:
    """Views of one layer's arrays; made once per index and layer."""
    key = ("triton", layer)
    if key not in index.scratch:
        view, codes = index.layer(layer), index.layer(layer).codes
        if codes is not None and index.config.code_bits == 2:
            codes = codes.view(torch.int16)
        index.scratch[key] = LayerArrays(
            packed_view(view.key_rows, index.row_codec), view.key_scales,
            packed_view(view.value_rows, index.row_codec), view.value_scales,
            view.spread, view.cluster_end, view.segment_vectors, view.segment_vectors.view(torch.int32), view.members, codes,
            view.code_scales,
        )  # fmt: skip
    return index.scratch[key]


def row_constants(codec: RowCodec) -> dict[str, int]:
    """The constants by which kernels know a row format, by argument name."""
    return {
        "FORMAT": ROW_FORMATS[codec.name],
        "CHANNELS": codec.head_dim,
        "PER_SCALE": channels_per_scale(codec.head_dim),
    }


def row_arguments(codec: RowCodec) -> tuple[dict[str, str], dict[str, None]]:
    """A kernel's arguments `rows` and `row_scales` in its compile cases: their types, and which of them is None."""
    packed = {"int4": "*i32", "int8": "*i8", "bf16": "*bf16"}[codec.name]
    return ({"rows": packed, "row_scales": "*bf16"}, {}) if codec.scales else ({"rows": packed}, {"row_scales": None})


def is_interpreted() -> bool:
    """Whether this module's kernels, and those defined with them, run in Triton's interpreter."""
    return not isinstance(int4_slices, triton.JITFunction)


@functools.cache
def _capability() -> int:
    """10 times the compute capability of this process's GPU; 0: there is none."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def register_limit(limits: Mapping[int, int]) -> dict[str, int]:
    """The option of a launch that limits registers to what `limits` has for this GPU, see `CompileCase`.

    Where ptxas takes a few more than let another program fit an SM, or spills some to let it fit.
    """
    limit = limits.get(_capability())
    return {} if limit is None else {"maxnreg": limit}


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype in which kernels multiply a query of `dtype`: its own, or float32 in the interpreter."""
    return tl.float32 if is_interpreted() else _TRITON_DTYPES[dtype]


def padded_slice(head_dim: int) -> int:
    """Channels of a slice, padded to what `tl.dot` can take as its inner size."""
    return max(16, triton.next_power_of_2(head_dim // SLICES))


def padded_group(group: int, least: int = 16) -> int:
    """Query heads of a kv head, padded to what `tl.dot` can take as its outer size.

    Tensor cores compute 16 rows of any that are fewer, but 8 take half of the registers afterwards.
    """
    return max(least, triton.next_power_of_2(group))
