"""By how much a segment's values move with its keys inside clusters: factors of low rank, made while it is clustered."""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels.movement import reference
from sglang_clusterkv.kernels.movement.reference import covariance, factors_of

__all__ = ["covariance", "factors", "factors_of"]


def factors(
    keys: torch.Tensor,
    centroids: torch.Tensor,
    values: torch.Tensor,
    mean_values: torch.Tensor,
    labels: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a segment's covariance of values and keys; see `reference.factors`."""
    if keys.device.type == "cpu":
        from sglang_clusterkv.kernels.movement import cpu

        return cpu.factors(keys, centroids, values, mean_values, labels, rank)
    return reference.factors(keys, centroids, values, mean_values, labels, rank)
