"""`benchmarks.peers.llama_cpp` without llama.cpp: what it would run, and what it makes of the answers.

Red when: sequences do not share their prompt or do not fit the context, attention is not flash attention, a step's time is of
another number of tokens, the best of several rounds is not the least, or a source package that differs is compiled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import llama_cpp
from benchmarks.peers.llama_cpp import PeerError, bench_command, build, measure, program, table, times
from sglang_clusterkv.tools.demo_model import QWEN


def line(tokens: int, batch: int, seconds: float, prefill: float = 99.0) -> str:
    return json.dumps({"pp": tokens, "tg": 32, "pl": batch, "t_tg": seconds, "t_pp": prefill, "speed_tg": 1.0})


def test_the_prompt_is_shared_and_everything_fits() -> None:
    command = bench_command(Path("bench"), Path("m.gguf"), [100, 7700], [1, 8], "q8_0", 2)
    joined = " ".join(command)
    for part in ("-npp 100,7700", "-npl 1,8", "-pps -kvu", "-fa on", "-ctk q8_0 -ctv q8_0", "-t 2 -tb 2", "jsonl"):
        assert part in joined, part
    assert int(command[command.index("-c") + 1]) >= 7700 + 8 * 32


def test_a_steps_time_is_that_of_its_decoding() -> None:
    output = f"main: loaded\n{line(100, 1, 0.32)}\n{line(7700, 1, 3.2, 21.0)}\n{line(7700, 8, 16, 20.5)}\n"
    assert times(output) == {"100 x 1": 10, "prefill 100": 99, "7700 x 1": 100, "7700 x 8": 500, "prefill 7700": 20.5}


def test_the_best_of_the_rounds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"f16": iter([0.64, 3.2, 0.32, 6.4]), "q8_0": iter([0.96, 9.6, 1.28, 6.4])}

    models: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        kv = command[command.index("-ctk") + 1]
        models.append(command[command.index("-m") + 1])
        took = next(seconds[kv])
        return subprocess.CompletedProcess(command, 0, f"{line(100, 1, took)}\n{line(7700, 1, 10 * took)}\n", "")

    monkeypatch.setattr(llama_cpp, "program", lambda name: Path(name))
    monkeypatch.setattr(llama_cpp, "demo_gguf", lambda weights, source: Path(f"{source.name}.{weights}.gguf"))
    monkeypatch.setattr(subprocess, "run", run)
    args = argparse.Namespace(
        weights=["F32", "BF16"], kv=["f16", "q8_0"], tokens=[100, 7700], batch=[1], rounds=2, model=QWEN.name
    )
    best, prefills = measure(args), {"prefill 100": 99, "prefill 7700": 99}
    assert best == {
        "F32 f16": prefills | {"100 x 1": 10, "7700 x 1": 100},
        "F32 q8_0": prefills | {"100 x 1": 30, "7700 x 1": 300},
        "BF16 f16": prefills | {"100 x 1": 100, "7700 x 1": 1000},
        "BF16 q8_0": prefills | {"100 x 1": 200, "7700 x 1": 2000},
    }
    assert models == [f"{QWEN.name}.{weights}.gguf" for weights in ("F32", "F32", "BF16", "BF16")] * 2
    seconds["f16"], seconds["q8_0"] = iter([1.0]), iter([1.0])
    with pytest.raises(PeerError, match="measured no 100 x 2"):
        measure(argparse.Namespace(**vars(args) | {"batch": [1, 2], "rounds": 1}))
    assert table(best, args.tokens, args.batch).splitlines()[2:4] == [
        "| F32 | f16 | 1 | 10.0 | 100.0 | 90.0 | 99.0 |",
        "| F32 | q8_0 | 1 | 30.0 | 300.0 | 270.0 | 99.0 |",
    ]


def test_another_source_package_is_not_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SGLANG_CLUSTERKV_CACHE", str(tmp_path))
    (tmp_path / "downloads").mkdir()
    file = tmp_path / "downloads" / f"llama_cpp_python-{llama_cpp.VERSION}.tar.gz"
    file.write_bytes(b"something else")
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda tool: tool)
    with pytest.raises(PeerError, match="has SHA-256"):
        build()
    assert program("llama-server") is None and llama_cpp.main(["--rounds", "1"]) == 1
