"""One layer of one decode step, for the requests that attend sparsely: the chain of operations, chosen by device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.decode import reference

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.trace.last import LastRead
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import ListShape, SparseStep
    from sglang_clusterkv.memory.tier import TierLayer


def prepare(index: ClusterIndex, group: int, dtype: torch.dtype, step: SparseStep) -> None:
    """Take the memory that `sparse_decode` will need for a step, so that whoever runs short of it does so before any layer.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        dtype: of the KV pool.
        step: the lists of the step.

    Raises torch.OutOfMemoryError or MemoryError; the same index may then prepare a smaller step.
    """
    device = torch.device(index.device).type
    if device == "cuda":
        from sglang_clusterkv.kernels.decode import triton

        decoder = triton.decoder_of(index, group)
        decoder.use_engine(dtype)
        decoder.prepare(step)
    elif device == "cpu":
        from sglang_clusterkv.kernels.decode import cpu

        cpu.prepare(index, group, dtype, step)


def reserve(index: ClusterIndex, group: int, dtype: torch.dtype, room: ListShape) -> int:
    """Make the memory of captured steps on a GPU, which no later step moves; returns its bytes.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        dtype: of the KV pool.
        room: of the lists of these steps.

    Raises torch.OutOfMemoryError.
    """
    from sglang_clusterkv.kernels.decode import triton

    decoder = triton.decoder_of(index, group)
    decoder.use_engine(dtype)
    return decoder.reserve(room)


def capture(index: ClusterIndex, group: int, lists: SparseStep) -> None:
    """Before a step over these lists is captured on a GPU: whatever a capture cannot hold, and its layers need.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        lists: of captured steps with so many requests; others read the same memory.
    """
    if torch.device(index.device).type == "cuda":
        from sglang_clusterkv.kernels.decode import triton

        triton.decoder_of(index, group).capture(lists)


def replay(index: ClusterIndex, group: int, batch: int) -> None:
    """Before the captured step of `batch` requests is replayed over the lists of the step that was prepared last.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        batch: requests, padding included.
    """
    if torch.device(index.device).type == "cuda":
        from sglang_clusterkv.kernels.decode import triton

        triton.decoder_of(index, group).replay(batch)


def sparse_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one layer over sinks, window, recalled tokens and the estimate of the rest.

    Args:
        q: [B, heads, D], any float dtype.
        keys: [slots, kv_heads, D], the layer's pool.
        values: likewise.
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
        scale: of the logits.
        tier: where some slots' keys and values are on the host.
        sinks: [heads], a learned logit of each query head that has no token; None: there are none.

    Returns:
        [B, heads, D] in q's dtype.
    """
    if q.device.type == "cpu":
        from sglang_clusterkv.kernels.decode import cpu

        return cpu.sparse_decode(q, keys, values, index, layer, step, scale, tier, sinks)
    if q.device.type == "cuda":
        from sglang_clusterkv.kernels.decode import triton

        return triton.sparse_decode(q, keys, values, index, layer, step, scale, tier, sinks)
    return reference.sparse_decode(q, keys, values, index, layer, step, scale, tier, sinks)


def last_read(index: ClusterIndex, group: int, dtype: torch.dtype, place: int) -> LastRead:
    """What the last `sparse_decode` read for the request at `place` of its lists; nothing waits for the device.

    Args:
        index: that it read.
        group: query heads per kv head.
        dtype: of the KV pool; on a CPU a type with kernels (`row_cpu.POOL_FORMATS`), for references keep nothing.
        place: of the request in the lists.
    """
    if torch.device(index.device).type == "cuda":
        from sglang_clusterkv.kernels.decode import triton

        return triton.last_read(triton.decoder_of(index, group), place)
    from sglang_clusterkv.kernels.decode import cpu

    return cpu.last_read(cpu.decoder_of(index, group, dtype), place)
