"""The state machine's detectors fire: it turns red under each way to break the engine (mutants.py; `make mutants` shows the
table). Red when a mutant survives.
"""

from __future__ import annotations

import pytest
from mutants import MUTANTS, verdict


@pytest.mark.parametrize("name", MUTANTS)
def test_the_state_machine_notices(name: str) -> None:
    assert verdict(MUTANTS[name], worlds=300), f"{name} survived"
