"""Attend: softmax over exact logits of listed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.merge.reference import Partial, add_sinks, by_kv_head
from sglang_clusterkv.kernels.score.reference import exact_logits, gather_heads

if TYPE_CHECKING:
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: SparseStep,
    recalled: torch.Tensor,
    recalled_count: torch.Tensor,
    scale: float,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> Partial:
    """Attend to sinks, window and recalled tokens.

    Args:
        q: float32 [B, H, G, D].
        keys: [slots, H, D].
        values: [slots, H, D].
        step: gives the always-attended tokens.
        recalled: int64 [B, H, K], slots.
        recalled_count: int64 [B, H].
        scale: of the logits.
        tier: where some slots' keys and values are on the host.
        sinks: float32 [H, G], a learned logit of each query head that has no token; None: there are none.
    """
    base = exact_logits(q, keys, step.base_slots, step.base_count, scale, tier)
    chosen = exact_logits(q, keys, recalled, recalled_count, scale, tier)
    logits = torch.cat((base, chosen), -1)
    rows = torch.cat((gather_heads(values, step.base_slots, tier, 1), gather_heads(values, recalled, tier, 1)), 2)
    part = Partial(torch.einsum("bhgw,bhwd->bhgd", logits.softmax(-1), rows), logits.logsumexp(-1))
    return part if sinks is None else add_sinks(part, sinks)


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
    """One query per request over all its tokens, or the last `sliding_window` + 1 of them.

    Args:
        q: [B, heads, D].
        keys: [slots, H, D].
        values: [slots, H, D].
        slots: int64 [B, T], in sequence order.
        seq_lens: int64 [B].
        scale: of the logits.
        sliding_window: tokens before the query's own that it sees; negative: all.
        logit_cap: logits become cap * tanh(logit / cap); 0: unchanged.
        tier: where some slots' keys and values are on the host.
        sinks: [heads], a learned logit of each query head that has no token and is not capped; None: there are none.

    Returns:
        [B, heads, D] in q's dtype.
    """
    grouped = q.float().unflatten(1, (keys.shape[1], -1))
    logits = exact_logits(grouped, keys, slots, seq_lens, scale, tier)
    if logit_cap > 0:
        logits = logit_cap * torch.tanh(logits / logit_cap)
        hidden = torch.arange(slots.shape[1], device=q.device) >= seq_lens.unsqueeze(1)
        logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    if sliding_window >= 0:
        early = torch.arange(slots.shape[1], device=q.device) < (seq_lens - 1 - sliding_window).unsqueeze(1)
        logits = logits.masked_fill(early[:, None, None], -torch.inf)
    output = torch.einsum("bhgt,bhtd->bhgd", logits.softmax(-1), gather_heads(values, slots, tier, 1))
    if sinks is not None:
        output = add_sinks(Partial(output, logits.logsumexp(-1)), by_kv_head(sinks, keys.shape[1])).output
    return output.flatten(1, 2).to(q.dtype)
