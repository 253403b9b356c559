"""Prefill attention on the CPU: the prefix, gathered once, by one dense call; the new tokens by one causal call; merged.

Only the new rows are computed. The query heads of a kv head are rows of one matrix where the mask allows it, so that keys
are read once for all of them.
"""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels.extend import reference

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def extend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = -1,
    logit_cap: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """See `reference.extend`."""
    if sliding_window >= 0 or logit_cap > 0 or not causal:
        return reference.extend(
            q, keys, values, slots, scale, sliding_window=sliding_window, logit_cap=logit_cap, causal=causal
        )
    new, heads, channels = q.shape
    kv_heads = keys.shape[1]
    prefix = slots.numel() - new
    k, v = (buffer.index_select(0, slots).to(q.dtype).transpose(0, 1) for buffer in (keys, values))  # [H, T, D]
    grouped = q.view(new, kv_heads, -1, channels).permute(1, 2, 0, 3)  # [H, G, new, D]
    group = grouped.shape[1]

    def shared(rows: torch.Tensor) -> torch.Tensor:
        """The new tokens' keys or values, the same for every query head of the group."""
        return rows[:, prefix:].unsqueeze(1).expand(-1, group, -1, -1)

    output, lse = _flash(grouped, shared(k), shared(v), 0.0, True, scale=scale)
    if prefix:
        stacked = grouped.reshape(kv_heads, 1, group * new, channels)
        earlier, earlier_lse = _flash(
            stacked, k[:, :prefix].unsqueeze(1), v[:, :prefix].unsqueeze(1), 0.0, False, scale=scale
        )
        weight = torch.sigmoid(earlier_lse.view_as(lse) - lse).unsqueeze(-1)
        output = torch.lerp(output.float(), earlier.view(grouped.shape).float(), weight).to(q.dtype)
    return output.permute(2, 0, 1, 3).reshape(new, heads, channels)
