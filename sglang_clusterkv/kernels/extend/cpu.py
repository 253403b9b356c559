"""Prefill attention on the CPU: new tokens' queries in tiles, which meet keys and values where they lie in the pool.

A tile has the queries of neighbouring tokens, all query heads of a kv head. Keys are met in blocks, so that a block's logits
stay in a cache; blocks are of a chunk, and chunks are merged in order. Blocks and chunks begin at the same positions for
everybody: what a token gets follows from its own query and what it sees, not from what else is new, in its batch, or on which
thread. Where there are few tiles, threads share their chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import FAST, NEGLIGIBLE, address_of, bits, fast_exp, part
from sglang_clusterkv.kernels.extend import reference
from sglang_clusterkv.kernels.extend.lists import ExtendLists, extend_lists
from sglang_clusterkv.kernels.merge.reference import Partial, add_sinks, by_kv_head
from sglang_clusterkv.kernels.row_cpu import KEYS, POOL_FORMATS, VALUES, prefetch, row_loader
from sglang_clusterkv.kernels.threads_cpu import cached, done, leave, run, take, threads, wait
from sglang_clusterkv.kernels.tiles_cpu import (
    DOUBLE,
    STEP,
    TOGETHER,
    WIDTH,
    add_rows_to_tile,
    aligned,
    exponentials_of_tile,
    merge_tiles,
    multiply_rows,
    start_parts,
)
from sglang_clusterkv.kernels.vectors_cpu import FLOAT32, row_bytes, unpack_rows
from sglang_clusterkv.memory.tier import PREFILL_HOST, TierLayer

if TYPE_CHECKING:  # what `cached` gives the kernel

    def chunk_of(*args: Any) -> None: ...


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FEW_ROWS = 64  # query rows per kv head that are multiplied in float32 where queries have 16 bits
_BLOCK = 128  # tokens of a block
_CHUNK = 1024  # tokens of a chunk, a multiple of it
_FEW_TILES = 4  # tiles per thread below which threads share a tile's chunks
_AHEAD = 8  # rows of two tiers that are being loaded while one is copied
_LOG2_E = 1.4426950408889634


class _Numbers(NamedTuple):
    """What the kernel knows as numbers; logits are to the base 2."""

    scale: np.float32
    cap: np.float32  # of a logit; 0: none
    window: int  # tokens before its own that a query sees; negative: all
    chunks: int  # of a tile, which threads share; 0: they do not


@part(fastmath=FAST)
def _fill(q: Any, begin: Any, h: Any, first: Any, rows: Any, width: Any, scale: Any, tile: Any) -> None:
    """Query rows `first` and following of the tokens at `begin` into columns of a tile; q [tokens, H, G, D]."""
    group = q.shape[2]
    for j in range(rows):
        token = (first + j) // group
        row = q[begin + token, h, first + j - token * group]
        for d in range(q.shape[3]):
            tile[d, j] = row[d] * scale
    for d in range(q.shape[3]):
        for j in range(rows, width):
            tile[d, j] = np.float32(0.0)


@part(fastmath=FAST)
def _cap(logits: Any, count: Any, width: Any, cap: Any) -> None:
    for i in range(count):
        for j in range(width):
            power = fast_exp(np.float32(2.0) * logits[i, j] / cap)
            logits[i, j] = cap - np.float32(2.0) * cap / (power + np.float32(1.0))


@part
def _hide(logits: Any, first: Any, count: Any, width: Any, since: Any, last: Any) -> None:
    """Tokens `first` and following that a column does not see, of those from `since` to `last` [WIDTH]."""
    for i in range(count):
        for j in range(width):
            if first + i > last[j] or first + i < since[j]:
                logits[i, j] = NEGLIGIBLE


@part(fastmath=FAST)
def _give(
    sums: Any, most: Any, total: Any, sinks: Any, begin: Any, h: Any, first: Any, rows: Any, output: Any
) -> None:  # fmt: skip
    """Columns of a tile whose parts are all merged into rows of output [tokens, H, G, D]."""
    group = output.shape[2]
    for j in range(rows):
        token = (first + j) // group
        g = first + j - token * group
        top = max(most[0, j], sinks[h, g])
        share = np.exp2(most[0, j] - top)
        inverse = share / (total[0, j] * share + np.exp2(sinks[h, g] - top))
        row = output[begin + token, h, g]
        for d in range(output.shape[3]):
            row[d] = sums[d, j] * inverse


@functools.cache
def _chunk(channels: int, pool: int) -> Callable[..., None]:
    """Attention of a tile over some tokens of one chunk, for one head_dim and pool format."""
    size, load_row, in_place = row_bytes(pool, channels), row_loader(channels, pool), pool == FLOAT32

    @part
    def find(
        buffer: Any, host: Any, which: Any, slots: Any, first: Any, count: Any, h: Any, rows: Any, where: Any
    ) -> None:  # fmt: skip
        """Where the float32 of listed rows lie: in the pool, or in `rows` [_BLOCK, 1, D], unpacked."""
        if host is None:
            if in_place:
                for i in range(count):
                    where[i] = address_of(buffer, slots[first + i], h)
            else:
                unpack_rows(pool, channels, buffer, buffer, slots, first, count, h, rows)
                for i in range(count):
                    where[i] = address_of(rows, i, 0)
        else:
            for i in range(count):
                prefetch(buffer, host, slots[first + min(i + _AHEAD, count - 1)], h, size)
                load_row(buffer, host, which, slots[first + i], h, rows[i, 0])
                where[i] = address_of(rows, i, 0)
        for i in range(TOGETHER):
            where[count + i] = where[count - 1]

    @part
    def chunk(
        h: Any, width: Any, begin: Any, end: Any, tile: Any, since: Any, last: Any, keys: Any, values: Any, host: Any,
        slots: Any, n: Any, rows: Any, where: Any, logits: Any, keep: Any, sums: Any, most: Any, total: Any,
    ) -> None:  # fmt: skip
        of_keys, of_values = where[KEYS], where[VALUES]
        start_parts(most, total, sums)
        for first in range(begin, end, _BLOCK):
            count = min(_BLOCK, end - first)
            find(keys, host, KEYS, slots, first, count, h, rows[KEYS], of_keys)
            find(values, host, VALUES, slots, first, count, h, rows[VALUES], of_values)
            if width == WIDTH:
                multiply_rows(WIDTH, 0, of_keys, count, channels, tile, logits, of_values)
            elif width == DOUBLE:
                multiply_rows(DOUBLE, 0, of_keys, count, channels, tile, logits, of_values)
            else:
                multiply_rows(STEP, 0, of_keys, count, channels, tile, logits, of_values)
            if n.cap > 0:
                _cap(logits, count, width, n.cap)
            if first + count - 1 > last[0] or first < since[width - 1]:
                _hide(logits, first, count, width, since, last)
            if width == WIDTH:
                exponentials_of_tile(WIDTH, count, logits, most, total, keep)
                add_rows_to_tile(WIDTH, channels, of_values, count, logits, keep, sums)
            elif width == DOUBLE:
                exponentials_of_tile(DOUBLE, count, logits, most, total, keep)
                add_rows_to_tile(DOUBLE, channels, of_values, count, logits, keep, sums)
            else:
                exponentials_of_tile(STEP, count, logits, most, total, keep)
                add_rows_to_tile(STEP, channels, of_values, count, logits, keep, sums)

    return chunk


@functools.cache
def extend_kernel(channels: int, pool: int) -> Callable[..., None]:
    """Compile attention of new tokens of several requests, for one head_dim and pool format.

    q [tokens, H, G, D] float32; slots, first, begin and new as in `ExtendLists`; tiles int64 [B + 1], where a request's tiles
    begin. An item is a tile of a kv head, or a chunk of one, which then leaves its part in parts [H * tiles, chunks, D + 2,
    WIDTH]: sums, largest logits and totals of its columns. Output as q.
    """

    def extend_tiles(
        number: Any, counter: Any, items: Any, q: Any, keys: Any, values: Any, host: Any, slots: Any, first: Any, begin: Any,
        new: Any, tiles: Any, n: Any, sinks: Any, parts: Any, output: Any,
    ) -> None:  # fmt: skip
        heads, group, all_tiles, chunks = q.shape[1], q.shape[2], tiles[-1], max(n.chunks, 1)
        tile = aligned(channels * WIDTH).reshape(channels, WIDTH)
        logits = aligned((_BLOCK + TOGETHER) * WIDTH).reshape(_BLOCK + TOGETHER, WIDTH)
        room = aligned(2 * (channels + 2) * WIDTH).reshape(2, channels + 2, WIDTH)
        keep = aligned(WIDTH).reshape(1, WIDTH)
        rows = np.empty((2, _BLOCK, 1, channels), np.float32)
        where = np.empty((2, _BLOCK + TOGETHER), np.int64)
        since, last = np.empty(WIDTH, np.int64), np.empty(WIDTH, np.int64)
        # Stages: all tiles; where threads share chunks, these, and then the tiles again, for their parts.
        for stage in range(2 if n.chunks else 1):
            merges = stage == 1
            left = items // chunks if merges else items
            mine = counter[2 * stage :]
            item = take(mine)
            while item < left:
                if n.chunks and not merges:  # heads of a token lie together
                    h, of_chunk = item % heads, item // heads
                    c = of_chunk % chunks
                    t = of_chunk // chunks
                else:
                    h, c = item // all_tiles, 0
                    t = all_tiles - 1 - (item - h * all_tiles)  # those that see most come first
                pair = h * all_tiles + t
                b = 0
                while t >= tiles[b + 1]:
                    b += 1
                row = (t - tiles[b]) * WIDTH
                count = min(WIDTH, new[b] * group - row)
                width = (count + STEP - 1) // STEP * STEP
                prefix = first[b + 1] - first[b] - new[b]
                for j in range(width):
                    last[j] = prefix + (row + min(j, count - 1)) // group
                    since[j] = max(0, last[j] - n.window) if n.window >= 0 else 0
                low, high = since[0] // _BLOCK * _BLOCK, last[width - 1] + 1
                chunk, until = low // _CHUNK, (high + _CHUNK - 1) // _CHUNK
                if n.chunks and not merges:
                    chunk, until = max(chunk, c), min(until, c + 1)
                if not merges and chunk < until:
                    _fill(q, begin[b], h, row, count, width, n.scale, tile)
                whole = parts[pair, chunk] if n.chunks else room[0]
                for k in range(chunk, until):
                    to = whole if k == chunk else (parts[pair, k] if merges else room[1])
                    if not merges:
                        chunk_of(
                            h, width, max(low, k * _CHUNK), min(high, (k + 1) * _CHUNK), tile, since, last, keys, values,
                            host, slots[first[b] :], n, rows, where, logits, keep, to[:channels],
                            to[channels : channels + 1], to[channels + 1 :],
                        )  # fmt: skip
                    if k > chunk:
                        merge_tiles(
                            WIDTH, channels, whole[channels : channels + 1], whole[channels + 1 :], whole[:channels],
                            to[channels : channels + 1], to[channels + 1 :], to[:channels],
                        )  # fmt: skip
                if merges or not n.chunks:
                    _give(
                        whole[:channels], whole[channels : channels + 1], whole[channels + 1 :], sinks, begin[b], h, row,
                        count, output,
                    )  # fmt: skip
                done(mine)
                item = take(mine)
            if n.chunks and not merges:
                wait(mine, left)
            else:
                leave(number, mine, left)

    return cached(extend_tiles, (channels, pool), chunk_of=_chunk(channels, pool))


def _by_kernel(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lists: ExtendLists, rows: np.ndarray, scale: float,
    sliding_window: int, logit_cap: float, tier: TierLayer | None, sinks: torch.Tensor | None, output: torch.Tensor,
) -> None:  # fmt: skip
    """Requests with `rows` [B] query rows per kv head, 0 for those that are somebody else's, into output [tokens, heads, D]."""
    heads, channels = keys.shape[1], keys.shape[2]
    tiles = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(-(-rows // WIDTH), out=tiles[1:])
    pairs = heads * int(tiles[-1])
    chunks = -(-int(np.diff(lists.first).max()) // _CHUNK)
    if chunks == 1 or pairs >= _FEW_TILES * threads():
        chunks = 0
    numbers = _Numbers(np.float32(scale * _LOG2_E), np.float32(max(0.0, logit_cap) * _LOG2_E), sliding_window, chunks)
    parts = np.empty((pairs if chunks else 0, chunks, channels + 2, WIDTH), np.float32)
    grouped = q.float().contiguous().view(len(q), heads, -1, channels)
    group = grouped.shape[2]
    of_heads = (
        np.full((heads, group), NEGLIGIBLE) if sinks is None else by_kv_head(sinks, heads).numpy() * np.float32(_LOG2_E)
    )
    direct = output.dtype is torch.float32
    out = output if direct else torch.empty_like(output, dtype=torch.float32)
    run(
        extend_kernel(channels, POOL_FORMATS[keys.dtype]), pairs * max(chunks, 1), grouped.numpy(), bits(keys),
        bits(values), None if tier is None else tier.arrays, lists.slots.numpy(), lists.first, lists.begin, lists.new,
        tiles, numbers, of_heads, parts, out.view(grouped.shape).numpy(),
    )  # fmt: skip
    for b in np.flatnonzero(rows):
        if not direct:
            mine = slice(lists.begin[b], lists.begin[b] + lists.new[b])
            output[mine] = out[mine].to(output.dtype)
        if tier is not None:
            hidden = 0 if sliding_window < 0 else max(0, int(np.diff(lists.first)[b] - lists.new[b]) - sliding_window)
            tier.count(PREFILL_HOST, lists.slots_of(b)[hidden:])


def _by_torch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    scale: float,
    tier: TierLayer | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One request by torch's attention in q's dtype: the prefix gathered, then the new tokens, causally, and both merged."""
    new, heads, channels = q.shape
    kv_heads, prefix = keys.shape[1], len(slots) - new
    if tier is None:
        found = [buffer.index_select(0, slots) for buffer in (keys, values)]
    else:
        found = [tier.gather(buffer, part, slots) for part, buffer in enumerate((keys, values))]
        tier.count(PREFILL_HOST, slots)
    k, v = (rows.to(q.dtype).transpose(0, 1).unsqueeze(1) for rows in found)  # [H, 1, T, D]
    grouped = q.view(new, kv_heads, -1, channels).permute(1, 2, 0, 3)  # [H, G, new, D]
    group = grouped.shape[1]
    # The new tokens' keys and values, the same for every query head of the group.
    own = (rows[:, :, prefix:].expand(-1, group, -1, -1) for rows in (k, v))
    output, lse = _flash(grouped, *own, 0.0, True, scale=scale)
    if prefix:
        # Every query of the group sees all of the prefix: one matrix of them.
        stacked = grouped.reshape(kv_heads, 1, group * new, channels)
        earlier, earlier_lse = _flash(stacked, k[:, :, :prefix], v[:, :, :prefix], 0.0, False, scale=scale)
        earlier, earlier_lse = earlier.reshape(grouped.shape).float(), earlier_lse.reshape(lse.shape)
        weight = torch.sigmoid(earlier_lse - lse).unsqueeze(-1)
        output, lse = torch.lerp(output.float(), earlier, weight), torch.logaddexp(lse, earlier_lse)
    if sinks is not None:
        by_head = by_kv_head(sinks, kv_heads).unsqueeze(-1)  # the same for all new tokens
        output = add_sinks(Partial(output.float(), lse), by_head).output
    return output.to(q.dtype).permute(2, 0, 1, 3).reshape(new, heads, channels)


def extend_all(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lists: ExtendLists,
    scale: float,
    *,
    sliding_window: int = -1,
    logit_cap: float = 0.0,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.extend`, for the requests of a prefill that `lists` has.

    Args:
        q: [tokens, heads, D], of the whole batch.
        keys: see there.
        values: see there.
        lists: of those requests.
        scale: see there, as for all that follows.
        output: [tokens, heads, D], contiguous, written to; None: one is made.

    Returns:
        [tokens, heads, D] in q's dtype; lines of other requests are as they were.

    Raises:
        ValueError: lists of tokens beyond the queries.
    """
    listed = int((lists.begin + lists.new).max(initial=0))
    if listed > len(q):  # compiled code would read and write beyond its arrays
        raise ValueError(f"{listed} new tokens are listed and there are queries of {len(q)}: the model gives others")
    output = torch.empty(q.shape, dtype=q.dtype) if output is None else output
    rows = lists.new * (q.shape[1] // keys.shape[1])
    plain = sliding_window < 0 and logit_cap <= 0
    if keys.dtype not in POOL_FORMATS or q.shape[2] % TOGETHER:
        rows = np.zeros_like(rows)
    elif q.dtype is not torch.float32 and plain:
        rows = np.where(rows <= _FEW_ROWS, rows, 0)
    if rows.any():
        _by_kernel(q, keys, values, lists, rows, scale, sliding_window, logit_cap, tier, sinks, output)
    for b in np.flatnonzero((rows == 0) & (lists.new > 0)):
        mine = slice(lists.begin[b], lists.begin[b] + lists.new[b])
        if plain:
            output[mine] = _by_torch(q[mine], keys, values, lists.slots_of(b), scale, tier, sinks)
        else:
            output[mine] = reference.extend(
                q[mine], keys, values, lists.slots_of(b), scale, sliding_window=sliding_window, logit_cap=logit_cap,
                tier=tier, sinks=sinks,
            )  # fmt: skip
    return output


def extend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, scale: float, **more: Any
) -> torch.Tensor:
    """See `reference.extend`."""
    return extend_all(q, keys, values, extend_lists([slots], [len(q)]), scale, **more)
