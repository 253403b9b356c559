"""The dense way through a real server, against exact attention and against SGLang's own way.

Red when: with a budget that covers the context a greedy token differs from Transformers' or torch_native's; a step is sparse.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.servers import Server, serve
from tests.support.servers import ASLEEP, POOL
from tests.support.traffic import CONFIG, grew, prompt

pytestmark = pytest.mark.server

TOKENS = 24
TEXT = prompt(90, 2000)
PROMPTS = [TEXT[:700], TEXT[300:420], TEXT[1000:1740]]


@pytest.fixture(scope="module")
def ours(tiny_server: Server) -> list[list[int]]:
    """Greedy answers to `PROMPTS`, all of whose steps were dense. They change with a single key that is missed."""
    assert all(len(ids) + TOKENS < CONFIG["budget_tokens"] for ids in PROMPTS)
    tiny_server.flush()
    before = tiny_server.counts()
    answers = [tiny_server.generate(ids, TOKENS)["output_ids"] for ids in PROMPTS]
    after = tiny_server.counts()
    assert grew(before, after, "sparse_steps") == 0
    assert grew(before, after, "dense_steps", "budget") >= len(PROMPTS) * (TOKENS - 1)
    assert len(set(map(tuple, answers))) == len(PROMPTS)
    return answers


def test_a_budget_over_the_context_equals_exact_attention(ours: list[list[int]], tiny: Path) -> None:
    """The same greedy tokens: each is the likeliest behind those before it, for Transformers' attention over all of them."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for ids, answer in zip(PROMPTS, ours, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer


@pytest.mark.long
def test_a_budget_over_the_context_equals_the_dense_path_of_sglang(
    ours: list[list[int]], tiny: Path, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with serve(tiny, log, "--max-total-tokens", str(POOL), ASLEEP, backend="torch_native") as server:
        assert ours == [server.generate(ids, TOKENS)["output_ids"] for ids in PROMPTS]
