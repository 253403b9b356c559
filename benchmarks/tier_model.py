"""The model of a decode step with a tier of host memory: tokens/s by batch and context, and where a recall cache is a must.

    python -m benchmarks.tier_model [--recency RESULT.json] [--host-ratio 4] [--host-kv-dtype int8]

A step reads the weights, and in every layer what kernels/step_model.py counts; recalled rows that are not on the device come
over the bus instead, whose time is added, because which rows they are follows from the layer's own query. How many they are is
measured: `--recency` names a result of benchmarks.quality.recency. A tier is compared with requests that wait: as many as fit
the device decode at a time. Nothing here was measured on a GPU. Not in it: prefill, and the stores of new pages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import BUSES_GBS, Launch, StepShape, lists_of, sparse_launches
from sglang_clusterkv.memory.device import metadata_bytes_per_token


class Model(NamedTuple):
    """A model and what of a GPU it has. The defaults are an 8B Llama on an H200."""

    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    weights_gb: float = 16.1
    read_gb: float = 15.0  # of the weights, by one step: not the table of embeddings
    memory_gb: float = 132.0  # for weights, KV and index: SGLang leaves some 12 % of 150 to other things
    tbs: float = 4.3  # of its memory, as copies reach it

    @property
    def kv_bytes(self) -> int:
        """Of a token in the pool, all layers and heads."""
        shape = self.shape(1, 1)
        return shape.layers * shape.kv_heads * 2 * shape.row_bytes

    def shape(self, batch: int, context: int) -> StepShape:
        """A batch of it."""
        return StepShape(self.layers, self.heads, self.kv_heads, self.head_dim, batch, context)


class Hits(NamedTuple):
    """Which share of the recalled rows the device has, of one kind of decoding, by the share of the pages that it has.

    Attributes:
        kind: of decoding.
        pages: context pages over those on the device, the newest -> share of the rows in them.
        cache: likewise, in them or in a cache of `CACHED_BUDGETS` budgets of rows.
    """

    kind: str
    pages: dict[float, float]
    cache: dict[float, float]


class Tier(NamedTuple):
    """A tier of host memory.

    Attributes:
        ratio: tokens in the KV cache over those with room on the device; 1: there is none.
        host_dtype: of the host's rows, "auto" or "int8".
        is_cached: rows that are not on the device are kept in a cache, for each running request, layer and kv head.
    """

    ratio: float = 1.0
    host_dtype: str = "auto"
    is_cached: bool = False


CACHED_BUDGETS = 2  # of rows in such a cache
# (requests, tokens of each): as many as fit an H200 and more.
CELLS = ((32, 32_768), (64, 32_768), (8, 131_072), (16, 131_072))


def hit_rate(shares: dict[float, float], ratio: float) -> float:
    """Share of the rows at a ratio between those that were measured: linear in its logarithm, 1 where all pages are there."""
    known = {1.0: 1.0} | shares
    ratios = sorted(known)
    return float(np.interp(np.log2(max(1.0, ratio)), np.log2(ratios), [known[at] for at in ratios]))


def host_row_bytes(shape: StepShape, host_dtype: str) -> int:
    """Key and value of a token and kv head on the host: the pool's, or 8 bits a channel and two scales."""
    return 2 * shape.head_dim + 8 if host_dtype == "int8" else 2 * shape.row_bytes


def tier_launches(shape: StepShape, config: ClusterKVConfig, host_dtype: str, hit: float) -> list[Launch]:
    """As `sparse_launches`; the rows that the device does not have, 1 - hit of them, are read from the host."""
    found = []
    for launch in sparse_launches(shape, config, joined=False):
        if launch.name == "attend":
            missed = round(shape.pairs * lists_of(shape, config).recalled * (1 - hit))
            launch = launch._replace(
                bytes=launch.bytes - missed * 2 * shape.row_bytes, bus_bytes=missed * host_row_bytes(shape, host_dtype)
            )
        found.append(launch)
    return found


def capacity_tokens(model: Model, config: ClusterKVConfig, ratio: float) -> float:
    """Tokens of all requests: a part of their KV and the index of all take the device's memory."""
    shape = model.shape(1, 1)
    index = metadata_bytes_per_token(
        config, page_size=shape.page_size, head_dim=shape.head_dim, kv_heads=shape.kv_heads, layers=shape.layers
    )
    return (model.memory_gb - model.weights_gb) * 1e9 / (model.kv_bytes / ratio + index)


def tokens_per_s(
    model: Model, shape: StepShape, config: ClusterKVConfig, host_dtype: str, hit: float, bus: float
) -> float:
    """Of the whole batch: a step reads the weights once, and then layer after layer."""
    layer_us = sum(launch.microseconds(model.tbs, bus) for launch in tier_launches(shape, config, host_dtype, hit))
    return 1e3 * shape.batch / (model.read_gb / model.tbs + shape.layers * layer_us / 1e3)


def tier_speed(
    model: Model, shape: StepShape, config: ClusterKVConfig, tier: Tier, hits: Hits, bus: float
) -> float | None:
    """Tokens/s of a batch with a tier, every request with the same part of its pages on the device; None: it does not fit."""
    capacity = capacity_tokens(model, config, tier.ratio)
    tokens = shape.batch * shape.context
    rows = shape.batch * CACHED_BUDGETS * config.budget_tokens if tier.is_cached else 0
    on_device = capacity / tier.ratio - rows
    if tokens > capacity or on_device < shape.batch * lists_of(shape, config).base:
        return None
    hit = hit_rate(hits.cache if tier.is_cached else hits.pages, tokens / on_device)
    return tokens_per_s(model, shape, config, tier.host_dtype, hit, bus)


def waiting_speed(model: Model, shape: StepShape, config: ClusterKVConfig) -> float:
    """Tokens/s without a tier: as many requests as fit decode at a time, and the others wait. 0 where not one fits."""
    fitting = int(capacity_tokens(model, config, 1.0) // shape.context)
    running = shape._replace(batch=min(shape.batch, fitting))
    return tokens_per_s(model, running, config, "auto", 1.0, BUSES_GBS[0]) if fitting else 0.0


def cache_word(waiting: float, pages: float | None, cached: float | None) -> str:
    """Is a cache of rows needed, for a tier to be as fast as requests that wait? Tokens/s of both, and by pages alone."""
    if pages is None:
        return "does not fit"
    if pages >= waiting:
        return "no"
    if cached is None:
        return "does not fit"
    return "must" if cached >= waiting else "not enough"


def tier_table(
    hits: Sequence[Hits],
    model: Model,
    config: ClusterKVConfig,
    ratio: float = 4.0,
    host_dtype: str = "int8",
    buses_gbs: Sequence[float] = BUSES_GBS,
) -> list[list[str]]:
    """Rows of text: kind, batch, context, tokens/s waiting, and for each bus those by pages, with a cache, is it a must."""
    rows = []
    for of_kind in hits:
        for batch, context in CELLS:
            shape = model.shape(batch, context)
            waiting = waiting_speed(model, shape, config)
            row = [of_kind.kind, f"{batch}", f"{context:,}", f"{waiting:,.0f}"]
            for bus in buses_gbs:
                tiers = Tier(ratio, host_dtype), Tier(ratio, host_dtype, is_cached=True)
                pages, cached = (tier_speed(model, shape, config, tier, of_kind, bus) for tier in tiers)
                row += [f"{speed:,.0f}" if speed else "-" for speed in (pages, cached)]
                row.append(cache_word(waiting, pages, cached))
            rows.append(row)
    return rows


def hits_in(recency: dict[str, Any], budget: int) -> list[Hits]:
    """Of each kind in the results of benchmarks.quality.recency at a budget."""
    found = []
    for entry in recency.values():
        if entry["budget"] == budget:
            shares = {name: share["all"] for name, share in entry["shares"].items() if isinstance(share, dict)}
            pages = {float(ratio): shares[f"newest_{ratio}"] for ratio in (2, 4, 8)}
            cache = {float(ratio): shares[f"newest_{ratio}_or_lru_{CACHED_BUDGETS}"] for ratio in (4, 8)}
            found.append(Hits(entry["kind"], pages, cache))
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recency", type=Path, help="a result; without it hit rates are as if pages were read alike")
    parser.add_argument("--host-ratio", type=float, default=4.0)
    parser.add_argument("--host-kv-dtype", choices=["auto", "int8"], default="int8")
    args = parser.parse_args()
    config = ClusterKVConfig()
    hits = [Hits("all alike", {2.0: 0.5, 4.0: 0.25, 8.0: 0.125}, {2.0: 0.5, 4.0: 0.25, 8.0: 0.125})]
    if args.recency:
        hits = hits_in(json.loads(args.recency.read_text(encoding="utf-8"))["results"], config.budget_tokens)
    columns = ["decoding", "batch", "context", "waiting"]
    for bus in BUSES_GBS:
        columns += [f"{bus:g} GB/s: pages", "and cache", "a must"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    rows = tier_table(hits, Model(), config, args.host_ratio, args.host_kv_dtype)
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    main()
