"""The rule of `dense_below: auto` follows the model of a step's time.

Red when: a step that the rule lets be sparse is likely slower than dense by more than 3 %, steps that would gain much are left
dense, or the kernels' counts of instructions have changed so much that its numbers are no longer the model's.
"""

from __future__ import annotations

import pytest

from benchmarks import break_even
from benchmarks.break_even import BATCHES, HEADS, least_bytes, steps, worst
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.break_even import MODELLED, BreakEven


@pytest.fixture(scope="module")
def found() -> list[break_even.Step]:
    config = ClusterKVConfig()
    return [step for heads in HEADS for batch in BATCHES for step in steps(heads, batch, config)]


def test_no_step_is_slower_than_dense_by_more_than_three_percent(found: list[break_even.Step]) -> None:
    slowest, fastest = worst(found, MODELLED)
    assert slowest >= 0.97
    assert fastest <= 1.3, "steps are left dense that would gain: python -m benchmarks.break_even"


def test_without_a_rule_steps_would_be_slower(found: list[break_even.Step]) -> None:
    assert worst(found, BreakEven(0, 0))[0] < 0.9


def test_it_is_the_pairs_that_count_however_they_come(found: list[break_even.Step]) -> None:
    config = ClusterKVConfig()
    of_16 = [least_bytes(list(steps(heads, 16 // heads, config))) for heads in HEADS]
    assert None not in of_16
    assert max(map(float, of_16)) <= 1.2 * min(map(float, of_16))  # type: ignore[arg-type]


def test_the_command_prints_every_batch(capsys: pytest.CaptureFixture[str]) -> None:
    break_even.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(HEADS) * len(BATCHES) and lines[-1].startswith("slowest sparse step: ")
