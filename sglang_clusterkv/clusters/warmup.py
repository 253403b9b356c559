"""Compile the CPU kernels at start instead of in somebody's first request."""

from __future__ import annotations

import logging
import time

import msgspec
import numpy as np
import torch

from sglang_clusterkv.clusters.engine import ClusterEngine, Extend
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.clusters.index import ClusterIndex
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import dense_decode
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.kernels.extend.cpu import extend
from sglang_clusterkv.memory.device import Geometry

logger = logging.getLogger(__name__)

_SLOW_S = 5.0


def compile_cpu_kernels(
    config: ClusterKVConfig, *, page_size: int, kv_heads: int, group: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Run prefill, clustering, sparse and dense decode once on a small pool of the same types.

    numba keeps what it compiles on disk, so this takes half a minute once and a second later on.

    Args:
        config: the resolved configuration; what depends on it is compiled for it.
        page_size: tokens per page.
        kv_heads: of this rank.
        group: query heads per kv head.
        head_dim: channels of a head.
        dtype: of the KV pool.
    """
    begin = time.perf_counter()
    # Sizes do not matter to what is compiled, so they are small; nothing may go the dense way.
    config = msgspec.structs.replace(
        config,
        dense_below_tokens=0,
        budget_tokens=min(config.budget_tokens, 64),
        candidate_tokens=min(config.candidate_tokens, 128),
    )
    tokens = config.sink_tokens + config.budget_tokens + 2 * config.segment_tokens + config.window_tokens
    pages = -(-tokens // page_size) + 1
    engine = ClusterEngine(
        ClusterIndex(config, Geometry(1, kv_heads, head_dim, page_size, pages + 1), "cpu"),
        [torch.randn((pages + 1) * page_size, kv_heads, head_dim).to(dtype)],
        [torch.randn((pages + 1) * page_size, kv_heads, head_dim).to(dtype)],
        torch.arange(page_size, (pages + 1) * page_size, dtype=torch.int32).repeat(2, 1),
        HandedOut(),
    )
    engine.begin_extend([Extend(1, "warm-up", 0, tokens, tokens, last_chunk=True)])
    step = engine.begin_decode(np.array([1]), np.array([tokens + 1]))
    keys, values = engine.key_buffers[0], engine.value_buffers[0]
    q = torch.randn(1, kv_heads * group, head_dim).to(dtype)
    assert step.sparse is not None, f"the warm-up's {tokens} tokens were decoded densely"
    sparse_decode(q, keys, values, engine.index, 0, step.sparse, 1.0)
    slots = engine.req_to_token[1, : tokens + 1].long()
    dense_decode(q, keys, values, slots.unsqueeze(0), torch.tensor([tokens + 1]), 1.0)
    extend(q, keys, values, slots, 1.0)
    took_s = time.perf_counter() - begin
    if took_s > _SLOW_S:
        logger.info("clusterkv: compiled the CPU kernels in %.0f s; they are kept for the next start", took_s)
