"""The floors of the house hold, no file of it is long, the engine runs without SGLang, and the package without the flag changes
nothing that SGLang runs.

Red when: the check of `make style` does not notice a floor that imports from above, a cycle, a new room outside of the floors
or an import of sglang below serving/; a file of the package is longer than its floor allows; importing the engine pulls in
sglang, or the configuration torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sglang_clusterkv"
MOST_LINES, MOST_LINES_OF_A_KERNEL = 400, 500

# What a mistaken change would add, and the contract of pyproject.toml that names it.
WRONG = {
    "an import from above": (
        "memory/device.py",
        "from sglang_clusterkv.clusters import rows",
        "Floors import downwards",
    ),
    "a cycle": ("memory/codec.py", "from sglang_clusterkv.memory import index", "No import cycles"),
    "a room outside": ("utils.py", "", "No floor of the package has a room outside of them"),
    "sglang below serving": ("clusters/engine.py", "import sglang", "Only serving imports sglang"),
}


def floors(root: Path) -> subprocess.CompletedProcess[str]:
    """What `make style` says of the floors of a checkout."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    options = ["--no-logo", "--no-cache"]
    return subprocess.run(
        command + options, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The checkout's code, to be changed."""
    for folder in ("sglang_clusterkv", "benchmarks", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_floors_hold() -> None:
    done = floors(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", WRONG)
def test_the_check_names_what_breaks_a_floor(name: str, copied: Path) -> None:
    file, line, contract = WRONG[name]
    path = copied / "sglang_clusterkv" / file
    path.write_text((path.read_text() if path.exists() else "") + line + "\n")
    done = floors(copied)
    assert done.returncode == 1 and f"{contract} BROKEN" in done.stdout, done.stdout + done.stderr


def test_no_file_is_long() -> None:
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(lengths) > 50
    most = {path: MOST_LINES_OF_A_KERNEL if path.parts[0] == "kernels" else MOST_LINES for path in lengths}
    assert {str(path): length for path, length in lengths.items() if length > most[path]} == {}


def test_the_engine_runs_without_sglang() -> None:
    code = (
        "import sys, sglang_clusterkv.clusters.engine, sglang_clusterkv.kernels.decode.cpu;"
        "sys.exit('sglang' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_configuration_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, sglang_clusterkv.config; sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
