"""The package as it is released: sdist and wheel have what they should, and a server runs from the wheel alone.

Built from what git knows or would add, so that leftovers of other builds do not help. Red when: a module or the page's files
are missing in the wheel or the sdist, tests or benchmarks are in the wheel, the changelog has no section of the version, an
entry point or a dependency is lost, or what is installed needs something of the clone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.servers import serve
from sglang_clusterkv import __version__
from tests.support.servers import ASLEEP

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Built(NamedTuple):
    """The files of a release."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def files() -> list[str]:
    """Every file of the clone that belongs to it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist, and the wheel that is built from it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in files:
        if not name.startswith("benchmarks/results/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Built(sdist, wheel)


def test_the_wheel_has_the_package_and_nothing_else(files: list[str], built: Built) -> None:
    expected = {
        name
        for name in files
        if name.startswith("sglang_clusterkv/")
        and (name.endswith((".py", "/py.typed")) or name.startswith("sglang_clusterkv/tools/explain/page"))
    }
    with zipfile.ZipFile(built.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == expected
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    assert len(expected) > 100


def test_the_sdist_builds_and_reads_alone(built: Built) -> None:
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "sglang_clusterkv/tools/explain/page.html.jinja"} <= names


def test_the_metadata_is_the_projects(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (folder,) = {name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
        entry_points = wheel.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == __version__
    (dependency,) = PROJECT["dependencies"]
    (required,) = (line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line)
    assert set(re.findall(r"[<>=]+[\d.]+", required)) == set(re.findall(r"[<>=]+[\d.]+", dependency))
    assert metadata["Description-Content-Type"] == "text/markdown"
    for line in (
        "clusterkv = sglang_clusterkv.serving.plugin:register",
        "clusterkv = sglang_clusterkv.serving.platform:activate",
        "sglang-clusterkv = sglang_clusterkv.tools.cli:main",
    ):
        assert line in entry_points


def test_the_changelog_has_this_version() -> None:
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", __version__]


@pytest.fixture(scope="module")
def python(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a new environment that has the wheel, and of this one's packages all but the clone."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    (folder,) = home.glob("lib/python*/site-packages")
    # A path in a .pth file is searched for packages, but its own .pth files, the clone's among them, are not read.
    (folder / "others.pth").write_text(f"{_site_packages()}\n")
    # The clone itself may look like an installation of the same version.
    install = [
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--ignore-installed",
        "--no-deps",
        "--no-index",
    ]
    subprocess.run([sys.executable, *install, str(built.wheel)], check=True, env=_environment())
    _keep_kernels(folder / "sglang_clusterkv")
    return python


def _keep_kernels(package: Path) -> None:
    """Give an installed package what numba compiled for the clone: a minute of a core less until it serves.

    numba takes it where a source file is as long and as old as the one that it compiled.
    """
    for source in (ROOT / "sglang_clusterkv").rglob("*.py"):
        installed = package / source.relative_to(ROOT / "sglang_clusterkv")
        assert installed.read_bytes() == source.read_bytes()
        stat = source.stat()
        os.utime(installed, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for kept in (ROOT / "sglang_clusterkv").rglob("__pycache__/*.nb[ci]"):
        copy = package / kept.relative_to(ROOT / "sglang_clusterkv")
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(kept, copy)


def _site_packages() -> str:
    import sglang

    return str(Path(sglang.__path__[0]).parent)


def _environment() -> dict[str, str]:
    """This process's, without a way to the clone."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SGLANG_CLUSTERKV_CONFIG")}


def test_the_commands_run_from_the_wheel(python: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [str(python.parent / "sglang-clusterkv"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=_environment())
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("--version").split() == ["sglang-clusterkv", __version__]
    report = json.loads(run("check", "--json"))
    assert report["ok"] and report["differences"] == []
    where = subprocess.run(
        [str(python), "-c", "import sglang_clusterkv; print(sglang_clusterkv.__file__)"],
        capture_output=True, text=True, cwd=tmp_path, env=_environment(), check=True,
    ).stdout  # fmt: skip
    assert Path(where.strip()).is_relative_to(python.parents[1])


@pytest.mark.server
def test_a_request_is_served_from_the_wheel(
    python: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    arguments = ["--max-total-tokens", "4096", "--max-running-requests", "2", ASLEEP]
    config = {"budget_tokens": 64, "candidate_tokens": 128}
    with serve(tiny, tmp_path / "log", *arguments, config=config, python=str(python), folder=tmp_path) as server:
        answer = server.generate([7 + i % 500 for i in range(600)], 8)
        assert len(answer["output_ids"]) == 8
        counts = server.counts()
        assert counts["tokens_recalled"] > 0
