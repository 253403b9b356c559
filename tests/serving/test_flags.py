"""Flags and routes that touch neither pages nor attention, and the guard of requests: one server with many of them.

The limit of request_checks is lowered here (tests/support/lowered_plugin.py), so that what is refused is what the model would
serve. The requests are tokenized in two processes, which load no plugins.

Red when: the guard lets an id beyond the limit through on any way into the scheduler, or refuses one below it; a refusal
touches what else runs; a flag or a route of docs/compatibility.md ends in an error; a session, a pause or an update of
weights changes an answer; decode steps read other weights than prefills; anything is left over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import load_file, save_file

from benchmarks.servers import Server, serve
from tests.support import lowered_plugin, plugins
from tests.support.lowered_plugin import LIMIT
from tests.support.servers import ASLEEP, CHUNK, POOL
from tests.support.traffic import CONFIG, Request, alone, assert_well, grew, prompt

pytestmark = pytest.mark.server

FLAGS = ["--tokenizer-worker-num", "2", "--enable-priority-scheduling", "--enable-streaming-session"]
FLAGS += ["--tool-call-parser", "llama3", "--reasoning-parser", "qwen3"]
FLAGS += ["--enable-cache-report", "--enable-return-hidden-states", "--enable-custom-logit-processor"]
FLAGS += ["--served-model-name", "tiny"]

HIGH = 49_005  # an id that the model serves
SENTENCE = f"Token id {HIGH} is outside the model's vocabulary: use ids from 0 to {LIMIT - 1}."
GREEDY = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}


def in_bf16(checkpoint: Path, folder: Path, noise: float) -> Path:
    """A copy of a checkpoint, still in float32: its weights, moved by so much of themselves, rounded to bf16."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        moved = weight * (1 + noise * torch.randn(weight.shape, generator=generator))
        weights[name] = moved.bfloat16().float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of which decode steps read copies in half the bytes."""
    return in_bf16(tiny, tmp_path_factory.mktemp("checkpoint") / "one", 0)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("flags")
    environment = plugins.install(folder, lowered_plugin) | {
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
        "SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300",  # a busy CPU takes longer than ten seconds to import SGLang
    }
    arguments = ["--chunked-prefill-size", str(CHUNK), "--max-total-tokens", str(POOL), ASLEEP, *FLAGS]
    log = folder / "server.log"
    with serve(checkpoint, log, *arguments, config=CONFIG, environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def word(tiny: Path) -> str:
    """A text of one token, beyond the limit."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    text = tokenizer.decode([HIGH])
    assert tokenizer(text).input_ids == [HIGH]
    return text


def low(number: int, tokens: int = 960) -> list[int]:
    """As `prompt`, below the limit."""
    return [3 + id_ % (LIMIT - 3) for id_ in prompt(number, tokens)]


def post(server: Server, path: str, body: dict[str, Any]) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=300)


def answered(server: Server, path: str, body: dict[str, Any]) -> Any:
    """The JSON of an answer that is no error."""
    answer = post(server, path, body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def generated(server: Server, ids: list[int], tokens: int = 8, **fields: Any) -> list[int]:
    sampling = GREEDY | {"max_new_tokens": tokens}
    return answered(server, "/generate", {"input_ids": ids, "sampling_params": sampling} | fields)["output_ids"]


@pytest.fixture(scope="module")
def expected(server: Server) -> list[int]:
    """What a request in order gets."""
    return alone(server, low(1), 8)


def asked(ids: Any, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/generate", {"input_ids": ids, "sampling_params": GREEDY} | fields


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "ids": asked([5, HIGH]),
    "a batch": asked([[5, 6], [7, HIGH]]),
    "several answers": asked([5, HIGH], sampling_params=GREEDY | {"n": 2}),
    "a prefill alone": asked([5, HIGH], sampling_params=GREEDY | {"max_new_tokens": 0}),
    "a picture that the model cannot see": asked([5, HIGH], image_data="https://localhost/none.png"),
    "log-probabilities": asked([5, HIGH], return_logprob=True, logprob_start_len=0),
    "a priority": asked([5, HIGH], priority=3),
    "completions": ("/v1/completions", {"model": "tiny", "prompt": [5, HIGH], "max_tokens": 4}),
    "several completions": ("/v1/completions", {"model": "tiny", "prompt": [[5, 6], [7, HIGH]], "max_tokens": 4}),
    "scores": ("/v1/score", {"model": "tiny", "query": [5, 6], "items": [[7, HIGH]], "label_token_ids": [10, 11]}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_id_beyond_the_limit_is_refused_on_every_way_in(server: Server, expected: list[int], name: str) -> None:
    answer = post(server, *REFUSED[name])
    assert answer.status_code == 400 and SENTENCE in answer.text, answer.text
    assert generated(server, low(1)) == expected


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"sampling_params": GREEDY}),
        ("/v1/completions", {"model": "tiny", "max_tokens": 4}),
    ],
)
def test_text_is_checked_as_ids(server: Server, word: str, path: str, body: dict[str, Any]) -> None:
    key = "text" if path == "/generate" else "prompt"
    answer = post(server, path, body | {key: word})
    assert answer.status_code == 400 and SENTENCE in answer.text, answer.text


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_messages_are_checked_as_ids(server: Server, word: str, path: str) -> None:
    message = {"role": "user", "content": word}
    answer = post(server, path, {"model": "tiny", "messages": [message], "max_tokens": 4})
    assert answer.status_code == 400 and SENTENCE in answer.text, answer.text
    message["content"] = "a"
    assert answered(server, path, {"model": "tiny", "messages": [message], "max_tokens": 4})["usage"]


def test_a_stream_ends_with_the_sentence(server: Server) -> None:
    path, body = asked([5, HIGH], stream=True)
    answer = post(server, path, body)
    assert SENTENCE in answer.text and "[DONE]" in answer.text, answer.text


def test_numbers_that_are_looked_up_among_the_logits(server: Server) -> None:
    stops = GREEDY | {"ignore_eos": False, "min_new_tokens": 2, "stop_token_ids": [HIGH]}
    answer = post(server, *asked([5, 6], sampling_params=stops))
    assert answer.status_code == 400 and "Stop t" + SENTENCE[1:] in answer.text, answer.text
    assert generated(server, [5, 6], sampling_params=stops | {"min_new_tokens": 0})
    answer = post(server, *asked([5, 6], return_logprob=True, top_logprobs_num=LIMIT + 1))
    assert answer.status_code == 400 and f"the model has {LIMIT} tokens" in answer.text, answer.text


def test_a_refusal_beside_a_request_that_runs(server: Server) -> None:
    ids = low(2)
    expected = alone(server, ids, 60)
    server.flush()
    running = Request(server, ids, 60)
    running.wait_for(2)
    for path, body in REFUSED.values():
        assert post(server, path, body).status_code == 400
    assert running.result() == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_a_session_answers_as_its_whole_prompt_does(server: Server, streaming: bool) -> None:
    first, second = low(10 + streaming), low(20 + streaming, 60)
    before = server.counts()
    session = answered(server, "/open_session", {"capacity_of_str_len": 1000, "streaming": streaming})
    turn: dict[str, Any] = {"input_ids": first, "sampling_params": GREEDY, "session_params": {"id": session}}
    one = answered(server, "/generate", turn)
    turn |= {
        "input_ids": second,
        "session_params": {"id": session, "rid": None if streaming else one["meta_info"]["id"]},
    }
    refused = post(server, "/generate", turn | {"input_ids": [5, HIGH]})
    assert refused.status_code == 400 and SENTENCE in refused.text, refused.text
    two = answered(server, "/generate", turn)
    assert post(server, "/close_session", {"session_id": session}).status_code == 200
    assert grew(before, server.counts(), "sparse_steps") > 0
    whole = [*first, *one["output_ids"], *second]
    assert two["meta_info"]["prompt_tokens"] == len(whole)
    assert two["output_ids"] == alone(server, whole, 4)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_changes_no_answer(server: Server, mode: str) -> None:
    ids = low(30)
    expected = alone(server, ids, 60)
    server.flush()
    running = Request(server, ids, 60)
    running.wait_for(4)
    answered(server, "/pause_generation", {"mode": mode})
    answered(server, "/continue_generation", {})
    assert running.result() == expected


def test_an_update_of_weights_forgets_what_was_clustered(server: Server, checkpoint: Path, expected: list[int]) -> None:
    generated(server, low(1))
    before = server.counts()
    assert answered(server, "/update_weights_from_disk", {"model_path": str(checkpoint)})["success"]
    assert generated(server, low(1)) == expected
    after = server.counts()
    assert grew(before, after, "tokens_clustered") > 800 and grew(before, after, "tokens_reused") == 0


def decoded_and_prefilled(server: Server) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Tokens of an answer, with their log-probabilities as decode steps find them and as a prefill of them does."""
    ids = low(50, 40)
    server.flush()
    body = {"input_ids": ids, "sampling_params": GREEDY | {"max_new_tokens": 12}, "return_logprob": True}
    answer = answered(server, "/generate", body)
    decoded = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
    server.flush()
    body |= {"input_ids": [*ids, *answer["output_ids"]], "logprob_start_len": len(ids) - 1}
    found = answered(server, "/generate", body)["meta_info"]["input_token_logprobs"]
    return answer["output_ids"], torch.tensor(decoded), torch.tensor([value for value, *_ in found[-12:]])


def test_decode_steps_read_the_weights_that_prefills_read(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    assert "from copies in bf16" in server.log.read_text()
    first, decoded, prefilled = decoded_and_prefilled(server)
    torch.testing.assert_close(decoded, prefilled, rtol=0, atol=1e-3)
    other = in_bf16(checkpoint, tmp_path / "other", 0.3)
    assert answered(server, "/update_weights_from_disk", {"model_path": str(other)})["success"]
    second, decoded, prefilled = decoded_and_prefilled(server)
    torch.testing.assert_close(decoded, prefilled, rtol=0, atol=1e-3)
    assert second != first
    assert answered(server, "/update_weights_from_disk", {"model_path": str(checkpoint)})["success"]
    assert decoded_and_prefilled(server)[0] == first


def test_a_request_for_memory_changes_no_answer(server: Server, expected: list[int]) -> None:
    for path in ("/release_memory_occupation", "/resume_memory_occupation"):
        assert post(server, path, {}).status_code == 200
        assert generated(server, low(1)) == expected


def test_priorities_are_kept(server: Server, expected: list[int]) -> None:
    assert generated(server, low(1), priority=5) == generated(server, low(1), priority=-5) == expected


def test_hidden_states_and_cached_tokens_come_with_the_answer(server: Server) -> None:
    body = {"input_ids": low(40), "sampling_params": GREEDY, "return_hidden_states": True}
    states = answered(server, "/generate", body)["meta_info"]["hidden_states"]
    assert len(states) == 4 and len(states[-1]) == 64
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "one two three " * 40}], "max_tokens": 4}
    answered(server, "/v1/chat/completions", chat)
    usage = answered(server, "/v1/chat/completions", chat)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 64


def test_tools_and_reasoning_are_parsed(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    for more in ({"tools": [tool]}, {"separate_reasoning": True}):
        (choice,) = answered(server, "/v1/chat/completions", body | more)["choices"]
        assert choice["finish_reason"] == "length"
    call = json.dumps({"name": "f", "parameters": {}})
    parsed = answered(server, "/parse_function_call", {"text": call, "tools": [tool], "tool_call_parser": "llama3"})
    assert parsed["calls"][0]["name"] == "f"


def test_nothing_is_left(server: Server) -> None:
    assert_well(server)
