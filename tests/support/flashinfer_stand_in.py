"""FlashInfer's decode on a CPU: the calls that we make of it, computed in torch, with every use of a wrong list an error.

`install` puts the module in FlashInfer's place. Parameters are those of the installed package: `differences` names what is not.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import math
import sys
import types
from typing import Any

import pytest
import torch


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
        assert kv_layout == "NHD" and not float_workspace_buffer.any(), "zero before its first use"
        self._sm_scale: float | None = None
        self.plans = self.runs = 0
        self._planned: torch.Tensor | None = None
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
        self._note(indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **kwargs)

    def _note(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: torch.dtype | None = None,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        assert (num_kv_heads, page_size) == (1, 1) and (last_page_len == 1).all()
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        assert len(indptr) == len(last_page_len) + 1 and bool((indptr.diff() > 0).all()), "a list is empty"
        assert q_data_type is kv_data_type is not None
        self._planned, self._indices = indptr.clone(), indices
        self._group, self._channels, self._dtype = num_qo_heads, head_dim, q_data_type
        self._device_indptr = indptr
        self.plans += 1

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
        """Attend; the lists are read now."""
        assert self._planned is not None and out is not None and lse is not None and return_lse and not args
        pairs = len(self._planned) - 1
        keys, values = paged_kv_cache
        assert torch.equal(self._device_indptr, self._planned), "the device's lists begin elsewhere than was planned"
        assert q.shape == out.shape == (pairs, self._group, self._channels) and q.dtype is out.dtype is self._dtype
        assert lse.shape == (pairs, self._group) and lse.dtype is torch.float32
        assert keys.shape == values.shape == (len(keys), 1, 1, self._channels) and keys.dtype is self._dtype
        assert out.is_contiguous() and lse.is_contiguous() and keys.stride() == values.stride()
        scale = self._sm_scale if self._sm_scale is not None else 1 / math.sqrt(self._channels)
        for pair in range(pairs):
            index = self._indices[self._planned[pair] : self._planned[pair + 1]].long()
            assert bool(((index >= 0) & (index < len(keys))).all()), (
                "an index names no row of the pool, or was not written"
            )
            assert bool((index % self.heads == pair % self.heads).all()), "an index names another head's row"
            assert index.unique().numel() == index.numel(), "a token is listed twice"
            logits = q[pair].double() @ keys[index, 0, 0].double().T * scale
            lse[pair] = logits.logsumexp(-1) / math.log(self.base)
            out[pair] = (logits.softmax(-1) @ values[index, 0, 0].double()).to(out.dtype)
        self.runs += 1
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
    begins = global_override_indptr_cpu
    self._note(
        begins, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type, kv_data_type
    )
    self._device_indptr = indptr


def install(monkeypatch: pytest.MonkeyPatch, heads: int, base: float = 2.0) -> type[Wrapper]:
    """Put the stand-in in FlashInfer's place for a test: pools with so many kv heads, log-sum-exps of that base."""
    stand_in: Any = types.ModuleType("flashinfer")
    decode: Any = types.ModuleType("flashinfer.decode")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)  # it counts as installed
    stand_in.BatchDecodeWithPagedKVCacheWrapper, stand_in.decode = Wrapper, decode
    decode.fast_decode_plan = fast_decode_plan
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decode)
    monkeypatch.setattr(Wrapper, "heads", heads)
    monkeypatch.setattr(Wrapper, "base", base)
    monkeypatch.setattr(Wrapper, "made", [])
    return Wrapper


def differences() -> list[str]:
    """Parameters of the stand-in's functions that the installed FlashInfer has otherwise."""
    theirs = importlib.import_module("flashinfer.decode")
    pairs = [
        (getattr(Wrapper, name), getattr(theirs.BatchDecodeWithPagedKVCacheWrapper, name))
        for name in ("__init__", "plan", "run")
    ]
    pairs.append((fast_decode_plan, theirs.fast_decode_plan))

    def parameters(function: Any) -> list[tuple[str, Any, Any]]:
        found = inspect.signature(inspect.unwrap(function)).parameters.values()
        return [(one.name, one.kind, one.default) for one in found]

    return [
        f"{ours.__qualname__}: {parameters(ours)} is {parameters(other)}"
        for ours, other in pairs
        if parameters(ours) != parameters(other)
    ]
