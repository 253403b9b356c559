"""Products of a layer's weights with more tokens than a decode step has, on a CPU: tiles of tokens meet rows of weights.

A row of weights is read where it lies, for all tokens of a tile at once. Sums are in the order of channels, so what a token
gets does not depend on the others.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import njit
from sglang_clusterkv.kernels.threads_cpu import done, leave, run, take, wait
from sglang_clusterkv.kernels.tiles_cpu import DOUBLE, STEP, TOGETHER, WIDTH, aligned, multiply_rows

_TILES = 10  # of tokens whose products are computed in one go
_ROWS = 64  # of weights that a thread takes at a time
_DEPTH = 1024  # channels of a tile that meet a thread's rows at a time, so that they stay in a cache
_TURNED = 64  # channels of a tile that a thread turns at a time
_NONE = np.empty(0, np.float32)


@njit(cache=True, nogil=True)
def _products(
    number: Any, counter: Any, items: Any, x: Any, weight_at: Any, rows: Any, bias: Any, tiles: Any, out: Any
) -> None:  # fmt: skip
    tokens, channels = x.shape
    # Tokens into tiles [T, channels, WIDTH], all of which every item reads.
    turned, pieces = counter[2:], (channels + _TURNED - 1) // _TURNED
    item = take(turned)
    while item < len(tiles) * pieces:
        t = item // pieces
        tile, first, begin = tiles[t], t * WIDTH, (item - t * pieces) * _TURNED
        count, end = min(WIDTH, tokens - first), min(channels, begin + _TURNED)
        for j in range(count):
            for d in range(begin, end):
                tile[d, j] = x[first + j, d]
        for d in range(begin, end):
            for j in range(count, WIDTH):
                tile[d, j] = np.float32(0.0)
        done(turned)
        item = take(turned)
    wait(turned, len(tiles) * pieces)
    where = np.empty(_ROWS + TOGETHER, np.int64)
    found = aligned((_ROWS + TOGETHER) * WIDTH).reshape(_ROWS + TOGETHER, WIDTH)
    item = take(counter)
    while item < items:
        begin = item * _ROWS
        size = min(_ROWS, rows - begin)
        for t in range(len(tiles)):
            count = min(WIDTH, tokens - t * WIDTH)
            found[:] = np.float32(0.0)
            for k in range(0, channels, _DEPTH):
                for i in range(size + TOGETHER):
                    where[i] = weight_at + 4 * (channels * (begin + min(i, size - 1)) + k)
                depth, tile = min(_DEPTH, channels - k), tiles[t, k:]
                if count > DOUBLE:
                    multiply_rows(WIDTH, 1, where, size, depth, tile, found, where)
                elif count > STEP:
                    multiply_rows(DOUBLE, 1, where, size, depth, tile, found, where)
                else:
                    multiply_rows(STEP, 1, where, size, depth, tile, found, where)
            for j in range(count):
                row = out[t * WIDTH + j]
                for i in range(size):
                    row[begin + i] = found[i, j]
                if len(bias):
                    for i in range(begin, begin + size):
                        row[i] += bias[i]
        done(counter)
        item = take(counter)
    leave(number, counter, items)


def linear_by_tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Products of tokens with a layer's weights; all float32 and contiguous.

    Args:
        x: [tokens, D].
        weight: [N, D].
        bias: [N], added; None: nothing.

    Returns:
        [tokens, N].
    """
    (tokens, channels), rows = x.shape, len(weight)
    out = x.new_empty((tokens, rows))
    at_once = _TILES * WIDTH
    room = np.empty(-(-min(tokens, at_once) // WIDTH) * channels * WIDTH + 16, np.float32)
    room = room[-room.ctypes.data % 64 // 4 :]  # from where a line of memory begins
    given, products, added = x.numpy(), out.numpy(), _NONE if bias is None else bias.detach().numpy()
    for first in range(0, tokens, at_once):
        part = slice(first, min(tokens, first + at_once))
        tiles = -(-(part.stop - first) // WIDTH)
        run(
            _products, -(-rows // _ROWS), given[part], weight.data_ptr(), rows, added,
            room[: tiles * channels * WIDTH].reshape(tiles, channels, WIDTH), products[part],
        )  # fmt: skip
    return out


@functools.cache
def compile_tiles() -> None:
    """Compile them."""
    x = torch.zeros(1, 4)
    linear_by_tiles(x, x, x[0])
