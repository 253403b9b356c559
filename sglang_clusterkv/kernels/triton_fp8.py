"""Pools in 8-bit floats in Triton kernels: e5m2 goes by its own type, e4m3 by its bytes.

Triton knows e4m3 from compute capability 8.9 on only, where there is an instruction that converts it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.memory.fp8 import FP8

POINTERS = {"e4m3": "*u8", "e5m2": "*fp8e5"}  # types of such a pool in compile cases


@tl.core.builtin
def _knows_e4m3(_semantic: Any = None) -> tl.constexpr:
    """Whether the target has the type."""
    return tl.constexpr("fp8e4nv" in _semantic.builder.options.supported_fp8_dtypes)


@triton.jit
def widened(x, DTYPE: tl.constexpr):
    """Loaded channels of a pool in DTYPE: uint8 are e4m3, unless uint8 is asked for."""
    if x.dtype == DTYPE:
        wide = x
    elif x.dtype == tl.uint8:
        if tl.float32 != DTYPE and _knows_e4m3():
            wide = x.to(tl.float8e4nv, bitcast=True).to(DTYPE)
        else:
            octet = x.to(tl.int32)
            moved = ((octet & 0x80) << 24) | ((octet & 0x7F) << 20)
            wide = (moved.to(tl.float32, bitcast=True) * 1.329227995784916e36).to(DTYPE)  # 2^120
    else:
        wide = x.to(DTYPE)
    return wide


def as_argument(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a pool, or of a host tier below it, as kernels take them."""
    return rows.view(torch.uint8) if rows.dtype is torch.float8_e4m3fn else rows


def query_dtype(pool: torch.dtype, query: torch.dtype) -> torch.dtype:
    """The dtype in which queries meet a pool: its own, or the model's where that has 8 bits."""
    return query if pool in FP8 else pool
