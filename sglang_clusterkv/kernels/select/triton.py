"""Select on a GPU: totals, masses, the clusters whose tokens are candidates, and the list of these tokens.

One launch, one program per (request, kv head). It holds the masses in registers while it looks for their threshold, in as
many as the request's clusters need; beyond 16,384 it reads them again in each round. Before and after, clusters are taken in
blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.score.triton import CAP, log_sum_exp
from sglang_clusterkv.kernels.triton_softmax import LN_2, LOG2_E, exp2
from sglang_clusterkv.kernels.triton_threshold import bracket, bracket_in_memory, order_of_log
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS, Workspace

if TYPE_CHECKING:
    import torch

    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

BASE_TILES = 8  # of always-attended tokens at a time: half as many are usual
CLUSTER_TILES = 32  # of clusters at a time
HELD = (1024, 4096, 16384)  # clusters that are held in registers: the first that a request's fit into
_LAST = tl.constexpr(2**30)  # beyond every cluster


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _tiles_lse(lse, stride, tiles, whole, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, AT_ONCE: tl.constexpr):
    """Log-sum-exp [GROUP_PAD] of `whole` and of so many tiles, from `lse` on; query heads are `stride` apart."""
    g = tl.arange(0, GROUP_PAD)[:, None]
    for first in range(0, tiles, AT_ONCE):
        tile = (first + tl.arange(0, AT_ONCE))[None, :]
        more = tl.load(lse + g * stride + tile, mask=(g < GROUP) & (tile < tiles), other=float("-inf"))
        whole = log_sum_exp(tl.join(whole, log_sum_exp(more, 1)), 1)
    return whole


@triton.jit
def _masses(
    segment_of_page, segment_bonus, dot, spread, left, log_mass, estimate_mass, normaliser, whole, clusters, clusters_stride,
    segments_stride, choice_spread, estimate_spread,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write both masses of one (request, kv head), whose pointers are given. normaliser, whole: [GROUP_PAD].

    The choice's is a log, of a sum that is relative to the largest query head.
    """
    g = tl.arange(0, GROUP_PAD)[:, None]
    for first in range(0, clusters, BLOCK):
        c = first + tl.arange(0, BLOCK)
        live = c < clusters
        size = tl.load(left + c, mask=live, other=0)
        wide = tl.load(spread + c, mask=live, other=0.0).to(tl.float32)
        segment = tl.load(segment_of_page + c // PER_PAGE, mask=live, other=0).to(tl.int32)
        real = (g < GROUP) & live[None, :]
        bonus = tl.load(segment_bonus + g * segments_stride + segment[None, :], mask=real, other=0.0) * wide[None, :]
        logit = tl.load(dot + g * clusters_stride + c[None, :], mask=real, other=0.0)
        chance = (logit + choice_spread * bonus - normaliser[:, None]) * LOG2_E
        mass = exp2((logit + estimate_spread * tl.minimum(bonus, CAP) - whole[:, None]) * LOG2_E)
        if GROUP != GROUP_PAD:
            chance = tl.where(g < GROUP, chance, float("-inf"))
            mass = tl.where(g < GROUP, mass, 0.0)
        peak = tl.max(chance, 0)
        share = exp2(chance - peak[None, :])
        if GROUP != GROUP_PAD:
            share = tl.where(g < GROUP, share, 0.0)
        found = (peak + tl.log2(tl.sum(share, 0) * (1.0 / GROUP))) * LN_2
        tl.store(log_mass + c, tl.where(size > 0, found, float("-inf")), mask=live)
        tl.store(estimate_mass + c, tl.where(size > 0, tl.sum(mass, 0) * (1.0 / GROUP), 0.0), mask=live)


@triton.jit
def _load_keys(log_mass, left, c, clusters):
    """(keys, sizes) of clusters `c`; keys are -1 where there is no cluster or an empty one."""
    size = tl.load(left + c, mask=c < clusters, other=0)
    share = tl.load(log_mass + c, mask=c < clusters, other=0.0)
    return tl.where(size > 0, order_of_log(share), -1), size


@triton.jit
def _choose(log_mass, left, clusters, limit, HELD: tl.constexpr):
    """The bracket of the masses, and that of the places of those which tie: `bracket` twice, of HELD clusters at most."""
    c = tl.arange(0, HELD)
    keys, size = _load_keys(log_mass, left, c, clusters)
    low, high, room = bracket(keys, size, limit)
    tied = (keys >= low) & (keys < high)
    tie_low, tie_high, tie_room = bracket(tl.where(tied, _LAST - c, -1), size, room)
    return low, high, room, tie_low, tie_high, tie_room


@triton.jit
def _read_masses(arguments, first, BLOCK: tl.constexpr):
    """For `bracket_in_memory`: order of the masses, and sizes."""
    log_mass, left, clusters = arguments
    return _load_keys(log_mass, left, first + tl.arange(0, BLOCK), clusters)


@triton.jit
def _read_tied(arguments, first, BLOCK: tl.constexpr):
    """For `bracket_in_memory`: places, the lower the higher, of those whose keys are in [low, high), and sizes."""
    log_mass, left, clusters, low, high = arguments
    c = first + tl.arange(0, BLOCK)
    keys, size = _load_keys(log_mass, left, c, clusters)
    return tl.where((keys >= low) & (keys < high), _LAST - c, -1), size


@triton.jit
def _list_firsts(log_mass, left, candidates, clusters, low, high, tie_low, tie_high, tie_room, BLOCK: tl.constexpr):
    """Write each chosen cluster at the place of its first candidate; the number of candidates.

    With it goes what must be added to a place to get an entry: the members of earlier clusters that are none.
    """
    listed = 0
    passed = 0
    for first in range(0, clusters, BLOCK):
        c = first + tl.arange(0, BLOCK)
        keys, size = _load_keys(log_mass, left, c, clusters)
        tied = (keys >= low) & (keys < high)
        order = _LAST - c
        cut = tl.where(tied & (order >= tie_low), tl.minimum(size, tie_room), 0)
        taken = tl.where((keys >= high) | (tied & (order >= tie_high)), size, cut)
        place = listed + tl.cumsum(taken, 0) - taken
        skipped = size - taken
        before = passed + tl.cumsum(skipped, 0) - skipped
        tl.store(candidates + place, (c.to(tl.int64) << 32) + before, mask=taken > 0)
        listed += tl.sum(taken, 0)
        passed += tl.sum(skipped, 0)
    return listed


@triton.jit(do_not_specialize=["pages_stride", "base_lse_stride", "lse_stride"])
def select_kernel(
    page_count, base_count, offset, segment_of_page, segment_bonus, dot, spread, base_lse, sinks, choice_lse, estimate_lse,
    left, log_mass, estimate_mass, total, candidates, candidate_count,
    pages_stride, clusters_stride, segments_stride, base_lse_stride, lse_stride, candidates_stride, limit, choice_spread,
    estimate_spread,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PER_PAGE: tl.constexpr, FEW: tl.constexpr,
    SOME: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, BASE_TILES: tl.constexpr,
    CANDIDATES: tl.constexpr, CLUSTERS: tl.constexpr, TOKENS: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, requests).

    Candidates are written as `cluster << 32 | entry`: first each chosen cluster at the place of its first candidate, then a
    running maximum carries it to its other candidates, for both halves ascend from cluster to cluster.

    Args, beside the arrays of the step and the workspace:
        limit: candidates at most.
        sinks: [H * GROUP], learned logits without a token; None: there are none.
        FEW, SOME, MANY: clusters that are held. LARGE: a request may have more than SOME.
        BLOCK: clusters at a time. TILES, BASE_TILES: score's tiles at a time, of clusters and of always-attended tokens.
        CANDIDATES: `limit`, padded. CLUSTERS, TOKENS: of one tile of score.
    """
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    pair = request * HEADS + head
    queries = pair * GROUP
    clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
    g = tl.arange(0, GROUP_PAD)
    normaliser = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    if clusters == 0:
        tl.store(total + queries + g, normaliser, mask=g < GROUP)
        tl.store(candidate_count + pair, 0)
        return
    if sinks is not None:
        normaliser = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=float("-inf")).to(tl.float32)
    tokens = tl.load(base_count + request).to(tl.int32)
    first_tile = tl.load(offset + request) // CLUSTERS
    lse_at = head.to(tl.int64) * GROUP * lse_stride + first_tile
    normaliser = _tiles_lse(
        base_lse + queries * base_lse_stride,
        base_lse_stride,
        tl.cdiv(tokens, TOKENS),
        normaliser,
        GROUP,
        GROUP_PAD,
        BASE_TILES,
    )
    tiles = tl.cdiv(clusters, CLUSTERS)
    whole = _tiles_lse(estimate_lse + lse_at, lse_stride, tiles, normaliser, GROUP, GROUP_PAD, TILES)
    normaliser = _tiles_lse(choice_lse + lse_at, lse_stride, tiles, normaliser, GROUP, GROUP_PAD, TILES)
    tl.store(total + queries + g, whole, mask=g < GROUP)

    at = head.to(tl.int64) * clusters_stride + first_tile.to(tl.int64) * CLUSTERS
    log_mass += at
    left += at
    candidates += pair * candidates_stride
    _masses(
        segment_of_page + request * pages_stride, segment_bonus + queries * segments_stride,
        dot + head.to(tl.int64) * (GROUP - 1) * clusters_stride + at, spread + at, left, log_mass, estimate_mass + at,
        normaliser, whole, clusters, clusters_stride, segments_stride, choice_spread, estimate_spread, GROUP, GROUP_PAD,
        PER_PAGE, BLOCK,
    )  # fmt: skip
    k = tl.arange(0, CANDIDATES)
    tl.store(candidates + k, tl.zeros((CANDIDATES,), tl.int64), mask=k < limit)
    tl.debug_barrier()

    if clusters <= FEW:
        low, high, room, tie_low, tie_high, tie_room = _choose(log_mass, left, clusters, limit, FEW)
    elif clusters <= SOME:
        low, high, room, tie_low, tie_high, tie_room = _choose(log_mass, left, clusters, limit, SOME)
    elif LARGE:
        if clusters <= MANY:
            low, high, room, tie_low, tie_high, tie_room = _choose(log_mass, left, clusters, limit, MANY)
        else:
            low, high, room = bracket_in_memory(_read_masses, (log_mass, left, clusters), clusters, limit, BLOCK)
            tied = (log_mass, left, clusters, low, high)
            tie_low, tie_high, tie_room = bracket_in_memory(_read_tied, tied, clusters, room, BLOCK)
    else:
        low, high, room, tie_low, tie_high, tie_room = 0, 0, 0, 0, 0, 0
    count = _list_firsts(log_mass, left, candidates, clusters, low, high, tie_low, tie_high, tie_room, BLOCK)
    tl.debug_barrier()
    firsts = tl.load(candidates + k, mask=k < count, other=0)
    tl.debug_barrier()
    tl.store(candidates + k, tl.associative_scan(firsts, 0, _later) + k, mask=k < count)
    tl.store(candidate_count + pair, count)


def constants(heads: int, group: int, per_page: int, clusters: int, limit: int) -> dict[str, Any]:
    """The kernel's constants, by argument name; clusters: most of a request."""
    few, some, many = HELD
    large = clusters > some
    return {
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": triton.next_power_of_2(group),
        "PER_PAGE": per_page,
        "FEW": few,
        "SOME": some,
        "MANY": many,
        "LARGE": large,
        "BLOCK": 64 * warps(large),  # two per thread: with four ptxas spills on sm_100
        "TILES": CLUSTER_TILES,
        "BASE_TILES": BASE_TILES,
        "CANDIDATES": triton.next_power_of_2(limit),
        "CLUSTERS": SCORE_CLUSTERS,
        "TOKENS": SCORE_TOKENS,
    }


def warps(large: bool) -> int:
    """Warps of a program; `large` as for the kernel."""
    return 16 if large else 8


def select(index: ClusterIndex, step: SparseStep, limit: int, w: Workspace, sinks: torch.Tensor | None = None) -> None:
    """Choose candidates; writes what `Workspace` says select writes.

    Args:
        index: the cluster index.
        step: the lists of this step.
        limit: candidates per (request, kv head) at most, no more than the workspace holds.
        w: as score left it.
        sinks: [heads], learned logits that have no token; None: there are none.
    """
    assert limit <= w.shape.candidates, (limit, w.shape)
    clusters = step.pages.shape[1] * index.clusters_per_page
    fixed = constants(w.shape.heads, w.shape.group, index.clusters_per_page, clusters, limit)
    select_kernel[(w.shape.heads, step.batch)](
        step.page_count, step.base_count, w.offset, step.segment_of_page, w.segment_bonus, w.dot, w.spread, w.base_lse,
        sinks, w.choice_lse, w.estimate_lse, w.left, w.log_mass, w.estimate_mass, w.total, w.candidates, w.candidate_count,
        step.segment_of_page.stride(0), w.shape.clusters, w.shape.segments, w.shape.base_tiles, w.shape.cluster_tiles,
        w.shape.candidates, limit, index.config.choice_spread, index.config.estimate_spread,
        **fixed, num_warps=warps(fixed["LARGE"]),
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("page_count", "base_count", "segment_of_page", "candidates"), "*i64"),
    **dict.fromkeys(
        ("segment_bonus", "dot", "base_lse", "choice_lse", "estimate_lse", "log_mass", "estimate_mass", "total"),
        "*fp32",
    ),
    **{
        "spread": "*bf16",
        "left": "*i32",
        "candidate_count": "*i32",
        "offset": "*i32",
        "choice_spread": "fp32",
        "estimate_spread": "fp32",
    },
    **dict.fromkeys(("pages_stride", "base_lse_stride", "lse_stride"), "i32"),
    **dict.fromkeys(("clusters_stride", "segments_stride", "candidates_stride", "limit"), "i32"),
}
_ALIGNED = (
    *(name for name, kind in _TYPES.items() if kind[0] == "*"),
    *("clusters_stride", "segments_stride", "candidates_stride", "limit"),
)

COMPILE_CASES = [
    CompileCase(
        f"select C={clusters} G={group}", select_kernel, _TYPES, constants(8, group, 2, clusters, 2048) | {"sinks": None},
        _ALIGNED, num_warps=warps(clusters > HELD[1]), programs_per_sm=2 if clusters <= HELD[1] and group < 8 else 1,
    )
    for clusters, group in ((4096, 3), (4096, 4), (4096, 8), (131072, 4), (131072, 8))
]  # fmt: skip
