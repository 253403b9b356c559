"""Decode graphs in a world whose stream lags: a replay reads the captured lists when the device comes to it.

The lists are made by the engine's own code, up to the launch of their kernel, which is queued like everything else of a head
and done here in numpy. A replay is queued behind it: when it comes it compares what lies in the lists with what they should be
as of its launch. By then the host is ahead, and so may be whatever was not queued.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

from sglang_clusterkv.clusters import decoding
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.memory.step import PACKED, DenseStep, SparseStep, dense_step

if TYPE_CHECKING:
    from sglang_clusterkv.clusters.engine import ClusterEngine
    from sglang_clusterkv.clusters.stream import ForwardStream


def lists_by_numpy(requests: int, arguments: tuple[Any, ...], page: int) -> None:
    """What `kernels.lists.triton.lists_kernel` does, for so many requests, with the arguments of its launch."""
    packed, table, pages, page_count, segment_of_page, segment_begin, segment_count, *rest = arguments
    base_slots, base_count, dense_count, offset, batch, clusters = rest[:6]
    for b in range(requests):
        head = packed[b * PACKED : (b + 1) * PACKED].tolist() if b < batch else [0] * PACKED
        row, dense, segments, first, covered, base, begins, _ = head
        page_count[b], segment_count[b], base_count[b], dense_count[b] = covered // page, segments, base, dense
        offset[b] = begins if b < batch else clusters
        borders = packed[first : first + 2 * segments].view(-1, 2).long().numpy()
        places = np.arange(-(-max(covered, dense) // page)) * page
        of = np.maximum(np.searchsorted(borders[:, 1], places, side="right") - 1, 0)
        at = places + (borders[of, 0] - borders[of, 1] if segments else 0)
        pages[b, : len(places)] = table[row, at].long() // page
        segment_of_page[b, : len(places)] = torch.from_numpy(of)
        segment_begin[b, :segments] = torch.from_numpy(borders[:, 1] // page)
        tokens = np.arange(base)
        passed = np.searchsorted(borders[:, 0] - borders[:, 1], tokens, side="right")
        base_slots[b, :base] = table[row, tokens + np.append(borders[:, 1], covered)[passed]].long()
    offset[requests] = clusters


class LateReplays:
    """Captured decode steps of one engine.

    Args:
        engine: as on a GPU from now on: its steps have lists that take every request.
        stream: of the forwards.
        batch: requests that captured steps have room for.
        context_tokens: of the longest request.

    Attributes:
        counts: "replay": replays; "late": those that the host had launched more behind; "eager": steps that found no room.
    """

    def __init__(self, engine: ClusterEngine, stream: ForwardStream, batch: int, context_tokens: int) -> None:
        self.counts: Counter[str] = Counter()
        self._engine, self._stream, self._batch = engine, stream, batch
        self._launched = 0
        engine.decoding._mixes = True
        with patch.object(decoding, "reserve", lambda *of: 0):
            engine.decoding.reserve(batch, context_tokens)

    @contextlib.contextmanager
    def launching(self) -> Iterator[None]:
        """The head of a decode step is launched."""
        from sglang_clusterkv.kernels.lists import triton as lists_triton

        with patch.object(decoding, "prepare", lambda *of: None), patch.object(lists_triton, "lists_kernel", self):
            yield

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        """Triton's way to launch a kernel."""
        return lambda *arguments, PAGE, **_: self.launch(grid[0], arguments, PAGE)

    def launch(self, requests: int, arguments: tuple[Any, ...], page: int) -> None:
        """The kernel of the lists is launched on the forward's stream."""
        self._stream.run(lists_by_numpy, requests, arguments, page)

    def replay(self, step: DecodeStep) -> DecodeStep:
        """Queue the layers of a step behind its lists; returns the lists by their definition, as of now."""
        self._launched += 1
        assert step.reasons is not None
        rows, lengths, table = step.rows, step.seq_lens, self._engine.req_to_token
        sparse, dense = np.flatnonzero(step.reasons == 0), np.flatnonzero(step.reasons)
        definition = step._replace(
            sparse_at=torch.from_numpy(sparse),
            sparse=self._definition(rows[sparse], lengths[sparse]) if len(sparse) else None,
            dense_at=torch.from_numpy(dense),
            dense=dense_step(rows[dense], lengths[dense], table) if len(dense) else None,
        )
        assert (step.sparse is None) == (definition.sparse is None)
        if step.sparse is not None:
            lists = step.sparse if step.too_large else self._engine.decoding.captured(self._batch)
            self.counts["eager" if step.too_large else "replay"] += 1
            self._stream.run(self._read, lists, definition, self._launched)
        return definition

    def _definition(self, rows: np.ndarray, lengths: np.ndarray) -> SparseStep:
        lists = self._engine.decoding
        count = self._engine.tables.recallable(rows, lengths)
        return sparse_step(lists._borders(rows, lengths, count), self._engine.req_to_token, lists._page_size)

    def _read(self, lists: SparseStep, definition: DecodeStep, launched: int) -> None:
        """The device has come to the layers: they read the lists."""
        self.counts["late"] += launched < self._launched
        assert definition.sparse is not None and definition.sparse_at is not None and definition.dense_at is not None
        batch = len(definition.rows)
        for i, b in enumerate(definition.sparse_at.tolist()):
            _assert_sparse(lists, b, definition.sparse, i)
        for i, b in enumerate(definition.dense_at.tolist()):
            assert definition.dense is not None
            _assert_dense(lists, b, definition.dense, i, self._engine.page_size)
        for name in ("page_count", "segment_count", "base_count", "dense_count"):
            left = getattr(lists, name)[batch:]
            assert not left.any(), f"a replay reads requests beyond its batch: {name} {left.tolist()}"


def _assert_sparse(lists: SparseStep, b: int, definition: SparseStep, i: int) -> None:
    for name, count in (
        ("pages", "page_count"),
        ("segment_of_page", "page_count"),
        ("segment_begin", "segment_count"),
        ("base_slots", "base_count"),
    ):
        listed = int(getattr(definition, count)[i])
        assert int(getattr(lists, count)[b]) == listed, f"a replay reads another step's {count}"
        found, expected = getattr(lists, name)[b, :listed], getattr(definition, name)[i, :listed]
        assert torch.equal(found, expected), f"a replay reads another step's {name}"
    assert int(lists.dense_count[b]) == 0, "a replay reads another step's dense_count"


def _assert_dense(lists: SparseStep, b: int, definition: DenseStep, i: int, page: int) -> None:
    length = int(definition.seq_lens[i])
    assert int(lists.page_count[b]) == 0 and int(lists.dense_count[b]) == length, "a replay reads another step's counts"
    expected = definition.slots[i, :length:page] // page
    assert torch.equal(lists.pages[b, : len(expected)], expected), "a replay reads another step's pages"
