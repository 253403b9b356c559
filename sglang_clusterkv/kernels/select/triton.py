"""Select on a GPU: totals, masses, the clusters whose tokens are candidates, and the list of these tokens.

One launch, one program per (request, kv head). It holds the masses in registers while it looks for their threshold, up to
16,384 of them; more are right, but spill. Before and after, clusters are taken in blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.score.triton import CAP, base_tiles, log_sum_exp
from sglang_clusterkv.kernels.triton_threshold import bracket, order_of_log
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS, Workspace

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

BASE_TILES = 8  # of always-attended tokens at a time: half as many are usual
LEAST_HELD = 256  # clusters; fewer make no program faster, and every size is a compilation
_LAST = tl.constexpr(2**31 - 2)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _masses(
    segment_of_page, segment_bonus, dot, spread, left, log_mass, estimate_mass, normaliser, whole, clusters, clusters_stride,
    segments_stride, choice_spread, estimate_spread,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write both masses of one (request, kv head), whose pointers are given. normaliser, whole: [GROUP_PAD].

    The choice's is a log: exp(peak) times `share`, which is relative to the largest query head so far.
    """
    g = tl.arange(0, GROUP_PAD)
    for first in range(0, clusters, BLOCK):
        c = first + tl.arange(0, BLOCK)
        live = c < clusters
        size = tl.load(left + c, mask=live, other=0)
        wide = tl.load(spread + c, mask=live, other=0.0).to(tl.float32)
        segment = tl.load(segment_of_page + c // PER_PAGE, mask=live, other=0).to(tl.int32)
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        share = tl.zeros((BLOCK,), tl.float32)
        estimated = tl.zeros((BLOCK,), tl.float32)
        for query in range(GROUP):
            bonus = tl.load(segment_bonus + query * segments_stride + segment, mask=live, other=0.0) * wide
            logit = tl.load(dot + query * clusters_stride + c, mask=live, other=0.0)
            chance = logit + choice_spread * bonus - tl.sum(tl.where(g == query, normaliser, 0.0), 0)
            less = tl.exp(-tl.abs(chance - peak))
            share = tl.where(chance > peak, share * less + 1.0, share + less)
            peak = tl.maximum(peak, chance)
            bonus = estimate_spread * tl.minimum(bonus, CAP)
            estimated += tl.exp(logit + bonus - tl.sum(tl.where(g == query, whole, 0.0), 0))
        tl.store(log_mass + c, tl.where(size > 0, peak + tl.log(share * (1.0 / GROUP)), float("-inf")), mask=live)
        tl.store(estimate_mass + c, tl.where(size > 0, estimated * (1.0 / GROUP), 0.0), mask=live)


@triton.jit
def _load_keys(log_mass, left, c, clusters):
    """(keys, sizes) of clusters `c`; keys are -1 where there is no cluster or an empty one."""
    size = tl.load(left + c, mask=c < clusters, other=0)
    share = tl.load(log_mass + c, mask=c < clusters, other=0.0)
    return tl.where(size > 0, order_of_log(share), -1), size


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


@triton.jit(do_not_specialize=["pages_stride", "lse_stride", "base_tiles"])
def select_kernel(
    page_count, base_count, segment_of_page, segment_bonus, dot, spread, choice_lse, estimate_lse, left,
    log_mass, estimate_mass, total, candidates, candidate_count,
    pages_stride, clusters_stride, segments_stride, lse_stride, candidates_stride, base_tiles, limit, choice_spread,
    estimate_spread,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PER_PAGE: tl.constexpr, HELD: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr, BASE_TILES: tl.constexpr, CANDIDATES: tl.constexpr,
    CLUSTERS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, requests).

    Candidates are written as `cluster << 32 | entry`: first each chosen cluster at the place of its first candidate, then a
    running maximum carries it to its other candidates, for both halves ascend from cluster to cluster.

    Args, beside the arrays of the step and the workspace:
        limit: candidates at most.
        HELD: clusters, padded. BLOCK: of them at a time.
        TILES: score's tiles of clusters, padded. BASE_TILES: its tiles of always-attended tokens at a time.
        CANDIDATES: `limit`, padded. CLUSTERS, TOKENS: of one tile of score.
    """
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    pair = request * HEADS + head
    queries = pair * GROUP
    clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
    tokens = tl.load(base_count + request).to(tl.int32)

    g = tl.arange(0, GROUP_PAD)
    lse_at = (queries + g)[:, None] * lse_stride
    tile = tl.arange(0, TILES)
    used = (g < GROUP)[:, None] & (tile * CLUSTERS < clusters)[None, :]
    at = lse_at + (base_tiles + tile)[None, :]
    normaliser = log_sum_exp(tl.load(choice_lse + at, mask=used, other=float("-inf")))
    whole = log_sum_exp(tl.load(estimate_lse + at, mask=used, other=float("-inf")))
    for first in range(0, tokens, BASE_TILES * TOKENS):
        base = first // TOKENS + tl.arange(0, BASE_TILES)
        used_base = (g < GROUP)[:, None] & (base * TOKENS < tokens)[None, :]
        at_base = lse_at + base[None, :]
        more = log_sum_exp(tl.load(choice_lse + at_base, mask=used_base, other=float("-inf")))
        normaliser = log_sum_exp(tl.join(normaliser, more))
        more = log_sum_exp(tl.load(estimate_lse + at_base, mask=used_base, other=float("-inf")))
        whole = log_sum_exp(tl.join(whole, more))
    tl.store(total + queries + g, whole, mask=g < GROUP)

    log_mass += pair * clusters_stride
    left += pair * clusters_stride
    candidates += pair * candidates_stride
    _masses(
        segment_of_page + request * pages_stride, segment_bonus + queries * segments_stride,
        dot + queries * clusters_stride, spread + pair * clusters_stride, left, log_mass,
        estimate_mass + pair * clusters_stride, normaliser, whole, clusters, clusters_stride, segments_stride,
        choice_spread, estimate_spread, GROUP, GROUP_PAD, PER_PAGE, BLOCK,
    )  # fmt: skip
    k = tl.arange(0, CANDIDATES)
    tl.store(candidates + k, tl.zeros((CANDIDATES,), tl.int64), mask=k < limit)
    tl.debug_barrier()

    c = tl.arange(0, HELD)
    keys, size = _load_keys(log_mass, left, c, clusters)
    low, high, room = bracket(keys, size, limit)
    tied = (keys >= low) & (keys < high)
    tie_low, tie_high, tie_room = bracket(tl.where(tied, _LAST - c, -1), size, room)
    count = _list_firsts(log_mass, left, candidates, clusters, low, high, tie_low, tie_high, tie_room, BLOCK)
    tl.debug_barrier()
    firsts = tl.load(candidates + k, mask=k < count, other=0)
    tl.debug_barrier()
    tl.store(candidates + k, tl.associative_scan(firsts, 0, _later) + k, mask=k < count)
    tl.store(candidate_count + pair, count)


def constants(heads: int, group: int, per_page: int, clusters: int, limit: int) -> dict[str, Any]:
    """The kernel's constants, by argument name."""
    held = max(LEAST_HELD, triton.next_power_of_2(clusters))
    return {
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": triton.next_power_of_2(group),
        "PER_PAGE": per_page,
        "HELD": held,
        "BLOCK": min(held, 256 * warps(held)),  # eight per thread
        "TILES": triton.next_power_of_2(triton.cdiv(held, SCORE_CLUSTERS)),
        "BASE_TILES": BASE_TILES,
        "CANDIDATES": triton.next_power_of_2(limit),
        "CLUSTERS": SCORE_CLUSTERS,
        "TOKENS": SCORE_TOKENS,
    }


def warps(held: int) -> int:
    """Warps of a program that holds so many clusters."""
    return min(16, max(4, held // 512))


def select(index: ClusterIndex, step: SparseStep, limit: int, w: Workspace) -> None:
    """Choose candidates; writes what `Workspace` says select writes.

    Args:
        index: the cluster index.
        step: the lists of this step.
        limit: candidates per (request, kv head) at most, no more than the workspace holds.
        w: as score left it.
    """
    assert limit <= w.shape.candidates, (limit, w.shape)
    clusters = step.pages.shape[1] * index.clusters_per_page
    tokens = base_tiles(step)
    fixed = constants(w.shape.heads, w.shape.group, index.clusters_per_page, clusters, limit)
    select_kernel[(w.shape.heads, step.batch)](
        step.page_count, step.base_count, step.segment_of_page, w.segment_bonus, w.dot, w.spread, w.choice_lse,
        w.estimate_lse, w.left, w.log_mass, w.estimate_mass, w.total, w.candidates, w.candidate_count,
        step.segment_of_page.stride(0), w.shape.clusters, w.shape.segments, w.shape.tiles, w.shape.candidates, tokens,
        limit, index.config.choice_spread, index.config.estimate_spread,
        **fixed, num_warps=warps(fixed["HELD"]),
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("page_count", "base_count", "segment_of_page", "candidates"), "*i64"),
    **dict.fromkeys(
        ("segment_bonus", "dot", "choice_lse", "estimate_lse", "log_mass", "estimate_mass", "total"), "*fp32"
    ),
    **{
        "spread": "*bf16",
        "left": "*i32",
        "candidate_count": "*i32",
        "choice_spread": "fp32",
        "estimate_spread": "fp32",
    },
    **dict.fromkeys(("pages_stride", "lse_stride", "base_tiles"), "i32"),
    **dict.fromkeys(("clusters_stride", "segments_stride", "candidates_stride", "limit"), "i32"),
}
_ALIGNED = (
    *(name for name, kind in _TYPES.items() if kind[0] == "*"),
    *("clusters_stride", "segments_stride", "candidates_stride", "limit"),
)

COMPILE_CASES = [
    CompileCase(
        f"select C={clusters} G={group}", select_kernel, _TYPES, constants(8, group, 2, clusters, 2048), _ALIGNED,
        num_warps=warps(clusters), programs_per_sm=2 if clusters <= 4096 else 1,
    )
    for clusters, group in ((512, 3), (1024, 4), (4096, 4), (4096, 8), (16384, 4))
]  # fmt: skip
