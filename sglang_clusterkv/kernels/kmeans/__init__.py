"""k-means of one segment, for a batch of kv heads.

On a GPU `clusters.build.write_in_place` uses `triton` instead, which reads the pool where it lies.
"""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels.kmeans import reference
from sglang_clusterkv.kernels.kmeans.reference import outlier_count

__all__ = ["labels_of", "outlier_count", "sum_by_label"]


def labels_of(keys: torch.Tensor, clusters: int, passes: int, outliers: int = 0) -> torch.Tensor:
    """Cluster of each key; see `reference.labels_of`."""
    if keys.device.type == "cpu":
        from sglang_clusterkv.kernels.kmeans import cpu

        return cpu.labels_of(keys, clusters, passes, outliers)
    return reference.labels_of(keys, clusters, passes, outliers)


def sum_by_label(rows: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Sums of rows by cluster; see `reference.sum_by_label`."""
    if rows.device.type == "cpu":
        from sglang_clusterkv.kernels.kmeans import cpu

        return cpu.sum_by_label(rows, labels, clusters)
    return reference.sum_by_label(rows, labels, clusters)
