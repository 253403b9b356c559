"""Record, inside the server, how far each attention head's output is from dense, how much of its mass was read, and how wide
the clusters were that it saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.policies.anchors import StandIns
from benchmarks.policies.estimates import ChangedEstimate
from benchmarks.policies.policy import TokenPolicy, clustered_slots
from benchmarks.policies.steps import Reformed
from sglang_clusterkv.clusters.engine import SparseDecode
from sglang_clusterkv.kernels.decode import cpu
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep

BONUS_EDGES = np.concatenate(([0.0], np.geomspace(0.01, 1000.0, 251), [np.inf]))  # 5 % apart


class Recorder:
    """A decode function that also compares another one with dense attention on the very same queries.

    What is kept, as sums over steps and requests; `write` divides:
    `error` [layers, query heads], |output - dense| / |dense|; `mass` [layers, query heads], the exact share of attention on the
    tokens that were attended to exactly; `bonus` [layers, bins], how many (cluster, query head) had which spread term g, by
    `BONUS_EDGES`; `steps`.

    Args:
        inner: the decode function that serves.
        layers: of the model.
        heads: query heads of the model.
        file: of the results, .npz.
    """

    def __init__(self, inner: SparseDecode, layers: int, heads: int, file: Path) -> None:
        self._inner = inner
        self._file = file
        self._error = np.zeros((layers, heads))
        self._mass = np.zeros((layers, heads))
        self._bonus = np.zeros((layers, len(BONUS_EDGES) - 1), np.int64)
        self._steps = np.zeros(layers)

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
        """See `kernels.decode.sparse_decode`."""
        output = self._inner(q, keys, values, index, layer, step, scale)
        group = q.shape[1] // keys.shape[1]
        recalled, count = recalled_slots(self._inner, index, group, keys)
        for b in range(step.batch):
            base = step.base_slots[b, : int(step.base_count[b])]
            slots = torch.cat((base, clustered_slots(step, b, index.geometry.page_size)))
            rows = keys[slots].transpose(0, 1).float().repeat_interleave(group, 0)  # [heads, T, D]
            weights = (scale * torch.matmul(rows, q[b].float().unsqueeze(-1)).squeeze(-1)).softmax(-1)
            dense = torch.matmul(
                weights.unsqueeze(1), values[slots].transpose(0, 1).float().repeat_interleave(group, 0)
            ).squeeze(1)
            distance = (output[b].float() - dense).norm(dim=-1) / dense.norm(dim=-1)
            self._error[layer] += distance.numpy()
            for h in range(keys.shape[1]):
                read = torch.cat((base, recalled[b, h, : int(count[b, h])]))
                mine = slice(h * group, (h + 1) * group)
                self._mass[layer, mine] += weights[mine, torch.isin(slots, read)].sum(-1).numpy()
        scores = score(q.float().unflatten(1, (keys.shape[1], -1)), keys, index, layer, step, scale)
        self._bonus[layer] += np.histogram(
            scores.bonus[(scores.size > 0).unsqueeze(2).expand_as(scores.bonus)], BONUS_EDGES
        )[0]
        self._steps[layer] += step.batch
        return output

    def write(self) -> None:
        """Write the means."""
        steps = np.maximum(self._steps, 1)[:, None]
        np.savez(self._file, error=self._error / steps, mass=self._mass / steps, bonus=self._bonus, steps=self._steps)


class CountWriter:
    """A decode function whose `counts()` are written as JSON at the end.

    Args:
        inner: the decode function that serves.
        file: of the counts.
    """

    def __init__(self, inner: SparseDecode, file: Path) -> None:
        self._inner = inner
        self._file = file

    def __call__(self, *arguments: Any, **host: Any) -> torch.Tensor:
        """See `kernels.decode.sparse_decode`."""
        return self._inner(*arguments, **host)

    def write(self) -> None:
        """Write them."""
        self._file.write_text(json.dumps(self._inner.counts()))  # type: ignore[attr-defined]


def recalled_slots(
    decode: SparseDecode, index: ClusterIndex, group: int, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots that a decode function's last call recalled, int64 [B, H, K], and how many, [B, H].

    Args:
        decode: the policy's, or the engine's own on a CPU.
        index: that it read.
        group: query heads per kv head.
        keys: the layer's pool.
    """
    if isinstance(decode, TokenPolicy | ChangedEstimate | StandIns | Reformed):
        return decode.recalled
    buffers = cpu.decoder_of(index, group, keys.dtype).buffers
    return torch.from_numpy(buffers.recalled), torch.from_numpy(buffers.recalled_count)
