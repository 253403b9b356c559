"""Tests of the Triton kernels: in Triton's interpreter, or on a GPU with `--device cuda`.

There is no `__init__.py` here: it would make this folder the package `triton`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest

from sglang_clusterkv.kernels import grids
from tests.support.interpreter import interpreting

# Programs of attend and the estimate for a (request, kv head), at most, where the interpreter takes them one after the other:
# some find nothing to do.
FEW = 12


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Test modules are imported here, and the kernels with them."""
    with interpreting(collector.config.getoption("device")):
        return (yield)


@pytest.fixture(autouse=True)
def _interpreted(device: str) -> Iterator[None]:
    """Some kernels are imported by what a test calls."""
    with interpreting(device):
        yield


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """Where a test puts its tensors: "cpu" in the interpreter, "cuda" with `--device cuda`."""
    return pytestconfig.getoption("device")


@pytest.fixture
def as_served() -> None:
    """For a test whose launches have as many programs as a server's."""


@pytest.fixture(autouse=True)
def _few_programs(device: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu" and "as_served" not in request.fixturenames:
        monkeypatch.setattr(grids, "MOST_PARTS", FEW)
