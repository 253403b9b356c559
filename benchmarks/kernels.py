"""Each operation of a decode step alone, and clustering, on random keys of a model's shape: time, GB/s, share of the step.

    python -m benchmarks.kernels [--shape smollm2-135m] [--cells 1x7700 8x7700] [--layers 6]
    python -m benchmarks.kernels --device cuda [--shape llama-3.1-8b] [--cells 8x32768 1x131072]

On a CPU the numba kernels, with `--device cuda` the Triton kernels; there the whole step is compared with SGLang's dense Triton
decode and FlashInfer's dense decode, and clustering with flash-kmeans where that is installed. Times are those of all layers of
the model, scaled from `--layers` layers; GB/s count what an operation must read and write, beside the machine's measured copy
bandwidth. Where the cells do not fit the memory, fewer layers are measured.

The operations' own tests run first, and an operation whose test is red gets no figures; `--trust` leaves the tests out. Prints
a table per cell (requests x tokens of each) and writes them to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from benchmarks.kernel_scene import (
    DTYPES,
    PAGE_SIZE,
    SHAPES,
    STEP,
    Clock,
    CpuClock,
    CudaClock,
    Scene,
    copy_gbps,
    dense_bytes,
    fitting_layers,
    free_bytes,
    make_scene,
)
from benchmarks.results_file import command_of, write_results
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import BANDWIDTHS_TBS
from sglang_clusterkv.memory import movement

ROOT = Path(__file__).parents[1]
CLUSTERING = {"k-means", "encode"}
WARM_UP_TOKENS = 4096
_MODEL_COLUMNS = "".join(f" model at {tbs} TB/s |" for tbs in BANDWIDTHS_TBS)
_DECODE, _BUILD = (
    ["tests/kernels/test_decode_cpu.py"],
    ["tests/clusters/test_exact_engine.py", "-k", "build_and_references or duplicate"],
)
# Arguments of pytest that show an operation right, by device; tests/benchmarks/test_benchmarks.py holds that none is missing.
TESTS: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "rotate": ["tests/memory/test_codec.py", "-k", "rotation"],
        **dict.fromkeys(["score", "select", "refine", "recall", "attend", "estimate", "merge", STEP], _DECODE),
        **dict.fromkeys(CLUSTERING, _BUILD),
    },
    "cuda": {
        **{
            name: [f"tests/kernels/triton/test_{name}.py"]
            for name in ("score", "select", "refine", "attend", "estimate", "merge")
        },
        "recall": ["tests/kernels/triton/test_refine.py"],
        STEP: ["tests/kernels/triton/test_chain.py"],
        "k-means": ["tests/kernels/triton/test_kmeans.py"],
        "encode": ["tests/kernels/triton/test_encode.py"],
    },
}


class Cell(NamedTuple):
    """Requests, and tokens of each; the first `shared`, whole pages, are the same for all."""

    batch: int
    context: int
    shared: int = 0

    @classmethod
    def parse(cls, text: str) -> Cell:
        """`8x32768`, or with tokens that are shared `8x7700/7000`."""
        sizes, _, shared = text.partition("/")
        batch, context = map(int, sizes.split("x"))
        whole = int(shared or 0) // PAGE_SIZE * PAGE_SIZE
        if whole >= context or (whole and batch == 1):
            raise ValueError(f"{text}: two or more requests share fewer tokens than they have")
        return cls(batch, context, whole)


class Defaults(NamedTuple):
    shape: str
    cells: list[Cell]
    dtype: str
    layers: int
    repeats: int
    budget: int
    candidates: int


DEFAULTS = {
    "cpu": Defaults("smollm2-135m", [Cell(1, 7700), Cell(8, 7700)], "float32", 6, 9, 256, 1024),
    "cuda": Defaults(
        "llama-3.1-8b",
        [*(Cell(batch, tokens) for tokens in (8192, 32768) for batch in (1, 8, 28)), Cell(1, 131072), Cell(6, 131072)],
        "bf16", 2, 50, 512, 2048,
    ),
}  # fmt: skip


class Line(NamedTuple):
    """One operation, all layers of the model."""

    name: str
    ms: float
    share: float | None  # of the whole step; None where that is red, or the operation is no part of it
    gbps: float | None
    of_copy: float | None  # share of the copy bandwidth


def red_operations(tests: Mapping[str, Sequence[str]], run: Callable[[Sequence[str]], bool]) -> dict[str, str]:
    """Operations that must not be measured, with the reason; the whole step is one of them as soon as a part of it is.

    Args:
        tests: arguments of pytest by operation.
        run: whether pytest passes with these arguments; called once for each that differ.
    """
    passed = {arguments: run(arguments) for arguments in dict.fromkeys(tuple(a) for a in tests.values())}
    red = {name: f"red: pytest {' '.join(a)}" for name, a in tests.items() if not passed[tuple(a)]}
    if STEP in tests and set(red) - CLUSTERING:
        red.setdefault(STEP, f"red: {', '.join(name for name in red if name not in CLUSTERING)}")
    return red


def run_tests(arguments: Sequence[str], device: str) -> bool:
    """Run pytest in a process of its own; its summary is shown where it fails."""
    where = ["--device", device] if device != "cpu" else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments, *where]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        print(f"{' '.join(command)}\n{found.stdout[-2000:]}{found.stderr[-1000:]}", file=sys.stderr)
    return found.returncode == 0


def line_of(name: str, ms: float, whole_ms: float | None, moved_bytes: float, bandwidth: float) -> Line:
    """One line; no GB/s where bytes do not count, or where nothing is left of the time."""
    gbps = moved_bytes / ms / 1e6 if moved_bytes and ms > 0 else None
    share = None if whole_ms is None else ms / whole_ms
    return Line(name, ms, share, gbps, None if gbps is None else gbps / bandwidth)


def per_layer_ms(call: Callable[[int], object], scene: Scene, clock: Clock, repeats: int) -> float:
    """Milliseconds of one layer: all layers of the scene in turn, so that none finds its own data in a cache."""

    def all_layers() -> None:
        for layer in range(scene.layers):
            call(layer)

    return clock.ms(all_layers, repeats) / scene.layers


def measure(
    scene: Scene, kernels: ModuleType, clock: Clock, repeats: int, bandwidth: float, red: Mapping[str, str]
) -> dict[str, Any]:
    """All figures of one cell; a red operation's are left out."""
    layers = scene.shape.layers
    # What SGLang's graphs do not hold: clustering runs between steps, and so does a step while no graph was captured.
    eager = CudaClock(graphs=False) if isinstance(clock, CudaClock) else clock
    operations, clustering, dense = kernels.operations(scene), kernels.clustering(scene), kernels.dense_steps(scene)
    with tqdm(total=len(operations) + len(clustering) + len(dense) + 3, leave=False, unit="operation") as bar:

        def ms(call: Callable[[int], object], clock: Clock = clock) -> float:
            found = layers * per_layer_ms(call, scene, clock, repeats)
            bar.update()
            return found

        times = {}
        for i, operation in enumerate(operations):
            for earlier in operations[:i]:
                earlier.call(0)  # so that this one finds what it reads in a step, whatever was timed before
            times[operation.name] = ms(operation.call)
        whole_ms = ms(kernels.whole_step(scene))
        eager_ms = whole_ms if eager is clock else ms(kernels.whole_step(scene), eager)
        dense_ms = {name: ms(call) for name, call in dense.items()}
        parts = {}
        for part in clustering:
            parts[part.name] = scene.to_model * eager.ms(part.call, repeats)
            bar.update()
        lists_ms = CpuClock().ms(lambda: scene.engine.begin_decode(scene.rows, scene.seq_lens), repeats)
        bar.update()

    whole = None if STEP in red else whole_ms

    def line(name: str, ms: float, layer_bytes: float) -> dict[str, Any]:
        return line_of(name, ms, whole, layers * layer_bytes, bandwidth)._asdict()

    of_step = [line(o.name, times[o.name], o.moved_bytes) for o in operations]
    of_clustering = [
        line_of(p.name, alone_ms(parts, p.name, p.includes), None, scene.to_model * p.moved_bytes, bandwidth)._asdict()
        | {"tokens": p.tokens}
        for p in clustering
    ]
    return {
        "batch": scene.batch,
        "context": scene.context,
        "shared": scene.shared,
        "layers_measured": scene.layers,
        "operations": [found for found in of_step if found["name"] not in red],
        "clustering": [found for found in of_clustering if found["name"] not in red],
        "whole": None if whole is None else line(STEP, whole, sum(o.moved_bytes for o in operations)),
        "eager_ms": None if whole is None else eager_ms,
        "lists_ms": lists_ms,
        "dense": [line(name, ms, dense_bytes(scene)) for name, ms in dense_ms.items()],
        "prefixes_ms": 1000 * scene.clustering_s * scene.to_model,
        "segments": scene.segments,
        "model_ms": kernels.model_ms(scene),
        "kmeans": [] if "k-means" in red else kernels.kmeans_comparison(scene, repeats),
    }


def alone_ms(times: Mapping[str, float], name: str, includes: str | None) -> float:
    """Time of a part without that of the part whose work it also does."""
    return times[name] - (times[includes] if includes else 0.0)


def table(found: Mapping[str, Any], red: Mapping[str, str]) -> str:
    """One cell as Markdown."""
    model = found["model_ms"]
    lines = [
        f"### {found['batch']} x {found['context']:,} tokens{_sharing(found)}",
        "",
        "| operation | ms per step | share | GB/s | of copy |" + (_MODEL_COLUMNS if model else ""),
        "|---|---|---|---|---|" + ("---|" * len(BANDWIDTHS_TBS) if model else ""),
        *(_row(line, model) for line in found["operations"]),
    ]
    if found["whole"]:
        lines.append(_row(found["whole"], model))
        if found["eager_ms"] != found["whole"]["ms"]:
            lines.append(f"| the same, launched from Python | {found['eager_ms']:.3f} | | | |")
    lines.append(f"| lists, once per step, host | {found['lists_ms']:.3f} | | | |")
    lines += [_row(line, model) for line in found["dense"]]
    lines += [f"| {name} | {reason} | | | |" for name, reason in red.items()]
    lines += ["", "| clustering, all layers | tokens | ms | GB/s | of copy |", "|---|---|---|---|---|"]
    for line in found["clustering"]:
        lines.append(
            f"| {line['name']} | {line['tokens']:,} | {line['ms']:.2f} | {_number(line['gbps'])} "
            f"| {_percent(line['of_copy'])} |"
        )
    if not CLUSTERING & set(red):
        tokens = found["batch"] * found["context"] - (found["batch"] - 1) * found["shared"]
        lines.append(
            f"| whole prompts, {found['segments']} segments, planned | {tokens:,} | {found['prefixes_ms']:.2f} | | |"
        )
    if found["kmeans"]:
        lines += ["", "| k-means | ms | mean squared distance |", "|---|---|---|"]
        lines += [f"| {line['name']} | {line['ms']:.2f} | {line['objective']:.5f} |" for line in found["kmeans"]]
    return "\n".join(lines)


def summary(cells: Iterable[Mapping[str, Any]]) -> str:
    """The whole step beside the best dense one, a line per cell; nothing of a red step."""
    lines = [
        "| batch | context | step ms | GB/s | of copy | best dense | ms | GB/s | of copy | dense / step |",
        "|" + "---|" * 10,
    ]
    for found in cells:
        whole = found["whole"]
        if whole is None or not found["dense"]:
            continue
        best = min(found["dense"], key=lambda line: line["ms"])
        lines.append(
            f"| {found['batch']} | {found['context']:,}{_sharing(found)} | {whole['ms']:.3f} | {_number(whole['gbps'])} "
            f"| {_percent(whole['of_copy'])} | {best['name']} | {best['ms']:.3f} | {_number(best['gbps'])} "
            f"| {_percent(best['of_copy'])} | {best['ms'] / whole['ms']:.2f} |"
        )
    return "\n".join(lines)


def _sharing(found: Mapping[str, Any]) -> str:
    return f", the first {found['shared']:,} shared" if found["shared"] else ""


def _row(line: Mapping[str, Any], model: Mapping[str, Sequence[float]]) -> str:
    predicted = "".join(f" {ms:.3f} |" for ms in model.get(line["name"], []))
    return (
        f"| {line['name']} | {line['ms']:.3f} | {_percent(line['share'])} | {_number(line['gbps'])} "
        f"| {_percent(line['of_copy'])} |{predicted}"
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def parse() -> argparse.Namespace:
    """The command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument(
        "--cells",
        type=Cell.parse,
        nargs="+",
        help="requests x tokens of each, as in 8x32768; 8x7700/7000: the first are shared",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the KV pool")
    parser.add_argument("--centroid-dtype", choices=["int4", "int8", "bf16"], default="int4")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--layers", type=int, help="layers measured; times are scaled to the model's")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the kernels, on a CPU")
    parser.add_argument("--changes", type=json.loads, default={}, help="other options of ours, as JSON")
    parser.add_argument("--trust", action="store_true", help="leave the operations' tests out")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    for name, value in DEFAULTS[args.device]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def kernels_of(device: str) -> ModuleType:
    """The module that knows a device's operations."""
    if device == "cpu":
        from benchmarks import kernels_cpu

        return kernels_cpu
    from benchmarks import kernels_cuda

    return kernels_cuda


def main() -> None:
    """Measure every cell; exits with 1 where an operation's test is red or a cell does not fit the memory."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    kernels, shape, dtype = kernels_of(args.device), SHAPES[args.shape], DTYPES[args.dtype]
    red: dict[str, str] = {}
    if not args.trust:
        print("running the operations' tests", flush=True)
        red = red_operations(TESTS[args.device], lambda arguments: run_tests(arguments, args.device))
    config = ClusterKVConfig(
        budget_tokens=args.budget,
        candidate_tokens=args.candidates,
        centroid_dtype=args.centroid_dtype,
        **{"dense_below": "never"} | args.changes,
    )
    config = movement.resolve(config, args.device)
    clock: Clock = CpuClock() if args.device == "cpu" else CudaClock()
    bandwidth = copy_gbps(clock, args.device)
    make_scene(config, shape, 1, 1, args.budget + WARM_UP_TOKENS, dtype, args.device)  # compiles what clusters
    found, left_out = [], []
    for cell in tqdm(args.cells, unit="cell"):
        layers = fitting_layers(
            config, shape, args.layers, cell.batch, cell.context, dtype, free_bytes(args.device), cell.shared
        )
        if not layers:
            left_out.append(f"{cell.batch} x {cell.context:,} tokens do not fit the memory with one layer: left out")
            continue
        scene = make_scene(config, shape, layers, cell.batch, cell.context, dtype, args.device, cell.shared)
        found.append(measure(scene, kernels, clock, args.repeats, bandwidth, red))
        del scene
    body = "\n\n".join(
        [
            f"Copy: {bandwidth:.1f} GB/s, read and written.",
            summary(found),
            *(table(cell, red) for cell in found),
            *left_out,
        ]
    )
    print(f"\n{body}\n")
    write_results(
        f"kernels-{args.device}-{args.shape}",
        title="Operations of a decode step",
        setting=(
            f"{args.shape}, {args.dtype} KV, {args.centroid_dtype} rows, budget {args.budget}, candidates {args.candidates}"
            + (f", {args.threads} thread(s)" if args.device == "cpu" else "")
        ),
        command=command_of("benchmarks.kernels"),
        body=body,
        data={"copy_gbps": bandwidth, "cells": found, "red": red, "left_out": left_out},
        device=args.device,
    )
    sys.exit(1 if red or left_out else 0)


if __name__ == "__main__":
    main()
