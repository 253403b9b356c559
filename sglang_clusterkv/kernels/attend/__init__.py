"""Exact attention over listed tokens of the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.attend import reference

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import TierLayer


def dense_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = -1,
    logit_cap: float = 0.0,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query per request over all its tokens; see `reference.dense_decode`."""
    if q.device.type == "cuda":
        from sglang_clusterkv.kernels.attend import triton

        chosen = triton.dense_decode
    elif q.device.type == "cpu":
        from sglang_clusterkv.kernels.attend import cpu

        chosen = cpu.dense_decode
    else:
        chosen = reference.dense_decode
    return chosen(
        q, keys, values, slots, seq_lens, scale, sliding_window=sliding_window, logit_cap=logit_cap, tier=tier,
        sinks=sinks,
    )  # fmt: skip
