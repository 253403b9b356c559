"""Compile the Triton kernels for three generations of GPUs, without one, and read the machine code.

    python -m benchmarks.compiled                           # all cases of sglang_clusterkv/kernels/
    python -m benchmarks.compiled --only score --target 90  # those whose name holds "score", for Hopper
    python -m benchmarks.compiled --target 89 --target 120  # Ada, and Blackwell of workstations: does all fit?
    python -m benchmarks.compiled --keep                    # all cases, and keeps them in benchmarks/compiled.json

prints one line per case and target, and ends with 1 if a case lost a property that it states
(`sglang_clusterkv/kernels/compile_case.py`), or has or executes more instructions than compiled.json allows it: a fiftieth more
than it did when it was first kept. `--keep --raise` allows what there is now. A compilation takes two seconds of a core, on as
many cores as OMP_NUM_THREADS allows. What compiled.json has under the same hash (of the kernel's source and whatever it calls,
of the case's types and constants, of the target, Triton and ptxas) is not compiled again, but for a few, drawn anew each time:
those must come out as they are kept. Columns:

    regs      registers per thread
    spills    instructions that read or write local memory (LDL, STL), and local bytes: stack and arrays
    shared    bytes of shared memory per program
    prog/SM   programs that fit one SM, by registers, shared memory and warps
    LDG       loads of 16 bytes from global memory, those of the next column included
    LDGSTS    asynchronous loads of 16 bytes to shared memory
    MMA       tensor-core instructions, of every kind
    instr     instructions, each counted once, however often it runs
    run       of sm_90: as often as it usually runs (`executed.py`), of a warp
    div       integer divisions and remainders inside a loop: `div` or `rem` of an integer type in the PTX, between a label
              and a later branch back to it. (A division by a constant is a multiplication there.)
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import multiprocessing
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton

import sglang_clusterkv
from benchmarks.machine_code import MODEL_TARGET, Compiled, compile_for, hash_of
from sglang_clusterkv.kernels.compile_case import CompileCase

TARGETS = (80, 90, 100)  # Ampere, Hopper, Blackwell
SMALL_TARGETS = (89, 120)  # Ada and the Blackwell of workstations: less shared memory, nothing is tuned for them
KEPT = Path(__file__).with_suffix(".json")
RECHECKED = 6  # of those that are kept, in each run


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
        for value in vars(module).values():
            if isinstance(value, triton.JITFunction):
                value.starting_line_number = 1  # Triton hashes it; where a function stands changes no instruction
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


class Kept(NamedTuple):
    """What is kept of a case and a target."""

    hash: str
    result: Compiled
    most_instructions: int
    most_executed: int | None  # of MODEL_TARGET


def read_kept(path: Path) -> dict[tuple[str, int], Kept]:
    """(case, target) -> what the file tells."""
    entries = json.loads(path.read_text()) if path.exists() else []
    return {
        (entry.pop("case"), entry.pop("target")): Kept(
            entry.pop("hash"),
            most_instructions=entry.pop("most_instructions"),
            most_executed=entry.pop("most_executed", None),
            result=Compiled(**entry),
        )
        for entry in entries
    }


def write_kept(path: Path, found: dict[tuple[str, int], Kept]) -> None:
    """Replace the file; a line an entry, for whoever reads the difference."""
    entries = [
        json.dumps(
            {"case": name, "target": target, "hash": kept.hash}
            | asdict(kept.result)
            | {"most_instructions": kept.most_instructions, "most_executed": kept.most_executed}
        )
        for (name, target), kept in sorted(found.items())
    ]
    path.write_text("[\n" + ",\n".join(entries) + "\n]\n")


def _allowed(kept: Kept | None, result: Compiled, raised: bool) -> tuple[int, int | None]:
    """How many instructions a case may have from now on, and execute."""
    most = None if kept is None or raised else kept.most_instructions
    most_executed = None if kept is None or raised else kept.most_executed
    if most_executed is None and result.executed is not None:
        most_executed = result.executed * 51 // 50
    return result.instructions * 51 // 50 if most is None else most, most_executed


def lines(
    modules: tuple[str, ...],
    only: str,
    targets: list[int],
    kept: Path | None = None,
    *,
    keep: bool = False,
    raised: bool = False,
) -> Iterator[tuple[str, bool]]:
    """The table: each line, and whether its case kept all it states.

    Args:
        modules: with the cases; none: those of all kernels.
        only: part of the names of those wanted.
        targets: compute capabilities times 10.
        kept: file with what came out earlier; None: all is compiled.
        keep: write the file: what is known stays, the rest as it came out.
        raised: cases may have as many instructions as they have now.
    """
    cases = collect(modules)
    todo = [(name, target) for name in cases if only in name for target in targets]
    earlier = read_kept(kept) if kept else {}
    hashes = {(name, target): hash_of(cases[name], target) for name, target in todo} if kept else {}
    known = [one for one in todo if one in earlier and earlier[one].hash == hashes[one]]
    if keep:  # what was kept before executed instructions were counted is counted now
        known = [one for one in known if (earlier[one].result.executed is None) == (one[1] != MODEL_TARGET)]
    again = set(random.sample(known, min(RECHECKED, len(known))))
    skipped = set(known) - again
    results = _results(modules, [one for one in todo if one not in skipped])
    width = max((len(name) for name, _ in todo), default=4)
    header = (
        f"{'case':{width}} {'sm':>4} {'regs':>4} {'spills':>11} {'shared':>7} {'prog/SM':>7} {'LDG':>4} {'LDGSTS':>6}"
    )
    yield f"{header} {'MMA':>4} {'instr':>6} {'run':>7} {'div':>3}", bool(todo)
    found = {}
    for name, target in todo:
        one = name, target
        before = earlier.get(one)
        result = earlier[one].result if one in skipped else next(results)
        most, most_executed = _allowed(before, result, raised)
        found[one] = Kept(hashes.get(one, ""), result, most, most_executed)
        lost = losses(cases[name], result, target)
        if result.instructions > most:
            lost.append(f"more than {most:,} instructions")
        if most_executed is not None and result.executed is not None and result.executed > most_executed:
            lost.append(f"executes more than {most_executed:,}")
        if before is not None and one in again and not _same(result, before.result):
            lost.append(f"kept was {before.result}")
        spills = f"{result.spills}, {result.local_bytes} B"
        yield (
            f"{name:{width}} {target:>4} {result.registers:>4} {spills:>11} {result.shared_bytes:>7,}"
            f" {result.programs_per_sm:>7} {result.loads_128:>4} {result.async_loads_128:>6} {result.tensor_cores:>4}"
            f" {result.instructions:>6,} {result.executed or '-':>7} {result.loop_divisions:>3}"
            + (f"  LOST: {'; '.join(lost)}" if lost else ""),
            not lost,
        )
    if kept and keep:
        write_kept(kept, found)
    if kept:
        new = len(todo) - len(known)
        yield (
            f"{len(known)} of {len(todo)} were known by their hash, {len(again)} of them compiled again; {new} new",
            True,
        )


def _same(result: Compiled, kept: Compiled) -> bool:
    return replace(result, executed=None) == kept if kept.executed is None else result == kept


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
    parser.add_argument("--kept", type=Path, help=f"file with earlier results (default: {KEPT.name}, of all kernels)")
    parser.add_argument("--keep", action="store_true", help="write that file")
    parser.add_argument("--raise", dest="raised", action="store_true", help="allow the instructions that there are now")
    options = parser.parse_args(arguments)
    if options.keep and not options.kept and (options.modules or options.only or options.target):
        parser.error(f"{KEPT.name} is of all kernels: name another file with --kept")
    targets = options.target or list(TARGETS)
    kept = options.kept or (None if options.modules else KEPT)
    all_held = True
    for line, held in lines(
        tuple(options.modules), options.only, targets, kept, keep=options.keep, raised=options.raised
    ):
        print(line, flush=True)
        all_held &= held
    return 0 if all_held else 1


if __name__ == "__main__":
    sys.exit(main())
