"""Prefill attention on the CPU: the prefix by one call, the new tokens by one causal call, merged.

Only the new rows are computed. The query heads of a kv head are rows of one matrix where the mask allows it, so that keys
are read once for all of them. A few new tokens, as after a radix hit, read the prefix from the pool; many are worth
gathering it once for torch's attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.kernels.attend.cpu import exponentials_in_place, merge_blocks
from sglang_clusterkv.kernels.cpu_math import FAST, bits, part
from sglang_clusterkv.kernels.extend import reference
from sglang_clusterkv.kernels.merge.reference import Partial, add_sinks, by_kv_head
from sglang_clusterkv.kernels.row_cpu import KEYS, POOL_FORMATS, VALUES, pool_kernels
from sglang_clusterkv.kernels.threads_cpu import cached, done, leave, run, take
from sglang_clusterkv.kernels.vectors_cpu import TOGETHER
from sglang_clusterkv.memory.tier import PREFILL_HOST, TierLayer

if TYPE_CHECKING:  # what `cached` gives the kernel

    def block_of(*args: Any) -> int: ...


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FEW_ROWS = 64  # query rows per kv head up to which the pool is read in place
_BLOCK = 256  # prefix tokens that a thread takes at a time
_TILE = 4  # query rows that a row of the pool meets at a time


@functools.cache
def prefix_kernel(channels: int, pool: int) -> Callable[..., None]:
    """Compile attention of many query rows per kv head over listed tokens, for one head_dim and pool format.

    q [H, R, D] float32, R a multiple of `_TILE`; slots [T]. Blocks of tokens are handed to threads, and each leaves its part of
    a softmax, as `attend.cpu.dense_kernel` does: part_output [H, blocks, 1, R, D], part_lse [H, blocks, 1, R, 2].
    """
    dots, sums = pool_kernels(channels, _TILE, pool)

    @part(fastmath=FAST)
    def attend_block(
        h: Any, q: Any, keys: Any, values: Any, host: Any, slots: Any, first: Any, count: Any, scale: Any, logits: Any,
        listed: Any, output: Any, lse: Any,
    ) -> Any:  # fmt: skip
        away = 0
        for i in range(count + TOGETHER):
            listed[i] = slots[first + min(i, count - 1)]
        for r in range(0, q.shape[1], _TILE):
            away = dots(keys, host, KEYS, listed, 0, count, h, q[h, r : r + _TILE], logits[r : r + _TILE])
        for r in range(q.shape[1]):
            of_row = logits[r]
            for i in range(count):
                of_row[i] *= scale
            lse[r, 0], lse[r, 1] = exponentials_in_place(of_row, 0, count)
            for d in range(channels):
                output[r, d] = 0.0
        for r in range(0, q.shape[1], _TILE):
            sums(values, host, VALUES, listed, 0, count, h, logits[r : r + _TILE], output[r : r + _TILE])
        return away

    def prefix(
        number: Any, counter: Any, items: Any, q: Any, keys: Any, values: Any, host: Any, slots: Any, scale: Any,
        reads: Any, part_output: Any, part_lse: Any,
    ) -> None:  # fmt: skip
        blocks, total = part_output.shape[1], slots.shape[0]
        logits = np.zeros((q.shape[1], _BLOCK + TOGETHER), np.float32)
        listed = np.zeros(_BLOCK + TOGETHER, np.int64)
        item = take(counter)
        while item < items:
            h = item // blocks
            block = item - h * blocks
            first = block * _BLOCK
            reads[h, block] = block_of(
                h, q, keys, values, host, slots, first, min(_BLOCK, total - first), scale, logits, listed,
                part_output[h, block, 0], part_lse[h, block, 0],
            )  # fmt: skip
            done(counter)
            item = take(counter)
        leave(number, counter, items)

    return cached(prefix, (channels, pool), block_of=attend_block)


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
    if rows.shape[1] <= _FEW_ROWS and keys.dtype in POOL_FORMATS:
        q = torch.nn.functional.pad(rows.float(), (0, 0, 0, -rows.shape[1] % _TILE)).contiguous()
        heads, lines, channels = q.shape
        blocks = -(-slots.numel() // _BLOCK)
        part_output = np.empty((heads, blocks, 1, lines, channels), np.float32)
        part_lse = np.empty((heads, blocks, 1, lines, 2), np.float32)
        reads = np.zeros((heads, blocks), np.int64)
        run(
            prefix_kernel(channels, POOL_FORMATS[keys.dtype]), heads * blocks, q.numpy(), bits(keys), bits(values),
            None if tier is None else tier.arrays, slots.numpy(), np.float32(scale), reads, part_output, part_lse,
        )  # fmt: skip
        output, lse = torch.empty((heads, 1, lines, channels)), torch.empty((heads, 1, lines))
        count = np.full(heads, blocks, np.int64)
        merge_blocks(count, part_output, part_lse, output.numpy(), lse.numpy())
        if tier is not None:
            tier.arrays.reads[PREFILL_HOST] += reads.sum()
        return output[:, 0, : rows.shape[1]], lse[:, 0, : rows.shape[1]]
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
        earlier, earlier_lse = earlier.reshape(grouped.shape), earlier_lse.reshape(lse.shape)
        weight = torch.sigmoid(earlier_lse - lse).unsqueeze(-1)
        output, lse = torch.lerp(output.float(), earlier, weight), torch.logaddexp(lse, earlier_lse)
    if sinks is not None:
        by_head = by_kv_head(sinks, kv_heads).unsqueeze(-1)  # the same for all new tokens
        output = add_sinks(Partial(output.float(), lse), by_head).output
    output = output.to(q.dtype)
    return output.permute(2, 0, 1, 3).reshape(new, heads, channels)
