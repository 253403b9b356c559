"""Ours, with the recalled tokens chosen otherwise: by several steps together, by the heads of a layer together, with another
budget for each layer.

Every step chooses as it always does, and what it chose is then replaced: this measures accuracy, not time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import bits
from sglang_clusterkv.kernels.decode.cpu import CpuDecoder, decoder_of
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep


class ChangedChoice(ABC):
    """Our chain on a CPU, with refining and the estimate; between choice and attention a subclass has its say."""

    @abstractmethod
    def change(self, q: torch.Tensor, layer: int, step: SparseStep, decoder: CpuDecoder) -> None:
        """Replace `taken`, `recalled` and `recalled_count` in the decoder's buffers.

        Args:
            q: float32 [B, H, G, D].
            layer: counted from this rank's first.
            step: the lists of the step.
            decoder: as `recall` left it.
        """

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
        decoder = decoder_of(index, grouped.shape[2], keys.dtype)
        decoder.prepare(step, kv_heads, grouped.shape[2], channels)
        output = torch.empty_like(grouped)
        q_rows, key_rows, out = grouped.numpy(), bits(keys), output.numpy()
        decoder.score(q_rows, key_rows, layer, scale)
        decoder.select()
        decoder.rotate(q_rows)
        decoder.refine(layer, scale)
        decoder.recall()
        self.change(grouped, layer, step, decoder)
        _note_rest(decoder)
        decoder.attend(q_rows, key_rows, bits(values), scale, out)
        decoder.estimate(q_rows, layer, scale)
        decoder.merge(out)
        decoder.note_mass(layer)
        return output.flatten(1, 2).to(q.dtype)


class Choice(NamedTuple):
    """What a layer recalled, at the step that chose it."""

    pages: torch.Tensor  # of that step
    q: torch.Tensor  # float32 [B, H, G, D]
    age: np.ndarray  # int [B, H], steps since then
    taken: np.ndarray  # int32 [B, H, C], tokens recalled of each cluster
    recalled: np.ndarray  # int64 [B, H, budget]
    counts: np.ndarray  # int32 [B, H]


class ReusedChoice(ChangedChoice):
    """Recalls what was chosen up to `steps` - 1 steps ago; centroids are scored in every step, for the estimate.

    Args:
        steps: that a choice serves; a request whose clusters changed chooses anew.
        least_cosine: a kv head chooses anew once one of its queries has a smaller cosine to that of the choice.
    """

    def __init__(self, steps: int, least_cosine: float = -1.0) -> None:
        self._steps = steps
        self._least_cosine = least_cosine
        self._kept: dict[int, Choice] = {}
        self._chosen = self._heads = self._candidates = 0

    def counts(self) -> dict[str, float]:
        """Candidates of a head on average, and how many heads chose anew, as a share."""
        heads = max(1, self._heads)
        return {"candidates": self._candidates / heads, "chosen": self._chosen / heads}

    def change(self, q: torch.Tensor, layer: int, step: SparseStep, decoder: CpuDecoder) -> None:
        """Every head that may reuse its old choice does."""
        u = decoder.buffers
        taken, recalled, count = u.taken, u.recalled, u.recalled_count
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
        self._chosen += int(chosen.sum())
        self._candidates += int(u.candidates.sum())
        self._heads += chosen.size
        kept.age[...] = np.where(chosen, 0, kept.age + 1)
        self._kept[layer] = kept


class SharedBudget(ChangedChoice):
    """The kv heads of a layer share their budgets: tokens with the most mass (by their codes), whosever they are.

    Args:
        budget_tokens: of a head, on average.
        least: share of it that every head gets.
        most: times of it that a head gets at most.
    """

    def __init__(self, budget_tokens: int, least: float = 0.25, most: float = 3.0) -> None:
        self._budget = budget_tokens
        self._least, self._most = int(least * budget_tokens), int(most * budget_tokens)

    def change(self, q: torch.Tensor, layer: int, step: SparseStep, decoder: CpuDecoder) -> None:
        """Recall the candidates that are the best of all heads together."""
        most = min(self._most, decoder.buffers.value.shape[2])
        decoder.make_room(most)
        u = decoder.buffers
        batch, heads = u.candidates.shape
        for b in range(batch):
            best = [_best(decoder, b, h, most) for h in range(heads)]
            # Above every value: what a head gets in any case.
            values = [
                np.where(np.arange(len(at)) < self._least, np.inf, u.value[b, h, at]) for h, at in enumerate(best)
            ]
            everything = np.sort(np.concatenate(values))[::-1]
            border = everything[min(heads * self._budget, len(everything)) - 1]
            for h, at in enumerate(best):
                _recall(decoder, b, h, at[values[h] >= border])


class LayerBudgets(ChangedChoice):
    """Layers share the budget by what each was measured to lose: of the same total, more where the output's error is larger.

    Args:
        budget_tokens: of a layer, on average.
        errors: output error of each layer, any unit.
        least: share of the average that every layer gets.
        most: times of it that a layer gets at most.
    """

    def __init__(self, budget_tokens: int, errors: np.ndarray, least: float = 0.25, most: float = 3.0) -> None:
        self._budget = budget_tokens
        shares = np.clip(errors / errors.mean(), least, most)
        self._budgets = np.floor(budget_tokens * shares / shares.mean()).astype(int)

    def change(self, q: torch.Tensor, layer: int, step: SparseStep, decoder: CpuDecoder) -> None:
        """Recall this layer's number of the best candidates; where a budget covers all candidates, all of them."""
        decoder.make_room(int(self._budgets[layer]))
        batch, heads = decoder.buffers.candidates.shape
        for b in range(batch):
            for h in range(heads):
                if decoder.buffers.candidates[b, h] > self._budget:
                    _recall(decoder, b, h, _best(decoder, b, h, int(self._budgets[layer])))


def _note_rest(decoder: CpuDecoder) -> None:
    """Candidates that were not recalled, of which codes tell the estimate."""
    u, page_size = decoder.buffers, decoder.index.geometry.page_size
    for b, h in np.ndindex(*u.candidates.shape):
        place = u.place[b, h, : u.candidates[b, h]].astype(np.int64)
        slots = decoder.lists.pages[b, place // page_size] * page_size + place % page_size
        u.rest[b, h, : len(slots)] = ~np.isin(slots, u.recalled[b, h, : u.recalled_count[b, h]])


def _best(decoder: CpuDecoder, b: int, h: int, most: int) -> np.ndarray:
    """Places of a head's best candidates by their codes, the best first."""
    u = decoder.buffers
    return np.argsort(-u.value[b, h, : u.candidates[b, h]], kind="stable")[:most]


def _recall(decoder: CpuDecoder, b: int, h: int, candidates: np.ndarray) -> None:
    """Make these candidates what a head recalls."""
    u, page_size = decoder.buffers, decoder.index.geometry.page_size
    chosen = np.sort(candidates)
    place = u.place[b, h, chosen].astype(np.int64)
    u.recalled[b, h, : len(chosen)] = decoder.lists.pages[b, place // page_size] * page_size + place % page_size
    u.recalled_count[b, h] = len(chosen)
    u.taken[b, h] = np.bincount(u.of_cluster[b, h, chosen], minlength=u.taken.shape[2])
