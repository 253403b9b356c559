"""Movement of values with keys: the definition, in torch, batched over kv heads (docs/design.md "Exactly": movement)."""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels.encode.reference import of_token
from sglang_clusterkv.kernels.kmeans.reference import sum_by_label
from sglang_clusterkv.memory.rotation import rotation_matrix

PASSES = 3  # of subspace iteration
LEAST_SQUARE = 1e-10  # of a column, over what it was before those before it were taken out: less is rounding


def start_rows(rank: int, head_dim: int, device: str) -> torch.Tensor:
    """What the iteration starts with, float32 [rank, D]: rows of the codes' rotation, over all of its blocks."""
    return rotation_matrix(head_dim, device)[torch.arange(rank) * head_dim // rank].contiguous()


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt's, row after row: float32 [N, R, D], of length 1 each; 0 where next to nothing is left of a row."""
    rows = rows.clone()
    squares = rows.square().sum(-1)
    for j in range(rows.shape[1]):
        square = rows[:, j].square().sum(-1)
        gone = square <= LEAST_SQUARE * squares[:, j]
        length = torch.where(gone, 1.0, square).sqrt().unsqueeze(-1)
        row = torch.where(gone.unsqueeze(-1), 0.0, rows[:, j] / length)
        rows[:, j] = row
        later = rows[:, j + 1 :]
        later -= (later @ row.unsqueeze(-1)) * row.unsqueeze(1)
    return rows


def factors_of(covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (meets, adds), float32 [N, rank, D] each, so that adds^T meets is next to the best of that rank.

    Args:
        covariance: float32 [N, D of values, D of keys].
        rank: 1 to D.
    """
    meets = start_rows(rank, covariance.shape[-1], str(covariance.device)).expand(len(covariance), -1, -1)
    for _ in range(PASSES):
        adds = orthonormal(meets @ covariance.transpose(1, 2))
        meets = orthonormal(adds @ covariance)
    return meets, meets @ covariance.transpose(1, 2)


def covariance(keys: torch.Tensor, values: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Covariance of a segment's values and keys around their clusters' means: float32 [N, D of values, D of keys].

    Args:
        keys: float32 [N, M, D].
        values: float32 [N, M, D].
        labels: int64 [N, M].
        clusters: C.
    """
    ones = torch.ones_like(keys[..., :1])
    count = sum_by_label(ones, labels, clusters).clamp(min=1)
    apart, moved = (
        rows - of_token(sum_by_label(rows, labels, clusters) / count, labels)
        for rows in (keys - keys.mean(1, keepdim=True), values)
    )
    return moved.transpose(1, 2) @ apart / keys.shape[1]


def factors(
    keys: torch.Tensor,
    centroids: torch.Tensor,
    values: torch.Tensor,
    mean_values: torch.Tensor,
    labels: torch.Tensor,
    rank: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of a segment's covariance of values and keys inside clusters, of a cluster whose spread is 1.

    Args:
        keys: float32 [N, M, D].
        centroids: float32 [N, C, D], their clusters' means.
        values: float32 [N, M, D].
        mean_values: float32 [N, C, D], likewise.
        labels: int64 [N, M].
        rank: of the factors.

    Returns:
        Rows that meet the query and rows that are added, float32 [N, rank, D] each; see `factors_of`.
    """
    apart, moved = keys - of_token(centroids, labels), values - of_token(mean_values, labels)
    return factors_of(moved.transpose(1, 2) @ apart / keys.shape[1], rank)
