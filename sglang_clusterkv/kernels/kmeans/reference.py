"""k-means of one segment: the definition, in torch, batched over layers' kv heads, deterministic on every device."""

from __future__ import annotations

import torch


def start_positions(tokens: int, clusters: int, device: torch.device) -> torch.Tensor:
    """Positions of the keys that start the clusters: floor(j tokens / clusters), int64 [clusters]."""
    return torch.arange(clusters, device=device) * tokens // clusters


def assignment_scores(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """2 x.c - |c|^2, of which the largest names the nearest centroid.

    Args:
        keys: float32 [N, M, D].
        centroids: float32 [N, C, D].

    Returns:
        float32 [N, M, C].
    """
    return torch.baddbmm(-centroids.square().sum(-1).unsqueeze(1), keys, centroids.transpose(1, 2), alpha=2.0)


def sum_by_label(rows: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Sum of the rows of each cluster: a matrix product with the one-hot labels, so that its order is fixed.

    Args:
        rows: float32 [N, M, D].
        labels: int64 [N, M].
        clusters: C.

    Returns:
        float32 [N, C, D].
    """
    one_hot = torch.nn.functional.one_hot(labels, clusters).to(rows.dtype)
    return torch.bmm(one_hot.transpose(1, 2), rows)


def labels_of(keys: torch.Tensor, clusters: int, passes: int) -> torch.Tensor:
    """Assign each key to one of `clusters` clusters by Lloyd's k-means from evenly strided keys.

    A pass assigns, then takes the mean of the members; an empty cluster keeps its centroid. The labels returned are those
    of the last assignment. Ties go to the lower cluster.

    Args:
        keys: float32 [N, M, D], relative to their segment's mean.
        clusters: number of clusters, at most M.
        passes: assignments made, at least 1.

    Returns:
        int64 [N, M].
    """
    centroids = keys[:, start_positions(keys.shape[1], clusters, keys.device)]
    labels = assignment_scores(keys, centroids).argmax(-1)
    for _ in range(passes - 1):
        counts = torch.nn.functional.one_hot(labels, clusters).sum(1).unsqueeze(-1)
        means = sum_by_label(keys, labels, clusters) / counts.clamp(min=1)
        centroids = torch.where(counts > 0, means, centroids)
        labels = assignment_scores(keys, centroids).argmax(-1)
    return labels
