"""docs/recipes.md's blocks, as they stand there, against a real server.

A recipe whose package or environment is missing is skipped; CLUSTERKV_RECIPES names the folder of the environments, /tmp in the
page. Red when: a recipe fails, prints nothing or not what it is for, recalls nothing, or the page has one that no test runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.servers import Server, serve
from tests.support.servers import ASLEEP

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
ENVIRONMENTS = Path(os.environ.get("CLUSTERKV_RECIPES", "/tmp"))
QUESTIONS = "questions"  # makes a file for others, and asks no server


class Recipe(NamedTuple):
    """A block of the page, with the name that stands before it: of a package where it is a program."""

    language: str
    text: str


RECIPES = {
    name: Recipe(language, text)
    for name, language, text in re.findall(r"<!-- recipe: (\w+) -->\n```(python|bash)\n(.*?)```", PAGE, re.DOTALL)
}
# What each prints that says it did its work; of a shell recipe.
PRINTED = {
    "bench_serving": r"Successful requests: +6\b",
    "lmeval": r"exact_match\s*\|\s*↑\s*\|\s*(0\.[257]5*|1)",
    "sgleval": r"4",
}


def test_every_block_is_a_recipe() -> None:
    assert len(RECIPES) == PAGE.count("\n```python\n") + PAGE.count("\n```bash\n") == 7
    assert {name for name, recipe in RECIPES.items() if recipe.language == "bash"} == {QUESTIONS, *PRINTED}


def python_of(package: str) -> str:
    """The Python that has a package."""
    clients = ENVIRONMENTS / "clients" / "bin" / "python"
    for python in (sys.executable, str(clients)):
        if (
            Path(python).exists()
            and not subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode
        ):
            return python
    pytest.skip(f"{package} is neither here nor in {clients}: see docs/recipes.md")


def run(command: list[str], folder: Path) -> str:
    """What a command prints in a folder; `python` is this one, which has the plugin."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what recipes read of a clone, and the file of questions."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("LICENSE", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "sglang_clusterkv").symlink_to(ROOT / "sglang_clusterkv")
    run(["bash", "-c", RECIPES[QUESTIONS].text], folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As the page says."""
    arguments = ["--enable-cache-report", "--tool-call-parser", "hermes", "--max-total-tokens", "8192", ASLEEP]
    log = tmp_path_factory.mktemp("recipes") / "log"
    with serve(model, log, *arguments, config={"budget_tokens": 256}) as running:
        yield running


def test_the_file_of_questions_has_a_document_and_an_answer_each(clone: Path) -> None:
    lines = [json.loads(line) for line in (clone / "questions.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(line["expected_answer"] in line["problem"] for line in lines)


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in RECIPES if name != QUESTIONS])
def test_a_recipe_runs(name: str, server: Server, clone: Path, model: Path) -> None:
    text = RECIPES[name].text
    if RECIPES[name].language == "python":
        command = [python_of(name), "-c"]
    else:
        command = ["bash", "-ec"]
        text = text.replace("/tmp/", f"{ENVIRONMENTS}/")
        text = text.replace("~/.cache/sglang-clusterkv/SmolLM2-135M-Instruct", str(model))
        for tool in re.findall(rf"{ENVIRONMENTS}/\w+/bin/[\w-]+", text):
            if not Path(tool).exists():
                pytest.skip(f"{tool} is not there: see docs/recipes.md")
    program = text.replace("http://127.0.0.1:30000", server.url)
    assert server.url in program
    recalled = server.counts()["tokens_recalled"]
    printed = run([*command, program], clone)
    assert printed.strip() and re.search(PRINTED.get(name, ""), printed), printed
    assert server.counts()["tokens_recalled"] > recalled
