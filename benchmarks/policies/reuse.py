"""Ours, where a choice of tokens serves several steps: what would saving the candidates' codes cost?"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.index import ClusterIndex
from sglang_clusterkv.clusters.rotation import rotation_matrix
from sglang_clusterkv.clusters.step import SparseStep
from sglang_clusterkv.kernels.cpu_math import bits
from sglang_clusterkv.kernels.decode.cpu import decoder_of


class Choice(NamedTuple):
    """What a layer recalled, at the step that chose it."""

    pages: torch.Tensor  # of that step
    q: torch.Tensor  # float32 [B, H, G, D]
    age: np.ndarray  # int [B, H], steps since then
    taken: np.ndarray  # int32 [B, H, C], tokens recalled of each cluster
    recalled: np.ndarray  # int64 [B, H, budget]
    counts: np.ndarray  # int32 [B, H]


class ReusedChoice:
    """Recalls what was chosen up to `steps` - 1 steps ago; centroids are scored in every step, for the estimate.

    Every step chooses, and heads that reuse throw that away: this measures accuracy, not time.

    Args:
        steps: that a choice serves; a request whose clusters changed chooses anew.
        least_cosine: a kv head chooses anew once one of its queries has a smaller cosine to that of the choice.
    """

    def __init__(self, steps: int, least_cosine: float = -1.0) -> None:
        self._steps = steps
        self._least_cosine = least_cosine
        self._kept: dict[int, Choice] = {}

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: ClusterIndex,
        layer: int,
        step: SparseStep,
        scale: float,
    ) -> torch.Tensor:
        """See `kernels.decode.sparse_decode`; on a CPU, with refining and the estimate."""
        kv_heads, channels = keys.shape[1:]
        grouped = q.float().unflatten(1, (kv_heads, -1)).contiguous()
        decoder = decoder_of(index, grouped.shape[2], keys.dtype is torch.bfloat16)
        decoder.prepare(step, kv_heads, grouped.shape[2], channels)
        output = torch.empty_like(grouped)
        q_rows, key_rows, out = grouped.numpy(), bits(keys), output.numpy()
        decoder.score(q_rows, key_rows, layer, scale)
        decoder.select()
        decoder.refine((grouped @ rotation_matrix(channels).T).numpy(), layer, scale)
        decoder.recall()
        self._reuse(
            grouped, layer, step, decoder.buffers.taken, decoder.buffers.recalled, decoder.buffers.recalled_count
        )
        decoder.attend(q_rows, key_rows, bits(values), scale, out)
        decoder.estimate(layer)
        decoder.note_mass(layer)
        decoder.merge(out)
        return output.flatten(1, 2).to(q.dtype)

    def _reuse(
        self,
        q: torch.Tensor,
        layer: int,
        step: SparseStep,
        taken: np.ndarray,
        recalled: np.ndarray,
        count: np.ndarray,
    ) -> None:
        """Replace the new choice of every head that may reuse its old one, in place."""
        kept = self._kept.get(layer)
        if kept is None or not torch.equal(kept.pages, step.pages):
            chosen = np.ones(count.shape, bool)
            kept = Choice(
                step.pages, q.clone(), np.zeros(count.shape, int), taken.copy(), recalled.copy(), count.copy()
            )
        else:
            alike = torch.cosine_similarity(q, kept.q, dim=-1).amin(-1).numpy() >= self._least_cosine
            chosen = (kept.age + 1 >= self._steps) | ~alike
            for old, new in ((kept.taken, taken), (kept.recalled, recalled), (kept.counts, count)):
                old[chosen] = new[chosen]
                new[...] = old
            kept.q[torch.from_numpy(chosen)] = q[torch.from_numpy(chosen)]
        kept.age[...] = np.where(chosen, 0, kept.age + 1)
        self._kept[layer] = kept
