"""Prefill attention: new tokens over their prefix and, causally, themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.merge.reference import by_kv_head

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import TierLayer

_QUERIES_PER_BLOCK = 128


def extend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = -1,
    logit_cap: float = 0.0,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One request's new tokens, whose keys and values are already in the pool.

    Args:
        q: [new, heads, D], the last `new` tokens of the sequence.
        keys: [slots, H, D].
        values: [slots, H, D].
        slots: int64 [T], the sequence's slots, prefix first.
        scale: of the logits.
        sliding_window: tokens before its own that a query sees; negative: all.
        logit_cap: logits become cap * tanh(logit / cap); 0: unchanged.
        tier: where some slots' keys and values are on the host.
        sinks: [heads], a learned logit of each query head that has no token and is not capped; None: there are none.

    Returns:
        [new, heads, D] in q's dtype.
    """
    new, total = q.shape[0], slots.numel()
    rows = [
        (buffer.index_select(0, slots) if tier is None else tier.gather(buffer, part, slots)).float().transpose(0, 1)
        for part, buffer in enumerate((keys, values))
    ]
    grouped = q.float().unflatten(1, (keys.shape[1], -1)).permute(1, 2, 0, 3)  # [H, G, new, D]
    by_head = None if sinks is None else by_kv_head(sinks, keys.shape[1])
    token = torch.arange(total, device=q.device)
    blocks = []
    for first in range(0, new, _QUERIES_PER_BLOCK):
        block = grouped[:, :, first : first + _QUERIES_PER_BLOCK]
        logits = scale * torch.einsum("hgqd,htd->hgqt", block, rows[0])
        if logit_cap > 0:
            logits = logit_cap * torch.tanh(logits / logit_cap)
        at = (total - new + first + torch.arange(block.shape[2], device=q.device)).unsqueeze(1)
        logits = logits.masked_fill(token > at, -torch.inf)
        if sliding_window >= 0:
            logits = logits.masked_fill(token < at - sliding_window, -torch.inf)
        if by_head is not None:
            logits = torch.cat((logits, by_head[..., None, None].expand(-1, -1, logits.shape[2], 1)), -1)
        blocks.append(torch.einsum("hgqt,htd->hgqd", logits.softmax(-1)[..., :total], rows[1]))
    return torch.cat(blocks, 2).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
