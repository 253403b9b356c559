"""A layer of captured decode steps over an engine whose lists take mixtures, as on a GPU; its kernels are interpreted.

Requests of rows 3 and 5 have too few tokens to cluster: they are dense.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters import decoding
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.kernels.decode.triton import TritonDecoder, decoder_of, sparse_decode
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep, dense_step, first_requests
from tests.support.filled import SCALE
from tests.support.graph import Graph, poison_flashinfer, poison_lists, poison_workspace
from tests.support.scenes import PAGE, Scene

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
LENGTHS = {1: 334, 2: 601, 3: 90, 4: 420, 5: 17}
GROUP, CONTEXT = 2, 1024
GRAPH = 4  # requests that the graph is captured for


class Served:
    """An engine and one layer of captured steps.

    Args:
        monkeypatch: of the test.
        config: of the engine.
        room: requests that captured steps have room for.
        kv_heads, head_dim, dtype: of the pool.
        tolerance: of results.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        config: ClusterKVConfig = CONFIG,
        room: int = GRAPH,
        *,
        kv_heads: int = 1,
        head_dim: int = 32,
        dtype: torch.dtype = torch.float32,
        tolerance: float = 2e-5,
    ) -> None:
        monkeypatch.setattr(decoding, "takes_mixtures", lambda device: True)
        monkeypatch.setattr(decoding, "prepare", self.prepare)
        monkeypatch.setattr(decoding, "capture", lambda index, group, lists: decoder_of(index, group).capture(lists))
        monkeypatch.setattr(decoding, "replay", lambda index, group, batch: decoder_of(index, group).replay(batch))
        self.monkeypatch, self.tolerance, self.heads = monkeypatch, tolerance, kv_heads * GROUP
        self.scene = Scene(config, layers=1, kv_heads=kv_heads, head_dim=head_dim, context=CONTEXT, dtype=dtype)
        self.lengths = dict(LENGTHS)
        for row, length in LENGTHS.items():
            self.scene.prefill(row, length)
        self.engine = self.scene.engine
        self.engine.begin_decode(np.array([1]), np.array([LENGTHS[1]]))  # what was prefilled is clustered at this head
        self.engine.decoding.reserve(room, CONTEXT)
        # As models cut them from one product with keys and values.
        self.q = torch.full((room, 3 * self.heads, head_dim), torch.nan, dtype=dtype)[:, : self.heads]

    @staticmethod
    def prepare(index: ClusterIndex, group: int, dtype: torch.dtype, step: SparseStep) -> None:
        decoder = decoder_of(index, group)
        decoder.use_engine(dtype)
        decoder.prepare(step)

    @property
    def decoder(self) -> TritonDecoder:
        return decoder_of(self.scene.index, GROUP)

    @property
    def lists(self) -> SparseStep:
        """Those of captured steps."""
        lists = self.engine.decoding._lists
        assert lists is not None
        return first_requests(lists, GRAPH)

    def layer(self, step: DecodeStep, q: torch.Tensor) -> torch.Tensor:
        assert step.sparse is not None
        return sparse_decode(q, self.scene.keys[0], self.scene.values[0], self.scene.index, 0, step.sparse, SCALE)

    def capture(self) -> Graph:
        lists = self.engine.decoding.captured(GRAPH)
        step = DecodeStep(None, lists, None, None, np.zeros(0), np.zeros(0))
        return Graph(lambda: self.layer(step, self.q[:GRAPH]), self.monkeypatch)

    def begin(self, *rows: int) -> DecodeStep:
        """The next step of these requests, and their queries."""
        for row in rows:
            self.lengths[row] += 1
        step = self.scene.decode([*rows], [self.lengths[row] for row in rows])
        self.q.fill_(torch.nan)
        self.q[: len(rows)] = self.scene.queries(len(rows), self.heads)[: len(self.q)]
        return step

    def expected(self, step: DecodeStep, q: torch.Tensor) -> torch.Tensor:
        """Each request by the references, by lists of its own."""
        assert step.reasons is not None
        outputs = []
        pool = self.scene.keys[0], self.scene.values[0]
        for b, reason in enumerate(step.reasons):
            rows, lengths = step.rows[b : b + 1], step.seq_lens[b : b + 1]
            if reason:
                dense = dense_step(rows, lengths, self.scene.req_to_token)
                outputs.append(attend_reference.dense_decode(q[b : b + 1], *pool, dense.slots, dense.seq_lens, SCALE))
                continue
            count = self.engine.tables.recallable(rows, lengths)
            lists = sparse_step(self.engine.decoding._borders(rows, lengths, count), self.scene.req_to_token, PAGE)
            kept = self.scene.index.mass_cells.clone()
            outputs.append(reference.sparse_decode(q[b : b + 1], *pool, self.scene.index, 0, lists, SCALE))
            self.scene.index.mass_cells.copy_(kept)
        return torch.cat(outputs)

    def poison(self) -> None:
        assert self.decoder._reserved is not None
        poison_workspace(self.decoder._reserved)
        poison_lists(self.lists, PAGE)
        if self.decoder.engine is not None:
            poison_flashinfer(self.decoder.engine, self.lists)

    def assert_replays(self, graph: Graph, *rows: int) -> None:
        step = self.begin(*rows)
        assert step.too_large is None and step.counts is not None
        before = self.scene.index.mass[0, 1]
        self.engine.decoding.replay(GRAPH)
        self.poison()
        result = graph.replay()
        self.assert_close(result[: len(rows)], self.expected(step, self.q[: len(rows)]))
        assert not result[len(rows) :].any(), "padding gives 0"
        noted = self.heads * step.counts.sparse
        assert self.scene.index.mass[0, 1] == before + noted, "the mass counts sparse requests"

    def assert_close(self, result: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(result.float(), expected.float(), atol=self.tolerance, rtol=self.tolerance)

    def assert_nothing_moved(self, graph: Graph) -> None:
        """What the graph writes and reads of ours is what the engine has."""
        workspace, lists = self.decoder._reserved, self.lists
        assert workspace is not None
        ours = [value for value in vars(workspace).values() if isinstance(value, torch.Tensor)]
        unused = [workspace.offset]
        if self.decoder.engine is not None:
            assert self.decoder.engine._room is not None and self.decoder.engine._plan_memory is not None
            ours = [*ours, *self.decoder.engine._room, self.decoder.engine._plan_memory]
            unused.append(workspace.exact_count)
        used = graph.addresses()
        needed = {value.data_ptr() for value in ours if value.numel()} - {value.data_ptr() for value in unused}
        missing = needed - used
        assert not missing, "the workspace moved"
        assert {value.data_ptr() for value in lists if isinstance(value, torch.Tensor)} - {
            lists.segment_count.data_ptr()
        } <= used
