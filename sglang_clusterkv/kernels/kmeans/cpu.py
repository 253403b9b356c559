"""k-means on the CPU: the products by torch, one head at a time so that nothing depends on the batch; the rest by numba."""

from __future__ import annotations

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import larger, njit
from sglang_clusterkv.kernels.kmeans.reference import start_positions


@njit(cache=True, fastmath=False)
def _argmax_rows(scores: np.ndarray, labels: np.ndarray) -> None:
    """Index of the first largest value of each row of scores [M, C] into labels [M]."""
    rows, columns = scores.shape
    for i in range(rows):
        labels[i] = 0  # of NaN keys: a label is an address
        best = scores[i, 0]
        for j in range(1, columns):
            best = larger(best, scores[i, j])
        for j in range(columns):
            if scores[i, j] == best:
                labels[i] = j
                break


@njit(cache=True)
def _sum_rows(rows: np.ndarray, labels: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """Add rows [M, D] to sums [C, D] by label, in order of position; count the members."""
    sums[:] = 0.0
    counts[:] = 0
    for i in range(rows.shape[0]):
        cluster = labels[i]
        counts[cluster] += 1
        for d in range(rows.shape[1]):
            sums[cluster, d] += rows[i, d]


@njit(cache=True)
def _update_means(sums: np.ndarray, counts: np.ndarray, centroids: np.ndarray) -> None:
    """centroids [C, D] = sums / counts where a cluster has members."""
    for c in range(sums.shape[0]):
        if counts[c] > 0:
            inverse = np.float32(1.0) / np.float32(counts[c])
            for d in range(sums.shape[1]):
                centroids[c, d] = sums[c, d] * inverse


@njit(cache=True)
def _costs_to_leave(scores: np.ndarray, centroids: np.ndarray, sizes: np.ndarray, costs: np.ndarray) -> None:
    """`reference.costs_to_leave` into costs [C], from the clusters' assignment scores [C, C] to each other."""
    for a in range(sizes.shape[0]):
        best = np.float32(-np.inf)
        for b in range(sizes.shape[0]):
            if sizes[b] > sizes[a] or (sizes[b] == sizes[a] and b < a):
                best = max(best, scores[a, b])
        square = np.float32(0.0)
        for d in range(centroids.shape[1]):
            square += centroids[a, d] * centroids[a, d]
        cost = sizes[a] * max(square - best, np.float32(0.0)) if sizes[a] > 0 else 0.0
        costs[a] = np.inf if np.isnan(cost) else cost


@njit(cache=True)
def _give_to_outliers(
    keys: np.ndarray, labels: np.ndarray, scores: np.ndarray, costs: np.ndarray, centroids: np.ndarray, outliers: int
) -> None:
    """`reference.give_to_outliers` in place, from the keys' assignment scores [M, C] and the clusters' costs."""
    nearness = np.empty(keys.shape[0], np.float32)
    for i in range(keys.shape[0]):
        square = np.float32(0.0)
        for d in range(keys.shape[1]):
            square += keys[i, d] * keys[i, d]
        distance = max(square - scores[i, labels[i]], np.float32(0.0))
        nearness[i] = 0.0 if np.isnan(distance) else -distance
    far, cheap = np.argsort(nearness, kind="mergesort"), np.argsort(costs, kind="mergesort")
    gains = 0
    while gains < outliers and -nearness[far[gains]] > costs[cheap[gains]]:
        gains += 1
    far, cheap = np.sort(far[:gains]), np.sort(cheap[:gains])
    for i in range(gains):
        centroids[cheap[i]] = keys[far[i]]


def labels_of(keys: torch.Tensor, clusters: int, passes: int, outliers: int = 0) -> torch.Tensor:
    """See `reference.labels_of`."""
    heads, tokens, channels = keys.shape
    labels = torch.empty((heads, tokens), dtype=torch.int64)
    start = start_positions(tokens, clusters, keys.device)
    sums = np.empty((clusters, channels), np.float32)
    sizes = np.empty(clusters, np.int64)
    scores = torch.empty((tokens, clusters))
    between, costs = torch.empty((clusters, clusters)), np.empty(clusters, np.float32)
    for head in range(heads):
        head_keys, head_labels = keys[head].contiguous(), labels[head].numpy()
        centroids = head_keys[start]
        for done in range(1, passes + 1):
            torch.addmm(-centroids.square().sum(-1), head_keys, centroids.t(), alpha=2.0, out=scores)
            _argmax_rows(scores.numpy(), head_labels)
            if done == passes:
                continue
            _sum_rows(head_keys.numpy(), head_labels, sums, sizes)
            _update_means(sums, sizes, centroids.numpy())
            if outliers and done == passes - 1:
                torch.addmm(-centroids.square().sum(-1), centroids, centroids.t(), alpha=2.0, out=between)
                _costs_to_leave(between.numpy(), centroids.numpy(), sizes, costs)
                _give_to_outliers(head_keys.numpy(), head_labels, scores.numpy(), costs, centroids.numpy(), outliers)
    return labels


def sum_by_label(rows: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """See `reference.sum_by_label`; here the sum runs in order of position."""
    sums = torch.empty((rows.shape[0], clusters, rows.shape[2]))
    counts = np.empty(clusters, np.int64)
    for head in range(rows.shape[0]):
        _sum_rows(rows[head].contiguous().numpy(), labels[head].numpy(), sums[head].numpy(), counts)
    return sums
