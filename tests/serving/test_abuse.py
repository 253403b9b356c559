"""Malformed requests get a 4xx with a sentence, and the server goes on.

All of them are what SGLang refuses by itself, with torch_native too: here stands that it does so with our hooks in it. What
request_checks.py refuses is in test_flags.py.

Red when: a malformed request ends the server, is answered otherwise than with 4xx or without a sentence, or changes what the
next request gets.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests

from benchmarks.servers import Server
from tests.support.servers import POOL
from tests.support.tiny_model import SHAPE
from tests.support.traffic import PAGE, Request, alone, assert_well, prompt

pytestmark = pytest.mark.server

CONTEXT = SHAPE["max_position_embeddings"]
IDS = [5, 6, 7]


def asked(ids: Any, **sampling: Any) -> dict[str, Any]:
    """A body of /generate."""
    return {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 4} | sampling}


REFUSED_BY_GENERATE: dict[str, Any] = {
    "empty ids": asked([]),
    "no input": {"sampling_params": {"max_new_tokens": 4}},
    "context + 1": asked([5] * (CONTEXT + 1)),
    "prompt and answer over the context": asked([5] * (CONTEXT - 2), max_new_tokens=10),
    "fractional ids": asked([1.5]),
    "ids of text": asked(["a"]),
    "an id of 70 bits": asked([2**70]),
    "ids too deep": asked([[[1]]]),
    "text that is a number": {"text": 5, "sampling_params": {}},
    "negative temperature": asked(IDS, temperature=-1),
    "temperature in words": asked(IDS, temperature="hot"),
    "top_p": asked(IDS, top_p=2),
    "top_k": asked(IDS, temperature=1, top_k=0),
    "min_p": asked(IDS, min_p=-3),
    "negative length": asked(IDS, max_new_tokens=-1),
    "absurd length": asked(IDS, max_new_tokens=10**12),
    "least length over the most": asked(IDS, min_new_tokens=9),
    "repetition penalty": asked(IDS, repetition_penalty=-1),
    "frequency penalty": asked(IDS, frequency_penalty=1e9),
    "bias of no token": asked(IDS, logit_bias={"9999999": 1}),
    "broken regex": asked(IDS, regex="((("),
    "broken schema": asked(IDS, json_schema="{nope"),
    "two grammars": asked(IDS, regex="a", json_schema="{}"),
    "unknown parameter": asked(IDS, nonsense=1),
    "stop that is a number": asked(IDS, stop=5),
    "seed of 70 bits": asked(IDS, sampling_seed=2**70),
    "parameters that are a list": {"input_ids": IDS, "sampling_params": [1]},
    "log-probabilities of no token": asked(IDS) | {"return_logprob": True, "token_ids_logprob": [10**7]},
    "log-probabilities from beyond the prompt": asked(IDS) | {"return_logprob": True, "logprob_start_len": 10**6},
    "an adapter that is not there": asked(IDS) | {"lora_path": "x"},
    "broken JSON": b'{"input_ids": [1,',
    "no body": b"",
    "a list as body": b"[1, 2]",
    "NaN": b'{"input_ids": [5], "sampling_params": {"temperature": NaN}}',
    "bytes": bytes(range(256)),
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
REFUSED_BY_OPENAI: dict[str, tuple[str, Any]] = {
    "an empty prompt": (COMPLETIONS, {"model": "default", "prompt": ""}),
    "no messages": (CHAT, {"model": "default", "messages": []}),
    "an unknown role": (CHAT, {"model": "default", "messages": [{"role": "x", "content": "a"}]}),
    "a negative length": (CHAT, {"model": "default", "messages": [{"role": "user", "content": "a"}], "max_tokens": -5}),
    "broken chat": (CHAT, b'{"mess'),
    "no prompt": (COMPLETIONS, {"model": "default"}),
    "context + 1": (COMPLETIONS, {"model": "default", "prompt": [5] * (CONTEXT + 1)}),
    "negative temperature": (COMPLETIONS, {"model": "default", "prompt": "a", "temperature": -5}),
    "no such path": ("/v2/nothing", {}),
}


@pytest.fixture(scope="module")
def expected(tiny_server: Server) -> list[int]:
    """What a request in order gets."""
    return alone(tiny_server, prompt(400), 8)


def sent(server: Server, path: str, body: Any) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body)
    return requests.post(server.url + path, data=data, headers={"Content-Type": "application/json"}, timeout=60)


def assert_refused(answer: requests.Response) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    assert len(answer.text.split()) >= 2 and "Traceback" not in answer.text, answer.text


@pytest.mark.parametrize("name", REFUSED_BY_GENERATE)
def test_generate_refuses_with_a_sentence(tiny_server: Server, expected: list[int], name: str) -> None:
    assert_refused(sent(tiny_server, "/generate", REFUSED_BY_GENERATE[name]))
    assert tiny_server.generate(prompt(400), 8)["output_ids"] == expected


@pytest.mark.parametrize("name", REFUSED_BY_OPENAI)
def test_the_openai_paths_refuse_with_a_sentence(tiny_server: Server, expected: list[int], name: str) -> None:
    assert_refused(sent(tiny_server, *REFUSED_BY_OPENAI[name]))
    assert tiny_server.generate(prompt(400), 8)["output_ids"] == expected


def test_a_request_in_order_beside_malformed_ones_gets_its_answer(tiny_server: Server) -> None:
    expected = alone(tiny_server, prompt(401), 80)
    tiny_server.flush()
    running = Request(tiny_server, prompt(401), 80)
    running.wait_for(2)
    for body in REFUSED_BY_GENERATE.values():
        assert_refused(sent(tiny_server, "/generate", body))
    assert running.result() == expected


def test_a_prompt_of_nearly_the_whole_pool_is_answered(tiny_server: Server) -> None:
    """A page is left for SGLang's reserve; within less than that SGLang takes a prompt and never runs it."""
    assert CONTEXT == POOL
    answer = sent(tiny_server, "/generate", asked(prompt(402, POOL - 2 * PAGE), max_new_tokens=1))
    assert answer.status_code == 200, answer.text


def test_the_server_is_well_after_all_that(tiny_server: Server, expected: list[int]) -> None:
    assert_well(tiny_server)
    assert alone(tiny_server, prompt(400), 8) == expected
