"""The device tensors that the Triton launches of one layer hand to each other, from score to merge; decode/triton.py owns
them.

Allocated once and used by all layers and steps; but for `offset`, nothing in it needs to be initialised or is kept from one
layer to the next. A step may fill less than a tensor holds: the first `step.batch` requests, and of each row what the step's
counts say (`page_count` * clusters per page clusters, `base_count` tokens, `segment_count` segments, ...). What lies beyond is
garbage, NaN included, and readers mask it.

Clusters of all requests lie one after the other: those of request b from `offset[b]` on, which is a multiple of
SCORE_CLUSTERS and goes with the step's lists. So the tensors follow what a batch has together, not its longest request, and
score's tiles are one list of all requests. A row without pages (page_count 0) is left alone by score, select, refine and
estimate: its candidates and recalled tokens are none, its log-sum-exps -inf.

Written for bytes: whatever is cheap to compute again from a smaller tensor is not here. A cluster's bonus, for one, is
`spread * segment_bonus` of its segment, by query head: two small tensors instead of one as large as `dot`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

SCORE_CLUSTERS = 256  # clusters per program of score
SCORE_TOKENS = 64  # always-attended tokens per program of score
MOST_SHORT = 2048  # clusters of a shortlist, see `own_shortlist` (grids.py)


class WorkspaceShape(NamedTuple):
    """Capacities. B requests, H kv heads, G query heads each, D channels; C clusters of all requests together; per request: S
    segments, W tokens that are always attended; K candidates and R recalled tokens at most; O clusters estimated at their own
    mean value; X parts of attend and Y of the estimate, over all (request, kv head)."""

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
    exact_parts: int
    rest_parts: int

    @property
    def base_tiles(self) -> int:
        """Score's tiles of a request's always-attended tokens."""
        return -(-self.base // SCORE_TOKENS)

    @property
    def cluster_tiles(self) -> int:
        """Score's tiles of all requests' clusters."""
        return -(-self.clusters // SCORE_CLUSTERS)

    @property
    def short(self) -> int:
        """Clusters of a shortlist; 0: there is none."""
        return self.own + self.budget if self.own + self.budget <= MOST_SHORT else 0

    def holds(self, other: WorkspaceShape) -> bool:
        """Whether a workspace of this shape serves `other` too."""
        same = self[1:4] == other[1:4]
        return same and all(own >= needed for own, needed in zip(self, other, strict=True))

    def rounded(self) -> WorkspaceShape:
        """The shape with innermost sizes rounded up, so that it is outgrown rarely and rows are aligned for wide loads."""
        return self._replace(
            clusters=_round_up(self.clusters, 8 * SCORE_CLUSTERS),
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

    Cluster c of a request, at `offset` + c, is the c-th in the order of `step.pages`, `clusters_per_page` at each page; entry
    i of its member lists (all of its segments', one after the other) lies at slot `pages[i // page_size] * page_size + i %
    page_size`; position p of its recallable tokens likewise.
    """

    shape: WorkspaceShape
    offset: torch.Tensor  # int32 [B + 1], a request's first cluster; the last one: the end of all

    # Written by score.
    rotated: torch.Tensor  # float32 [B, H, G, D], R q: for refine only
    segment_bonus: torch.Tensor  # float32 [B, H, G, S], bonus of a cluster with spread 1: scale^2 / 2 * sum_d q_d^2 V_d
    # float32 [H, G, C], scale q.centroid, the segment's mean included; where codes are estimated by, refine puts the log of the
    # mean mass of a cluster's candidates that were not recalled there, if there are any
    dot: torch.Tensor
    spread: torch.Tensor  # bf16 [H, C], as stored in the index; refine makes it negative where `dot` is by codes
    base_logit: torch.Tensor  # float32 [B, H, G, W], exact logits of the always-attended tokens
    base_lse: torch.Tensor  # float32 [B, H, G, base_tiles], of base_logit, by tile
    # float32 [H, G, cluster_tiles], of log n + dot + choice_spread * bonus, by tile of clusters
    choice_lse: torch.Tensor
    estimate_lse: torch.Tensor  # float32 [H, G, cluster_tiles], of log n + dot + estimate_spread * min(bonus, cap)
    # Written by score as the cluster's size; refine subtracts what it recalled. So the estimate reads what is left.
    left: torch.Tensor  # int32 [H, C], 0 for an empty cluster

    # Written by select.
    log_mass: torch.Tensor  # float32 [H, C], by the choice, per token, mean over the group; -inf for an empty cluster
    estimate_mass: torch.Tensor  # float32 [H, C], by the estimate and for it, not its log; 0 for an empty cluster
    total: torch.Tensor  # float32 [B, H, G], log-sum-exp of all clusters' estimate logits (full sizes) and base_logit
    candidates: torch.Tensor  # int64 [B, H, K], cluster << 32 | entry, ascending
    candidate_count: torch.Tensor  # int32 [B, H]
    # int32 [B, H, O + R], clusters among which `own` will be, ascending; see `own_shortlist` (grids.py)
    shortlist: torch.Tensor

    # Written by refine.
    value: torch.Tensor  # float32 [B, H, K], mean over the group of exp(logit - total)
    # float32 [B, H, K, G up to a power of two], exp(logit - total), where codes are estimated by; the choice puts 0 for
    # candidates that it recalls
    by_code: torch.Tensor
    # int32 [B, H, K + 1], of clusters with candidates and of their end: the place of the first | recalled before it << 16
    runs: torch.Tensor
    position: torch.Tensor  # int32 [B, H, K], of the candidate's token; select's before
    recalled: torch.Tensor  # int64 [B, H, R], slots, in the order of `candidates`: by cluster, then by position
    recalled_count: torch.Tensor  # int32 [B, H]

    own: torch.Tensor  # int32 [B, H, O], clusters that the estimate takes at their own mean value, ascending
    own_edge: torch.Tensor  # int32 [B, H, 3], which those are, see `in_list` (estimate/triton_own.py)

    # Written by attend, one part of the list per split: those of a (request, kv head) lie together, see `exact`.
    exact_count: torch.Tensor  # int32 [B, H], splits, where attend and the estimate are one launch
    exact_output: torch.Tensor  # float32 [X, G, D], normalised over the split; garbage where the log-sum-exp is -inf
    exact_lse: torch.Tensor  # float32 [X, G]

    # Written by estimate, one part of the clusters per program; see `rest`.
    rest_output: torch.Tensor  # float32 [Y, G, D], normalised over the part
    rest_lse: torch.Tensor  # float32 [Y, G]

    def exact(self, batch: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend's parts of a step with so many for each (request, kv head): [B, H, splits, G, D] and [B, H, splits, G]."""
        return self._parts(self.exact_output, self.exact_lse, batch, splits)

    def rest(self, batch: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimate's, likewise."""
        return self._parts(self.rest_output, self.rest_lse, batch, parts)

    def _parts(
        self, output: torch.Tensor, lse: torch.Tensor, batch: int, parts: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of = (batch, self.shape.heads, parts)
        used = batch * self.shape.heads * parts
        return output[:used].unflatten(0, of), lse[:used].unflatten(0, of)

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
    of_clusters = (shape.heads, shape.clusters)
    return Workspace(
        shape=shape,
        offset=allocate((shape.batch + 1,), torch.int32),
        rotated=allocate((*by_query, shape.channels), torch.float32),
        segment_bonus=allocate((*by_query, shape.segments), torch.float32),
        dot=allocate((shape.heads, shape.group, shape.clusters), torch.float32),
        spread=allocate(of_clusters, torch.bfloat16),
        base_logit=allocate((*by_query, shape.base), torch.float32),
        base_lse=allocate((*by_query, shape.base_tiles), torch.float32),
        choice_lse=allocate((shape.heads, shape.group, shape.cluster_tiles), torch.float32),
        estimate_lse=allocate((shape.heads, shape.group, shape.cluster_tiles), torch.float32),
        left=allocate(of_clusters, torch.int32),
        log_mass=allocate(of_clusters, torch.float32),
        estimate_mass=allocate(of_clusters, torch.float32),
        total=allocate(by_query, torch.float32),
        candidates=allocate((*by_head, shape.candidates), torch.int64),
        candidate_count=allocate(by_head, torch.int32),
        shortlist=allocate((*by_head, shape.short), torch.int32),
        value=allocate((*by_head, shape.candidates), torch.float32),
        by_code=allocate((*by_head, shape.candidates, 1 << (shape.group - 1).bit_length()), torch.float32),
        runs=allocate((*by_head, shape.candidates + 1), torch.int32),
        position=allocate((*by_head, shape.candidates), torch.int32),
        recalled=allocate((*by_head, shape.budget), torch.int64),
        recalled_count=allocate(by_head, torch.int32),
        exact_count=allocate(by_head, torch.int32),
        exact_output=allocate((shape.exact_parts, shape.group, shape.channels), torch.float32),
        exact_lse=allocate((shape.exact_parts, shape.group), torch.float32),
        own=allocate((*by_head, shape.own), torch.int32),
        own_edge=allocate((*by_head, 3), torch.int32),
        rest_output=allocate((shape.rest_parts, shape.group, shape.channels), torch.float32),
        rest_lse=allocate((shape.rest_parts, shape.group), torch.float32),
    )
