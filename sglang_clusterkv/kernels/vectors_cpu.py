"""Dot products with rows, and sums of rows, for the CPU kernels: whole vectors, built in LLVM for each format of a row.

A decode step spends its time on `dot_rows` and `add_rows`. A row is unpacked in registers and meets all query heads of
its kv head there; up to four rows go together, so that their sums across lanes share the shuffles. What a row gives does
not depend on the rows beside it, so lists may be cut anywhere.

Vectors have 16 floats where numba's target has AVX-512, else 8. Levels of 4 bits and codes are looked up in a register where
there is an instruction for it, else computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.fp8_cpu import floats_of_fp8
from sglang_clusterkv.kernels.llvm_cpu import AHEAD, BYTE, HALF, REAL, WORD, Build, Loop, constants, levels_type
from sglang_clusterkv.memory.codec import INNER_LEVEL, OUTER_LEVEL, channels_per_scale

# Formats of a row: of the index's (memory/codec.py), of the pool's, of codes. Those before FLOAT32 have scales per channels.
INT4, INT8, BF16, FLOAT32, E4M3, E5M2, CODES_2, CODES_1 = range(8)
ROW_FORMATS = {"int4": INT4, "int8": INT8, "bf16": BF16}
# Rows that are computed together at most; lists have room for as many more entries, and so have their results.
TOGETHER = 4


class _Rows:
    """Rows of one format, unpacked a vector at a time.

    Args:
        build: of the intrinsic.
        row_format: see above.
        channels: of a row.
        packed: pointer to the row's packed channels.
        scales: pointer to its scales, for formats that have some.
    """

    def __init__(self, build: Build, row_format: int, channels: int, packed: Any, scales: Any) -> None:
        self._build, self._format, self._channels, self._packed = build, row_format, channels, packed
        self._words = channels // 8
        self._shared = channels_per_scale(channels)
        self._tables: dict[int, Any] = {}
        if row_format in (INT4, INT8):
            self._scales = build.floats_of_bf16(build.load(scales, HALF, channels // self._shared))
        if row_format == INT4:
            self._levels = build.load(packed, WORD, self._words)
        elif row_format in (CODES_2, CODES_1):
            stored = build.load(packed, HALF if row_format == CODES_2 else BYTE, self._words)
            self._levels = build.builder.zext(stored, ir.VectorType(WORD, self._words))

    def vector(self, first: int) -> Any:
        """Channels `first` and following, as many as a vector has."""
        b, lanes = self._build, self._build.lanes
        if self._format in (INT8, BF16, FLOAT32, E4M3, E5M2):
            kind = {INT8: BYTE, BF16: HALF, FLOAT32: REAL, E4M3: BYTE, E5M2: BYTE}[self._format]
            at = b.builder.gep(b.builder.bitcast(self._packed, kind.as_pointer()), [WORD(first)])
            loaded = b.load(at, kind, lanes)
            if self._format == FLOAT32:
                return loaded
            if self._format == BF16:
                return b.floats_of_bf16(loaded)
            if self._format in (E4M3, E5M2):
                return floats_of_fp8(b.builder, loaded, self._format == E4M3, "f16c" in b.features)
            wide = b.builder.sext(loaded, ir.VectorType(WORD, lanes))
            return b.builder.fmul(b.builder.sitofp(wide, ir.VectorType(REAL, lanes)), self._scale(first))
        channels = range(first, first + lanes)
        words = b.pick(self._levels, [c % self._words for c in channels])
        slices = [c // self._words for c in channels]
        return self._nibbles(words, slices, first) if self._format == INT4 else self._codes(words, slices)

    def _scale(self, first: int) -> Any:
        """Scales of a vector's channels."""
        return self._build.pick(
            self._scales, [c // self._shared for c in range(first, first + self._build.lanes)]
        )  # fmt: skip

    def _nibbles(self, words: Any, slices: list[int], first: int) -> Any:
        b, lanes = self._build, self._build.lanes
        groups = {c // self._shared for c in range(first, first + lanes)}
        if lanes == 16 and len(groups) == 1:
            group = groups.pop()
            if group not in self._tables:  # the row's 16 values, of these channels
                levels = constants(REAL, [float(level) for level in (*range(8), *range(-8, 0))])
                self._tables[group] = b.builder.fmul(levels, self._scale(first))
            moved = b.builder.lshr(words, constants(WORD, [4 * j for j in slices]))
            return b.call("llvm.x86.avx512.permvar.sf.512", levels_type(16), self._tables[group], moved)
        left = b.builder.shl(words, constants(WORD, [28 - 4 * j for j in slices]))
        signed = b.builder.ashr(left, constants(WORD, [28] * lanes))
        return b.builder.fmul(b.builder.sitofp(signed, levels_type(lanes)), self._scale(first))

    def _codes(self, words: Any, slices: list[int]) -> Any:
        b, lanes = self._build, self._build.lanes
        if self._format == CODES_1:
            moved = b.builder.shl(words, constants(WORD, [31 - j for j in slices]))
            sign = b.builder.and_(moved, constants(WORD, [-(1 << 31)] * lanes))
            one = b.builder.bitcast(constants(REAL, [1.0] * lanes), sign.type)
            return b.builder.bitcast(b.builder.xor(one, sign), levels_type(lanes))
        moved = b.builder.lshr(words, constants(WORD, [2 * j for j in slices]))
        inner, outer = _single(INNER_LEVEL), _single(OUTER_LEVEL)
        name = {16: "llvm.x86.avx512.permvar.sf.512", 8: "llvm.x86.avx2.permps"}[lanes]
        if lanes == 16 or "avx2" in b.features:  # by the lowest bits, of which two are the code
            table = constants(REAL, [inner, outer, -inner, -outer] * (lanes // 4))
            return b.call(name, levels_type(lanes), table, moved)
        ones = constants(WORD, [1] * lanes)
        is_outer = b.builder.icmp_unsigned("!=", b.builder.and_(moved, ones), constants(WORD, [0] * lanes))
        size = b.builder.select(is_outer, constants(REAL, [outer] * lanes), constants(REAL, [inner] * lanes))
        sign = b.builder.shl(b.builder.lshr(moved, ones), constants(WORD, [31] * lanes))
        return b.builder.bitcast(b.builder.xor(b.builder.bitcast(size, sign.type), sign), levels_type(lanes))


def _single(value: float) -> float:
    """Rounded to float32: LLVM's constants are written as doubles."""
    return float(np.float32(value))


def lane_sums(b: Build, vectors: list[Any]) -> list[Any]:
    """The sums over the lanes of each vector, in lanes of as few vectors: lane i of the first is that of vectors[i].

    Always by halves, whichever lane a sum comes to lie in, so that it is the same number there.
    """
    found = []
    for begin in range(0, len(vectors), b.lanes):
        left = vectors[begin : begin + b.lanes]
        size = b.lanes
        while size > 1:
            size //= 2
            combined = []
            for i in range(min(size, len(left))):
                a, other = left[i], left[i + size] if i + size < len(left) else left[i]
                upper = [bool(lane & size) for lane in range(b.lanes)]
                mine = b.pick(a, [lane + b.lanes * up for lane, up in enumerate(upper)], other)
                theirs = b.pick(a, [(lane ^ size) + b.lanes * up for lane, up in enumerate(upper)], other)
                combined.append(b.builder.fadd(mine, theirs))
            left = combined
        found.append(left[0])
    return found


def row_bytes(row_format: int, channels: int) -> int:
    """Of a packed row, without its scales."""
    return {
        INT4: channels // 2, INT8: channels, BF16: 2 * channels, FLOAT32: 4 * channels, E4M3: channels, E5M2: channels,
        CODES_2: channels // 4, CODES_1: channels // 8,
    }[row_format]  # fmt: skip


@intrinsic(prefer_literal=True)
def dot_rows(
    typing_context: Any, row_format: Any, channels: Any, group: Any, packed: Any, scales: Any, rows: Any, begin: Any,
    count: Any, head: Any, q: Any, out: Any,
) -> Any:  # fmt: skip
    """out[g, i] = q[g] . row rows[i] of a kv head, for every query head g and begin <= i < begin + count.

    Args:
        row_format: literal, as are channels and group.
        packed: [row, head, ...], any type.
        scales: uint16 [row, head, scales], bits of bf16; anything for formats without.
        rows: int64 [n]; has `TOGETHER` more entries that are rows too, as `out` has as many columns that may be written.
        q: float32 [G, D].
        out: float32 [G, n].
    """
    number, size, heads = (value.literal_value for value in (row_format, channels, group))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        together = next(rows for rows in (TOGETHER, 2, 1) if rows * heads <= max(b.registers - 8, heads))
        loop = Loop(b, args[7], together, [])
        first = builder.add(loop.i, args[6])
        unpacked = []
        for r in range(together):
            i = builder.add(first, b.place(r))
            row = builder.load(b.address(kinds[5], args[5], i))
            scale = b.address(kinds[4], args[4], row, args[8]) if number in (INT4, INT8) else None
            unpacked.append(_Rows(b, number, size, b.address(kinds[3], args[3], row, args[8]), scale))
        last = builder.add(builder.add(args[6], args[7]), b.place(-1))
        for r in range(together):
            i = builder.add(first, b.place(r + AHEAD))
            within = builder.icmp_signed("<", i, last)
            row = builder.load(b.address(kinds[5], args[5], builder.select(within, i, last)))
            b.prefetch(b.address(kinds[3], args[3], row, args[8]), row_bytes(number, size))
        zero = ir.Constant(levels_type(b.lanes), None)
        totals = [zero] * (heads * together)
        for channel in range(0, size, b.lanes):
            levels = [rows_of.vector(channel) for rows_of in unpacked]
            for g in range(heads):
                of_query = b.load(b.address(kinds[9], args[9], b.place(g), b.place(channel)), REAL, b.lanes)
                for r, level in enumerate(levels):
                    totals[g * together + r] = b.multiply_add(of_query, level, totals[g * together + r])
        sums = lane_sums(b, totals)
        for g in range(heads):
            lane = g * together % b.lanes
            part = b.pick(sums[g * together // b.lanes], list(range(lane, lane + together)))
            b.store(part, b.address(kinds[10], args[10], b.place(g), first))
        loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(row_format, channels, group, packed, scales, rows, place, place, place, q, out), codegen


@intrinsic(prefer_literal=True)
def unpack_rows(
    typing_context: Any, row_format: Any, channels: Any, packed: Any, scales: Any, rows: Any, begin: Any, count: Any,
    head: Any, out: Any,
) -> Any:  # fmt: skip
    """out[i] = row rows[begin + i] of a kv head for 0 <= i < count: what `dot_rows` multiplies, to the bit.

    Arguments as for `dot_rows`; out float32 [count or more, 1, D].
    """
    number, size = (value.literal_value for value in (row_format, channels))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        last = builder.add(builder.add(args[5], args[6]), b.place(-1))
        loop = Loop(b, args[6], 1, [])
        i = builder.add(loop.i, args[5])
        row = builder.load(b.address(kinds[4], args[4], i))
        scale = b.address(kinds[3], args[3], row, args[7]) if number in (INT4, INT8) else None
        unpacked = _Rows(b, number, size, b.address(kinds[2], args[2], row, args[7]), scale)
        ahead = builder.add(i, b.place(AHEAD))
        within = builder.icmp_signed("<", ahead, last)
        next_row = builder.load(b.address(kinds[4], args[4], builder.select(within, ahead, last)))
        b.prefetch(b.address(kinds[2], args[2], next_row, args[7]), row_bytes(number, size))
        for channel in range(0, size, b.lanes):
            b.store(unpacked.vector(channel), b.address(kinds[8], args[8], loop.i, b.place(0), b.place(channel)))
        loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(row_format, channels, packed, scales, rows, place, place, place, out), codegen


@intrinsic(prefer_literal=True)
def add_rows(
    typing_context: Any, row_format: Any, channels: Any, group: Any, packed: Any, scales: Any, rows: Any, begin: Any,
    count: Any, head: Any, weights: Any, out: Any,
) -> Any:  # fmt: skip
    """out[g] += sum of weights[g, i] * row rows[i] of a kv head over begin <= i < begin + count, for every query head g.

    Arguments as for `dot_rows`; weights float32 [G, n], out float32 [G, D]. As many sums as fit stay in registers.
    """
    number, size, heads = (value.literal_value for value in (row_format, channels, group))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        vectors = list(range(0, size, b.lanes))
        at_once = max(1, b.registers // heads)
        last = builder.add(builder.add(args[6], args[7]), b.place(-1))
        for begin_at in range(0, len(vectors), at_once):
            tile = vectors[begin_at : begin_at + at_once]
            places = [
                b.address(kinds[10], args[10], b.place(g), b.place(channel)) for g in range(heads) for channel in tile
            ]
            loop = Loop(b, args[7], 1, [b.load(place, REAL, b.lanes) for place in places])
            i = builder.add(loop.i, args[6])
            row = builder.load(b.address(kinds[5], args[5], i))
            scale = b.address(kinds[4], args[4], row, args[8]) if number in (INT4, INT8) else None
            unpacked = _Rows(b, number, size, b.address(kinds[3], args[3], row, args[8]), scale)
            ahead = builder.add(i, b.place(AHEAD))
            within = builder.icmp_signed("<", ahead, last)
            next_row = builder.load(b.address(kinds[5], args[5], builder.select(within, ahead, last)))
            if begin_at == 0:
                b.prefetch(b.address(kinds[3], args[3], next_row, args[8]), row_bytes(number, size))
            levels = [unpacked.vector(channel) for channel in tile]
            totals = []
            for g in range(heads):
                weight = b.spread(builder.load(b.address(kinds[9], args[9], b.place(g), i)), b.lanes)
                for v, level in enumerate(levels):
                    totals.append(b.multiply_add(weight, level, loop.carried[g * len(tile) + v]))
            loop.end(totals)
            for total, place in zip(loop.carried, places, strict=True):
                b.store(total, place)
        return context.get_dummy_value()

    place = types.intp
    return types.void(row_format, channels, group, packed, scales, rows, place, place, place, weights, out), codegen
