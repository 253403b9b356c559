"""Refine: each candidate's logit from its code; the best are recalled (docs/design.md "Exactly": logit, recalled)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_clusterkv.kernels.score.reference import Scores
from sglang_clusterkv.kernels.select.reference import Candidates
from sglang_clusterkv.memory.masses import NO_MASS
from sglang_clusterkv.memory.rotation import rotation_matrix

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep


class Recalled(NamedTuple):
    """Tokens recalled per request and kv head, in sequence order; padding beyond count."""

    slots: torch.Tensor  # int64 [B, H, K]
    count: torch.Tensor  # int64 [B, H]
    left: torch.Tensor  # int64 [B, H, C], what remains of each cluster


def candidate_scores(
    q: torch.Tensor,
    scores: Scores,
    candidates: Candidates,
    index: ClusterIndex,
    layer: int,
    scale: float,
) -> torch.Tensor:
    """Mean over the group of exp(logit - total), 0 below `NO_MASS`; float32 [B, H, K], -1 beyond `count`.

    Args:
        q: float32 [B, H, G, D].
        scores: of the clusters.
        candidates: tokens to look at.
        index: the cluster index.
        layer: counted from this rank's first.
        scale: of the logits.
    """
    view = index.layer(layer)
    heads = torch.arange(q.shape[1], device=q.device).view(1, -1, 1)
    codes, scales = view.codes[candidates.entry_slot, heads], view.code_scales[candidates.entry_slot, heads]  # type: ignore[index]
    residual = index.token_codec.decode(codes, scales)  # [B, H, K, D]
    rotated = q @ rotation_matrix(q.shape[-1], str(q.device)).T
    of_cluster = candidates.cluster.unsqueeze(2).expand(-1, -1, q.shape[2], -1)
    logits = scores.dot.gather(-1, of_cluster) + scale * torch.einsum("bhgd,bhkd->bhgk", rotated, residual)
    value = (logits - scores.total.unsqueeze(-1)).exp().mean(2)
    value = value.masked_fill(value < NO_MASS, 0.0)
    listed = torch.arange(value.shape[-1], device=q.device) < candidates.count.unsqueeze(-1)
    return torch.where(listed, value, -1.0)


def recall(value: torch.Tensor, scores: Scores, candidates: Candidates, budget_tokens: int) -> Recalled:
    """Recall the `budget_tokens` best candidates (ties: the lower position)."""
    keep = min(budget_tokens, value.shape[-1])
    best = value.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(-1).values
    count = candidates.count.clamp(max=keep)
    # Padding has the lowest value and the highest places, so that it stays behind the count.
    listed = torch.arange(keep, device=value.device) < count.unsqueeze(-1)
    taken = torch.zeros_like(scores.size)
    taken.scatter_add_(-1, candidates.cluster.gather(-1, best), listed.to(taken.dtype))
    slots = torch.where(listed, candidates.slot.gather(-1, best), 0)
    return Recalled(slots, count, scores.size - taken)


def refine(
    q: torch.Tensor,
    scores: Scores,
    candidates: Candidates,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
) -> Recalled:
    """Recall the best candidates by their codes."""
    value = candidate_scores(q, scores, candidates, index, layer, scale)
    return recall(value, scores, candidates, index.config.budget_tokens)


def recall_all(scores: Scores, candidates: Candidates) -> Recalled:
    """Recall every candidate: whole clusters, the last one trimmed."""
    listed = torch.arange(candidates.slot.shape[-1], device=candidates.slot.device) < candidates.count.unsqueeze(-1)
    taken = torch.zeros_like(scores.size)
    taken.scatter_add_(-1, candidates.cluster, listed.to(taken.dtype))
    return Recalled(torch.where(listed, candidates.slot, 0), candidates.count, scores.size - taken)
