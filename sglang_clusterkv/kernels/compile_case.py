"""What a Triton kernel must look like once compiled, stated beside it and checked without a GPU.

Each Triton module of an operation (`kernels/<operation>/triton.py`, or a file of the folder `triton/`) lists its kernels, at
the shapes that matter, as `COMPILE_CASES`; `benchmarks/compiled.py` compiles them for three generations of GPUs and reads the
machine code. This module imports nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one shape, and what must hold of its machine code on every target.

    No case may spill registers, use local memory, or divide integers inside a loop; that needs no field.

    Attributes:
        name: of the case, unique among all: operation, kernel, shape ("score int4 D=128 G=4").
        kernel: the `@triton.jit` function.
        signature: type of every argument that is no constexpr: "*bf16", "*i64", "i32", "fp32", ...
        constexprs: value of every constexpr.
        aligned: arguments that are multiples of 16: pointers, and integers (strides) of which the caller guarantees it.
            As at a launch, where Triton finds this out by itself, an address of 16 bytes that is not known to be
            aligned is loaded piecewise.
        num_warps: as the launch has it.
        num_stages: as the launch has it.
        register_limits: target -> most registers per thread that the launch lets ptxas take; as many as it likes where there is
            none (`register_limit` in kernels/triton_rows.py).
        tensor_cores: least number of tensor-core instructions; 0 where no `tl.dot` is meant to use them.
        loads_128: least number of 16-byte loads from global memory, to registers or to shared memory (LDG.128, LDGSTS.128).
        async_loads_128: least number of asynchronous 16-byte loads to shared memory (LDGSTS.128).
        programs_per_sm: least number of programs that fit one SM, by registers, shared memory and warps.
        max_registers: most registers per thread.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    register_limits: Mapping[int, int] = field(default_factory=dict)
    tensor_cores: int = 0
    loads_128: int = 0
    async_loads_128: int = 0
    programs_per_sm: int = 1
    max_registers: int = 255
