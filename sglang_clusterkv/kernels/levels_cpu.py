"""Products of queries with rows of 4-bit levels, in integers: a row's levels are bytes, and so are three digits of a query.

Rows go `BLOCK` together, or half as many where vectors are half as long: `unpack_levels` lays them out so that a lane of a
vector is a row, and `dot_levels` adds up bytes four at a time without a sum across lanes. What is unpacked once may meet many
queries. A channel of a query is rounded to 21 bits of its head's largest, and a sign (`split_queries`). Sums of integers are
exact, so that a product depends neither on the rows beside it nor on the machine's vectors.

Words i to i + 3 of a row are a piece. Byte k of all four words become one word, so that all of its channels share a scale:
vector (piece, k, half) has, per row, channels i to i + 3 of slice 2 k + half (memory/codec.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import FAST, larger, njit, part
from sglang_clusterkv.kernels.llvm_cpu import (
    BYTE,
    HALF,
    REAL,
    WORD,
    Build,
    Loop,
    constants,
    levels_type,
    target_features,
)
from sglang_clusterkv.kernels.vectors_cpu import INT4
from sglang_clusterkv.memory.codec import SLICES, channels_per_scale

BLOCK = 16  # rows that are unpacked together at most; lists and results have room for as many more
DIGITS = 3  # of a query's level, the first of 127 at most
_BASE = 128
_FACTORS = [_BASE**2, _BASE, 1]
MOST = 127 * _BASE**2  # a level's size
_PIECE = 16  # bytes


def serves(row_format: int, channels: int) -> bool:
    """Whether rows of this format have products in integers on numba's target, which is not always this machine."""
    return row_format == INT4 and channels % 32 == 0 and 64 <= channels <= 256 and "avx2" in target_features()


def scales_of(channels: int) -> int:
    """Scales of a row."""
    return channels // channels_per_scale(channels)


@njit(inline="always")
def digits_of(level: Any) -> tuple[Any, Any, Any]:
    """The digits of a float32 that is rounded, as float32, high ones first; `MOST` at most in size."""
    square, base, half = np.float32(_BASE**2), np.float32(_BASE), np.float32(_BASE // 2)
    rounded = np.rint(level)
    high = np.floor((rounded + half * (base + np.float32(1.0))) / square)  # what two digits may be below zero
    rest = rounded - high * square
    middle = np.floor((rest + half) / base)
    return high, middle, rest - middle * base


@njit(inline="always")
def number_of(highs: Any, middles: Any, lows: Any) -> Any:
    """What sums of digits stand for."""
    return (np.int64(highs) * _BASE + np.int64(middles)) * _BASE + np.int64(lows)


@functools.cache
def split_queries(channels: int, group: int) -> Callable[..., None]:
    """Compile the splitting of one (request, kv head)'s queries into bytes, for one head_dim and group size.

    q [G, D]. Outputs: digits int8 [G, DIGITS, D], high ones first, in the order of a row's vectors; start int32 [G, scales],
    what a sum begins with, for levels are stored eight higher; unit float32 [G], of a query's levels.
    """
    words, scales = channels // SLICES, scales_of(channels)
    shared = channels // scales
    most = np.float32(MOST)

    @part(fastmath=FAST)
    def split(q: Any, digits: Any, start: Any, unit: Any, flat: Any) -> None:
        for g in range(group):
            largest = np.float32(0.0)
            for d in range(channels):
                largest = larger(largest, abs(q[g, d]))
            unit[g] = largest / most
            inverse = most / largest if largest > 0 else np.float32(0.0)
            for k in range(scales):
                highs, middles, lows = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for d in range(k * shared, (k + 1) * shared):
                    high, middle, low = digits_of(q[g, d] * inverse)
                    flat[0, d], flat[1, d], flat[2, d] = np.int8(high), np.int8(middle), np.int8(low)
                    highs += high
                    middles += middle
                    lows += low
                start[g, k] = -8 * number_of(highs, middles, lows)
            for which in range(DIGITS):
                for piece in range(words // 4):
                    for j in range(SLICES):
                        for i in range(4):
                            digits[g, which, (piece * SLICES + j) * 4 + i] = flat[which, j * words + 4 * piece + i]

    return split


def transposed(b: Build, rows: list[Any]) -> list[Any]:
    """In each 128 bits the k-th words of four vectors, as the k-th of the four."""

    def pick(a: Any, other: Any, lanes: list[int]) -> Any:
        return b.pick(
            a,
            [first + (lane - 4 + b.lanes if lane > 3 else lane) for first in range(0, b.lanes, 4) for lane in lanes],
            other,
        )

    low, high = [0, 4, 1, 5], [2, 6, 3, 7]
    ab, cd = (
        [pick(rows[0], rows[1], order) for order in (low, high)],
        [pick(rows[2], rows[3], order) for order in (low, high)],
    )
    return [pick(ab[i], cd[i], order) for i in range(2) for order in ([0, 1, 4, 5], [2, 3, 6, 7])]


@intrinsic(prefer_literal=True)
def unpack_levels(
    typing_context: Any, channels: Any, packed: Any, scales: Any, rows: Any, begin: Any, count: Any, head: Any, levels: Any,
    factors: Any,
) -> Any:  # fmt: skip
    """Rows rows[begin : begin + count] of a kv head, for `dot_levels`.

    Args:
        channels: literal.
        packed: uint8 [row, head, D/2].
        scales: uint16 [row, head, scales], bits of bf16.
        rows: int64 [n]; has 2 `BLOCK` more entries that are rows too.
        levels: uint8 [D * (count, rounded up to `BLOCK`)].
        factors: float32 [scales * likewise].
    """
    size = channels.literal_value
    number = scales_of(size)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        lanes, quarter = b.lanes, b.lanes // 4
        loop = Loop(b, args[5], lanes, [])
        first = builder.add(loop.i, args[4])
        listed = [builder.load(b.address(kinds[3], args[3], builder.add(first, b.place(r)))) for r in range(2 * lanes)]
        pointers = [b.address(kinds[1], args[1], row, args[6]) for row in listed]
        for pointer in pointers[lanes:]:
            b.prefetch(pointer, size // 2)
        target = b.address(kinds[7], args[7], builder.mul(loop.i, b.place(size)))
        for piece in range(size // 2 // _PIECE):
            at = [
                builder.gep(builder.bitcast(pointer, BYTE.as_pointer()), [WORD(piece * _PIECE)])
                for pointer in pointers[:lanes]
            ]
            vectors = [joined(b, [b.load(at[4 * lane + a], WORD, 4) for lane in range(quarter)]) for a in range(4)]
            for k, vector in enumerate(transposed(b, [_sorted_bytes(b, vector) for vector in vectors])):
                upper = builder.lshr(vector, constants(WORD, [4] * lanes))
                for half, shifted in enumerate((vector, upper)):
                    nibbles = builder.and_(shifted, constants(WORD, [0x0F0F0F0F] * lanes))
                    raised = builder.xor(nibbles, constants(WORD, [0x08080808] * lanes))
                    place = ((piece * 4 + k) * 2 + half) * 4 * lanes
                    b.store(raised, builder.gep(target, [WORD(place)]))
        target = b.address(kinds[8], args[8], builder.mul(loop.i, b.place(number)))
        origin = [b.address(kinds[2], args[2], row, args[6]) for row in listed[:lanes]]
        for pair in range(number // 2):
            both = ir.Constant(ir.VectorType(WORD, lanes), ir.Undefined)
            for r, pointer in enumerate(origin):
                at = builder.gep(builder.bitcast(pointer, WORD.as_pointer()), [WORD(pair)])
                both = builder.insert_element(both, builder.load(at, align=2), WORD(r))
            even = builder.shl(both, constants(WORD, [16] * lanes))
            odd = builder.and_(both, constants(WORD, [-(1 << 16)] * lanes))
            for which, found in enumerate((even, odd)):
                place = builder.gep(target, [WORD((2 * pair + which) * lanes)])
                b.store(builder.bitcast(found, levels_type(lanes)), place)
        loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(channels, packed, scales, rows, place, place, place, levels, factors), codegen


def joined(b: Build, parts: list[Any]) -> Any:
    """Vectors one behind the other."""
    while len(parts) > 1:
        size = parts[0].type.count
        parts = [b.pick(x, list(range(2 * size)), y) for x, y in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _sorted_bytes(b: Build, words: Any) -> Any:
    """Byte k of four words as word k, in each 128 bits."""
    count = 4 * b.lanes
    octets = b.builder.bitcast(words, ir.VectorType(BYTE, count))
    order = [first + 4 * i + k for first in range(0, count, _PIECE) for k in range(4) for i in range(4)]
    return b.builder.bitcast(b.pick(octets, order), words.type)


class Sums:
    """Sums of products of a row's bytes with a digit of a query, by whatever the target has."""

    def __init__(self, b: Build) -> None:
        self._b = b
        self._wide = "avx512vnni" in b.features if b.lanes == 16 else False
        self._width = 32 * b.lanes
        count = b.lanes if self._wide else 2 * b.lanes
        kind = WORD if self._wide else HALF
        self.zero = ir.Constant(ir.VectorType(kind, count), None)

    def add(self, total: Any, levels: Any, digits: Any) -> Any:
        """total, and for each word the products of its four bytes, unsigned, with four signed ones; words [lanes] both."""
        b = self._b
        if self._wide:
            return b.call(f"llvm.x86.avx512.vpdpbusd.{self._width}", total.type, total, levels, digits)
        octets = ir.VectorType(BYTE, 4 * b.lanes)
        name = "llvm.x86.avx512.pmaddubs.w.512" if b.lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"
        # No pair of products passes 16 bits, nor do those of the 32 channels of a scale together.
        pairs = b.call(name, total.type, b.builder.bitcast(levels, octets), b.builder.bitcast(digits, octets))
        return b.builder.add(total, pairs)

    def joined(self, digits: list[Any], start: Any) -> Any:
        """start and the sums of each digit, times what it stands for; words [lanes]."""
        b, total = self._b, start
        name = "llvm.x86.avx512.pmaddw.d.512" if b.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
        for found, factor in zip(digits, _FACTORS, strict=True):
            if self._wide:
                whole = b.builder.shl(found, constants(WORD, [factor.bit_length() - 1] * b.lanes))
            else:
                whole = b.call(name, start.type, found, constants(HALF, [factor] * (2 * b.lanes)))
            total = b.builder.add(total, whole)
        return total


@intrinsic(prefer_literal=True)
def dot_levels(
    typing_context: Any, channels: Any, group: Any, levels: Any, factors: Any, count: Any, digits: Any, start: Any, unit: Any,
    out: Any,
) -> Any:  # fmt: skip
    """out[g, i] = q[g] . row i of `count` unpacked ones, for every query head g.

    Args:
        channels: literal, as is group.
        levels: as `unpack_levels` leaves them, as are the factors.
        count: rows.
        digits: as `split_queries` leaves them, as are start and unit.
        out: float32 [G, n]; up to `BLOCK` more columns are written.
    """
    size, heads = channels.literal_value, group.literal_value
    number = scales_of(size)
    slices = SLICES // number  # that share a scale

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        lanes, sums = b.lanes, Sums(b)
        units = [b.spread(builder.load(b.address(kinds[7], args[7], b.place(g))), lanes) for g in range(heads)]
        loop = Loop(b, args[4], lanes, [])
        origin = b.address(kinds[2], args[2], builder.mul(loop.i, b.place(size)))
        factor_origin = builder.bitcast(
            b.address(kinds[3], args[3], builder.mul(loop.i, b.place(number))), REAL.as_pointer()
        )
        at_once, zero = b.registers // DIGITS, ir.Constant(levels_type(lanes), None)
        for begin in range(0, heads, at_once):
            tile = range(begin, min(begin + at_once, heads))
            by_scale = Loop(b, b.place(number), 1, [zero] * len(tile))
            scale = by_scale.i
            before = builder.mul(scale, b.place(4 * slices))  # bytes of a row in the vectors of earlier scales
            vectors = builder.gep(origin, [builder.mul(before, b.place(lanes))])
            found = {(g, which): sums.zero for g in tile for which in range(DIGITS)}
            for piece in range(size // 2 // _PIECE):
                for j in range(slices):
                    place = (piece * SLICES + j) * 4
                    vector = b.load(builder.gep(vectors, [WORD(place * lanes)]), WORD, lanes)
                    at = builder.add(before, b.place(place))
                    for g, which in found:
                        four = b.address(kinds[5], args[5], b.place(g), b.place(which), at)
                        word = builder.load(builder.bitcast(four, WORD.as_pointer()), align=1)
                        found[g, which] = sums.add(found[g, which], vector, b.spread(word, lanes))
            factor = b.load(builder.gep(factor_origin, [builder.mul(scale, b.place(lanes))]), REAL, lanes)
            totals = []
            for i, g in enumerate(tile):
                begins = b.spread(builder.load(b.address(kinds[6], args[6], b.place(g), scale)), lanes)
                digits = [found[g, which] for which in range(DIGITS)]
                whole = builder.sitofp(sums.joined(digits, begins), levels_type(lanes))
                totals.append(b.multiply_add(whole, factor, by_scale.carried[i]))
            by_scale.end(totals)
            for i, g in enumerate(tile):
                place = b.address(kinds[8], args[8], b.place(g), loop.i)
                b.store(builder.fmul(by_scale.carried[i], units[g]), place)
        loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(channels, group, levels, factors, place, digits, start, unit, out), codegen
