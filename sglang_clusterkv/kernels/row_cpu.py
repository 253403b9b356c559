"""Rows as the CPU kernels read them: the index's are unpacked (memory/codec.py is the definition), the pool's converted."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import (
    LANES,
    bits,
    float_of_bf16,
    njit,
    prefetch_row,
    signed_nibble,
    unpack_nibbles,
)

INT4, INT8, BF16 = 0, 1, 2
ROW_FORMATS = {"int4": INT4, "int8": INT8, "bf16": BF16}


class RowViews(NamedTuple):
    """The same packed rows [C, H, packed_bytes], as words, half words and bytes, and their scales."""

    words: np.ndarray  # int32
    halves: np.ndarray  # uint16
    bytes: np.ndarray  # int8
    scales: np.ndarray  # uint16 (bits of bf16) [C, H, scales]; empty for rows in bf16


def row_views(packed: torch.Tensor, scales: torch.Tensor | None) -> RowViews:
    """Views of rows: packed uint8 [C, H, packed_bytes], scales bf16 [C, H, scales] or None."""
    memory = packed.numpy()
    scale_bits = np.empty((0, 0, 0), np.uint16) if scales is None else bits(scales)
    return RowViews(memory.view(np.int32), memory.view(np.uint16), memory.view(np.int8), scale_bits)


@njit(inline="always")
def decode_row(
    words: Any, halves: Any, octets: Any, scales: Any, row: int, head: int, row_format: int, channels: int,
    per_scale: int, out: Any,
) -> None:  # fmt: skip
    """Row `row` of kv head `head` as float32 into out [channels]; format and sizes are constants to the compiler."""
    eighth = channels // 8
    if row_format == INT4:
        for j in range(8):
            scale = float_of_bf16(scales[row, head, (j * eighth) // per_scale])
            if eighth % LANES == 0:
                for i in range(0, eighth, LANES):
                    unpack_nibbles(words, row, head, i, 4 * j, scale, out, j * eighth + i)
            else:
                for i in range(eighth):
                    out[j * eighth + i] = signed_nibble(words[row, head, i], 28 - 4 * j) * scale
    elif row_format == INT8:
        for group in range(channels // per_scale):
            scale = float_of_bf16(scales[row, head, group])
            for i in range(per_scale):
                out[group * per_scale + i] = np.float32(octets[row, head, group * per_scale + i]) * scale
    else:
        for i in range(channels):
            out[i] = float_of_bf16(halves[row, head, i])


KEYS, VALUES = 0, 1  # the parts of a host row


@njit(inline="always")
def load_row(
    buffer: Any, host: Any, part: int, slot: int, head: int, is_bf16: bool, channels: int, out: Any
) -> int:  # fmt: skip
    """One key or value as float32 into out [channels]; returns 1 if it was on the host.

    host: a layer's `TierArrays`; None where everything is on the device, and no code is compiled for it.
    """
    if host is None:
        for d in range(channels):
            if is_bf16:
                out[d] = float_of_bf16(buffer[slot, head, d])
            else:
                out[d] = np.float32(buffer[slot, head, d])
        away = 0
    else:
        page = slot // host.page_size
        offset = slot - page * host.page_size
        device = host.device_page[page]
        away = 0
        if device > 0:
            at = device * host.page_size + offset
            for d in range(channels):
                if is_bf16:
                    out[d] = float_of_bf16(buffer[at, head, d])
                else:
                    out[d] = np.float32(buffer[at, head, d])
        else:
            away = 1
            line = head * host.page_size + offset
            if host.rounded:
                scale = host.scales[page, line, channels // 2 + part]
                for d in range(channels):
                    out[d] = np.float32(host.rows[page, line, part * channels + d]) * scale
            else:
                for d in range(channels):
                    if is_bf16:
                        out[d] = float_of_bf16(host.rows[page, line, part * channels + d])
                    else:
                        out[d] = np.float32(host.rows[page, line, part * channels + d])
    return away


@njit(inline="always")
def prefetch(buffer: Any, host: Any, slot: int, head: int, row_bytes: int) -> None:
    """Start loading one key or value; of a row on the host both."""
    if host is None:
        prefetch_row(buffer, slot, head, row_bytes)
    else:
        page = slot // host.page_size
        offset = slot - page * host.page_size
        device = host.device_page[page]
        if device > 0:
            prefetch_row(buffer, device * host.page_size + offset, head, row_bytes)
        else:
            prefetch_row(host.rows, page, head * host.page_size + offset, host.row_bytes)


@njit(inline="always")
def prefetch_heads(buffer: Any, host: Any, slot: int, heads: int, row_bytes: int) -> None:
    """The same for all kv heads of a token, which lie together on the device."""
    if host is None:
        prefetch_row(buffer, slot, 0, heads * row_bytes)
    else:
        page = slot // host.page_size
        offset = slot - page * host.page_size
        device = host.device_page[page]
        if device > 0:
            prefetch_row(buffer, device * host.page_size + offset, 0, heads * row_bytes)
        else:
            for head in range(heads):
                prefetch_row(host.rows, page, head * host.page_size + offset, host.row_bytes)
