"""How the requests of a decode batch attend: which of them sparsely, which the dense way and why, and the lists of both."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from sglang_clusterkv.clusters.backoff import BackOff
from sglang_clusterkv.clusters.counters import StepCounts
from sglang_clusterkv.clusters.rows import DenseReason, RowTables
from sglang_clusterkv.config import STEP_OPTIONS, ClusterKVConfig, ConfigError, validate
from sglang_clusterkv.kernels.break_even import MODELLED, BreakEven
from sglang_clusterkv.kernels.decode import capture, prepare, replay, reserve
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import (
    DenseStep,
    ListShape,
    RowBorders,
    SparseStep,
    dense_step,
    empty_lists,
    first_requests,
    lists_bytes,
    pack_rows,
    to_device,
)

GAP_TOKENS = 1024  # in the base of a request of a captured step


class DecodeStep(NamedTuple):
    """How the requests of one decode batch attend; indices are places in the batch.

    On a GPU `sparse` has all requests if one of them is sparse, and without it there are no lists: the backend makes what it
    needs. On a CPU each kind has lists of its own.
    """

    sparse_at: torch.Tensor | None  # int64, None: the whole batch
    sparse: SparseStep | None
    dense_at: torch.Tensor | None
    dense: DenseStep | None
    rows: np.ndarray  # int64 [B], lines of req_to_token
    seq_lens: np.ndarray  # int64 [B]
    counts: StepCounts | None = None  # None: not of a batch that the scheduler launched
    reasons: np.ndarray | None = None  # int64 [B], 0: sparse, else a DenseReason; None likewise
    too_large: str | None = None  # of what the batch has more than captured steps have room for; None: of nothing

    @property
    def parts(self) -> list[tuple[torch.Tensor | None, SparseStep]]:
        """The lists of what is sparse, and which queries of the batch they are for; None: all."""
        return [] if self.sparse is None else [(self.sparse_at, self.sparse)]

    @property
    def sparse_requests(self) -> int:
        """How many attend sparsely in the layers that can."""
        return 0 if self.sparse is None else self.sparse.batch if self.counts is None else self.counts.sparse


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
        self._mixes = takes_mixtures(index.device)
        self.room: ListShape | None = None  # of the lists of captured steps
        self._lists: SparseStep | None = None  # these

    def set_options(self, options: dict[str, object]) -> ClusterKVConfig:
        """Change step options of the index from the next step on; returns its configuration. See `ClusterEngine`."""
        index = self._index
        fixed = [name for name in options if name not in STEP_OPTIONS]
        if fixed:
            raise ConfigError(f"{fixed[0]} is fixed when the server starts: change one of {', '.join(STEP_OPTIONS)}")
        if self.room is not None:
            raise ConfigError("captured decode steps keep the options that they were captured with")
        config = msgspec.structs.replace(index.config, **options)
        validate(config, self._page_size, index.geometry.head_dim)
        if config.refine and "codes" not in index.arrays:
            raise ConfigError("no codes are stored: start with refine=true, then it may be switched")
        if config.moving_values == "always" and not index.keeps_movement:
            raise ConfigError("no movement is stored: start with moving_values=always, then it may be switched")
        index.config = config
        index.scratch.clear()
        return config

    def reserve(self, batch: int, context_tokens: int) -> int:
        """Make the lists and the workspace of captured steps, which never move; returns their bytes.

        From now on steps are written there if they fit. What an earlier call made is given up.

        Args:
            batch: most requests of a captured step.
            context_tokens: of the longest request.

        Raises torch.OutOfMemoryError.
        """
        assert self._group is not None
        self._lists = None
        self.room = room = captured_room(self._index, batch, context_tokens)
        tokens = room.pages * self._page_size
        lists = empty_lists(room, self.req_to_token.device)
        self._lists = lists._replace(recallable_tokens=tokens, dense_tokens=tokens)
        return lists_bytes(lists) + reserve(self._index, self._group, self._dtype, room)

    def captured(self, batch: int) -> SparseStep:
        """The lists that a captured step of so many requests reads; until a step is made all of them are padding."""
        assert self._lists is not None and self._group is not None, "reserve comes first"
        lists = first_requests(self._lists, batch)
        capture(self._index, self._group, lists)
        return lists

    def replay(self, batch: int) -> None:
        """The step that was made last is about to be replayed by the graph of so many requests, padding included."""
        assert self._group is not None
        replay(self._index, self._group, batch)

    @property
    def _page_size(self) -> int:
        return self._index.geometry.page_size

    def step(self, rows: np.ndarray, seq_lens: np.ndarray, looks: BackOff, layers: BackOff) -> DecodeStep:
        """Sort a batch into sparse and dense requests, and make the lists of both.

        Args:
            rows: int64 [B], lines of req_to_token.
            seq_lens: int64 [B], tokens of each request, this step's included.
            looks: says from which launch on rows may be looked at: a dirty row waits until then because of a fault.
            layers: says from which launch on layers may decode sparsely.
        """
        config = self._index.config
        reasons, count, covered = self.reasons(rows, seq_lens, looks, layers)
        if self._dense_is_faster(covered[reasons == 0]):
            reasons[reasons == 0] = DenseReason.FASTER
        sparse, dense = np.flatnonzero(reasons == 0), np.flatnonzero(reasons)
        counts = StepCounts(
            sparse=len(sparse),
            dense=_by_reason(reasons[dense]),
            tokens_available=int(covered[sparse].sum()),
            tokens_recalled=int(np.minimum(covered[sparse], config.budget_tokens).sum()),
        )
        if self._mixes:
            lists, too_large = None, None
            if len(sparse):
                lists, too_large = self._mixture(self._borders(rows, seq_lens, count), reasons == 0)
            step = DecodeStep(None, lists, None, None, rows, seq_lens, counts, reasons, too_large)
        else:
            device, mixed = self.req_to_token.device.type, len(sparse) > 0 and len(dense) > 0
            step = DecodeStep(
                sparse_at=to_device(sparse, device) if mixed else None,
                sparse=self.sparse(rows[sparse], seq_lens[sparse], count[sparse]) if len(sparse) else None,
                dense_at=to_device(dense, device) if mixed else None,
                dense=dense_step(rows[dense], seq_lens[dense], self.req_to_token) if len(dense) else None,
                rows=rows,
                seq_lens=seq_lens,
                counts=counts,
                reasons=reasons,
            )
        exact = self._tables.exact
        exact[rows[sparse]] = np.minimum(exact[rows[sparse]], seq_lens[sparse] - 1)
        return step

    def reasons(
        self, rows: np.ndarray, seq_lens: np.ndarray, looks: BackOff, layers: BackOff
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Why requests cannot recall, each by itself; the arguments of `step`.

        Returns:
            A DenseReason or 0 for each, how many of its segments are recallable, and their tokens; int [B].
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
        return reasons, count, covered

    def _dense_is_faster(self, covered: np.ndarray) -> bool:
        """Whether requests with so many clustered tokens each, int [B], should attend to everything together."""
        if self.break_even is None or self._index.config.dense_below == "never":
            return False
        heads = self._index.geometry.kv_heads
        return not self.break_even.pays(len(covered) * heads, int(covered.sum()) * heads * self._kv_bytes)

    def all_dense(self, rows: np.ndarray, seq_lens: np.ndarray) -> DecodeStep:
        """The step after a fault in `step`: every request attends to everything."""
        dense = None if self._mixes else dense_step(rows, seq_lens, self.req_to_token)
        counts, reasons = StepCounts.of_faults(len(rows)), np.full(len(rows), DenseReason.FAULT)
        return DecodeStep(None, None, None, dense, rows, seq_lens, counts, reasons)

    def sparse(self, rows: np.ndarray, seq_lens: np.ndarray, count: np.ndarray) -> SparseStep:
        """Lists on a CPU of requests with so many recallable segments each, and the memory that the layers need for them."""
        from sglang_clusterkv.kernels.lists.cpu import make

        step = make(self._borders(rows, seq_lens, count), self.req_to_token, self._page_size)
        if self._group is not None:
            prepare(self._index, self._group, self._dtype, step)
        return step

    def _mixture(self, borders: RowBorders, sparse: np.ndarray) -> tuple[SparseStep, str | None]:
        """The same of all requests; and of what there are more than captured steps have room for, if so."""
        from sglang_clusterkv.kernels.lists.triton import make

        packed = pack_rows(borders, sparse, self._page_size, self._index.clusters_per_page, SCORE_CLUSTERS)
        lists, too_large = self._lists, None
        if self.room is not None:
            most = self.room._asdict()
            too_large = next((name for name, needed in packed.shape._asdict().items() if needed > most[name]), None)
        if lists is None or too_large is not None:
            lists = empty_lists(packed.shape, self.req_to_token.device)
            lists = lists._replace(recallable_tokens=packed.recallable_tokens, dense_tokens=packed.dense_tokens)
        step = make(packed, self.req_to_token, self._page_size, lists)
        if self._group is not None:
            prepare(self._index, self._group, self._dtype, step)
        return step, too_large

    def _borders(self, rows: np.ndarray, seq_lens: np.ndarray, count: np.ndarray) -> RowBorders:
        tables = self._tables
        return RowBorders(
            rows, seq_lens, count, tables.begin[rows], tables.end[rows], tables.covered[rows], tables.ids[rows]
        )


def captured_room(index: ClusterIndex, batch: int, context_tokens: int) -> ListShape:
    """Room for the lists of captured steps of up to `batch` requests; what has more runs without a graph, counted.

    A request may have twice the segments that it has when it is prefilled at once, and as many gaps as lie at the borders of
    32k tokens beside the longest window. All requests together may have half as many clusters again as the pool, for they share
    prefixes, and FlashInfer's lists half as many tokens; what our own kernel attends to is in no list of its own.
    """
    config, geometry = index.config, index.geometry
    pages = max(1, context_tokens // geometry.page_size)
    longest = -(-pages * index.clusters_per_page // SCORE_CLUSTERS) * SCORE_CLUSTERS
    of_pool = 3 * geometry.slots // 2 // config.tokens_per_cluster + batch * SCORE_CLUSTERS
    base = int(longest_base(config, geometry.page_size, np.zeros(1, np.int64))[0]) + GAP_TOKENS
    tokens = batch * pages * geometry.page_size
    if config.attend_engine == "flashinfer":
        tokens = min(tokens, 3 * geometry.slots // 2)
    return ListShape(
        batch=batch,
        pages=pages,
        segments=2 * (context_tokens // config.segment_tokens) + 64,
        base=base,
        clusters=max(longest, min(batch * longest, of_pool)),
        listed=tokens,
    )


def takes_mixtures(device: str) -> bool:
    """Whether one chain takes all requests of a batch there: Triton's does, numba's does not."""
    return device != "cpu"


def longest_base(config: ClusterKVConfig, page_size: int, covered: np.ndarray) -> np.ndarray:
    """Tokens of sinks, gaps and window, int64 [B], beyond which a row attends to everything.

    Gaps between short segments are attended as the window is: many turns leave many, and that is no reason to read all.
    """
    return config.sink_tokens + 2 * config.recluster_every + config.window_tokens + page_size + covered // 4


def _by_reason(reasons: np.ndarray) -> Counter[str]:
    """How many requests go the dense way for each reason."""
    found = zip(*np.unique(reasons, return_counts=True), strict=True)
    return Counter({DenseReason(reason).name.lower(): int(requests) for reason, requests in found})
