"""The command; see the package."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import benchmarks.gpu
from benchmarks.gpu.figures import Figure, lines

ROOT = Path(__file__).parents[2]
TOTAL_S = 480
TESTS = "tests/kernels/triton"
SANITIZED = (
    "chain_equals or dense_decode_equals or index_holds or duplicate_keys_are_labelled or as_a_cpu or either_tier"
)
_TAIL = 2000  # characters of a failed part's log that are printed


class Part(NamedTuple):
    """One part of the run.

    Attributes:
        name: of the part, and of its files.
        limit_s: then it is ended.
        command: to run, behind Python; `--out FILE`, and `--dry`, follow where it makes figures.
        has_figures: it makes figures; else it is a run of pytest.
        modules: that it imports and a machine may lack.
    """

    name: str
    limit_s: int
    command: tuple[str, ...]
    has_figures: bool = True
    modules: tuple[str, ...] = ()


def _measured(name: str, limit_s: int, *arguments: str, modules: tuple[str, ...] = ()) -> Part:
    module = "server" if arguments else name
    return Part(name, limit_s, ("-m", f"benchmarks.gpu.{module}", *arguments), modules=modules)


# What says most first, should time run out.
PARTS = (
    Part("tests", 150, ("-m", "pytest", TESTS, "-q", "-p", "no:cacheprovider"), False, ("pytest",)),
    _measured("graphs", 40),
    _measured("operations", 120),
    _measured("server-sparse", 120, "sparse", modules=("sglang",)),
    _measured("server-dense", 90, "dense-triton", modules=("sglang",)),
    _measured("engines", 60, modules=("flashinfer",)),
    _measured("pinned", 20),
    Part("memcheck", 90, ("-m", "pytest", TESTS, "-q", "-p", "no:cacheprovider", "-k", SANITIZED), False, ("pytest",)),
    _measured("server-eager", 90, "eager", modules=("sglang",)),
    _measured("server-dense-flashinfer", 90, "dense-flashinfer", modules=("sglang", "flashinfer")),
)


class Result(NamedTuple):
    """What became of a part: `passed`, `failed`, `ran too long` or `left out`, and why."""

    name: str
    status: str
    why: str
    seconds: float
    figures: list[Figure]


def sanitizer() -> str | None:
    """The path of compute-sanitizer, if it is here."""
    beside = list(Path(sys.prefix).glob("lib/python3*/site-packages/nvidia/cu*/bin/compute-sanitizer"))
    for place in ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer", *map(str, beside)):
        if found := shutil.which(place):
            return found
    return None


def command_of(part: Part, out: Path, dry: bool) -> list[str]:
    """The command line of a part whose files are in `out`."""
    command = [sys.executable, *part.command]
    if part.has_figures:
        command += ["--out", str(out / f"{part.name}.figures.json"), *(["--dry"] if dry else [])]
    elif dry:
        command += ["--device", "cuda", "--collect-only"]
    else:
        command += ["--device", "cuda"]
        if part.name == "memcheck":
            tool = sanitizer() or ""
            checked = ["--tool", "memcheck", "--kernel-name", "kernel_substring=_kernel", "--error-exitcode", "9"]
            return [tool, *checked, *command]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(min(8, os.cpu_count() or 1))]  # most of the time is compilation
    return command


def missing(part: Part, dry: bool) -> str | None:
    """What a part needs and this machine does not have."""
    for module in part.modules:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    if part.name == "memcheck" and not dry and sanitizer() is None:
        return "compute-sanitizer is not here"
    return None


def run(part: Part, out: Path, dry: bool, limit_s: float) -> Result:
    """Run a part, end it at its limit, and keep what it printed."""
    if why := missing(part, dry):
        return Result(part.name, "left out", why, 0.0, [])
    if limit_s < min(part.limit_s, 20):
        return Result(part.name, "left out", f"no time was left: --parts {part.name}", 0.0, [])
    figures = out / f"{part.name}.figures.json"
    figures.unlink(missing_ok=True)
    environment = {
        "FLASHINFER_DISABLE_JIT": "1"
    } | os.environ  # its kernels take minutes to compile: those that are there
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *_inherited()])
    if part.name == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # else a read beyond a tensor ends in another one
    begin = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as printed:
        # In a session of its own: a server's processes end with it.
        process = subprocess.Popen(
            command_of(part, out, dry),
            cwd=ROOT,
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(min(limit_s, part.limit_s))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    took = time.monotonic() - begin
    found = [Figure(**one) for one in json.loads(figures.read_text())] if figures.exists() else []
    figures.unlink(missing_ok=True)
    found = [one._replace(measured=float("nan") if one.measured is None else one.measured) for one in found]
    status = "ran too long" if code is None else "failed" if code else "passed"
    why = "" if code == 0 else f"{'limit' if code is None else f'exit status {code}'}, see {log.name}"
    return Result(part.name, status, why, took, found)


def _inherited() -> list[str]:
    return [path for path in (os.environ.get("PYTHONPATH") or "").split(os.pathsep) if path]


def write(result: Result, out: Path, dry: bool) -> None:
    """The part's file."""
    told: dict[str, Any] = result._asdict() | {"figures": [one._asdict() for one in result.figures], "dry": dry}
    (out / f"{result.name}.json").write_text(json.dumps(told, indent=1))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 1 where one failed or ran too long, what was left out does not count."""
    parser = argparse.ArgumentParser(
        description=benchmarks.gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--dry", action="store_true", help="without a GPU, every part up to its launches")
    parser.add_argument("--out", type=Path, help="folder for the files, default build/gpu-DATE-TIME")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for all parts together, default %(default)s")
    options = parser.parse_args(arguments)
    if not options.dry:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device is here: --dry runs every part up to its launches", file=sys.stderr)
            return 1
    out: Path = options.out or ROOT / "build" / time.strftime("gpu-%Y%m%d-%H%M%S")
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.seconds
    bad = 0
    for part in (part for part in PARTS if part.name in options.parts):
        result = run(part, out, options.dry, ends - time.monotonic())
        write(result, out, options.dry)
        print(f"== {result.name}: {result.status} {result.why} ({result.seconds:.0f} s)", flush=True)
        for line in lines(result.figures):
            print(f"   {line}", flush=True)
        if result.status in ("failed", "ran too long"):
            bad += 1
            print((out / f"{part.name}.log").read_text(errors="replace")[-_TAIL:], flush=True)
    print(f"files: {out}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
