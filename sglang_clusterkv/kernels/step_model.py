"""A model of the attention of one decode step on a GPU: launches, programs, bytes, and the time they need at least.

Sparse and dense steps are counted from the shapes alone, launch by launch, with the grids that the kernels really have. Bytes
are what a launch must read and write: pool and index rows once per kv head, a request's lists once, and what launches hand to
each other in full, although much of that stays in the L2 cache. The predicted time of a launch is its bytes over the memory
bandwidth plus a constant; latency and arithmetic are not in it, so a measured time far above it shows where those matter.
With a tier of host memory: benchmarks/tier_model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS
from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES

SMS = 132  # of an H100 or H200
BANDWIDTHS_TBS = (3.35, 4.8)  # H100 SXM, H200
# Rows from pinned memory over PCIe 5: as long copies, and a fifth of it, as scattered rows may be.
BUSES_GBS = (50.0, 10.0)
LAUNCH_US = 2.5  # inside a captured graph
LEAST_CHUNK = 128  # tokens of a program of FlashInfer's
JOINED = "attend and estimate"
_INT, _LONG, _FLOAT, _HALF = 4, 8, 4, 2  # bytes


class StepShape(NamedTuple):
    """A batch of equally long requests on one rank of a model.

    Attributes:
        layers: attention layers.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: channels of a key and of a value.
        batch: requests.
        context: tokens of each.
        item_bytes: of a channel in the KV pool.
        page_size: tokens per page.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    item_bytes: int = 2
    page_size: int = 16

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def pairs(self) -> int:
        """(request, kv head)."""
        return self.batch * self.kv_heads

    @property
    def row_bytes(self) -> int:
        """A key or a value of one kv head."""
        return self.head_dim * self.item_bytes


class Launch(NamedTuple):
    """One kernel launch of one layer."""

    name: str
    programs: int
    bytes: int
    bus_bytes: int = 0  # of host memory

    @property
    def waves(self) -> float:
        """Programs per SM, one after the other if an SM held one at a time."""
        return self.programs / SMS

    def microseconds(self, tbs: float, bus_gbs: float = BUSES_GBS[0]) -> float:
        """Least time at a memory bandwidth in TB/s and one of the bus in GB/s, one after the other."""
        return self.bytes / tbs / 1e6 + self.bus_bytes / bus_gbs / 1e3 + LAUNCH_US


class Lists(NamedTuple):
    """Sizes of one request's lists after its prefill."""

    base: int  # always-attended tokens
    clusters: int
    segments: int
    candidates: int
    recalled: int
    pages: int  # of the clusters


def lists_of(shape: StepShape, config: ClusterKVConfig) -> Lists:
    """What a request of `context` tokens, prefilled at once, looks like to a decode step."""
    end = (shape.context - config.window_tokens) // shape.page_size * shape.page_size
    clustered = max(0, end - config.sink_tokens)
    candidates = min(config.candidate_tokens if config.refine else config.budget_tokens, clustered)
    return Lists(
        base=shape.context - clustered,
        clusters=clustered // config.tokens_per_cluster,
        segments=-(-clustered // config.segment_tokens),
        candidates=candidates,
        recalled=min(config.budget_tokens, candidates),
        pages=clustered // shape.page_size,
    )


def sparse_launches(shape: StepShape, config: ClusterKVConfig, *, joined: bool = True) -> list[Launch]:
    """The launches of one layer of a sparse step; joined: attend and the estimate are one, if there is an estimate."""
    lists = lists_of(shape, config)
    joined = joined and config.estimate
    if joined:
        splits, *of = parts_of(shape, config, lists)
        parts = grids.EstimateParts(*of)
    else:
        splits, parts = grids.split_count(shape.pairs, lists.base + config.budget_tokens), grids.EstimateParts(0, 0)
        if config.estimate:
            parts = grids.estimate_parts(shape.pairs, lists.clusters, config.estimate_clusters, movement.moves(config))
    launches = [_score(shape, config, lists), *_select(shape, config, lists)]
    chosen = _own_bytes(shape, config, lists) if config.estimate and lists.clusters > config.estimate_clusters else 0
    launches += _refine(shape, config, lists, chosen) if config.refine else _recall_all(shape, config, lists, chosen)
    attend, estimate = _attend(shape, lists, splits), _estimate(shape, config, lists, parts)
    if joined:
        launches.append(Launch(JOINED, attend.programs + estimate.programs, attend.bytes + estimate.bytes))
    else:
        launches += [attend, estimate] if config.estimate else [attend]
    launches.append(_merge(shape, splits + sum(parts)))
    return launches


def flashinfer_launches(shape: StepShape, config: ClusterKVConfig) -> list[Launch]:
    """The launches of one layer that attend in our kernel's place where FlashInfer does, in a decode graph.

    Its plan takes the smallest chunk of a list, of 128 tokens or more, with which it has two programs for each SM or fewer.
    """
    lists = lists_of(shape, config)
    tokens, most = lists.base + lists.recalled, max(1, 2 * SMS // shape.pairs)
    parts = -(-tokens // max(LEAST_CHUNK, -(-tokens // most)))
    queries, lses = shape.pairs * shape.group * shape.row_bytes, shape.pairs * shape.group * _FLOAT
    listed = shape.pairs * lists.recalled * (_LONG + _INT)
    rows = shape.pairs * tokens * (2 * shape.row_bytes + _INT)
    partial = parts * (queries + lses)
    merged = -(-shape.pairs * shape.group // SMS) * SMS
    programs = shape.pairs * -(-config.budget_tokens // grids.LISTED_TOKENS)
    return [
        Launch("FlashInfer: lists", programs, listed + 2 * queries),
        Launch("FlashInfer: attend", shape.pairs * parts, rows + queries + partial),
        Launch("FlashInfer: merge", merged, partial + queries + lses),
    ]


def parts_of(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> grids.Parts:
    """How the programs of the launch of attend and the estimate divide the work of a (request, kv head)."""
    programs = grids.part_programs(shape.pairs)
    return grids.divided(
        programs, lists.base, lists.recalled, lists.clusters, config.estimate_clusters, movement.moves(config)
    )


def dense_launches(shape: StepShape) -> list[Launch]:
    """The launches of one layer of a dense step, by our own kernel."""
    splits = grids.split_count(shape.pairs, shape.context)
    slots = shape.batch * shape.context * _LONG
    rows = shape.pairs * shape.context * 2 * shape.row_bytes
    partial = _part_bytes(shape, splits)
    return [Launch("dense", shape.pairs * splits, slots + rows + partial), _merge(shape, splits)]


def table(shape: StepShape, config: ClusterKVConfig, bandwidths_tbs: Sequence[float] = BANDWIDTHS_TBS) -> str:
    """The launches of one layer, their sums, and those of the whole step, sparse and dense, as lines of text."""
    steps = {"sparse": sparse_launches(shape, config), "dense": dense_launches(shape)}
    header = f"{'launch':20} {'programs':>8} {'waves':>6} {'MB':>9}"
    lines = [header + "".join(f" {f'us at {tbs}':>12}" for tbs in bandwidths_tbs)]
    for launch in steps["sparse"] + steps["dense"]:
        times = "".join(f" {launch.microseconds(tbs):>12.1f}" for tbs in bandwidths_tbs)
        lines.append(f"{launch.name:20} {launch.programs:>8,} {launch.waves:>6.2f} {launch.bytes / 1e6:>9.2f}{times}")
    totals = {
        name: [sum(x.microseconds(tbs) for x in launches) for tbs in bandwidths_tbs] for name, launches in steps.items()
    }
    for name, launches in steps.items():
        megabytes = sum(launch.bytes for launch in launches) / 1e6
        times = "".join(f" {time:>12.1f}" for time in totals[name])
        lines.append(f"{f'{name}, one layer':36} {megabytes:>9.2f}{times}")
    for name, times_us in totals.items():
        lines.append(
            f"{f'{name}, {shape.layers} layers, ms':46}"
            + "".join(f" {time * shape.layers / 1e3:>12.3f}" for time in times_us)
        )
    ratios = [dense / sparse for dense, sparse in zip(totals["dense"], totals["sparse"], strict=True)]
    lines.append(f"{'dense over sparse':46}" + "".join(f" {ratio:>12.1f}" for ratio in ratios))
    return "\n".join(lines)


def _part_bytes(shape: StepShape, parts: int) -> int:
    """Partial attentions of all pairs, with their log-sum-exps."""
    return shape.pairs * parts * shape.group * (shape.head_dim + 1) * _FLOAT


def _logit_bytes(shape: StepShape, lists: Lists) -> int:
    """What makes every cluster's logits: the dot of each query head, spread and size; and the segments' bonuses."""
    clusters = lists.clusters * (shape.group * _FLOAT + _HALF + _INT)
    return shape.pairs * (clusters + lists.segments * shape.group * _FLOAT)


def _page_bytes(shape: StepShape, lists: Lists) -> int:
    """The requests' lists of pages and of their segments."""
    return shape.batch * 2 * lists.pages * _LONG


def _tiles(lists: Lists) -> tuple[int, int]:
    """Programs of score per pair: tiles of tokens and of clusters."""
    return -(-lists.base // SCORE_TOKENS), -(-lists.clusters // SCORE_CLUSTERS)


def _score(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> Launch:
    tokens, clusters = _tiles(lists)
    cluster = RowCodec(config.centroid_dtype, shape.head_dim).row_bytes + 2 * _HALF  # and spread and end
    read = lists.clusters * cluster + lists.segments * 2 * shape.head_dim * _HALF + lists.base * shape.row_bytes
    queries = shape.group * (shape.row_bytes + (shape.head_dim * _FLOAT if config.refine else 0))
    written = lists.base * shape.group * _FLOAT + (tokens + 2 * clusters) * shape.group * _FLOAT
    own = shape.pairs * (read + queries + written)
    shared = _page_bytes(shape, lists) + shape.batch * lists.base * _LONG
    programs = config.refine + sum(grids.score_programs(shape.kv_heads, shape.batch, lists.base, lists.clusters))
    return Launch("score", shape.pairs * programs, own + _logit_bytes(shape, lists) + shared)


def _select(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> list[Launch]:
    tokens, clusters = _tiles(lists)
    parts = grids.mass_parts(shape.pairs, lists.clusters)
    sums = (parts * (tokens + 2 * clusters) + 1) * shape.group * _FLOAT
    masses = shape.pairs * (sums + 2 * lists.clusters * _FLOAT) + shape.batch * lists.pages * _LONG
    chosen = lists.clusters * (_FLOAT + _INT) + lists.candidates * (_INT + _LONG)
    short = short_of(config, lists)
    if short:
        chosen += lists.clusters * (_FLOAT + _INT) + short * _INT
    return [
        Launch("select: masses", shape.pairs * parts, _logit_bytes(shape, lists) + masses),
        Launch("select: clusters", shape.pairs * (1 + bool(short)), shape.pairs * chosen),
    ]


def short_of(config: ClusterKVConfig, lists: Lists) -> int:
    """Clusters of the shortlist that select's launch makes; 0: it makes none."""
    own, budget = config.estimate_clusters, config.budget_tokens
    made = config.refine and config.estimate and grids.own_shortlist(lists.clusters, own, budget)
    return min(own + budget, lists.clusters) if made else 0


def _own_bytes(shape: StepShape, config: ClusterKVConfig, lists: Lists) -> int:
    """For the list of clusters that are estimated at their own mean value: what is left of those it is chosen from, and the
    list with its edge."""
    short = short_of(config, lists)
    of = short * (_FLOAT + 2 * _INT) if short else lists.clusters * (_FLOAT + _INT)
    return shape.pairs * (of + (min(config.estimate_clusters, lists.clusters) + 3) * _INT)


def _refine(shape: StepShape, config: ClusterKVConfig, lists: Lists, chosen: int) -> list[Launch]:
    code = TokenCodec(config.code_bits, shape.head_dim).code_bytes + _HALF + _HALF  # and scale and member
    touched = lists.candidates // config.tokens_per_cluster  # clusters, each of average size
    read = lists.candidates * (code + _LONG) + touched * shape.group * _FLOAT
    read += shape.group * shape.head_dim * _FLOAT
    # Each candidate's mass by query head, and of their clusters the logits that follow, with the mark at the spread.
    by_code, kept = config.estimate and config.estimate_codes, 1 << (shape.group - 1).bit_length()
    masses = lists.candidates * kept * _FLOAT if by_code else 0
    marks = touched * (shape.group * _FLOAT + 2 * _HALF + 2 * _INT) + lists.recalled * kept * _FLOAT if by_code else 0
    values = shape.pairs * (read + lists.candidates * (_FLOAT + _INT) + masses) + _page_bytes(shape, lists)
    programs = grids.choice_programs(shape.pairs, by_code and chosen > 0)
    choice = (
        programs * lists.candidates * (_LONG + _FLOAT + _INT) + lists.recalled * (_LONG + 2 * _INT) + masses + marks
    )
    tile = grids.candidate_tile(shape.pairs, config.candidate_tokens, shape.head_dim)
    tiles = -(-config.candidate_tokens // tile)
    choice = shape.pairs * choice + chosen
    return [
        Launch("refine: values", shape.pairs * tiles, values),
        Launch("refine: choice", shape.pairs * programs, choice),
    ]


def _recall_all(shape: StepShape, config: ClusterKVConfig, lists: Lists, chosen: int) -> list[Launch]:
    moved = lists.candidates * (_LONG + _HALF + _LONG + 2 * _INT)
    programs = shape.pairs * -(-config.budget_tokens // grids.FEW_CANDIDATES)
    recall = Launch("recall", programs, shape.pairs * moved + _page_bytes(shape, lists))
    return [recall, Launch("own clusters", shape.pairs, chosen)] if chosen else [recall]


def _attend(shape: StepShape, lists: Lists, splits: int) -> Launch:
    logits = lists.base * shape.group * _FLOAT
    rows = lists.recalled * (2 * shape.row_bytes + _LONG) + lists.base * shape.row_bytes
    own = shape.pairs * (logits + rows + shape.group * shape.row_bytes) + _part_bytes(shape, splits)
    return Launch("attend", shape.pairs * splits, own + shape.batch * lists.base * _LONG)


def _estimate(shape: StepShape, config: ClusterKVConfig, lists: Lists, parts: grids.EstimateParts) -> Launch:
    chosen = min(config.estimate_clusters, lists.clusters)
    own = shape.pairs * chosen * RowCodec(config.centroid_dtype, shape.head_dim).row_bytes
    shared = _page_bytes(shape, lists)
    if parts.rest:
        masses = lists.clusters * _FLOAT + (chosen + 3) * _INT  # and the list with its edge
        own += shape.pairs * (masses + lists.segments * shape.head_dim * _HALF)
    if movement.moves(config):
        rows = lists.segments * min(movement.RANK, config.segment_tokens // shape.page_size - SEGMENT_VECTOR_PAGES)
        own += shape.pairs * (rows * 2 * movement.row_codec(shape.head_dim).row_bytes + shape.group * shape.row_bytes)
    moved = own + _logit_bytes(shape, lists) + shared + _part_bytes(shape, sum(parts))
    return Launch("estimate", shape.pairs * sum(parts), moved)


def _merge(shape: StepShape, parts: int) -> Launch:
    written = shape.pairs * shape.group * shape.row_bytes
    return Launch("merge", shape.pairs * shape.group, _part_bytes(shape, parts) + written)
