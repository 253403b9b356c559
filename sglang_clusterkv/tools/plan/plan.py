"""What a server would have room for and how long a decode step would take, with and without clusterkv.

Sizes are those that the server comes to: the KV pool's row, and the index's by memory/device.py. Times are those of
kernels/step_time.py, each of a layer's attention: the least, by bytes and launches, and for the GPUs whose instructions are
counted what is likely; a step also reads the weights once. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import NamedTuple

import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.break_even import MODELLED
from sglang_clusterkv.kernels.step_model import StepShape, lists_of, sparse_launches
from sglang_clusterkv.kernels.step_time import dense_us, layer_time, least_us
from sglang_clusterkv.memory.device import metadata_bytes_per_token
from sglang_clusterkv.memory.fp8 import FP8
from sglang_clusterkv.memory.host import host_row_bytes
from sglang_clusterkv.serving.compat import (
    BACKEND,
    HOST_TIER_REFUSALS,
    MODEL_REFUSALS,
    RECALL_EXTEND_REFUSALS,
    TRACE_REFUSALS,
)
from sglang_clusterkv.tools.plan.checkpoint import Checkpoint, PlanError
from sglang_clusterkv.tools.plan.devices import REACHED

_FP8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}  # as SGLang and as torch name them
_MOST_RATIO = 8  # beyond it the clusters are most of what is left on the device (docs/memory.md)


class Wish(NamedTuple):
    """What is to be served, and on what.

    Attributes:
        context: tokens of each request.
        concurrency: requests at once.
        tp: GPUs that share a replica.
        page_size: tokens per page.
        memory_gb: of one GPU, for weights, KV cache and clusters.
        tbs: TB/s of its memory on the data sheet; None: no model of a step, as on a CPU.
        counted: the instructions of its generation are, so that a step's likely time is known too.
    """

    context: int
    concurrency: int
    tp: int
    page_size: int
    memory_gb: float
    tbs: float | None
    counted: bool = False

    @property
    def bytes_per_us(self) -> float:
        """Of the memory, as far as it is reached; with a model of a step."""
        assert self.tbs is not None
        return REACHED * self.tbs * 1e6


class Times(NamedTuple):
    """Milliseconds, by bytes and launches alone, and as is likely; None where that is not known."""

    least: float
    likely: float | None

    def plus(self, ms: float) -> Times:
        """Both later by as much."""
        return Times(self.least + ms, None if self.likely is None else self.likely + ms)


class Side(NamedTuple):
    """One way to serve it; bytes are those of one rank.

    Attributes:
        token_bytes: of keys and values, per token.
        index_bytes: of clusters, per token.
        pool_tokens: that fit.
        fits: requests of the wished length at once, if they share nothing.
        running: of the wished requests, those that decode at once; the others wait.
        attention: of a step of the running requests, all layers; None without a model of a step.
        step: likewise, the weights included.
    """

    token_bytes: int
    index_bytes: int
    pool_tokens: int
    fits: int
    running: int
    attention: Times | None
    step: Times | None

    @property
    def tokens_per_s(self) -> float | None:
        """Of all running requests together, at most."""
        return 1e3 * self.running / self.step.least if self.step else None

    @property
    def likely_tokens_per_s(self) -> float | None:
        """Of all running requests together, as is likely."""
        return 1e3 * self.running / self.step.likely if self.step and self.step.likely else None


class Plan(NamedTuple):
    """The answer.

    Attributes:
        dense: every step reads everything, by our own kernel for it.
        sparse: with clusterkv.
        weights_ms: to read a rank's weights once.
        pays_from: the shortest context, in tokens, at which a step of as many requests is likely faster, or where that is
            not known by bytes; None: none up to `context`.
        host_tier: advice, a sentence.
    """

    dense: Side
    sparse: Side
    weights_ms: float | None
    pays_from: int | None
    host_tier: str

    @property
    def speedup(self) -> float | None:
        """Tokens per second over the dense side's, by bytes."""
        return _ratio(self.sparse.tokens_per_s, self.dense.tokens_per_s)

    @property
    def likely_speedup(self) -> float | None:
        """Likewise, as is likely."""
        return _ratio(self.sparse.likely_tokens_per_s, self.dense.likely_tokens_per_s)


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine and theirs else None


def refusal(model: Checkpoint, config: ClusterKVConfig, tp: int, *, on_cpu: bool) -> str | None:
    """The sentence with which a start would end, as far as the model's configuration and ours tell it."""
    arguments = SimpleNamespace(is_embedding=False, device="cpu" if on_cpu else "cuda", tp_size=tp)
    rows = MODEL_REFUSALS + (TRACE_REFUSALS if config.trace else ())
    rows += RECALL_EXTEND_REFUSALS if config.recall_extend_tokens else ()
    for row in rows:
        if row.applies(arguments, model.facts):
            return f"--attention-backend {BACKEND} cannot serve this: {row.sentence}"
    if model.sliding_layers == model.layers:
        return f"--attention-backend {BACKEND} cannot serve this: all layers of this model have a sliding window"
    return None


def make_plan(model: Checkpoint, weights_gb: float, config: ClusterKVConfig, wish: Wish) -> Plan:
    """Sizes and times of both sides, and advice on a host tier.

    Args:
        model: of which a rank has a part.
        weights_gb: GB of all its weights.
        config: valid for the page size.
        wish: what is to be served.

    Raises:
        PlanError: the weights leave nothing for a KV cache, or heads cannot be split.
    """
    if model.heads % wish.tp:
        raise PlanError(f"--tp {wish.tp} does not divide the model's {model.heads} query heads: use another")
    free_bytes = (wish.memory_gb - weights_gb / wish.tp) * 1e9
    if free_bytes <= 0:
        raise PlanError(
            f"{weights_gb / wish.tp:.1f} GB of weights do not fit {wish.memory_gb:.1f} GB of memory: raise --tp or "
            "--memory-gb, or take a larger GPU"
        )
    kv_heads = max(1, model.kv_heads // wish.tp)
    token_bytes = model.layers * kv_heads * 2 * model.head_dim * model.item_bytes
    recalling = max(0, model.layers - model.sliding_layers - config.dense_layers)  # the others have no clusters
    index_bytes = metadata_bytes_per_token(
        config, page_size=wish.page_size, head_dim=model.head_dim, kv_heads=kv_heads, layers=recalling
    )
    read_ms = None
    if wish.tbs is not None:
        read_ms = (weights_gb * 1e9 - model.table_bytes) / wish.tp / wish.bytes_per_us / 1e3
    dense = _side(model, config, wish, free_bytes, token_bytes, 0, read_ms)
    sparse = _side(model, config, wish, free_bytes, token_bytes, index_bytes, read_ms)
    return Plan(
        dense,
        sparse,
        read_ms,
        _pays_from(model, config, wish) if wish.tbs is not None else None,
        _host_tier(model, config, wish, free_bytes, sparse),
    )


def _side(
    model: Checkpoint,
    config: ClusterKVConfig,
    wish: Wish,
    free_bytes: float,
    token_bytes: int,
    index_bytes: int,
    read_ms: float | None,
) -> Side:
    tokens = int(free_bytes // (token_bytes + index_bytes)) // wish.page_size * wish.page_size
    fits = tokens // wish.context
    running = min(fits, wish.concurrency)
    attention = step = None
    if wish.tbs is not None and read_ms is not None and running:
        attention = attention_times(model, config, wish, running, wish.context, is_dense=index_bytes == 0)
        step = attention.plus(read_ms)
    return Side(token_bytes, index_bytes, tokens, fits, running, attention, step)


def attention_times(
    model: Checkpoint, config: ClusterKVConfig, wish: Wish, batch: int, context: int, *, is_dense: bool
) -> Times:
    """Of the attention of one step, all layers of one rank; where a request recalls nothing it is the dense one."""
    shape = StepShape(
        layers=model.layers,
        heads=model.heads // wish.tp,
        kv_heads=max(1, model.kv_heads // wish.tp),
        head_dim=model.head_dim,
        batch=batch,
        context=context,
        item_bytes=model.item_bytes,
        page_size=wish.page_size,
    )
    dense_layers = model.layers - model.sliding_layers
    sparse_layers = 0
    if not is_dense and _recalls(shape, config):
        dense_layers = min(dense_layers, config.dense_layers)
        sparse_layers = model.layers - model.sliding_layers - dense_layers
    dense = dense_layers * dense_us(shape, wish.bytes_per_us)
    if model.sliding_layers:
        sliding = shape._replace(context=min(context, model.window))
        dense += model.sliding_layers * dense_us(sliding, wish.bytes_per_us)
    # A dense layer reads memory as fast as it can: the least is what is likely.
    sparse, likely = 0.0, 0.0 if wish.counted else None
    if sparse_layers:
        sparse = sparse_layers * least_us(sparse_launches(shape, config), wish.bytes_per_us)
        # Counted for the whole chain, over 16 bits per channel.
        is_known = wish.counted and config.refine and config.estimate and shape.item_bytes == 2
        likely = sparse_layers * layer_time(shape, config, wish.bytes_per_us).likely if is_known else None
    return Times((dense + sparse) / 1e3, None if likely is None else (dense + likely) / 1e3)


def _recalls(shape: StepShape, config: ClusterKVConfig) -> bool:
    """Whether a server's step of this shape is sparse; clusters/decoding.py decides by the same rules."""
    clustered = shape.context - lists_of(shape, config).base
    if clustered <= config.budget_tokens or shape.context < config.dense_below_tokens:
        return False
    covered_bytes = shape.pairs * clustered * 2 * shape.row_bytes
    return config.dense_below == "never" or config.host_ratio > 1 or MODELLED.pays(shape.pairs, covered_bytes)


def _pays_from(model: Checkpoint, config: ClusterKVConfig, wish: Wish) -> int | None:
    """The first of 1,024, 2,048, ... tokens at which a step of the wished requests is faster than a dense one; as is likely."""
    for context in range(1024, wish.context + 1, 1024):
        dense, sparse = (
            attention_times(model, config, wish, wish.concurrency, context, is_dense=is_dense)
            for is_dense in (True, False)
        )
        if (sparse.least if sparse.likely is None else sparse.likely) < dense.least:
            return context
    return None


def _host_tier(model: Checkpoint, config: ClusterKVConfig, wish: Wish, free_bytes: float, side: Side) -> str:
    """Whether a host tier would let all wished requests in, with which ratio and how much host memory."""
    if side.fits >= wish.concurrency:
        return "not needed: all requests fit the device"
    tokens = wish.concurrency * wish.context
    kv_heads = max(1, model.kv_heads // wish.tp)
    kv_dtype = getattr(torch, _FP8.get(model.dtype, model.dtype))
    if kv_dtype in FP8 and config.host_kv_dtype == "int8":
        return "refused: rows of an fp8 KV cache are shorter than int8 would make them: leave out host_kv_dtype"
    row_bytes = model.layers * kv_heads * host_row_bytes(model.head_dim, kv_dtype, config.host_kv_dtype)
    # On a CPU host rows lie in the same memory.
    left = free_bytes / tokens - side.index_bytes - (row_bytes if wish.tbs is None else 0)
    ratio = math.ceil(2 * side.token_bytes / left) / 2 if left > 0 else math.inf
    if ratio > _MOST_RATIO:
        return (
            f"none helps: {wish.concurrency} such requests would need host_ratio above {_MOST_RATIO} with "
            f"{config.host_kv_dtype} rows"
        )
    host_gb = wish.tp * tokens * row_bytes / 1e9
    said = (
        f"host_ratio {ratio:g} would let all {wish.concurrency} in, with {host_gb:.1f} GB of host memory for "
        f"{config.host_kv_dtype} rows"
    )
    arguments = SimpleNamespace(
        enable_hierarchical_cache=False, device="cpu" if wish.tbs is None else "cuda", chunked_prefill_size=None
    )
    refused = next((row.sentence for row in HOST_TIER_REFUSALS if row.applies(arguments, model.facts)), None)
    return f"{said}; refused today: {refused}" if refused else said
