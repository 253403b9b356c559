"""Load, aborts, leaks and killed processes, on servers with the tiny model.

`CLUSTERKV_ABORTS=1000 pytest tests/serving/test_churn.py -k abort` aborts so many of four times as many requests.

Red when: with merging off, a border depends on other requests; an idle server does not repeat itself; an abort at any
moment leaves a row, a page or a cluster behind; the strict idle check is off or blind; a killed server leaves processes or
shared memory that torch_native would not leave, or keeps the next one from starting.
"""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import requests

from benchmarks.servers import Server, serve
from tests.support import leaky_plugin, plugins
from tests.support.traffic import CONFIG, Request, alone, assert_well, borders, logging_of_requests, prompt, wait_until

pytestmark = [pytest.mark.server, pytest.mark.long]

ABORTS = int(os.environ.get("CLUSTERKV_ABORTS", "50"))
ARGUMENTS = ["--chunked-prefill-size", "1024", "--max-total-tokens", "24000", "--max-running-requests", "8"]
ARGUMENTS += ["--sleep-on-idle"]
STRICT = "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("churn")


def tree(server: Server) -> list[psutil.Process]:
    """The server's processes."""
    first = psutil.Process(server.process.pid)
    return [first, *first.children(recursive=True)]


def shared_files(processes: list[psutil.Process]) -> set[str]:
    """What they hold in shared memory."""
    found = set()
    for process in processes:
        found |= {m.path for m in process.memory_maps() if m.path.startswith("/dev/shm/")}
        found |= {f.path for f in process.open_files() if f.path.startswith("/dev/shm/")}
    return found


class Killed(NamedTuple):
    """What a kill -9 left, and what the server had answered before."""

    processes: list[str]
    shared: list[str]  # names, without what is random in them
    files: int  # temporary ones
    answer: list[int]


def kill(server: Server, victim: psutil.Process, own_tmp: Path, answer: list[int]) -> Killed:
    """kill -9 one process, wait for the others' end, look, and take away what is left in shared memory."""
    processes = tree(server)
    shared = shared_files(processes)
    victim.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(processes, timeout=60)
    left = [process.name() for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    shared_left = [path for path in shared if os.path.exists(path)]
    for path in shared_left:
        os.unlink(path)
    files = [path for path in own_tmp.rglob("*") if not path.is_dir()]
    names = [re.sub(r"_[0-9a-f]{6,}", "", Path(path).name) for path in shared_left]
    return Killed(left, names, len(files), answer)


@pytest.fixture(scope="module")
def killed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Killed]:
    """Two servers whose scheduler or first process was killed while a request was decoded."""
    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp("killed")
        own_tmp = folder / "tmp"
        own_tmp.mkdir()
        environment = {"TMPDIR": str(own_tmp)}
        with serve(tiny, folder / "server.log", *ARGUMENTS, config=CONFIG, environment=environment) as server:
            answer = server.generate(prompt(300), 24)["output_ids"]
            first, *others = tree(server)
            (scheduler,) = [process for process in others if "scheduler" in " ".join(process.cmdline())]
            request = Request(server, prompt(301), 2000)
            request.wait_for(10)
            found.append(kill(server, scheduler if number == 0 else first, own_tmp, answer))
    return found


@pytest.fixture(scope="module")
def server(tiny: Path, folder: Path, killed: list[Killed]) -> Iterator[Server]:
    """Started after two were killed. Merging is off, the pool holds what the tests run at once, and it can leak."""
    environment = logging_of_requests(folder) | plugins.install(folder, leaky_plugin) | {STRICT: "1"}
    config = CONFIG | {"merge_segments": False}
    with serve(tiny, folder / "server.log", *ARGUMENTS, config=config, environment=environment) as running:
        yield running


def test_a_killed_server_leaves_what_torch_native_leaves_and_the_next_one_starts(
    server: Server, killed: list[Killed]
) -> None:
    """With torch_native (SGLang 0.5.23) both kills left no process, SGLang's table of loads in shared memory and five
    sockets of zmq in the folder for temporary files."""
    for left in killed:
        assert left.processes == [] and left.shared in ([], ["sglang_loads.shm"]) and left.files <= 5, killed
        assert left.answer == alone(server, prompt(300), 24)


class Load:
    """Requests that share nothing with anything, some at a time, until the block ends."""

    def __init__(self, server: Server, at_a_time: int) -> None:
        self._server, self._end = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(at_a_time)]
        self.done = 0

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, thread: int) -> None:
        generator = random.Random(thread)
        while not self._end.is_set():
            ids = prompt(generator.randrange(10**6, 10**9), generator.randrange(20, 1200))
            request = Request(self._server, ids, generator.randrange(1, 40))
            if generator.random() < 0.2:
                request.abort()
            request.result()
            self.done += 1


def test_borders_and_answers_are_those_of_an_idle_server_under_any_load(server: Server) -> None:
    prompts = [prompt(100 + i, length) for i, length in enumerate((700, 960, 1500, 2600))]
    tokens = 100  # more than recluster_every: decoded tokens become segments too

    def ask_alone(ids: list[int]) -> tuple[list[int], Any]:
        server.flush()
        request = Request(server, ids, tokens)
        return request.result(), borders(server, request.rid)

    expected = [ask_alone(ids) for ids in prompts]
    assert [ask_alone(ids) for ids in prompts] == expected, "an idle server repeats itself"
    assert all(len(of_prompt[0]) > 2 for _, of_prompt in expected)
    server.flush()
    with Load(server, 4) as load:
        wait_until(lambda: load.done > 3)
        running = [Request(server, ids, tokens) for ids in prompts]
        answers = [request.result() for request in running]
        others = load.done
    assert others > 6, "there was other traffic all the while"
    assert all(request.meta["num_retractions"] == request.meta["cached_tokens"] == 0 for request in running)
    assert [(answer, borders(server, r.rid)) for answer, r in zip(answers, running, strict=True)] == expected
    assert_well(server)


def churn(server: Server, aborts: int) -> int:
    """Four times as many requests as aborts: new ones, branches and chats; returns how many were aborted in time."""
    generator = random.Random(7)
    trunks = [prompt(200 + i, 640) for i in range(4)]
    plans = []
    for i in range(4 * aborts):
        kind = generator.choice(["new", "branch", "chat"])
        if kind == "new":
            ids = prompt(10_000 + i, generator.randrange(20, 900))
        else:
            cut = generator.randrange(1, 41) * 16
            ids = generator.choice(trunks)[:cut] + prompt(10_000 + i, generator.randrange(1, 200))
        turns = 3 if kind == "chat" else 1
        wait_s = generator.uniform(0, 0.5) if i % 4 == 3 else None
        plans.append((ids, turns, generator.randrange(2, 60), wait_s))

    def run(plan: tuple[list[int], int, int, float | None]) -> bool:
        ids, turns, tokens, wait_s = plan
        if wait_s is not None:
            request = Request(server, ids, tokens + 200)
            time.sleep(wait_s)  # the random moment: queued, between chunks, prefilling or decoding
            request.abort()
            request.result()
            return request.was_aborted
        for turn in range(turns):
            ids = ids + Request(server, ids, tokens).result() + prompt(20_000 + turn, 20)
        return False

    with ThreadPoolExecutor(12) as pool:  # more than run at once, so that some wait
        return sum(pool.map(run, plans))


def counts_of_an_empty_server(server: Server) -> dict[str, Any]:
    """What must not grow, after a flush and one short request that makes it known to the index."""
    server.flush()
    server.generate([5, 6, 7], 2)
    counts = server.counts()
    return {name: counts[name] for name in ("running", "clusters", "bytes", "faults", "build_conflicts")}


def test_a_mixed_load_with_aborts_at_random_moments_leaves_nothing(tiny_server: Server) -> None:
    server = tiny_server
    info = requests.get(f"{server.url}/server_info", timeout=60).json()["internal_states"][0]
    assert info["env_vars"][STRICT] == "1", "SGLang's strict check of its pools when idle is on"
    expected = alone(server, prompt(210), 24)
    before = counts_of_an_empty_server(server)
    assert before["running"] == before["clusters"] == 0
    stopped = churn(server, ABORTS)
    assert stopped >= ABORTS // 2, "most aborts came before the request's end"
    assert_well(server)
    assert counts_of_an_empty_server(server) == before
    assert alone(server, prompt(210), 24) == expected


def test_the_strict_idle_check_notices_one_lost_page(server: Server, folder: Path) -> None:
    """The detector of the test above; it ends its server."""
    assert server.generate(prompt(220, 100), 4)
    leaky_plugin.lose_a_page(folder)
    with pytest.raises((requests.RequestException, AssertionError)):
        for i in range(20):
            server.generate(prompt(221 + i, 100), 4)
            time.sleep(0.1)  # a moment of idleness, in which the check runs
    wait_until(lambda: "memory leak detected" in server.log.read_text())
    wait_until(lambda: server.process.poll() is not None)
