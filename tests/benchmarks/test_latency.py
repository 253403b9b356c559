"""The host tier's arms of `benchmarks.latency`: as many requests run at once as are timed, over less than they read.

Red when: SGLang would queue some of them, the device tier holds more of the document than it must, or a row that was read from
the device counts as the host's.
"""

from __future__ import annotations

from argparse import Namespace

import pytest

from benchmarks import latency
from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.serving.host_tier import rows_that_fit

OPTIONS = {"budget_tokens": 256, "recluster_every": latency.TIER_RUN, "host_ratio": latency.TIER_RATIO}


@pytest.mark.parametrize("batch", [1, 2, 8, 32])
@pytest.mark.parametrize("tokens", [1000, 7700, 120_000])
def test_the_tier_runs_all_requests_at_once_and_holds_a_quarter_at_most_or_the_least(tokens: int, batch: int) -> None:
    pool, page = latency.tier_pool(tokens, batch, OPTIONS), latency.PAGE
    config = ClusterKVConfig(**OPTIONS)

    def fitting(tokens: int) -> int:
        try:
            return rows_that_fit(config, tokens=tokens, chunk_tokens=latency.TIER_CHUNK, page_size=page, rows=batch + 1)
        except ConfigError:
            return 0

    assert pool % (latency.TIER_RATIO * page) == 0 and fitting(pool) >= batch
    device = pool // latency.TIER_RATIO
    ring = -(-latency.TIER_CHUNK // page) + 2 * batch
    smaller = pool - latency.TIER_RATIO * page
    assert device - ring * page <= tokens / 4 + page or fitting(smaller) < batch


def test_rows_are_counted_between_two_looks() -> None:
    before = {"recalled_rows_host": 100, "recalled_rows_device": 900}
    after = {"recalled_rows_host": 400, "recalled_rows_device": 1000}
    assert latency.share_from_host(before, after) == 0.75
    assert latency.share_from_host(before, before) == 0


def test_the_table_tells_what_was_read_from_the_host() -> None:
    row = {"short_ms": 70.0, "long_ms": 80.0, "batch_ms": 400.0, "prefill_s": 20.0, "hit_s": 0.5}
    rows = {"clusterkv": row, "tier-int8": row | {"long_ms": 100.0, "from_host": 0.71}}
    text = latency.table(rows, Namespace(tokens=7700, batch=8))
    assert "| tier-int8 | 70 | 100 | 1.25 | 400 | 1.00 |" in text
    assert text.endswith("Recalled from the host at batch 8: tier-int8 71 %.")
    assert "host" not in latency.table({"clusterkv": row}, Namespace(tokens=7700, batch=8))
