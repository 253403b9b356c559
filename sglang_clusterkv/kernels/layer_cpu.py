"""What stands around attention in a decode step on a CPU: products with weights, norm, rotation, gate; in float32.

Each is one call over the few tokens of a step. A product reads its weights once, a row at a time for all tokens, as fast as
memory gives them. The others take torch two to twenty operations that last less than their calls. Tensors are handed over by
their addresses: a view of each as an array would take longer than the work.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import FAST, fast_exp, njit
from sglang_clusterkv.kernels.threads_cpu import done, leave, run, take

_BLOCK = 32 << 10  # weights that a thread takes at a time
_SHARED = 512 << 10  # weights from which on waking another thread costs less than it does


@intrinsic
def _floats_at(typing_context: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.uintp), codegen


@njit(cache=True, nogil=True, fastmath=FAST)
def _norm(
    x_at: int, added_at: int, weight_at: int, eps: Any, tokens: int, channels: int, out_at: int, sum_at: int
) -> None:
    x, out = carray(_floats_at(x_at), (tokens, channels)), carray(_floats_at(out_at), (tokens, channels))
    weight = carray(_floats_at(weight_at), channels)
    for i in range(tokens):
        squares = np.float32(0.0)
        if added_at:
            added, whole = (
                carray(_floats_at(added_at), (tokens, channels)),
                carray(_floats_at(sum_at), (tokens, channels)),
            )
            for d in range(channels):
                value = x[i, d] + added[i, d]
                whole[i, d] = value
                squares += value * value
            row = whole[i]
        else:
            for d in range(channels):
                squares += x[i, d] * x[i, d]
            row = x[i]
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(channels) + eps)
        for d in range(channels):
            out[i, d] = row[d] * scale * weight[d]


@njit(cache=True, nogil=True, fastmath=FAST)
def _gated(x_at: int, tokens: int, channels: int, out_at: int) -> None:
    x, out = carray(_floats_at(x_at), (tokens, 2 * channels)), carray(_floats_at(out_at), (tokens, channels))
    one = np.float32(1.0)
    for i in range(tokens):
        for d in range(channels):
            gate = x[i, d]
            out[i, d] = gate / (one + fast_exp(-gate)) * x[i, channels + d]


@njit(cache=True, nogil=True, fastmath=FAST)
def _rotated(
    x_at: int,
    stride: int,
    turns_at: int,
    positions: Any,
    heads: int,
    channels: int,
    turned: int,
    halves: bool,
    out_at: int,
) -> None:
    tokens, half = len(positions), turned // 2
    out = carray(_floats_at(out_at), (tokens, heads, channels))
    for i in range(tokens):
        turn = carray(_floats_at(turns_at + 4 * turned * positions[i]), turned)  # cosines, then sines
        for h in range(heads):
            x, mine = carray(_floats_at(x_at + 4 * (i * stride + h * channels)), channels), out[i, h]
            for d in range(half):
                a, b = (d, half + d) if halves else (2 * d, 2 * d + 1)
                mine[a] = x[a] * turn[d] - x[b] * turn[half + d]
                mine[b] = x[b] * turn[d] + x[a] * turn[half + d]
            for d in range(turned, channels):
                mine[d] = x[d]


@njit(cache=True, nogil=True, fastmath=FAST)
def _products(
    number: int, counter: Any, items: int, x_at: int, tokens: int, channels: int, weight_at: int, rows: int, each: int,
    bias_at: int, out_at: int,
) -> None:  # fmt: skip
    x, weight = carray(_floats_at(x_at), (tokens, channels)), carray(_floats_at(weight_at), (rows, channels))
    out, zero = carray(_floats_at(out_at), (tokens, rows)), np.float32(0.0)
    fours, twos = tokens // 4 * 4, tokens // 2 * 2
    item = take(counter)
    while item < items:
        for r in range(item * each, min(rows, (item + 1) * each)):
            row = weight[r]
            added = carray(_floats_at(bias_at), rows)[r] if bias_at else zero
            for i in range(0, fours, 4):
                a, b, c, d = zero, zero, zero, zero
                for k in range(channels):
                    a += row[k] * x[i, k]
                    b += row[k] * x[i + 1, k]
                    c += row[k] * x[i + 2, k]
                    d += row[k] * x[i + 3, k]
                out[i, r], out[i + 1, r], out[i + 2, r], out[i + 3, r] = a + added, b + added, c + added, d + added
            for i in range(fours, twos, 2):
                a, b = zero, zero
                for k in range(channels):
                    a += row[k] * x[i, k]
                    b += row[k] * x[i + 1, k]
                out[i, r], out[i + 1, r] = a + added, b + added
            for i in range(twos, tokens):
                a = zero
                for k in range(channels):
                    a += row[k] * x[i, k]
                out[i, r] = a + added
        done(counter)
        item = take(counter)
    leave(number, counter, items)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Products of a few tokens with a layer's weights; all float32 and contiguous.

    Args:
        x: [tokens, D].
        weight: [N, D].
        bias: [N], added; None: nothing.

    Returns:
        [tokens, N].
    """
    (tokens, channels), rows = x.shape, len(weight)
    out = x.new_empty((tokens, rows))
    each = max(1, _BLOCK // max(1, channels))
    run(
        _products, -(-rows // each), x.data_ptr(), tokens, channels, weight.data_ptr(), rows, each,
        0 if bias is None else bias.data_ptr(), out.data_ptr(), most=None if weight.numel() >= _SHARED else 1,
    )  # fmt: skip
    return out


def rms_norm(
    x: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x over its root mean square, times a weight; all float32 and contiguous.

    Args:
        x: [..., D].
        added: likewise, added to x before; None: nothing.
        weight: [D].
        eps: added to the mean square.

    Returns:
        [..., D], and the sum of x and what was added to it; None without that.
    """
    out, channels = torch.empty_like(x), x.shape[-1]
    whole = None if added is None else torch.empty_like(x)
    _norm(
        x.data_ptr(), 0 if added is None else added.data_ptr(), weight.data_ptr(), np.float32(eps), x.numel() // channels,
        channels, out.data_ptr(), 0 if whole is None else whole.data_ptr(),
    )  # fmt: skip
    return out, whole


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of channels times the second; x float32 [..., 2 D], contiguous -> [..., D]."""
    channels = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    _gated(x.data_ptr(), out.numel() // max(1, channels), channels, out.data_ptr())
    return out


def rotate(
    x: torch.Tensor, positions: torch.Tensor, turns: torch.Tensor, channels: int, *, halves: bool
) -> torch.Tensor:
    """Heads of queries or keys, rotated by their positions.

    Args:
        x: float32 [tokens, heads * channels], each token's contiguous.
        positions: int64 [tokens].
        turns: float32 [positions, turned], contiguous: cosines and sines of the first `turned` channels of a head.
        channels: of a head.
        halves: a channel is paired with the one half of the turned ones further; else with its neighbour.

    Returns:
        [tokens, heads * channels], contiguous.
    """
    out = x.new_empty(x.shape)
    _rotated(
        x.data_ptr(), x.stride(0), turns.data_ptr(), positions.numpy(), x.shape[1] // channels, channels, turns.shape[1],
        halves, out.data_ptr(),
    )  # fmt: skip
    return out


@functools.cache
def compile_layers() -> None:
    """Compile all of them."""
    x = torch.zeros(1, 4)
    for added in (None, x):
        rms_norm(x, added, x[0], 1e-6)
    silu_and_mul(x)
    linear(x, x)
    for halves in (True, False):
        rotate(x, torch.zeros(1, dtype=torch.int64), x, 4, halves=halves)
