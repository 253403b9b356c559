"""The tables of docs/memory.md."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cited.numbers import milliseconds, percent, small
from benchmarks.cited.tables import MEMORY, Rows, figures

RECENCY = "quality-recency-20261129-140928"
RECENCY_QWEN = "quality-recency-20261130-030612"
NEAR = (
    "newest_2",
    "newest_4",
    "newest_8",
    "used_4",
    "last",
    "lru_1",
    "lru_2",
    "newest_4_or_lru_2",
    "newest_8_or_lru_2",
)


def _recency_lines(found: Any) -> list[tuple[str, int, Any]]:
    """(kind, budget, shares): of each kind, and of the steps of needles that predict a number, the small budget first."""
    lines = []
    for entry in found.values():
        lines.append((entry["kind"], entry["budget"], entry["shares"]))
        if entry["kind"] == "needles":
            lines.append(("needles: numbers", entry["budget"], entry["exact"]))
    return sorted(lines, key=lambda line: line[1])


def _recency(found: Any) -> Rows:
    return [
        [kind, str(budget), str(shares["steps"]), *(small(shares[name]["all"], 2) for name in NEAR)]
        for kind, budget, shares in _recency_lines(found)
    ]


def _recency_layers(found: Any) -> Rows:
    rows: Rows = []
    for kind, budget, shares in _recency_lines(found):
        for name, title in (("newest_4", "newest 1/4"), ("lru_2", "LRU 2"), ("newest_4_or_lru_2", "either")):
            parts = np.array_split(np.array(shares[name]["layers"]), 5)
            means = [small(float(part.mean()), 2) for part in parts]
            if budget == 512:
                rows.append([kind, title, *means, small(shares[name]["worst_tenth"], 2)])
    return rows


for model, result in (("recency", RECENCY), ("recency-qwen", RECENCY_QWEN)):
    figures(model, MEMORY, result)(_recency)
    figures(f"{model}-layers", MEMORY, result)(_recency_layers)


@figures("tier-model", MEMORY, RECENCY)
def _(found: Any) -> Rows:
    from benchmarks.tier_model import Model, hits_in, tier_table
    from sglang_clusterkv.config import ClusterKVConfig

    config = ClusterKVConfig()
    return [list(row) for row in tier_table(hits_in(found, config.budget_tokens), Model(), config)]


@figures("host-tier", MEMORY, "host-tier-20261129-184733")
def _(found: Any) -> Rows:
    rows: Rows = []
    for pair in zip(found["without"]["cells"], found["tier"]["cells"], strict=True):
        for arm, cell in zip(("without", "tier"), pair, strict=True):
            recalled = cell["recalled_host"] + cell["recalled_device"]
            read = (f"{cell[key] / 1e6:,.0f}" for key in ("host_read_decode", "host_read_prefill"))
            rows.append(
                [
                    str(cell["sessions"]),
                    arm,
                    f"{cell['later_first_s']:.2f}",
                    f"{cell['requests_per_s']:.3f}",
                    f"{cell['again']:,}",
                    percent(cell["again_share"]),
                    milliseconds(cell["token_ms"]),
                    ", ".join(read) if arm == "tier" else "-",
                    percent(cell["recalled_host"] / recalled) if recalled else "-",
                ]
            )
    return rows


@figures("host-tier-kl", MEMORY, "host-tier-kl-20261129-203820")
def _(found: Any) -> Rows:
    return [
        [*reversed(pair.split(", ")), f"{of_pair['kl']:.1e}", f"{of_pair['most']:.1e}", percent(of_pair["same"], 1)]
        for pair, of_pair in found["pairs"].items()
    ]


@figures("tier-latency", MEMORY, "latency-7700-b8-20261129-224655")
def _(found: Any) -> Rows:
    times = [("short_ms", 0), ("long_ms", 0), ("batch_ms", 0), ("prefill_s", 1), ("hit_s", 2)]
    return [[None, *(f"{found[arm][key]:.{digits}f}" for key, digits in times)] for arm in ("clusterkv", "tier-int8")]
