"""Products of rotated queries with codes of 2 bits, in integers, where the target has AVX-512 and its VNNI.

As `levels_cpu.py` does it for rows in 4 bits: 16 rows go together, one to a lane, and a query's channel is three digits.
A code's levels are 3 and 10 steps, either sign, and stored ten higher as bytes. Nothing is kept of an unpacked row: what is
looked up meets all query heads at once.

Bytes 16 k to 16 k + 15 of a row are a piece, of 64 channels. Word i of a piece's four has, in crumbs j and j + 4 of its two
halves, four channels, which are multiplied together: vector (piece, i, j).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import FAST, larger, part
from sglang_clusterkv.kernels.levels_cpu import DIGITS, MOST, Sums, digits_of, joined, number_of, transposed
from sglang_clusterkv.kernels.llvm_cpu import BYTE, WORD, Build, Loop, constants, levels_type, target_features
from sglang_clusterkv.memory.codec import INNER_LEVEL, OUTER_LEVEL, SLICES

_INNER, _OUTER = 3, 10  # steps
_STEP = OUTER_LEVEL / _OUTER
_BYTES = 16  # of a piece
_CHANNELS = 4 * _BYTES
PIECES = 4  # of a row, at most


def serves(code_bits: int, channels: int) -> bool:
    """Whether codes of so many bits have products in integers on numba's target, which is not always this machine."""
    assert abs(INNER_LEVEL / _STEP - _INNER) < 1e-6
    known = {"avx512vnni", "avx512bw"} <= target_features()
    return known and code_bits == 2 and channels % _CHANNELS == 0 and channels <= PIECES * _CHANNELS


@functools.cache
def split_rotated(channels: int, group: int) -> Callable[..., None]:
    """Compile the splitting of one (request, kv head)'s rotated queries into bytes, for one head_dim and group size.

    q [G, D]. Outputs: digits int8 [G, DIGITS, D], high ones first, in the order of a row's vectors; start int32 [G, pieces],
    what a sum begins with, for levels are stored ten higher; unit float32 [G], of a query's levels times a code's step.
    """
    words, pieces = channels // SLICES, channels // _CHANNELS
    order = np.array(
        [
            (slice_ * words) + 8 * piece + 2 * i + half
            for piece in range(pieces)
            for i in range(4)
            for j in range(4)
            for half in range(2)
            for slice_ in (j, j + 4)
        ]
    )
    most, step = np.float32(MOST), np.float32(_STEP)

    @part(fastmath=FAST)
    def split(q: Any, digits: Any, start: Any, unit: Any, ordered: Any) -> None:
        for g in range(group):
            largest = np.float32(0.0)
            for d in range(channels):
                largest = larger(largest, abs(q[g, d]))
            unit[g] = largest / most * step
            inverse = most / largest if largest > 0 else np.float32(0.0)
            for d in range(channels):
                ordered[d] = q[g, order[d]]
            for piece in range(pieces):
                highs, middles, lows = np.float32(0.0), np.float32(0.0), np.float32(0.0)
                for d in range(piece * _CHANNELS, (piece + 1) * _CHANNELS):
                    high, middle, low = digits_of(ordered[d] * inverse)
                    digits[g, 0, d], digits[g, 1, d], digits[g, 2, d] = np.int8(high), np.int8(middle), np.int8(low)
                    highs += high
                    middles += middle
                    lows += low
                start[g, piece] = -_OUTER * number_of(highs, middles, lows)

    return split


@intrinsic(prefer_literal=True)
def dot_codes(
    typing_context: Any, channels: Any, group: Any, packed: Any, rows: Any, begin: Any, count: Any, head: Any, digits: Any,
    start: Any, unit: Any, out: Any,
) -> Any:  # fmt: skip
    """out[g, i] = rotated query g . the levels of row rows[i] of a kv head, for every query head g, begin <= i < begin + count.

    Args:
        channels: literal, as is group.
        packed: uint8 [row, head, D/4].
        rows: int64 [n]; has `levels_cpu.BLOCK` more entries that are rows too.
        digits: as `split_rotated` leaves them, as are start and unit.
        out: float32 [G, n]; up to `BLOCK` more columns are written.
    """
    size, heads = channels.literal_value, group.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b, kinds = Build.of(context, builder), signature.args
        lanes, sums = b.lanes, Sums(b)
        low, high = (_table(b, which) for which in range(2))
        nibble = constants(WORD, [0x0F0F0F0F] * lanes)
        units = [b.spread(builder.load(b.address(kinds[9], args[9], b.place(g))), lanes) for g in range(heads)]
        loop = Loop(b, args[5], lanes, [])
        first = builder.add(loop.i, args[4])
        pointers = []
        for r in range(lanes):
            row = builder.load(b.address(kinds[3], args[3], builder.add(first, b.place(r))))
            pointers.append(builder.bitcast(b.address(kinds[2], args[2], row, args[6]), BYTE.as_pointer()))
        at_once = b.registers // DIGITS
        for tile in (range(g, min(g + at_once, heads)) for g in range(0, heads, at_once)):
            totals = [ir.Constant(levels_type(lanes), None)] * len(tile)
            for piece in range(size // _CHANNELS):
                at = [builder.gep(pointer, [WORD(piece * _BYTES)]) for pointer in pointers]
                vectors = [
                    joined(b, [b.load(at[4 * lane + a], WORD, 4) for lane in range(lanes // 4)]) for a in range(4)
                ]
                found = {(g, which): sums.zero for g in tile for which in range(DIGITS)}
                for i, vector in enumerate(transposed(b, vectors)):
                    upper = builder.lshr(vector, constants(WORD, [4] * lanes))
                    pairs = [builder.and_(half, nibble) for half in (vector, upper)]  # of crumbs
                    for j in range(4):
                        levels = _looked_up(b, (low, high)[j % 2], pairs[j // 2])
                        place = b.place(((piece * 4 + i) * 4 + j) * 4)
                        for g, which in found:
                            four = b.address(kinds[7], args[7], b.place(g), b.place(which), place)
                            word = builder.load(builder.bitcast(four, WORD.as_pointer()), align=1)
                            found[g, which] = sums.add(found[g, which], levels, b.spread(word, lanes))
                for n, g in enumerate(tile):
                    begins = b.spread(builder.load(b.address(kinds[8], args[8], b.place(g), b.place(piece))), lanes)
                    whole = sums.joined([found[g, which] for which in range(DIGITS)], begins)
                    totals[n] = builder.fadd(totals[n], builder.sitofp(whole, levels_type(lanes)))
            for total, g in zip(totals, tile, strict=True):
                b.store(builder.fmul(total, units[g]), b.address(kinds[10], args[10], b.place(g), first))
        loop.end([])
        return context.get_dummy_value()

    place = types.intp
    return types.void(channels, group, packed, rows, place, place, place, digits, start, unit, out), codegen


def _table(b: Build, which: int) -> Any:
    """The raised levels of a nibble's lower (0) or upper (1) crumb."""
    of_crumb = [_OUTER + _INNER, _OUTER + _OUTER, _OUTER - _INNER, 0]
    return constants(BYTE, [of_crumb[nibble >> 2 * which & 3] for nibble in range(16)] * (b.lanes // 4))


def _looked_up(b: Build, table: Any, nibbles: Any) -> Any:
    """Each byte of a vector of words in a table of 16."""
    found = b.call("llvm.x86.avx512.pshuf.b.512", table.type, table, b.builder.bitcast(nibbles, table.type))
    return b.builder.bitcast(found, nibbles.type)
