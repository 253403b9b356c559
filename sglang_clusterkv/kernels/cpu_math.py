"""Scalar helpers that the CPU kernels inline: bf16 bits to float32, and an exponential that vectorises."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# The kernels reassociate sums so that loops vectorise, but keep infinities: -inf marks what must count nothing.
FAST = {"reassoc", "contract", "nsz", "arcp"}
NEGLIGIBLE = np.float32(-1.0e30)
_WORD = ir.IntType(32)


# numba widens every integer operation to 64 bits, which would halve the lanes of a vector: so these are built in LLVM.


@intrinsic
def float_of_bf16(typing_context: Any, bits: Any) -> Any:
    """float32 of a bfloat16's bits (uint16)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.shl(builder.zext(args[0], _WORD), _WORD(16))
        return builder.bitcast(wide, context.get_value_type(types.float32))

    return types.float32(types.uint16), codegen


@intrinsic
def power_of_two(typing_context: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for an integral float32 exponent in [-126, 127]."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        biased = builder.add(builder.fptosi(args[0], _WORD), _WORD(127))
        return builder.bitcast(builder.shl(biased, _WORD(23)), context.get_value_type(types.float32))

    return types.float32(types.float32), codegen


@intrinsic
def signed_nibble(typing_context: Any, word: Any, shift: Any) -> Any:
    """Bits [28 - shift, 32 - shift) of an int32 as a signed number, float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        moved = builder.shl(args[0], builder.trunc(args[1], _WORD))
        return builder.sitofp(builder.ashr(moved, _WORD(28)), context.get_value_type(types.float32))

    return types.float32(types.int32, types.int64), codegen


@intrinsic
def code_level(typing_context: Any, word: Any, shift: Any, inner: Any, outer: Any) -> Any:
    """Level of the code at `shift` of a word: two bits (magnitude, sign) of a uint16, one (sign) of a uint8; float32.

    For one bit the levels are +1 and -1, whatever `inner` and `outer` are.
    """
    one_bit = word == types.uint8

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        real = context.get_value_type(types.float32)
        moved = builder.lshr(builder.zext(args[0], _WORD), builder.trunc(args[1], _WORD))
        if one_bit:
            magnitude = ir.Constant(real, 1.0)
            sign = builder.shl(moved, _WORD(31))
        else:
            is_outer = builder.icmp_unsigned("!=", builder.and_(moved, _WORD(1)), _WORD(0))
            magnitude = builder.select(is_outer, args[3], args[2])
            sign = builder.shl(builder.lshr(moved, _WORD(1)), _WORD(31))
        return builder.bitcast(builder.xor(builder.bitcast(magnitude, _WORD), sign), real)

    return types.float32(word, types.int64, types.float32, types.float32), codegen


@intrinsic
def bits_of_float(typing_context: Any, value: Any) -> Any:
    """The bits of a float32, uint32; those of non-negative floats order as the floats do."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def fast_exp(x: Any) -> Any:
    """exp(x) in float32, relative error below 3e-7; 0 below -87, where the result would be denormal.

    Range reduction by ln 2 and a polynomial of degree 6 (Cody and Waite); no branch, so that loops vectorise.
    """
    clamped = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(clamped * np.float32(1.4426950408889634) + np.float32(0.5))
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


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's memory as numpy: bf16 as uint16, everything else as it is."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()
