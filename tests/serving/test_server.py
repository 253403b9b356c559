"""A real SGLang server and SmolLM2: what a user sees, at contexts that a CPU can prefill in a test.

Red when: a shared prefix is clustered again, a needle is lost that the dense way
finds, a batch changes a request's tokens, a page shows its old clusters after a flush, an abort or a retraction, or
anything is left over when all is done.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from benchmarks.servers import Server

pytestmark = pytest.mark.server

ROUNDING = 0.01  # of a log-probability; 0.0007 was seen between a batch and single requests
BORDERS = 0.1  # of a log-probability, with other segment borders; 0.036 was seen


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


def grew(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    return after[name] - before[name]


def test_the_start_says_what_it_costs(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "the index takes" in line]
    assert len(lines) == 1 and '"budget_tokens":128' in lines[0] and "% of the KV" in lines[0], lines
    # So does whoever asks later, by the same names.
    config = server.counts()["config"]
    assert json.dumps(config, separators=(",", ":")) in lines[0], config


def test_a_trace_is_refused_where_none_is_kept(server: Server) -> None:
    sampling = {"max_new_tokens": 4, "custom_params": {"clusterkv_trace": True}}
    answer = requests.post(f"{server.url}/generate", json={"text": "a", "sampling_params": sampling}, timeout=600)
    assert answer.status_code == 400 and "This server keeps no traces" in answer.text
    assert "traces_held" not in server.counts()


def test_a_shared_prefix_is_clustered_once(server: Server, text: list[int]) -> None:
    server.flush()
    start = server.counts()
    server.generate(text[:1600] + text[1800:1840], 4)
    first = server.counts()
    assert grew(start, first, "tokens_clustered") >= 1504
    # Shares 1,504 tokens: at most the segment that the match cuts is clustered again, and what follows it.
    server.generate(text[:1504] + text[1700:1860], 4)
    second = server.counts()
    assert grew(first, second, "tokens_clustered") <= 256 + 160
    assert grew(first, second, "tokens_reused") >= 1504 - 16 - 256
    # The same match and a shorter question: the segment that its window begins in is cut there.
    server.generate(text[:1504] + text[1900:1940], 4)
    third = server.counts()
    assert grew(second, third, "tokens_clustered") <= 256 and grew(second, third, "splits") == 1
    # The same again: nothing of the prefix is clustered again.
    server.generate(text[:1504] + text[2000:2040], 4)
    fourth = server.counts()
    assert grew(third, fourth, "tokens_clustered") == 0, "a fourth request clusters nothing"
    assert grew(third, fourth, "splits") == 0
    assert grew(third, fourth, "sparse_steps") >= 2


def test_the_next_turn_of_a_chat_clusters_nothing_again(server: Server, text: list[int]) -> None:
    server.flush()
    prompt = text[500:1500]
    answer = server.generate(prompt, 40)
    before = server.counts()
    longer = prompt + answer["output_ids"] + text[2000:2050]
    server.generate(longer, 8)
    after = server.counts()
    assert grew(before, after, "splits") == 0
    assert grew(before, after, "tokens_reused") >= 900
    # New: the first turn's window, its answer, and the new question up to the new window.
    assert grew(before, after, "tokens_clustered") <= 64 + 16 + 40 + 50


def test_a_branch_from_the_middle_cuts_one_segment(server: Server, text: list[int]) -> None:
    server.flush()
    server.generate(text[:1200], 4)
    before = server.counts()
    server.generate(text[:704] + text[1400:1480], 4)
    after = server.counts()
    assert grew(before, after, "splits") <= 1
    assert grew(before, after, "tokens_clustered") <= 256 + 80


def answer_with_logprobs(server: Server, prompt: list[int]) -> list[dict[int, float]]:
    """24 greedy tokens: each step's five likeliest, as id to log-probability, the likeliest first."""
    answer = server.generate(prompt, 24, return_logprob=True, top_logprobs_num=5)
    return [{token: value for value, token, _ in step} for step in answer["meta_info"]["output_top_logprobs"]]


def assert_same_answer(answer: list[dict[int, float]], alone: list[dict[int, float]], tolerance: float) -> None:
    """Equal up to a tolerance: a product's sums depend on the batch's shape, and so may a key between two centroids.

    The same tokens with the same log-probabilities, until two tokens are so nearly equal that either may come first: from
    there on the texts are different ones.
    """
    for one, other in zip(answer, alone, strict=True):
        token, likeliest = next(iter(one)), next(iter(other))
        assert token in other, (one, other)
        assert abs(one[token] - other[token]) < tolerance, (one, other)
        if token != likeliest:
            assert other[likeliest] - other[token] < tolerance, (one, other)
            return


def test_a_batch_gives_the_tokens_of_single_requests(server: Server, text: list[int]) -> None:
    prompts = [text[100 * i : 100 * i + 700 + 90 * i] for i in range(5)]
    server.flush()
    alone = [answer_with_logprobs(server, prompt) for prompt in prompts]
    server.flush()
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: answer_with_logprobs(server, prompt), prompts))
    for answer, expected in zip(together, alone, strict=True):
        assert_same_answer(answer, expected, ROUNDING)


def test_identical_concurrent_prompts_agree(server: Server, text: list[int]) -> None:
    server.flush()
    alone = answer_with_logprobs(server, text[:900])
    server.flush()
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda prompt: answer_with_logprobs(server, prompt), [text[:900]] * 3))
    # Copies are rewritten to the tree's pages and may see borders of their own.
    for answer in answers:
        assert_same_answer(answer, alone, BORDERS)


def test_decoded_tokens_become_segments(server: Server, text: list[int]) -> None:
    server.flush()
    before = server.counts()
    server.generate(text[:600], 200)
    after = server.counts()
    prefilled = 600 // 16 * 16 - 64 - 16
    aged = (600 + 199) // 16 * 16 - 64 - (prefilled + 16)
    assert grew(before, after, "tokens_clustered") == prefilled + aged // 64 * 64
    assert grew(before, after, "sparse_steps") > 190
    first = after["dense_layer_calls"]["first_layers"] - before["dense_layer_calls"].get("first_layers", 0)
    assert first == grew(before, after, "sparse_steps"), "one of the layers goes the dense way in each step"


def test_a_needle_is_found_at_a_small_budget(server: Server, model: Path, text: list[int]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    document = (
        tokenizer.decode(text[:900]) + " The secret passcode of the vault is 48213. " + tokenizer.decode(text[900:1900])
    )
    question = document + "\n\nWhat is the secret passcode of the vault?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    before = server.counts()
    assert "48213" in server.generate(prompt, 24)["text"]
    assert grew(before, server.counts(), "sparse_steps") >= 20


def test_aborts_leave_nothing(server: Server, text: list[int]) -> None:
    server.flush()
    for i, wait_s in enumerate((0.3, 1.5, 3.0)):
        body = {"input_ids": text[50 * i :][:1500], "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
        with contextlib.suppress(requests.Timeout):
            requests.post(f"{server.url}/generate", json=body, timeout=wait_s)
        requests.post(f"{server.url}/abort_request", json={"abort_all": True, "rid": ""}, timeout=30)
    server.flush()
    assert server.counts()["running"] == 0
    assert server.generate(text[:900], 8)["output_ids"]


def test_the_server_is_still_well(server: Server) -> None:
    log = server.log.read_text()
    assert "Traceback" not in log and "was not built" not in log
    assert server.counts()["build_conflicts"] == 0
