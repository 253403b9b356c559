"""FlashInfer's decode on a CPU: the calls that we make of it, computed in torch, with every use of a wrong list an error.

`install` puts the module in FlashInfer's place. Parameters are those of the installed package: `differences` names what is not.

As on a GPU, a plan gives numbers, with which a run is launched, and writes others to memory, which the launch reads
(`flashinfer_plan.py`). What a run launches is `ATTENTION`: a captured run keeps the numbers and tensors that it was captured
with, and reads when it is replayed what lies in them then.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from tests.support.flashinfer_plan import PlanInfo, plan

SMS = 6  # of the GPU that is not there: few, so that long lists are split and many lists are not
PLAN_BYTES = 1 << 20
ATTRIBUTES = ("_int_workspace_buffer", "_pin_memory_int_workspace_buffer", "_sm_scale")  # of a wrapper, that we set


class Attention:
    """What a run launches on the device."""

    def run(
        self,
        info: PlanInfo,
        memory: torch.Tensor,
        partial: torch.Tensor,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> None:
        """Programs attend to a chunk of a list each, as the plan in `memory` says; then chunks of a list are merged."""
        planned, heads = PLANNED[memory.data_ptr()], Wrapper.heads
        assert torch.equal(indptr, planned), "the device's lists begin elsewhere than was planned"
        assert (last_page == 1).all()
        words, count = memory.numpy(), info.padded_batch_size

        def read(offset: int, number: int, dtype: type = np.int32) -> np.ndarray:
            return words[offset : offset + number * np.dtype(dtype).itemsize].view(dtype)

        request, chunk = (read(at, count) for at in (info.request_indices_offset, info.kv_tile_indices_offset))
        valid = read(info.block_valid_mask_offset, count, np.bool_) if info.enable_cuda_graph else np.ones(count, bool)
        pairs = int(read(info.total_num_rows_offset, 1)[0]) if info.enable_cuda_graph else info.total_num_rows
        begins = read(info.merge_indptr_offset, pairs + 1) if info.split_kv else np.arange(pairs + 1)
        size = int(read(info.kv_chunk_size_ptr_offset, 1)[0])
        assert info.s_offset + 4 * lse.shape[1] * int(begins[-1]) <= len(partial), "no room for partial results"
        group, channels = q.shape[1:]
        outputs = torch.full((int(begins[-1]), group, channels), torch.nan, dtype=torch.float64)
        lses = torch.full((int(begins[-1]), group), torch.nan, dtype=torch.float64)
        for pair, c in zip(request[valid].tolist(), chunk[valid].tolist(), strict=True):
            end = int(indptr[pair + 1])
            first, last = int(indptr[pair]) + c * size, min(int(indptr[pair]) + (c + 1) * size, end)
            index = indices[first : last if info.split_kv else end].long()
            assert bool(((index >= 0) & (index < len(keys))).all()), (
                "an index names no row of the pool, or was not written"
            )
            assert bool((index % heads == pair % heads).all()), "an index names another head's row"
            whole = indices[int(indptr[pair]) : end]
            assert whole.unique().numel() == whole.numel(), "a token is listed twice"
            logits = q[pair].double() @ keys[index, 0, 0].double().T * scale
            place = int(begins[pair]) + c
            lses[place] = logits.logsumexp(-1)
            outputs[place] = logits.softmax(-1) @ values[index, 0, 0].double()
        for pair in range(pairs):
            parts = slice(int(begins[pair]), int(begins[pair + 1]))
            lse[pair] = lses[parts].logsumexp(0) / math.log(Wrapper.base)
            out[pair] = (lses[parts].softmax(0).unsqueeze(-1) * outputs[parts]).sum(0).to(out.dtype)


ATTENTION = Attention()
PLANNED: dict[int, torch.Tensor] = {}  # where lists begin, by the memory of the plan


class Wrapper:
    """BatchDecodeWithPagedKVCacheWrapper, for pages of one token and one kv head each.

    Class attributes are set by a test: `heads`, how many kv heads the pool's rows have; `base`, of the log-sum-exps.
    """

    heads = 1
    base = 2.0
    made: list[Wrapper] = []

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
        backend: str = "auto",
        jit_args: list[Any] | None = None,
    ) -> None:
        assert use_tensor_cores, "without tensor cores lists must not be shorter than planned"
        assert backend == "fa2", "auto may choose another library"
        assert kv_layout == "NHD"
        self._graph = use_cuda_graph
        self._float_workspace_buffer = float_workspace_buffer
        self._int_workspace_buffer = torch.empty(PLAN_BYTES, dtype=torch.uint8, device=float_workspace_buffer.device)
        self._pin_memory_int_workspace_buffer = torch.empty(PLAN_BYTES, dtype=torch.uint8)
        self._sm_scale: float | None = None
        self.plans = self.runs = 0
        self._info: PlanInfo | None = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None and paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            self._fixed = len(paged_kv_last_page_len_buffer)
            assert len(paged_kv_indptr_buffer) == self._fixed + 1
            self._indptr, self._indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
            self._last_page = paged_kv_last_page_len_buffer
        Wrapper.made.append(self)

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *deprecated_positional_args: Any,
        **kwargs: Any,
    ) -> None:
        """The whole plan, which loads the kernels."""
        assert indptr.device.type == "cpu" and not deprecated_positional_args
        self._check(len(last_page_len), indices)
        if self._graph:
            self._indptr.copy_(indptr)
            self._last_page.copy_(last_page_len)
            self._indices[: len(indices)].copy_(indices)
        else:
            device = self._int_workspace_buffer.device
            self._indptr, self._indices, self._last_page = (x.to(device) for x in (indptr, indices, last_page_len))
        self._note(indptr, num_qo_heads, num_kv_heads, head_dim, page_size, **kwargs)

    def _check(self, batch: int, indices: torch.Tensor) -> None:
        if self._graph:
            assert batch == self._fixed, "the batch size should be fixed in cudagraph mode"
            assert len(indices) <= len(self._indices), "indices are more than the allocated buffer"

    def _note(
        self,
        indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        """Plan lists that begin there, on the host."""
        assert (num_kv_heads, page_size) == (1, 1) and q_data_type is kv_data_type is not None
        assert self._indptr.dtype == self._indices.dtype == self._last_page.dtype == indptr.dtype == torch.int32
        assert len(indptr) == len(self._indptr) == len(self._last_page) + 1
        self._group, self._channels, self._dtype = num_qo_heads, head_dim, q_data_type
        self.plans += 1
        if isinstance(self._int_workspace_buffer, FakeTensor):
            return
        assert (self._last_page == 1).all()
        lengths = indptr.diff().numpy().astype(np.int64)
        assert (lengths > 0).all(), "a list is empty"
        staged = self._pin_memory_int_workspace_buffer
        self._info, taken, partial = plan(lengths, num_qo_heads, head_dim, self._graph, SMS, staged.numpy())
        assert partial <= len(self._float_workspace_buffer), "buffer overflow: increase the workspace buffer size"
        self._int_workspace_buffer[:taken].copy_(staged[:taken])
        PLANNED[self._int_workspace_buffer.data_ptr()] = indptr.clone()

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: torch.Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; the lists are read by the launch."""
        assert self.plans and out is not None and lse is not None and return_lse and not args
        pairs = len(self._last_page)
        keys, values = paged_kv_cache
        assert q.shape == out.shape == (pairs, self._group, self._channels) and q.dtype is out.dtype is self._dtype
        assert lse.shape == (pairs, self._group) and lse.dtype is torch.float32
        assert keys.shape == values.shape == (len(keys), 1, 1, self._channels) and keys.dtype is self._dtype
        assert q.is_contiguous() and out.is_contiguous() and lse.is_contiguous() and keys.stride() == values.stride()
        scale = self._sm_scale if self._sm_scale is not None else 1 / math.sqrt(self._channels)
        self.runs += 1
        ATTENTION.run(
            self._info, self._int_workspace_buffer, self._float_workspace_buffer, q, keys, values, self._indptr,
            self._indices, self._last_page, out, lse, scale,
        )  # fmt: skip
        return out, lse


def fast_decode_plan(
    self: Wrapper,
    indptr: torch.Tensor,
    indices: torch.Tensor,
    last_page_len: torch.Tensor,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: torch.dtype | None = None,
    kv_data_type: torch.dtype | None = None,
    data_type: torch.dtype | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    q_len_per_req: int = 1,
    global_override_indptr_cpu: torch.Tensor | None = None,
) -> None:
    """The plan without copies, from the begins on the host; `self` was planned before."""
    assert self.plans > 0, "the first plan loads the kernels"
    assert global_override_indptr_cpu is not None, "it would copy from the device, and wait"
    self._check(len(last_page_len), indices)
    if not self._graph:  # a graph's are where they were; nothing is copied there
        self._indptr, self._indices, self._last_page = indptr, indices, last_page_len
    self._sm_scale = sm_scale
    self._note(global_override_indptr_cpu, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type)


def install(monkeypatch: pytest.MonkeyPatch, heads: int, base: float = 2.0) -> type[Wrapper]:
    """Put the stand-in in FlashInfer's place for a test: pools with so many kv heads, log-sum-exps of that base."""
    from sglang_clusterkv.kernels.attend import flashinfer as ours

    stand_in: Any = types.ModuleType("flashinfer")
    decode: Any = types.ModuleType("flashinfer.decode")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)  # it counts as installed
    stand_in.BatchDecodeWithPagedKVCacheWrapper, stand_in.decode = Wrapper, decode
    decode.fast_decode_plan = fast_decode_plan
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decode)
    monkeypatch.setattr(ours, "_sm_count", lambda device: SMS)
    monkeypatch.setattr(Wrapper, "heads", heads)
    monkeypatch.setattr(Wrapper, "base", base)
    monkeypatch.setattr(Wrapper, "made", [])
    return Wrapper


def differences() -> list[str]:
    """Parameters of the stand-in's functions, and attributes of wrappers that we set, that the installed FlashInfer has
    otherwise."""
    theirs = importlib.import_module("flashinfer.decode")
    pairs = [
        (getattr(Wrapper, name), getattr(theirs.BatchDecodeWithPagedKVCacheWrapper, name))
        for name in ("__init__", "plan", "run")
    ]
    pairs.append((fast_decode_plan, theirs.fast_decode_plan))

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(inspect.unwrap(function)).parameters.values()
        return [(one.name, one.kind, one.default) for one in found]

    source = inspect.getsource(theirs)
    return [
        f"{ours.__qualname__}: {parameters(ours)} is {parameters(other)}"
        for ours, other in pairs
        if parameters(ours) != parameters(other)
    ] + [name for name in ATTRIBUTES if source.count(f"self.{name}") < 3]
