"""The dense way through a real server, against SGLang's own.

Red when: with a budget over the context a greedy token differs from torch_native's.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.servers import serve
from tests.support.servers import ASLEEP

pytestmark = pytest.mark.server


def test_budget_over_context_equals_the_dense_path_of_sglang(model: Path, text: list[int], tmp_path: Path) -> None:
    """Configured through the environment, against torch_native: the same greedy tokens."""
    prompts = [text[:700], text[300:420], text[1000:2100]]
    # One thread each: two servers of two threads on two cores hold each other up.
    environment = {
        "SGLANG_CLUSTERKV_CONFIG": '{"budget_tokens": 8192, "candidate_tokens": 8192}',
        "OMP_NUM_THREADS": "1",
    }

    def tokens(backend: str) -> list[list[int]]:
        log = tmp_path / f"{backend}.log"
        with serve(
            model, log, "--max-total-tokens", "6000", ASLEEP, backend=backend, environment=environment
        ) as server:
            return [server.generate(prompt, 24)["output_ids"] for prompt in prompts]

    with ThreadPoolExecutor(2) as pool:  # two starts at once
        ours, native = pool.map(tokens, ("clusterkv", "torch_native"))
    assert ours == native
