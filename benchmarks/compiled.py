"""Compile the Triton kernels for three generations of GPUs, without one, and read the machine code.

    python -m benchmarks.compiled                           # all cases of sglang_clusterkv/kernels/
    python -m benchmarks.compiled --only score --target 90  # those whose name holds "score", for Hopper
    python -m benchmarks.compiled --target 89 --target 120  # Ada, and Blackwell of workstations: does all fit?

prints one line per case and target (about a second each, on as many cores as OMP_NUM_THREADS allows), and ends with 1 if
a case lost a property that it states (`sglang_clusterkv/kernels/compile_case.py`). Columns:

    regs      registers per thread
    spills    instructions that read or write local memory (LDL, STL), and local bytes: stack and arrays
    shared    bytes of shared memory per program
    prog/SM   programs that fit one SM, by registers, shared memory and warps
    LDG       loads of 16 bytes from global memory, those of the next column included
    LDGSTS    asynchronous loads of 16 bytes to shared memory
    MMA       tensor-core instructions, of every kind
    div       integer divisions and remainders inside a loop: `div` or `rem` of an integer type in the PTX, between a label
              and a later branch back to it. (A division by a constant is a multiplication there.)
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import sglang_clusterkv
from sglang_clusterkv.kernels.compile_case import CompileCase

TARGETS = (80, 90, 100)  # Ampere, Hopper, Blackwell
SMALL_TARGETS = (89, 120)  # Ada and the Blackwell of workstations: less shared memory, nothing is tuned for them
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
_LABEL = re.compile(r"^\s*(\$\w+):", re.MULTILINE)
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)\s*;")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target; the module's docstring says how each is counted."""

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    programs_per_sm: int
    loads_128: int
    async_loads_128: int
    tensor_cores: int
    loop_divisions: int


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


def compile_for(case: CompileCase, target: int) -> Compiled:
    """Compile one case for one target and read what came out."""
    names = case.kernel.arg_names
    unknown = {*case.signature, *case.constexprs, *case.aligned} ^ set(names)
    assert not unknown, f"{case.name}: not in both the kernel and the case: {sorted(unknown)}"
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        instructions = _tool("nvdisasm", "-c", cubin.name)
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
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def losses(case: CompileCase, result: Compiled, target: int) -> list[str]:
    """What the case states and the machine code does not have; of `SMALL_TARGETS` it has to fit, no more."""
    if target in SMALL_TARGETS:
        return [] if result.programs_per_sm else ["does not fit an SM"]
    checks = (
        (result.spills == 0 and result.local_bytes == 0, "uses local memory"),
        (result.loop_divisions == 0, "divides integers in a loop"),
        (result.registers <= case.max_registers, f"more than {case.max_registers} registers"),
        (result.programs_per_sm >= case.programs_per_sm, f"fewer than {case.programs_per_sm} programs per SM"),
        (result.loads_128 >= case.loads_128, f"fewer than {case.loads_128} LDG.128 and LDGSTS.128"),
        (result.async_loads_128 >= case.async_loads_128, f"fewer than {case.async_loads_128} LDGSTS.128"),
        (result.tensor_cores >= case.tensor_cores, f"fewer than {case.tensor_cores} tensor-core instructions"),
    )
    return [text for held, text in checks if not held]


@functools.cache
def collect(names: tuple[str, ...]) -> dict[str, CompileCase]:
    """The cases of these modules by name, in order; of a package's where it is one, of all kernels where none is named."""
    found = triton_modules()
    wanted = [own for name in names for own in _within(name, found) or [name]] if names else found
    cases: dict[str, CompileCase] = {}
    for module in map(importlib.import_module, wanted):
        own = getattr(module, "COMPILE_CASES", [])
        kernels = {name for name, value in vars(module).items() if _launched(value, module.__name__)}
        without = kernels - {case.kernel.__name__ for case in own}
        assert not without, f"{module.__name__}: kernels without a compile case: {sorted(without)}"
        for case in own:
            assert case.name not in cases, f"{module.__name__}: another case is named {case.name!r}"
            cases[case.name] = case
    return cases


def triton_modules() -> list[str]:
    """Modules of kernels/ that are Triton's: by convention, their name or their folder's begins with `triton`."""
    package = Path(sglang_clusterkv.__file__).parent
    paths = [path.relative_to(package.parent) for path in sorted((package / "kernels").rglob("*.py"))]
    names = [path.parent if path.stem == "__init__" else path.with_suffix("") for path in paths]
    return [".".join(name.parts) for name in names if any(part.startswith("triton") for part in name.parts)]


def _within(package: str, modules: list[str]) -> list[str]:
    return [name for name in modules if name == package or name.startswith(package + ".")]


def _launched(value: object, module: str) -> bool:
    """Is this a kernel of that module? By convention, those end in `_kernel` and what they call does not."""
    return isinstance(value, triton.JITFunction) and value.__name__.endswith("_kernel") and value.__module__ == module


def _compile_named(modules: tuple[str, ...], name: str, target: int) -> Compiled:
    """In a process of the pool, where a kernel cannot be sent to."""
    return compile_for(collect(modules)[name], target)


def _results(modules: tuple[str, ...], todo: list[tuple[str, int]]) -> Iterator[Compiled]:
    """What the cases (name, target) became, in order."""
    jobs = min(torch.get_num_threads(), len(todo))
    if jobs <= 1:
        yield from itertools.starmap(functools.partial(_compile_named, modules), todo)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(functools.partial(_compile_named, modules), *zip(*todo, strict=True))


def lines(modules: tuple[str, ...], only: str, targets: list[int]) -> Iterator[tuple[str, bool]]:
    """The table: each line, and whether its case kept all it states."""
    cases = collect(modules)
    todo = [(name, target) for name in cases if only in name for target in targets]
    width = max((len(name) for name, _ in todo), default=4)
    header = (
        f"{'case':{width}} {'sm':>4} {'regs':>4} {'spills':>11} {'shared':>7} {'prog/SM':>7} {'LDG':>4} {'LDGSTS':>6}"
    )
    yield f"{header} {'MMA':>4} {'div':>3}", bool(todo)
    for (name, target), result in zip(todo, _results(modules, todo), strict=True):
        lost = losses(cases[name], result, target)
        spills = f"{result.spills}, {result.local_bytes} B"
        yield (
            f"{name:{width}} {target:>4} {result.registers:>4} {spills:>11} {result.shared_bytes:>7,}"
            f" {result.programs_per_sm:>7} {result.loads_128:>4} {result.async_loads_128:>6} {result.tensor_cores:>4}"
            f" {result.loop_divisions:>3}" + (f"  LOST: {'; '.join(lost)}" if lost else ""),
            not lost,
        )


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 where a case lost a property, or none was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help="modules with COMPILE_CASES (default: all kernels)")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument(
        "--target",
        type=int,
        action="append",
        choices=TARGETS + SMALL_TARGETS,
        help="may be repeated (default: the first three)",
    )
    options = parser.parse_args(arguments)
    kept = True
    for line, held in lines(tuple(options.modules), options.only, options.target or list(TARGETS)):
        print(line, flush=True)
        kept &= held
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
