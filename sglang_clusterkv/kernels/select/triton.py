"""Select on a GPU: masses, the clusters whose tokens are candidates, and the list of these tokens.

Two launches: the masses, by many programs (triton_masses.py); then one program per (request, kv head), which holds them in
registers while it looks for their threshold, in as many as the request's clusters need. Beyond 16,384 it reads them again in
each round. To list the candidates it takes clusters in blocks. Beside it another program of the same launch lists the clusters
among which those with their own mean value will be (`grids.own_shortlist`).

Where a request's clusters end, those of the next begin at a multiple of score's tile. What lies between is loaded too, and
counts as nothing: a load that ends anywhere would be made element by element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from sglang_clusterkv.config import MAX_SEGMENT_TOKENS
from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.estimate.triton_own import HELD, has_shortlist, list_most, own_constants
from sglang_clusterkv.kernels.select.triton_masses import masses
from sglang_clusterkv.kernels.triton_threshold import bracket, bracket_in_memory, order_of_log
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, Workspace

if TYPE_CHECKING:
    import torch

    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

_LAST = tl.constexpr(2**30)  # beyond every cluster
_TILE = tl.constexpr(SCORE_CLUSTERS)


@triton.jit
def _later(a, b):
    return tl.maximum(a, b)


@triton.jit
def _load_keys(log_mass, left, c, clusters):
    """(keys, sizes) of clusters `c`; keys are -1 where there is no cluster or an empty one."""
    inside = c < tl.cdiv(clusters, _TILE) * _TILE
    size = tl.load(left + c, mask=inside, other=0)
    size = tl.where(c < clusters, size, 0)
    share = tl.load(log_mass + c, mask=inside, other=0.0)
    return tl.where(size > 0, order_of_log(share), -1), size


@triton.constexpr_function
def sum_bits(clusters, per_cluster):
    """Bits of the sizes' sum of so many clusters, with so many tokens on average, if the clusters' number fits beside it into
    32 bits; else 0."""
    bits = (clusters * per_cluster).bit_length()
    return bits if bits + (clusters - 1).bit_length() <= 32 else 0


@triton.constexpr_function
def block_bits(block, per_cluster, candidates):
    """Bits of the sizes' sum of a block of clusters, which may end within a segment, if the candidates' number fits beside it
    into 31 bits; else 0."""
    bits = (block * per_cluster + MAX_SEGMENT_TOKENS).bit_length()
    return bits if bits + candidates.bit_length() <= 31 else 0


@triton.jit
def _choose(log_mass, left, clusters, limit, HELD: tl.constexpr, PER_CLUSTER: tl.constexpr):
    """The bracket of the masses, and that of the places of those which tie: `bracket` twice, of HELD clusters at most, which
    have PER_CLUSTER tokens on average."""
    c = tl.arange(0, HELD)
    keys, size = _load_keys(log_mass, left, c, clusters)
    BITS: tl.constexpr = sum_bits(HELD, PER_CLUSTER)
    low, high, room, between = bracket(keys, size, limit, BITS)
    tie_low, tie_high, tie_room = 0, _LAST + 1, room
    if between > 1:
        tied = (keys >= low) & (keys < high)
        tie_low, tie_high, tie_room, _ = bracket(tl.where(tied, _LAST - c, -1), size, room)
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
def _list_firsts(
    log_mass, left, firsts, candidates, clusters, low, high, tie_low, tie_high, tie_room, BLOCK: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Write each chosen cluster at the place of its first candidate, and this place; the number of candidates.

    With it goes what must be added to a place to get an entry: the members of earlier clusters that are none. BITS: of a
    block's tokens, where its candidates fit beside them into 31 bits; else 0.
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
        if BITS:
            both = (taken << BITS) + size
            before = tl.cumsum(both, 0) - both
            place, entry = before >> BITS, before & ((1 << BITS) - 1)
            whole = tl.sum(both, 0)
            taken_here, here = whole >> BITS, whole & ((1 << BITS) - 1)
        else:
            place, entry = tl.cumsum(taken, 0) - taken, tl.cumsum(size, 0) - size
            taken_here, here = tl.sum(taken, 0), tl.sum(size, 0)
        place += listed
        skipped = passed + entry - place
        tl.store(candidates + place, (c.to(tl.int64) << 32) + skipped, mask=taken > 0)
        tl.store(firsts + place, place, mask=taken > 0)
        listed += taken_here
        passed += here
    return listed


@triton.jit
def _list_candidates(
    log_mass, left, firsts, candidates, clusters, candidates_stride, limit,
    PER_CLUSTER: tl.constexpr, FEW: tl.constexpr, SOME: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Choose and list, for one (request, kv head), whose pointers are given and which has clusters; the number of candidates.

    Candidates are written as `cluster << 32 | entry`: first each chosen cluster at the place of its first candidate, and that
    place into `firsts`. Then a running maximum of places tells every other candidate where its cluster's first one is.
    """
    k = tl.arange(0, CANDIDATES)
    room_for = k < candidates_stride
    tl.store(firsts + k, tl.zeros((CANDIDATES,), tl.int32), mask=room_for)
    tl.debug_barrier()

    if clusters <= FEW:
        low, high, room, tie_low, tie_high, tie_room = _choose(log_mass, left, clusters, limit, FEW, PER_CLUSTER)
    elif clusters <= SOME:
        low, high, room, tie_low, tie_high, tie_room = _choose(log_mass, left, clusters, limit, SOME, PER_CLUSTER)
    elif LARGE:
        if clusters <= MANY:
            low, high, room, tie_low, tie_high, tie_room = _choose(log_mass, left, clusters, limit, MANY, PER_CLUSTER)
        else:
            low, high, room = bracket_in_memory(_read_masses, (log_mass, left, clusters), clusters, limit, BLOCK)
            tied = (log_mass, left, clusters, low, high)
            tie_low, tie_high, tie_room = bracket_in_memory(_read_tied, tied, clusters, room, BLOCK)
    else:
        low, high, room, tie_low, tie_high, tie_room = 0, 0, 0, 0, 0, 0
    count = _list_firsts(
        log_mass, left, firsts, candidates, clusters, low, high, tie_low, tie_high, tie_room, BLOCK,
        block_bits(BLOCK, PER_CLUSTER, CANDIDATES),
    )  # fmt: skip
    tl.debug_barrier()
    live = k < count
    place = tl.associative_scan(tl.load(firsts + k, mask=room_for, other=0), 0, _later)
    first = tl.load(candidates + place, mask=live, other=0)
    tl.debug_barrier()
    tl.store(candidates + k, first + k, mask=room_for)
    return count


@triton.jit
def select_kernel(
    page_count, offset, left, log_mass, estimate_mass, firsts, candidates, candidate_count, shortlist, clusters_stride,
    candidates_stride, short_stride, limit, short_limit,
    HEADS: tl.constexpr, PER_PAGE: tl.constexpr, PER_CLUSTER: tl.constexpr, FEW: tl.constexpr, SOME: tl.constexpr,
    MANY: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr, LARGE: tl.constexpr, SHORT: tl.constexpr,
    OWN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, requests, 2 if SHORT else 1): the candidates; and the shortlist.

    Args, beside the arrays of the step and the workspace:
        firsts: int32 [B, H, K], of which nothing is kept.
        limit: candidates at most. short_limit: clusters of the shortlist at most.
        PER_CLUSTER: tokens of a cluster on average, of each segment.
        FEW, SOME, MANY: clusters that are held. LARGE: a request may have more than SOME.
        BLOCK, OWN_BLOCK: clusters at a time, of the candidates and of the shortlist. CANDIDATES: `limit`, padded.
    """
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    pair = request * HEADS + head
    clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
    at = head.to(tl.int64) * clusters_stride + tl.load(offset + request) // _TILE * _TILE
    left += at
    if SHORT:
        shortens = tl.program_id(2) == 1
    else:
        shortens = False
    if shortens:
        list_most(
            estimate_mass + at, left, clusters, short_limit, shortlist + pair * short_stride, FEW, SOME, MANY, OWN_BLOCK, LARGE
        )  # fmt: skip
    elif clusters == 0:
        tl.store(candidate_count + pair, 0)
    else:
        count = _list_candidates(
            log_mass + at, left, firsts + pair * candidates_stride, candidates + pair * candidates_stride, clusters,
            candidates_stride, limit, PER_CLUSTER, FEW, SOME, MANY, BLOCK, CANDIDATES, LARGE,
        )  # fmt: skip
        tl.store(candidate_count + pair, count)


def constants(
    heads: int, per_page: int, per_cluster: int, clusters: int, limit: int, short: bool = False
) -> dict[str, Any]:
    """The kernel's constants, by argument name; clusters: most of a request; short: a shortlist is made."""
    own = own_constants(per_page, clusters)
    own_block = own.pop("BLOCK")
    return own | {
        "HEADS": heads,
        "PER_CLUSTER": per_cluster,
        "BLOCK": grids.select_block(own["LARGE"]),
        "CANDIDATES": triton.next_power_of_2(limit),
        "SHORT": short,
        "OWN_BLOCK": own_block,
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
    masses(index, step, w, sinks)
    config = index.config
    clusters = step.pages.shape[1] * index.clusters_per_page
    short = has_shortlist(config, clusters)
    fixed = constants(w.shape.heads, index.clusters_per_page, config.tokens_per_cluster, clusters, limit, short)
    select_kernel[(w.shape.heads, step.batch, 1 + short)](
        step.page_count, w.offset, w.left, w.log_mass, w.estimate_mass, w.position, w.candidates, w.candidate_count,
        w.shortlist, w.shape.clusters, w.shape.candidates, w.shortlist.shape[2], limit,
        config.estimate_clusters + config.budget_tokens, **fixed, num_warps=warps(fixed["LARGE"]),
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("page_count", "candidates"), "*i64"),
    **dict.fromkeys(("offset", "left", "firsts", "candidate_count"), "*i32"),
    **{"log_mass": "*fp32", "estimate_mass": "*fp32", "shortlist": "*i32"},
    **dict.fromkeys(("clusters_stride", "candidates_stride", "short_stride", "limit", "short_limit"), "i32"),
}
_ALIGNED = (
    *(name for name, kind in _TYPES.items() if kind[0] == "*"),
    *("clusters_stride", "candidates_stride", "limit"),
)

COMPILE_CASES = [
    CompileCase(
        f"select C={clusters} K={limit}" + " short" * short, select_kernel, _TYPES,
        constants(8, 2, 8, clusters, limit, short), _ALIGNED,
        num_warps=warps(clusters > HELD[1]), programs_per_sm=2 if clusters <= HELD[1] else 1,
    )
    for clusters, limit, short in ((1024, 2048, False), (4096, 512, True), (4096, 2048, True), (131072, 2048, True))
]  # fmt: skip
