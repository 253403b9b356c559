"""Products of a few tokens with a layer's weights, for decode steps on a CPU; in float32.

A step reads every weight once, as fast as memory gives them. Where a checkpoint was in bf16 the lower half of each float32
is empty: then a copy of the upper halves is read instead, and widened in registers, half the bytes and the same numbers.

A sum goes over the channels in one order, a vector of them at a time, and over the lanes of its vector by halves. So a token's
product with a row is the same to the bit whichever rows and tokens are computed with it, by whom, and from which of both.
"""

from __future__ import annotations

from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import njit, part
from sglang_clusterkv.kernels.llvm_cpu import BYTE, REAL, WORD, Build, Loop, constants, levels_type
from sglang_clusterkv.kernels.threads_cpu import done, leave, run, take
from sglang_clusterkv.kernels.vectors_cpu import lane_sums

_BLOCK = 64 << 10  # weights that a thread takes at a time
SHARED = 1 << 20  # weights from which on waking another thread costs less than it does
_TOGETHER = {4: 4, 2: 4, 1: 2}  # rows that are computed together, by tokens
_ROWS = 16  # a thread takes a multiple of them
_AHEAD = 2048  # bytes behind the next rows, from which on memory is asked for
_LINE = 64


class _Weights:
    """Pointers to rows of weights, of which `vectors` gives two vectors of channels each."""

    def __init__(self, build: Build, halved: bool, at: Any, channels: Any, count: int) -> None:
        self._build, self._halved = build, halved
        self.bytes = build.builder.mul(channels, build.place(2 if halved else 4))
        self.pointers = []
        for _ in range(count):
            self.pointers.append(build.builder.inttoptr(at, BYTE.as_pointer()))
            at = build.builder.add(at, self.bytes)

    def vectors(self, row: int, channel: Any) -> tuple[Any, Any]:
        """Of a row, from a channel on."""
        b, lanes = self._build, self._build.lanes
        if not self._halved:
            first = _element(b, self.pointers[row], channel)
            return b.load(first, REAL, lanes), b.load(b.builder.gep(first, [WORD(lanes)]), REAL, lanes)
        at = b.builder.gep(self.pointers[row], [b.builder.mul(channel, b.place(2))])
        both = b.load(at, WORD, lanes)
        low = b.builder.shl(both, constants(WORD, [16] * lanes))
        high = b.builder.and_(both, constants(WORD, [0xFFFF0000] * lanes))
        return b.builder.bitcast(low, levels_type(lanes)), b.builder.bitcast(high, levels_type(lanes))

    def fetch(self, channel: Any) -> None:
        """Have memory bring the lines behind the next rows into the second cache, as many as `vectors` reads of all rows.

        One after the other, whatever the order in which they are read: memory is asked for more at once so.
        """
        b, count = self._build, len(self.pointers)
        wide = 2 if self._halved else 4
        done = b.builder.mul(channel, b.place(wide * count))
        begin = b.builder.add(b.builder.mul(self.bytes, b.place(count)), b.place(_AHEAD))
        at = b.builder.gep(self.pointers[0], [b.builder.add(begin, done)])
        for offset in range(0, 2 * wide * b.lanes * count, _LINE):
            line = b.builder.gep(at, [WORD(offset)])
            b.call("llvm.prefetch.p0", ir.VoidType(), line, WORD(0), WORD(2), WORD(1))


def _element(b: Build, pointer: Any, index: Any) -> Any:
    """Address of a float32."""
    return b.builder.gep(b.builder.bitcast(pointer, REAL.as_pointer()), [index])


def _masked(b: Build, pointer: Any, listed: Any) -> Any:
    """A vector of the floats whose lanes are listed, elsewhere 0."""
    kind = levels_type(b.lanes)
    return b.call(
        f"llvm.masked.load.v{b.lanes}f32.p0", kind, b.builder.bitcast(pointer, kind.as_pointer()), WORD(4), listed,
        ir.Constant(kind, None),
    )  # fmt: skip


def _block(b: Build, halved: bool, tokens: int, count: int, row: Any, args: list[Any]) -> None:
    """Products of so many tokens and rows, from a row on."""
    builder = b.builder
    x_at, channels, weight_at, rows, out_at = args
    width = builder.mul(channels, b.place(2 if halved else 4))
    weights = _Weights(b, halved, builder.add(weight_at, builder.mul(row, width)), channels, count)
    queries = []
    for token in range(tokens):
        offset = builder.mul(channels, b.place(4 * token))
        queries.append(builder.inttoptr(builder.add(x_at, offset), REAL.as_pointer()))
    step = 2 * b.lanes
    left = builder.srem(channels, b.place(step))
    whole = builder.sub(channels, left)
    totals = [ir.Constant(levels_type(b.lanes), None)] * (tokens * count)
    loop = Loop(b, whole, step, totals)
    totals = list(loop.carried)
    pairs = [weights.vectors(r, loop.i) for r in range(count)]
    weights.fetch(loop.i)
    for t, pointer in enumerate(queries):
        first = _element(b, pointer, loop.i)
        for half, x in enumerate((first, builder.gep(first, [WORD(b.lanes)]))):
            values = b.load(x, REAL, b.lanes)
            for r, pair in enumerate(pairs):
                totals[t * count + r] = b.multiply_add(pair[half], values, totals[t * count + r])
    loop.end(totals)
    totals = list(loop.carried)
    if not halved:  # channels behind the last whole pair of vectors
        loop = Loop(b, left, b.lanes, totals)
        totals = list(loop.carried)
        places = constants(WORD, list(range(b.lanes)))
        remaining = b.spread(builder.trunc(builder.sub(left, loop.i), WORD), b.lanes)
        listed = builder.icmp_signed("<", places, remaining)
        channel = builder.add(whole, loop.i)
        rest = [_masked(b, _element(b, pointer, channel), listed) for pointer in weights.pointers]
        for t, pointer in enumerate(queries):
            values = _masked(b, _element(b, pointer, channel), listed)
            for r in range(count):
                totals[t * count + r] = b.multiply_add(rest[r], values, totals[t * count + r])
        loop.end(totals)
        totals = list(loop.carried)
    sums = lane_sums(b, totals)
    for t in range(tokens):
        place = builder.add(builder.mul(rows, b.place(t)), row)
        at = builder.inttoptr(builder.add(out_at, builder.mul(place, b.place(4))), REAL.as_pointer())
        lane = t * count % b.lanes
        b.store(b.pick(sums[t * count // b.lanes], list(range(lane, lane + count))), at)


@intrinsic(prefer_literal=True)
def _rows(
    typing_context: Any, tokens: Any, begin: Any, end: Any, x_at: Any, channels: Any, weight_at: Any, halved: Any,
    rows: Any, out_at: Any,
) -> Any:  # fmt: skip
    """out[t, r] = weight[r] . x[t] for so many tokens, a literal, and begin <= r < end.

    Args: as for `product_rows`.
    """
    at_once = tokens.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        b = Build.of(context, builder)
        together = min(_TOGETHER[at_once], b.registers * 2 // 3 // at_once)
        shared = [args[3], args[4], args[5], args[7], args[8]]
        with builder.if_else(builder.icmp_signed("!=", args[6], b.place(0))) as branches:
            for branch, is_halved in zip(branches, (True, False), strict=True):
                with branch:
                    begin_at = args[1]
                    for count in (together, 1):
                        left = builder.sub(args[2], begin_at)
                        whole = builder.sub(left, builder.srem(left, b.place(count)))
                        loop = Loop(b, whole, count, [])
                        _block(b, is_halved, at_once, count, builder.add(begin_at, loop.i), shared)
                        loop.end([])
                        begin_at = builder.add(begin_at, whole)
        return context.get_dummy_value()

    place = types.intp
    return types.void(tokens, place, place, place, place, place, place, place, place), codegen


@part
def product_rows(
    begin: int, end: int, x_at: int, tokens: int, channels: int, weight_at: int, halved: int, rows: int, bias_at: int,
    out_at: int,
) -> None:  # fmt: skip
    """out[:, begin:end] of the products of some tokens with weights.

    Args:
        begin: first row.
        end: behind the last one.
        x_at: address of float32 [tokens, channels].
        tokens: any number.
        channels: of a token and a row.
        weight_at: address of float32 [rows, channels], or of what `halve` made of it.
        halved: 1 for the latter, else 0.
        rows: of the weights.
        bias_at: address of float32 [rows], which is added; 0: nothing.
        out_at: address of float32 [tokens, rows].
    """
    at, out = x_at, out_at
    left = tokens
    while left >= 4:  # the second time weights come from a cache
        _rows(4, begin, end, at, channels, weight_at, halved, rows, out)
        at, out, left = at + 16 * channels, out + 16 * rows, left - 4
    if left >= 2:
        _rows(2, begin, end, at, channels, weight_at, halved, rows, out)
        at, out, left = at + 8 * channels, out + 8 * rows, left - 2
    if left >= 1:
        _rows(1, begin, end, at, channels, weight_at, halved, rows, out)
    if bias_at:
        for t in range(tokens):
            for r in range(begin, end):
                _add(out_at + 4 * (t * rows + r), bias_at + 4 * r)


@intrinsic
def _add(typing_context: Any, total_at: Any, added_at: Any) -> Any:
    """Add the float32 at an address to that at another."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, added = (builder.inttoptr(at, REAL.as_pointer()) for at in args)
        builder.store(builder.fadd(builder.load(total), builder.load(added)), total)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def _lanes(typing_context: Any) -> Any:
    """Floats in a vector of the target."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, Build.of(context, builder).lanes)

    return types.intp(), codegen


@njit(cache=True, nogil=True)
def _products(
    number: int, counter: Any, items: int, each: int, x_at: int, tokens: int, channels: int, weight_at: int, halved: int,
    rows: int, bias_at: int, out_at: int,
) -> None:  # fmt: skip
    item = take(counter)
    while item < items:
        begin, end = item * each, min(rows, (item + 1) * each)
        product_rows(begin, end, x_at, tokens, channels, weight_at, halved, rows, bias_at, out_at)
        done(counter)
        item = take(counter)
    leave(number, counter, items)


@njit(cache=True, nogil=True)
def _halved(weight: Any, out: Any) -> bool:
    lanes = _lanes()
    if weight.shape[1] % (2 * lanes):
        return False
    for r in range(len(weight)):
        lost = 0
        for k in range(0, weight.shape[1], 2 * lanes):
            for j in range(lanes):
                low, high = weight[r, k + j], weight[r, k + lanes + j]
                lost |= (low | high) & 0xFFFF
                out[r, k // 2 + j] = (low >> 16) & 0xFFFF | high & ~0xFFFF
        if lost:
            return False
    return True


def halve(weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Take the upper halves of weights, where the lower ones are all zero.

    Args:
        weight: float32 [N, D], contiguous.
        out: int32 [N, D / 2], contiguous: of each two vectors of channels their upper halves, lane by lane; the first's below.

    Returns:
        Whether they are the weights, each to the bit; if not, what was written has no meaning.
    """
    return _halved(weight.detach().view(torch.int32).numpy(), out.numpy())


def rows_of_item(rows: int, channels: int) -> int:
    """Rows that a thread should take at a time."""
    return min(rows, max(_ROWS, _BLOCK // max(1, channels) // _ROWS * _ROWS))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, halved: torch.Tensor | None = None
) -> torch.Tensor:
    """Products of a few tokens with a layer's weights; all float32 and contiguous.

    Args:
        x: [tokens, D].
        weight: [N, D].
        bias: [N], added; None: nothing.
        halved: what `halve` made of the weights, read in their place; None: they are read.

    Returns:
        [tokens, N].
    """
    (tokens, channels), rows = x.shape, len(weight)
    out = x.new_empty((tokens, rows))
    each = rows_of_item(rows, channels)
    read = weight if halved is None else halved
    run(
        _products, -(-rows // each), each, x.data_ptr(), tokens, channels, read.data_ptr(), int(halved is not None), rows,
        0 if bias is None else bias.data_ptr(), out.data_ptr(), most=None if weight.numel() >= SHARED else 1,
    )  # fmt: skip
    return out


def compile_products() -> None:
    """Compile all of them."""
    x = torch.zeros(1, 4)
    linear(x, x)
    halve(x, torch.zeros(1, 2, dtype=torch.int32))
