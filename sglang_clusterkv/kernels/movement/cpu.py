"""Movement of values with keys on the CPU: one pass over a head's keys and values, then over their covariance alone.

Sums run in an order that is fixed, so that nothing depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import FAST, njit
from sglang_clusterkv.kernels.movement.reference import LEAST_SQUARE, PASSES, start_rows

_LEAST = np.float32(LEAST_SQUARE)
_TOGETHER = 8  # tokens that are added to the covariance at a time


@njit(cache=True, fastmath=FAST)
def _covariance(keys: Any, centroids: Any, values: Any, means: Any, labels: Any, out: Any) -> None:
    """Of values and keys around their cluster's means, into out [D, D]."""
    tokens, channels = keys.shape
    apart, moved = np.zeros((_TOGETHER, channels), np.float32), np.zeros((_TOGETHER, channels), np.float32)
    out[:] = 0.0
    for first in range(0, tokens, _TOGETHER):
        for i in range(_TOGETHER):
            token = first + i
            if token < tokens:
                cluster = labels[token]
                for d in range(channels):
                    apart[i, d] = keys[token, d] - centroids[cluster, d]
                    moved[i, d] = values[token, d] - means[cluster, d]
            else:
                apart[i] = 0.0
        k0, k1, k2, k3 = apart[0], apart[1], apart[2], apart[3]
        k4, k5, k6, k7 = apart[4], apart[5], apart[6], apart[7]
        for a in range(channels):
            row, v = out[a], moved[:, a]
            v0, v1, v2, v3, v4, v5, v6, v7 = v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]
            for d in range(channels):
                first_four = v0 * k0[d] + v1 * k1[d] + v2 * k2[d] + v3 * k3[d]
                row[d] += first_four + (v4 * k4[d] + v5 * k5[d] + v6 * k6[d] + v7 * k7[d])
    share = np.float32(1.0) / np.float32(tokens)
    for a in range(channels):
        for d in range(channels):
            out[a, d] *= share


@njit(cache=True, fastmath=FAST)
def _orthonormal(rows: Any) -> None:
    """`reference.orthonormal` in place, rows [R, D]."""
    count, channels = rows.shape
    squares = np.empty(count, np.float32)
    for j in range(count):
        squares[j] = _dot(rows[j], rows[j])
    for j in range(count):
        square = _dot(rows[j], rows[j])
        scale = np.float32(0.0) if square <= _LEAST * squares[j] else np.float32(1.0) / np.sqrt(square)
        for d in range(channels):
            rows[j, d] *= scale
        for i in range(j + 1, count):
            part = _dot(rows[i], rows[j])
            for d in range(channels):
                rows[i, d] -= part * rows[j, d]


@njit(cache=True, fastmath=FAST)
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0.0)
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@njit(cache=True, fastmath=FAST)
def _by_values(covariance: Any, meets: Any, adds: Any) -> None:
    """adds = meets covariance^T."""
    for j in range(len(meets)):
        for a in range(len(covariance)):
            adds[j, a] = _dot(covariance[a], meets[j])


@njit(cache=True, fastmath=FAST)
def _factors(covariance: Any, meets: Any, adds: Any) -> None:
    """`reference.factors_of` from the start in meets [R, D]."""
    for _ in range(PASSES):
        _by_values(covariance, meets, adds)
        _orthonormal(adds)
        for j in range(len(meets)):
            meets[j] = 0.0
            for a in range(len(covariance)):
                part = adds[j, a]
                for d in range(covariance.shape[1]):
                    meets[j, d] += part * covariance[a, d]
        _orthonormal(meets)
    _by_values(covariance, meets, adds)


def factors(
    keys: torch.Tensor,
    centroids: torch.Tensor,
    values: torch.Tensor,
    mean_values: torch.Tensor,
    labels: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.factors`."""
    heads, _, channels = keys.shape
    meets = start_rows(rank, channels, "cpu").repeat(heads, 1, 1)
    adds = torch.empty_like(meets)
    covariance = np.empty((channels, channels), np.float32)
    for head in range(heads):
        _covariance(
            keys[head].numpy(), centroids[head].numpy(), values[head].numpy(), mean_values[head].numpy(),
            labels[head].numpy(), covariance,
        )  # fmt: skip
        _factors(covariance, meets[head].numpy(), adds[head].numpy())
    return meets, adds
