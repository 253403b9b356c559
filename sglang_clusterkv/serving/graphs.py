"""Decode CUDA graphs: which captured graph a step replays, and what SGLang's capture asks of the attention backend.

SGLang captures each batch size twice. A step without a sparse request replays "dense": the backend that prefills, unchanged.
Any other replays "sparse": our chain over lists and a workspace that never move, for any mixture of requests, since what a
request is are numbers in its lists. These are made at the head of the forward (clusters/decoding.py), before the replay, on its
stream. A step that is more than the lists have room for runs without a graph, counted by what there is too much of.

Which graph, and whether one, follows from lengths and borders on the host, and from what the other ranks say (ranks.py).
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.serving import runtime
from sglang_clusterkv.serving.late_refusal import sentence_alone

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    from sglang_clusterkv.clusters.engine import ClusterEngine
    from sglang_clusterkv.clusters.rows import DenseReason

logger = logging.getLogger(__name__)

DENSE, SPARSE = "dense", "sparse"
_NOBODY = np.zeros(0, np.int64)
NO_LISTS = DecodeStep(None, None, None, None, _NOBODY, _NOBODY)  # every layer by the backend that prefills


class ClusterGraphVariants:
    """SGLang's `AttentionGraphVariants`."""

    capture_labels: ClassVar[tuple[str, ...]] = (DENSE, SPARSE)

    def select(self, forward_batch: ForwardBatch) -> str:
        """The graph of the batch that was launched last."""
        step = runtime.peek_step()
        return DENSE if step is None or step.sparse is None else SPARSE


def variants() -> ClusterGraphVariants | None:
    """The graphs of each batch size of this process's decode runner; None where no engine serves it."""
    return None if runtime.engine() is None else ClusterGraphVariants()


def can_run(result: bool) -> bool:
    """Whether a graph holds the batch that was launched last, by SGLang's answer and ours; counts what there is too much of."""
    step, engine = runtime.peek_step(), runtime.engine()
    if not result or step is None or engine is None or step.too_large is None:
        return result
    engine.counters.steps_without_graph[step.too_large] += 1
    return False


class DecodeGraphs:
    """What SGLang's decode graphs ask of an attention backend; a mixin of ours.

    Attributes:
        prefill: the backend that prefills; captured dense steps and layers that never recall are its.
        engine: None for a pool without an index.
        calls_prefill: whether a sparse step has layers that go the dense way.
    """

    prefill: AttentionBackend | None
    engine: ClusterEngine | None
    calls_prefill: bool
    _longest: int
    _step: DecodeStep | None
    _in_capture: bool = False
    _prefill_ready: bool = False

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make what captured steps read, for up to `max_bs` requests."""
        assert self.prefill is not None, "SGLang captures decode graphs on an accelerator alone"
        self.prefill.init_cuda_graph_state(max_bs, max_num_tokens)
        self._dense_layers: dict[int, DenseReason] = {}  # of a captured sparse step
        if self.engine is not None:
            with sentence_alone():
                taken = self._reserve(self.engine, max_bs)
            logger.info(
                "clusterkv: captured decode steps of up to %d requests have lists and a workspace of %.1f MB (%s)",
                max_bs, taken / 1e6, self.engine.decoding.room,
            )  # fmt: skip

    def _reserve(self, engine: ClusterEngine, max_bs: int) -> int:
        try:
            return engine.decoding.reserve(max_bs, self._longest)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"there is no memory for the lists and the workspace of captured decode steps of {max_bs} requests ({error}): "
                "lower --mem-fraction-static or --cuda-graph-max-bs, or pass --disable-cuda-graph"
            ) from error

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of a made-up request in SGLang's warm-ups and of padding in its graphs."""
        return 1 if self.prefill is None else int(self.prefill.get_cuda_graph_seq_len_fill_value())

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Before a capture or a replay: take the step, and let the backend that prefills prepare its layers."""
        assert self.prefill is not None
        if in_capture:
            sparse = self.engine is not None and get_capture_attention_variant() == SPARSE
            self._step = self._captured(forward_batch.batch_size) if sparse else NO_LISTS
        else:
            self._step = runtime.take_step() or NO_LISTS
            if self.engine is not None and self._step.sparse is not None:
                self.engine.decoding.replay(forward_batch.batch_size)
            self._count_dense_layers(self._step)
        self._in_capture, self._prefill_ready = in_capture, self._step.sparse is None or self.calls_prefill
        if self._prefill_ready:
            self.prefill.init_forward_metadata_out_graph(forward_batch, in_capture)

    def _captured(self, batch: int) -> DecodeStep:
        assert self.engine is not None
        return DecodeStep(None, self.engine.decoding.captured(batch), None, None, _NOBODY, _NOBODY)

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Inside a capture: what the backend that prefills records."""
        assert self.prefill is not None
        if self._prefill_ready:
            self.prefill.init_forward_metadata_in_graph(forward_batch)

    def on_after_cuda_graph_warmup(self) -> None:
        """Between the runs before a capture and the capture. Ours ran over padding, which changes nothing that is kept."""
        assert self.prefill is not None
        if self._prefill_ready:
            self.prefill.on_after_cuda_graph_warmup()

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        """Where a forward has read SGLang's tables for the last time: we do before a replay, the other backend says itself."""
        own: SharedReadEnds = super().shared_read_ends(fm)  # type: ignore[misc]
        if self.prefill is None or not fm.is_decode():
            return own
        return SharedReadEnds.max_of((own, self.prefill.shared_read_ends(fm)))

    def _count_dense_layers(self, step: DecodeStep) -> None:
        """A replay runs no code of ours in its layers."""
        if self.engine is not None and step.sparse is not None:
            for reason, layers in Counter(self._dense_layers.values()).items():
                self.engine.counters.dense_layer_calls[reason.name.lower()] += layers * step.sparse_requests
