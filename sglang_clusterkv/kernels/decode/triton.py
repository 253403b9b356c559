"""The chain on a GPU: seven launches per layer, and nothing that waits for the device.

    score | masses | select | refine: values | refine: choice | attend and estimate | merge, with the mass read

Attend and the estimate are a launch each where a host tier or FlashInfer attends.

What the launches hand to each other lies in one workspace per index, which grows to the largest step and is never initialised.
Grids depend on the shapes of the step's lists alone, so a captured graph may be replayed with other contents.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import triton

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.attend import triton as attend_triton
from sglang_clusterkv.kernels.attend.flashinfer import FlashInferAttend, engine_of, reserved
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.decode import triton_parts
from sglang_clusterkv.kernels.estimate import triton as estimate_triton
from sglang_clusterkv.kernels.estimate import triton_own
from sglang_clusterkv.kernels.merge import triton as merge_triton
from sglang_clusterkv.kernels.merge.reference import by_kv_head
from sglang_clusterkv.kernels.refine import triton as refine_triton
from sglang_clusterkv.kernels.score import triton as score_triton
from sglang_clusterkv.kernels.select import triton as select_triton
from sglang_clusterkv.kernels.trace.last import LastRead
from sglang_clusterkv.kernels.triton_fp8 import query_dtype
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, Allocate, Workspace, WorkspaceShape, make_workspace
from sglang_clusterkv.memory import movement

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import ListShape, SparseStep
    from sglang_clusterkv.memory.tier import TierLayer

NO_PARTS = grids.EstimateParts(0, 0)


class TritonDecoder:
    """The operations of a layer, callable one by one (benchmarks, tests) or as a chain, in the order of their definition.

    `prepare` comes first, once per step. There are two workspaces: captured graphs keep the addresses of what `reserve` makes,
    which never moves, and steps that have no room there make another one grow.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        allocate: makes one uninitialised tensor of a shape and dtype on the index's device; torch.empty by default.
    """

    def __init__(self, index: ClusterIndex, group: int, allocate: Allocate | None = None) -> None:
        config, geometry = index.config, index.geometry
        self.index = index
        self.config = config
        self.limit = config.candidate_tokens if config.refine else config.budget_tokens
        self.heads = geometry.kv_heads
        self._allocate = allocate or (lambda sizes, dtype: torch.empty(sizes, dtype=dtype, device=index.device))
        self._least = self._shape = WorkspaceShape(
            batch=0, heads=self.heads, group=group, channels=geometry.head_dim, clusters=0, segments=0, base=0,
            candidates=self.limit, budget=config.budget_tokens, own=config.estimate_clusters, exact_parts=0, rest_parts=0,
        )  # fmt: skip
        self._step: SparseStep | None = None
        self.sinks: torch.Tensor | None = None  # of the layer that was selected last
        self.is_joined = False  # attend and the estimate were one launch
        self._dtype: torch.dtype | None = None
        self.engine: FlashInferAttend | None = None  # attends in our kernel's place
        self._reserved: Workspace | None = None
        self._growing: Workspace | None = None

    def use_engine(self, dtype: torch.dtype) -> None:
        """Let FlashInfer attend over pools of `dtype`, if the configuration asks for it and it can; before `prepare`."""
        if self._dtype is not dtype:
            self._dtype, self.engine = dtype, engine_of(self.index, self._least.group, dtype)

    def reserve(self, room: ListShape) -> int:
        """Make the workspace of captured steps, and what FlashInfer reads and writes there; returns their bytes.

        What an earlier call made is given up.

        Args:
            room: of the lists of these steps.

        Raises torch.OutOfMemoryError.
        """
        self._reserved = None
        taken = 0
        if self.engine is not None:
            self.engine, taken = reserved(self.engine, room, self.config.budget_tokens)
        pairs = room.batch * self.heads
        parts = max(grids.LEAST_PARTS * pairs, grids.PARTS_PROGRAMS)
        exact_parts = parts if self.config.estimate else max(pairs, grids.ATTEND_PROGRAMS)
        if self.engine is not None:  # then the estimate is a launch of its own
            exact_parts, parts = 0, max(grids.LEAST_PARTS * pairs, grids.ESTIMATE_PROGRAMS)
        shape = self._least._replace(
            batch=triton.next_power_of_2(room.batch),
            clusters=room.clusters,
            segments=room.segments,
            base=room.base,
            exact_parts=exact_parts,
            rest_parts=parts if self.config.estimate else 0,
        ).rounded()
        self._reserved = make_workspace(shape, self.index.device, self._allocate)
        return self._reserved.bytes + taken

    def capture(self, lists: SparseStep) -> None:
        """What comes before the capture of a step over these lists, and cannot be captured."""
        if self.engine is not None:
            self.engine.capture(lists, self.index.geometry.page_size)

    def replay(self, batch: int) -> None:
        """What comes before the replay of the step that was prepared last, by the graph of so many requests."""
        if self.engine is not None:
            self.engine.replay(batch)

    def prepare(self, step: SparseStep) -> None:
        """Take a step's lists and make the workspace fit."""
        if step is self._step:
            return
        self._step = None
        base, pairs = step.base_slots.shape[1], step.batch * self.heads
        self.splits = grids.split_count(pairs, max(base + self.config.budget_tokens, step.dense_tokens))
        clusters = estimate_triton.listed_clusters(self.index, step)
        room = triton.cdiv(clusters, SCORE_CLUSTERS) * SCORE_CLUSTERS
        estimated = self.config.estimate
        moves, own = movement.moves(self.config), self.config.estimate_clusters
        self.parts = grids.estimate_parts(pairs, clusters, own, moves) if estimated else NO_PARTS
        self.programs = grids.part_programs(pairs) if estimated else 0
        needed = self._least._replace(
            batch=triton.next_power_of_2(step.batch),
            clusters=step.batch * room if step.offset is None else step.clusters,
            segments=step.segment_begin.shape[1],
            base=base,
            exact_parts=pairs * max(self.splits, self.programs) if self.engine is None else 0,
            rest_parts=pairs * max(sum(self.parts), self.programs),
        ).rounded()
        workspace = self._reserved
        if workspace is None or not workspace.shape.holds(needed):
            if not self._shape.holds(needed):
                self._grow(needed)
            workspace = self._growing
        assert workspace is not None
        if step.offset is None:
            begins = workspace.offset[: step.batch + 1]
            torch.arange(0, len(begins) * room, room, dtype=begins.dtype, device=begins.device, out=begins)
        else:
            workspace = dataclasses.replace(workspace, offset=step.offset)
        self.workspace = workspace
        if self.engine is not None:
            self.engine.prepare(step, self.config.budget_tokens, self.index.geometry.page_size)
        self._step = step

    def _grow(self, needed: WorkspaceShape) -> None:
        """Make room for a step, beside what earlier ones needed if memory allows."""
        grown = WorkspaceShape(*map(max, self._shape, needed))
        self.workspace = self._growing = None  # not two at once
        self._shape = self._least  # holds nothing, should memory run out now
        try:
            return self._make(grown)
        except torch.OutOfMemoryError:
            if grown == needed:
                raise
        # One long request and one large batch, but never at once.
        self._make(needed)

    def _make(self, shape: WorkspaceShape) -> None:
        self._growing = make_workspace(shape, self.index.device, self._allocate)
        self._shape = shape

    @property
    def step(self) -> SparseStep:
        """The step that was prepared."""
        assert self._step is not None, "prepare comes first"
        return self._step

    def score(
        self, q: torch.Tensor, keys: torch.Tensor, layer: int, scale: float, tier: TierLayer | None = None
    ) -> None:
        """Clusters and always-attended tokens against the queries [B, H, G, D], those of a request side by side."""
        score_triton.score(q, keys, self.index, layer, self.step, scale, self.workspace, tier)

    def select(self, sinks: torch.Tensor | None = None) -> None:
        """The clusters whose tokens are candidates; sinks [heads] as `merge` adds them."""
        self.sinks = sinks
        select_triton.select(self.index, self.step, self.limit, self.workspace, sinks)

    def refine(self, layer: int, scale: float, dtype: torch.dtype) -> None:
        """Candidates' values from their codes, for queries of `dtype`; nothing where nothing is refined."""
        if self.index.checks is not None:
            self.index.checks.candidates(self.step, self.workspace)
        if self.config.refine:
            refine_triton.refine_values(self.index, layer, self.step, scale, self.limit, self.workspace, dtype)

    def recall(self, layer: int) -> None:
        """The best candidates' slots, or all candidates'; and which clusters the estimate takes at their own mean value."""
        if self.config.refine:
            if self.index.checks is not None:
                self.index.checks.positions(self.step, self.workspace)
            refine_triton.recall(self.index, self.step, self.limit, self.workspace)
        else:
            refine_triton.recall_all(self.index, layer, self.step, self.limit, self.workspace)
            clusters = estimate_triton.listed_clusters(self.index, self.step)
            if self.config.estimate and triton_own.is_limited(clusters, self.config.estimate_clusters):
                triton_own.choose_own(self.index, self.step, self.workspace)

    def attend(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, tier: TierLayer | None = None
    ) -> None:
        """Exact attention over always-attended and recalled tokens."""
        self.is_joined = False
        if self.index.checks is not None:
            self.index.checks.recalled(self.step, self.workspace)
        if self.engine is not None:
            self.engine.attend(q, keys, values, scale, self.workspace)
            return
        page_size = self.index.geometry.page_size
        attend_triton.attend(q, keys, values, self.step, page_size, scale, self.workspace, self.splits, tier)

    def estimate(self, q: torch.Tensor, layer: int, scale: float) -> None:
        """What was not recalled, by clusters, for queries as `score` takes them; nothing where nothing is estimated."""
        if self.config.estimate:
            estimate_triton.estimate(q, self.index, layer, self.step, scale, self.workspace, self.parts)

    def attend_and_estimate(
        self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: int, scale: float,
        tier: TierLayer | None = None,
    ) -> None:  # fmt: skip
        """Both, in one launch where that can be."""
        if tier is not None or self.engine is not None or not self.config.estimate:
            self.attend(q, keys, values, scale, tier)
            self.estimate(q, layer, scale)
            return
        if self.index.checks is not None:
            self.index.checks.recalled(self.step, self.workspace)
        triton_parts.attend_and_estimate(
            q, keys, values, self.index, layer, self.step, scale, self.workspace, self.programs
        )
        self.is_joined = True

    def merge(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """Both parts, and the sinks that select was given: [B, heads, D] in `dtype`; and how much was read exactly."""
        return merge_triton.merge(
            self.workspace,
            self.step,
            *((self.programs, self.programs) if self.is_joined else (self.splits, sum(self.parts))),
            self.index.mass_cells[layer],
            dtype,
            self.sinks,
            None if self.engine is None else (self.engine.output, self.engine.lse),
            joined=self.is_joined,
        )

    def part_lses(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exps of one request's exact part and, if there is one, of its estimate (else -inf), float32 [H, G]."""
        w, batch = self.workspace, self.step.batch
        if self.is_joined:
            part, count = torch.arange(self.programs, device=w.exact_lse.device), w.exact_count[place].unsqueeze(1)
            exact, rest = w.exact(batch, self.programs)[1][place], w.rest(batch, self.programs)[1][place]
            exact = exact.masked_fill((part >= count).unsqueeze(2), -torch.inf)
            rest = rest.masked_fill((part >= self.programs - count).unsqueeze(2), -torch.inf)
            return exact.logsumexp(1), rest.logsumexp(1)
        exact = w.exact(batch, self.splits)[1][place].logsumexp(1)
        if not self.config.estimate:
            return exact, torch.full_like(exact, -torch.inf)
        return exact, w.rest(batch, sum(self.parts))[1][place].logsumexp(1)


def decoder_of(index: ClusterIndex, group: int) -> TritonDecoder:
    """The decoder of an index; made once."""
    key = ("triton decoder", group)
    if key not in index.scratch:
        index.scratch[key] = TritonDecoder(index, group)
    return index.scratch[key]


def sparse_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.decode.sparse_decode`."""
    # No copies where the queries have the pool's dtype and a request's lie together, as they do while serving: models cut
    # them from one product with keys and values.
    grouped = q.to(query_dtype(keys.dtype, q.dtype)).unflatten(1, (keys.shape[1], -1))
    decoder = decoder_of(index, grouped.shape[2])
    decoder.use_engine(keys.dtype)
    decoder.prepare(step)
    decoder.score(grouped, keys, layer, scale, tier)
    decoder.select(sinks)
    decoder.refine(layer, scale, grouped.dtype)
    decoder.recall(layer)
    decoder.attend_and_estimate(grouped, keys, values, layer, scale, tier)
    return decoder.merge(layer, q.dtype)


def last_read(decoder: TritonDecoder, place: int) -> LastRead:
    """See `kernels.decode.last_read`."""
    w, step = decoder.workspace, decoder.step
    logits = w.base_logit[place]
    listed = torch.arange(logits.shape[-1], device=logits.device) < step.base_count[place]
    base = logits.masked_fill(~listed, -torch.inf)
    exact, rest = decoder.part_lses(place)
    if decoder.sinks is not None:  # they count with the base
        sinks = by_kv_head(decoder.sinks, decoder.heads)
        base, exact = torch.cat((base, sinks.unsqueeze(-1)), -1), torch.logaddexp(exact, sinks)
    if decoder.config.estimate:
        whole = torch.logaddexp(exact, rest)
    else:
        whole = torch.maximum(exact, w.total[place])
    return LastRead(w.recalled[place], w.recalled_count[place], base, exact, whole)


COMPILE_CASES: list[CompileCase] = []  # its kernels are those of the operations
