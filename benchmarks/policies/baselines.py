"""Other ways to choose what a decode step reads, from their papers' descriptions; each with one choice per kv head.

Every one attends exactly to what it chose and drops the rest, as its paper does.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

from benchmarks.policies.policy import KeyTables, TokenPolicy
from sglang_clusterkv.kernels.kmeans.reference import sum_by_label
from sglang_clusterkv.memory.codec import TokenCodec
from sglang_clusterkv.memory.rotation import rotation_matrix

QUEST_PAGE = 16
PUBLISHED_TOKENS_PER_CLUSTER = 80
PUBLISHED_PASSES = 10


def best(value: torch.Tensor, count: int) -> torch.Tensor:
    """Places of the `count` largest of [H, N], ties to the lower place, in sequence order: int64 [H, min(count, N)]."""
    return value.argsort(dim=-1, descending=True, stable=True)[:, :count].sort(-1).values


class Window(TokenPolicy):
    """The most recent tokens (StreamingLLM, arXiv 2309.17453: with the sinks that all policies attend to)."""

    def choose(
        self, q: torch.Tensor, keys: torch.Tensor, base: torch.Tensor, layer: int, request: int, scale: float
    ) -> torch.Tensor:
        """See `TokenPolicy.choose`."""
        tokens = keys.shape[1]
        return torch.arange(max(0, tokens - self.budget), tokens, device=keys.device).expand(keys.shape[0], -1)


class Oracle(TokenPolicy):
    """The tokens with the most exact attention, mean over the group's heads: reads every key to know them."""

    def choose(
        self, q: torch.Tensor, keys: torch.Tensor, base: torch.Tensor, layer: int, request: int, scale: float
    ) -> torch.Tensor:
        """See `TokenPolicy.choose`."""
        logits = scale * torch.matmul(q, torch.cat((keys, base), 1).transpose(1, 2))
        return best(logits.softmax(-1).mean(1)[:, : keys.shape[1]], self.budget)


class Quest(TokenPolicy):
    """Pages of 16 tokens by the upper bound of their logits from each channel's least and largest key (arXiv 2406.10774)."""

    def choose(
        self, q: torch.Tensor, keys: torch.Tensor, base: torch.Tensor, layer: int, request: int, scale: float
    ) -> torch.Tensor:
        """See `TokenPolicy.choose`."""
        pages = keys.unflatten(1, (-1, QUEST_PAGE))
        least, largest = pages.amin(2), pages.amax(2)  # [H, P, D]
        # max(q min, q max) by channel: the positive part of q meets the largest key, the negative one the least.
        bound = torch.matmul(q.clamp(min=0), largest.transpose(1, 2)) + torch.matmul(
            q.clamp(max=0), least.transpose(1, 2)
        )
        chosen = best(bound.mean(1), self.budget // QUEST_PAGE)
        return (chosen.unsqueeze(-1) * QUEST_PAGE + torch.arange(QUEST_PAGE, device=keys.device)).flatten(1)


class PublishedClusters(NamedTuple):
    """Clusters of a run of tokens."""

    centroids: torch.Tensor  # float32 [H, C, D]
    labels: torch.Tensor  # int64 [H, T]
    sizes: torch.Tensor  # int64 [H, C]


class PublishedTables(KeyTables):
    """k-means over a whole prompt by cosine similarity; later tokens in clusters of their own.

    Args:
        tokens_per_cluster: on average.
    """

    def __init__(self, tokens_per_cluster: int = PUBLISHED_TOKENS_PER_CLUSTER) -> None:
        super().__init__()
        self._tokens_per_cluster = tokens_per_cluster

    def build(self, keys: torch.Tensor) -> PublishedClusters:
        """Cluster one run, [H, T, D]."""
        heads, tokens, channels = keys.shape
        clusters = max(1, tokens // self._tokens_per_cluster)
        directions = torch.nn.functional.normalize(keys, dim=-1)
        centroids = keys[:, torch.arange(clusters, device=keys.device) * tokens // clusters]
        labels = torch.zeros((heads, tokens), dtype=torch.int64, device=keys.device)
        sizes = labels
        for _ in range(PUBLISHED_PASSES):
            unit = torch.nn.functional.normalize(centroids, dim=-1)
            labels = torch.matmul(directions, unit.transpose(1, 2)).argmax(-1)
            sizes = torch.zeros((heads, clusters), dtype=torch.int64, device=keys.device)
            sizes.scatter_add_(1, labels, torch.ones_like(labels))
            sums = sum_by_label(keys, labels, clusters)
            centroids = torch.where(sizes.unsqueeze(-1) > 0, sums / sizes.clamp(min=1).unsqueeze(-1), centroids)
        return PublishedClusters(centroids, labels, sizes)


class PublishedClusterKV(TokenPolicy):
    """ClusterKV as its paper has it (arXiv 2412.03213): whole clusters by the mean of q.centroid over the group."""

    def __init__(self, budget_tokens: int) -> None:
        super().__init__(budget_tokens)
        self._tables = PublishedTables()

    def choose(
        self, q: torch.Tensor, keys: torch.Tensor, base: torch.Tensor, layer: int, request: int, scale: float
    ) -> torch.Tensor:
        """See `TokenPolicy.choose`."""
        runs = cast("list[PublishedClusters]", self._tables.of(keys, layer, request))
        firsts = [0]
        for run in runs[:-1]:
            firsts.append(firsts[-1] + run.sizes.shape[1])
        labels = torch.cat([run.labels + first for run, first in zip(runs, firsts, strict=True)], 1)
        sizes = torch.cat([run.sizes for run in runs], 1)
        score = torch.matmul(q.mean(1, keepdim=True), torch.cat([run.centroids for run in runs], 1).transpose(1, 2))
        score = score.squeeze(1).masked_fill(sizes == 0, -torch.inf)
        # Rank of each token: its cluster's place in the order, then its own position; the last cluster is trimmed.
        place = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        order = place.gather(-1, labels).argsort(dim=-1, stable=True)
        return order[:, : self.budget].sort(-1).values


class CodeTables(KeyTables):
    """Keys relative to their run's mean, rotated, one sign per channel and a scale."""

    def build(self, keys: torch.Tensor) -> torch.Tensor:
        """Decoded keys in the rotated space and the mean: [H, T + 1, D], the mean last."""
        mean = keys.mean(1, keepdim=True)
        rotation = rotation_matrix(keys.shape[-1], str(keys.device)).T
        codec = TokenCodec(1, keys.shape[-1])
        return torch.cat((codec.decode(*codec.encode((keys - mean) @ rotation)), mean @ rotation), 1)


class BinaryCodes(TokenPolicy):
    """Every token's logit from a one-bit code of its rotated key, the best tokens (the idea of arXiv 2606.31519)."""

    def __init__(self, budget_tokens: int) -> None:
        super().__init__(budget_tokens)
        self._tables = CodeTables()

    def choose(
        self, q: torch.Tensor, keys: torch.Tensor, base: torch.Tensor, layer: int, request: int, scale: float
    ) -> torch.Tensor:
        """See `TokenPolicy.choose`."""
        rotated = q @ rotation_matrix(q.shape[-1], str(q.device)).T
        logits = []
        for run in cast("list[torch.Tensor]", self._tables.of(keys, layer, request)):
            dots = torch.matmul(rotated, run.transpose(1, 2))
            logits.append(dots[..., :-1] + dots[..., -1:])
        exact = torch.matmul(q, base.transpose(1, 2))
        weights = (scale * torch.cat((*logits, exact), -1)).softmax(-1)
        return best(weights.mean(1)[:, : keys.shape[1]], self.budget)
