"""Estimate: the clusters' remaining tokens, through their mean values (docs/design.md "Exactly": est, output)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.merge.reference import Partial
from sglang_clusterkv.kernels.score.reference import Scores, segment_vectors
from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.codec import CODE_LOSS, rows_at
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES
from sglang_clusterkv.memory.masses import NO_MASS, SPREAD_CAP

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep


def estimate(
    scores: Scores,
    left: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    q: torch.Tensor,
    scale: float,
    code: torch.Tensor | None = None,
) -> Partial:
    """Attention to the tokens that were not recalled, as if each had its cluster's mean value.

    A token of a cluster with candidates that were not recalled counts as these do on average, by their codes and by what
    codes lose; any other as its cluster's tokens do.

    The `estimate_clusters` clusters with the most mass left (the estimate's mass per token without codes, times the tokens
    left) use their own mean value; all others, per head and segment, the segment's.

    Args:
        scores: of the clusters.
        left: int64 [B, H, C], tokens of each cluster that were not recalled.
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
        q: float32 [B, H, G, D].
        scale: of the logits.
        code: as `Recalled` has it; None: codes are not in the estimate.
    """
    view = index.layer(layer)
    logits = left.float().log().unsqueeze(2) + token_logits(scores, index, code)  # [B, H, G, C]
    lse = logits.logsumexp(-1)
    # A request whose clusters were all recalled has nothing to estimate: its weight is zero, not NaN.
    weights = (logits - torch.where(lse.isfinite(), lse, 0.0).unsqueeze(-1)).exp()

    mass = scores.estimate_mass * left
    mass = mass.masked_fill(mass < NO_MASS, 0.0)
    own = min(index.config.estimate_clusters, mass.shape[-1])
    best = mass.argsort(dim=-1, descending=True, stable=True)[..., :own]  # [B, H, own]
    rows = index.cluster_rows(step.pages).flatten(1)
    own_rows = rows.unsqueeze(1).expand(-1, best.shape[1], -1).gather(-1, best)
    heads = torch.arange(best.shape[1], device=best.device).view(1, -1, 1)
    values = index.row_codec.decode(*rows_at(view.value_rows, view.value_scales, (own_rows, heads)))  # [B, H, own, D]
    at = best.unsqueeze(2).expand(-1, -1, weights.shape[2], -1)
    output = torch.einsum("bhgc,bhcd->bhgd", weights.gather(-1, at), values)

    rest = weights.scatter(-1, at, 0.0)
    segment = step.segment_of_page.repeat_interleave(index.clusters_per_page, 1)
    segment = segment.view(segment.shape[0], 1, 1, -1).expand_as(rest)
    by_segment = rest.new_zeros((*rest.shape[:-1], step.segment_begin.shape[1])).scatter_add_(-1, segment, rest)
    segment_values = segment_vectors(index, layer, step)[..., 1, :]  # [B, S, H, D]
    output = output + torch.einsum("bhgs,bshd->bhgd", by_segment, segment_values)
    if index.config.moving_values == "always":
        spread = index.layer(layer).spread[rows].float().transpose(1, 2).unsqueeze(2)
        reach = movement.weight(index.config) * spread
        if code is not None:
            reach = torch.where(code == -torch.inf, reach, movement.CODED_WEIGHT * spread)
        wide = rest.new_zeros(by_segment.shape).scatter_add_(-1, segment, weights * reach)
        output = output + scale * moved(wide, q, index, layer, step)
    return Partial(output, lse)


def token_logits(scores: Scores, index: ClusterIndex, code: torch.Tensor | None) -> torch.Tensor:
    """Logits of one token of each cluster that is left, float32 [B, H, G, C]; code: as `estimate` takes it."""
    of_means = scores.dot + scores.estimate_bonus
    if code is None:
        return of_means
    lost = CODE_LOSS[index.config.code_bits] * scores.bonus.clamp(max=SPREAD_CAP)
    return torch.where(code == -torch.inf, of_means, code + lost)


def moved(wide: torch.Tensor, q: torch.Tensor, index: ClusterIndex, layer: int, step: SparseStep) -> torch.Tensor:
    """Sum over the segments of their covariance of values and keys times the query, float32 [B, H, G, D].

    Args:
        wide: float32 [B, H, G, S], weights of the segments.
        q: float32 [B, H, G, D].
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
    """
    place = torch.arange(movement.RANK, device=q.device)
    first = step.segment_begin.unsqueeze(-1) + SEGMENT_VECTOR_PAGES + place  # [B, S, R]
    end = torch.cat((step.segment_begin[:, 1:], step.page_count.unsqueeze(1)), 1)
    number = torch.arange(step.segment_begin.shape[1], device=q.device)
    end = torch.where(number + 1 == step.segment_count.unsqueeze(1), step.page_count.unsqueeze(1), end)
    real = (first < end.unsqueeze(-1)) & (number < step.segment_count.unsqueeze(1)).unsqueeze(-1)
    pages = step.pages.gather(1, torch.where(real, first, 0).flatten(1)).view(first.shape)
    meets, adds = movement.unpack(index.layer(layer).segment_vectors[pages])  # [B, S, R, H, D]
    meets, adds = (torch.where(real[..., None, None], rows, 0.0) for rows in (meets, adds))
    found = torch.einsum("bsrhd,bhgd->bhgsr", meets, q) * wide.unsqueeze(-1)
    return torch.einsum("bhgsr,bsrhd->bhgd", found, adds)
