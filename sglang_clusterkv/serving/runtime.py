"""The seams: SGLang's scheduler events, translated for the engine of this process.

scheduler_hooks.py hooks these into SGLang; each returns at once where no engine was made. One scheduler process has one engine.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from sglang.srt.runtime_context import get_parallel

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.extending import ExtendStep
from sglang_clusterkv.clusters.rows import Extend
from sglang_clusterkv.serving import trace
from sglang_clusterkv.serving.ranks import agreed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)

_engine: ClusterEngine | None = None
_step: DecodeStep | None = None  # made when a decode batch is launched, taken by its init_forward_metadata
_extend: ExtendStep | None = None  # likewise when a prefill batch is launched of which some recall
_inserted_until: int | None = None  # InsertResult.prefix_len of the first insert of the checkpoint under way
_in_checkpoint = False
_launched = False  # a forward, since the scheduler was idle


class _RowEvents:
    """The callbacks of ReqToTokenPool: how rows end.

    Args:
        engine: told of every row that is freed.
        capacity: tokens of the pool; SGLang schedules by it.
    """

    def __init__(self, engine: ClusterEngine, capacity: int) -> None:
        self._engine = engine
        self.dense_capacity = capacity

    def free(self, row: int) -> None:
        """A row was freed, whatever ended its request."""
        self._engine.row_freed(row)

    def clear(self) -> None:
        """All rows were freed."""
        self._engine.rows_cleared()

    def reset_allocator(self) -> None:
        """Nothing of ours is allocated by rows."""

    def alloc_to_lengths(self, *, req_pool_indices_cpu: torch.Tensor, target_seq_lens_cpu: torch.Tensor) -> None:
        """Nothing of ours is allocated by rows."""


def attach_engine(runner: ModelRunner) -> ClusterEngine | None:
    """The engine of the runner's pool, made on the first call; None for a pool that carries no index."""
    global _engine
    pool = runner.token_to_kv_pool
    index = getattr(pool, "cluster_index", None)
    if index is None:
        return None
    if pool.engine is None:
        rows = runner.req_to_token_pool
        layers = range(pool.start_layer, pool.start_layer + pool.layer_num)
        pool.engine = ClusterEngine(
            index,
            [pool.get_key_buffer(layer) for layer in layers],
            [pool.get_value_buffer(layer) for layer in layers],
            rows.req_to_token,
            pool.handed_out,
            group=runner.model_config.get_num_attention_heads(get_parallel().attn_tp_size) // index.geometry.kv_heads,
            tier=pool.tier,
        )
        rows.attach_aux_cache(_RowEvents(pool.engine, runner.max_total_num_tokens))
        _engine = pool.engine
        _announce(pool)
    return pool.engine


def _announce(pool: Any) -> None:
    """Lines at start: the resolved configuration, what the index costs beside the KV, and the sizes of a host tier."""
    index = pool.cluster_index
    geometry = index.geometry
    device = sum(pool.get_kv_size_bytes()) - index.bytes
    of_all = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * pool.dtype.itemsize  # bytes of a token's KV
    logger.info(
        "clusterkv: %s; the index takes %.1f MB, %.0f bytes per token, %.1f %% of the KV "
        "(clusters in %d of %d layers, %d kv heads, head_dim %d, page size %d)",
        msgspec.json.encode(index.config).decode(),
        index.bytes / 1e6,
        index.bytes / geometry.slots,
        100 * index.bytes / geometry.slots / of_all,
        len(geometry.clustered_layers),
        geometry.layers,
        geometry.kv_heads,
        geometry.head_dim,
        geometry.page_size,
    )
    if pool.tier is not None:
        directory = pool.tier.directory
        logger.info(
            "clusterkv: %d of %d tokens have room on the device (%.1f MB), all of them in the host tier (%.1f MB, %s, %.0f "
            "bytes per token); %d tokens of the device are kept free for the next forward",
            directory.device_pages * geometry.page_size,
            pool.size,
            device / 1e6,
            pool.tier.bytes / 1e6,
            index.config.host_kv_dtype,
            pool.tier.bytes / pool.size,
            directory.ring_pages * geometry.page_size,
        )


def before_forward(worker: Any, batch: ScheduleBatch | None, *args: Any, **kwargs: Any) -> None:
    """A real batch is launched; the current stream is the forward stream (BEFORE forward_batch_generation)."""
    global _step, _extend, _launched
    _step = _extend = None
    if _engine is None or batch is None or worker.is_draft_worker:
        return
    _launched = True
    _engine.stream.launched()
    worker.model_runner.token_to_kv_pool.wait_for_loads()
    if batch.forward_mode.is_decode():
        _step = agreed(_engine, _engine.begin_decode(batch.req_pool_indices_cpu.numpy(), batch.seq_lens_cpu.numpy()))
    elif batch.forward_mode.is_extend():
        trace.start(_engine, batch.reqs)
        _extend = _engine.begin_extend(
            [
                Extend(
                    row=req.kv.req_pool_idx,
                    rid=req.rid,
                    prefix_tokens=prefix,
                    end_tokens=req.extend_end,
                    prompt_len=len(req.full_untruncated_fill_ids),
                    last_chunk=req.extend_end == len(req.full_untruncated_fill_ids),
                )
                for req, prefix in zip(batch.reqs, batch.prefix_lens, strict=True)
            ]
        )


def idle() -> None:
    """The scheduler has nothing to do, as it says again and again: once after a forward, tell what the device noticed."""
    global _launched
    if _launched and _engine is not None:
        _engine.tell_violations()
    _launched = False


def engine() -> ClusterEngine | None:
    """The engine of this scheduler process, if the model's pool carries an index."""
    return _engine


def take_step() -> DecodeStep | None:
    """The lists of the decode batch just launched; None for a batch that did not come from the scheduler."""
    global _step
    step, _step = _step, None
    return step


def take_extend() -> ExtendStep | None:
    """The lists of the prefill batch just launched; None where none of it recalls."""
    global _extend
    step, _extend = _extend, None
    return step


def peek_step() -> DecodeStep | None:
    """The same, for who decides how it runs, before it is taken."""
    return _step


def around_checkpoint(original: Callable[..., Any], cache: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """A request is inserted into the radix tree (AROUND checkpoint_into_tree); its row may be rewritten."""
    global _in_checkpoint, _inserted_until
    if _engine is None:
        return original(cache, req, *args, **kwargs)
    protected = req.kv.cache_protected_len
    if "up_to" in kwargs:
        kwargs["up_to"] = max(protected, _engine.tokens_to_keep(req.kv.req_pool_idx, kwargs["up_to"]))
    _in_checkpoint, _inserted_until = True, None
    try:
        result = original(cache, req, *args, **kwargs)
    finally:
        _in_checkpoint = False
    # The tree already held [protected, inserted until): the row now names the tree's slots there.
    if req.kv.req_pool_idx is not None:
        _engine.row_rewritten(req.kv.req_pool_idx, protected, _inserted_until or 0)
    return result


def after_insert(result: Any, *args: Any, **kwargs: Any) -> None:
    """The tree tells how much of an insert it already had (AFTER insert)."""
    global _inserted_until
    if _in_checkpoint and _inserted_until is None:
        _inserted_until = result.prefix_len


def server_info() -> dict[str, object] | None:
    """Our part of /server_info."""
    if _engine is None:
        return None
    layers = {"clustered_layers": list(_engine.index.geometry.clustered_layers)}
    return {"config": msgspec.to_builtins(_engine.config)} | _engine.server_info() | layers | trace.held()
