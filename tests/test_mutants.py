"""The state machine's detectors fire: it turns red under each way to break the engine (mutants.py).

Three mutants take it longer than a test may; `make mutants` shows them too. Red when a mutant survives.
"""

from __future__ import annotations

import pytest
from mutants import MUTANTS, verdict

SLOW = {
    "invalidated on the scheduler's stream",
    "clusters inside the window",
    "merged although others see it",
}


@pytest.mark.parametrize("name", sorted(set(MUTANTS) - SLOW))
def test_the_state_machine_notices(name: str) -> None:
    assert verdict(MUTANTS[name], worlds=300), f"{name} survived"
