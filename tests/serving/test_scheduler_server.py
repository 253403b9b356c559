"""What SGLang's scheduler does to rows and pages, brought about by real traffic against a real server.

test_plan.py shows the borders in these situations; here stands that the scheduler really causes them, and that a user
does not notice: each answer equals that of an idle server with an empty cache.

Red when: clusters of other pages, of an old owner or of a cut segment are used; a rewritten, retracted or evicted row is
not looked at again; a border follows a chunk's; an answer depends on what else runs; copies of a prompt that arrive together
see other borders than one alone, or leave what a later one clusters again; anything is left over.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
import requests

from benchmarks.servers import Server
from tests.support.servers import CHUNK, POOL
from tests.support.tiny_model import SHAPE
from tests.support.traffic import PAGE, Request, alone, assert_well, at_once, borders, grew, prompt

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def log_begin(tiny_server: Server) -> int:
    """Where this file's part of the log begins: other files send what is refused."""
    return len(tiny_server.log.read_text())


@pytest.fixture
def server(tiny_server: Server, log_begin: int) -> Iterator[Server]:
    """Idle, its cache empty; nothing is left when the test is over."""
    tiny_server.flush()
    yield tiny_server
    assert_well(tiny_server)


def prefills(server: Server, since: int) -> int:
    """Prefill batches that the log tells of, from a place in it on."""
    return server.log.read_text()[since:].count("Prefill batch")


def test_the_answers_depend_on_what_was_read(server: Server) -> None:
    """Else equal answers would show nothing: one other token far from the end, and soon all is different."""
    ids = prompt(1)
    changed = [*ids[:400], *prompt(2)[400:432], *ids[432:]]
    first, second = alone(server, ids, 24), alone(server, changed, 24)
    assert first != second and len(set(first)) > 12
    assert server.counts()["sparse_steps"] > 0


def test_rows_are_rewritten_while_the_next_decode_is_in_flight(server: Server) -> None:
    ids = prompt(10)
    server.flush()
    by_itself = server.generate(ids, 24)
    expected, segments = by_itself["output_ids"], borders(server, by_itself["meta_info"]["id"])
    server.flush()
    info = requests.get(f"{server.url}/server_info", timeout=60).json()
    assert not info["disable_overlap_schedule"]
    before = server.counts()
    answers = at_once(server, [ids, ids], 24)
    after = server.counts()
    # Both were prefilled in one batch; the second one's row was replaced by the tree's after the decode's launch.
    assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0, 0]
    assert grew(before, after, "dense_steps", "dirty") >= 1 and grew(before, after, "sparse_steps") >= 40
    assert [answer["output_ids"] for answer in answers] == [expected] * 2
    # Each was clustered, and what they end up with is what one alone has; it is there for the next.
    clustered = sum(end - begin for begin, end in segments[0])
    assert grew(before, after, "tokens_clustered") == 2 * clustered > 0
    assert [borders(server, answer["meta_info"]["id"]) for answer in answers] == [segments] * 2
    server.generate(ids + prompt(13, 40), 24)  # a first look at a row comes with its first decode step
    later = server.counts()
    assert grew(after, later, "tokens_reused") == clustered and grew(after, later, "tokens_clustered") == 0


def test_a_row_whose_prefill_went_on_takes_the_pages_of_the_one_that_was_ready(server: Server) -> None:
    """SGLANG's order: A is complete and B has its first chunk in one forward, then each gets part of the other's pages."""
    ids = prompt(11, 1600)
    expected = alone(server, ids, 24)
    server.flush()
    before = server.counts()
    answers = at_once(server, [ids, ids], 24)
    assert grew(before, server.counts(), "dense_steps", "dirty") >= 1
    assert [answer["output_ids"] for answer in answers] == [expected] * 2


def test_duplicates_are_inserted_once(server: Server) -> None:
    ids = prompt(12)
    expected = alone(server, ids, 24)
    server.flush()
    before = server.counts()
    answers = at_once(server, [ids] * 5, 24)
    computed = [len(ids) - answer["meta_info"]["cached_tokens"] for answer in answers]
    assert sum(computed) > 2 * len(ids), "they were prefilled beside each other"
    assert [answer["output_ids"] for answer in answers] == [expected] * 5
    middle = server.counts()
    # Each copy may cluster its pages before the tree replaces them; who comes later finds one set of them.
    again = server.generate(ids, 24)
    assert again["meta_info"]["cached_tokens"] >= len(ids) - 2 * PAGE and again["output_ids"] == expected
    assert grew(middle, server.counts(), "tokens_clustered") <= len(ids), "at most what completes each segment once"
    assert grew(before, middle, "tokens_clustered") <= 5 * len(ids)


def test_a_retracted_request_returns(server: Server) -> None:
    tokens, together = 96, 8
    assert together * (960 + tokens) > POOL > together * 960
    # SGLang reserves all tokens of a request that ignores EOS, and then retracts nothing: take answers without one.
    asked = [(ids, alone(server, ids, tokens)) for ids in map(prompt, range(20, 30))]
    prompts, expected = zip(
        *[(ids, answer) for ids, answer in asked if SHAPE["eos_token_id"] not in answer][:together], strict=True
    )
    assert len(prompts) == together
    server.flush()
    answers = at_once(server, list(prompts), tokens, ignore_eos=False)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) >= 1
    assert [answer["output_ids"] for answer in answers] == list(expected)


def test_a_chat_whose_first_turn_was_evicted_goes_on(server: Server) -> None:
    turn = prompt(30)
    first = alone(server, turn, 24)
    longer = turn + first + prompt(31, 40)
    expected = alone(server, longer, 24)
    server.flush()
    assert server.generate(turn, 24)["output_ids"] == first
    kept = server.generate(longer, 1)["meta_info"]["cached_tokens"]
    assert kept >= 960, "without other traffic the first turn is there"
    for i in range(POOL // 960):
        server.generate(prompt(32 + i), 1)
    answer = server.generate(longer, 24)
    assert answer["meta_info"]["cached_tokens"] < kept, "nothing was evicted"
    assert answer["output_ids"] == expected


def test_pages_come_back_without_their_old_clusters(server: Server) -> None:
    prompts = [prompt(40 + i, 1000 - 16 * i) for i in range(6)]
    expected = [alone(server, ids, 16) for ids in prompts]
    server.flush()
    for turn in range(3):  # twice the pool: each page has had several owners, at several places of a prompt
        for ids, answer in zip(prompts, expected, strict=True):
            server.generate(prompt(1000 + 10 * turn + len(ids), 500), 8)
            if turn == 1:
                server.flush()
            assert server.generate(ids, 16)["output_ids"] == answer


def test_a_full_pool_evicts_and_answers_stay(server: Server) -> None:
    ids = prompt(80, 1000)
    first = server.generate(ids, 16)["output_ids"]
    for i in range(1, 12):  # 11 x 1,000 tokens pass through a pool of 8,192, which evicts the first prompt's pages
        server.generate(prompt(80 + i, 1030), 2)
    again = server.generate(ids, 16)
    assert again["output_ids"] == first and again["meta_info"]["cached_tokens"] == 0


def test_chunk_borders_do_not_show(server: Server) -> None:
    ids = prompt(50, 4000)
    assert len(ids) <= 2 * CHUNK < len(ids) + 700
    at = len(server.log.read_text())
    by_itself = Request(server, ids, 24)
    expected = by_itself.result()
    assert prefills(server, at) == 2
    server.flush()
    at = len(server.log.read_text())
    other, request = at_once(server, [prompt(51, 700), ids], 24)
    assert prefills(server, at) == 3, "the other one moved the chunks' borders"
    assert request["output_ids"] == expected
    assert borders(server, request["meta_info"]["id"]) == borders(server, by_itself.rid)
    assert other["output_ids"] == alone(server, prompt(51, 700), 24)


def test_a_branch_inside_a_segment_while_the_far_side_is_decoded(server: Server) -> None:
    trunk = prompt(60)
    branch = trunk[:640] + prompt(61, 400)  # inside the segment (528, 784)
    expected = alone(server, trunk, 400), alone(server, branch, 16)
    server.flush()
    before = server.counts()
    far = Request(server, trunk, 400)
    far.wait_for(4)
    near = server.generate(branch, 16)
    assert far.running, "it ended before the branch did"
    assert near["meta_info"]["cached_tokens"] == 640
    answer = far.result()
    after = server.counts()
    assert grew(before, after, "splits") >= 1
    assert grew(before, after, "dense_steps", "dirty") == 0, "the far side stayed sparse"
    (segments,) = borders(server, far.rid)
    assert segments[-1][1] > 896, "what lies beyond the cut is clustered for who goes on to it"
    assert (answer, near["output_ids"]) == expected


def test_an_abort_between_two_chunks(server: Server) -> None:
    ids = prompt(70, 6000)
    expected = alone(server, ids, 8)
    server.flush()
    request = Request(server, ids, 8)
    request.abort()
    request.result()
    answer = server.generate(ids, 8)
    assert answer["output_ids"] == expected


def test_a_server_that_sleeps_is_awake_for_whatever_comes(server: Server) -> None:
    """It looks up once a second (SGLang's --sleep-on-idle); what comes wakes it, and sessions time out."""
    opened = requests.post(f"{server.url}/open_session", json={"capacity_of_str_len": 4000, "timeout": 1.0}, timeout=60)
    session = opened.json()
    answer = server.generate(prompt(71), 2, session_params={"id": session})
    assert len(answer["output_ids"]) == 2
    took = []
    for path in ("health_generate", "server_info") * 2:
        time.sleep(0.3)
        begin = time.perf_counter()
        assert requests.get(f"{server.url}/{path}", timeout=60).status_code == 200
        took.append(time.perf_counter() - begin)
    assert sorted(took)[1] < 0.4, took  # it would have slept for .7 s more
    assert requests.post(f"{server.url}/abort_request", json={"rid": "nobody"}, timeout=60).status_code == 200
    until = time.monotonic() + 10
    while f"Session {session} timed out" not in server.log.read_text() and time.monotonic() < until:
        time.sleep(0.1)
    assert f"Session {session} timed out" in server.log.read_text()
    assert server.counts()["unknown_requests"] == {}


def test_the_log_tells_of_no_error(server: Server, log_begin: int) -> None:
    assert not re.search(r"Traceback|was not built|ERROR", server.log.read_text()[log_begin:])
