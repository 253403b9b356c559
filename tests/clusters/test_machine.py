"""The rules of cluster storage under any schedule: 2,000 steps of `machine.py`, 20,000 and more on demand
(CLUSTERKV_STEPS=20000 pytest tests/clusters/test_machine.py), with the forward's stream at pace and behind.

Red when: a schedule is found under which a rule of docs/design.md breaks, a page is lost or has two owners, a step would
attend what the request does not own, a fault is survived that nobody injected, or one that somebody did is not, or it is
counted wrongly; or when a run does not go through every kind of event.
"""

from __future__ import annotations

import itertools
import os
import random

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support.machine import COUNTS, FaultyMachine, SchedulerMachine

STEPS = int(os.environ.get("CLUSTERKV_STEPS", "2000"))
STEPS_OF_A_WORLD = 50
EVENTS = (
    "admit branch turn duplicate chunk decode finish retract abort evict flush rewrite merge splits reused sparse lagging "
    "rest press stored loaded replay late eager"
)

FAULTS = " lists_fault layer_fault offload_fault"


@pytest.mark.parametrize(
    ("machine", "steps", "events"), [(SchedulerMachine, STEPS, EVENTS), (FaultyMachine, STEPS // 4, EVENTS + FAULTS)]
)
def test_the_rules_hold_under_any_schedule(
    machine: type[SchedulerMachine], steps: int, events: str, caplog: pytest.LogCaptureFixture
) -> None:
    COUNTS.clear()
    caplog.set_level("CRITICAL")  # of faults that the machine injects
    on_demand = STEPS > 2000
    few = settings(
        max_examples=max(1, steps // 4 // STEPS_OF_A_WORLD),
        stateful_step_count=STEPS_OF_A_WORLD,
        deadline=None,
        database=None,
        print_blob=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    first = random.randrange(10**6) if on_demand else 0  # the same worlds, where the same modules are loaded
    for number in itertools.count(first):
        print(f"seed {number}: {dict(COUNTS)}", flush=True)
        run_state_machine_as_test(seed(number)(machine), settings=few)
        missing = [name for name in events.split() if not COUNTS[name]]
        if COUNTS["steps"] >= steps and not missing:
            break
        assert COUNTS["steps"] < 4 * STEPS, f"the run never went through {missing}: {COUNTS}"
