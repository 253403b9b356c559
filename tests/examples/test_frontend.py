"""What the frontend program says to a user, without a server.

Red when: a server that refuses its first question ends it with a traceback.
"""

import sys
from typing import Any

import pytest

from examples import frontend


def test_a_key_that_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError({"error": "Unauthorized"})  # as SGLang's client says it

    monkeypatch.setattr(frontend.sgl, "RuntimeEndpoint", refused)
    monkeypatch.setattr(sys, "argv", ["frontend.py"])
    with pytest.raises(SystemExit) as ended:
        frontend.main()
    assert "Unauthorized" in str(ended.value.code) and "--api-key" in str(ended.value.code)
