"""The device tensors that the Triton launches of one layer hand to each other, from score to merge; decode/triton.py owns
them.

Allocated once and used by all layers and steps; nothing in it needs to be initialised or is kept from one layer to the
next. A step may fill less than a tensor holds: the first `step.batch` requests, and of each row what the step's counts say
(`page_count` * clusters per page clusters, `base_count` tokens, `segment_count` segments, ...). What lies beyond is garbage,
NaN included, and readers mask it.

Written for bytes: whatever is cheap to compute again from a smaller tensor is not here. A cluster's bonus, for one, is
`spread * segment_bonus` of its segment, by query head: two small tensors instead of one as large as `dot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

SCORE_CLUSTERS = 128  # clusters per program of score
SCORE_TOKENS = 64  # always-attended tokens per program of score


class WorkspaceShape(NamedTuple):
    """Capacities. B requests, H kv heads, G query heads each, D channels; per request: C clusters, S segments, W tokens
    that are always attended; K candidates and R recalled tokens at most; O clusters estimated at their own mean value; P
    splits of attend, E parts of the estimate."""

    batch: int
    heads: int
    group: int
    channels: int
    clusters: int
    segments: int
    base: int
    candidates: int
    budget: int
    own: int
    splits: int
    parts: int

    @property
    def tiles(self) -> int:
        """Programs of score per (request, kv head) that leave a log-sum-exp: those of tokens, then those of clusters."""
        return -(-self.base // SCORE_TOKENS) + -(-self.clusters // SCORE_CLUSTERS)

    def holds(self, other: WorkspaceShape) -> bool:
        """Whether a workspace of this shape serves `other` too."""
        same = self[1:4] == other[1:4]
        return same and all(own >= needed for own, needed in zip(self, other, strict=True))

    def rounded(self) -> WorkspaceShape:
        """The shape with innermost sizes rounded up, so that it is outgrown rarely and rows are aligned for wide loads."""
        return self._replace(
            clusters=_round_up(self.clusters, 1024),
            segments=_round_up(self.segments, 16),
            base=_round_up(self.base, 256),
            candidates=_round_up(self.candidates, 16),
            budget=_round_up(self.budget, 16),
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Workspace:
    """Contiguous tensors; logits and log-sum-exps are natural (base e) and include the scale.

    Cluster c of a request is the c-th in the order of `step.pages`, `clusters_per_page` at each page; entry i of its
    member lists (all of its segments', one after the other) lies at slot `pages[i // page_size] * page_size + i % page_size`;
    position p of its recallable tokens likewise.
    """

    shape: WorkspaceShape

    # Written by score.
    rotated: torch.Tensor  # float32 [B, H, G, D], R q: for refine only
    segment_bonus: torch.Tensor  # float32 [B, H, G, S], bonus of a cluster with spread 1: scale^2 / 2 * sum_d q_d^2 V_d
    dot: torch.Tensor  # float32 [B, H, G, C], scale q.centroid, the segment's mean included
    spread: torch.Tensor  # bf16 [B, H, C], as stored in the index
    base_logit: torch.Tensor  # float32 [B, H, G, W], exact logits of the always-attended tokens
    choice_lse: torch.Tensor  # float32 [B, H, G, tiles], of log n + dot + choice_spread * bonus, and of base_logit
    estimate_lse: torch.Tensor  # float32 [B, H, G, tiles], of log n + dot + estimate_spread * min(bonus, cap), likewise
    # Written by score as the cluster's size; refine subtracts what it recalled. So the estimate reads what is left.
    left: torch.Tensor  # int32 [B, H, C], 0 for an empty cluster

    # Written by select.
    log_mass: (
        torch.Tensor
    )  # float32 [B, H, C], by the choice, per token, mean over the group; -inf for an empty cluster
    estimate_mass: torch.Tensor  # float32 [B, H, C], by the estimate and for it, not its log; 0 for an empty cluster
    total: torch.Tensor  # float32 [B, H, G], log-sum-exp of all clusters' estimate logits (full sizes) and base_logit
    candidates: torch.Tensor  # int64 [B, H, K], cluster << 32 | entry, ascending
    candidate_count: torch.Tensor  # int32 [B, H]

    # Written by refine.
    value: torch.Tensor  # float32 [B, H, K], mean over the group of exp(logit - total)
    position: torch.Tensor  # int32 [B, H, K], of the candidate's token
    recalled: torch.Tensor  # int64 [B, H, R], slots, in the order of `candidates`: by cluster, then by position
    recalled_count: torch.Tensor  # int32 [B, H]

    # Written by attend, one part of the list per split.
    exact_output: torch.Tensor  # float32 [B, H, P, G, D], normalised over the split
    exact_lse: torch.Tensor  # float32 [B, H, P, G]

    # Written by estimate, one part of the clusters per program.
    own: torch.Tensor  # int32 [B, H, O], clusters that use their own mean value, ascending
    rest_output: torch.Tensor  # float32 [B, H, E, G, D], normalised over the part
    rest_lse: torch.Tensor  # float32 [B, H, E, G]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [value for value in vars(self).values() if isinstance(value, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def make_workspace(shape: WorkspaceShape, device: str, allocate: Allocate | None = None) -> Workspace:
    """Allocate a workspace.

    Args:
        shape: capacities.
        device: where it lives.
        allocate: makes one uninitialised contiguous tensor of a shape and dtype; torch.empty by default.
    """
    if allocate is None:

        def allocate(sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(sizes, dtype=dtype, device=device)

    by_head = (shape.batch, shape.heads)
    by_query = (*by_head, shape.group)
    return Workspace(
        shape=shape,
        rotated=allocate((*by_query, shape.channels), torch.float32),
        segment_bonus=allocate((*by_query, shape.segments), torch.float32),
        dot=allocate((*by_query, shape.clusters), torch.float32),
        spread=allocate((*by_head, shape.clusters), torch.bfloat16),
        base_logit=allocate((*by_query, shape.base), torch.float32),
        choice_lse=allocate((*by_query, shape.tiles), torch.float32),
        estimate_lse=allocate((*by_query, shape.tiles), torch.float32),
        left=allocate((*by_head, shape.clusters), torch.int32),
        log_mass=allocate((*by_head, shape.clusters), torch.float32),
        estimate_mass=allocate((*by_head, shape.clusters), torch.float32),
        total=allocate(by_query, torch.float32),
        candidates=allocate((*by_head, shape.candidates), torch.int64),
        candidate_count=allocate(by_head, torch.int32),
        value=allocate((*by_head, shape.candidates), torch.float32),
        position=allocate((*by_head, shape.candidates), torch.int32),
        recalled=allocate((*by_head, shape.budget), torch.int64),
        recalled_count=allocate(by_head, torch.int32),
        exact_output=allocate((*by_head, shape.splits, shape.group, shape.channels), torch.float32),
        exact_lse=allocate((*by_head, shape.splits, shape.group), torch.float32),
        own=allocate((*by_head, shape.own), torch.int32),
        rest_output=allocate((*by_head, shape.parts, shape.group, shape.channels), torch.float32),
        rest_lse=allocate((*by_head, shape.parts, shape.group), torch.float32),
    )
