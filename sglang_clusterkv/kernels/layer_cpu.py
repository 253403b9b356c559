"""What stands around attention and products in a decode step on a CPU: norm, rotation, gate; in float32.

Each is one call over the few tokens of a step, for two to twenty operations of torch that last less than their calls. Tensors
are handed over by their addresses: a view of each as an array would take longer than the work.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.call_cpu import entry_of, stays_whole
from sglang_clusterkv.kernels.cpu_math import FAST, fast_exp, njit


@intrinsic
def floats_at(typing_context: Any, address: Any) -> Any:
    """A pointer to the float32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.uintp), codegen


@intrinsic
def places_at(typing_context: Any, address: Any) -> Any:
    """A pointer to the int64 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(types.uintp), codegen


@njit(cache=True, nogil=True, fastmath=FAST)
def norm_rows(
    x_at: int, added_at: int, weight_at: int, eps: Any, tokens: int, channels: int, out_at: int, sum_at: int
) -> None:
    """`rms_norm` of `tokens` rows, all by their addresses; `added_at` 0: nothing is added, and `sum_at` is not written."""
    stays_whole()
    x, out = carray(floats_at(x_at), (tokens, channels)), carray(floats_at(out_at), (tokens, channels))
    weight = carray(floats_at(weight_at), channels)
    for i in range(tokens):
        squares = np.float32(0.0)
        if added_at:
            added, whole = (
                carray(floats_at(added_at), (tokens, channels)),
                carray(floats_at(sum_at), (tokens, channels)),
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
def gate_rows(x_at: int, tokens: int, channels: int, out_at: int) -> None:
    """`silu_and_mul` of rows at `x_at`, float32 [tokens, 2 channels]."""
    stays_whole()
    x, out = carray(floats_at(x_at), (tokens, 2 * channels)), carray(floats_at(out_at), (tokens, channels))
    one = np.float32(1.0)
    for i in range(tokens):
        for d in range(channels):
            gate = x[i, d]
            out[i, d] = gate / (one + fast_exp(-gate)) * x[i, channels + d]


@njit(cache=True, nogil=True, fastmath=FAST)
def rotate_heads(
    x_at: int,
    stride: int,
    turns_at: int,
    positions_at: int,
    tokens: int,
    heads: int,
    channels: int,
    turned: int,
    halves: int,
    out_at: int,
) -> None:
    """`rotate` of rows at `x_at`, `stride` floats apart; of each head the first `turned` channels."""
    stays_whole()
    positions, half = carray(places_at(positions_at), tokens), turned // 2
    out = carray(floats_at(out_at), (tokens, heads, channels))
    for i in range(tokens):
        turn = carray(floats_at(turns_at + 4 * turned * positions[i]), turned)  # cosines, then sines
        for h in range(heads):
            x, mine = carray(floats_at(x_at + 4 * (i * stride + h * channels)), channels), out[i, h]
            for d in range(half):
                a, b = (d, half + d) if halves else (2 * d, 2 * d + 1)
                mine[a] = x[a] * turn[d] - x[b] * turn[half + d]
                mine[b] = x[b] * turn[d] + x[a] * turn[half + d]
            for d in range(turned, channels):
                mine[d] = x[d]


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
    norm_rows(
        x.data_ptr(), 0 if added is None else added.data_ptr(), weight.data_ptr(), np.float32(eps), x.numel() // channels,
        channels, out.data_ptr(), 0 if whole is None else whole.data_ptr(),
    )  # fmt: skip
    return out, whole


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """silu of the first half of channels times the second; x float32 [..., 2 D], contiguous -> [..., D]."""
    channels = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], channels))
    gate_rows(x.data_ptr(), out.numel() // max(1, channels), channels, out.data_ptr())
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
    rotate_heads(
        x.data_ptr(), x.stride(0), turns.data_ptr(), positions.data_ptr(), len(positions), x.shape[1] // channels, channels,
        turns.shape[1], int(halves), out.data_ptr(),
    )  # fmt: skip
    return out


class Addresses(NamedTuple):
    """Of compiled functions, for `call_at` with the arguments of the Python ones."""

    norm: int  # norm_rows
    gate: int  # gate_rows
    rotate: int  # rotate_heads


@functools.cache
def addresses() -> Addresses:
    """Of what others call within their own kernels."""
    place = types.int64
    return Addresses(
        entry_of(norm_rows, place, place, place, types.float32, place, place, place, place),
        entry_of(gate_rows, *[place] * 4),
        entry_of(rotate_heads, *[place] * 10),
    )


@functools.cache
def compile_layers() -> None:
    """Compile all of them."""
    x = torch.zeros(1, 4)
    for added in (None, x):
        rms_norm(x, added, x[0], 1e-6)
    silu_and_mul(x)
    for halves in (True, False):
        rotate(x, torch.zeros(1, dtype=torch.int64), x, 4, halves=halves)
