"""The engine of one scheduler process: what happens between the scheduler's events and the layers' kernels.

Everything on the device runs on the forward stream, in launch order:

    head of forward N + 1:  invalidate what was handed out | plan from the snapshot of N | forget, build | snapshot

Host state is touched at launch and by the scheduler's callbacks (free, rewrite, clear), never by the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np
import torch

from sglang_clusterkv.clusters.backoff import BackOff
from sglang_clusterkv.clusters.building import Builder
from sglang_clusterkv.clusters.counters import Counters, Faults, StepCounts
from sglang_clusterkv.clusters.decoding import DecodeLists, DecodeStep
from sglang_clusterkv.clusters.extending import ExtendStep, extend_step, may_recall
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.clusters.planning.plan import Plan, Snapshot
from sglang_clusterkv.clusters.planning.planner import Planner
from sglang_clusterkv.clusters.planning.records import Records
from sglang_clusterkv.clusters.residency import residency_of
from sglang_clusterkv.clusters.rows import DenseReason, Extend, Row, RowTables
from sglang_clusterkv.clusters.snapshots import Snapshots
from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.clusters.tracing import tracing_of
from sglang_clusterkv.config import checks_indices
from sglang_clusterkv.kernels.checks import IndexChecks
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.memory.index import OUT_OF_RANGE, ClusterIndex
from sglang_clusterkv.memory.recalled_mass import mean_by_group
from sglang_clusterkv.memory.tier import Tier

logger = logging.getLogger(__name__)

SparseDecode = Callable[..., torch.Tensor]  # with the arguments of kernels.decode.sparse_decode


class ClusterEngine:
    """Plans, builds and keeps the cluster index of one KV pool.

    Args:
        index: the arrays.
        key_buffers: the pool's keys, one [slots, kv_heads, head_dim] per layer.
        value_buffers: likewise.
        req_to_token: int32 [rows, max_context], SGLang's table.
        handed_out: the allocator's notes.
        stream: takes the device's work; by default the device's own.
        group: query heads per kv head, so that memory for a step's layers is taken with its lists; None: by its first layer.
        tier: of the pool, whose buffers then hold some of its pages; None: they hold all.
    """

    def __init__(
        self,
        index: ClusterIndex,
        key_buffers: list[torch.Tensor],
        value_buffers: list[torch.Tensor],
        req_to_token: torch.Tensor,
        handed_out: HandedOut,
        stream: ForwardStream | None = None,
        group: int | None = None,
        tier: Tier | None = None,
    ) -> None:
        self.index = index
        self.group = group
        self.handed_out = handed_out
        self.config = index.config
        self.page_size = index.geometry.page_size
        self.key_buffers = key_buffers
        self.value_buffers = value_buffers
        self.req_to_token = req_to_token
        self.records = Records()
        self.planner = Planner(self.config, self.page_size, self.records)
        self.tables = RowTables(len(req_to_token), self.config.window_tokens)
        self.counters = Counters()
        self.faults = Faults(self.counters.faults)
        self.stream = stream or ForwardStream(index.device)
        self.tracing = tracing_of(index, self.tables, self.records, req_to_token, self.stream, self.faults)
        # One layer of a step's sparse requests; the benchmarks put other policies here.
        self.sparse_decode: SparseDecode = self.tracing.around(self._checked(sparse_decode))
        self.tier = tier
        self.residency = residency_of(tier, self.config, req_to_token, handed_out, self.stream, self.faults)
        self.snapshots = Snapshots(index, req_to_token, self.stream)
        self.decoding = DecodeLists(index, self.tables, req_to_token, key_buffers[0].dtype, group)
        self.builder = Builder(
            index, req_to_token, key_buffers, value_buffers, self.counters, self.faults, self._lost, tier
        )
        self._under_way: StepCounts | None = None  # of the decode step that was begun last, until it is counted
        self._looks, self._layers = BackOff(), BackOff()

    def _checked(self, decode: SparseDecode) -> SparseDecode:
        """A layer that checks indices first, where that is asked for."""
        if not checks_indices():
            return decode
        self.index.checks = IndexChecks(self.index, self.index.violations[OUT_OF_RANGE])
        return self.index.checks.around(decode)

    def set_step_options(self, **options: object) -> None:
        """Change some of `STEP_OPTIONS` from the next decode step on; what is clustered stays as it is.

        Raises ConfigError for another option, for values that do not go together, and for refining without stored codes.
        """
        self.config = self.decoding.set_options(options)

    # -- the scheduler's events (host only) -----------------------------------------------------------------------

    def row_freed(self, row: int) -> None:
        """The row's request ended."""
        record = self.records.rows.get(row)
        if record is not None:
            borders = [(segment.begin, segment.end) for segment in record.segments]
            logger.debug("clusterkv: request %s: %d tokens, segments %s", record.rid, record.length, borders)
        self.tables.drop(row)
        self.residency.row_freed(row)
        self.tracing.row_freed(row)
        try:
            self.records.free(row)
        except Exception as error:
            self.records.rows.pop(row, None)
            self._start_over("free", error)

    def rows_cleared(self) -> None:
        """All rows were freed."""
        self.records.clear()
        self.tables.clear()
        self.residency.rows_cleared()
        self.tracing.rows_cleared()

    def row_rewritten(self, row: int, begin: int, end: int) -> None:
        """The row's slots for positions [begin, end) were replaced by the tree's."""
        try:
            if self.records.rewritten(row, begin, end):
                self.tables.dirty[row] = True
        except Exception as error:
            self._start_over("rewrite", error)

    def tokens_to_keep(self, row: int, tokens: int) -> int:
        """How many of a row's first `tokens` others may find: with `reproducible`, none whose KV follows a sparse step."""
        return min(tokens, int(self.tables.exact[row])) if self.config.reproducible else tokens

    # -- a forward is launched ------------------------------------------------------------------------------------

    def begin_extend(self, extends: list[Extend]) -> ExtendStep | None:
        """A prefill batch is launched. Call on the forward stream, before its kernels.

        Returns:
            The lists of those requests that recall; None: all attend to everything.
        """
        self.residency.extend(extends)
        ready = self._begin()
        chosen = self._walk_first(extends) if ready and self.config.recall_extend_tokens > 0 else []
        self.residency.fill()
        look_at = [record for record in map(self._admit, extends) if record is not None]
        if ready:
            self._look(look_at)
        step = None
        try:
            if chosen:
                step = extend_step(self.decoding, extends, chosen, self._looks, self._layers)
        except Exception as error:
            self.faults.note("lists", error)
        self._under_way = None if step is None else step.counts
        return step

    def _walk_first(self, extends: list[Extend]) -> list[int]:
        """Walk the rows of a prefill batch that may recall, as they are before it; on a CPU nobody waits for the copy.

        Returns:
            Their places in the batch.
        """
        chosen = may_recall(extends, [self._admit(extend, before=True) for extend in extends], self.config)
        if chosen:
            self._look(list(chosen.values()))
            self._plan(self.snapshots.read())
        return list(chosen)

    def _admit(self, extend: Extend, before: bool = False) -> Row | None:
        """Note a request's chunk, see `Records.chunk`; None where that failed, and the request will decode densely."""
        try:
            record = self.records.chunk(extend, before)
            self.tables.write(record)
            return record
        except Exception as error:
            self.records.rows.pop(extend.row, None)
            self.tables.drop(extend.row)
            self._start_over("admit", error)
            return None

    def begin_decode(self, rows: np.ndarray, seq_lens: np.ndarray) -> DecodeStep:
        """A decode batch is launched. Call on the forward stream, before its kernels.

        Args:
            rows: int64 [B], lines of req_to_token, on the host.
            seq_lens: int64 [B], tokens of each request, this step's included, on the host.

        Returns:
            The lists that the layers attend to.
        """
        self.residency.decode(rows, seq_lens)
        ready = self._begin()
        self.residency.fill()
        tables = self.tables
        aged = seq_lens // self.page_size * self.page_size - self.config.window_tokens
        waits = aged - tables.waits_from[rows] >= self.config.recluster_every
        look = np.flatnonzero(
            tables.known[rows] & (waits | tables.dirty[rows]) & (tables.look_from[rows] <= self._looks.launch)
        )
        if ready and len(look):
            self._look_at_decoding(rows[look], seq_lens[look])
        step = None
        try:
            step = self.decoding.step(rows, seq_lens, self._looks, self._layers)
        except Exception as error:
            self.faults.note("lists", error)
        if step is None:
            # Out of the handler, whose error keeps alive what the failed attempt had allocated.
            step = self.decoding.all_dense(rows, seq_lens)
        self._under_way = step.counts
        self.tracing.begin_step(step)
        return step

    def sparse_layer(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, step: DecodeStep | ExtendStep,
        scale: float, sinks: torch.Tensor | None = None,
    ) -> torch.Tensor | None:  # fmt: skip
        """Attention of one layer for the sparse requests of the step that was begun last; see `sparse_decode`.

        Args:
            q: [B, heads, D], of all requests, or of all new tokens of a prefill.
            keys: [slots, kv_heads, D], the layer's pool.
            values: likewise.
            layer: counted from this rank's first.
            step: the whole step; some of its requests are sparse.
            scale: of the logits.
            sinks: [heads], the layer's learned attention sinks; None: it has none.

        Returns:
            [B, heads, D] with the lines of the sparse requests, the others uninitialised. None where our own code failed: these
            requests have to attend to everything from this layer on, and the step is counted so.
        """
        try:
            more = self.residency.layer(layer) | ({} if sinks is None else {"sinks": sinks})
            output = torch.empty_like(q)
            for at, lists in step.parts:
                if at is None:
                    return self.sparse_decode(q, keys, values, self.index, layer, lists, scale, **more)
                output[at] = self.sparse_decode(q[at], keys, values, self.index, layer, lists, scale, **more)
            return output
        except Exception as error:
            self.faults.note("layer", error)
        self._layers.failed()
        self.tracing.failed()
        if self._under_way is not None:
            self._under_way = self._under_way.turned_dense()
        return None

    def turn_dense(self, step: DecodeStep) -> DecodeStep:
        """The step that was begun last, if all of its requests have to attend to everything: another rank's do."""
        self._under_way = step.counts.turned_dense() if step.counts is not None else None
        reasons = np.full(len(step.rows), DenseReason.FAULT)
        return DecodeStep(None, None, None, None, step.rows, step.seq_lens, self._under_way, reasons)

    def count_step(self) -> None:
        """Count the step that was begun last; call once its layers have run, and before counts are read."""
        if self._under_way is not None:
            if self._under_way.sparse or self._under_way.recalled_extends:
                self._layers.succeeded()
            self.counters.add(self._under_way)
            self._under_way = None

    def _look_at_decoding(self, rows: np.ndarray, seq_lens: np.ndarray) -> None:
        """Rows of a decode batch that were rewritten or have aged tokens: rare, so a loop is fine."""
        records = [self.records.rows[row] for row in rows.tolist()]
        for record, length in zip(records, seq_lens.tolist(), strict=True):
            record.length = length
        self._look(records)

    def _look(self, records: list[Row]) -> None:
        """Take a snapshot of these rows; the next launch plans from it."""
        if any(record.dirty for record in records):
            # Another request's open pages may be among what a new one found: look at those too.
            records = records + [record for record in self.records.rows.values() if record not in records]
        try:
            self.snapshots.take([(record, self.planner.first_page_to_look_at(record)) for record in records])
        except Exception as error:
            self.snapshots.drop()
            self._wait("copy", error)

    def _begin(self) -> bool:
        """Invalidate, plan and build; false where nothing should be looked at in this launch."""
        self.count_step()
        self.tracing.end_step()
        self._looks.launch += 1
        self._layers.launch += 1
        doing = "invalidate"
        try:
            self.handed_out.apply(self.index, self.stream)
            doing = "copy"
            snapshots = self.snapshots.read()
        except Exception as error:
            # Nothing is lost: rows that wait to be looked at still do.
            self.snapshots.drop()
            self._wait(doing, error)
            return False
        self._plan(snapshots)
        return self._looks.over

    def _plan(self, snapshots: list[Snapshot]) -> None:
        """Decide what follows from snapshots, and build it."""
        try:
            if snapshots:
                self._run(self.planner.plan(snapshots))
                self._looks.succeeded()
        except Exception as error:
            self._start_over("plan", error)

    def _run(self, plan: Plan) -> None:
        """Queue a plan's device work and publish the rows it touched."""
        calls = plan.calls(self.builder.most_pages)
        for call in calls:
            if isinstance(call, list):
                self.stream.run(self.builder.make, call, plan.merged)
                continue
            try:
                self.stream.run(self.index.forget, [call.id])
                self.counters.splits += call.id in plan.cut
            except Exception as error:
                # The pages that were to be clustered anew may still be the old segment's.
                self.faults.note("cut", error)
                for rest in calls:
                    self._lost(operation.id for operation in (rest if isinstance(rest, list) else [rest]))
        for record in plan.touched:
            if not record.dirty:
                record.failures = 0
            self.tables.write(record)
            self.counters.announce(record)
        self.counters.forced_borders += plan.forced

    # -- what went wrong ------------------------------------------------------------------------------------------

    def _lost(self, segment_ids: Iterable[int]) -> None:
        """Segments were not made: rows that were to see one decode densely, and are looked at again a little later."""
        for record in {record.row: record for one in segment_ids for record in self.records.lost(one)}.values():
            self.tables.dirty[record.row] = True
            self.tables.look_from[record.row] = self._looks.row_failed(record)

    def _start_over(self, operation: str, error: Exception) -> None:
        """The records of rows may be wrong: all are dropped, and looked at again."""
        self.records.forget_what_rows_see()
        self.tables.dirty[:] = True
        self.snapshots.drop()
        self._wait(operation, error)

    def _wait(self, operation: str, error: Exception) -> None:
        """Count a fault, and look at no row for a while: longer each time in a row."""
        self.faults.note(operation, error)
        self._looks.failed()

    def tell_violations(self) -> None:
        """Count and log what the device noticed that never may be; waits for it."""
        self.counters.note_violations(*self.index.violations.tolist())

    def server_info(self) -> dict[str, object]:
        """Counts for /server_info, the demo and the tests: plain integers, and dictionaries by reason, operation or layers."""
        self.count_step()
        self.tell_violations()
        return (
            self.counters.server_info()
            | self.residency.server_info()
            | {
                "clusters": self.index.clusters,
                "recalled_mass": mean_by_group(self.index.mass.cpu().numpy()),
                "bytes": self.index.bytes,
                "running": len(self.records.rows),
            }
        )
