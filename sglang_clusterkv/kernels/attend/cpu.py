"""Attend on the CPU: rows of the pool are converted once per kv head and meet all query heads of the group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.attend import reference
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
from sglang_clusterkv.kernels.merge.cpu import sinks_kernel
from sglang_clusterkv.kernels.merge.reference import by_kv_head
from sglang_clusterkv.kernels.row_cpu import KEYS, VALUES, load_row, prefetch, prefetch_heads
from sglang_clusterkv.memory.tier import DENSE_HOST, RECALLED_DEVICE, RECALLED_HOST, TierLayer

TOKENS_AHEAD = 4  # tokens whose keys or values of all heads are being loaded while one is computed


@njit(inline="always")
def softmax_in_place(logits: Any, begin: int, end: int) -> Any:
    """Replace logits [begin, end) by their softmax; returns their log-sum-exp."""
    most = NEGLIGIBLE
    for t in range(begin, end):
        most = max(most, logits[t])
    total = np.float32(0.0)
    for t in range(begin, end):
        weight = fast_exp(logits[t] - most)
        logits[t] = weight
        total += weight
    inverse = np.float32(1.0) / total
    for t in range(begin, end):
        logits[t] *= inverse
    return most + np.log(total)


@functools.cache
def attend_kernel(channels: int, group: int, is_bf16: bool) -> Callable[..., None]:
    """Compile attention over the always-attended and the recalled tokens for one head_dim, group size and pool dtype.

    Outputs: output [B, H, G, D] and lse [B, H, G], as `merge.reference.Partial`.
    """
    row_bytes = channels * (2 if is_bf16 else 4)

    @njit(cache=True, fastmath=FAST, nogil=True)
    def kernel(
        q: Any, keys: Any, values: Any, host: Any, base_slots: Any, base_count: Any, base_logit: Any, recalled: Any,
        recalled_count: Any, scale: Any, output: Any, lse: Any,
    ) -> None:  # fmt: skip
        row = np.empty(channels, np.float32)
        rows = np.empty((ROWS_AT_ONCE, channels), np.float32)
        dots = np.empty(group, np.float32)
        slots = np.empty(base_slots.shape[1] + recalled.shape[2], np.int64)
        logits = np.zeros((group, slots.shape[0] + ROWS_AT_ONCE), np.float32)
        for b in range(q.shape[0]):
            base = base_count[b]
            for h in range(q.shape[1]):
                count = base + recalled_count[b, h]
                for t in range(base):
                    slots[t] = base_slots[b, t]
                for t in range(base, count):
                    slots[t] = recalled[b, h, t - base]
                for g in range(group):
                    for t in range(base):
                        logits[g, t] = base_logit[b, h, g, t]
                away = 0
                for t in range(base, count):
                    prefetch(keys, host, slots[min(t + ROWS_AHEAD, count - 1)], h, row_bytes)
                    away += load_row(keys, host, KEYS, slots[t], h, is_bf16, channels, row)
                    dot_group(q[b, h], row, group, channels, dots)
                    for g in range(group):
                        logits[g, t] = dots[g] * scale
                if host is not None:
                    host.reads[RECALLED_HOST] += away
                    host.reads[RECALLED_DEVICE] += count - base - away
                for g in range(group):
                    lse[b, h, g] = softmax_in_place(logits[g], 0, count)
                    for t in range(count, count + ROWS_AT_ONCE):
                        logits[g, t] = 0.0
                    for d in range(channels):
                        output[b, h, g, d] = 0.0
                for t in range(0, count, ROWS_AT_ONCE):
                    for k in range(ROWS_AT_ONCE):
                        prefetch(values, host, slots[min(t + k + ROWS_AHEAD, count - 1)], h, row_bytes)
                        load_row(values, host, VALUES, slots[min(t + k, count - 1)], h, is_bf16, channels, rows[k])
                    add_rows(logits, t, rows, group, channels, output[b, h])

    return kernel


@functools.cache
def dense_kernel(channels: int, group: int, is_bf16: bool) -> Callable[..., None]:
    """Compile attention over listed tokens for one head_dim, group size and pool dtype.

    Outputs: out [B, H, G, D] and lse [B, H, G]. All kv heads of a token are read before the next token: they lie together.
    """
    row_bytes = channels * (2 if is_bf16 else 4)

    @njit(cache=True, fastmath=FAST, nogil=True)
    def kernel(
        q: Any,
        keys: Any,
        values: Any,
        host: Any,
        slots: Any,
        begins: Any,
        ends: Any,
        scale: Any,
        cap: Any,
        out: Any,
        lse: Any,
    ) -> None:
        heads = q.shape[1]
        row = np.empty(channels, np.float32)
        rows = np.empty((ROWS_AT_ONCE, channels), np.float32)
        dots = np.empty(group, np.float32)
        logits = np.zeros((heads, group, slots.shape[1] + ROWS_AT_ONCE), np.float32)
        for b in range(q.shape[0]):
            begin, end = begins[b], ends[b]
            away = 0
            for t in range(begin, end):
                prefetch_heads(keys, host, slots[b, min(t + TOKENS_AHEAD, end - 1)], heads, row_bytes)
                for h in range(heads):
                    away += load_row(keys, host, KEYS, slots[b, t], h, is_bf16, channels, row)
                    dot_group(q[b, h], row, group, channels, dots)
                    for g in range(group):
                        logits[h, g, t] = dots[g] * scale
            if host is not None:
                host.reads[DENSE_HOST] += away
            for h in range(heads):
                for g in range(group):
                    if cap > 0:
                        for t in range(begin, end):
                            logits[h, g, t] = cap * np.tanh(logits[h, g, t] / cap)
                    lse[b, h, g] = softmax_in_place(logits[h, g], begin, end)
                    for t in range(end, end + ROWS_AT_ONCE):
                        logits[h, g, t] = 0.0
                    for d in range(channels):
                        out[b, h, g, d] = 0.0
            for t in range(begin, end, ROWS_AT_ONCE):
                for k in range(ROWS_AT_ONCE):
                    prefetch_heads(values, host, slots[b, min(t + k + TOKENS_AHEAD, end - 1)], heads, row_bytes)
                for h in range(heads):
                    for k in range(ROWS_AT_ONCE):
                        load_row(values, host, VALUES, slots[b, min(t + k, end - 1)], h, is_bf16, channels, rows[k])
                    add_rows(logits[h], t, rows, group, channels, out[b, h])

    return kernel


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
    """See `reference.dense_decode`."""
    if keys.dtype not in (torch.bfloat16, torch.float32):
        return reference.dense_decode(
            q, keys, values, slots, seq_lens, scale, sliding_window=sliding_window, logit_cap=logit_cap, tier=tier,
            sinks=sinks,
        )  # fmt: skip
    kv_heads, channels = keys.shape[1:]
    grouped = q.float().unflatten(1, (kv_heads, -1)).contiguous()
    begins = torch.zeros_like(seq_lens) if sliding_window < 0 else (seq_lens - 1 - sliding_window).clamp(min=0)
    out, lse = torch.empty_like(grouped), torch.empty(grouped.shape[:3])
    host = None if tier is None else tier.arrays
    kernel = dense_kernel(channels, grouped.shape[2], keys.dtype is torch.bfloat16)
    kernel(
        grouped.numpy(), bits(keys), bits(values), host, slots.numpy(), begins.numpy(), seq_lens.numpy(),
        np.float32(scale), np.float32(logit_cap), out.numpy(), lse.numpy(),
    )  # fmt: skip
    if sinks is not None:
        sinks_kernel(out.numpy(), lse.numpy(), by_kv_head(sinks, kv_heads).numpy())
    return out.flatten(1, 2).to(q.dtype)
