"""Watches the layers of traced requests: what they recalled, by position, and how much of the mass it got.

    head of forward N + 1:  what the layers of N left is worked up, and copied to the host
    lists of N + 1:         the pages of its traced requests, as their rows are at this step
    a layer of N + 1:       slots and shares of its traced requests, before the next layer takes their place

Everything on the device runs on the forward stream, and nothing waits for it before the answer is there. A server without
`trace` has a `Tracing`, which does nothing: its layers call the chain itself.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.clusters.rows import DenseReason, RowTables, Segment
from sglang_clusterkv.clusters.trace import SegmentClusters, Step, StepRead, Trace
from sglang_clusterkv.kernels.decode import last_read
from sglang_clusterkv.kernels.trace import looks
from sglang_clusterkv.kernels.trace.quest import PageBounds
from sglang_clusterkv.kernels.trace.reference import Traced

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang_clusterkv.clusters.counters import Faults
    from sglang_clusterkv.clusters.decoding import DecodeStep
    from sglang_clusterkv.clusters.planning.records import Records
    from sglang_clusterkv.clusters.stream import ForwardStream
    from sglang_clusterkv.kernels.trace.reference import Looks
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer

    SparseDecode = Callable[..., torch.Tensor]

MOST_AT_ONCE = 4  # traced requests: each takes time of a step, and memory of the host


class Tracing:
    """A server that keeps no traces. `RequestTracing` is the other one."""

    def around(self, decode: SparseDecode) -> SparseDecode:
        """What a layer calls."""
        return decode

    def start(self, row: int, trace: Trace) -> bool:
        """The request that has this row is traced from its next step on; whether it is."""
        return False

    def begin_step(self, step: DecodeStep) -> None:
        """The lists of a step were made."""

    def failed(self) -> None:
        """A layer of the step failed, so the step is dense."""

    def end_step(self) -> None:
        """The layers of the step that was begun last were launched."""

    def collect(self, trace: Trace, token: int) -> None:
        """Wait until all that the trace keeps of steps with a query before position `token` is on the host."""

    def row_freed(self, row: int) -> None:
        """The row's request ended."""

    def rows_cleared(self) -> None:
        """All rows were freed."""


class _Watched:
    """A sparse step of a traced request.

    Attributes:
        number: of the request among those that are traced in the step.
        traced: the request in the step's lists.
        numbers: int64 [N], on the host: the pages of its recallable segments in their order, by number in the request.
        quest: what Quest would have read in the layers, where the trace asks.
    """

    def __init__(self, trace: Trace, step: Step, number: int, traced: Traced, numbers: np.ndarray) -> None:
        self.trace = trace
        self.step = step
        self.number = number
        self.traced = traced
        self.numbers = numbers
        self.quest: list[torch.Tensor] = []


class RequestTracing(Tracing):
    """Fills the traces of some requests.

    Args:
        index: that the layers read.
        tables: borders of each row.
        records: the segments of each row.
        req_to_token: int32 [rows, max_context].
        stream: the forward's.
        faults: where a failure of ours is counted; it ends the traces, and no step.
    """

    def __init__(
        self,
        index: ClusterIndex,
        tables: RowTables,
        records: Records,
        req_to_token: torch.Tensor,
        stream: ForwardStream,
        faults: Faults,
    ) -> None:
        self._index = index
        self._tables = tables
        self._records = records
        self._req_to_token = req_to_token
        self._stream = stream
        self._faults = faults
        self._rows: dict[int, Trace] = {}
        self._lists: SparseStep | None = None  # of the step whose layers are looked at
        self._looks: Looks | None = None
        self._watched: list[_Watched] = []
        self._copied = stream.event()  # behind the last copies that a head queued

    def around(self, decode: SparseDecode) -> SparseDecode:
        """What a layer calls: the chain, then a look at what it left of the traced requests."""

        def watched(
            q: torch.Tensor,
            keys: torch.Tensor,
            values: torch.Tensor,
            index: ClusterIndex,
            layer: int,
            step: SparseStep,
            scale: float,
            tier: TierLayer | None = None,
            **more: Any,
        ) -> torch.Tensor:
            if tier is not None:
                more["tier"] = tier
            output = decode(q, keys, values, index, layer, step, scale, **more)
            if step is self._lists and self._looks is not None:
                try:
                    self._look(self._looks, q, keys, layer, scale, tier)
                except Exception as error:
                    self._give_up(error)
            return output

        return watched

    def start(self, row: int, trace: Trace) -> bool:
        """See `Tracing`; no more than `MOST_AT_ONCE`."""
        if len(self._rows) >= MOST_AT_ONCE and row not in self._rows:
            return False
        self._rows[row] = trace
        return True

    def row_freed(self, row: int) -> None:
        """See `Tracing`."""
        self._rows.pop(row, None)

    def rows_cleared(self) -> None:
        """See `Tracing`."""
        self._rows.clear()

    def begin_step(self, step: DecodeStep) -> None:
        """See `Tracing`."""
        if not self._rows or step.reasons is None:
            return
        try:
            for at in np.flatnonzero(np.isin(step.rows, list(self._rows))).tolist():
                self._begin(step, at, self._rows[int(step.rows[at])])
            if self._watched:
                assert step.sparse is not None
                self._looks = looks(self._index, step.sparse, [request.traced for request in self._watched])
                if self._looks.at_layers or any(request.trace.bounds is not None for request in self._watched):
                    self._lists = step.sparse
        except Exception as error:
            self._give_up(error)

    def _begin(self, decode: DecodeStep, at: int, trace: Trace) -> None:
        """The step's request at place `at` is traced."""
        assert decode.reasons is not None
        rows, lengths = decode.rows[at : at + 1], decode.seq_lens[at : at + 1]
        row, length = int(rows[0]), int(lengths[0])
        tables = self._tables
        segments = int(tables.recallable(rows, lengths)[0]) if tables.known[row] else 0
        clustered = int(tables.covered[row, segments])
        if decode.reasons[at]:
            reason = DenseReason(decode.reasons[at]).name.lower()
            trace.add(Step(length - 1, reason, [(0, length)], clustered, segments))
            return
        assert decode.sparse is not None
        begins, ends = tables.begin[row, :segments], tables.end[row, :segments]
        borders = np.column_stack((np.append(0, ends), np.append(begins, length)))
        step = Step(length - 1, None, [(b, e) for b, e in borders.tolist() if b < e], clustered, segments)
        page_size = self._index.geometry.page_size
        of_all = decode.sparse.batch == len(decode.rows)  # on a GPU, dense requests included
        place = at if of_all else int((decode.reasons[:at] == 0).sum())
        first = np.concatenate([np.arange(b, e, page_size) for b, e in zip(begins, ends, strict=True)])
        in_order = decode.sparse.pages[place, : len(first)]
        self._see(trace, row, self._records.rows[row].segments[:segments])
        trace.add(step)
        traced = Traced(place, in_order, first)
        self._watched.append(_Watched(trace, step, len(self._watched), traced, first // page_size))

    def _see(self, trace: Trace, row: int, segments: list[Segment]) -> None:
        """Copy the clusters of segments that are new to a trace, and let go of those that it sees no more."""
        seen = tuple(segment.id for segment in segments)
        if seen == trace.seen:
            return
        for segment in segments:
            if segment.id not in trace.seen:
                self._stream.run(self._copy, trace, segment, row)
        for gone in set(trace.segments) - set(seen):
            del trace.segments[gone]
        trace.seen = seen

    def _copy(self, trace: Trace, segment: Segment, row: int) -> None:
        """Device work: a segment's clusters, to the host."""
        arrays = self._index.arrays
        slots = self._req_to_token[row, segment.begin : segment.end].long()
        clusters = self._index.cluster_rows(slots[:: self._index.geometry.page_size] // self._index.geometry.page_size)
        rows = clusters.flatten()
        trace.segments[segment.id] = SegmentClusters(
            segment.begin,
            *_to_host(arrays["members"][:, slots], arrays["cluster_end"][:, rows], arrays["spread"][:, rows]),
        )

    def _look(
        self,
        looks: Looks,
        q: torch.Tensor,
        keys: torch.Tensor,
        layer: int,
        scale: float,
        tier: TierLayer | None,
    ) -> None:
        """Note what the layer that just ran read; q [B, heads, D], keys [slots, H, D]."""
        grouped = q.unflatten(1, (keys.shape[1], -1))
        looks.look(partial(last_read, self._index, grouped.shape[2], keys.dtype), grouped, keys, layer, scale, tier)
        page_size = self._index.geometry.page_size
        for request in self._watched:
            if request.trace.bounds is not None:
                bounds = request.trace.bounds.setdefault(layer, PageBounds(page_size))
                bounds.see(request.numbers, request.traced.pages, keys, tier)
                count = min(self._index.config.budget_tokens // page_size, len(request.numbers))
                request.quest.append(bounds.chosen(grouped[request.traced.place], request.numbers, count))

    def failed(self) -> None:
        """See `Tracing`."""
        for request in self._watched:
            step = request.step
            step.dense, step.base = DenseReason.FAULT.name.lower(), [(0, step.token + 1)]
        self._forget()

    def end_step(self) -> None:
        """See `Tracing`."""
        try:
            for request in self._watched:
                self._stream.run(self._finish, self._looks, request)
            if self._watched:
                self._copied = self._stream.event()
        except Exception as error:
            self._give_up(error)
        self._forget()

    def collect(self, trace: Trace, token: int) -> None:
        """See `Tracing`. The answer's last token is there, so its steps have run; a later one may be under way, in vain."""
        mine = [request for request in self._watched if request.trace is trace]
        self._watched = [request for request in self._watched if request.trace is not trace]
        for request in mine:
            if request.step.token < token:
                self._stream.run(self._finish, self._looks, request)
        # Copies were queued at heads, on the forward's stream, and maybe just now, on the current one.
        for event in (self._copied, self._stream.event()):
            event.synchronize()

    def _finish(self, looks: Looks, request: _Watched) -> None:
        """Device work: all of it becomes positions in their order, and goes to the host."""
        found = looks.found(request.number)
        if found is not None:
            quest = (torch.stack(request.quest),) if request.quest else ()
            request.step.read = StepRead(found[0], *_to_host(*found[1], *quest))

    def _forget(self) -> None:
        """No layers are watched until the next step begins."""
        if self._looks is not None:
            self._looks.end()
        self._lists, self._looks, self._watched = None, None, []

    def _give_up(self, error: Exception) -> None:
        """Count a fault of ours; what is traced now is kept no further."""
        self._faults.note("trace", error)
        for trace in self._rows.values():
            trace.refused = "The server failed to keep this trace; its log has the reason."
        self._rows.clear()
        self._forget()


def _to_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """On the host, once the stream has come so far; of tensors that nobody writes into again."""
    return tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)


def tracing_of(
    index: ClusterIndex,
    tables: RowTables,
    records: Records,
    req_to_token: torch.Tensor,
    stream: ForwardStream,
    faults: Faults,
) -> Tracing:
    """A server's, with or without `trace`; the arguments of `RequestTracing`."""
    return RequestTracing(index, tables, records, req_to_token, stream, faults) if index.config.trace else Tracing()
