"""The attention backend: phases only. Prefill is dense and exact; decode goes through the engine's lists."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.extending import ExtendStep
from sglang_clusterkv.clusters.rows import DenseReason
from sglang_clusterkv.clusters.warmup import compile_kernels
from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.kernels.attend import dense_decode
from sglang_clusterkv.kernels.extend.cpu import extend_all
from sglang_clusterkv.kernels.extend.lists import ExtendLists, extend_lists
from sglang_clusterkv.kernels.threads_cpu import set_threads
from sglang_clusterkv.memory.fp8 import FP8
from sglang_clusterkv.memory.step import DenseStep, dense_step
from sglang_clusterkv.serving import graphs, host_tier, layers, prefill_backend, runtime, tier_prefill, trace
from sglang_clusterkv.serving.active import active_config, ranks
from sglang_clusterkv.serving.model_facts import shares_kv
from sglang_clusterkv.serving.platform import prefill_threads

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_clusterkv.memory.tier import TierLayer

logger = logging.getLogger(__name__)

_MANY_TOKENS = 2  # new tokens of a batch from which its products gain from more threads
_OTHER = "use another --attention-backend"


def create_backend(runner: ModelRunner) -> AttentionBackend:
    """The backend for a model runner; called by SGLang's registry.

    Raises:
        ConfigError: the KV cache's type, known only now (a checkpoint may choose it), cannot be clustered; an attention
            layer of the model asks for what is not served; or none of them can recall.
    """
    dtype = runner.token_to_kv_pool.dtype
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, *FP8):
        raise ConfigError(
            f"the KV cache is {dtype}, which clusterkv does not cluster yet: start with --kv-cache-dtype bf16"
        )
    config = active_config()
    if dtype in FP8 and host_tier.is_on(config) and config is not None and config.host_kv_dtype == "int8":
        raise ConfigError("rows of an fp8 KV cache are shorter than int8 would make them: leave out host_kv_dtype")
    if trace.is_on() and dtype is torch.float16 and torch.device(runner.device).type == "cpu":
        raise ConfigError(
            "on a CPU no traces are kept of a KV cache in float16: use --dtype float32, or leave out trace"
        )
    if unserved := layers.unserved(runner.model):
        raise ConfigError(f"this model has {unserved}, which clusterkv does not serve: {_OTHER}")
    backend = ClusterKVAttnBackend(runner)
    if backend.engine is not None and (reasons := backend.reasons_of_all(runner.model)):
        raise ConfigError(
            f"every layer of this model decodes densely ({', '.join(sorted(reasons))}), so nothing would be recalled: {_OTHER}"
        )
    if backend.engine is not None and backend.engine.tier is not None and (layer := layers.capped(runner.model)):
        raise ConfigError(
            f"{layer} caps its attention logits and decodes densely, which a host tier would make it do from host memory in "
            "every step: set host_ratio to 1"
        )
    return backend


class ClusterKVAttnBackend(graphs.DecodeGraphs, prefill_backend.PrefillFacts, AttentionBackend):
    """SGLang's side of ClusterKV.

    Prefill runs on SGLang's own backend of the platform, and so do decode steps without a sparse request and layers that never
    recall; on the CPU, and in decode steps over a host tier, all of these on ours. A pool without a cluster index (SGLang's
    attention unit kit brings one) is served densely throughout.
    """

    _prefill_decodes = False

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.engine = runtime.attach_engine(runner)
        self.first_layer = getattr(self.token_to_kv_pool, "start_layer", 0) or 0
        on_cpu = torch.device(runner.device).type == "cpu"
        self.prefill = None if on_cpu else prefill_backend.create(runner, active_config())
        # SGLang's backend knows nothing of a host tier; ours on the CPU does.
        self._tier_prefill = None if self.prefill is None else tier_prefill.of(runner, self.prefill)
        self._prefill_decodes = self.prefill is not None and self._tier_prefill is None
        self.calls_prefill = False
        self._threads = torch.get_num_threads()
        self._prefill_threads = prefill_threads(len(os.sched_getaffinity(0)), ranks(), self._threads)
        if self.prefill is None:
            set_threads(self._prefill_threads)  # of our own kernels, in every step
        if self.engine is not None:
            _warm_up(runner, self.engine)
            dense = map(self._dense_layer, layers.attention_layers(runner.model))
            self.calls_prefill = shares_kv(runner.model_config.hf_text_config) or any(dense)
            self._longest = min(runner.model_config.context_len, self.engine.index.geometry.slots)
        self._step: DecodeStep | None = None
        self._all_dense: DenseStep | None = None
        self._extend_slots: list[torch.Tensor] = []
        self._extend_lists: dict[tuple[bool, ...], ExtendLists] = {}
        self._extend: ExtendStep | None = None
        self._said: set[DenseReason] = set()

    def support_triton(self) -> bool:
        """Whether SGLang may run its Triton helpers for us."""
        return self.prefill is not None

    # -- per forward ----------------------------------------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Take the lists of the step, or those of the prefill."""
        self._all_dense, self._in_capture, self._prefill_ready = None, False, False
        if self._tier_prefill is not None:
            self._tier_prefill.forward()
        if self.prefill is None and self._prefill_threads != self._threads:
            many = forward_batch.forward_mode.is_extend() and sum(forward_batch.extend_seq_lens_cpu) >= _MANY_TOKENS
            torch.set_num_threads(self._prefill_threads if many else self._threads)
        if forward_batch.forward_mode.is_decode_or_idle():
            self._step = runtime.take_step()
            if self._prefill_decodes:
                self._step = self._step or graphs.NO_LISTS
            elif self._step is None and forward_batch.batch_size:
                # Warm-up and unit kits: no plan, so dense, and lengths that only the device knows.
                rows, seq_lens = forward_batch.req_pool_indices.cpu().numpy(), forward_batch.seq_lens.cpu().numpy()
                dense = dense_step(rows, seq_lens, self.req_to_token_pool.req_to_token)
                self._step = _all_dense(rows, seq_lens, dense)
        elif self.prefill is not None:
            with self._tier_prefill.reads(forward_batch) if self._tier_prefill is not None else nullcontext():
                self.prefill.init_forward_metadata(forward_batch)
        else:
            self._extend, self._extend_lists = runtime.take_extend(), {}
            table = self.req_to_token_pool.req_to_token
            lengths = forward_batch.extend_prefix_lens + forward_batch.extend_seq_lens
            self._extend_slots = [
                table[row, :length].long()
                for row, length in zip(forward_batch.req_pool_indices.tolist(), lengths.tolist(), strict=True)
            ]

    def _dense_of_all(self, step: DecodeStep) -> DenseStep:
        """Every token of every request of the batch, for layers that go the dense way; made once per step."""
        if self._all_dense is None:
            self._all_dense = dense_step(step.rows, step.seq_lens, self.req_to_token_pool.req_to_token)
        return self._all_dense

    # -- per layer ------------------------------------------------------------------------------------------------

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of new tokens over their prefix and themselves, [tokens, heads * D]: dense where they do not recall."""
        _refuse_more(kwargs)
        if self.prefill is not None:
            with self._tier_prefill.layer(layer.layer_id) if self._tier_prefill is not None else nullcontext():
                more = {} if sinks is None else {"sinks": sinks}
                return self.prefill.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **more)
        self._write(k, v, layer, forward_batch, save_kv_cache)
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        rows = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        scale, of_values = layers.scales(layer, keys.dtype)
        output, recalls = self._recall(rows, keys, values, layer, k is None, scale, sinks)
        if not all(recalls):
            lists = self._dense_lists(recalls, forward_batch)
            extend_all(
                rows, keys, values, lists, scale, sliding_window=layer.sliding_window_size, logit_cap=layer.logit_cap,
                tier=self._tier(layer), sinks=sinks, output=output,
            )  # fmt: skip
        return layers.times(output, of_values).flatten(1)

    def _dense_lists(self, recalls: Sequence[bool], forward_batch: ForwardBatch) -> ExtendLists:
        """Of the requests of a prefill that do not recall in a layer; made once for all layers in which these are the same."""
        key = tuple(recalls)
        if key not in self._extend_lists:
            new = list(map(int, forward_batch.extend_seq_lens_cpu))
            self._extend_lists[key] = extend_lists(self._extend_slots, new, [not recalled for recalled in recalls])
        return self._extend_lists[key]

    def _recall(
        self,
        rows: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        shares: bool,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Sequence[bool]]:
        """Output of a prefill's layer [tokens, heads, D], with the lines of requests that recall, and which of them do."""
        none = [False] * len(self._extend_slots)
        if self._extend is None or shares or self._dense_layer(layer) is not None:
            return torch.empty_like(rows), none
        assert self.engine is not None
        local = layer.layer_id - self.first_layer
        output = self.engine.sparse_layer(rows, keys, values, local, self._extend, scale, sinks)
        if output is not None:
            return output, self._extend.recalls.tolist()
        self._extend = None  # our own code failed: all attend to everything from this layer on
        return torch.empty_like(rows), none

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One query per request over its step's lists, [B, heads * D]."""
        _refuse_more(kwargs)
        if not self._prefill_decodes:
            self._write(k, v, layer, forward_batch, save_kv_cache)
        step = self._step
        assert step is not None, "decode without init_forward_metadata"
        reason = self._dense_layer(layer) or (DenseReason.SHARED_KV if k is None else None)
        if self._prefill_decodes:
            if reason is not None or step.sparse is None:
                output = self._decode_by_prefill(q, k, v, layer, forward_batch, save_kv_cache, sinks)
                self._count(reason, step, layer)
                return output
            self._write(k, v, layer, forward_batch, save_kv_cache)
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        rows = q.reshape(-1, layer.tp_q_head_num, layer.head_dim)
        if reason is None and step.sparse is not None:
            assert self.engine is not None
            local = layer.layer_id - self.first_layer
            scale, of_values = layers.scales(layer, keys.dtype)
            if self._in_capture:  # a fault ends the capture
                more = {} if sinks is None else {"sinks": sinks}
                index, lists = self.engine.index, step.sparse
                output = self.engine.sparse_decode(rows, keys, values, index, local, lists, scale, **more)
                return layers.times(output, of_values).flatten(1)
            mixed = self.engine.sparse_layer(rows, keys, values, local, step, scale, sinks)
            if mixed is not None:
                mixed = layers.times(mixed, of_values)
                if step.dense is not None:
                    assert step.dense_at is not None
                    mixed[step.dense_at] = self._dense(rows[step.dense_at], keys, values, layer, step.dense, sinks)
                return mixed.flatten(1)
            # Our own code failed: all requests attend to everything from this layer on.
            if self._prefill_decodes:
                self._step = step._replace(sparse=None)
                return self._decode_by_prefill(q, k, v, layer, forward_batch, False, sinks)
            step = self._step = _all_dense(step.rows, step.seq_lens, self._dense_of_all(step))
        dense = self._dense_of_all(step) if step.sparse is not None or step.dense is None else step.dense
        output = self._dense(rows, keys, values, layer, dense, sinks).flatten(1)
        self._count(reason, step, layer)
        return output

    def _decode_by_prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Dense attention of all requests, by the backend that prefills."""
        assert self.prefill is not None
        if not self._prefill_ready:
            if self._in_capture:
                raise RuntimeError(f"layer {layer.layer_id} attends densely, which its model did not say")
            self.prefill.init_forward_metadata(forward_batch)
            self._prefill_ready = True
        more = {} if sinks is None else {"sinks": sinks}
        return self.prefill.forward_decode(q, k, v, layer, forward_batch, save_kv_cache, **more)

    def _dense(
        self,
        rows: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        step: DenseStep,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        scale, of_values = layers.scales(layer, keys.dtype)
        output = dense_decode(
            rows,
            keys,
            values,
            step.slots,
            step.seq_lens,
            scale,
            sliding_window=layer.sliding_window_size,
            logit_cap=layer.logit_cap,
            tier=self._tier(layer),
            sinks=sinks,
        )
        return layers.times(output, of_values)

    def _tier(self, layer: RadixAttention) -> TierLayer | None:
        """Where keys and values of the layer are that have no room in its buffers; None: all have."""
        if self.engine is None or self.engine.tier is None:
            return None
        return self.engine.tier.layer(layer.layer_id - self.first_layer)

    def reasons_of_all(self, model: torch.nn.Module) -> set[str]:
        """Why all attention layers of a model go the dense way, in words; empty if one of them does not."""
        reasons = [self._dense_layer(layer) for layer in layers.attention_layers(model)]
        return set() if None in reasons else {reason.name.lower() for reason in reasons if reason is not None}

    def _dense_layer(self, layer: RadixAttention) -> DenseReason | None:
        """Why every request goes the dense way in this layer, if so; layers that read another one's KV show at a call."""
        return layers.dense_reason(layer, 0 if self.engine is None else self.engine.config.dense_layers)

    def _count(self, reason: DenseReason | None, step: DecodeStep, layer: RadixAttention) -> None:
        """Count the sparse requests of a layer that goes the dense way, and say so once; of a capture, note it."""
        if reason is None or step.sparse is None:
            return
        assert self.engine is not None
        if self._in_capture:
            self._dense_layers[layer.layer_id] = reason
            return
        self.engine.counters.dense_layer_calls[reason.name.lower()] += step.sparse_requests
        if reason not in self._said:
            self._said.add(reason)
            logger.info("clusterkv: some layers decode densely: %s", reason.name.lower())

    def _write(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> None:
        if save_kv_cache and k is not None:
            scales = (layer.k_scale, layer.v_scale) if self.token_to_kv_pool.dtype in FP8 else ()
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_layer(forward_batch, layer), k, v, *scales)


def _all_dense(rows: np.ndarray, seq_lens: np.ndarray, dense: DenseStep) -> DecodeStep:
    """The layers of a step in which every request attends to everything; what it counts as is the engine's to know."""
    return DecodeStep(None, None, None, dense, rows, seq_lens)


def _refuse_more(arguments: dict[str, Any]) -> None:
    """Raise on what a model's code hands to attention beside queries, keys, values and sinks, and no kernel of ours reads.

    SGLang 0.5.23 knows q_rope, k_rope, topk_indices, idx_q, idx_k, idx_v, cos_sin_cache, llama_4_scaling, score_mod,
    aux_tensors, rel_bias and return_lse. Models with these are refused at start, where SGLang says that they have them.
    """
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise NotImplementedError(
            f"this model hands {', '.join(given)} to its attention, which clusterkv does not serve: {_OTHER}"
        )


def _warm_up(runner: ModelRunner, engine: ClusterEngine) -> None:
    """Compile what the model's layers will run."""
    geometry = engine.index.geometry
    assert engine.group is not None
    compile_kernels(
        engine.config,
        engine.index.device,
        page_size=geometry.page_size,
        kv_heads=geometry.kv_heads,
        group=engine.group,
        head_dim=geometry.head_dim,
        dtype=engine.key_buffers[0].dtype,
        context_tokens=min(runner.model_config.context_len, geometry.slots),
        query_dtype=runner.model_config.dtype,
        host_dtype=None if engine.tier is None else engine.tier.host.host_dtype,
        sinks=runner.model_config.has_attention_sinks,
    )
