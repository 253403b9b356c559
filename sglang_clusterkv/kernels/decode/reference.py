"""The chain of references: score, select, refine, attend, estimate, merge; and the recalled mass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.attend.reference import attend
from sglang_clusterkv.kernels.estimate.reference import estimate
from sglang_clusterkv.kernels.merge.reference import Partial, by_kv_head, merge, note_mass
from sglang_clusterkv.kernels.refine.reference import recall_all, refine
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer


def sparse_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.decode.sparse_decode`."""
    config = index.config
    grouped = q.float().unflatten(1, (keys.shape[1], -1))  # [B, H, G, D]
    by_head = None if sinks is None else by_kv_head(sinks, keys.shape[1])
    scores = score(grouped, keys, index, layer, step, scale, tier, by_head)
    limit = config.candidate_tokens if config.refine else config.budget_tokens
    candidates = select(scores, index, layer, step, limit)
    if config.refine:
        recalled = refine(grouped, scores, candidates, index, layer, step, scale)
    else:
        recalled = recall_all(scores, candidates)
    exact = attend(grouped, keys, values, step, recalled.slots, recalled.count, scale, tier, by_head)
    if config.estimate:
        whole = merge(exact, estimate(scores, recalled.left, index, layer, step, grouped, scale, recalled.code))
    else:
        whole = Partial(exact.output, scores.total)
    output = whole.output.flatten(1, 2).to(q.dtype)
    note_mass(index.mass_cells[layer, 0], exact.lse, whole.lse)
    return output
