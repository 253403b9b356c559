"""Note, inside the server, where in the context the tokens lie that each step recalled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.policies.recorder import recalled_slots
from sglang_clusterkv.clusters.engine import ClusterEngine, SparseDecode
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep

NONE = -1  # pads a step that recalled fewer tokens than another


class PlaceRecorder:
    """A decode function that also keeps the positions of what it recalled; it reads what the kernels left and changes nothing.

    `write` puts them into a file: `places` int32 [steps, layers, kv heads, tokens], padded with `NONE`, and `lengths` int32
    [steps], the request's tokens with the step's own. One request decodes at a time.

    Args:
        inner: the decode function that serves.
        engine: whose requests decode.
        file: of the results, .npz.
    """

    def __init__(self, inner: SparseDecode, engine: ClusterEngine, file: Path) -> None:
        self._inner = inner
        self._engine = engine
        self._file = file
        self._places: list[list[np.ndarray]] = []  # of each step, by layer [kv heads, tokens]
        self._lengths: list[int] = []
        self._position = np.empty(0, np.int32)  # by slot, of the step under way

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: ClusterIndex,
        layer: int,
        step: SparseStep,
        scale: float,
        **host: Any,
    ) -> torch.Tensor:
        """See `kernels.decode.sparse_decode`; `host` is a host tier's, for the engine's own function."""
        output = self._inner(q, keys, values, index, layer, step, scale, **host)
        assert step.batch == 1, f"{step.batch} requests decode: one at a time is recorded"
        if layer == 0:
            self._begin(step)
        slots, count = recalled_slots(self._inner, index, q.shape[1] // keys.shape[1], keys)
        inside = np.arange(slots.shape[2]) < count[0].numpy()[:, None]
        places = np.where(inside, self._position[np.where(inside, slots[0].numpy(), 0)], NONE)
        self._places[-1].append(places[:, : int(count[0].max())].astype(np.int32))
        return output

    def _begin(self, step: SparseStep) -> None:
        """Learn the slots of the request that decodes: of the live rows, the one that ends with the step's newest slot."""
        page_size = self._engine.page_size
        length = int(step.base_count[0] + step.page_count[0] * page_size)
        newest = step.base_slots[0, int(step.base_count[0]) - 1]
        (row,) = [row for row in self._engine.records.rows if self._engine.req_to_token[row, length - 1] == newest]
        self._position = np.full(len(self._engine.key_buffers[0]), NONE, np.int32)
        self._position[self._engine.req_to_token[row, :length].numpy()] = np.arange(length)
        self._places.append([])
        self._lengths.append(length)

    def write(self) -> None:
        """Write them; a step whose layers did not all recall is left out."""
        layers = len(self._engine.key_buffers)
        whole = [step for step, places in enumerate(self._places) if len(places) == layers]
        most = max((places.shape[1] for step in whole for places in self._places[step]), default=0)
        heads = self._engine.index.geometry.kv_heads
        found = np.full((len(whole), layers, heads, most), NONE, np.int32)
        for i, step in enumerate(whole):
            for layer, places in enumerate(self._places[step]):
                found[i, layer, :, : places.shape[1]] = places
        np.savez(self._file, places=found, lengths=np.array(self._lengths, np.int32)[whole])
