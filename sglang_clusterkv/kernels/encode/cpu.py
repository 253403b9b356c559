"""Variances, rows in 4 bits and token codes on the CPU: one pass over a head's keys each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import FAST, bits_of_float, float_of_bf16, nearest, njit
from sglang_clusterkv.kernels.encode.reference import Variance
from sglang_clusterkv.memory.codec import INNER_LEVEL, LEVEL_BORDER, OUTER_LEVEL, SLICES, RowCodec, TokenCodec
from sglang_clusterkv.memory.rotation import rotation_signs

_TOGETHER = 32  # tokens that are rotated at once
_INNER, _OUTER, _BORDER = np.float32(INNER_LEVEL), np.float32(OUTER_LEVEL), np.float32(LEVEL_BORDER)


@njit(cache=True, fastmath=FAST)
def _variance(centered: Any, centroids: Any, labels: Any, by_channel: Any, by_cluster: Any, sizes: Any) -> None:
    by_channel[:] = 0.0
    by_cluster[:] = 0.0
    sizes[:] = 0
    for i in range(centered.shape[0]):
        cluster = labels[i]
        total = np.float32(0.0)
        for d in range(centered.shape[1]):
            difference = centered[i, d] - centroids[cluster, d]
            by_channel[d] += difference * difference
            total += difference * difference
        by_cluster[cluster] += total
        sizes[cluster] += 1
    for d in range(centered.shape[1]):
        by_channel[d] /= np.float32(centered.shape[0])
    for c in range(by_cluster.shape[0]):
        by_cluster[c] /= np.float32(max(sizes[c], 1))


@njit(cache=True, fastmath=FAST)
def _rotated(keys: Any, stored: Any, labels: Any, members: Any, signs: Any, block: Any, tile: Any, out: Any) -> None:
    """Rotated residuals in the order of `members`, out [M, D]; signs [D] with the rotation's factor; tile [D, tokens at once].

    By the butterflies of Hadamard's matrix, each of which all tokens of the tile take together.
    """
    channels, together = tile.shape
    for first in range(0, keys.shape[0], together):
        count = min(together, keys.shape[0] - first)
        for i in range(count):
            member = members[first + i]
            cluster = labels[member]
            for d in range(channels):
                tile[d, i] = (keys[member, d] - stored[cluster, d]) * signs[d]
        width = 1
        while width < block:
            for begin in range(0, channels, 2 * width):
                for d in range(begin, begin + width):
                    for i in range(together):
                        x, y = tile[d, i], tile[d + width, i]
                        tile[d, i] = x + y
                        tile[d + width, i] = x - y
            width *= 2
        for i in range(count):
            for d in range(channels):
                out[first + i, d] = tile[d, i]


@njit(cache=True, fastmath=FAST)
def _encode(rotated: Any, code_bits: Any, codes: Any, scales: Any) -> None:
    """codes [M, D/8]: uint16 words of two bits per channel, or uint8 of one."""
    channels = rotated.shape[1]
    eighth = channels // SLICES
    for i in range(rotated.shape[0]):
        squares = np.float32(0.0)
        sizes = np.float32(0.0)
        for d in range(channels):
            squares += rotated[i, d] * rotated[i, d]
            sizes += abs(rotated[i, d])
        for w in range(eighth):
            codes[i, w] = 0
        if code_bits == 1:
            scales[i] = sizes / np.float32(channels)
            for d in range(channels):
                if rotated[i, d] < 0:
                    codes[i, d % eighth] |= 1 << (d // eighth)
            continue
        border = _BORDER * np.sqrt(squares / np.float32(channels))
        fit = np.float32(0.0)
        norm = np.float32(0.0)
        for d in range(channels):
            size = abs(rotated[i, d])
            level = _OUTER if size >= border else _INNER
            fit += size * level
            norm += level * level
        for j in range(SLICES):
            for w in range(eighth):
                value = rotated[i, j * eighth + w]
                crumb = (1 if abs(value) >= border else 0) + (2 if value < 0 else 0)
                codes[i, w] |= crumb << (2 * j)
        scales[i] = fit / norm


@njit(cache=True)
def _int4(x: Any, words: Any, scales: Any) -> None:
    """x [R, D] into words, uint32 [R, D/8], and scales, bf16's bits as uint16 [R, groups]. Exactly: no `FAST` here."""
    channels, groups = x.shape[1], scales.shape[1]
    eighth, group = channels // SLICES, channels // groups
    for r in range(x.shape[0]):
        for w in range(eighth):
            words[r, w] = 0
        for s in range(groups):
            largest, number = np.float32(0.0), True
            for d in range(s * group, (s + 1) * group):
                largest = max(largest, abs(x[r, d]))
                number &= x[r, d] == x[r, d]
            bits = np.int64(bits_of_float(largest / np.float32(7.0)))
            scales[r, s] = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 if number else 0x7FC0
        for j in range(SLICES):
            scale = float_of_bf16(scales[r, j * eighth // group])
            if scale > 0:
                for w in range(eighth):
                    level = min(max(nearest(x[r, j * eighth + w] / scale), np.float32(-8.0)), np.float32(7.0))
                    words[r, w] |= np.uint32((np.int32(level) & 15) << (4 * j))


def int4_rows(codec: RowCodec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `RowCodec.encode`, of a codec of 4 bits; the same to the bit."""
    rows = x.reshape(-1, codec.head_dim).contiguous()
    packed = torch.empty((*x.shape[:-1], codec.packed_bytes), dtype=torch.uint8)
    scales = torch.empty((*x.shape[:-1], codec.scales), dtype=torch.bfloat16)
    words = packed.view(-1, codec.packed_bytes).numpy().view(np.uint32)
    _int4(rows.numpy(), words, scales.view(torch.uint16).view(-1, codec.scales).numpy())
    return packed, scales


def within_variance(centered: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> Variance:
    """See `reference.within_variance`."""
    heads, _, channels = centered.shape
    clusters = centroids.shape[1]
    result = Variance(torch.empty((heads, channels)), torch.empty((heads, clusters)))
    sizes = np.empty(clusters, np.int64)
    for head in range(heads):
        _variance(
            centered[head].numpy(), centroids[head].numpy(), labels[head].numpy(), result.by_channel[head].numpy(),
            result.by_cluster[head].numpy(), sizes,
        )  # fmt: skip
    return result


def token_codes(
    keys: torch.Tensor, stored: torch.Tensor, labels: torch.Tensor, members: torch.Tensor, codec: TokenCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.token_codes`."""
    heads, tokens, channels = keys.shape
    codes = torch.empty((heads, tokens, codec.code_bytes), dtype=torch.uint8)
    scales = torch.empty((heads, tokens))
    block = channels & -channels
    signs = (rotation_signs(channels) / block**0.5).numpy()
    rotated, tile = np.empty((tokens, channels), np.float32), np.zeros((channels, _TOGETHER), np.float32)
    for head in range(heads):
        _rotated(
            keys[head].numpy(), stored[head].numpy(), labels[head].numpy(), members[head].numpy(), signs, block, tile,
            rotated,
        )  # fmt: skip
        words = codes[head].numpy()
        _encode(rotated, codec.bits, words.view(np.uint16) if codec.bits == 2 else words, scales[head].numpy())
    return codes, scales.to(torch.bfloat16)
