"""Rows of the pool as the CPU kernels find them: in its buffers, or with a host tier copied together from both tiers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import FAST, float_of_bf16, njit, part, prefetch_row
from sglang_clusterkv.kernels.vectors_cpu import BF16, E4M3, E5M2, FLOAT32, TOGETHER, add_rows, dot_rows, row_bytes

KEYS, VALUES = 0, 1  # the parts of a host row
COPIED = 64  # rows of both tiers that are copied together at a time
# Of pools that the kernels read; others go by the references.
POOL_FORMATS = {
    torch.float32: FLOAT32, torch.bfloat16: BF16, torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2,
}  # fmt: skip
_CODES = torch.arange(256, dtype=torch.uint8)
_E4M3, _E5M2 = (_CODES.view(dtype).float().numpy() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))


@njit(inline="always")
def _same(stored: Any) -> Any:
    return np.float32(stored)


@njit(inline="always")
def _of_e4m3(stored: Any) -> Any:
    return _E4M3[stored]


@njit(inline="always")
def _of_e5m2(stored: Any) -> Any:
    return _E5M2[stored]


_NUMBERS = {FLOAT32: _same, BF16: float_of_bf16, E4M3: _of_e4m3, E5M2: _of_e5m2}  # a stored channel as float32


@functools.cache
def row_loader(channels: int, pool: int) -> Callable[..., Any]:
    """A function that loads rows of one head_dim and pool format, see there."""
    number = _NUMBERS[pool]

    @njit(inline="always")
    def load_row(buffer: Any, host: Any, part: int, slot: int, head: int, out: Any) -> int:
        """One key or value as float32 into out [channels]; returns 1 if it was on the host.

        host: a layer's `TierArrays`; None where everything is on the device, and no code is compiled for it.
        """
        if host is None:
            for d in range(channels):
                out[d] = number(buffer[slot, head, d])
            away = 0
        else:
            page = slot // host.page_size
            offset = slot - page * host.page_size
            device = host.device_page[page]
            away = 0
            if device > 0:
                at = device * host.page_size + offset
                for d in range(channels):
                    out[d] = number(buffer[at, head, d])
            else:
                away = 1
                line = head * host.page_size + offset
                if host.rounded:
                    scale = host.scales[page, line, channels // 2 + part]
                    for d in range(channels):
                        out[d] = np.float32(host.rows[page, line, part * channels + d]) * scale
                else:
                    for d in range(channels):
                        out[d] = number(host.rows[page, line, part * channels + d])
        return away

    return load_row


@njit(inline="always")
def prefetch(buffer: Any, host: Any, slot: int, head: int, size: int) -> None:
    """Start loading one key or value of `size` bytes; of a row on the host both."""
    if host is None:
        prefetch_row(buffer, slot, head, size)
    else:
        page = slot // host.page_size
        offset = slot - page * host.page_size
        device = host.device_page[page]
        if device > 0:
            prefetch_row(buffer, device * host.page_size + offset, head, size)
        else:
            prefetch_row(host.rows, page, head * host.page_size + offset, host.row_bytes)


@functools.cache
def pool_kernels(channels: int, group: int, pool: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Dot products with listed rows of the pool, and weighted sums of them, for one head_dim, group size and pool format.

    Both take (buffer, host, part, slots int64 [n], begin, count, head, ...) and then (q [G, D], out [G, n]) or (weights [G, n],
    out [G, D]), as `dot_rows` and `add_rows` do, and return how many rows were on the host. Rows of two tiers are copied
    together first, and give the same bits.
    """
    size, load_row = row_bytes(pool, channels), row_loader(channels, pool)

    @part(fastmath=FAST)
    def copied(buffer: Any, host: Any, part: Any, slots: Any, begin: Any, count: Any, head: Any, tile: Any) -> Any:
        away = 0
        for i in range(count):
            ahead = min(begin + i + TOGETHER, begin + count - 1)
            prefetch(buffer, host, slots[ahead], head, size)
            away += load_row(buffer, host, part, slots[begin + i], head, tile[i, 0])
        return away

    @part(fastmath=FAST)
    def dots(
        buffer: Any, host: Any, part: Any, slots: Any, begin: Any, count: Any, head: Any, q: Any, out: Any
    ) -> Any:  # fmt: skip
        away = 0
        if host is None:
            dot_rows(pool, channels, group, buffer, buffer, slots, begin, count, head, q, out)
        else:
            tile = np.zeros((COPIED + TOGETHER, 1, channels), np.float32)
            order = np.arange(COPIED + TOGETHER)
            for first in range(begin, begin + count, COPIED):
                rows = min(COPIED, begin + count - first)
                away += copied(buffer, host, part, slots, first, rows, head, tile)
                dot_rows(FLOAT32, channels, group, tile, tile, order, 0, rows, 0, q, out[:, first:])
        return away

    @part(fastmath=FAST)
    def sums(
        buffer: Any, host: Any, part: Any, slots: Any, begin: Any, count: Any, head: Any, weights: Any, out: Any
    ) -> Any:  # fmt: skip
        away = 0
        if host is None:
            add_rows(pool, channels, group, buffer, buffer, slots, begin, count, head, weights, out)
        else:
            tile = np.empty((COPIED, 1, channels), np.float32)
            order = np.arange(COPIED)
            for first in range(begin, begin + count, COPIED):
                rows = min(COPIED, begin + count - first)
                away += copied(buffer, host, part, slots, first, rows, head, tile)
                add_rows(FLOAT32, channels, group, tile, tile, order, 0, rows, 0, weights[:, first:], out)
        return away

    return dots, sums
