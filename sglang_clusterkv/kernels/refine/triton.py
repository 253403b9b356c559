"""Refine on a GPU: the candidates' codes meet the rotated queries; the best tokens are recalled.

Two launches: values, by tiles of candidates; then, one program per (request, kv head), the choice among them. Where nothing
is refined, one launch recalls every candidate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.estimate.triton_own import (
    TILE,
    is_limited,
    list_most,
    most_of_shortlist,
    own_constants,
    own_warps,
    store_edge,
)
from sglang_clusterkv.kernels.grids import FEW_CANDIDATES, MANY_CANDIDATES
from sglang_clusterkv.kernels.triton_rows import (
    code_slices,
    first_columns,
    is_interpreted,
    layer_arrays,
    padded_group,
    padded_slice,
    register_limit,
)
from sglang_clusterkv.kernels.triton_softmax import LN_2, LOG2_E, exp2, log2
from sglang_clusterkv.kernels.triton_threshold import bracket, order_of
from sglang_clusterkv.kernels.workspace import Workspace
from sglang_clusterkv.memory.masses import MOST_MASS, NO_MASS

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

LEAST_BLOCK = 64  # candidates
REGISTERS = dict.fromkeys(
    (80, 90, 100), 128
)  # of the choice: with its own idea ptxas takes 48 of few candidates, and spills
LEAST_MASS = tl.constexpr(NO_MASS)
LEAST_SUM = tl.constexpr(1e-37)  # of masses, whose log is taken
MOST = tl.constexpr(MOST_MASS)
MOST_HALF = tl.constexpr(65504.0)  # the largest float16


@triton.jit
def _slot(pages, place, mask, PAGE: tl.constexpr):
    """Slots of places (int32) in the lists of a request, whose pages start at `pages`; int64."""
    return tl.load(pages + place // PAGE, mask=mask, other=0) * PAGE + place % PAGE


@triton.jit
def _position(
    members, pages, segment_of_page, segment_begin, entry, head, mask, HEADS: tl.constexpr, PAGE: tl.constexpr
):
    """Positions, int32, of the tokens that entries (int32) of a request's member lists name."""
    slot = _slot(pages, entry, mask, PAGE)
    segment = tl.load(segment_of_page + entry // PAGE, mask=mask, other=0)
    begin = tl.load(segment_begin + segment, mask=mask, other=0) * PAGE
    return begin.to(tl.int32) + tl.load(members + slot * HEADS + head, mask=mask, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["pages_stride", "segment_begin_stride"])
def value_kernel(
    rotated, codes, code_scales, members, pages, segment_of_page, segment_begin, offset,
    dot, total, candidates, candidate_count, value, position, by_code,
    pages_stride, segment_begin_stride, clusters_stride, candidates_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, GROUP_KEPT: tl.constexpr, CHANNELS: tl.constexpr,
    SLICE_PAD: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, tiles of `BLOCK` candidates, requests): each candidate's value and position; if CODES, its masses.

    codes: [S, H, D / 8], int16 for two bits, uint8 for one. DOT: dtype of the products, float16 or float32.
    """
    EIGHTH: tl.constexpr = CHANNELS // 8
    head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    pair = request * HEADS + head
    count = tl.load(candidate_count + pair)
    first = tl.program_id(1) * BLOCK
    if first < count:
        k = first + tl.arange(0, BLOCK)
        live = k < count
        candidate = tl.load(candidates + pair * candidates_stride + k, mask=live, other=0)
        cluster, entry = (candidate >> 32).to(tl.int32), candidate.to(tl.int32)
        pages += request * pages_stride
        row = _slot(pages, entry, live, PAGE) * HEADS + head

        i = tl.arange(0, SLICE_PAD)
        g, h = tl.arange(0, GROUP_PAD), tl.arange(0, GROUP_KEPT)
        word_mask = live[:, None] & (i < EIGHTH)[None, :]
        words = tl.load(codes + row[:, None] * EIGHTH + i[None, :], mask=word_mask, other=0)
        code_scale = tl.load(code_scales + row, mask=live, other=0.0).to(tl.float32)
        rotated += pair * GROUP * CHANNELS
        query_mask = (i < EIGHTH)[:, None] & (g < GROUP)[None, :]
        slices = code_slices(words, BITS, DOT)
        dots = tl.zeros((BLOCK, GROUP_PAD), tl.float32)
        for j in tl.static_range(8):
            query = tl.load(rotated + g[None, :] * CHANNELS + j * EIGHTH + i[:, None], mask=query_mask, other=0.0)
            if tl.float16 == DOT:
                query = tl.minimum(tl.maximum(query, -MOST_HALF), MOST_HALF)
            dots = tl.dot(slices[j], query.to(DOT), dots, input_precision="ieee")

        real_head = h < GROUP
        mask = live[:, None] & real_head[None, :]
        at = head.to(tl.int64) * GROUP * clusters_stride + tl.load(offset + request)
        of_cluster = tl.load(dot + at + h[None, :] * clusters_stride + cluster[:, None], mask=mask, other=0.0)
        whole = tl.load(total + pair * GROUP + h, mask=real_head, other=0.0)
        logit = of_cluster + (scale * code_scale)[:, None] * first_columns(dots, BLOCK, GROUP_PAD, GROUP_KEPT)
        share = tl.where(real_head[None, :], exp2((logit - whole[None, :]) * LOG2_E), 0.0)
        if CODES:
            at = by_code + (pair * candidates_stride + k)[:, None] * GROUP_KEPT + h[None, :]
            tl.store(at, tl.minimum(share, MOST), mask=live[:, None])
        most = tl.max(share, 1)
        tl.store(value + pair * candidates_stride + k, tl.where(most < LEAST_MASS, 0.0, most), mask=live)
        at = _position(
            members, pages, segment_of_page + request * pages_stride, segment_begin + request * segment_begin_stride,
            entry, head, live, HEADS, PAGE,
        )  # fmt: skip
        tl.store(position + pair * candidates_stride + k, at, mask=live)


@triton.jit
def put_codes(
    by_code, total, dot, spread, candidates, runs, number, clusters_stride,
    GROUP: tl.constexpr, GROUP_KEPT: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """`dot` of clusters with candidates that were not recalled becomes the log of these candidates' mean mass, and `spread`
    becomes negative, by which the estimate knows them.

    Pointers are those of one (request, kv head). Each thread takes a cluster, whose candidates lie together.

    Args, beside the arrays of the workspace:
        by_code: [K, GROUP_KEPT], 0 where a candidate was recalled.
        runs: of `number` clusters and the end, the place of its first candidate | recalled ones before it << 16.
        RUNS: clusters at a time.
    """
    TOGETHER: tl.constexpr = 8 if GROUP_KEPT <= 4 else 4  # candidates of each: all their masses are loaded at once
    h = tl.arange(0, GROUP_KEPT)
    real = h < GROUP
    whole = tl.load(total + h, mask=real, other=0.0)
    for first in range(0, number, RUNS):
        r = first + tl.arange(0, RUNS)
        there = r < number
        begin = tl.load(runs + r, mask=there, other=0).to(tl.uint32, bitcast=True)
        end = tl.load(runs + r + 1, mask=there, other=0).to(tl.uint32, bitcast=True)
        rest = (end & 0xFFFF) - (begin & 0xFFFF) - ((end >> 16) - (begin >> 16))
        at, behind = (begin & 0xFFFF).to(tl.int32), (end & 0xFFFF).to(tl.int32)
        cluster = (tl.load(candidates + at, mask=there, other=0) >> 32).to(tl.int32)
        mass = tl.zeros((RUNS, GROUP_KEPT), tl.float32)
        for ahead in range(0, tl.max(behind - at, 0), TOGETHER):
            for i in tl.static_range(TOGETHER):
                k = at + (ahead + i)
                mass += tl.load(by_code + k[:, None] * GROUP_KEPT + h[None, :], mask=(k < behind)[:, None], other=0.0)
        some = there & (rest > 0)
        number_of = tl.maximum(rest.to(tl.int32), 1).to(tl.float32)
        logit = (log2(tl.maximum(mass, LEAST_SUM)) - log2(number_of)[:, None]) * LN_2 + whole[None, :]
        tl.store(dot + h[None, :] * clusters_stride + cluster[:, None], logit, mask=some[:, None] & real[None, :])
        wide = tl.load(spread + cluster, mask=some, other=0.0).to(tl.float32)
        tl.store(spread + cluster, -tl.abs(wide), mask=some)


@triton.jit(do_not_specialize=["pages_stride"])
def recall_kernel(
    pages, page_count, offset, candidates, candidate_count, value, position, left, recalled, recalled_count, mass, shortlist,
    own, edge, by_code, runs, total, dot, spread, pages_stride, clusters_stride, candidates_stride, recalled_stride,
    short_stride, own_stride, budget, estimate_clusters,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_KEPT: tl.constexpr, PAGE: tl.constexpr, CANDIDATES: tl.constexpr,
    CODES: tl.constexpr, RUNS: tl.constexpr, OWN: tl.constexpr, SHORT: tl.constexpr, PER_PAGE: tl.constexpr,
    FEW: tl.constexpr, SOME: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, requests, 1 or 2): recall the `budget` candidates of the highest value (ties: the lower position).

    CANDIDATES: padded. If CODES, `put_codes` follows, which of two programs the second one does, having chosen for itself; if
    OWN, the clusters of own mean values: if SHORT, of a shortlist of so many at most, else by `list_most`, whose constants the
    others are.
    """
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    pair = request * HEADS + head
    count = tl.load(candidate_count + pair)
    candidates += pair * candidates_stride
    k = tl.arange(0, CANDIDATES)
    live = k < count
    there = k < candidates_stride  # what lies between is nothing, but loaded: what ends anywhere is loaded one by one
    at = tl.load(position + pair * candidates_stride + k, mask=there, other=0)
    best = tl.load(value + pair * candidates_stride + k, mask=there, other=0.0)
    keys = tl.where(live, order_of(best), -1)
    low, high, room, between = bracket(keys, None, budget)
    chosen = live & (keys >= high)
    tied = live & (keys >= low) & (keys < high)
    if between > room:
        low, high, room, _ = bracket(tl.where(tied, 0x7FFFFFFE - at, -1), None, room)
        tied = tied & (0x7FFFFFFE - at >= low)
    chosen = chosen | tied
    cluster = (tl.load(candidates + k, mask=there, other=0) >> 32).to(tl.int32)
    first = head.to(tl.int64) * clusters_stride + tl.load(offset + request) // TILE * TILE
    counted = chosen.to(tl.uint32)
    if CODES:
        before = (tl.load(candidates + k - 1, mask=there & (k > 0), other=-1) >> 32).to(tl.int32)
        begins = live & (cluster != before)
        counted += begins.to(tl.uint32) << 16
    counted = tl.cumsum(counted, 0)
    passed = (counted & 0xFFFF).to(tl.int32)
    if CODES and tl.program_id(2) == tl.num_programs(2) - 1:
        by_code += pair * candidates_stride * GROUP_KEPT
        for g in tl.static_range(GROUP):
            tl.store(by_code + k * GROUP_KEPT + g, tl.zeros((CANDIDATES,), tl.float32), mask=chosen)
        runs += pair * (candidates_stride + 1)
        run = (counted >> 16).to(tl.int32)
        tl.store(runs + run - 1, k | ((passed - chosen.to(tl.int32)) << 16), mask=begins)
        number = tl.max(run, 0)
        tl.store(runs + number, count | (tl.minimum(count, budget) << 16))
        tl.debug_barrier()  # threads read what others wrote
        put_codes(
            by_code, total + pair * GROUP, dot + first + head.to(tl.int64) * (GROUP - 1) * clusters_stride, spread + first,
            candidates, runs, number, clusters_stride, GROUP, GROUP_KEPT, RUNS,
        )  # fmt: skip
    if tl.program_id(2) == 0:
        slot = _slot(pages + request * pages_stride, at, chosen, PAGE)
        tl.store(recalled + pair * recalled_stride + passed - 1, slot, mask=chosen)
        left += first
        tl.atomic_add(left + cluster, -1, mask=chosen, sem="relaxed")
        tl.store(recalled_count + pair, tl.minimum(count, budget))
        if OWN:
            tl.debug_barrier()  # what is left of a cluster is read by other threads than changed it
            clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
            mass += first
            own += pair * own_stride
            if SHORT:
                count = tl.minimum(clusters, estimate_clusters + budget)
                low, high, last = most_of_shortlist(
                    mass, left, shortlist + pair * short_stride, count, estimate_clusters, own, SHORT
                )
            else:
                low, high, last = list_most(mass, left, clusters, estimate_clusters, own, FEW, SOME, MANY, BLOCK, LARGE)
            store_edge(edge + pair * 3, low, high, last)


@triton.jit(do_not_specialize=["pages_stride", "segment_begin_stride"])
def recall_all_kernel(
    members, pages, segment_of_page, segment_begin, offset, candidates, candidate_count, left, recalled, recalled_count,
    pages_stride, segment_begin_stride, clusters_stride, candidates_stride, recalled_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, tiles of `BLOCK` candidates, requests): recall every candidate."""
    head = tl.program_id(0)
    request = tl.program_id(2).to(tl.int64)
    pair = request * HEADS + head
    count = tl.load(candidate_count + pair)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = k < count
    candidate = tl.load(candidates + pair * candidates_stride + k, mask=live, other=0)
    pages += request * pages_stride
    at = _position(
        members, pages, segment_of_page + request * pages_stride, segment_begin + request * segment_begin_stride,
        candidate.to(tl.int32), head, live, HEADS, PAGE,
    )  # fmt: skip
    tl.store(recalled + pair * recalled_stride + k, _slot(pages, at, live, PAGE), mask=live)
    left += head.to(tl.int64) * clusters_stride + tl.load(offset + request)
    tl.atomic_add(left + (candidate >> 32), -1, mask=live, sem="relaxed")
    if tl.program_id(1) == 0:
        tl.store(recalled_count + pair, count)


def has_codes(config: ClusterKVConfig) -> bool:
    """Whether candidates that were not recalled are estimated by their codes."""
    return config.refine and config.estimate and config.estimate_codes


def constants(heads: int, group: int, channels: int, bits: int, dtype: torch.dtype, tile: int) -> dict[str, Any]:
    """Constants of the values' kernel but for the page size and CODES, by argument name; tile: candidates of a program.

    Queries of 16 bits are multiplied in float16 once they are rotated: it has no fewer digits than they had before.
    """
    return {
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": padded_group(group, 8),
        "GROUP_KEPT": triton.next_power_of_2(group),
        "CHANNELS": channels,
        "SLICE_PAD": padded_slice(channels),
        "BITS": bits,
        "BLOCK": tile,
        "DOT": tl.float32 if is_interpreted() or dtype is torch.float32 else tl.float16,
    }


def choice_constants(
    limit: int, own: bool, estimate_clusters: int, budget: int, per_page: int, clusters: int
) -> dict[str, Any]:
    """Constants of the choice but for the shape of the model, and its warps, for up to `clusters` clusters; own: some of them
    use their own mean value."""
    block = max(LEAST_BLOCK, triton.next_power_of_2(limit))
    short = grids.own_shortlist(clusters, estimate_clusters, budget) if own else 0
    held = short or clusters
    warps = max(own_warps(held), min(16, block // 256))
    return {
        "CANDIDATES": block, "RUNS": 32 * warps, "OWN": own, "SHORT": short, **own_constants(per_page, held),
        "num_warps": warps,
    }  # fmt: skip


def refine_values(
    index: ClusterIndex, layer: int, step: SparseStep, scale: float, limit: int, w: Workspace, dtype: torch.dtype
) -> None:
    """Values and positions of all candidates; and their masses, where the estimate has codes.

    Args:
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
        scale: of the logits.
        limit: candidates per (request, kv head) at most, as given to select.
        w: as select left it.
        dtype: of the queries.
    """
    arrays, shape = layer_arrays(index, layer), w.shape
    tile = grids.candidate_tile(step.batch * shape.heads, limit, shape.channels)
    value_kernel[(shape.heads, triton.cdiv(limit, tile), step.batch)](
        w.rotated, arrays.codes, arrays.code_scales, arrays.members, step.pages, step.segment_of_page,
        step.segment_begin, w.offset, w.dot, w.total, w.candidates, w.candidate_count, w.value, w.position, w.by_code,
        step.pages.stride(0), step.segment_begin.stride(0), shape.clusters, shape.candidates, scale,
        PAGE=index.geometry.page_size, CODES=has_codes(index.config),
        **constants(shape.heads, shape.group, shape.channels, index.config.code_bits, dtype, tile),
    )  # fmt: skip


def recall(index: ClusterIndex, step: SparseStep, limit: int, w: Workspace) -> None:
    """Recall the best `budget_tokens` candidates, and list the clusters that the estimate takes at their own mean value.

    Where the estimate has codes, `dot` and `spread` of clusters with other candidates become what these tell.

    Args:
        index: the cluster index.
        step: the lists of this step.
        limit: candidates per (request, kv head) at most, as given to select.
        w: as `refine_values` left it.
    """
    shape, config = w.shape, index.config
    assert config.budget_tokens <= shape.budget, (config.budget_tokens, shape)
    clusters = step.pages.shape[1] * index.clusters_per_page
    own = config.estimate and is_limited(clusters, config.estimate_clusters)
    programs = grids.choice_programs(step.batch * shape.heads, own and has_codes(config))
    recall_kernel[(shape.heads, step.batch, programs)](
        step.pages, step.page_count, w.offset, w.candidates, w.candidate_count, w.value, w.position, w.left, w.recalled,
        w.recalled_count, w.estimate_mass, w.shortlist, w.own, w.own_edge, w.by_code, w.runs, w.total, w.dot, w.spread,
        step.pages.stride(0), shape.clusters, shape.candidates, shape.budget, w.shortlist.shape[2], w.own.shape[2],
        config.budget_tokens, config.estimate_clusters, HEADS=shape.heads, GROUP=shape.group,
        GROUP_KEPT=w.by_code.shape[3], PAGE=index.geometry.page_size, CODES=has_codes(config),
        **choice_constants(
            limit, own, config.estimate_clusters, config.budget_tokens, index.clusters_per_page, clusters
        ),
        **register_limit(REGISTERS),
    )  # fmt: skip


def recall_all(index: ClusterIndex, layer: int, step: SparseStep, limit: int, w: Workspace) -> None:
    """Recall every candidate; `w` as select left it."""
    arrays, shape = layer_arrays(index, layer), w.shape
    assert limit <= shape.budget, (limit, shape)
    recall_all_kernel[(shape.heads, triton.cdiv(limit, FEW_CANDIDATES), step.batch)](
        arrays.members, step.pages, step.segment_of_page, step.segment_begin, w.offset, w.candidates, w.candidate_count, w.left,
        w.recalled, w.recalled_count, step.pages.stride(0), step.segment_begin.stride(0), shape.clusters,
        shape.candidates, shape.budget, HEADS=shape.heads, PAGE=index.geometry.page_size, BLOCK=FEW_CANDIDATES,
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("pages", "page_count", "segment_of_page", "segment_begin", "candidates", "recalled"), "*i64"),
    **dict.fromkeys(("rotated", "dot", "total", "value", "mass", "by_code"), "*fp32"),
    **{"members": "*i16", "code_scales": "*bf16", "spread": "*bf16", "scale": "fp32"},
    **dict.fromkeys(
        ("offset", "candidate_count", "position", "left", "recalled_count", "shortlist", "own", "edge", "runs"), "*i32"
    ),
    **dict.fromkeys(("pages_stride", "segment_begin_stride"), "i32"),
    **dict.fromkeys(("clusters_stride", "candidates_stride", "recalled_stride", "short_stride", "own_stride"), "i32"),
    **dict.fromkeys(("budget", "estimate_clusters"), "i32"),
}
_ALIGNED_SIZES = ("clusters_stride", "candidates_stride", "recalled_stride", "budget")


def _case(name: str, kernel: Any, fixed: dict[str, Any], **holds: Any) -> CompileCase:
    fixed = dict(fixed)
    holds |= {"num_warps": fixed.pop("num_warps")} if "num_warps" in fixed else {}
    types = _TYPES | {"codes": "*u8" if fixed.get("BITS") == 1 else "*i16"}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    aligned = tuple(a for a, kind in signature.items() if kind[0] == "*" or a in _ALIGNED_SIZES)
    return CompileCase(f"refine {name}", kernel, signature, fixed | {"PAGE": 16}, aligned, **holds)


COMPILE_CASES = [
    *(
        _case(
            f"values {bits} bits D={channels} G={group} x{tile}", value_kernel,
            constants(8, group, channels, bits, torch.bfloat16, tile) | {"CODES": True},
            tensor_cores=8, programs_per_sm=4 if tile == FEW_CANDIDATES else 2,
        )
        for bits, channels, group, tile in (
            *((2, channels, group, MANY_CANDIDATES) for channels, group in ((64, 3), (96, 4), (128, 4), (128, 8))),
            (2, 256, 4, MANY_CANDIDATES // 2),
            *((2, channels, 4, FEW_CANDIDATES) for channels in (128, 256)),
            (1, 128, 4, MANY_CANDIDATES),
        )
    ),
    _case(
        "values 2 bits D=128 G=4 float32", value_kernel,
        constants(8, 4, 128, 2, torch.float32, MANY_CANDIDATES) | {"CODES": False},
    ),
    *(
        _case(
            f"recall K={limit} O={own:,} R={budget} C={clusters:,}{name}", recall_kernel,
            {
                "HEADS": 8, "GROUP": group, "GROUP_KEPT": group, "CODES": codes,
                **choice_constants(limit, True, own, budget, 2, clusters),
            },
            register_limits=REGISTERS, programs_per_sm=2 if clusters <= 4096 or own + budget <= 1024 else 1,
        )
        for limit, own, budget, clusters, group, codes, name in (
            (512, 512, 256, 4096, 4, True, ""), (2048, 512, 512, 1024, 4, True, ""), (2048, 512, 512, 131072, 4, True, ""),
            (2048, 1024, 1024, 131072, 4, True, ""), (2048, 4096, 512, 131072, 4, True, ""),
            (2048, 512, 512, 4096, 8, True, " G=8"), (2048, 512, 512, 4096, 4, False, " without codes"),
        )
    ),
    _case("recall all", recall_all_kernel, {"HEADS": 8, "BLOCK": FEW_CANDIDATES}, programs_per_sm=8),
]  # fmt: skip
