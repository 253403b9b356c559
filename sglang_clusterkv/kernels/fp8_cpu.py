"""Floats of 8 bits (e4m3, e5m2) in the CPU kernels: vectors of them to float32, built in LLVM, as torch converts them."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

_BYTE, _HALF, _WORD, _REAL = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()


def floats_of_fp8(builder: Any, octets: Any, is_e4m3: bool, has_half: bool) -> Any:
    """float32 of a vector of fp8's bits.

    Args:
        builder: of the function that needs it.
        octets: their vector.
        is_e4m3: e4m3 without infinities (else e5m2).
        has_half: the target converts half precision. Then denormal numbers cost nothing, as those of float32 would.
    """
    lanes = octets.type.count
    return _by_half(builder, octets, is_e4m3, lanes) if has_half else _by_bits(builder, octets, is_e4m3, lanes)


def _all(kind: Any, lanes: int, value: float) -> Any:
    """A vector of one constant."""
    return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)


def _by_half(b: Any, octets: Any, is_e4m3: bool, lanes: int) -> Any:
    """e5m2 is the upper byte of half precision; e4m3 has a narrower exponent and more of a mantissa."""
    half, kind, real = (ir.VectorType(scalar, lanes) for scalar in (ir.HalfType(), _HALF, _REAL))
    if not is_e4m3:
        return b.fpext(b.bitcast(b.shl(b.zext(octets, kind), _all(_HALF, lanes, 8)), half), real)
    moved = b.shl(b.sext(octets, kind), _all(_HALF, lanes, 7))
    moved = b.and_(moved, _all(_HALF, lanes, 0xBF80))  # the sign, no copy of it, seven bits
    is_nan = b.icmp_unsigned("==", b.and_(octets, _all(_BYTE, lanes, 0x7F)), _all(_BYTE, lanes, 0x7F))
    moved = b.select(is_nan, _all(_HALF, lanes, 0x7E00), moved)
    return b.fmul(b.fpext(b.bitcast(moved, half), real), _all(_REAL, lanes, 256.0))


def _by_bits(b: Any, octets: Any, is_e4m3: bool, lanes: int) -> Any:
    mantissa, bias, no_number = (3, 7, 0x7F) if is_e4m3 else (2, 15, 0x7C)
    word, real = ir.VectorType(_WORD, lanes), ir.VectorType(_REAL, lanes)
    wide = b.zext(octets, word)
    magnitude = b.and_(wide, _all(_WORD, lanes, 0x7F))
    moved = b.shl(magnitude, _all(_WORD, lanes, 23 - mantissa))
    found = b.add(moved, _all(_WORD, lanes, (127 - bias) << 23))
    denormal = b.fmul(b.sitofp(magnitude, real), _all(_REAL, lanes, 2.0 ** (1 - bias - mantissa)))
    is_denormal = b.icmp_unsigned("<", magnitude, _all(_WORD, lanes, 1 << mantissa))
    found = b.select(is_denormal, b.bitcast(denormal, word), found)
    is_none = b.icmp_unsigned(">=", magnitude, _all(_WORD, lanes, no_number))  # infinity and NaN
    found = b.select(is_none, b.or_(moved, _all(_WORD, lanes, 0x7F800000)), found)
    sign = b.shl(b.lshr(wide, _all(_WORD, lanes, 7)), _all(_WORD, lanes, 31))
    return b.bitcast(b.or_(found, sign), real)
