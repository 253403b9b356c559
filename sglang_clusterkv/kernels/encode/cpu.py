"""Variances and token codes on the CPU: one pass over a head's keys each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import FAST, njit
from sglang_clusterkv.kernels.encode.reference import Variance
from sglang_clusterkv.memory.codec import INNER_LEVEL, LEVEL_BORDER, OUTER_LEVEL, SLICES, TokenCodec
from sglang_clusterkv.memory.rotation import rotation_matrix

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


@njit(cache=True)
def _residuals(keys: Any, stored: Any, labels: Any, members: Any, out: Any) -> None:
    for i in range(keys.shape[0]):
        member = members[i]
        cluster = labels[member]
        for d in range(keys.shape[1]):
            out[i, d] = keys[member, d] - stored[cluster, d]


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
    residuals = torch.empty((tokens, channels))
    for head in range(heads):
        _residuals(
            keys[head].numpy(), stored[head].numpy(), labels[head].numpy(), members[head].numpy(), residuals.numpy()
        )
        rotated = residuals @ rotation_matrix(channels).T
        words = codes[head].numpy()
        _encode(rotated.numpy(), codec.bits, words.view(np.uint16) if codec.bits == 2 else words, scales[head].numpy())
    return codes, scales.to(torch.bfloat16)
