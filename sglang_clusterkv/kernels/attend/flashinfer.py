"""Attend on a GPU by FlashInfer: each (request, kv head) is a request of its own, with a list of its own.

A pool [slots, H, D] is as well a paged cache of slots * H pages of one token and one head, so that token `slot` of kv head h is
page slot * H + h, and a batch's queries [B, H, G, D] are B * H requests of G query heads. Lists are made in place: what all
layers attend to once per step, behind it each layer's recalled tokens (`triton_index.py`). Their lengths are the same in all
layers and known on the host, so FlashInfer plans once per step, before any layer.

FlashInfer reads the always-attended keys again, whose logits score has found already; and its log-sum-exps have base 2.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.kernels.attend.triton_index import list_always, list_recalled
from sglang_clusterkv.memory.fp8 import FP8

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

logger = logging.getLogger(__name__)

HEAD_DIMS = (64, 128, 256)  # of FlashInfer's tensor-core kernels
WORKSPACE_BYTES = 64 << 20  # of its partial results: two programs for each SM of a GPU need a quarter of it
_MOST_PAGES = 2**31  # its indices have 32 bits
_said: set[str] = set()  # why our own kernel attends instead; the warm-up asks as well


def why_not(config: ClusterKVConfig, heads: int, channels: int, dtype: torch.dtype, slots: int) -> str | None:
    """Why FlashInfer cannot attend, in words; None where it can, as far as can be known before its kernels are loaded.

    Args:
        config: the resolved configuration.
        heads: kv heads of this rank.
        channels: of a head.
        dtype: of the KV pool.
        slots: of the pool.
    """
    if not _installed():
        return "FlashInfer is not installed"
    if config.trace:
        return "traces are made from what our own kernels leave"
    if config.host_ratio > 1:
        return "it reads keys and values on the device only, and host_ratio is above 1"
    if dtype in FP8:
        return "it is planned here for queries and a KV cache of one type, and the cache is in fp8"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no kernels for a KV cache in {str(dtype).removeprefix('torch.')}"
    if channels not in HEAD_DIMS:
        return f"it has kernels for heads of {', '.join(map(str, HEAD_DIMS))} channels, not of {channels}"
    if slots * heads >= _MOST_PAGES:
        return f"{slots:,} slots of {heads} kv heads are more than its indices of 32 bits can name"
    return None


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flashinfer") is not None
    except ValueError:  # it was put out of reach
        return False


class FlashInferAttend:
    """FlashInfer's decode over the lists of a step.

    Args:
        heads: kv heads.
        group: query heads per kv head.
        channels: of a head.
        dtype: of queries and pool, bf16 or float16.
        device: of the pool.

    Raises whatever FlashInfer does where its kernels can neither be found nor compiled.
    """

    def __init__(self, heads: int, group: int, channels: int, dtype: torch.dtype, device: str) -> None:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
        from flashinfer.decode import fast_decode_plan

        self._heads, self._group, self._channels, self._dtype, self._device = heads, group, channels, dtype, device
        # "auto" may choose cuDNN; tensor cores take any group, and lists shorter than planned.
        self._wrapper: Any = BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device), "NHD", use_tensor_cores=True, backend="fa2"
        )
        self._plan_fast = fast_decode_plan
        self.indptr = torch.zeros(heads + 1, dtype=torch.int32, device=device)
        self.indices = torch.zeros(0, dtype=torch.int32, device=device)
        self.output = torch.empty((0, heads, 1, group, channels), dtype=dtype, device=device)
        self.lse = torch.empty((0, heads, 1, group), dtype=torch.float32, device=device)
        self._plan_first()

    def _plan_first(self) -> None:
        """Have FlashInfer find or compile its kernels: a plan of one token, after which it can be planned fast."""
        indptr = torch.tensor([0, 1], dtype=torch.int32)
        indices = torch.zeros(1, dtype=torch.int32, device=self._device)
        last = torch.ones(1, dtype=torch.int32)
        self._wrapper.plan(
            indptr, indices, last, self._group, 1, self._channels, 1, q_data_type=self._dtype, kv_data_type=self._dtype
        )

    def prepare(self, step: SparseStep, budget: int, page_size: int) -> None:
        """Plan a step, and list what all of its layers attend to. Nothing waits for the device.

        Args:
            step: its lists; `lengths` too.
            budget: tokens that a (request, kv head) recalls at most.
            page_size: tokens per page.
        """
        assert step.lengths is not None, "FlashInfer plans on the host"
        always = np.maximum(step.lengths[:, 0], 1)
        pairs = step.batch * self._heads
        indptr = np.zeros(pairs + 1, np.int32)
        np.cumsum(np.repeat(always + np.minimum(step.lengths[:, 1], budget), self._heads), out=indptr[1:])
        host = torch.from_numpy(indptr)
        self._take(step.batch, int(indptr[-1]))
        # Memory of its own in each step: the copy may wait for the forward before, and the host is a step ahead.
        staged = host.pin_memory() if torch.device(self._device).type == "cuda" else host
        self.indptr = staged.to(self._device, non_blocking=True)
        self._plan_fast(
            self._wrapper, self.indptr, self.indices, torch.ones(pairs, dtype=torch.int32, device=self._device),
            self._group, 1, self._channels, 1,
            q_data_type=self._dtype, kv_data_type=self._dtype, global_override_indptr_cpu=host,
        )  # fmt: skip
        list_always(step, int(always.max()), page_size, self.indptr, self.indices, self._heads)
        self._step = step

    def _take(self, batch: int, listed: int) -> None:
        """Room for so many requests and indices."""
        if self.indices.numel() < listed:
            self.indices = torch.empty(_power_of_two(listed), dtype=torch.int32, device=self._device)
        if len(self.lse) < batch:
            sizes = (_power_of_two(batch), self._heads, 1, self._group)
            self.output = torch.empty((*sizes, self._channels), dtype=self._dtype, device=self._device)
            self.lse = torch.empty(sizes, dtype=torch.float32, device=self._device)

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, w: Workspace) -> None:
        """One layer, into `output` [B, H, 1, G, D] and `lse` [B, H, 1, G], in base 2.

        Args:
            q: [B, H, G, D].
            keys: [slots, H, D], contiguous.
            values: likewise.
            scale: of the logits.
            w: as recall left it.
        """
        list_recalled(self._step, w, self.indptr, self.indices)
        pairs = q.shape[0] * self._heads
        paged = (-1, 1, 1, self._channels)
        self._wrapper._sm_scale = scale  # planned once for layers that may differ in it
        self._wrapper.run(
            q.reshape(pairs, self._group, self._channels),
            (keys.view(paged), values.view(paged)),
            out=self.output.view(-1, self._group, self._channels)[:pairs],
            lse=self.lse.view(-1, self._group)[:pairs],
            return_lse=True,
        )


def engine_of(index: ClusterIndex, group: int, dtype: torch.dtype) -> FlashInferAttend | None:
    """FlashInfer for an index, if `attend_engine` asks for it; None where our own kernel attends, and why is said once.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        dtype: of the KV pool.
    """
    config, geometry = index.config, index.geometry
    if config.attend_engine != "flashinfer":  # auto: nothing was measured that would speak for another than ours
        return None
    heads, channels = geometry.kv_heads, geometry.head_dim
    why = why_not(config, heads, channels, dtype, geometry.slots)
    if why is None:
        try:
            return FlashInferAttend(heads, group, channels, dtype, index.device)
        except Exception as error:  # of a compiler, of a loader: whatever it is, our own kernel attends
            why = f"its kernels can neither be found nor compiled here ({type(error).__name__}: {error})"
    if why not in _said:
        _said.add(why)
        logger.info("clusterkv: attend_engine is flashinfer, but our own kernel attends: %s", why)
    return None


def _power_of_two(least: int) -> int:
    return 1 << max(0, least - 1).bit_length()
