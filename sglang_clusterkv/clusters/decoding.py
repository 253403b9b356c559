"""How the requests of a decode batch attend: which of them sparsely, which the dense way and why, and the lists of both."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.counters import Counters
from sglang_clusterkv.clusters.rows import DenseReason, RowTables
from sglang_clusterkv.config import ClusterKVConfig
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


class DecodeLists:
    """Makes the steps of one engine.

    Args:
        index: the arrays that the layers will read, and the options of a step (`index.config`).
        tables: what is known of each row.
        req_to_token: int32 [rows, max_context], SGLang's table.
        counters: where steps are counted.
        group: query heads per kv head, so that memory for a step's layers is taken with its lists; None: by its first layer.
    """

    def __init__(
        self,
        index: ClusterIndex,
        tables: RowTables,
        req_to_token: torch.Tensor,
        counters: Counters,
        group: int | None,
    ) -> None:
        self._index = index
        self._tables = tables
        self.req_to_token = req_to_token
        self._counters = counters
        self._group = group

    def step(self, rows: np.ndarray, seq_lens: np.ndarray, launch: int, look_from: int) -> DecodeStep:
        """Sort a batch into sparse and dense requests, make the lists of both, and count them once they exist.

        Args:
            rows: int64 [B], lines of req_to_token.
            seq_lens: int64 [B], tokens of each request, this step's included.
            launch: of this forward.
            look_from: launch from which rows may be looked at: a dirty row waits until then because of a fault.
        """
        tables, config = self._tables, self._index.config
        count = tables.recallable(rows, seq_lens)
        covered = tables.covered[rows, count]
        dirty = tables.dirty[rows]
        waits = np.maximum(tables.look_from[rows], look_from) > launch
        reasons = np.select(
            [
                ~tables.known[rows] | dirty & waits,
                dirty,
                seq_lens < config.dense_below_tokens,
                covered <= config.budget_tokens,
                seq_lens - covered > longest_base(config, self._index.geometry.page_size, covered),
            ],
            [DenseReason.FAULT, DenseReason.DIRTY, DenseReason.SHORT, DenseReason.BUDGET, DenseReason.WINDOW],
            0,
        )
        sparse, dense = np.flatnonzero(reasons == 0), np.flatnonzero(reasons)
        device, mixed = self.req_to_token.device.type, len(sparse) > 0 and len(dense) > 0
        step = DecodeStep(
            sparse_at=to_device(sparse, device) if mixed else None,
            sparse=self._sparse(rows[sparse], seq_lens[sparse], count[sparse]) if len(sparse) else None,
            dense_at=to_device(dense, device) if mixed else None,
            dense=dense_step(rows[dense], seq_lens[dense], self.req_to_token) if len(dense) else None,
            rows=rows,
            seq_lens=seq_lens,
        )
        for reason, times in zip(*np.unique(reasons[reasons > 0], return_counts=True), strict=True):
            self._counters.dense_steps[DenseReason(reason).name.lower()] += int(times)
        tables.exact[rows[sparse]] = np.minimum(tables.exact[rows[sparse]], seq_lens[sparse] - 1)
        self._counters.sparse_steps += len(sparse)
        self._counters.tokens_available += int(covered[sparse].sum())
        self._counters.tokens_recalled += int(np.minimum(covered[sparse], config.budget_tokens).sum())
        return step

    def all_dense(self, rows: np.ndarray, seq_lens: np.ndarray) -> DecodeStep:
        """The step after a fault in `step`: every request attends to everything."""
        self._counters.dense_steps[DenseReason.FAULT.name.lower()] += len(rows)
        return DecodeStep(None, None, None, dense_step(rows, seq_lens, self.req_to_token), rows, seq_lens)

    def _sparse(self, rows: np.ndarray, seq_lens: np.ndarray, count: np.ndarray) -> SparseStep:
        """Lists, and the memory that the layers need for them."""
        tables = self._tables
        borders = RowBorders(rows, seq_lens, count, tables.begin[rows], tables.end[rows], tables.covered[rows])
        step = sparse_step(borders, self.req_to_token, self._index.geometry.page_size)
        if self._group is not None:
            prepare(self._index, self._group, step)
        return step


def longest_base(config: ClusterKVConfig, page_size: int, covered: np.ndarray) -> np.ndarray:
    """Tokens of sinks, gaps and window, int64 [B], beyond which a row attends to everything.

    Gaps between short segments are attended as the window is: many turns leave many, and that is no reason to read all.
    """
    return config.sink_tokens + 2 * config.recluster_every + config.window_tokens + page_size + covered // 4
