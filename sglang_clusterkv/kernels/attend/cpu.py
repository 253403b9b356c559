"""Attend on the CPU: rows of the pool meet all query heads of their kv head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.kernels.ahead_cpu import ask_rows
from sglang_clusterkv.kernels.attend import reference
from sglang_clusterkv.kernels.cpu_math import FAST, NEGLIGIBLE, bits, fast_exp, larger, njit, part
from sglang_clusterkv.kernels.merge.cpu import sinks_kernel
from sglang_clusterkv.kernels.merge.reference import by_kv_head
from sglang_clusterkv.kernels.row_cpu import KEYS, POOL_FORMATS, VALUES, pool_kernels, prefetch
from sglang_clusterkv.kernels.threads_cpu import cached, done, leave, run, take
from sglang_clusterkv.kernels.vectors_cpu import TOGETHER, row_bytes
from sglang_clusterkv.memory.tier import DENSE_HOST, RECALLED_DEVICE, RECALLED_HOST, TierLayer

if TYPE_CHECKING:  # what `cached` gives the kernel

    def block_of(*args: Any) -> int: ...


BLOCK = 512  # tokens of dense attention that a thread takes at a time
_NEAR = 32  # tokens whose keys, or values, of all heads are read before the next tokens': heads of a token lie together


@part(fastmath=FAST)
def exponentials_in_place(logits: Any, begin: int, end: int) -> Any:
    """Replace logits [begin, end) by their exponentials relative to the largest; returns (largest, their sum)."""
    most = NEGLIGIBLE
    for t in range(begin, end):
        most = larger(most, logits[t])
    total = np.float32(0.0)
    for t in range(begin, end):
        weight = fast_exp(logits[t] - most)
        logits[t] = weight
        total += weight
    return most, total


@functools.cache
def expect_pair(channels: int, pool: int) -> Callable[..., None]:
    """Compile the asking for the rows that `attend_pair` reads of one (request b, kv head h); a host tier's are left alone."""
    size = row_bytes(pool, channels)

    @part
    def expect(b: Any, h: Any, keys: Any, values: Any, host: Any, lists: Any, u: Any) -> None:
        if host is None:
            recalled, found = u.recalled[b, h], u.recalled_count[b, h]
            ask_rows(keys, recalled, found, h, size)
            ask_rows(values, lists.base_slots[b], lists.base_count[b], h, size)
            ask_rows(values, recalled, found, h, size)

    return expect


@functools.cache
def attend_pair(channels: int, group: int, pool: int) -> Callable[..., None]:
    """Compile attention of one (request b, kv head h) over its always-attended and recalled tokens, and learned sinks.

    For one head_dim, group size and pool format. Outputs: output [B, H, G, D] and lse [B, H, G], as `merge.reference.Partial`.
    """
    dots, sums = pool_kernels(channels, group, pool)

    @part(fastmath=FAST)
    def attend(
        b: Any, h: Any, t: Any, q: Any, sinks: Any, keys: Any, values: Any, host: Any, lists: Any, n: Any, u: Any,
        scratch: Any, output: Any,
    ) -> None:  # fmt: skip
        slots, logits, mine = scratch.slots[t], scratch.logits[t], output[b, h]
        base, found = lists.base_count[b], u.recalled_count[b, h]
        base_slots, recalled, base_logit = lists.base_slots[b], u.recalled[b, h], u.base_logit[b, h]
        count = base + found
        for i in range(base):
            slots[i] = base_slots[i]
        for i in range(found):
            slots[base + i] = recalled[i]
        for i in range(TOGETHER):
            slots[count + i] = slots[count - 1]
        away = dots(keys, host, KEYS, slots, base, found, h, q[b, h], logits)
        u.reads[b, h, RECALLED_HOST] = away
        u.reads[b, h, RECALLED_DEVICE] = found - away
        for g in range(group):
            of_head = logits[g]
            for i in range(base):
                of_head[i] = base_logit[g, i]
            for i in range(base, count):
                of_head[i] *= n.scale
            most, total = exponentials_in_place(of_head, 0, count)
            tokens = most + np.log(total)
            most = max(tokens, sinks[h, g])
            share = np.exp(tokens - most)
            whole = share + np.exp(sinks[h, g] - most)
            u.lse[b, h, g] = most + np.log(whole)
            inverse = share / (whole * total)
            for i in range(count):
                of_head[i] *= inverse
            for d in range(channels):
                mine[g, d] = 0.0
        sums(values, host, VALUES, slots, 0, count, h, logits, mine)

    return attend


@functools.cache
def dense_kernel(channels: int, group: int, pool: int) -> Callable[..., None]:
    """Compile attention over listed tokens for one head_dim, group size and pool format.

    q [B, H, G, D]; slots int64 [B, T]; begins and ends [B]. Blocks of tokens are handed to threads; a block leaves its sums
    relative to its largest logit in part_output [B, blocks, H, G, D] and part_lse [B, blocks, H, G, 2], which are then merged
    in order.
    """
    size = row_bytes(pool, channels)
    dots, sums = pool_kernels(channels, group, pool)

    @part(fastmath=FAST)
    def attend_block(
        b: Any, q: Any, keys: Any, values: Any, host: Any, slots: Any, begin: Any, end: Any, scale: Any,
        cap: Any, logits: Any, listed: Any, output: Any, lse: Any,
    ) -> Any:  # fmt: skip
        heads, count, away = q.shape[1], end - begin, 0
        for i in range(count + TOGETHER):
            listed[i] = slots[b, begin + min(i, count - 1)]
        for first in range(0, count, _NEAR):
            rows = min(_NEAR, count - first)
            for h in range(heads):
                for i in range(rows):
                    prefetch(keys, host, listed[min(first + _NEAR + i, count - 1)], h, size)
                away += dots(keys, host, KEYS, listed, first, rows, h, q[b, h], logits[h])
        for h in range(heads):
            for g in range(group):
                of_head = logits[h, g]
                for i in range(count):
                    of_head[i] *= scale
                if cap > 0:
                    for i in range(count):
                        of_head[i] = cap * np.tanh(of_head[i] / cap)
                lse[h, g, 0], lse[h, g, 1] = exponentials_in_place(of_head, 0, count)
                for d in range(channels):
                    output[h, g, d] = 0.0
        for first in range(0, count, _NEAR):
            rows = min(_NEAR, count - first)
            for h in range(heads):
                for i in range(rows):
                    prefetch(values, host, listed[min(first + _NEAR + i, count - 1)], h, size)
                sums(values, host, VALUES, listed, first, rows, h, logits[h], output[h])
        return away

    def dense(
        number: Any, counter: Any, items: Any, q: Any, keys: Any, values: Any, host: Any, slots: Any, begins: Any,
        ends: Any, scale: Any, cap: Any, reads: Any, part_output: Any, part_lse: Any,
    ) -> None:  # fmt: skip
        logits = np.zeros((q.shape[1], q.shape[2], BLOCK + TOGETHER), np.float32)
        listed = np.zeros(BLOCK + TOGETHER, np.int64)
        item = take(counter)
        while item < items:
            b = item // part_output.shape[1]
            block = item - b * part_output.shape[1]
            begin = begins[b] + block * BLOCK
            end = min(begin + BLOCK, ends[b])
            if begin < end:
                reads[b, block] = block_of(
                    b, q, keys, values, host, slots, begin, end, scale, cap, logits, listed, part_output[b, block],
                    part_lse[b, block],
                )  # fmt: skip
            done(counter)
            item = take(counter)
        leave(number, counter, items)

    return cached(dense, (channels, group, pool), block_of=attend_block)


@njit(cache=True, fastmath=FAST, nogil=True)
def merge_blocks(count: Any, part_output: Any, part_lse: Any, output: Any, lse: Any) -> None:
    """The first `count` [B] blocks of each item, in order, to output [B, H, G, D] and lse [B, H, G]."""
    for b in range(output.shape[0]):
        for h in range(output.shape[1]):
            for g in range(output.shape[2]):
                most = NEGLIGIBLE
                for k in range(count[b]):
                    most = max(most, part_lse[b, k, h, g, 0])
                total = np.float32(0.0)
                for d in range(output.shape[3]):
                    output[b, h, g, d] = 0.0
                for k in range(count[b]):
                    share = fast_exp(part_lse[b, k, h, g, 0] - most)
                    total += share * part_lse[b, k, h, g, 1]
                    for d in range(output.shape[3]):
                        output[b, h, g, d] += share * part_output[b, k, h, g, d]
                lse[b, h, g] = most + np.log(total)
                inverse = np.float32(1.0) / total
                for d in range(output.shape[3]):
                    output[b, h, g, d] *= inverse


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
    if keys.dtype not in POOL_FORMATS:
        return reference.dense_decode(
            q, keys, values, slots, seq_lens, scale, sliding_window=sliding_window, logit_cap=logit_cap, tier=tier,
            sinks=sinks,
        )  # fmt: skip
    kv_heads, channels = keys.shape[1:]
    grouped = q.float().unflatten(1, (kv_heads, -1)).contiguous()
    begins = torch.zeros_like(seq_lens) if sliding_window < 0 else (seq_lens - 1 - sliding_window).clamp(min=0)
    batch, _, group, _ = grouped.shape
    blocks = -(-slots.shape[1] // BLOCK)
    part_output = np.empty((batch, blocks, kv_heads, group, channels), np.float32)
    part_lse = np.empty((batch, blocks, kv_heads, group, 2), np.float32)
    reads = np.zeros((batch, blocks), np.int64)
    kernel = dense_kernel(channels, group, POOL_FORMATS[keys.dtype])
    run(
        kernel, batch * blocks, grouped.numpy(), bits(keys), bits(values), None if tier is None else tier.arrays,
        slots.numpy(), begins.numpy(), seq_lens.numpy(), np.float32(scale), np.float32(logit_cap), reads, part_output,
        part_lse,
    )  # fmt: skip
    out, lse = torch.empty_like(grouped), torch.empty(grouped.shape[:3])
    count = ((seq_lens - begins + BLOCK - 1) // BLOCK).numpy()
    merge_blocks(count, part_output, part_lse, out.numpy(), lse.numpy())
    if sinks is not None:
        sinks_kernel(out.numpy(), lse.numpy(), by_kv_head(sinks, kv_heads).numpy())
    if tier is not None:
        tier.arrays.reads[DENSE_HOST] += reads.sum()
    return out.flatten(1, 2).to(q.dtype)
