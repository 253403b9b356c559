"""What a GPU machine is asked, up to the launches; and that a part which fails, hangs or cannot run is said to.

Red when: a part's program no longer runs up to its launches, launches another number than a step has, a figure loses its
prediction, a part that ends badly counts as passed or leaves no file, or what it started outlives it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.__main__ import PARTS, TOTAL_S, Part
from benchmarks.gpu.figures import Figure, lines


def dry(tmp_path: Path, *names: str) -> dict[str, Any]:
    """The files of a dry run of these parts, by name."""
    assert command.main(["--dry", "--parts", *names, "--out", str(tmp_path)]) == 0
    return {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in names}


def test_kernels_are_bound_to_their_arguments_up_to_the_launch(tmp_path: Path) -> None:
    found = dry(tmp_path, "graphs", "operations", "pinned", "engines")
    assert all(one["status"] == "passed" and one["dry"] for one in found.values())
    (launches,) = found["graphs"]["figures"]
    assert launches["measured"] == 7, "a layer of a sparse step has seven launches"
    predicted = {one["name"].split(",")[0]: one["predicted"] for one in found["operations"]["figures"]}
    assert all(
        predicted[name] > 0 for name in ("score", "select", "recall", "attend", "estimate", "merge", "whole step")
    )
    assert found["operations"]["figures"][-1]["measured"] > 40
    assert {one["predicted"] for one in found["pinned"]["figures"]} == {10.0, 50.0}
    assert found["engines"]["figures"][0]["predicted"] > 0


@pytest.mark.long
def test_servers_arguments_are_taken_by_sglang_and_the_plugin(tmp_path: Path) -> None:
    found = dry(tmp_path, "server-sparse", "server-eager", "server-dense", "tests", "memcheck")
    assert all(one["status"] == "passed" for one in found.values()), found
    steps = {name: found[name]["figures"][0]["predicted"] for name in ("server-sparse", "server-dense")}
    assert 3 < steps["server-sparse"] < steps["server-dense"]


def part(name: str, code: str, limit_s: int = 30) -> Part:
    """A part that runs this code; its figures' file is its argument."""
    return Part(name, limit_s, ("-c", code))


FAILS = "import sys; print('what went wrong'); sys.exit(3)"
HANGS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
FINDS = "import json, sys; json.dump([dict(name='a', measured=2.0, unit='ms', predicted=1.0)], open(sys.argv[2], 'w'))"


def test_how_a_part_ends_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = (
        part("good", FINDS), part("bad", FAILS), part("hanging", HANGS, limit_s=1),
        part("lacking", FINDS)._replace(modules=("no_such_module",)),
    )  # fmt: skip
    monkeypatch.setattr(command, "PARTS", parts)
    results = {one.name: command.run(one, tmp_path, False, 100) for one in parts}
    for result in results.values():
        command.write(result, tmp_path, False)
    status = {name: json.loads((tmp_path / f"{name}.json").read_text())["status"] for name in results}
    assert status == {"good": "passed", "bad": "failed", "hanging": "ran too long", "lacking": "left out"}
    assert results["good"].figures == [Figure("a", 2.0, "ms", 1.0)]
    assert "what went wrong" in (tmp_path / "bad.log").read_text() and "exit status 3" in results["bad"].why
    assert results["lacking"].why == "no_such_module is not installed"
    assert command.run(parts[0], tmp_path, False, 3).status == "left out", "it had no time left"


def test_without_a_gpu_it_says_how_to_run_dry(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--parts", "graphs"]) == 1
    assert "--dry" in capsys.readouterr().err


def test_the_parts_fit_the_time_that_a_machine_is_lent_for() -> None:
    wanted = [one for one in PARTS if one.name not in ("server-eager", "server-dense-flashinfer", "memcheck")]
    assert sum(one.limit_s for one in wanted) <= 600 and TOTAL_S <= 480
    assert len({one.name for one in PARTS}) == len(PARTS)


def test_a_line_has_the_prediction_beside_the_figure() -> None:
    (line,) = lines([Figure("score, 8 x 32,768", 0.5, "ms", 0.25)])
    assert line.split() == ["score,", "8", "x", "32,768", "0.5", "0.25", "predicted", "ms"]


def test_the_command_has_help() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--help"], capture_output=True, text=True, check=True
    )
    assert all(one.name in found.stdout for one in PARTS)
