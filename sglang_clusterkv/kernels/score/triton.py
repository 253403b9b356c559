"""Score on a GPU: every cluster row is read once and meets all query heads of its kv head.

One launch. A program has one kv head and one of three tasks: tiles of clusters, a request's tiles of always-attended tokens,
or the rotation of a request's query that refine needs. Tiles leave a log-sum-exp each, which select combines in a fixed order.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.triton_fp8 import POINTERS, as_argument
from sglang_clusterkv.kernels.triton_rows import (
    BF16,
    INT4,
    dot_dtype,
    first_columns,
    int4_slices,
    layer_arrays,
    load_slice,
    load_words,
    padded_group,
    padded_slice,
    register_limit,
    row_arguments,
    row_constants,
    slice_scales,
)
from sglang_clusterkv.kernels.triton_softmax import LN_2, LOG2_E, exp2, log2
from sglang_clusterkv.kernels.triton_tier import (
    OFF,
    ROUNDED,
    SAME,
    find_slots,
    load_rows,
    tier_arguments,
    tier_case,
    tier_constants,
)
from sglang_clusterkv.kernels.workspace import SCORE_CLUSTERS, SCORE_TOKENS, Workspace
from sglang_clusterkv.memory.codec import RowCodec
from sglang_clusterkv.memory.masses import SPREAD_CAP
from sglang_clusterkv.memory.rotation import rotation_matrix
from sglang_clusterkv.memory.tier import BASE_HOST

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer

_BASE_HOST = tl.constexpr(BASE_HOST)
CAP = tl.constexpr(SPREAD_CAP)


@triton.jit
def log_sum_exp(x, AXIS: tl.constexpr):
    """Over an axis of a matrix, -inf where all is -inf."""
    peak = tl.max(x, AXIS)
    finite = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(exp2((x - tl.expand_dims(finite, AXIS)) * LOG2_E), AXIS)
    return tl.where(total > 0, finite + log2(tl.maximum(total, 1e-37)) * LN_2, float("-inf"))


@triton.jit
def _score_clusters(
    q, rows, row_scales, spread, cluster_end, vectors, pages, segment_of_page, segment_begin,
    segment_bonus, dot, spread_out, choice_lse, estimate_lse, left,
    head, tile, clusters, clusters_stride, lse_stride, segments_stride, scale, choice_spread, estimate_spread,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, GROUP_KEPT: tl.constexpr,
    CHANNELS: tl.constexpr, SLICE_PAD: tl.constexpr, CHANNELS_PAD: tl.constexpr, FORMAT: tl.constexpr,
    PER_SCALE: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of clusters. Pointers are at this request's and kv head's first element (the index's at its own first)."""
    EIGHTH: tl.constexpr = CHANNELS // 8
    QUARTER: tl.constexpr = CHANNELS // 4
    first = tile * BLOCK
    c = first + tl.arange(0, BLOCK)
    live = c < clusters
    page = tl.load(pages + c // PER_PAGE, mask=live, other=0)
    row = (page * PER_PAGE + c % PER_PAGE) * HEADS + head  # [BLOCK], int64
    g = tl.arange(0, GROUP_PAD)
    real_head = g < GROUP

    # Rows first: they are what takes long to come.
    i = tl.arange(0, SLICE_PAD)
    mask = live[:, None] & (i < EIGHTH)[None, :]
    packed = load_words(rows, row[:, None], i[None, :], mask, FORMAT, CHANNELS)  # [BLOCK, SLICE_PAD]
    wide = tl.load(spread + row, mask=live, other=0.0)

    # Sizes: a cluster begins where its predecessor in the segment ends.
    segment = tl.load(segment_of_page + c // PER_PAGE, mask=live, other=-1)
    has_previous = live & (c > 0)
    previous = tl.maximum(c - 1, 0)
    previous_segment = tl.load(segment_of_page + previous // PER_PAGE, mask=has_previous, other=-1)
    previous_page = tl.load(pages + previous // PER_PAGE, mask=has_previous, other=0)
    previous_row = (previous_page * PER_PAGE + previous % PER_PAGE) * HEADS + head
    inside = has_previous & (previous_segment == segment)
    end = tl.load(cluster_end + row, mask=live, other=0).to(tl.int32)
    size = end - tl.load(cluster_end + previous_row, mask=inside, other=0).to(tl.int32)

    # What clusters of a segment share, once per segment that the tile touches.
    h = tl.arange(0, GROUP_KEPT)  # query heads, no more of them than there are but for a power of two
    real_query = h < GROUP
    d = tl.arange(0, CHANNELS_PAD)
    inner = d < CHANNELS
    query = tl.load(q + h[:, None] * CHANNELS + d[None, :], mask=real_query[:, None] & inner[None, :], other=0.0)
    query = query.to(tl.float32)
    of_segment = tl.zeros((BLOCK, GROUP_KEPT), tl.float32)
    bonus = tl.zeros((BLOCK, GROUP_KEPT), tl.float32)
    last = tl.minimum(first + BLOCK, clusters) - 1
    s = tl.load(segment_of_page + first // PER_PAGE)
    last_segment = tl.load(segment_of_page + last // PER_PAGE)
    while s <= last_segment:
        begin = tl.load(segment_begin + s)
        quarter_page = tl.load(pages + begin + d // QUARTER, mask=inner, other=0)
        vector = vectors + (quarter_page * HEADS + head) * (3 * QUARTER) + d % QUARTER
        mean = tl.load(vector, mask=inner, other=0.0).to(tl.float32)
        variance = tl.load(vector + 2 * QUARTER, mask=inner, other=0.0).to(tl.float32)
        q_mean = tl.sum(query * mean[None, :], 1)
        unit_bonus = 0.5 * scale * scale * tl.sum(query * query * variance[None, :], 1)
        here = (segment == s)[:, None]
        of_segment = tl.where(here, q_mean[None, :], of_segment)
        bonus = tl.where(here, unit_bonus[None, :], bonus)
        starts_here = begin * PER_PAGE >= first
        tl.store(segment_bonus + h * segments_stride + s, unit_bonus, mask=real_query & starts_here)
        s += 1

    # The dots with the rows as stored, relative to the segments' means. Clusters are the long side of the products.
    SLICES_PER_SCALE: tl.constexpr = PER_SCALE // EIGHTH
    q_mask = (i < EIGHTH)[:, None] & real_head[None, :]
    dots = tl.zeros((BLOCK, GROUP_PAD), tl.float32)
    part = tl.zeros((BLOCK, GROUP_PAD), tl.float32)
    if FORMAT == INT4:
        slices = int4_slices(packed, DOT)
    for j in tl.static_range(8):
        if FORMAT == INT4:
            levels = slices[j]
        else:
            levels = load_slice(rows, row[:, None], i[None, :], mask, j, FORMAT, CHANNELS, DOT)
        q_slice = tl.load(q + g[None, :] * CHANNELS + j * EIGHTH + i[:, None], mask=q_mask, other=0.0).to(DOT)
        part = tl.dot(levels, q_slice, part, input_precision="ieee")
        if FORMAT != BF16 and (j + 1) % SLICES_PER_SCALE == 0:
            dots += part * slice_scales(row_scales, row, live, j, CHANNELS, PER_SCALE)[:, None]
            part = tl.zeros((BLOCK, GROUP_PAD), tl.float32)
    dots += part

    logit = (first_columns(dots, BLOCK, GROUP_PAD, GROUP_KEPT) + of_segment) * scale
    filled = live & (size > 0)
    log_size = tl.where(filled, log2(tl.maximum(size, 1).to(tl.float32)) * LN_2, float("-inf"))
    bonus = bonus * wide.to(tl.float32)[:, None]
    counted = log_size[:, None] + logit
    tl.store(choice_lse + h * lse_stride, log_sum_exp(counted + choice_spread * bonus, 0), mask=real_query)
    estimate = counted + estimate_spread * tl.minimum(bonus, CAP)
    tl.store(estimate_lse + h * lse_stride, log_sum_exp(estimate, 0), mask=real_query)
    tl.store(dot + h[None, :] * clusters_stride + c[:, None], logit, mask=live[:, None] & real_query[None, :])
    tl.store(spread_out + c, wide, mask=live)
    tl.store(left + c, size, mask=live)


@triton.jit
def _score_tokens(
    q, keys, device_page, host, host_scales, reads, slots, base_logit, base_lse,
    head, tile, tokens, base_stride, lse_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr,
    CHANNELS_PAD: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of always-attended tokens: their exact logits. Of a host tier's, what is read from the host is counted here."""
    g = tl.arange(0, GROUP_PAD)
    w = tile * BLOCK + tl.arange(0, BLOCK)
    real_head, live = g < GROUP, w < tokens
    slot = tl.load(slots + w, mask=live, other=0)
    at, line, away = find_slots(device_page, slot, live, HEADS, PAGE, TIER)
    if TIER:
        tl.atomic_add(reads + _BASE_HOST, tl.sum((live & away).to(tl.int32)).to(tl.int64))
    # Tiles [STEP, BLOCK] of keys; of rounded ones 64 channels at a time, for registers hold rows of both tiers.
    STEP: tl.constexpr = 64 if TIER == ROUNDED and CHANNELS_PAD > 128 else CHANNELS_PAD
    dots = tl.zeros((GROUP_PAD, BLOCK), tl.float32)
    for first in tl.static_range(0, CHANNELS_PAD, STEP):
        d = first + tl.arange(0, STEP)
        mask = real_head[:, None] & (d < CHANNELS)[None, :]
        query = tl.load(q + g[:, None] * CHANNELS + d[None, :], mask=mask, other=0.0)
        key = load_rows(
            keys, host, host_scales, at[None, :], line[None, :], away[None, :], live[None, :], head, d[:, None], 0, HEADS,
            CHANNELS, PAGE, TIER, DOT,
        )  # fmt: skip
        dots = tl.dot(query.to(DOT), key, dots, input_precision="ieee")
    logit = scale * dots
    tl.store(base_logit + g[:, None] * base_stride + w[None, :], logit, mask=real_head[:, None] & live[None, :])
    lse = log_sum_exp(tl.where(live[None, :], logit, float("-inf")), 1)
    tl.store(base_lse + g * lse_stride, lse, mask=real_head)


@triton.jit
def _rotate(
    q, signs, rotated, norm,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, CHANNELS_PAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """R q, from R's signs: exact products, and one factor afterwards."""
    BLOCK: tl.constexpr = 32
    g = tl.arange(0, GROUP_PAD)
    out = tl.arange(0, CHANNELS_PAD)
    real_head = g < GROUP
    result = tl.zeros((GROUP_PAD, CHANNELS_PAD), tl.float32)
    for first in range(0, CHANNELS, BLOCK):
        d = first + tl.arange(0, BLOCK)
        inner = d < CHANNELS
        query = tl.load(q + g[:, None] * CHANNELS + d[None, :], mask=real_head[:, None] & inner[None, :], other=0.0)
        # Row `out` of R at columns d, as [BLOCK, CHANNELS_PAD].
        matrix = tl.load(
            signs + out[None, :] * CHANNELS + d[:, None],
            mask=(out < CHANNELS)[None, :] & inner[:, None],
            other=0.0,
        )
        result = tl.dot(query.to(DOT), matrix.to(DOT), result, input_precision="ieee")
    mask = real_head[:, None] & (out < CHANNELS)[None, :]
    tl.store(rotated + g[:, None] * CHANNELS + out[None, :], result * norm, mask=mask)


@triton.jit
def request_of(offset, cluster, batch):
    """The request that `cluster` of the workspace belongs to; offset [batch + 1] ascends, and ends beyond `cluster`."""
    BLOCK: tl.constexpr = 128
    request = 0
    for first in range(0, batch, BLOCK):
        b = first + tl.arange(0, BLOCK)
        ends = tl.load(offset + 1 + b, mask=b < batch, other=0x7FFFFFFF)
        request += tl.sum((ends <= cluster).to(tl.int32), 0)
    return request


# What differs from step to step must not make a variant of the kernel: it would be compiled while serving.
CHANGING = (
    "pages_stride",
    "segment_begin_stride",
    "base_slots_stride",
    "base_lse_stride",
    "lse_stride",
    "batch",
    "base_programs",
    "cluster_programs",
)


@triton.jit(do_not_specialize=CHANGING)
def score_kernel(
    q, keys, device_page, host, host_scales, reads, rows, row_scales, spread, cluster_end, vectors, signs,
    pages, segment_of_page, segment_begin, page_count, base_slots, base_count, offset,
    rotated, segment_bonus, dot, spread_out, base_logit, base_lse, choice_lse, estimate_lse, left,
    q_stride, pages_stride, segment_begin_stride, base_slots_stride,
    clusters_stride, segments_stride, base_stride, base_lse_stride, lse_stride, batch, base_programs, cluster_programs,
    scale, choice_spread, estimate_spread, norm,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, GROUP_KEPT: tl.constexpr,
    CHANNELS: tl.constexpr, SLICE_PAD: tl.constexpr, CHANNELS_PAD: tl.constexpr, FORMAT: tl.constexpr,
    PER_SCALE: tl.constexpr, PER_PAGE: tl.constexpr, CLUSTERS: tl.constexpr, TOKENS: tl.constexpr,
    ROTATE: tl.constexpr, PAGE: tl.constexpr,
    TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (kv heads, ROTATE + base_programs + cluster_programs, requests): kv heads first, for their rows of one cluster
    share cache lines.

    Each request has a program that rotates its query, where `ROTATE`, and `base_programs` that share its tiles of tokens.
    All other programs of a head share the tiles of all requests' clusters, which `offset` lists: so their number needs to
    follow neither a request's length nor how long one may be. Tiles beyond a request's counts are left unwritten.

    Args, beside the arrays of the index, the step and the workspace:
        q: [B, H, G, D], contiguous but for its first dimension.
        *_stride: elements between rows. The kernel is not specialised on those that change from prompt to prompt.
        signs: bf16 [D, D], the rotation without its factor `norm`.
        CLUSTERS, TOKENS: of one tile.
    """
    head = tl.program_id(0)
    part = tl.program_id(1) - ROTATE
    if part < base_programs:
        request = tl.program_id(2).to(tl.int64)
        pair = request * HEADS + head
        queries = pair * GROUP
        if tl.load(page_count + request) > 0:
            if ROTATE and part < 0:
                _rotate(
                    q + request * q_stride + head * (GROUP * CHANNELS), signs, rotated + queries * CHANNELS, norm, GROUP,
                    GROUP_PAD, CHANNELS, CHANNELS_PAD, DOT,
                )  # fmt: skip
            if part >= 0:
                tokens = tl.load(base_count + request).to(tl.int32)
                for tile in range(part, tl.cdiv(tokens, TOKENS), base_programs):
                    _score_tokens(
                        q + request * q_stride + head * (GROUP * CHANNELS), keys, device_page, host, host_scales, reads,
                        base_slots + request * base_slots_stride, base_logit + queries * base_stride,
                        base_lse + queries * base_lse_stride + tile, head, tile, tokens, base_stride, base_lse_stride, scale,
                        HEADS, GROUP, GROUP_PAD, CHANNELS, CHANNELS_PAD, TOKENS, PAGE, TIER, DOT,
                    )  # fmt: skip
    else:
        tiles = tl.load(offset + batch) // CLUSTERS
        at = (part - base_programs) * batch + tl.program_id(2)
        row = request_of(offset, at * CLUSTERS, batch)
        while at < tiles:
            while tl.load(offset + row + 1) <= at * CLUSTERS:
                row += 1
            first_tile = tl.load(offset + row) // CLUSTERS
            request = row.to(tl.int64)
            queries = (request * HEADS + head) * GROUP
            clusters = tl.load(page_count + request).to(tl.int32) * PER_PAGE
            if (at - first_tile) * CLUSTERS < clusters:
                begin = first_tile.to(tl.int64) * CLUSTERS
                lse_at = head.to(tl.int64) * GROUP * lse_stride + at
                _score_clusters(
                    q + request * q_stride + head * (GROUP * CHANNELS), rows, row_scales, spread, cluster_end, vectors,
                    pages + request * pages_stride,
                    segment_of_page + request * pages_stride, segment_begin + request * segment_begin_stride,
                    segment_bonus + queries * segments_stride,
                    dot + head.to(tl.int64) * GROUP * clusters_stride + begin,
                    spread_out + head.to(tl.int64) * clusters_stride + begin, choice_lse + lse_at, estimate_lse + lse_at,
                    left + head.to(tl.int64) * clusters_stride + begin, head, at - first_tile, clusters, clusters_stride,
                    lse_stride, segments_stride, scale, choice_spread, estimate_spread, HEADS, GROUP, GROUP_PAD, GROUP_KEPT,
                    CHANNELS, SLICE_PAD, CHANNELS_PAD, FORMAT, PER_SCALE, PER_PAGE, CLUSTERS, DOT,
                )  # fmt: skip
            at += cluster_programs * batch


def constants(codec: RowCodec, heads: int, group: int, per_page: int, rotate: bool) -> dict[str, Any]:
    """The kernel's constants but for the dtype of its products, by argument name."""
    return {
        **row_constants(codec),
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": padded_group(group, 8),
        "GROUP_KEPT": triton.next_power_of_2(group),
        "SLICE_PAD": padded_slice(codec.head_dim),
        "CHANNELS_PAD": triton.next_power_of_2(codec.head_dim),
        "PER_PAGE": per_page,
        "CLUSTERS": SCORE_CLUSTERS,
        "TOKENS": SCORE_TOKENS,
        "ROTATE": rotate,
    }


def warps(channels: int) -> int:
    """Of a program: registers hold a tile's packed rows."""
    return 4 if channels <= 128 else 8


def register_limits(codec: RowCodec, group: int) -> dict[int, int]:
    """Registers of a thread: where these are enough, ptxas takes a few more, and three programs would not fit an SM."""
    return {90: 168} if codec.name == "int4" and codec.head_dim <= 128 and group <= 4 else {}


@functools.cache
def rotation_parts(head_dim: int, device: str) -> tuple[torch.Tensor, float]:
    """The rotation as (its signs and zeros, bf16 [D, D], and the factor that all entries share)."""
    block = head_dim & -head_dim
    matrix = rotation_matrix(head_dim) * math.sqrt(block)
    return matrix.round().to(torch.bfloat16).to(device), 1.0 / math.sqrt(block)


def score(
    q: torch.Tensor,
    keys: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    w: Workspace,
    tier: TierLayer | None = None,
) -> None:
    """Score all clusters and always-attended tokens of a step; writes what `Workspace` says score writes.

    Args:
        q: [B, H, G, D], contiguous but for its first dimension, in the dtype that `query_dtype` gives.
        keys: [slots, H, D], the layer's pool, contiguous.
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
        scale: of the logits.
        w: large enough for the step.
        tier: where some slots' keys are on the host.
    """
    arrays, config, shape = layer_arrays(index, layer), index.config, w.shape
    _, heads, group, channels = q.shape
    signs, norm = rotation_parts(channels, str(q.device))
    longest = step.pages.shape[1] * index.clusters_per_page
    programs = grids.score_programs(heads, step.batch, step.base_slots.shape[1], longest)
    score_kernel[(heads, int(config.refine) + sum(programs), step.batch)](
        q, as_argument(keys), *tier_arguments(tier), arrays.key_rows, arrays.key_scales, arrays.spread, arrays.cluster_end,
        arrays.vectors, signs,
        step.pages, step.segment_of_page, step.segment_begin, step.page_count, step.base_slots, step.base_count, w.offset,
        w.rotated, w.segment_bonus, w.dot, w.spread, w.base_logit, w.base_lse, w.choice_lse, w.estimate_lse, w.left,
        q.stride(0), step.pages.stride(0), step.segment_begin.stride(0), step.base_slots.stride(0), shape.clusters,
        shape.segments, shape.base, shape.base_tiles, shape.cluster_tiles, step.batch, *programs, scale, config.choice_spread,
        config.estimate_spread, norm,
        DOT=dot_dtype(q.dtype), **constants(index.row_codec, heads, group, index.clusters_per_page, config.refine),
        **tier_constants(tier), num_warps=warps(channels),
        **register_limit(register_limits(index.row_codec, group)),
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("q", "keys", "spread", "vectors", "signs", "spread_out"), "*bf16"),
    **{"cluster_end": "*i16", "left": "*i32", "offset": "*i32"},
    **dict.fromkeys(("pages", "segment_of_page", "segment_begin", "page_count", "base_slots", "base_count"), "*i64"),
    **dict.fromkeys(
        ("rotated", "segment_bonus", "dot", "base_logit", "base_lse", "choice_lse", "estimate_lse"), "*fp32"
    ),
    **dict.fromkeys(CHANGING, "i32"),
    **dict.fromkeys(("q_stride", "clusters_stride", "segments_stride", "base_stride"), "i32"),
    **dict.fromkeys(("scale", "choice_spread", "estimate_spread", "norm"), "fp32"),
}


def _case(codec: RowCodec, group: int, tier: int = OFF.value, pool: str = "bf16", **holds: Any) -> CompileCase:
    """A case of 2 clusters per page that rotates the query; tier: a value of TIER; pool: as for attend."""
    row_types, no_scales = row_arguments(codec)
    pointer = POINTERS.get(pool, "*bf16")
    tier_types, tier_values = tier_case(tier, pointer)
    types = _TYPES | {"keys": pointer} | row_types | tier_types
    strides = ("q_stride", "clusters_stride", "segments_stride", "base_stride")
    where = {OFF.value: "", SAME.value: " tier", ROUNDED.value: " int8 tier"}[tier]
    return CompileCase(
        f"score {codec.name} D={codec.head_dim} G={group}{where}" + ("" if pool == "bf16" else f" {pool}"),
        score_kernel,
        types,
        constants(codec, 8, group, 2, True) | no_scales | tier_values | {"DOT": tl.bfloat16},
        (*(name for name, kind in types.items() if kind[0] == "*"), *strides),
        tensor_cores=32,
        num_warps=warps(codec.head_dim),
        register_limits=register_limits(codec, group),
        **holds,
    )


# loads_128: those of queries, keys and signs, and of a tile's packed rows; fewer, and rows are loaded piecewise.
COMPILE_CASES = [
    _case(RowCodec("int4", 64), 3, loads_128=16, programs_per_sm=2),
    _case(RowCodec("int4", 96), 4, loads_128=34, programs_per_sm=2),
    _case(RowCodec("int4", 128), 4, loads_128=38, programs_per_sm=2),
    _case(RowCodec("int4", 128), 8, loads_128=38, programs_per_sm=2),
    _case(RowCodec("int4", 256), 4, loads_128=30, programs_per_sm=1),
    _case(RowCodec("int8", 128), 4, loads_128=42, programs_per_sm=2),
    _case(RowCodec("bf16", 128), 4, loads_128=50, programs_per_sm=2),
    *(
        _case(RowCodec("int4", d), g, tier, loads_128=16, programs_per_sm=programs)
        for tier in (SAME.value, ROUNDED.value)
        for d, g, programs in ((64, 3, 2), (128, 4, 2), (256, 4, 1))
    ),
    _case(RowCodec("int4", 128), 4, OFF.value, "e4m3", loads_128=16, programs_per_sm=2),
]
