"""Select: the clusters with the most mass per token, until the limit is reached (docs/design.md "Exactly": candidates)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_clusterkv.kernels.score.reference import Scores

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep


class Candidates(NamedTuple):
    """Candidate tokens per request and kv head, in sequence order; K = the limit or all tokens; padding beyond count."""

    position: torch.Tensor  # int64 [B, H, K], in the request's list of recallable tokens
    slot: torch.Tensor  # int64 [B, H, K]
    entry_slot: torch.Tensor  # int64 [B, H, K], slot of the token's entry in its segment's member list (for its code)
    cluster: torch.Tensor  # int64 [B, H, K], place among the request's clusters
    count: torch.Tensor  # int64 [B, H]


def select(scores: Scores, index: ClusterIndex, layer: int, step: SparseStep, limit: int) -> Candidates:
    """Take clusters by mass per token (ties: the lower place) while fewer than `limit` tokens are taken; the last one
    is cut to its first members so that at most `limit` remain."""
    page_size = index.geometry.page_size
    order = scores.log_mass.argsort(dim=-1, descending=True, stable=True)
    sizes = scores.size.gather(-1, order)
    room = (limit - (sizes.cumsum(-1) - sizes)).clamp(min=0)
    taken = torch.zeros_like(sizes).scatter_(-1, order, torch.minimum(sizes, room))

    # Every entry of every member list: its cluster, its rank in it, and the token it names.
    batch, heads = scores.size.shape[:2]
    tokens = step.pages.shape[1] * page_size
    entry = torch.arange(tokens, device=order.device).expand(batch, heads, -1)
    # Padding clusters end where the last real one does, so that the ends ascend.
    ends = torch.where(scores.size > 0, scores.begin + scores.size, 0).cummax(-1).values
    cluster = torch.searchsorted(ends, entry.contiguous(), right=True).clamp(max=ends.shape[-1] - 1)
    rank = entry - scores.begin.gather(-1, cluster)
    page = torch.arange(step.pages.shape[1], device=order.device)
    real = (page < step.page_count.unsqueeze(1)).repeat_interleave(page_size, 1).unsqueeze(1)
    chosen = real & (rank >= 0) & (rank < taken.gather(-1, cluster))

    slots = step.pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=order.device)
    slots = slots.flatten(1)  # [B, T]
    offset = index.layer(layer).members[slots].long().transpose(1, 2)  # [B, H, T]
    begin = (step.segment_begin.gather(1, step.segment_of_page) * page_size).repeat_interleave(page_size, 1)
    position = torch.where(real, begin.unsqueeze(1) + offset, 0)

    # To sequence order, chosen ones first.
    keep = min(limit, tokens)
    place = torch.where(chosen, position, tokens).argsort(dim=-1, stable=True)[..., :keep]
    position = position.gather(-1, place)
    return Candidates(
        position=position,
        slot=slots.unsqueeze(1).expand(-1, heads, -1).gather(-1, position),
        entry_slot=slots.unsqueeze(1).expand(-1, heads, -1).gather(-1, place),
        cluster=cluster.gather(-1, place),
        count=chosen.sum(-1),
    )
