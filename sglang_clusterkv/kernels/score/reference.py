"""Score: estimated attention mass of every recallable cluster (docs/design.md "Exactly": choice, total, mass)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_clusterkv.memory.codec import rows_at
from sglang_clusterkv.memory.fp8 import pool_rows
from sglang_clusterkv.memory.masses import SPREAD_CAP

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer


class Scores(NamedTuple):
    """B requests, H kv heads, G query heads each, C clusters (padded), W always-attended tokens (padded); float32."""

    size: torch.Tensor  # int64 [B, H, C], 0 for padding and empty clusters
    begin: torch.Tensor  # int64 [B, H, C], in the request's list of recallable tokens
    dot: torch.Tensor  # [B, H, G, C], scale q.centroid
    bonus: torch.Tensor  # [B, H, G, C], g
    estimate_bonus: torch.Tensor  # [B, H, G, C], of the estimate's logits: estimate_spread min(g, cap)
    # [B, H, C], log of the mass per token by the choice, mean over the group; -inf where size is 0
    log_mass: torch.Tensor
    estimate_mass: torch.Tensor  # [B, H, C], by the estimate likewise, not its log; 0 where size is 0
    total: torch.Tensor  # [B, H, G], log-sum-exp of estimates and always-attended tokens


def exact_logits(
    q: torch.Tensor,
    keys: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    scale: float,
    tier: TierLayer | None = None,
) -> torch.Tensor:
    """Logits of listed tokens.

    Args:
        q: float32 [B, H, G, D].
        keys: [slots, H, D].
        slots: int64 [B, W], shared by the kv heads, or [B, H, W].
        count: int64 [B] or [B, H], entries of each list.
        scale: of the logits.
        tier: where some slots' keys are on the host.

    Returns:
        float32 [B, H, G, W], -inf beyond `count`.
    """
    logits = scale * torch.einsum("bhgd,bhwd->bhgw", q, gather_heads(keys, slots, tier, 0))
    listed = torch.arange(slots.shape[-1], device=q.device) < count.unsqueeze(-1)
    listed = listed.unsqueeze(1) if slots.dim() == 2 else listed
    return logits.masked_fill(~listed.unsqueeze(2), -torch.inf)


def gather_heads(
    buffer: torch.Tensor, slots: torch.Tensor, tier: TierLayer | None = None, part: int = 0
) -> torch.Tensor:
    """Rows of a pool: [slots, H, D] at int64 [B, W] or [B, H, W] -> float32 [B, H, W, D].

    tier: where some of them are on the host; the buffer then holds keys (part 0) or values (part 1).
    """
    heads = None if slots.dim() == 2 else torch.arange(buffer.shape[1], device=slots.device).view(1, -1, 1)
    if tier is not None:
        rows = tier.gather(buffer, part, slots, heads)
    else:
        rows = pool_rows(buffer, slots) if heads is None else pool_rows(buffer, slots, heads)
    return (rows.transpose(1, 2) if heads is None else rows).float()


def segment_vectors(index: ClusterIndex, layer: int, step: SparseStep) -> torch.Tensor:
    """Mean key, mean value and variance of each request's segments, float32 [B, S, H, 3, D]."""
    quarters = index.layer(layer).segment_vectors
    first = step.segment_begin.clamp(max=step.pages.shape[1] - 4).unsqueeze(-1) + torch.arange(
        4, device=quarters.device
    )
    pages = step.pages.gather(1, first.flatten(1)).view(first.shape)
    return quarters[pages].permute(0, 1, 3, 4, 2, 5).flatten(-2).float()


def score(
    q: torch.Tensor,
    keys: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> Scores:
    """Score all clusters.

    Args:
        q: float32 [B, H, G, D].
        keys: [slots, H, D], the layer's pool (for sinks and window).
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
        scale: of the logits.
        tier: where some slots' keys are on the host.
        sinks: float32 [H, G], a learned logit of each query head that has no token; None: there are none.
    """
    config, view, per_page = index.config, index.layer(layer), index.clusters_per_page
    page_size = index.geometry.page_size
    rows = index.cluster_rows(step.pages).flatten(1)  # [B, C]
    real = (torch.arange(step.pages.shape[1], device=q.device) < step.page_count.unsqueeze(1)).repeat_interleave(
        per_page, 1
    )
    segment = step.segment_of_page.repeat_interleave(per_page, 1)  # [B, C]
    list_begin = step.segment_begin.gather(1, segment) * page_size

    end = list_begin.unsqueeze(1) + view.cluster_end[rows].long().transpose(1, 2)  # [B, H, C]
    first_cluster = torch.zeros_like(real)
    first_cluster[:, 1:] = segment[:, 1:] != segment[:, :-1]
    first_cluster[:, 0] = True
    previous = torch.cat((end[..., :1], end[..., :-1]), -1)
    begin = torch.where(first_cluster.unsqueeze(1), list_begin.unsqueeze(1), previous)
    size = torch.where(real.unsqueeze(1), end - begin, 0)

    vectors = segment_vectors(index, layer, step)
    mean_key, variance = vectors[..., 0, :], vectors[..., 2, :]  # [B, S, H, D]
    of_cluster = segment.view(segment.shape[0], 1, 1, -1).expand(-1, q.shape[1], q.shape[2], -1)
    q_mean = torch.einsum("bhgd,bshd->bhgs", q, mean_key).gather(-1, of_cluster)
    q_variance = torch.einsum("bhgd,bshd->bhgs", q.square(), variance).gather(-1, of_cluster)

    centroids = index.row_codec.decode(*rows_at(view.key_rows, view.key_scales, rows)).transpose(1, 2)  # [B, H, C, D]
    dot = scale * (torch.einsum("bhgd,bhcd->bhgc", q, centroids) + q_mean)
    spread = view.spread[rows].float().transpose(1, 2).unsqueeze(2)
    bonus = 0.5 * scale * scale * spread * q_variance
    log_size = size.float().log().unsqueeze(2)  # -inf where a cluster is empty

    base = exact_logits(q, keys, step.base_slots, step.base_count, scale, tier).logsumexp(-1)
    if sinks is not None:
        base = torch.logaddexp(base, sinks)
    choice = dot + config.choice_spread * bonus  # of one token: times the size and by the size again would break ties
    normaliser = torch.logaddexp((log_size + choice).logsumexp(-1), base)
    # Its log: where heads are sharp, most masses are too small for a float, and the best of them are candidates still.
    log_mass = (choice - normaliser.unsqueeze(-1)).logsumexp(2) - math.log(q.shape[2])
    log_mass = log_mass.masked_fill(size == 0, -torch.inf)
    estimate_bonus = config.estimate_spread * bonus.clamp(max=SPREAD_CAP)
    total = torch.logaddexp((log_size + dot + estimate_bonus).logsumexp(-1), base)
    estimate_mass = (dot + estimate_bonus - total.unsqueeze(-1)).exp().mean(2).masked_fill(size == 0, 0.0)
    return Scores(size, begin, dot, bonus, estimate_bonus, log_mass, estimate_mass, total)
