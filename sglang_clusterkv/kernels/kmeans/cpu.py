"""k-means on the CPU: the products by torch, one head at a time so that nothing depends on the batch; the rest by numba."""

from __future__ import annotations

import numba
import numpy as np
import torch

from sglang_clusterkv.kernels.kmeans.reference import start_positions


@numba.njit(cache=True, fastmath=False)
def _argmax_rows(scores: np.ndarray, labels: np.ndarray) -> None:
    """Index of the first largest value of each row of scores [M, C] into labels [M]."""
    rows, columns = scores.shape
    for i in range(rows):
        labels[i] = 0  # of NaN keys: a label is an address
        best = scores[i, 0]
        for j in range(1, columns):
            best = max(best, scores[i, j])
        for j in range(columns):
            if scores[i, j] == best:
                labels[i] = j
                break


@numba.njit(cache=True)
def _sum_rows(rows: np.ndarray, labels: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """Add rows [M, D] to sums [C, D] by label, in order of position; count the members."""
    sums[:] = 0.0
    counts[:] = 0
    for i in range(rows.shape[0]):
        cluster = labels[i]
        counts[cluster] += 1
        for d in range(rows.shape[1]):
            sums[cluster, d] += rows[i, d]


@numba.njit(cache=True)
def _update_means(sums: np.ndarray, counts: np.ndarray, centroids: np.ndarray) -> None:
    """centroids [C, D] = sums / counts where a cluster has members."""
    for c in range(sums.shape[0]):
        if counts[c] > 0:
            inverse = np.float32(1.0) / np.float32(counts[c])
            for d in range(sums.shape[1]):
                centroids[c, d] = sums[c, d] * inverse


def labels_of(keys: torch.Tensor, clusters: int, passes: int) -> torch.Tensor:
    """See `reference.labels_of`."""
    heads, tokens, channels = keys.shape
    labels = torch.empty((heads, tokens), dtype=torch.int64)
    start = start_positions(tokens, clusters, keys.device)
    sums = np.empty((clusters, channels), np.float32)
    counts = np.empty(clusters, np.int64)
    scores = torch.empty((tokens, clusters))
    for head in range(heads):
        head_keys, head_labels = keys[head].contiguous(), labels[head].numpy()
        centroids = head_keys[start]
        for done in range(1, passes + 1):
            torch.addmm(-centroids.square().sum(-1), head_keys, centroids.t(), alpha=2.0, out=scores)
            _argmax_rows(scores.numpy(), head_labels)
            if done < passes:
                _sum_rows(head_keys.numpy(), head_labels, sums, counts)
                _update_means(sums, counts, centroids.numpy())
    return labels


def sum_by_label(rows: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """See `reference.sum_by_label`; here the sum runs in order of position."""
    sums = torch.empty((rows.shape[0], clusters, rows.shape[2]))
    counts = np.empty(clusters, np.int64)
    for head in range(rows.shape[0]):
        _sum_rows(rows[head].contiguous().numpy(), labels[head].numpy(), sums[head].numpy(), counts)
    return sums
