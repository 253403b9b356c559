"""Which clusters the estimate takes at their own mean value: those with the most mass left, once per (request, kv head).

The program that recalled a (request, kv head)'s tokens goes on with this, for it is the last that changes what is left of
clusters. Of many clusters it looks at a shortlist only, which a program beside that of select made (`grids.own_shortlist`).
Where whole clusters are recalled by many programs, it is a launch of its own. The estimate's programs then share the list, and
know of all others by its edge that they are not in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.triton_threshold import bracket, bracket_in_memory
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS
from sglang_clusterkv.memory.masses import NO_MASS

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

HELD = (1024, 4096, 16384)  # masses that are held in registers: the first that a request's clusters fit into
BLOCK, LARGE_BLOCK = 2048, 4096  # clusters at a time: ptxas spills with less of many clusters, and with more of few
LEAST_MASS = tl.constexpr(NO_MASS)
TILE = tl.constexpr(SCORE_CLUSTERS)  # a request's clusters begin at multiples of it
_LAST = tl.constexpr(2**30)  # beyond every cluster
_MOST_BITS = tl.constexpr(0x7F800000)  # of an infinite mass


@triton.jit
def within(c, clusters):
    """Whether clusters c lie before the end of the tile in which a request's `clusters` end: there is memory, and loads that
    end with a tile are wide ones."""
    return c < tl.cdiv(clusters, TILE) * TILE


@triton.jit
def masses_of(mass, left, c, inside, listed):
    """Bits of the masses that are left of clusters c; they order as the masses do. -1 where a cluster is not listed.

    inside: of which there is memory.
    """
    tokens = tl.load(left + c, mask=inside, other=0)
    masses = tl.load(mass + c, mask=inside, other=0.0)
    masses = tl.where(tokens > 0, masses * tokens.to(tl.float32), 0.0)
    # A GPU's NaN has all bits set, and the list is made by bits: an edge could not lie above it.
    masses = tl.where(masses == masses, masses, float("inf"))
    masses = tl.where(masses < LEAST_MASS, 0.0, masses)
    return tl.where(listed, masses.to(tl.int32, bitcast=True), -1)


@triton.jit
def in_list(bits, c, low, high, last):
    """Whether clusters c, with so many bits of mass, are in the list whose edge is (low, high, last)."""
    return (bits >= high) | ((bits >= low) & (c <= last))


@triton.jit
def _held_edge(mass, left, clusters, limit, HELD: tl.constexpr):
    """(low, high, last): the `limit` largest masses are those whose bits are `high` or more, or `low` or more up to cluster
    `last`. Of HELD clusters at most."""
    c = tl.arange(0, HELD)
    bits = masses_of(mass, left, c, within(c, clusters), c < clusters)
    low, high, room, between = bracket(bits, None, limit)
    last = _LAST
    if between > room:
        tied = (bits >= low) & (bits < high)
        lowest, _, _, _ = bracket(tl.where(tied, _LAST - c, -1), None, room)
        last = _LAST - lowest
    return low, high, last


@triton.jit
def _read_bits(arguments, first, BLOCK: tl.constexpr):
    """For `bracket_in_memory`: bits of masses, and ones."""
    mass, left, clusters = arguments
    c = first + tl.arange(0, BLOCK)
    return masses_of(mass, left, c, within(c, clusters), c < clusters), tl.full((BLOCK,), 1, tl.int32)


@triton.jit
def _read_tied(arguments, first, BLOCK: tl.constexpr):
    """For `bracket_in_memory`: places, the lower the higher, of those whose bits are in [low, high), and ones."""
    mass, left, clusters, low, high = arguments
    c = first + tl.arange(0, BLOCK)
    bits = masses_of(mass, left, c, within(c, clusters), c < clusters)
    return tl.where((bits >= low) & (bits < high), _LAST - c, -1), tl.full((BLOCK,), 1, tl.int32)


@triton.jit
def list_most(
    mass, left, clusters, limit, listed,
    FEW: tl.constexpr, SOME: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Write the `limit` clusters with the largest masses, ascending; their edge (low, high, last), see `in_list`.

    Of one (request, kv head), whose pointers are given; all threads of a program together.

    FEW, SOME, MANY: clusters that are held. LARGE: there may be more than SOME. BLOCK: clusters at a time.
    """
    if clusters <= FEW:
        low, high, last = _held_edge(mass, left, clusters, limit, FEW)
    elif clusters <= SOME:
        low, high, last = _held_edge(mass, left, clusters, limit, SOME)
    elif LARGE:
        if clusters <= MANY:
            low, high, last = _held_edge(mass, left, clusters, limit, MANY)
        else:
            low, high, room = bracket_in_memory(_read_bits, (mass, left, clusters), clusters, limit, BLOCK)
            tied = (mass, left, clusters, low, high)
            lowest, _, _ = bracket_in_memory(_read_tied, tied, clusters, tl.maximum(room, 1), BLOCK)
            last = _LAST - lowest
    else:
        low, high, last = 0, 0, _LAST
    passed = 0
    for first in range(0, clusters, BLOCK):
        c = first + tl.arange(0, BLOCK)
        bits = masses_of(mass, left, c, within(c, clusters), c < clusters)
        chosen = in_list(bits, c, low, high, last) & (c < clusters)
        one = chosen.to(tl.int32)
        tl.store(listed + passed + tl.cumsum(one, 0) - 1, c, mask=chosen)
        passed += tl.sum(one, 0)
    return low, high, last


@triton.jit
def most_of_shortlist(mass, left, shortlist, count, limit, listed, SHORT: tl.constexpr):
    """As `list_most`, of the `count` clusters of a list that ascends; SHORT at most. The edge is one among all clusters."""
    k = tl.arange(0, SHORT)
    there = k < count
    c = tl.load(shortlist + k, mask=there, other=0)
    bits = masses_of(mass, left, c, there, there)
    low, high, room, between = bracket(bits, None, limit)
    tied = (bits >= low) & (bits < high)
    if between > room:
        lowest, _, _, _ = bracket(tl.where(tied, _LAST - k, -1), None, room)
        tied = tied & (_LAST - k >= lowest)
    chosen = there & ((bits >= high) | tied)
    tl.store(listed + tl.cumsum(chosen.to(tl.int32), 0) - 1, c, mask=chosen)
    # Clusters beyond the shortlist may lie between `low` and the least mass that was chosen.
    low = tl.min(tl.where(chosen, bits, _MOST_BITS), 0)
    return low, low + 1, tl.max(tl.where(chosen & (bits == low), c, -1), 0)


@triton.jit
def store_edge(edge, low, high, last):
    """Where `in_list` finds it."""
    tl.store(edge, low)
    tl.store(edge + 1, high)
    tl.store(edge + 2, last)


@triton.jit
def own_kernel(
    page_count, offset, left, mass, own, edge, clusters_stride, own_stride, limit,
    HEADS: tl.constexpr, PER_PAGE: tl.constexpr, FEW: tl.constexpr, SOME: tl.constexpr, MANY: tl.constexpr,
    BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, requests): the list and its edge alone."""
    head, request = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pair = request * HEADS + head
    clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
    at = head.to(tl.int64) * clusters_stride + tl.load(offset + request) // TILE * TILE
    low, high, last = list_most(
        mass + at, left + at, clusters, limit, own + pair * own_stride, FEW, SOME, MANY, BLOCK, LARGE
    )
    store_edge(edge + pair * 3, low, high, last)


def own_constants(per_page: int, clusters: int) -> dict[str, Any]:
    """Constants of `list_most`, by name, for up to `clusters` clusters of a request."""
    few, some, many = HELD
    large = clusters > some
    block = LARGE_BLOCK if large else BLOCK
    return {"PER_PAGE": per_page, "FEW": few, "SOME": some, "MANY": many, "BLOCK": block, "LARGE": large}


def own_warps(clusters: int) -> int:
    """Warps of a program that holds so many masses."""
    return 16 if clusters > HELD[1] else 8


def is_limited(clusters: int, limit: int) -> bool:
    """Whether of so many clusters of a request some may not use their own mean value; by a power of two, as all is compiled."""
    return triton.next_power_of_2(clusters) > limit


def has_shortlist(config: ClusterKVConfig, clusters: int) -> bool:
    """Whether select's launch makes one, for up to `clusters` clusters of a request: for a choice among candidates alone."""
    if not (config.refine and config.estimate):
        return False
    return grids.own_shortlist(clusters, config.estimate_clusters, config.budget_tokens) > 0


def choose_own(index: ClusterIndex, step: SparseStep, w: Workspace) -> None:
    """Write `own` and `own_edge` of the workspace; `left` as refine leaves it."""
    clusters = step.pages.shape[1] * index.clusters_per_page
    own_kernel[(w.shape.heads, step.batch)](
        step.page_count, w.offset, w.left, w.estimate_mass, w.own, w.own_edge, w.shape.clusters, w.own.shape[2],
        index.config.estimate_clusters, HEADS=w.shape.heads, **own_constants(index.clusters_per_page, clusters),
        num_warps=own_warps(clusters),
    )  # fmt: skip


_TYPES = {
    **{"page_count": "*i64", "mass": "*fp32"},
    **dict.fromkeys(("offset", "left", "own", "edge"), "*i32"),
    **dict.fromkeys(("clusters_stride", "own_stride", "limit"), "i32"),
}
_ALIGNED = tuple(name for name, kind in _TYPES.items() if kind[0] == "*" or name == "clusters_stride")

COMPILE_CASES = [
    CompileCase(
        f"estimate own C={clusters:,}", own_kernel, _TYPES, own_constants(2, clusters) | {"HEADS": 8}, _ALIGNED,
        num_warps=own_warps(clusters), programs_per_sm=1 if clusters > HELD[1] else 2,
    )
    for clusters in (4096, 131072)
]  # fmt: skip
