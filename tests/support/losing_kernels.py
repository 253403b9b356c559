"""Kernels that each lose one property that their case states; the compile check names it (tests/kernels/test_compiled.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase


@triton.jit
def outer_sums(x_ptr, out_ptr, steps, SIZE: tl.constexpr):
    """Sum of outer products: no `tl.dot`, and SIZE * SIZE sums that one warp's registers cannot hold if SIZE is large."""
    offsets = tl.arange(0, SIZE)
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + step * SIZE + offsets)
        sums += x[:, None] * x[None, :]
    tl.store(out_ptr + offsets[:, None] * SIZE + offsets[None, :], sums)


@triton.jit
def gathered(x_ptr, out_ptr, steps, period):
    """Divides in its loop, for `period` is known at run time only."""
    total = 0.0
    for step in range(steps):
        total += tl.load(x_ptr + step % period)
    tl.store(out_ptr, total)


_SUMS = {"x_ptr": "*fp32", "out_ptr": "*fp32", "steps": "i32"}
_POINTERS = ("x_ptr", "out_ptr")

COMPILE_CASES = [
    CompileCase("sound", outer_sums, _SUMS, {"SIZE": 16}, _POINTERS, num_warps=1, programs_per_sm=32),
    CompileCase("spills", outer_sums, _SUMS, {"SIZE": 128}, _POINTERS, num_warps=1),
    CompileCase("no tensor cores", outer_sums, _SUMS, {"SIZE": 16}, _POINTERS, num_warps=1, tensor_cores=1),
    CompileCase("no wide loads", outer_sums, _SUMS, {"SIZE": 16}, _POINTERS, num_warps=1, loads_128=1),
    CompileCase("no async loads", outer_sums, _SUMS, {"SIZE": 16}, _POINTERS, num_warps=1, async_loads_128=1),
    CompileCase("registers", outer_sums, _SUMS, {"SIZE": 32}, _POINTERS, num_warps=1, max_registers=16),
    CompileCase("programs", outer_sums, _SUMS, {"SIZE": 64}, _POINTERS, num_warps=1, programs_per_sm=32),
    CompileCase("divides", gathered, _SUMS | {"period": "i32"}, aligned=_POINTERS, num_warps=1),
]
