"""docs/recipes.md's blocks of Python, as they stand there, against a real server.

A recipe whose package is missing here is skipped; CLUSTERKV_RECIPES_PYTHON names a Python of another environment that has it.
Red when: a recipe fails, prints nothing, or the page has one that no test runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import Server, serve
from tests.support.servers import ASLEEP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
PYTHON = os.environ.get("CLUSTERKV_RECIPES_PYTHON", sys.executable)
# Name of the package -> the program.
RECIPES = dict(re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def test_every_block_of_python_is_a_recipe() -> None:
    assert len(RECIPES) == PAGE.count("```python") >= 3


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the page says."""
    arguments = ["--enable-cache-report", "--tool-call-parser", "hermes", "--max-total-tokens", "8192", ASLEEP]
    log = tmp_path_factory.mktemp("recipes") / "log"
    with serve(model, log, *arguments, config={"budget_tokens": 256}) as running:
        yield running


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize("package", RECIPES)
def test_a_recipe_runs(package: str, server: Server) -> None:
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True).returncode:
        pytest.skip(f"{package} is not installed in {PYTHON}: see docs/recipes.md")
    recalled = server.counts()["tokens_recalled"]
    program = RECIPES[package].replace("http://127.0.0.1:30000", server.url)
    assert server.url in program
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PYTHON, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert server.counts()["tokens_recalled"] > recalled
