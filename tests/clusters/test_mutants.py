"""The state machine's detectors fire: it turns red under each way to break the engine (mutants.py; `make mutants` shows the
table). Red when a mutant survives.
"""

from __future__ import annotations

import pytest

from tests.support.mutants import MUTANTS, verdict

FIRST, *OTHERS = MUTANTS


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)])
def test_the_state_machine_notices(name: str) -> None:
    assert verdict(MUTANTS[name], worlds=1000), f"{name} survived"
