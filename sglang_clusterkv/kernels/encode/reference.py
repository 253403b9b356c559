"""Variances and token codes of a segment: the definition, in torch, batched over layers' kv heads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_clusterkv.memory.codec import TokenCodec
from sglang_clusterkv.memory.rotation import rotation_matrix


class Variance(NamedTuple):
    """Population variances of keys around their cluster's centroid. N = heads, C = clusters, D = head_dim."""

    by_channel: torch.Tensor  # float32 [N, D], mean over all tokens
    by_cluster: torch.Tensor  # float32 [N, C], summed over channels, mean over members; 0 for an empty cluster


def of_token(by_cluster: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[N, C, D] -> each token's cluster's row, [N, M, D]."""
    return by_cluster.gather(1, labels.unsqueeze(-1).expand(-1, -1, by_cluster.shape[-1]))


def within_variance(centered: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> Variance:
    """Variances around the unrounded centroids.

    Args:
        centered: float32 [N, M, D], keys.
        centroids: float32 [N, C, D], their clusters' means.
        labels: int64 [N, M].
    """
    squares = (centered - of_token(centroids, labels)).square()
    zero = squares.new_zeros(centroids.shape[:2])
    sizes = zero.scatter_add(1, labels, torch.ones_like(squares[..., 0]))
    sums = zero.scatter_add(1, labels, squares.sum(-1))
    return Variance(squares.mean(1), sums / sizes.clamp(min=1))


def token_codes(
    keys: torch.Tensor, stored: torch.Tensor, labels: torch.Tensor, members: torch.Tensor, codec: TokenCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the rotated residuals against the centroids as stored, in the order of the member list.

    Args:
        keys: float32 [N, M, D].
        stored: float32 [N, C, D], centroids as a decode step reads them.
        labels: int64 [N, M].
        members: int64 [N, M], the member lists.
        codec: of the codes.

    Returns:
        (uint8 [N, M, code_bytes], bf16 [N, M]).
    """
    rotated = (keys - of_token(stored, labels)) @ rotation_matrix(keys.shape[-1], str(keys.device)).T
    return codec.encode(rotated.gather(1, members.unsqueeze(-1).expand_as(rotated)))
