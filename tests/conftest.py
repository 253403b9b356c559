"""The server on the tiny model; each file that asks for it has one of its own. And where Triton's kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from interpreter import interpreting
from tiny_model import tiny_model
from traffic import CONFIG, logging_of_requests

from benchmarks.servers import Server, serve

CHUNK = 2048
POOL = 8192


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where tests/triton run: cpu is Triton's interpreter"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Import Triton before SGLang does, which may be in any test module."""
    with interpreting(config.getoption("device")):
        import triton.language  # noqa: F401


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny model's folder."""
    return tiny_model()


@pytest.fixture(scope="module")  # an idle server takes most of a core from the tests that follow
def tiny_server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that admits more than its pool holds, so that requests are retracted where they are many."""
    folder = tmp_path_factory.mktemp("tiny")
    arguments = ["--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(POOL), "--max-running-requests", "8"]
    # Without the last one an idle server takes most of a core from those that follow.
    arguments += ["--schedule-conservativeness", "0.05", "--sleep-on-idle"]
    environment = logging_of_requests(folder) | {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_EXPOSE_OWN_ENV_VARS": "1",
    }
    with serve(tiny, folder / "server.log", *arguments, config=CONFIG, environment=environment) as running:
        yield running
