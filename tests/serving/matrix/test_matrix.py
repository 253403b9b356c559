"""Each architecture of the table comes to what the table says, and docs/models.md says so too.

Red when: an architecture starts no longer, or is refused without need; a decode step is not what a prefill of the same text
gives; a layer recalls that should not, or does not; a prefix is clustered for each of two prompts; docs/models.md is older; a
decoder layer that our kernels should run is run by SGLang's modules, or differs from these by a bit, or what others do to these
modules has no effect.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sglang_clusterkv.memory.recalled_mass import layer_groups
from tests.serving.matrix import crowds, page, serving
from tests.serving.matrix.architectures import BY_NAME, ON_TWO_RANKS, Architecture

pytestmark = pytest.mark.server

OFF = 1e-3  # of a log-probability, where everything is attended to
SPARSE_OFF = 1.0  # where some tokens are estimated; 0.16 was seen where another expert was chosen, 0.04 elsewhere


def served(folder: Path, names: list[str], module: Any = serving, **environment: str) -> dict[str, dict[str, Any]]:
    """Results by name, of one process. It forks, and a second thread of OpenMP would not be there in its children."""
    command = [sys.executable, "-m", module.__name__, str(folder), *names]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {result["name"]: result for result in results}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return served(tmp_path_factory.mktemp("matrix"), [*BY_NAME])


def assert_as_expected(architecture: Architecture, result: dict[str, Any], ranks: int = 1) -> None:
    assert result["outcome"] == architecture.outcome, result
    if architecture.outcome != "works":
        return
    assert result["clustered_layers"] == list(architecture.recalls)
    assert result["dense_layer_calls"] == sorted(architecture.dense)
    groups = layer_groups(architecture.layers)
    recalling = {
        name for name, group in groups.items() if set(range(architecture.layers)[group]) & {*architecture.recalls}
    }
    assert set(result["recalled_mass"]) == recalling
    assert result["short_off"] < OFF and result["sparse_before_long"] == 0 and "budget" in result["dense_steps"]
    assert result["long_off"] < SPARSE_OFF and result["sparse_steps"] >= serving.ANSWER - 2
    # The shared prefix ends inside a segment, which is cut there.
    assert result["reused"] >= 256 - serving.PAGE and result["clustered_again"] <= 200 + 256
    assert not result["faults"] and not result["build_conflicts"]
    steps = result["twice"]["steps"]  # of all ranks, their decoder layers by SGLang's modules and by ours
    assert steps.get("same", 0) == steps.get("decode", 0)
    if architecture.taken:
        # A batch of two goes to SGLang's modules where each rank norms one head of keys.
        assert result["twice"]["layers"] == [architecture.layers] and steps["watched"] == ranks
        assert steps["ours"] >= steps["decode"] - (3 * ranks if ranks > 1 else 0)
    else:
        assert "ours" not in steps


@pytest.mark.parametrize("name", BY_NAME)
def test_an_architecture_comes_to_what_the_table_says(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert_as_expected(BY_NAME[name], results[name])
    row = page.row_of(BY_NAME[name], results[name])
    assert row in page.PAGE.read_text().splitlines(), "run python -m tests.serving.matrix"


@pytest.mark.long
def test_two_ranks_come_to_the_same(tmp_path: Path) -> None:
    names = [f"{name}@2" for name in ON_TWO_RANKS]
    results = served(tmp_path, names, SGLANG_CPU_OMP_THREADS_BIND="0|1")
    assert set(results) == set(ON_TWO_RANKS)
    for name, result in results.items():
        assert_as_expected(BY_NAME[name], result, ranks=2)


@pytest.mark.long
def test_crowds_get_the_same_by_both_ways(tmp_path: Path) -> None:
    results = served(tmp_path, [*crowds.CROWDS], crowds)
    for name, result in results.items():
        steps = result["twice"]["steps"]
        assert result["outcome"] == "works" and not result["faults"] and result["sparse_steps"] > 0, (name, result)
        assert result["answers"] == sum(range(crowds.LARGEST + 1)) and steps["same"] == steps["decode"], (name, result)
        assert all(steps.get(f"{tokens} tokens by ours", 0) for tokens in (1, 2, 3)), (name, steps)
        assert f"{crowds.LARGEST} tokens by ours" not in steps
        assert ("hidden states" in steps) is ("hidden" in name)
        assert (result["from_host"] > 0) is ("host" in name), (name, result["from_host"])
    assert set(results) == set(crowds.CROWDS)


def test_the_page_has_the_whole_table() -> None:
    text = page.PAGE.read_text()
    assert text.startswith(page.head()), "run python -m tests.serving.matrix"
    lines = text.removeprefix(page.head()).splitlines()
    assert [line.split(" | ")[0][2:] for line in lines] == [*BY_NAME]


def test_the_first_error_of_a_log_is_told() -> None:
    log = "[20:33:38] Scheduler hit an exception: Traceback\n  File x, line 3\nKeyError: 3\n\n"
    log += "During handling of the above exception, another exception occurred:\n\nValueError: no such key\n\nOSError: later\n"
    assert serving.first_error(log) == "ValueError: no such key"
