"""Write what a benchmark found to benchmarks/results/: JSON, Markdown and a picture, never over an older file.

Each begins with what a reader needs to judge or repeat it: machine, versions, commit, model and configuration, command.
benchmarks.cited compares what README and docs print with these files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import tokenize
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
ROOT = RESULTS.parents[1]
PACKAGES = {"SGLang": "sglang", "torch": "torch", "triton": "triton", "sglang-clusterkv": "sglang-clusterkv"}


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def machine(device: str = "cpu") -> str:
    """The machine in words: a CUDA device's name, or the CPU's with its cores."""
    if device == "cpu":
        return f"{processor()}, {os.cpu_count()} cores"
    import torch

    return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {processor()}"


def versions() -> str:
    """Versions of what takes part; a package that is not installed is left out."""
    found = []
    for name, package in PACKAGES.items():
        try:
            found.append(f"{name} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def commit_of(root: Path) -> dict[str, Any]:
    """The commit that a tree has checked out, and whether it differs from it beside the results.

    No commit outside of a git checkout, nor where the checkout is somebody else's who keeps this tree in it.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return {"commit": None, "dirty": None}
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def commit_text(found: dict[str, Any]) -> str:
    """That commit in words."""
    if found["commit"] is None:
        try:
            return f"no git checkout, sglang-clusterkv {version('sglang-clusterkv')}"
        except PackageNotFoundError:
            return "no git checkout, sglang-clusterkv not installed"
    return f"commit {found['commit'][:10]}" + (", with changes that are in no commit" if found["dirty"] else "")


def code_of(folder: Path) -> str:
    """A digest of a package's code that comments, docstrings, imports and the place of a definition do not change."""
    parts: list[str] = []
    for file in folder.rglob("*.py"):
        parts += re.split(r"\n(?=\S)", _bare(file.read_text(encoding="utf-8")))
    text = "\n".join(sorted(re.sub(r"\s+", "", part) for part in parts))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _bare(source: str) -> str:
    """Python without comments, docstrings and imports."""
    lines = io.StringIO(source).readlines()
    begins = True  # of a statement
    left_out: list[tuple[tuple[int, int], tuple[int, int]]] = []
    statement: tuple[int, int] | None = None  # where an import began
    layout = (tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT or (begins and token.type == tokenize.STRING):
            left_out.append((token.start, token.end))
        elif begins and token.string in ("import", "from"):
            statement = token.start
        elif token.type == tokenize.NEWLINE and statement:
            left_out.append((statement, token.start))
            statement = None
        begins = token.type == tokenize.NEWLINE or (begins and token.type in (*layout, tokenize.COMMENT))
    for (first, begin), (last, end) in reversed(left_out):
        lines[first - 1 : last] = [lines[first - 1][:begin] + lines[last - 1][end:]]
    return "".join(lines)


# As a run begins: a benchmark takes hours, in which the tree may go on.
MEASURED = commit_of(ROOT)
CODE = code_of(ROOT / "sglang_clusterkv")


def command_of(module: str) -> str:
    """The command that is running: `python -m module` with its arguments, ~ for the home of who runs it."""
    home = str(Path.home())
    arguments = [argument.replace(home, "~", 1) if argument.startswith(home) else argument for argument in sys.argv[1:]]
    return f"python -m {shlex.join([module, *arguments])}"


def write_results(
    kind: str,
    *,
    title: str,
    setting: str,
    command: str,
    body: str,
    data: Any,
    figure: Figure | None = None,
    device: str = "cpu",
    folder: Path = RESULTS,
) -> Path:
    """Write one run's files and say where they are.

    Args:
        kind: the files' name, before the time.
        title: the Markdown's heading.
        setting: model, dtype, configuration, in words.
        command: that repeats the run.
        body: the tables, as Markdown.
        data: everything measured, for the JSON.
        figure: of matplotlib, for the SVG.
        device: that was measured, as torch names it.
        folder: where.

    Returns:
        The Markdown's path; the others differ in their suffix.
    """
    about = {
        "title": title,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(device),
        "versions": versions(),
        **MEASURED,
        "code": CODE,
        "setting": setting,
        "command": command,
    }
    header = f"# {title}\n\n{setting}; {about['machine']}; {about['versions']}; "
    header += f"{commit_text(MEASURED)}\n\n    {command}\n"
    folder.mkdir(parents=True, exist_ok=True)
    stem = _unused(folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    _write_new(stem.with_name(stem.name + ".json"), json.dumps(about | {"results": data}, indent=1) + "\n")
    markdown = stem.with_name(stem.name + ".md")
    _write_new(markdown, f"{header}\n{body.rstrip()}\n")
    if figure is not None:
        picture = stem.with_name(stem.name + ".svg")
        with picture.open("xb") as file:
            figure.savefig(file, format="svg")
    print(f"written: {markdown}", file=sys.stderr)
    return markdown


def _unused(stem: Path) -> Path:
    """The stem, numbered where another run took it in the same second."""
    taken = {path.stem for path in stem.parent.glob(f"{stem.name}*")}
    name, number = stem.name, 1
    while name in taken:
        number += 1
        name = f"{stem.name}-{number}"
    return stem.with_name(name)


def _write_new(path: Path, text: str) -> None:
    """Write a file that must not exist."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
