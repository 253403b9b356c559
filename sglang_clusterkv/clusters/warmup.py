"""Compile the kernels at start instead of in somebody's first request."""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec
import numpy as np
import torch

from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.clusters.rows import Extend
from sglang_clusterkv.clusters.trace import Trace, document
from sglang_clusterkv.config import MIN_SEGMENT_PAGES, ClusterKVConfig
from sglang_clusterkv.kernels.attend import dense_decode
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.kernels.extend.cpu import extend
from sglang_clusterkv.kernels.grids import batch_of_large_tiles
from sglang_clusterkv.kernels.tier import fetch, store
from sglang_clusterkv.memory.device import Geometry, index_pages
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep
from sglang_clusterkv.memory.tier import Tier

logger = logging.getLogger(__name__)

_SLOW_S = 5.0
_SEGMENT_CLUSTERS = 128  # of the segments here: requests of every size can be put together from them


def compile_kernels(
    config: ClusterKVConfig,
    device: str,
    *,
    page_size: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    context_tokens: int,
    query_dtype: torch.dtype | None = None,
    host_dtype: str | None = None,
    sinks: bool = False,
) -> None:
    """Run prefill, clustering, sparse and dense decode on a small pool of the same types, at every size that is compiled for.

    numba and Triton keep what they compile on disk, so this takes half a minute once and a second later on.

    Args:
        config: the resolved configuration; what depends on it is compiled for it.
        device: type of the KV pool's device.
        page_size: tokens per page.
        kv_heads: of this rank.
        group: query heads per kv head.
        head_dim: channels of a head.
        dtype: of the KV pool.
        context_tokens: the longest request.
        query_dtype: of the model; None: the pool's.
        host_dtype: of a host tier's rows; None: there is no tier.
        sinks: whether layers have learned attention sinks.
    """
    logger.info(
        "clusterkv: runs each kernel once, so that no request waits for its compilation: a minute at the first start"
    )
    begin = time.perf_counter()
    by_size = _compiles_by_size(device)
    least = MIN_SEGMENT_PAGES + (not by_size)  # on a CPU one whose values move
    segment_tokens = max(least, _SEGMENT_CLUSTERS * config.tokens_per_cluster // page_size) * page_size
    config = msgspec.structs.replace(
        config,
        dense_below_tokens=0,  # nothing may go the dense way
        dense_below="never",
        sink_tokens=page_size,
        window_tokens=min(config.window_tokens, 4 * page_size),
        segment_tokens=min(config.segment_tokens, segment_tokens),
        recluster_every=min(config.recluster_every, segment_tokens),
    )
    if not by_size:
        config = msgspec.structs.replace(
            config, budget_tokens=min(config.budget_tokens, 64), candidate_tokens=min(config.candidate_tokens, 128)
        )
    tokens = config.sink_tokens + config.budget_tokens + 2 * config.segment_tokens + config.window_tokens
    pages = index_pages(-(-tokens // page_size) + 2)
    shape = (pages * page_size, kv_heads, head_dim)
    keys, values = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    tier = None if host_dtype is None else _all_on_the_host(keys, values, page_size, host_dtype)
    engine = ClusterEngine(
        ClusterIndex(config, Geometry(1, kv_heads, head_dim, page_size, pages), device),
        [keys],
        [values],
        torch.arange(page_size, pages * page_size, dtype=torch.int32, device=device).repeat(2, 1),
        HandedOut(),
        tier=tier,
    )
    trace = Trace(1)
    engine.tracing.start(1, trace)
    engine.begin_extend([Extend(1, "warm-up", 0, tokens, tokens, last_chunk=True)])
    engine.records.rows[1].announced = True  # it is nobody's request
    step = engine.begin_decode(np.array([1]), np.array([tokens + 1]))
    more: dict[str, Any] = {} if tier is None else {"tier": tier.layer(0)}
    if sinks:
        more["sinks"] = torch.zeros(
            kv_heads * group, dtype=torch.bfloat16, device=device
        )  # as SGLang's models have them
    # As models hand them on: cut from one product with keys and values.
    product = torch.randn(1, kv_heads * (group + 2) * head_dim, device=device).to(query_dtype or dtype)
    q = product[:, : kv_heads * group * head_dim].unflatten(1, (-1, head_dim))
    assert step.sparse is not None, f"the warm-up's {tokens} tokens were decoded densely"
    steps = [step.sparse]
    if by_size:
        per_segment = config.segment_tokens // config.tokens_per_cluster
        counts = _segment_counts(per_segment, context_tokens // config.tokens_per_cluster)
        steps += [_repeated(step.sparse, count, config.segment_tokens // page_size) for count in counts]
        limit = config.candidate_tokens if config.refine else config.budget_tokens
        steps.append(_many(step.sparse, batch_of_large_tiles(kv_heads, limit)))
    decode = engine.tracing.around(sparse_decode)
    for sparse in steps:
        decode(q.expand(sparse.batch, -1, -1), keys, values, engine.index, 0, sparse, 1.0, **more)
    engine.tracing.collect(trace, tokens + 1)
    if config.trace:
        _put_together(engine, trace, tokens)
    slots = engine.req_to_token[1, : tokens + 1].long()
    dense_decode(q, keys, values, slots.unsqueeze(0), torch.tensor([tokens + 1], device=device), 1.0, **more)
    if device == "cpu":  # elsewhere SGLang's own backend prefills
        extend(q, keys, values, slots, 1.0, **more)
    took_s = time.perf_counter() - begin
    if took_s > _SLOW_S:
        logger.info("clusterkv: compiled the kernels in %.0f s; they are kept for the next start", took_s)


def _put_together(engine: ClusterEngine, trace: Trace, tokens: int) -> None:
    """The document of a trace, as for an answer of one token."""
    document(
        trace,
        prompt=[0] * tokens,
        answer=[0, 0],
        server={},
        request={},
        step_bytes=lambda *_: (0, 0),
        row_of=engine.index.row_of,
        encode=lambda _: "",
    )


def _all_on_the_host(keys: torch.Tensor, values: torch.Tensor, page_size: int, host_dtype: str) -> Tier:
    """A tier over one layer's buffers, of which every page is read from the host."""
    pages = len(keys) // page_size
    tier = Tier([keys], [values], page_size=page_size, pages=pages, ring_pages=1, host_dtype=host_dtype)
    every = torch.arange(pages, device=keys.device)
    store(tier, every, every)
    fetch(tier, every, every)
    return tier


def _compiles_by_size(device: str) -> bool:
    """Whether kernels know the budget, and the clusters of a request up to a power of two: Triton's do, numba's do not."""
    return device != "cpu"


def _segment_counts(per_segment: int, most: int) -> list[int]:
    """Segments of a request, with the least and the most clusters of every power of two.

    Args:
        per_segment: clusters of a segment.
        most: clusters of the longest request.
    """
    counts, power = {1}, 1
    while power < most:  # those with more than `power` clusters and at most twice as many
        counts |= {power // per_segment + 1, 2 * power // per_segment}
        power *= 2
    return sorted(count for count in counts if count)


def _repeated(step: SparseStep, segments: int, pages: int) -> SparseStep:
    """A step of one request with so many recallable segments, each the first one of `step`, which has so many pages."""
    segment = torch.arange(segments, device=step.pages.device)
    return step._replace(
        pages=step.pages[:, :pages].repeat(1, segments),
        page_count=torch.full_like(step.page_count, segments * pages),
        segment_of_page=segment.repeat_interleave(pages).unsqueeze(0),
        segment_begin=segment.mul(pages).unsqueeze(0),
        segment_count=torch.full_like(step.segment_count, segments),
        recallable_tokens=step.recallable_tokens // step.pages.shape[1] * pages * segments,
        offset=None,
    )


def _many(step: SparseStep, batch: int) -> SparseStep:
    """A step of so many requests, each that of `step`."""
    lists: dict[str, Any] = {
        name: value.repeat(batch, *(1,) * (value.dim() - 1))
        for name, value in step._asdict().items()
        if isinstance(value, torch.Tensor)
    }
    lengths = None if step.lengths is None else step.lengths.repeat(batch, 0)
    return step._replace(**lists | {"offset": None}, batch=batch, lengths=lengths)
