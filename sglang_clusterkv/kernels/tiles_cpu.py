"""Products of tiles, for the CPU kernels in which many rows meet many others: built in LLVM.

A tile has a column for each of up to `WIDTH` rows (queries, or tokens), so that a vector holds one channel of as many of them.
What it meets is read where it lies, a channel at a time and spread over a vector: rows of the pool and of weights are neither
copied nor turned. A column's sums are in the order of channels, or of rows, so they are the same whatever stands in the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import NEGLIGIBLE, part
from sglang_clusterkv.kernels.llvm_cpu import REAL, WORD, Build, Loop, constants, levels_type

WIDTH = 48  # columns of a tile, at most
STEP, DOUBLE = 16, 32  # columns of a tile are a multiple of the first
# Rows that meet a tile together, at most; lists of addresses, and what is written by them, have room for so many more.
TOGETHER = 8
_VECTORS = 3  # columns that are computed together, in vectors, at most
# 2 ** x for |x| <= 1/2, within 2e-8: interpolated at Chebyshev's points.
_POWERS = tuple(float(c) for c in np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5]).convert(
    kind=np.polynomial.Polynomial
).coef)  # fmt: skip
_LEAST = -125.0  # below it 2 ** x counts as 0


def _columns(b: Build, width: int) -> list[list[int]]:
    """The first columns of a tile's vectors, by those that are computed together."""
    firsts = list(range(0, width, b.lanes))
    parts = -(-len(firsts) // _VECTORS)
    size = -(-len(firsts) // parts)
    return [firsts[i : i + size] for i in range(0, len(firsts), size)]


def _together(b: Build, vectors: int) -> int:
    """Rows that meet so many vectors together."""
    return next(rows for rows in (TOGETHER, 4, 2, 1) if rows * vectors <= b.registers or rows == 1)


class _Array:
    """A row-major float32 array, by its first element."""

    def __init__(self, b: Build, kind: Any, array: Any) -> None:
        self._b, self._start = b, b.address(kind, array)

    def at(self, row: Any, column: int) -> Any:
        """A pointer; rows have `WIDTH` columns."""
        b = self._b
        place = b.builder.add(b.builder.mul(row, b.place(WIDTH)), b.place(column))
        return b.builder.gep(self._start, [place])

    def vector(self, row: Any, column: int) -> Any:
        """The vector that begins there."""
        return self._b.load(self.at(row, column), REAL, self._b.lanes)


def _row_at(b: Build, kind: Any, addresses: Any, i: Any) -> Any:
    """A pointer to the float32 of a listed row."""
    return b.builder.inttoptr(b.builder.load(b.address(kind, addresses, i)), REAL.as_pointer())


def _add_products(b: Build, loop: Loop, values: list[Any], met: list[Any]) -> None:
    """End a loop over what is summed: its sums and, for each pointer to a value, the value times each vector that it meets."""
    totals = []
    for r, pointer in enumerate(values):
        value = b.spread(b.builder.load(pointer), b.lanes)
        for v, vector in enumerate(met):
            totals.append(b.multiply_add(value, vector, loop.carried[r * len(met) + v]))
    loop.end(totals)


def _store(b: Build, loop: Loop, out: _Array, places: list[Any], firsts: list[int]) -> None:
    """A loop's sums, into the vectors that begin at these columns, of each of these rows."""
    for r, place in enumerate(places):
        for v, first in enumerate(firsts):
            b.store(loop.carried[r * len(firsts) + v], out.at(place, first))


def _least(b: Build, x: Any, y: Any) -> Any:
    return b.builder.select(b.builder.icmp_signed("<", x, y), x, y)


@intrinsic(prefer_literal=True)
def multiply_rows(
    typing_context: Any,
    width: Any,
    onto: Any,
    addresses: Any,
    count: Any,
    channels: Any,
    tile: Any,
    out: Any,
    ahead: Any,
) -> Any:
    """out[i] = sum over channels d of row i [d] * tile[d], for every column and 0 <= i < count.

    Args:
        width: literal, columns, a multiple of `STEP`.
        onto: literal, 1: the sums go on from what is in out; 0: they begin.
        addresses: int64 [n], where the rows' float32 lie; has `TOGETHER` more entries that are rows too.
        count: of rows.
        channels: of a row.
        tile: float32 [channels, WIDTH].
        out: float32 [n + TOGETHER, WIDTH].
        ahead: as addresses, rows that are needed soon, and begin to be loaded as the others do, if `channels` is a constant.
    """
    columns, goes_on = width.literal_value, onto.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        tile_of, out_of = _Array(b, kinds[5], args[5]), _Array(b, kinds[6], args[6])
        zero, last = ir.Constant(levels_type(b.lanes), None), builder.add(args[3], b.place(-1))
        for firsts in _columns(b, columns):
            together = _together(b, len(firsts))
            loop = Loop(b, args[3], together, [])
            places = [builder.add(loop.i, b.place(r)) for r in range(together)]
            rows = [_row_at(b, kinds[2], args[2], place) for place in places]
            for place in places if isinstance(channels, types.Literal) else ():
                following = _least(b, builder.add(place, b.place(3 * together)), last)
                for row in (_row_at(b, kinds[2], args[2], following), _row_at(b, kinds[7], args[7], place)):
                    b.prefetch(row, 4 * channels.literal_value)
            so_far = [out_of.vector(place, first) if goes_on else zero for place in places for first in firsts]
            inner = Loop(b, args[4], 1, so_far)
            met = [tile_of.vector(inner.i, first) for first in firsts]
            _add_products(b, inner, [builder.gep(row, [inner.i]) for row in rows], met)
            _store(b, inner, out_of, places, firsts)
            loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(width, onto, addresses, place, place, tile, out, ahead), codegen


@intrinsic(prefer_literal=True)
def add_rows_to_tile(
    typing_context: Any, width: Any, channels: Any, addresses: Any, count: Any, weights: Any, keep: Any, out: Any
) -> Any:
    """out[d] = keep * out[d] + sum over rows i < count of row i [d] * weights[i], for every column and channel d.

    Args:
        width: literal, columns, a multiple of `STEP`.
        channels: literal, of a row, a multiple of `TOGETHER`.
        addresses: int64 [n], where the rows' float32 lie.
        count: of rows, at least one.
        weights: float32 [n, WIDTH].
        keep: float32 [1, WIDTH].
        out: float32 [channels, WIDTH].
    """
    columns, size = width.literal_value, channels.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        weights_of, keep_of, out_of = (_Array(b, kinds[i], args[i]) for i in (4, 5, 6))
        for firsts in _columns(b, columns):
            together = _together(b, len(firsts))
            loop = Loop(b, b.place(size), together, [])
            places = [builder.add(loop.i, b.place(r)) for r in range(together)]
            kept = [keep_of.vector(b.place(0), first) for first in firsts]
            totals = [
                builder.fmul(out_of.vector(place, first), kept[v]) for place in places for v, first in enumerate(firsts)
            ]
            inner = Loop(b, args[3], 1, totals)
            row = _row_at(b, kinds[2], args[2], inner.i)
            met = [weights_of.vector(inner.i, first) for first in firsts]
            _add_products(b, inner, [builder.gep(row, [place]) for place in places], met)
            _store(b, inner, out_of, places, firsts)
            loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(width, channels, addresses, place, weights, keep, out), codegen


def _larger(b: Build, x: Any, y: Any) -> Any:
    return b.builder.select(b.builder.fcmp_ordered(">", x, y), x, y)


def _power_of_two(b: Build, x: Any) -> Any:
    """2 ** x of a vector that is at most a little above 0."""
    kind = levels_type(b.lanes)
    whole = b.call(f"llvm.nearbyint.v{b.lanes}f32", kind, x)
    rest = b.builder.fsub(x, whole)
    power = _same(b, _POWERS[-1])
    for coefficient in _POWERS[-2::-1]:
        power = b.multiply_add(power, rest, _same(b, coefficient))
    words = ir.VectorType(WORD, b.lanes)
    moved = b.builder.shl(b.builder.fptosi(whole, words), constants(WORD, [23] * b.lanes))
    power = b.builder.bitcast(b.builder.add(b.builder.bitcast(power, words), moved), kind)
    return b.builder.select(b.builder.fcmp_ordered("<", x, _same(b, _LEAST)), ir.Constant(kind, None), power)


def _same(b: Build, value: float) -> Any:
    return constants(REAL, [float(np.float32(value))] * b.lanes)


@intrinsic(prefer_literal=True)
def exponentials_of_tile(
    typing_context: Any, width: Any, count: Any, logits: Any, most: Any, total: Any, keep: Any
) -> Any:
    """Replace logits, to the base 2, by their powers of two relative to a column's largest so far.

    Args:
        width: literal, columns, a multiple of `STEP`.
        count: of rows, at least one.
        logits: float32 [n, WIDTH].
        most: float32 [1, WIDTH], a column's largest logit before, and after.
        total: float32 [1, WIDTH], a column's sum of powers before, and after, relative to that.
        keep: float32 [1, WIDTH], by what powers from before have to be multiplied, written.
    """
    columns = width.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        logits_of, most_of, total_of, keep_of = (_Array(b, kinds[i], args[i]) for i in (2, 3, 4, 5))
        zero, row = ir.Constant(levels_type(b.lanes), None), b.place(0)
        for firsts in _columns(b, columns):
            before = [most_of.vector(row, first) for first in firsts]
            loop = Loop(b, args[1], 1, before)
            found = [_larger(b, logits_of.vector(loop.i, first), loop.carried[v]) for v, first in enumerate(firsts)]
            loop.end(found)
            largest = loop.carried
            loop = Loop(b, args[1], 1, [zero] * len(firsts))
            sums = []
            for v, first in enumerate(firsts):
                power = _power_of_two(b, builder.fsub(logits_of.vector(loop.i, first), largest[v]))
                b.store(power, logits_of.at(loop.i, first))
                sums.append(builder.fadd(loop.carried[v], power))
            loop.end(sums)
            for v, first in enumerate(firsts):
                kept = _power_of_two(b, builder.fsub(before[v], largest[v]))
                b.store(kept, keep_of.at(row, first))
                b.store(largest[v], most_of.at(row, first))
                b.store(b.multiply_add(total_of.vector(row, first), kept, loop.carried[v]), total_of.at(row, first))
        return context.get_dummy_value()

    return types.void(width, types.intp, logits, most, total, keep), codegen


@intrinsic(prefer_literal=True)
def merge_tiles(
    typing_context: Any, width: Any, channels: Any, most: Any, total: Any, sums: Any, more_most: Any, more_total: Any,
    more_sums: Any,
) -> Any:  # fmt: skip
    """Merge a second part of a softmax, as `exponentials_of_tile` and `add_rows_to_tile` leave them, into a first one.

    Args:
        width: literal, columns, a multiple of `STEP`.
        channels: literal, of the sums.
        most: float32 [1, WIDTH], changed, as are the next two.
        total: float32 [1, WIDTH].
        sums: float32 [channels, WIDTH].
        more_most: of the second part, as are the next two.
    """
    columns, size = width.literal_value, channels.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        parts = [[_Array(b, kinds[i], args[i]) for i in range(first, first + 3)] for first in (2, 5)]
        row = b.place(0)
        for first in range(0, columns, b.lanes):
            mosts = [part[0].vector(row, first) for part in parts]
            largest = _larger(b, *mosts)
            shares = [_power_of_two(b, builder.fsub(most_of, largest)) for most_of in mosts]
            b.store(largest, parts[0][0].at(row, first))

            def merged(which: int, at: Any, first: int = first, shares: list[Any] = shares) -> None:
                mine, other = (
                    builder.fmul(part[which].vector(at, first), share)
                    for part, share in zip(parts, shares, strict=True)
                )
                b.store(builder.fadd(mine, other), parts[0][which].at(at, first))

            merged(1, row)
            loop = Loop(b, b.place(size), 1, [])
            merged(2, loop.i)
            loop.end([])
        return context.get_dummy_value()

    return types.void(width, channels, most, total, sums, more_most, more_total, more_sums), codegen


@part
def aligned(floats: int) -> Any:
    """So many float32, uninitialised, of which the first begins a line of memory."""
    room = np.empty(floats + 16, np.float32)
    first = (-room.ctypes.data % 64) // 4
    return room[first : first + floats]


@part
def start_parts(most: Any, total: Any, sums: Any) -> None:
    """No part of a softmax yet."""
    most[:] = NEGLIGIBLE
    total[:] = np.float32(0.0)
    sums[:] = np.float32(0.0)
