"""Totals and masses on a GPU: the first of select's two launches.

Masses need the log-sum-exp of all clusters, which score's tiles left in parts; beyond that no cluster knows of another, so
programs share a (request, kv head). Each combines the tiles' log-sum-exps for itself, in the same order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.score.triton import CAP
from sglang_clusterkv.kernels.triton_softmax import LN_2, LOG2_E, exp2, log2
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS, Workspace

if TYPE_CHECKING:
    import torch

    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

BASE_TILES = 16  # of always-attended tokens at a time: two are usual
CLUSTER_TILES = (16, 64)  # of clusters at a time: those of 4,096 and of 16,384


@triton.jit
def _tiles_lse(lse, stride, tiles, whole, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, AT_ONCE: tl.constexpr):
    """Log-sum-exp [GROUP_PAD] of `whole` and of so many tiles, from `lse` on; query heads are `stride` apart."""
    g = tl.arange(0, GROUP_PAD)[:, None]
    peak = whole
    weight = tl.where(whole == float("-inf"), 0.0, 1.0)
    for first in range(0, tiles, AT_ONCE):
        tile = (first + tl.arange(0, AT_ONCE))[None, :]
        more = tl.load(lse + g * stride + tile, mask=(g < GROUP) & (tile < tiles), other=float("-inf"))
        higher = tl.maximum(peak, tl.max(more, 1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        weight *= exp2((peak - finite) * LOG2_E)
        weight += tl.sum(exp2((more - finite[:, None]) * LOG2_E), 1)
        peak = higher
    return tl.where(weight > 0, peak + log2(tl.maximum(weight, 1e-37)) * LN_2, float("-inf"))


@triton.jit(do_not_specialize=["pages_stride", "base_lse_stride", "lse_stride", "parts"])
def masses_kernel(
    page_count, base_count, offset, segment_of_page, segment_bonus, dot, spread, base_lse, sinks, choice_lse, estimate_lse,
    left, log_mass, estimate_mass, total,
    pages_stride, clusters_stride, segments_stride, base_lse_stride, lse_stride, parts, choice_spread, estimate_spread,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, BASE_TILES: tl.constexpr, CLUSTERS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, parts, requests): the total, and both masses of the part-th share of a request's clusters.

    The choice's mass is a log, of a sum that is relative to the largest query head. Up to the end of score's last tile masses
    of no clusters are written: so all is loaded and stored as wide as it can be.

    Args, beside the arrays of the step and the workspace:
        sinks: [H * GROUP], learned logits without a token; None: there are none.
        BLOCK: clusters at a time. TILES, BASE_TILES: score's tiles at a time, of clusters and of always-attended tokens.
        CLUSTERS, TOKENS: of one tile of score.
    """
    head = tl.program_id(0)
    part = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    pair = request * HEADS + head
    queries = pair * GROUP
    clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
    tiles = tl.cdiv(clusters, CLUSTERS)
    room = tiles * CLUSTERS
    share = tl.cdiv(tl.cdiv(room, BLOCK), parts) * BLOCK
    begin, end = part * share, tl.minimum((part + 1) * share, room)
    g = tl.arange(0, GROUP_PAD)
    if clusters == 0:
        if part == 0:
            tl.store(total + queries + g, tl.full((GROUP_PAD,), float("-inf"), tl.float32), mask=g < GROUP)
    elif begin < end:
        normaliser = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
        if sinks is not None:
            normaliser = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=float("-inf")).to(tl.float32)
        tokens = tl.load(base_count + request).to(tl.int32)
        first_tile = tl.load(offset + request) // CLUSTERS
        lse_at = head.to(tl.int64) * GROUP * lse_stride + first_tile
        base_lse += queries * base_lse_stride
        normaliser = _tiles_lse(
            base_lse, base_lse_stride, tl.cdiv(tokens, TOKENS), normaliser, GROUP, GROUP_PAD, BASE_TILES
        )
        whole = _tiles_lse(estimate_lse + lse_at, lse_stride, tiles, normaliser, GROUP, GROUP_PAD, TILES)
        normaliser = _tiles_lse(choice_lse + lse_at, lse_stride, tiles, normaliser, GROUP, GROUP_PAD, TILES)
        if part == 0:
            tl.store(total + queries + g, whole, mask=g < GROUP)
        whole = (whole * LOG2_E)[:, None]
        normaliser = (normaliser * LOG2_E)[:, None]

        h = g[:, None]
        at = head.to(tl.int64) * clusters_stride + first_tile.to(tl.int64) * CLUSTERS
        dot += head.to(tl.int64) * (GROUP - 1) * clusters_stride + at
        segment_bonus += queries * segments_stride
        for first in range(begin, end, BLOCK):
            c = first + tl.arange(0, BLOCK)
            inside = c < room
            live = c < clusters
            size = tl.load(left + at + c, mask=inside, other=0)
            wide = tl.load(spread + at + c, mask=inside, other=0.0).to(tl.float32)
            segment = tl.load(segment_of_page + request * pages_stride + c // PER_PAGE, mask=live, other=0).to(tl.int32)
            real = (h < GROUP) & inside[None, :]
            bonus = (
                tl.load(segment_bonus + h * segments_stride + segment[None, :], mask=real, other=0.0) * wide[None, :]
            )
            logit = tl.load(dot + h * clusters_stride + c[None, :], mask=real, other=0.0)
            chance = (logit + choice_spread * bonus) * LOG2_E - normaliser
            mass = exp2((logit + estimate_spread * tl.minimum(bonus, CAP)) * LOG2_E - whole)
            if GROUP != GROUP_PAD:
                chance = tl.where(h < GROUP, chance, float("-inf"))
                mass = tl.where(h < GROUP, mass, 0.0)
            peak = tl.max(chance, 0)
            found = (peak + log2(tl.sum(exp2(chance - peak[None, :]), 0) * (1.0 / GROUP))) * LN_2
            filled = live & (size > 0)
            tl.store(log_mass + at + c, tl.where(filled, found, float("-inf")), mask=inside)
            tl.store(estimate_mass + at + c, tl.where(filled, tl.sum(mass, 0) * (1.0 / GROUP), 0.0), mask=inside)


def constants(heads: int, group: int, per_page: int, clusters: int) -> dict[str, Any]:
    """The kernel's constants, by argument name; clusters: most of a request."""
    few, many = CLUSTER_TILES
    return {
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": triton.next_power_of_2(group),
        "PER_PAGE": per_page,
        "BLOCK": grids.MASS_BLOCK,
        "TILES": few if clusters <= few * SCORE_CLUSTERS else many,
        "BASE_TILES": BASE_TILES,
        "CLUSTERS": SCORE_CLUSTERS,
        "TOKENS": SCORE_TOKENS,
    }


def masses(index: ClusterIndex, step: SparseStep, w: Workspace, sinks: torch.Tensor | None) -> None:
    """Write `total`, `log_mass` and `estimate_mass` of the workspace.

    Args:
        index: the cluster index.
        step: the lists of this step.
        w: as score left it.
        sinks: [heads], learned logits that have no token; None: there are none.
    """
    clusters = step.pages.shape[1] * index.clusters_per_page
    parts = grids.mass_parts(step.batch * w.shape.heads, clusters)
    masses_kernel[(w.shape.heads, parts, step.batch)](
        step.page_count, step.base_count, w.offset, step.segment_of_page, w.segment_bonus, w.dot, w.spread, w.base_lse,
        sinks, w.choice_lse, w.estimate_lse, w.left, w.log_mass, w.estimate_mass, w.total,
        step.segment_of_page.stride(0), w.shape.clusters, w.shape.segments, w.shape.base_tiles, w.shape.cluster_tiles, parts,
        index.config.choice_spread, index.config.estimate_spread,
        **constants(w.shape.heads, w.shape.group, index.clusters_per_page, clusters),
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("page_count", "base_count", "segment_of_page"), "*i64"),
    **dict.fromkeys(
        ("segment_bonus", "dot", "base_lse", "choice_lse", "estimate_lse", "log_mass", "estimate_mass", "total"),
        "*fp32",
    ),
    **{"spread": "*bf16", "left": "*i32", "offset": "*i32", "choice_spread": "fp32", "estimate_spread": "fp32"},
    **dict.fromkeys(("pages_stride", "base_lse_stride", "lse_stride", "parts"), "i32"),
    **dict.fromkeys(("clusters_stride", "segments_stride"), "i32"),
}
_ALIGNED = (*(name for name, kind in _TYPES.items() if kind[0] == "*"), "clusters_stride", "segments_stride")

COMPILE_CASES = [
    CompileCase(
        f"select masses C={clusters} G={group}", masses_kernel, _TYPES, constants(8, group, 2, clusters) | {"sinks": None},
        _ALIGNED, programs_per_sm=4 if group <= 4 else 2, loads_128=group + 1,
    )
    for clusters, group in ((4096, 3), (4096, 4), (4096, 8), (131072, 4), (131072, 8))
]  # fmt: skip
