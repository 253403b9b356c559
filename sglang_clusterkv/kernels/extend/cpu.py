"""Prefill attention on the CPU: the prefix by one call, the new tokens by one causal call, merged.

Only the new rows are computed. The query heads of a kv head are rows of one matrix where the mask allows it, so that keys
are read once for all of them. A few new tokens, as after a radix hit, read the prefix from the pool; many are worth
gathering it once for torch's attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import (
    FAST,
    NEGLIGIBLE,
    ROWS_AHEAD,
    ROWS_AT_ONCE,
    add_rows,
    bits,
    dot_group,
    fast_exp,
    njit,
)
from sglang_clusterkv.kernels.extend import reference
from sglang_clusterkv.kernels.merge.reference import Partial, add_sinks, by_kv_head
from sglang_clusterkv.kernels.row_cpu import KEYS, VALUES, load_row, prefetch
from sglang_clusterkv.memory.tier import PREFILL_HOST, TierLayer

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FEW_ROWS = 64  # query rows per kv head up to which the pool is read in place
_BLOCK = 256  # prefix tokens whose logits are held at a time


@functools.cache
def prefix_kernel(channels: int, is_bf16: bool) -> Callable[..., None]:
    """Compile attention of many query rows per kv head over listed tokens, for one head_dim and pool dtype.

    q [H, R, D] float32, slots [T]; outputs output [H, R, D] and lse [H, R]. Online softmax over blocks of tokens
    (FlashAttention, arXiv 2205.14135), every row of the pool read once for all R.
    """
    row_bytes = channels * (2 if is_bf16 else 4)

    @njit(cache=True, fastmath=FAST, nogil=True)
    def kernel(q: Any, keys: Any, values: Any, host: Any, slots: Any, scale: Any, output: Any, lse: Any) -> None:
        heads, group = q.shape[0], q.shape[1]
        row = np.empty(channels, np.float32)
        rows = np.empty((ROWS_AT_ONCE, channels), np.float32)
        dots = np.empty(group, np.float32)
        logits = np.zeros((group, _BLOCK + ROWS_AT_ONCE), np.float32)
        total = slots.shape[0]
        away = 0
        for h in range(heads):
            sums = np.zeros(group, np.float32)
            output[h] = 0.0
            lse[h] = NEGLIGIBLE  # the largest logit so far, until the end
            for first in range(0, total, _BLOCK):
                count = min(_BLOCK, total - first)
                for t in range(count):
                    prefetch(keys, host, slots[min(first + t + ROWS_AHEAD, total - 1)], h, row_bytes)
                    away += load_row(keys, host, KEYS, slots[first + t], h, is_bf16, channels, row)
                    dot_group(q[h], row, group, channels, dots)
                    for g in range(group):
                        logits[g, t] = dots[g] * scale
                for g in range(group):
                    most = lse[h, g]
                    for t in range(count):
                        most = max(most, logits[g, t])
                    kept = fast_exp(lse[h, g] - most)
                    part = np.float32(0.0)
                    for t in range(count):
                        weight = fast_exp(logits[g, t] - most)
                        logits[g, t] = weight
                        part += weight
                    for t in range(count, count + ROWS_AT_ONCE):
                        logits[g, t] = 0.0
                    sums[g] = sums[g] * kept + part
                    lse[h, g] = most
                    for d in range(channels):
                        output[h, g, d] *= kept
                for t in range(0, count, ROWS_AT_ONCE):
                    for k in range(ROWS_AT_ONCE):
                        at = first + min(t + k, count - 1)
                        prefetch(values, host, slots[min(at + ROWS_AHEAD, total - 1)], h, row_bytes)
                        load_row(values, host, VALUES, slots[at], h, is_bf16, channels, rows[k])
                    add_rows(logits, t, rows, group, channels, output[h])
            for g in range(group):
                lse[h, g] += np.log(sums[g])
                inverse = np.float32(1.0) / sums[g]
                for d in range(channels):
                    output[h, g, d] *= inverse
        if host is not None:
            host.reads[PREFILL_HOST] += away

    return kernel


def _gather(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype, tier: TierLayer | None
) -> list[torch.Tensor]:
    """Keys and values at slots [T], [H, 1, T, D] each."""
    if tier is None:
        found = [buffer.index_select(0, slots) for buffer in (keys, values)]
    else:
        found = [tier.gather(buffer, part, slots) for part, buffer in enumerate((keys, values))]
        tier.count(PREFILL_HOST, slots)
    return [rows.to(dtype).transpose(0, 1).unsqueeze(1) for rows in found]


def _attend_prefix(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    tier: TierLayer | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of query rows [H, R, D] over the prefix at `slots`: (output [H, R, D] float32, lse [H, R])."""
    if rows.shape[1] <= _FEW_ROWS and keys.dtype in (torch.bfloat16, torch.float32):
        q = rows.float().contiguous()
        output, lse = torch.empty_like(q), torch.empty(q.shape[:2])
        kernel = prefix_kernel(q.shape[2], keys.dtype is torch.bfloat16)
        host = None if tier is None else tier.arrays
        kernel(q.numpy(), bits(keys), bits(values), host, slots.numpy(), np.float32(scale), output.numpy(), lse.numpy())
        return output, lse
    k, v = _gather(keys, values, slots, rows.dtype, tier)
    output, lse = _flash(rows.unsqueeze(1), k, v, 0.0, False, scale=scale)
    return output.squeeze(1).float(), lse.squeeze(1)


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
    """See `reference.extend`."""
    if sliding_window >= 0 or logit_cap > 0:
        return reference.extend(
            q, keys, values, slots, scale, sliding_window=sliding_window, logit_cap=logit_cap, tier=tier, sinks=sinks
        )
    new, heads, channels = q.shape
    kv_heads = keys.shape[1]
    prefix = slots.numel() - new
    grouped = q.view(new, kv_heads, -1, channels).permute(1, 2, 0, 3)  # [H, G, new, D]
    group = grouped.shape[1]
    # The new tokens' keys and values, the same for every query head of the group.
    k, v = (rows.expand(-1, group, -1, -1) for rows in _gather(keys, values, slots[prefix:], q.dtype, tier))
    output, lse = _flash(grouped, k, v, 0.0, True, scale=scale)
    if prefix:
        stacked = grouped.reshape(kv_heads, group * new, channels)
        earlier, earlier_lse = _attend_prefix(stacked, keys, values, slots[:prefix], scale, tier)
        earlier_lse = earlier_lse.view_as(lse)
        weight = torch.sigmoid(earlier_lse - lse).unsqueeze(-1)
        output, lse = torch.lerp(output.float(), earlier.view(grouped.shape), weight), torch.logaddexp(lse, earlier_lse)
    if sinks is not None:
        by_head = by_kv_head(sinks, kv_heads).unsqueeze(-1)  # the same for all new tokens
        output = add_sinks(Partial(output.float(), lse), by_head).output
    output = output.to(q.dtype)
    return output.permute(2, 0, 1, 3).reshape(new, heads, channels)
