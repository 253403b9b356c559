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


def outlier_count(clusters: int, share: float) -> int:
    """How many of a segment's clusters may be given to outliers."""
    return int(clusters * share)


def costs_to_leave(centroids: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """What a cluster's members would lose without it: its size by the squared distance to the nearest larger cluster.

    Of equally large clusters the lower counts as the larger. 0 for an empty cluster, infinite for the largest.

    Args:
        centroids: float32 [N, C, D].
        sizes: int64 [N, C].

    Returns:
        float32 [N, C].
    """
    number = torch.arange(sizes.shape[1], device=sizes.device)
    own, other = sizes.unsqueeze(2), sizes.unsqueeze(1)
    larger = (other > own) | ((other == own) & (number < number.unsqueeze(1)))
    scores = assignment_scores(centroids, centroids).masked_fill(~larger, -torch.inf)
    nearest = (centroids.square().sum(-1) - scores.amax(-1)).clamp(min=0.0)
    return torch.where(sizes > 0, sizes * nearest, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)


def give_to_outliers(
    keys: torch.Tensor, distance: torch.Tensor, sizes: torch.Tensor, centroids: torch.Tensor, outliers: int
) -> torch.Tensor:
    """Put the centroids that cost least to leave where the keys are that lay farthest from theirs.

    Earlier keys and lower clusters come first among equals. At most `outliers` move, and no more than gain: the n-th
    farthest key's distance is larger than the n-th cheapest cluster's cost. The chosen clusters go to the chosen keys in
    ascending order of both. A distance that is not a number counts as none.

    Args:
        keys: float32 [N, M, D].
        distance: float32 [N, M], squared, of each key to the centroid it was assigned to.
        sizes: int64 [N, C], members of each cluster.
        centroids: float32 [N, C, D], means of the members.
        outliers: clusters that may move, at most C.

    Returns:
        float32 [N, C, D].
    """
    (_, tokens, channels), clusters = keys.shape, centroids.shape[1]
    far = distance.nan_to_num(nan=0.0).sort(dim=-1, descending=True, stable=True)
    cheap = costs_to_leave(centroids, sizes).sort(dim=-1, stable=True)
    gains = far.values[:, :outliers] > cheap.values[:, :outliers]  # the first ones of each row
    # Those that don't gain meet in one row more of both.
    key = torch.where(gains, far.indices[:, :outliers], tokens).sort(-1).values
    cluster = torch.where(gains, cheap.indices[:, :outliers], clusters).sort(-1).values
    moved = keys.gather(1, key.clamp(max=tokens - 1).unsqueeze(-1).expand(-1, -1, channels))
    room = torch.nn.functional.pad(centroids, (0, 0, 0, 1))
    return room.scatter(1, cluster.unsqueeze(-1).expand(-1, -1, channels), moved)[:, :clusters]


def labels_of(keys: torch.Tensor, clusters: int, passes: int, outliers: int = 0) -> torch.Tensor:
    """Assign each key to one of `clusters` clusters by Lloyd's k-means from evenly strided keys.

    A pass assigns, then takes the mean of the members; an empty cluster keeps its centroid. Before the last assignment some
    clusters are given to outliers (`give_to_outliers`): a key of which its centroid says nothing would not be recalled. The
    labels returned are those of the last assignment. Ties go to the lower cluster.

    Args:
        keys: float32 [N, M, D], relative to their segment's mean.
        clusters: number of clusters, at most M.
        passes: assignments made, at least 1.
        outliers: clusters that may be given to outliers, at most C; without effect in a single pass.

    Returns:
        int64 [N, M].
    """
    centroids = keys[:, start_positions(keys.shape[1], clusters, keys.device)]
    best = assignment_scores(keys, centroids).max(-1)
    for done in range(1, passes):
        labels = best.indices
        sizes = torch.nn.functional.one_hot(labels, clusters).sum(1)
        means = sum_by_label(keys, labels, clusters) / sizes.clamp(min=1).unsqueeze(-1)
        centroids = torch.where(sizes.unsqueeze(-1) > 0, means, centroids)
        if outliers and done == passes - 1:
            distance = (keys.square().sum(-1) - best.values).clamp(min=0.0)
            centroids = give_to_outliers(keys, distance, sizes, centroids, outliers)
        best = assignment_scores(keys, centroids).max(-1)
    return best.indices
