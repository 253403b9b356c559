"""The engine of one scheduler process: what happens between the scheduler's events and the layers' kernels.

Everything on the device runs on the forward stream, in launch order:

    head of forward N + 1:  invalidate what was handed out | plan from the snapshot of N | forget, build | snapshot

Host state is touched at launch and by the scheduler's callbacks (free, rewrite, clear), never by the device.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.clusters.index import UNCLUSTERED, ClusterIndex
from sglang_clusterkv.clusters.plan import Forget, Make, Plan, Planner, Snapshot
from sglang_clusterkv.clusters.rows import DenseReason, Row, RowTables
from sglang_clusterkv.clusters.step import DenseStep, RowBorders, SparseStep, dense_step, sparse_step
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES

logger = logging.getLogger(__name__)


class Extend(NamedTuple):
    """One request of a prefill batch, as the scheduler launches it."""

    row: int
    rid: str
    prefix_tokens: int  # tokens whose KV existed before this chunk
    end_tokens: int  # tokens whose KV exists after it
    prompt_len: int
    last_chunk: bool


class HandedOut:
    """What the allocator gave out since the last forward was launched: the index forgets it at the next one's head.

    Filled on the scheduler's side, applied on the forward stream: the pages may still be read by a forward in flight.
    """

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._all = False

    def add(self, slots: torch.Tensor) -> None:
        """Note slots (int64 [n]). A page that is merely continued may be among them: it is unclustered, for no
        clustered page is partial."""
        self._slots.append(slots)

    def clear(self) -> None:
        """All pages are free again."""
        self._slots.clear()
        self._all = True

    def apply(self, index: ClusterIndex) -> None:
        """Mark the pages unclustered. Call on the forward stream."""
        if self._all:
            index.invalidate_all()
            self._all = False
        if self._slots:
            index.invalidate(torch.cat(self._slots) // index.geometry.page_size)
            self._slots.clear()


class _Pending(NamedTuple):
    """A snapshot under way: where each row's pages lie in the flat host copy."""

    rows: list[tuple[Row, int, int, int]]  # record, record.changed, first page, length
    counts: list[int]
    pages: torch.Tensor  # int64 [total], host
    state: torch.Tensor  # int32 [total, 3], host
    ready: object | None  # torch.cuda.Event, None on the CPU


@dataclass
class Counters:
    """What the engine did since it was made; all rise."""

    segments: int = 0
    tokens_clustered: int = 0
    tokens_reused: int = 0
    tokens_recalled: int = 0
    tokens_available: int = 0
    sparse_steps: int = 0
    splits: int = 0
    merges: int = 0
    build_conflicts: int = 0
    build_s: float = 0.0
    dense_steps: Counter[str] = field(default_factory=Counter)  # requests of a step, by reason
    dense_layer_calls: Counter[str] = field(default_factory=Counter)  # requests of one layer of a step, by reason
    faults: Counter[str] = field(default_factory=Counter)  # exceptions of our own code that were survived, by operation


class DecodeStep(NamedTuple):
    """How the requests of one decode batch attend; indices are places in the batch."""

    sparse_at: torch.Tensor | None  # int64, None: the whole batch
    sparse: SparseStep | None
    dense_at: torch.Tensor | None
    dense: DenseStep | None
    rows: np.ndarray  # int64 [B], lines of req_to_token
    seq_lens: np.ndarray  # int64 [B]


class ClusterEngine:
    """Plans, builds and keeps the cluster index of one KV pool.

    Args:
        index: the arrays.
        key_buffers: the pool's keys, one [slots, kv_heads, head_dim] per layer.
        value_buffers: likewise.
        req_to_token: int32 [rows, max_context], SGLang's table.
        handed_out: the allocator's notes.
    """

    def __init__(
        self,
        index: ClusterIndex,
        key_buffers: list[torch.Tensor],
        value_buffers: list[torch.Tensor],
        req_to_token: torch.Tensor,
        handed_out: HandedOut,
    ) -> None:
        self.index = index
        self.handed_out = handed_out
        self.config = index.config
        self.page_size = index.geometry.page_size
        self.key_buffers = key_buffers
        self.value_buffers = value_buffers
        self.req_to_token = req_to_token
        self.planner = Planner(self.config, self.page_size)
        rows, context = req_to_token.shape
        most_segments = context // (SEGMENT_VECTOR_PAGES * self.page_size) + 1
        self.tables = RowTables(rows, most_segments, self.config.window_tokens)
        self.counters = Counters()
        self._pending: _Pending | None = None
        # On a GPU one call takes all layers' heads; on a CPU a few stay in its cache.
        self._layers_per_call = len(key_buffers) if index.device != "cpu" else 1

    # -- the scheduler's events (host only) -----------------------------------------------------------------------

    def row_freed(self, row: int) -> None:
        """The row's request ended."""
        record = self.planner.rows.get(row)
        if record is not None:
            borders = [(segment.begin, segment.end) for segment in record.segments]
            logger.debug("clusterkv: request %s: %d tokens, segments %s", record.rid, record.length, borders)
        self.planner.free(row)
        self.tables.drop(row)

    def rows_cleared(self) -> None:
        """All rows were freed."""
        self.planner.clear()
        self.tables.known[:] = False

    def row_rewritten(self, row: int, begin: int, end: int) -> None:
        """The row's slots for positions [begin, end) were replaced by the tree's."""
        if self.planner.rewritten(row, begin, end):
            self.tables.dirty[row] = True

    # -- a forward is launched ------------------------------------------------------------------------------------

    def begin_extend(self, extends: list[Extend]) -> None:
        """A prefill batch is launched. Call on the forward stream, before its kernels."""
        self._begin()
        look_at: list[Row] = []
        for extend in extends:
            record = self.planner.rows.get(extend.row)
            if record is None or record.rid != extend.rid:
                record = self.planner.admit(
                    extend.row, rid=extend.rid, found_tokens=extend.prefix_tokens, prompt_len=extend.prompt_len
                )
            record.length = extend.end_tokens
            record.prefilling = not extend.last_chunk
            self.tables.write(record)
            look_at.append(record)
        if any(record.dirty for record in look_at):
            # Another request's open pages may be among what a new one found: look at those too.
            look_at += [record for record in self.planner.rows.values() if record not in look_at]
        self._snapshot(look_at)

    def begin_decode(self, rows: np.ndarray, seq_lens: np.ndarray) -> DecodeStep:
        """A decode batch is launched. Call on the forward stream, before its kernels.

        Args:
            rows: int64 [B], lines of req_to_token, on the host.
            seq_lens: int64 [B], tokens of each request, this step's included, on the host.

        Returns:
            The lists that the layers attend to.
        """
        self._begin()
        known = self.tables.known[rows]
        aged = seq_lens // self.page_size * self.page_size - self.config.window_tokens
        waits = known & (aged - self.tables.waits_from[rows] >= self.config.recluster_every)
        look_at = np.flatnonzero(waits | known & self.tables.dirty[rows])
        if len(look_at):
            self._look_at_decoding(rows[look_at], seq_lens[look_at])
        return self._decode_step(rows, seq_lens)

    def _look_at_decoding(self, rows: np.ndarray, seq_lens: np.ndarray) -> None:
        """Snapshot rows of a decode batch that were rewritten or have aged tokens: rare, so a loop is fine."""
        records = []
        for row, length in zip(rows.tolist(), seq_lens.tolist(), strict=True):
            record = self.planner.rows[row]
            record.length = length
            records.append(record)
        if any(record.dirty for record in records):
            records += [record for record in self.planner.rows.values() if record not in records]
        self._snapshot(records)

    def _begin(self) -> None:
        self.handed_out.apply(self.index)
        if self._pending is not None:
            snapshots = self._read(self._pending)
            self._pending = None
            self._run(self.planner.plan(snapshots))

    def _snapshot(self, records: list[Row]) -> None:
        """Start copying the rows' pages and page states to the host, as of now on the forward stream."""
        rows, counts = [], []
        for record in records:
            first = self.planner.first_page_to_look_at(record)
            rows.append((record, record.changed, first, record.length))
            counts.append(max(0, record.length // self.page_size - first))
        row_of = np.repeat([record.row for record, *_ in rows], counts)
        starts = np.cumsum(counts) - counts
        page_of = np.arange(sum(counts)) - np.repeat(starts, counts) + np.repeat([r[2] for r in rows], counts)
        device = self.req_to_token.device
        places = torch.from_numpy(np.stack((row_of, page_of * self.page_size)).astype(np.int64))
        if device.type != "cpu":
            places = places.pin_memory().to(device, non_blocking=True)
        pages = self.req_to_token[places[0], places[1]].long() // self.page_size
        state = self.index.page_state[pages]
        ready = None
        if device.type != "cpu":
            pages, state = _to_pinned(pages), _to_pinned(state)
            ready = torch.cuda.Event()
            ready.record()
        self._pending = _Pending(rows, counts, pages, state, ready)

    def _read(self, pending: _Pending) -> list[Snapshot]:
        """Wait for the copy (it was queued a forward ago) and cut it into rows. Never polls: ranks must agree."""
        if pending.ready is not None:
            pending.ready.synchronize()  # type: ignore[attr-defined]
        ends = np.cumsum(pending.counts)
        pages, state = pending.pages.numpy(), pending.state.numpy()
        return [
            Snapshot(record, changed, first, length, pages[end - count : end], state[end - count : end])
            for (record, changed, first, length), count, end in zip(pending.rows, pending.counts, ends, strict=True)
        ]

    def _run(self, plan: Plan) -> None:
        """Carry out a plan on the device and publish the rows it touched."""
        started = time.perf_counter()
        conflicts: set[int] = set()
        for operation in plan.operations:
            if isinstance(operation, Forget):
                self.index.forget([operation.id])
            elif not self._make(operation):
                conflicts.add(operation.row)
        for record in plan.touched:
            if record.row in conflicts:
                self.planner.rewritten(record.row, 0, 1)
            self.tables.write(record)
        self.counters.splits += plan.splits
        if plan.operations and self.index.device == "cpu":
            self.counters.build_s += time.perf_counter() - started
        for record in plan.touched:
            self._announce(record)

    def _make(self, make: Make) -> bool:
        """Build one segment; false if a page turned out to be another segment's (checked where it costs nothing)."""
        begin = make.first_page * self.page_size
        slots = self.req_to_token[make.row, begin : begin + make.pages * self.page_size].long()
        if self.index.device == "cpu":
            owners = self.index.page_state[slots[:: self.page_size] // self.page_size, 0]
            if bool((owners != UNCLUSTERED).any()):
                self.counters.build_conflicts += 1
                logger.warning(
                    "clusterkv: segment %d of row %d was not built: pages %d to %d belong to segments %s. "
                    "The request decodes densely until looked at again; please report this.",
                    make.id, make.row, make.first_page, make.first_page + make.pages, sorted(set(owners.tolist())),
                )  # fmt: skip
                return False
        build.build_segment(self.index, make.id, slots, self.key_buffers, self.value_buffers, self._layers_per_call)
        self.counters.segments += 1
        self.counters.tokens_clustered += make.pages * self.page_size
        return True

    def _announce(self, record: Row) -> None:
        """Say once per request, when its prefill is planned, what was clustered and what was reused."""
        if record.announced or record.prefilling:
            return
        record.announced = True
        self.counters.tokens_reused += record.reused_tokens
        if record.clustered_tokens or record.reused_tokens:  # a short prompt has nothing to say
            logger.info(
                "clusterkv: request %s: %d prompt tokens, %d cached, %d clustered, %d reused",
                record.rid, record.prompt_len, record.cached_tokens, record.clustered_tokens, record.reused_tokens,
            )  # fmt: skip

    def _decode_step(self, rows: np.ndarray, seq_lens: np.ndarray) -> DecodeStep:
        """Sort the batch into sparse and dense requests, and make the lists of both."""
        config, tables = self.config, self.tables
        count = tables.recallable(rows, seq_lens)
        covered = tables.covered[rows, count]
        base = seq_lens - covered
        longest = config.sink_tokens + 2 * config.recluster_every + config.window_tokens + self.page_size
        reasons = np.select(
            [
                ~tables.known[rows],
                tables.dirty[rows],
                seq_lens < config.dense_below_tokens,
                covered <= config.budget_tokens,
                base > longest,
            ],
            [DenseReason.UNPLANNED, DenseReason.DIRTY, DenseReason.SHORT, DenseReason.BUDGET, DenseReason.WINDOW],
            0,
        )
        for reason, times in zip(*np.unique(reasons[reasons > 0], return_counts=True), strict=True):
            self.counters.dense_steps[DenseReason(reason).name.lower()] += int(times)
        sparse, dense = np.flatnonzero(reasons == 0), np.flatnonzero(reasons)
        self.counters.sparse_steps += len(sparse)
        self.counters.tokens_available += int(covered[sparse].sum())
        self.counters.tokens_recalled += int(np.minimum(covered[sparse], config.budget_tokens).sum())
        device = self.req_to_token.device
        at = [torch.from_numpy(part).to(device, non_blocking=True) for part in (sparse, dense)]
        return DecodeStep(
            sparse_at=at[0] if len(dense) else None,
            sparse=self._sparse_step(rows[sparse], seq_lens[sparse], count[sparse]) if len(sparse) else None,
            dense_at=at[1] if len(sparse) else None,
            dense=dense_step(rows[dense], seq_lens[dense], self.req_to_token) if len(dense) else None,
            rows=rows,
            seq_lens=seq_lens,
        )

    def _sparse_step(self, rows: np.ndarray, seq_lens: np.ndarray, count: np.ndarray) -> SparseStep:
        tables = self.tables
        borders = RowBorders(rows, seq_lens, count, tables.begin[rows], tables.end[rows], tables.covered[rows])
        return sparse_step(borders, self.req_to_token, self.page_size)

    def server_info(self) -> dict[str, object]:
        """Counts for /server_info, the demo and the tests: plain integers and one dictionary."""
        counters = self.counters
        return {
            "segments": counters.segments,
            "clusters": self.index.clusters,
            "tokens_clustered": counters.tokens_clustered,
            "tokens_reused": counters.tokens_reused,
            "tokens_recalled": counters.tokens_recalled,
            "tokens_available": counters.tokens_available,
            "sparse_steps": counters.sparse_steps,
            "dense_steps": dict(counters.dense_steps),
            "dense_layer_calls": dict(counters.dense_layer_calls),
            "splits": counters.splits,
            "merges": counters.merges,
            "faults": dict(counters.faults),
            "build_conflicts": counters.build_conflicts,
            "build_ms": round(1000 * counters.build_s),
            "bytes": self.index.bytes,
            "running": len(self.planner.rows),
        }


def _to_pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Start a copy of a device tensor to pinned host memory."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
