"""Refine: each candidate's logit from its code; the best are recalled (docs/design.md "Exactly": logit, recalled, code)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_clusterkv.kernels.score.reference import Scores
from sglang_clusterkv.kernels.select.reference import Candidates
from sglang_clusterkv.memory.masses import MOST_MASS, NO_MASS
from sglang_clusterkv.memory.rotation import rotation_matrix

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep


class Recalled(NamedTuple):
    """Tokens recalled per request and kv head, in sequence order; padding beyond count."""

    slots: torch.Tensor  # int64 [B, H, K]
    count: torch.Tensor  # int64 [B, H]
    left: torch.Tensor  # int64 [B, H, C], what remains of each cluster
    # float32 [B, H, G, C], log of the mean exp(logit) of a cluster's candidates that were not recalled, -inf where there are
    # none; None: codes are not in the estimate
    code: torch.Tensor | None = None


def candidate_logits(
    q: torch.Tensor,
    scores: Scores,
    candidates: Candidates,
    index: ClusterIndex,
    layer: int,
    scale: float,
) -> torch.Tensor:
    """The candidates' logits by their codes, float32 [B, H, G, K]; anything beyond `count`.

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
    return scores.dot.gather(-1, of_cluster) + scale * torch.einsum("bhgd,bhkd->bhgk", rotated, residual)


def candidate_scores(logits: torch.Tensor, scores: Scores, candidates: Candidates) -> torch.Tensor:
    """Largest of the group's exp(logit - total), 0 below `NO_MASS`; float32 [B, H, K], -1 beyond `count`."""
    value = (logits - scores.total.unsqueeze(-1)).exp().amax(2)
    value = value.masked_fill(value < NO_MASS, 0.0)
    return torch.where(_listed(candidates), value, -1.0)


def _listed(candidates: Candidates) -> torch.Tensor:
    """bool [B, H, K]."""
    return torch.arange(candidates.slot.shape[-1], device=candidates.slot.device) < candidates.count.unsqueeze(-1)


def recall(
    value: torch.Tensor,
    scores: Scores,
    candidates: Candidates,
    budget_tokens: int,
    logits: torch.Tensor | None = None,
) -> Recalled:
    """Recall the `budget_tokens` best candidates (ties: the lower position).

    Args:
        value: float32 [B, H, K], as `candidate_scores` gives it.
        scores: of the clusters.
        candidates: of these values.
        budget_tokens: most to recall.
        logits: of the candidates; None: codes are not in the estimate.
    """
    keep = min(budget_tokens, value.shape[-1])
    best = value.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort(-1).values
    count = candidates.count.clamp(max=keep)
    # Padding has the lowest value and the highest places, so that it stays behind the count.
    listed = torch.arange(keep, device=value.device) < count.unsqueeze(-1)
    taken = torch.zeros_like(scores.size)
    taken.scatter_add_(-1, candidates.cluster.gather(-1, best), listed.to(taken.dtype))
    slots = torch.where(listed, candidates.slot.gather(-1, best), 0)
    code = None
    if logits is not None:
        rest = _listed(candidates) & ~torch.zeros_like(value, dtype=torch.bool).scatter_(-1, best, listed)
        code = mean_by_code(logits, rest, scores, candidates)
    return Recalled(slots, count, scores.size - taken, code)


def mean_by_code(logits: torch.Tensor, rest: torch.Tensor, scores: Scores, candidates: Candidates) -> torch.Tensor:
    """See `Recalled.code`; rest: bool [B, H, K], the candidates that count."""
    most = scores.total.unsqueeze(-1) + math.log(MOST_MASS)
    logits = torch.minimum(logits, most).masked_fill(~rest.unsqueeze(2), -torch.inf)
    at = candidates.cluster.unsqueeze(2).expand_as(logits)
    highest = torch.full_like(scores.dot, -torch.inf).scatter_reduce_(-1, at, logits, "amax").nan_to_num(neginf=0.0)
    sums = torch.zeros_like(scores.dot).scatter_add_(-1, at, (logits - highest.gather(-1, at)).exp())
    number = torch.zeros_like(scores.dot[:, :, 0]).scatter_add_(-1, candidates.cluster, rest.float())
    return highest + (sums / number.clamp(min=1).unsqueeze(2)).log()


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
    config, logits = index.config, candidate_logits(q, scores, candidates, index, layer, scale)
    value = candidate_scores(logits, scores, candidates)
    by_code = config.estimate and config.estimate_codes
    return recall(value, scores, candidates, config.budget_tokens, logits if by_code else None)


def recall_all(scores: Scores, candidates: Candidates) -> Recalled:
    """Recall every candidate: whole clusters, the last one trimmed."""
    listed = _listed(candidates)
    taken = torch.zeros_like(scores.size)
    taken.scatter_add_(-1, candidates.cluster, listed.to(taken.dtype))
    return Recalled(torch.where(listed, candidates.slot, 0), candidates.count, scores.size - taken)
