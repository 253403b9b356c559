"""A server whose device tier is much smaller than its contexts answers as one that has everything on the device.

Two servers with the tiny model, one after the other; with `auto` host rows every bit is the same, so answers are too. Red when:
a page is read from the wrong tier or place, a token is written where nobody finds it, a stale row is read; a chat, an abort,
a flush or an eviction leaves a page behind in either tier; a prompt longer than the device tier is not served; prompts go on
waiting once refills succeed again; the series of /metrics differ from /server_info. `CLUSTERKV_ABORTS=100 pytest -k storm` has
a smaller storm.
"""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests

from benchmarks.servers import Server, serve
from tests.serving.test_metrics import documented, samples_of, scrape, types_and_labels
from tests.support import failing_refills, plugins
from tests.support.traffic import CONFIG, Request, assert_well, at_once, prompt, wait_until

pytestmark = pytest.mark.server

ABORTS = int(os.environ.get("CLUSTERKV_ABORTS", "1000"))
RATIO, POOL, CHUNK, ROWS = 8, 16384, 256, 4
DEVICE = POOL // RATIO  # tokens: half of what the longest prompt here has, an eighth of all chats'
ARGUMENTS = ["--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(POOL), "--max-running-requests", str(ROWS)]
ARGUMENTS += ["--sleep-on-idle", "--enable-metrics", "--random-seed", "1"]
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
LONG = prompt(900, 2 * DEVICE)
CHATS, TURNS = 6, 3


class Answers(NamedTuple):
    """What a server said, in the order in which it was asked."""

    long: list[int]  # tokens
    logprobs: list[float]  # of the same
    again: list[int]  # the same prompt, found in the prefix cache
    chats: list[list[list[int]]]  # by chat, then turn
    crowd: list[list[int]]  # requests that together have more tokens than the pool


def chat(server: Server, number: int) -> list[list[int]]:
    """The answers of a chat's turns, each of which sees all before it."""
    ids, answers = prompt(910 + number, 700), []
    for turn in range(TURNS):
        answers.append(Request(server, ids, 24).result())
        ids = ids + answers[-1] + prompt(1000 + 10 * number + turn, 150)
    return answers


def ask(server: Server) -> Answers:
    """Alone, then at once, then more than fits."""
    server.flush()
    first = server.generate(LONG, 24, return_logprob=True)
    again = server.generate(LONG, 24)["output_ids"]
    with ThreadPoolExecutor(CHATS) as pool:
        chats = list(pool.map(lambda number: chat(server, number), range(CHATS)))
    crowd = at_once(server, [prompt(1100 + i, 900) for i in range(20)], 8)
    logprobs = [value for value, *_ in first["meta_info"]["output_token_logprobs"]]
    return Answers(first["output_ids"], logprobs, again, chats, [answer["output_ids"] for answer in crowd])


@pytest.fixture(scope="module")
def expected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Of a server that has everything on the device."""
    log = tmp_path_factory.mktemp("device") / "server.log"
    with serve(tiny, log, *ARGUMENTS, config=CONFIG, environment=STRICT) as server:
        answers = ask(server)
        assert "host_tier" not in server.counts() and "host_" not in str(samples_of(scrape(server)))
        assert_well(server)
    return answers


@pytest.fixture(scope="module")
def server(expected: Answers, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    log = tmp_path_factory.mktemp("tier") / "server.log"
    environment = STRICT | plugins.install(log.parent, failing_refills)
    with serve(tiny, log, *ARGUMENTS, config=CONFIG | {"host_ratio": RATIO}, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Server) -> Answers:
    return ask(server)


def tier(server: Server) -> dict[str, int]:
    return server.counts()["host_tier"]


def assert_all_back(server: Server) -> None:
    """Nothing went wrong, and nothing is left."""
    assert_well(server)
    assert_no_page_is_left(server)


def assert_no_page_is_left(server: Server) -> None:
    """After a flush one page is in use at most: that of a request which lets the flush take effect."""
    server.generate([5, 6, 7], 2)
    info = tier(server)
    assert info["pages_on_device"] <= 1 and info["pages_on_host_only"] == 0
    assert info["ring_level"] == info["ring_pages"]
    server.flush()


def test_a_prompt_longer_than_the_device_tier_is_answered_bit_by_bit(answers: Answers, expected: Answers) -> None:
    assert len(LONG) > DEVICE
    assert answers.long == expected.long and answers.logprobs == expected.logprobs
    assert answers.again == expected.again == expected.long


def test_chats_at_once_are_answered_as_with_everything_on_the_device(answers: Answers, expected: Answers) -> None:
    assert answers.chats == expected.chats
    assert len({str(answer) for of_chat in answers.chats for answer in of_chat}) == CHATS * TURNS, "they say nothing"
    assert answers.crowd == expected.crowd


def test_the_tier_was_needed_and_its_series_say_so(server: Server, answers: Answers) -> None:
    server.flush()
    server.generate(LONG[:1200], 40)  # decodes sparsely
    time.sleep(1)  # nobody has asked for /server_info, the scheduler is idle
    families = scrape(server)
    info, samples = tier(server), samples_of(families)
    assert info["device_pages"] * 16 == DEVICE and info["logical_pages"] * 16 == POOL
    for name in ("written_bytes", "read_bytes_prefill", "read_bytes_decode", "recalled_rows_host", "refills"):
        assert info[name] > 0, name
    for series, name in {
        ("host_pages", "device"): "pages_on_device",
        ("host_pages", "host"): "pages_on_host_only",
        ("host_traffic_bytes_total", "write"): "written_bytes",
        ("host_traffic_bytes_total", "read"): "read_bytes_decode",
        ("host_traffic_bytes_total", "prefill"): "read_bytes_prefill",
        ("host_recalled_rows_total", "host"): "recalled_rows_host",
        ("host_recalled_rows_total", "device"): "recalled_rows_device",
        ("host_dense_rows_total", ""): "dense_rows_host",
        ("host_refills_total", ""): "refills",
        ("host_tier_bytes", ""): "bytes",
    }.items():
        assert samples[series] == info[name], (series, name)
    assert samples["host_ring_level", ""] == 1
    of_tier = {name: kind for name, kind in types_and_labels(families).items() if "_host_" in name}
    assert of_tier == {name: kind for name, kind in documented().items() if "_host_" in name}


def test_aborts_at_any_moment_and_a_flush_give_all_pages_back(server: Server, answers: Answers) -> None:
    server.flush()
    draw = random.Random(5)
    running: list[Request] = []
    for number in range(24):
        running.append(Request(server, prompt(1200 + number % 7, draw.randrange(200, 1500)), 60))
        time.sleep(draw.random() * 0.2)
        if draw.random() < 0.7:
            draw.choice(running).abort()
    for request in running:
        request.abort()
        request.join()
    wait_until(lambda: server.counts()["running"] == 0)
    assert_all_back(server)
    again = server.generate(LONG, 24)["output_ids"]
    assert again == answers.long, "what the others left shows"
    assert_all_back(server)


def test_the_start_tells_the_sizes(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "have room on the device" in line]
    assert len(lines) == 1 and f"{DEVICE} of {POOL} tokens" in lines[0] and "auto" in lines[0], lines


def test_prompts_wait_while_refills_fail_and_no_longer(server: Server, answers: Answers) -> None:
    """The first two run; what comes then waits though SGLang has room for it, and begins before they end."""
    server.flush()
    folder, faults = server.log.parent, dict(server.counts()["faults"])
    running = [Request(server, prompt(1300 + i, 300), 1200) for i in range(2)]
    for request in running:
        request.wait_for(4)
    failing_refills.fail(folder)
    wait_until(lambda: server.counts()["faults"].get("offload", 0) > faults.get("offload", 0))
    late = Request(server, prompt(1310, 300), 4)
    for request in running:
        request.wait_for(len(request.output_ids) + 20)
    assert late.running and not late.output_ids, "a prefill took pages that decode may need"
    failing_refills.succeed(folder)
    late.join()
    assert late.output_ids and all(request.running for request in running), "it waited for a request to end"
    for request in running:
        request.abort()
        request.join()
    wait_until(lambda: server.counts()["running"] == 0)
    ends = server.counts()["faults"]
    assert {name for name in ends if ends[name] != faults.get(name, 0)} == {"offload"}
    server.flush()
    assert_no_page_is_left(server)


@pytest.mark.long
@pytest.mark.parametrize("host_dtype", ["auto", "int8"])
def test_a_storm_of_aborts_and_retractions_leaves_nothing(tiny: Path, tmp_path: Path, host_dtype: str) -> None:
    """Aborts, every few steps a retraction, sessions that are left open for a while, eviction all along."""
    environment = STRICT | {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    config = CONFIG | {"host_ratio": RATIO, "host_kv_dtype": host_dtype}
    with serve(tiny, tmp_path / "server.log", *ARGUMENTS, config=config, environment=environment) as server:
        draw, aborted = random.Random(7), 0
        sessions: list[str] = []
        while aborted < ABORTS:
            wave = [Request(server, prompt(draw.randrange(40), draw.randrange(50, 2600)), 50) for _ in range(20)]
            if draw.random() < 0.3:
                opened = requests.post(f"{server.url}/open_session", json={"capacity_of_str_len": 4096}, timeout=60)
                sessions.append(opened.json())
                server.generate(prompt(draw.randrange(40), 300), 8, session_params={"id": sessions[-1]})
            time.sleep(draw.random())
            for request in draw.sample(wave, 18):
                request.abort()
            for request in wave:
                request.join()
                aborted += request.was_aborted
            if len(sessions) > 3:
                closing = sessions.pop(0)
                requests.post(f"{server.url}/close_session", json={"session_id": closing}, timeout=60)
            if draw.random() < 0.1:
                wait_until(lambda: server.counts()["running"] == 0)
                server.flush()
        for left in sessions:
            requests.post(f"{server.url}/close_session", json={"session_id": left}, timeout=60)
        wait_until(lambda: server.counts()["running"] == 0)
        assert "retract" in server.log.read_text().lower()
        assert_all_back(server)
