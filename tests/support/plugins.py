"""Plugins of SGLang for a test's server alone: a module of tests/support as an installed package in a folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType


def install(folder: Path, plugin: ModuleType) -> dict[str, str]:
    """Write a module with a function `register` into a folder; the variables with which a server finds it."""
    name = plugin.__name__.rsplit(".", 1)[-1]
    package = folder / f"{name}-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    assert plugin.__file__ is not None
    (folder / f"{name}.py").write_text(Path(plugin.__file__).read_text())
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
