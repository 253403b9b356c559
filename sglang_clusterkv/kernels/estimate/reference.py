"""Estimate: the clusters' remaining tokens, through their mean values (docs/design.md "Exactly": est, output)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.merge.reference import Partial
from sglang_clusterkv.kernels.score.reference import Scores, segment_vectors
from sglang_clusterkv.memory.codec import rows_at
from sglang_clusterkv.memory.masses import NO_MASS

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep


def estimate(scores: Scores, left: torch.Tensor, index: ClusterIndex, layer: int, step: SparseStep) -> Partial:
    """Attention to the tokens that were not recalled, as if each had its cluster's mean value.

    The `estimate_clusters` clusters with the most mass left (the estimate's mass per token, times the tokens left) use their
    own mean value; all others, per head and segment, the segment's.

    Args:
        scores: of the clusters.
        left: int64 [B, H, C], tokens of each cluster that were not recalled.
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
    """
    view = index.layer(layer)
    logits = left.float().log().unsqueeze(2) + scores.dot + scores.estimate_bonus  # [B, H, G, C]
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
    return Partial(output, lse)
