"""llama.cpp on the same machine: time per token at a context, and what of it the context costs.

    python -m benchmarks.peers.llama_cpp --build
    python -m benchmarks.peers.llama_cpp [--tokens 100 1000 4000 7700] [--batch 1 8] [--kv f16 q8_0] [--weights F32 BF16]

`--build` gets the source package of llama-cpp-python from PyPI, pinned by its SHA-256, and compiles llama.cpp's batched-bench,
server and quantize for this processor, once, into the folder where the demo model is; it needs a C++ compiler and CMake.

The measurement is llama.cpp's own batched-bench with flash attention: `--batch` sequences share one prompt and decode 32 tokens
each. Weights are those of the GGUF from which `sglang-clusterkv demo-model --name MODEL` is made, in `--weights`: F32 is what
our servers compute with, BF16 has the bytes that their decode steps read, with products of less precision on a CPU with
instructions for them, `own` is the file as it comes. The cost of context is the time per token at the longest context less that
at the shortest, which is attention alone, whatever the products of the weights take. Best of `--rounds`, alternating; run it
alone. Prints a table and writes it to benchmarks/results/, never over an older one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests

from benchmarks.results_file import command_of, write_results
from benchmarks.servers import START_TIMEOUT_S, Server, ends_with_us, free_port, stop
from sglang_clusterkv.tools.demo_model import (
    SMOLLM2,
    SOURCES,
    DemoModelError,
    Source,
    cache_dir,
    sha256_of,
    unpack_gguf,
)

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PROGRAMS = ("llama-batched-bench", "llama-server", "llama-quantize")
OWN = "own"
NEW_TOKENS = 32
CMAKE = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_BUILD_TESTS=OFF"]
CMAKE += ["-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF"]
# Without its page for a browser, which the build would fetch from a network, and without TLS.
CMAKE += ["-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"]


class PeerError(RuntimeError):
    """Something that the user can change; the message is one sentence with the fix."""


def folder() -> Path:
    """Where the programs and the models are kept."""
    return cache_dir() / f"llama.cpp-{VERSION}"


def program(name: str) -> Path | None:
    """A program that was built; None where it was not."""
    path = folder() / "bin" / name
    return path if path.exists() else None


def build() -> Path:
    """Build the programs unless they are there.

    Returns:
        Their folder.

    Raises:
        PeerError: no network, another file than the pinned one, no compiler, or it does not compile.
    """
    if all(program(name) for name in PROGRAMS):
        return folder() / "bin"
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise PeerError(f"building llama.cpp needs {tool}: install CMake and a C++ compiler")
    archive = _source()
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        source = next(Path(scratch).glob("*/vendor/llama.cpp"))
        made = Path(scratch) / "build"
        _run("cmake", "-S", str(source), "-B", str(made), *CMAKE)
        jobs = str(len(os.sched_getaffinity(0)))
        _run("cmake", "--build", str(made), "-j", jobs, "--target", *PROGRAMS)
        (folder() / "bin").mkdir(exist_ok=True)
        for name in PROGRAMS:
            (made / "bin" / name).replace(folder() / "bin" / name)
    return folder() / "bin"


def _source() -> Path:
    """The pinned source package, fetched through pip."""
    downloads = cache_dir() / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    name = f"{PACKAGE.replace('-', '_')}-{VERSION}.tar.gz"
    if not (downloads / name).exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", f"--no-binary={PACKAGE}"]
        _run(*pip, "--disable-pip-version-check", "--dest", str(downloads), f"{PACKAGE}=={VERSION}")
    if (found := sha256_of(downloads / name)) != SHA256:
        raise PeerError(
            f"{downloads / name} has SHA-256 {found[:16]}..., expected {SHA256[:16]}...: delete it and try again"
        )
    return downloads / name


def _run(*command: str) -> None:
    if subprocess.run(command, check=False).returncode != 0:
        raise PeerError(f"`{' '.join(command[:6])} ...` failed: see its message above")


def demo_gguf(weights: str | None = None, source: Source = SMOLLM2) -> Path:
    """A model of `sglang-clusterkv demo-model` as a GGUF file, made once.

    Args:
        weights: a format of llama-quantize; None: as the file comes.
        source: which model.

    Raises:
        PeerError: its packages can't be had, or nothing was built.
    """
    folder().mkdir(parents=True, exist_ok=True)
    plain = folder() / f"{source.name}.gguf"
    if not plain.exists():
        partial = plain.with_suffix(".partial")
        try:
            unpack_gguf(source, partial)
        except DemoModelError as error:
            raise PeerError(str(error)) from error
        partial.replace(plain)
    wanted = folder() / f"{source.name}.{weights}.gguf" if weights else plain
    if weights and not wanted.exists():
        quantize = program("llama-quantize")
        if quantize is None:
            raise PeerError("nothing is built: `python -m benchmarks.peers.llama_cpp --build`")
        partial = wanted.with_suffix(".partial")
        _run(str(quantize), "--allow-requantize", str(plain), str(partial), weights)
        partial.replace(wanted)
    return wanted


def bench_command(
    binary: Path, gguf: Path, tokens: Sequence[int], batch: Sequence[int], kv: str, threads: int
) -> list[str]:
    """llama-batched-bench's command line: one prompt in one KV cache for the batch, flash attention, a JSON object a line."""
    context = max(tokens) + NEW_TOKENS * max(batch) + 512
    listed = [",".join(map(str, numbers)) for numbers in (tokens, batch)]
    command = [str(binary), "-m", str(gguf), "-c", str(context), "-npp", listed[0], "-ntg", str(NEW_TOKENS)]
    command += ["-npl", listed[1], "-pps", "-kvu", "-fa", "on", "-ctk", kv, "-ctv", kv]
    return [*command, "-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]


def times(output: str) -> dict[str, float]:
    """From batched-bench's lines: milliseconds of a step, "tokens x batch", and seconds of a prefill, "prefill tokens"."""
    found: dict[str, float] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            found[f"{row['pp']} x {row['pl']}"] = 1000 * row["t_tg"] / row["tg"]
            prefill = f"prefill {row['pp']}"
            found[prefill] = min(row["t_pp"], found.get(prefill, row["t_pp"]))
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The best of `times`, by "weights KV" in their formats."""
    binary = program("llama-batched-bench")
    if binary is None:
        raise PeerError("nothing is built: `python -m benchmarks.peers.llama_cpp --build`")
    threads = len(os.sched_getaffinity(0))
    models = {weights: demo_gguf(None if weights == OWN else weights, SOURCES[args.model]) for weights in args.weights}
    best: dict[str, dict[str, float]] = {}
    for _, weights, kv in itertools.product(range(args.rounds), models, args.kv):
        cells = best.setdefault(f"{weights} {kv}", {})
        command = bench_command(binary, models[weights], args.tokens, args.batch, kv, threads)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise PeerError(f"llama-batched-bench failed: {done.stderr[-500:]}")
        found = times(done.stdout)
        for tokens, batch in itertools.product(args.tokens, args.batch):
            if f"{tokens} x {batch}" not in found:
                raise PeerError(f"llama-batched-bench measured no {tokens} x {batch}: {done.stderr[-500:]}")
        cells |= {name: min(value, cells.get(name, value)) for name, value in found.items()}
    return best


def table(best: dict[str, dict[str, float]], tokens: Sequence[int], batch: Sequence[int]) -> str:
    """Markdown: milliseconds per token by context, the cost of context, and seconds of the longest prefill."""
    short, long = min(tokens), max(tokens)
    head = " | ".join(f"{count:,} tokens" for count in tokens)
    lines = [
        f"| weights | KV | batch | {head} | cost of context | prefill of {long:,}, s |",
        "|" + "---|" * (len(tokens) + 5),
    ]
    for formats, cells in best.items():
        for size in batch:
            steps = " | ".join(f"{cells[f'{count} x {size}']:.1f}" for count in tokens)
            cost = cells[f"{long} x {size}"] - cells[f"{short} x {size}"]
            prefill = f"{cells[f'prefill {long}']:.1f}"
            lines.append(f"| {formats.replace(' ', ' | ')} | {size} | {steps} | {cost:.1f} | {prefill} |")
    return "\n".join(lines)


@contextmanager
def serve(binary: Path, gguf: Path, log: Path, *, context: int, slots: int) -> Iterator[Server]:
    """llama.cpp's server with flash attention and one KV cache for all slots, until the block ends.

    Args:
        binary: llama-server.
        gguf: its model.
        log: file for what it prints.
        context: tokens of the KV cache.
        slots: requests at once.
    """
    port, threads = free_port(), str(len(os.sched_getaffinity(0)))
    command = [str(binary), "-m", str(gguf), "--host", "127.0.0.1", "--port", str(port), "-c", str(context)]
    command += ["-np", str(slots), "--kv-unified", "-fa", "on", "-t", threads, "-tb", threads, "--jinja"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, preexec_fn=ends_with_us
        )
    try:
        server = Server(port, log, process)
        begin = time.monotonic()
        while process.poll() is None and time.monotonic() - begin < START_TIMEOUT_S:
            try:
                if requests.get(f"{server.url}/health", timeout=20).status_code == 200:
                    break
            except requests.RequestException:
                pass
            time.sleep(0.5)
        else:
            raise PeerError(f"llama.cpp's server did not start: {log.read_text()[-500:]}")
        yield server
    finally:
        stop(process)


def main(argv: list[str] | None = None) -> int:
    """Build or measure; 1 with a sentence where it could not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="get the source and compile it, once")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 1000, 4000, 7700])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--kv", nargs="+", default=["f16", "q8_0"], help="formats of the KV cache")
    parser.add_argument("--weights", nargs="+", default=["F32"], help="formats of llama-quantize, or own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=SOURCES, default=SMOLLM2.name)
    args = parser.parse_args(argv)
    try:
        if args.build:
            print(build())
            return 0
        best = measure(args)
    except PeerError as error:
        print(error, file=sys.stderr)
        return 1
    body = table(best, args.tokens, args.batch)
    print(body)
    write_results(
        "llama-cpp",
        title="llama.cpp: time per token",
        setting=f"{args.model}, weights {', '.join(args.weights)}, flash attention, a prompt shared by the batch, "
        f"{PACKAGE} {VERSION}",
        command=command_of("benchmarks.peers.llama_cpp"),
        body=body,
        data=best,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
