"""One compile case as machine code for one target, and what is counted in it.

The columns that `benchmarks/compiled.py` prints.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.cache import get_cache_key

from benchmarks.executed import usually_executed
from sglang_clusterkv.kernels.compile_case import CompileCase

MODEL_TARGET = 90  # that the model of a step counts for
READER = "2"  # another one where a number is read otherwise: what is kept of earlier runs is known by it
_LINES = ("-gi",)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Of one SM (CUDA programming guide, "Technical specifications per compute capability"). Registers are handed out by 256 per
# warp, from a quarter of the SM's.
_SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 89: 100 << 10, 120: 100 << 10}
_WARPS = {80: 64, 90: 64, 100: 64, 89: 48, 120: 48}
_PROGRAMS = {80: 32, 90: 32, 100: 32, 89: 24, 120: 24}
_RESERVED_SHARED_BYTES = 1 << 10  # of each program
_REGISTERS, _QUARTERS = 65536, 4

_TENSOR_CORE = re.compile(r"\b(?:[HIQDB]MMA|[HIQB]GMMA|UTC[A-Z]*MMA)\b")
_LOAD_128 = re.compile(r"\bLDG(?:STS)?(?:\.\w+)*\.128\b")
_ASYNC_128 = re.compile(r"\bLDGSTS(?:\.\w+)*\.128\b")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
_DIVISION = re.compile(r"\b(?:div|rem)\.[su](?:8|16|32|64)\b")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?!NOP\b)\S")
_LABEL = re.compile(r"^\s*(\$\w+):", re.MULTILINE)
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)\s*;")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target; benchmarks/compiled.py says how each is counted."""

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    programs_per_sm: int
    loads_128: int
    async_loads_128: int
    tensor_cores: int
    loop_divisions: int
    instructions: int
    executed: int | None = None  # of MODEL_TARGET


def programs_per_sm(target: int, registers: int, shared_bytes: int, warps: int) -> int:
    """Programs that fit one SM of compute capability `target` / 10."""
    registers_per_warp = -(-registers * 32 // 256) * 256
    fitting_warps = _REGISTERS // _QUARTERS // registers_per_warp * _QUARTERS
    by_shared = _SHARED_BYTES[target] // (shared_bytes + _RESERVED_SHARED_BYTES)
    return min(min(fitting_warps, _WARPS[target]) // warps, by_shared, _PROGRAMS[target])


def loop_divisions(ptx: str) -> int:
    """Integer divisions and remainders between a label and a branch back to it."""
    labels = {match[1]: match.start() for match in _LABEL.finditer(ptx)}
    loops = [(labels[match[1]], match.start()) for match in _BRANCH.finditer(ptx) if labels[match[1]] < match.start()]
    return sum(any(begin < match.start() < end for begin, end in loops) for match in _DIVISION.finditer(ptx))


def _source(case: CompileCase, target: int) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a case on a target, and with which options."""
    names = case.kernel.arg_names
    unknown = {*case.signature, *case.constexprs, *case.aligned} ^ set(names)
    assert not unknown, f"{case.name}: not in both the kernel and the case: {sorted(unknown)}"
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    limit = case.register_limits.get(target)
    return source, {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": limit}


def hash_of(case: CompileCase, target: int) -> str:
    """Of all that the result depends on: Triton's own key, and how the machine code is read."""
    source, options = _source(case, target)
    backend = make_backend(GPUTarget("cuda", target, 32))
    key = get_cache_key(source, backend, backend.parse_options(options), env_vars={})
    return hashlib.sha256((key + READER).encode()).hexdigest()[:24]


def compile_for(case: CompileCase, target: int) -> Compiled:
    """Compile one case for one target and read what came out."""
    kernel = _compile(case, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        instructions = _tool("nvdisasm", "-c", *_LINES * (target == MODEL_TARGET), cubin.name)
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    shared_bytes = max(kernel.metadata.shared, used["SHARED"])
    return Compiled(
        registers=used["REG"],
        spills=len(_LOCAL.findall(instructions)),
        local_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared_bytes,
        programs_per_sm=programs_per_sm(target, used["REG"], shared_bytes, kernel.metadata.num_warps),
        loads_128=len(_LOAD_128.findall(instructions)),
        async_loads_128=len(_ASYNC_128.findall(instructions)),
        tensor_cores=len(_TENSOR_CORE.findall(instructions)),
        loop_divisions=loop_divisions(kernel.asm["ptx"]),
        instructions=len(_INSTRUCTION.findall(instructions)),
        executed=usually_executed(instructions) if target == MODEL_TARGET else None,
    )


def _compile(case: CompileCase, target: int) -> CompiledKernel:
    source, options = _source(case, target)
    with triton.knobs.compilation.scope():
        # What was compiled before names the lines, and the folder, of that time.
        triton.knobs.compilation.always_compile = True
        return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def listing_of(case: CompileCase, target: int) -> str:
    """Machine code of a case, each instruction below the source lines that it is from, through all inlined functions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(_compile(case, target).asm["cubin"])
        cubin.flush()
        return _tool("nvdisasm", "-c", *_LINES, cubin.name)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout
