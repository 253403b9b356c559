"""Servers that several files share, for a start takes a minute; and where Triton's kernels run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from benchmarks.servers import Server, serve
from sglang_clusterkv.tools.demo_model import default_out
from tests.support.interpreter import interpreting, scan_whole_arrays
from tests.support.servers import ASLEEP, CHUNK, DEMO_CHUNK, DEMO_CONFIG, POOL, OneServer
from tests.support.tiny_model import tiny_model
from tests.support.traffic import CONFIG, logging_of_requests

# Files that share a server stay together where processes share the files (tests/support/servers.py).
SHARED_SERVERS = {
    "tests/serving/test_abuse.py": "tiny",
    "tests/serving/test_dense_server.py": "tiny",
    "tests/serving/test_scheduler_server.py": "tiny",
    "tests/serving/test_trace_server.py": "tiny",
    "tests/examples/test_examples.py": "demo",
    "tests/serving/test_metrics.py": "demo",
    "tests/serving/test_peers.py": "demo",
    "tests/serving/test_server.py": "demo",
}
# Where processes share the files, those that take longest begin, so that none is left alone with one of them at the end.
LONGEST_FIRST = (
    "demo",
    "tiny",
    "tests/serving/test_host_tier_server.py",
    "tests/serving/matrix/test_matrix.py",
    "tests/serving/test_flags.py",
    "tests/test_package.py",
    "tests/kernels/test_tiers.py",
    "tests/kernels/triton/test_graph.py",
    "tests/clusters/test_faults.py",
    "tests/clusters/test_machine.py",
    "tests/clusters/test_merging.py",
    "tests/kernels/test_compiled.py",
    "tests/clusters/test_exact_engine.py",
)

# The same examples in every run of the same sources, however busy the machine. `--hypothesis-profile=random` looks further.
UNTIMED: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow],
    "print_blob": True,
}
settings.register_profile("same", derandomize=True, **UNTIMED)
settings.register_profile("random", **UNTIMED)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where tests/kernels/triton run: cpu is Triton's interpreter",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Import Triton before SGLang does, which may be in any test module."""
    with interpreting(config.getoption("device")):
        import triton.language  # noqa: F401

        if config.getoption("device") == "cpu":
            scan_whole_arrays()


def share_of(nodeid: str) -> str:
    """What of the tests one process gets at a time: those of a shared server, else those of a file."""
    file = nodeid.partition("::")[0]
    return SHARED_SERVERS.get(file, file)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, the others as they come; a process by itself keeps the order of the files."""
    if hasattr(config, "workerinput"):
        rank = {share: number for number, share in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: rank.get(share_of(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`: by file, but for `SHARED_SERVERS`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class BySharedServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return share_of(nodeid)

    return BySharedServer(config, log)


@pytest.fixture(scope="session")
def one_server() -> Iterator[OneServer]:
    """Of this process."""
    servers = OneServer()
    yield servers
    servers.end()


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The tiny model's folder."""
    return tiny_model()


@pytest.fixture(scope="module")
def tiny_server(one_server: OneServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server that admits more than its pool holds, so that requests are retracted where they are many.

    It is configured through the environment, and that of the demo model by its command line.
    """

    def start() -> AbstractContextManager[Server]:
        folder = tmp_path_factory.mktemp("tiny")
        environment = logging_of_requests(folder) | {
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
            "SGLANG_EXPOSE_OWN_ENV_VARS": "1",
            "SGLANG_CLUSTERKV_CONFIG": json.dumps(CONFIG),
            "SGLANG_CLUSTERKV_CPU_OVERLAP": "1",  # as on a GPU; the demo model's server goes without
        }
        return serve(tiny, folder / "server.log", *arguments, environment=environment)

    arguments = ["--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(POOL), "--max-running-requests", "8"]
    arguments += ["--schedule-conservativeness", "0.05", ASLEEP]
    return one_server.get("tiny", start)


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo model's folder."""
    path = default_out()
    assert (path / "config.json").exists(), f"{path} has no model: run `make demo-model`"
    return path


@pytest.fixture(scope="session")
def text(model: Path) -> list[int]:
    """Ids of some thousand tokens of English text."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)((Path(__file__).parents[1] / "LICENSE").read_text()).input_ids


@pytest.fixture(scope="module")
def demo_server(one_server: OneServer, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """A server on the demo model, with budget and segments so small that short prompts show them."""
    arguments = [
        "--chunked-prefill-size",
        str(DEMO_CHUNK),
        "--max-total-tokens",
        "12000",
        "--max-running-requests",
        "8",
        "--enable-metrics",
        "--enable-cache-report",
        ASLEEP,
    ]

    def start() -> AbstractContextManager[Server]:
        return serve(model, tmp_path_factory.mktemp("demo") / "server.log", *arguments, config=DEMO_CONFIG)

    return one_server.get("demo", start)
