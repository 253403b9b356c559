"""The engine runs without SGLang, and the package without the flag changes nothing that SGLang runs.

Red when: a module of clusters/, kernels/ or memory/ imports sglang, or importing the configuration pulls in torch.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sglang_clusterkv

PACKAGE = Path(sglang_clusterkv.__file__).parent
ENGINE = sorted(path for part in ("clusters", "kernels", "memory") for path in (PACKAGE / part).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_engine_does_not_import_sglang(path: Path) -> None:
    assert "sglang" not in imported(path)


def test_the_detector_fires_on_the_sglang_side() -> None:
    assert "sglang" in imported(PACKAGE / "backend.py")


def test_the_engine_runs_without_sglang() -> None:
    code = (
        "import sys, sglang_clusterkv.clusters.engine, sglang_clusterkv.kernels.decode.cpu;"
        "sys.exit('sglang' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_configuration_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, sglang_clusterkv.config; sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
