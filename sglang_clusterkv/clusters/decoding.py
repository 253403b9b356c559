"""How the requests of a decode batch attend: which of them sparsely, which the dense way and why, and the lists of both."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.backoff import BackOff
from sglang_clusterkv.clusters.counters import StepCounts
from sglang_clusterkv.clusters.rows import DenseReason, RowTables
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.break_even import MODELLED, BreakEven
from sglang_clusterkv.kernels.decode import prepare
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import DenseStep, RowBorders, SparseStep, dense_step, sparse_step, to_device


class DecodeStep(NamedTuple):
    """How the requests of one decode batch attend; indices are places in the batch."""

    sparse_at: torch.Tensor | None  # int64, None: the whole batch
    sparse: SparseStep | None
    dense_at: torch.Tensor | None
    dense: DenseStep | None
    rows: np.ndarray  # int64 [B], lines of req_to_token
    seq_lens: np.ndarray  # int64 [B]
    counts: StepCounts | None = None  # None: not of a batch that the scheduler launched
    reasons: np.ndarray | None = None  # int64 [B], 0: sparse, else a DenseReason; None likewise


class DecodeLists:
    """Makes the steps of one engine.

    Args:
        index: the arrays that the layers will read, and the options of a step (`index.config`).
        tables: what is known of each row.
        req_to_token: int32 [rows, max_context], SGLang's table.
        dtype: of the KV pool.
        group: query heads per kv head, so that memory for a step's layers is taken with its lists; None: by its first layer.
    """

    def __init__(
        self,
        index: ClusterIndex,
        tables: RowTables,
        req_to_token: torch.Tensor,
        dtype: torch.dtype,
        group: int | None,
    ) -> None:
        self._index = index
        self._tables = tables
        self.req_to_token = req_to_token
        self._dtype = dtype
        self._group = group
        self._kv_bytes = 2 * index.geometry.head_dim * dtype.itemsize  # of a token and kv head
        # On a CPU a sparse step costs little more than what it reads; with a host tier a dense one reads all from the host.
        always = index.device == "cpu" or index.config.host_ratio > 1
        self.break_even: BreakEven | None = None if always else MODELLED

    def step(self, rows: np.ndarray, seq_lens: np.ndarray, looks: BackOff, layers: BackOff) -> DecodeStep:
        """Sort a batch into sparse and dense requests, and make the lists of both.

        Args:
            rows: int64 [B], lines of req_to_token.
            seq_lens: int64 [B], tokens of each request, this step's included.
            looks: says from which launch on rows may be looked at: a dirty row waits until then because of a fault.
            layers: says from which launch on layers may decode sparsely.
        """
        tables, config = self._tables, self._index.config
        count = tables.recallable(rows, seq_lens)
        covered = tables.covered[rows, count]
        dirty = tables.dirty[rows]
        waits = np.maximum(tables.look_from[rows], looks.from_launch) > looks.launch
        reasons = np.select(
            [
                ~tables.known[rows] | dirty & waits,
                dirty,
                seq_lens < config.dense_below_tokens,
                covered <= config.budget_tokens,
                seq_lens - covered > longest_base(config, self._index.geometry.page_size, covered),
            ],
            [DenseReason.FAULT, DenseReason.DIRTY, DenseReason.SHORT, DenseReason.BUDGET, DenseReason.WINDOW],
            0 if layers.over else DenseReason.FAULT,
        )
        if self._dense_is_faster(covered[reasons == 0]):
            reasons[reasons == 0] = DenseReason.FASTER
        sparse, dense = np.flatnonzero(reasons == 0), np.flatnonzero(reasons)
        device, mixed = self.req_to_token.device.type, len(sparse) > 0 and len(dense) > 0
        step = DecodeStep(
            sparse_at=to_device(sparse, device) if mixed else None,
            sparse=self._sparse(rows[sparse], seq_lens[sparse], count[sparse]) if len(sparse) else None,
            dense_at=to_device(dense, device) if mixed else None,
            dense=dense_step(rows[dense], seq_lens[dense], self.req_to_token) if len(dense) else None,
            rows=rows,
            seq_lens=seq_lens,
            counts=StepCounts(
                sparse=len(sparse),
                dense=_by_reason(reasons[dense]),
                tokens_available=int(covered[sparse].sum()),
                tokens_recalled=int(np.minimum(covered[sparse], config.budget_tokens).sum()),
            ),
            reasons=reasons,
        )
        tables.exact[rows[sparse]] = np.minimum(tables.exact[rows[sparse]], seq_lens[sparse] - 1)
        return step

    def _dense_is_faster(self, covered: np.ndarray) -> bool:
        """Whether requests with so many clustered tokens each, int [B], should attend to everything together."""
        if self.break_even is None or self._index.config.dense_below == "never":
            return False
        heads = self._index.geometry.kv_heads
        return not self.break_even.pays(len(covered) * heads, int(covered.sum()) * heads * self._kv_bytes)

    def all_dense(self, rows: np.ndarray, seq_lens: np.ndarray) -> DecodeStep:
        """The step after a fault in `step`: every request attends to everything."""
        dense = dense_step(rows, seq_lens, self.req_to_token)
        counts, reasons = StepCounts.of_faults(len(rows)), np.full(len(rows), DenseReason.FAULT)
        return DecodeStep(None, None, None, dense, rows, seq_lens, counts, reasons)

    def _sparse(self, rows: np.ndarray, seq_lens: np.ndarray, count: np.ndarray) -> SparseStep:
        """Lists, and the memory that the layers need for them."""
        tables = self._tables
        borders = RowBorders(rows, seq_lens, count, tables.begin[rows], tables.end[rows], tables.covered[rows])
        step = sparse_step(borders, self.req_to_token, self._index.geometry.page_size)
        if self._group is not None:
            prepare(self._index, self._group, self._dtype, step)
        return step


def longest_base(config: ClusterKVConfig, page_size: int, covered: np.ndarray) -> np.ndarray:
    """Tokens of sinks, gaps and window, int64 [B], beyond which a row attends to everything.

    Gaps between short segments are attended as the window is: many turns leave many, and that is no reason to read all.
    """
    return config.sink_tokens + 2 * config.recluster_every + config.window_tokens + page_size + covered // 4


def _by_reason(reasons: np.ndarray) -> Counter[str]:
    """How many requests go the dense way for each reason."""
    found = zip(*np.unique(reasons, return_counts=True), strict=True)
    return Counter({DenseReason(reason).name.lower(): int(requests) for reason, requests in found})
