"""What the CPU kernels inline (bf16 bits to float32, an exponential, a logarithm), and `njit`, which makes them all."""

from __future__ import annotations

import functools
import hashlib
import logging
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sglang_clusterkv.kernels.linkage_cpu import Alone
from sglang_clusterkv.memory.fp8 import FP8

logger = logging.getLogger(__name__)

CONSTANTS = ("codec.py", "device.py", "fp8.py", "masses.py", "movement.py", "tier.py")  # of memory, that kernels hold


@functools.cache
def sources() -> str:
    """A digest of what the CPU kernels are made of."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    constants = [folder / "memory" / name for name in CONSTANTS]
    for path in sorted([*folder.glob("kernels/**/*cpu*.py"), *constants]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def njit(function: Any = None, **options: Any) -> Any:
    """numba's, which makes all kernels: a division by zero gives an infinity or NaN, as in the references, and raises nothing.

    With `cache` what was compiled stays on disk. numba takes it from there until the function's own file changes; the name
    that it has there follows from what it calls and holds, too. Where no folder can be written to, nothing stays.
    """
    if function is None:
        return functools.partial(njit, **options)
    if options.get("cache"):
        function.__qualname__ += "_" + sources()
        options["pipeline_class"] = Alone
        try:
            return numba.njit(error_model="numpy", **options)(function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            _say_that_nothing_stays()
            del options["cache"]
    return numba.njit(error_model="numpy", **options)(function)


@functools.cache
def _say_that_nothing_stays() -> None:
    logger.warning(
        "clusterkv: kernels are compiled anew at each start, for there is no folder to keep them in that can be written to: "
        "set NUMBA_CACHE_DIR to one"
    )


# What only other compiled functions call: it takes no arguments from Python, which would be more than half of what is compiled.
# Called from Python it crashes the process.
part = functools.partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)
# The kernels reassociate sums so that loops vectorise, but keep infinities: -inf marks what must count nothing.
FAST = {"reassoc", "contract", "nsz", "arcp"}
NEGLIGIBLE = np.float32(-1.0e30)
_WORD = ir.IntType(32)
_FEW = 16  # floats


# numba widens every integer operation to 64 bits, which would halve the lanes of a vector: so these are built in LLVM.


@intrinsic
def float_of_bf16(typing_context: Any, bits: Any) -> Any:
    """float32 of a bfloat16's bits (uint16)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], _WORD), _WORD(16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(types.uint16), codegen


@intrinsic
def nearest(typing_context: Any, value: Any) -> Any:
    """A float32 rounded to the nearest integer, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.nearbyint", [args[0].type]), args)

    return types.float32(types.float32), codegen


@intrinsic
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for an integral float32 exponent in [-126, 127]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _WORD), _WORD(127))
        return builder.bitcast(builder.shl(biased, _WORD(23)), context.get_value_type(types.float32))

    return types.float32(types.float32), codegen


@intrinsic
def exponent_of(typing_context: Any, value: Any) -> Any:
    """The power of two that a positive normal float32 is at least, as float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.lshr(builder.bitcast(args[0], _WORD), _WORD(23))
        return builder.sitofp(builder.sub(biased, _WORD(127)), context.get_value_type(types.float32))

    return types.float32(types.float32), codegen


@intrinsic
def mantissa_of(typing_context: Any, value: Any) -> Any:
    """A positive normal float32 over that power of two, in [1, 2)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        fraction = builder.and_(builder.bitcast(args[0], _WORD), _WORD(0x007FFFFF))
        one = builder.or_(fraction, _WORD(0x3F800000))
        return builder.bitcast(one, context.get_value_type(types.float32))

    return types.float32(types.float32), codegen


def element_pointer(context: Any, builder: Any, kind: Any, array: Any, at: list[Any]) -> Any:
    """Address of an array's element; missing indices are zero."""
    made = context.make_array(kind)(context, builder, array)
    full = at + [context.get_constant(types.intp, 0)] * (kind.ndim - len(at))
    return cgutils.get_item_pointer(context, builder, kind, made, full, wraparound=False)


@intrinsic
def address_of(typing_context: Any, array: Any, row: Any, head: Any) -> Any:
    """The address of array[row, head], as a number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, signature.args[0], args[0], list(args[1:]))
        return builder.ptrtoint(pointer, context.get_value_type(types.intp))

    return types.intp(array, types.intp, types.intp), codegen


@intrinsic
def prefetch_row(typing_context: Any, rows: Any, row: Any, head: Any, row_bytes: Any) -> Any:
    """Start loading rows[row, head] into the cache: gathered rows are far apart, which no hardware foresees."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = element_pointer(context, builder, rows, args[0], [args[1], args[2]])
        byte, flag = ir.IntType(8), ir.IntType(32)
        start = builder.bitcast(pointer, byte.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        line = ir.Constant(args[3].type, 64)
        with cgutils.for_range_slice(builder, ir.Constant(args[3].type, 0), args[3], line, inc=True) as (offset, _):
            builder.call(prefetch, [builder.gep(start, [offset]), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, types.intp), codegen


@intrinsic
def ones_of(typing_context: Any, value: Any) -> Any:
    """How many bits of a uint64 are set, int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.trunc(builder.ctpop(args[0]), _WORD)

    return types.int32(types.uint64), codegen


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, uint32; those of non-negative floats order as the floats do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@intrinsic
def larger(typing_context: Any, a: Any, b: Any) -> Any:
    """The larger of two float32, either if one is NaN: so a loop that looks for the largest vectorises, as `max` does not."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(args[0].type, [args[0].type, args[0].type])
        found = builder.module.declare_intrinsic("llvm.maxnum", [args[0].type], kind)
        return builder.call(found, args, fastmath=("nnan", "nsz"))

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def dot_of_few(typing_context: Any, a: Any, b: Any, begin: Any, count: Any) -> Any:
    """Sum of a[begin + i] * b[begin + i] over i < count, of float32 arrays; for sums of about 16, which take no loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide, mask = ir.VectorType(ir.FloatType(), _FEW), ir.VectorType(ir.IntType(1), _FEW)
        pointer = wide.as_pointer()
        kind = ir.FunctionType(wide, [pointer, _WORD, mask, wide])
        load = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.load.v{_FEW}f32.p0")
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), wide])
        add = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{_FEW}f32")
        nothing = ir.Constant(wide, None)
        places = ir.Constant(ir.VectorType(_WORD, _FEW), [_WORD(i) for i in range(_FEW)])
        sums = cgutils.alloca_once_value(builder, nothing)
        step = ir.Constant(args[3].type, _FEW)
        with cgutils.for_range_slice(builder, ir.Constant(args[3].type, 0), args[3], step, inc=True) as (first, _):
            left = builder.trunc(builder.sub(args[3], first), _WORD)
            empty = ir.Constant(places.type, ir.Undefined)
            left = builder.insert_element(empty, left, _WORD(0))
            left = builder.shuffle_vector(left, empty, ir.Constant(places.type, None))
            listed = builder.icmp_signed("<", places, left)
            at = builder.add(args[2], first)
            rows = [
                builder.call(
                    load,
                    [
                        builder.bitcast(element_pointer(context, builder, kind, array, [at]), pointer),
                        _WORD(4),
                        listed,
                        nothing,
                    ],
                )
                for kind, array in zip(signature.args[:2], args[:2], strict=True)
            ]
            product = builder.fmul(*rows, flags=("contract",))
            builder.store(builder.fadd(builder.load(sums), product, flags=("contract",)), sums)
        return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), builder.load(sums)], fastmath=("reassoc",))

    return types.float32(a, b, types.intp, types.intp), codegen


@njit(inline="always")
def fast_exp(x: Any) -> Any:
    """exp(x) in float32, relative error below 3e-7; 0 below -87, where the result would be denormal.

    Range reduction by ln 2 and a polynomial of degree 6 (Cody and Waite); no branch, so that loops vectorise.
    """
    clamped = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = nearest(clamped * np.float32(1.4426950408889634))
    r = clamped - n * np.float32(0.693359375)
    r = r + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1.0)
    return np.float32(0.0) if x < np.float32(-87.0) else y * power_of_two(n)


@njit(inline="always")
def exp_below_one(x: Any) -> Any:
    """exp(x) in float32 for x up to 1, and exp(-87) for less; relative error below 2e-7 + 6e-8 |x|, as if x had been rounded.

    Two thirds of `fast_exp`'s work.
    """
    bounded = max(x, np.float32(-87.0))
    n = nearest(bounded * np.float32(1.4426950408889634))
    r = bounded - n * np.float32(0.6931471805599453)
    p = np.float32(0.00829761940985918)
    p = p * r + np.float32(0.04191562905907631)
    p = p * r + np.float32(0.16667576134204865)
    p = p * r + np.float32(0.4999889135360718)
    p = p * r + np.float32(0.9999997019767761)
    p = p * r + np.float32(1.0000001192092896)
    return p * power_of_two(n)


@njit(inline="always")
def fast_log(x: Any) -> Any:
    """log(x) of a positive normal float32, error below 2e-7, relative to the result or to 1 where that is more.

    The arguments of the polynomial are within 3/4 to 3/2.
    """
    n = exponent_of(x)
    m = mantissa_of(x)
    high = m > np.float32(1.5)
    m = m * np.float32(0.5) if high else m
    n = n + np.float32(1.0) if high else n
    r = m - np.float32(1.0)
    p = np.float32(5.4259425305e-02)
    p = p * r + np.float32(-1.2091521104e-01)
    p = p * r + np.float32(1.4996832443e-01)
    p = p * r + np.float32(-1.6822814000e-01)
    p = p * r + np.float32(1.9975553917e-01)
    p = p * r + np.float32(-2.4993263551e-01)
    p = p * r + np.float32(3.3333602533e-01)
    p = p * r + np.float32(-5.0000065986e-01)
    p = p * r + np.float32(9.9999999373e-01)
    return n * np.float32(0.6931471805599453) + p * r


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as numpy: bf16 as uint16, fp8 as uint8, everything else as it is."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    if tensor.dtype in FP8:
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()
