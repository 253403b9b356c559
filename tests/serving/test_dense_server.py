"""The dense way through a real server, against SGLang's own.

Red when: with a budget that covers the context a greedy token differs from torch_native's, or a step is sparse.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.servers import Server, serve
from tests.support.servers import ASLEEP, POOL
from tests.support.traffic import CONFIG, grew, prompt

pytestmark = pytest.mark.server

TOKENS = 24


def test_a_budget_over_the_context_equals_the_dense_path_of_sglang(
    tiny_server: Server, tiny: Path, tmp_path: Path
) -> None:
    """Against torch_native: the same greedy tokens. The tiny model's change with a single key that is missed."""
    text = prompt(90, 2000)
    prompts = [text[:700], text[300:420], text[1000:1740]]
    assert all(len(ids) + TOKENS < CONFIG["budget_tokens"] for ids in prompts)
    tiny_server.flush()
    before = tiny_server.counts()
    ours = [tiny_server.generate(ids, TOKENS)["output_ids"] for ids in prompts]
    after = tiny_server.counts()
    assert grew(before, after, "sparse_steps") == 0
    assert grew(before, after, "dense_steps", "budget") >= len(prompts) * (TOKENS - 1)
    log = tmp_path / "server.log"
    with serve(tiny, log, "--max-total-tokens", str(POOL), ASLEEP, backend="torch_native") as server:
        assert ours == [server.generate(ids, TOKENS)["output_ids"] for ids in prompts]
    assert len(set(map(tuple, ours))) == len(prompts)
