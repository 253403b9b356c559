"""Copies of rows and page states for the host: taken on the forward stream at one launch, read at the next."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.clusters.rows import NEVER, Row
from sglang_clusterkv.clusters.stream import Event, ForwardStream
from sglang_clusterkv.memory.index import ClusterIndex


class _Pending(NamedTuple):
    """A copy under way: where each row's pages lie in the flat host arrays."""

    rows: list[tuple[Row, int, int, int]]  # record, record.changed, first page, length
    counts: list[int]
    pages: torch.Tensor  # int64 [total], host
    state: torch.Tensor  # int32 [total, 3], host
    ready: Event


class Snapshots:
    """At most one copy is under way.

    Args:
        index: whose page states are copied.
        req_to_token: int32 [rows, max_context].
        stream: on which the copy runs.
    """

    def __init__(self, index: ClusterIndex, req_to_token: torch.Tensor, stream: ForwardStream) -> None:
        self._index = index
        self._req_to_token = req_to_token
        self._stream = stream
        self._pending: _Pending | None = None

    def take(self, looks: list[tuple[Row, int]]) -> None:
        """Start copying pages and page states of rows, as of now on the forward stream.

        Args:
            looks: each row's record and the page from which it is looked at.
        """
        page_size = self._index.geometry.page_size
        rows = [(record, record.changed, first, record.length) for record, first in looks]
        for record, _ in looks:
            record.void_from = NEVER
        counts = [max(0, length // page_size - first) for _, _, first, length in rows]
        row_of = np.repeat([record.row for record, *_ in rows], counts)
        starts = np.cumsum(counts) - counts
        page_of = np.arange(sum(counts)) - np.repeat(starts, counts) + np.repeat([first for _, first in looks], counts)
        places = torch.from_numpy(np.stack((row_of, page_of * page_size)).astype(np.int64))
        pinned = self._index.device != "cpu"
        pages = torch.empty(sum(counts), dtype=torch.int64, pin_memory=pinned)
        state = torch.empty((sum(counts), 3), dtype=torch.int32, pin_memory=pinned)
        self._stream.run(self._copy, places.pin_memory() if pinned else places, pages, state)
        self._pending = _Pending(rows, counts, pages, state, self._stream.event())

    def _copy(self, places: torch.Tensor, pages: torch.Tensor, state: torch.Tensor) -> None:
        """Device work: slots at `places` (row, position), their pages and the pages' states, to the host."""
        places = places.to(self._req_to_token.device, non_blocking=True)
        found = self._req_to_token[places[0], places[1]].long() // self._index.geometry.page_size
        pages.copy_(found, non_blocking=True)
        state.copy_(self._index.page_state[found], non_blocking=True)

    def read(self) -> list[Snapshot]:
        """What the last copy holds, row by row; once. Waits for it (it was queued a forward ago) and never polls: ranks
        must agree on what they know."""
        pending, self._pending = self._pending, None
        if pending is None:
            return []
        pending.ready.synchronize()
        page_size = self._index.geometry.page_size
        ends = np.cumsum(pending.counts)
        pages, state = pending.pages.numpy(), pending.state.numpy()
        snapshots = []
        for (record, changed, first, length), count, end in zip(pending.rows, pending.counts, ends, strict=True):
            known = slice(end - count, end - count + max(0, min(count, record.void_from // page_size - first)))
            snapshots.append(Snapshot(record, changed, first, length, pages[known], state[known]))
        return snapshots

    def drop(self) -> None:
        """Forget the copy under way."""
        self._pending = None
