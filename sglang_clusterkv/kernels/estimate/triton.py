"""Estimate on a GPU: the clusters' remaining tokens, through mean values.

Some programs of a (request, kv head) take the clusters that use their own mean value, by rank in equal shares, unpack their
rows in registers and weigh them; the others sum the weights of all other clusters by segment and multiply by the segments'
mean values. Where values move with the query (triton_moving.py) these also add by how much, for all clusters.

Which clusters use their own mean value was listed once for all programs of a (request, kv head): triton_own.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.estimate.triton_moving import add_movement, int4_levels, load_query
from sglang_clusterkv.kernels.estimate.triton_own import in_list, is_limited, masses_of
from sglang_clusterkv.kernels.grids import LEAST_OWN
from sglang_clusterkv.kernels.score.triton import CAP
from sglang_clusterkv.kernels.triton_rows import (
    BF16,
    INT4,
    is_interpreted,
    layer_arrays,
    padded_group,
    row_arguments,
    row_constants,
)
from sglang_clusterkv.kernels.triton_softmax import LOG2_E, LOWEST, add_tile, log2, natural_lse, normalise, raise_peak
from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.codec import CODE_LOSS, RowCodec
from sglang_clusterkv.memory.movement import moves

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.grids import EstimateParts
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

REST_CLUSTERS, REST_SEGMENTS = 256, 16  # per tile of the others
STAGES = 2  # a third one spills registers
# A part that values move in weighs so much of its largest cluster at least, for it may have none of its own to be carried by.
LEAST_PART = tl.constexpr(2.0**-40)
CODED = tl.constexpr(movement.CODED_WEIGHT / movement.OTHER_WEIGHT)


@triton.jit
def left_logits(
    dot, segment_bonus, spread, tokens, segment, c, live, estimate_spread, code_loss, clusters_stride, segments_stride,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
):  # fmt: skip
    """Estimate logits in base 2 [G, N] of clusters c [N] of which `tokens` are left; -inf where not live.

    Where the spread is negative, `dot` is by codes.
    """
    g = tl.arange(0, GROUP_PAD)
    wide = tl.load(spread + c, mask=live, other=0.0).to(tl.float32)
    real = (g < GROUP)[:, None] & live[None, :]
    logits = tl.load(dot + g[:, None] * clusters_stride + c[None, :], mask=real, other=0.0)
    bonus = tl.load(segment_bonus + g[:, None] * segments_stride + segment[None, :], mask=real, other=0.0)
    weight = tl.where(wide < 0, code_loss, estimate_spread)
    bonus = weight[None, :] * tl.minimum(tl.abs(wide)[None, :] * bonus, CAP)
    logits = (logits + bonus) * LOG2_E + log2(tl.maximum(tokens, 1).to(tl.float32))[None, :]
    return tl.where(live[None, :], logits, float("-inf"))


@triton.jit
def mean_values(
    rows, row_scales, row, live, EIGHTH_PAD: tl.constexpr, FORMAT: tl.constexpr, CHANNELS: tl.constexpr,
    PER_SCALE: tl.constexpr,
):  # fmt: skip
    """Stored rows as float32 [N, 8 * EIGHTH_PAD]: eight padded slices of channels; 0 where a row (int64 [N]) is not live."""
    EIGHTH: tl.constexpr = CHANNELS // 8
    j, i = tl.arange(0, 8), tl.arange(0, EIGHTH_PAD)
    channel = j[None, :, None] * EIGHTH + i[None, None, :]
    mask = live[:, None, None] & (i < EIGHTH)[None, None, :]
    if FORMAT == INT4:
        values = int4_levels(rows, row, live, EIGHTH_PAD, CHANNELS)
    else:
        values = tl.load(rows + row[:, None, None] * CHANNELS + channel, mask=mask, other=0).to(tl.float32)
    if FORMAT != BF16:
        scales = row_scales + row[:, None] * (CHANNELS // PER_SCALE) + (j * EIGHTH // PER_SCALE)[None, :]
        values *= tl.load(scales, mask=live[:, None], other=0.0).to(tl.float32)[:, :, None]
    return tl.reshape(values, (values.shape[0], 8 * EIGHTH_PAD))


@triton.jit
def store_part(
    output, lse, sums, peak, weight, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr,
    PIECES: tl.constexpr, PIECE_PAD: tl.constexpr,
):  # fmt: skip
    """Store one part: sums [G, PIECES * PIECE_PAD], channels in padded pieces; 0 and -inf where nothing was read."""
    PIECE: tl.constexpr = CHANNELS // PIECES
    g, d = tl.arange(0, GROUP_PAD), tl.arange(0, PIECES * PIECE_PAD)
    at = output + g[:, None] * CHANNELS + ((d // PIECE_PAD) * PIECE + d % PIECE_PAD)[None, :]
    tl.store(at, normalise(sums, weight), mask=(g < GROUP)[:, None] & (d % PIECE_PAD < PIECE)[None, :])
    tl.store(lse + g, natural_lse(peak, weight), mask=g < GROUP)


@triton.jit
def own_part(
    rows, row_scales, pages, segment_of_page, own, dot, segment_bonus, spread, left, output, lse, h, begin, end,
    estimate_spread, code_loss, clusters_stride, segments_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr,
    FORMAT: tl.constexpr, PER_SCALE: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr,
    LIMITED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention to the clusters of rank [begin, end), each at its own mean value. Not LIMITED: the rank is the cluster."""
    sums = tl.zeros((GROUP_PAD, 8 * EIGHTH_PAD), tl.float32)
    peak = tl.full((GROUP_PAD,), LOWEST, tl.float32)
    weight = tl.zeros((GROUP_PAD,), tl.float32)
    for first in range(begin, end, BLOCK):
        c = first + tl.arange(0, BLOCK)
        live = c < end
        if LIMITED:
            c = tl.load(own + c, mask=live, other=0)
        page_at = c // PER_PAGE
        segment = tl.load(segment_of_page + page_at, mask=live, other=0)
        tokens = tl.load(left + c, mask=live, other=0)
        live &= tokens > 0  # an empty cluster's row is anything
        logits = left_logits(
            dot, segment_bonus, spread, tokens, segment, c, live, estimate_spread, code_loss, clusters_stride, segments_stride,
            GROUP, GROUP_PAD,
        )  # fmt: skip
        row = (tl.load(pages + page_at, mask=live, other=0) * PER_PAGE + c % PER_PAGE) * HEADS + h
        values = mean_values(rows, row_scales, row, live, EIGHTH_PAD, FORMAT, CHANNELS, PER_SCALE)
        sums, peak, weight = add_tile(sums, peak, weight, logits, values, DOT)
    store_part(output, lse, sums, peak, weight, GROUP, GROUP_PAD, CHANNELS, 8, EIGHTH_PAD)


@triton.jit
def rest_part(
    q, factors, vectors, pages, segment_of_page, segment_begin, mass, dot, segment_bonus, spread, left, output, lse, h, begin,
    end, clustered, low, high, last, moving, estimate_spread, code_loss, clusters_stride, segments_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr,
    QUARTER_PAD: tl.constexpr, PER_SCALE: tl.constexpr, PER_PAGE: tl.constexpr, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr,
    MOVES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention to the clusters [begin, end) that do not use their own mean value, each at its segment's; if MOVES, also what
    all of them move by.

    A tile's weights are summed by segment, SEGMENTS at a time. Channels are in four padded quarters, as the vectors lie, or in
    eight padded slices, as movement does. clustered: pages of the request. moving: of a query, what it moves values by.
    """
    QUARTER: tl.constexpr = CHANNELS // 4
    PIECES: tl.constexpr = 8 if MOVES else 4
    PIECE: tl.constexpr = CHANNELS // PIECES
    PIECE_PAD: tl.constexpr = EIGHTH_PAD if MOVES else QUARTER_PAD
    s, piece, i = tl.arange(0, SEGMENTS), tl.arange(0, PIECES), tl.arange(0, PIECE_PAD)
    sums = tl.zeros((GROUP_PAD, PIECES * PIECE_PAD), tl.float32)
    peak = tl.full((GROUP_PAD,), LOWEST, tl.float32)
    weight = tl.zeros((GROUP_PAD,), tl.float32)
    if MOVES:
        query = load_query(q, moving, GROUP, GROUP_PAD, CHANNELS, EIGHTH_PAD, DOT)
        final = tl.load(segment_of_page + clustered - 1).to(tl.int32)
    for first in range(begin, end, BLOCK):
        c = first + tl.arange(0, BLOCK)
        listed = c < end
        bits = masses_of(mass, left, c, listed, listed)
        tokens = tl.load(left + c, mask=listed, other=0)
        others = (tokens > 0) & ~in_list(bits, c, low, high, last)
        live = (tokens > 0) if MOVES else others
        segment = tl.load(segment_of_page + c // PER_PAGE, mask=listed, other=0).to(tl.int32)
        logits = left_logits(
            dot, segment_bonus, spread, tokens, segment, c, live, estimate_spread, code_loss, clusters_stride, segments_stride,
            GROUP, GROUP_PAD,
        )  # fmt: skip
        peak, keep, part = raise_peak(peak, logits)
        sums *= keep[:, None]
        last_segment = tl.max(segment, 0)
        begin_segment = tl.load(segment_of_page + first // PER_PAGE).to(tl.int32)
        if MOVES:
            wide = tl.load(spread + c, mask=live, other=0.0).to(tl.float32)
            wide = part * tl.where(wide < 0, -CODED * wide, wide)[None, :]
            sums = add_movement(
                sums, wide, query, segment, begin_segment, last_segment, final, clustered, factors, vectors, pages,
                segment_begin, h, HEADS, CHANNELS, EIGHTH_PAD, PER_SCALE, DOT,
            )  # fmt: skip
            part = tl.where(others[None, :], part, 0.0)
        weight = weight * keep + tl.sum(part, 1)
        for first_segment in range(begin_segment, last_segment + 1, SEGMENTS):
            of_segment = (segment[:, None] - first_segment == s[None, :]).to(DOT)
            by_segment = tl.dot(part.to(DOT), of_segment, input_precision="ieee")  # [G, SEGMENTS]
            there = first_segment + s <= last_segment
            at = tl.load(segment_begin + first_segment + s, mask=there, other=0)
            page = tl.load(pages + at[:, None] + (piece * 4 // PIECES)[None, :], mask=there[:, None], other=0)
            at = vectors + ((page * HEADS + h) * 3 + 1)[:, :, None] * QUARTER + i[None, None, :]
            if MOVES:
                at += (piece % 2 * PIECE)[None, :, None]
            values = tl.load(at, mask=there[:, None, None] & (i < PIECE)[None, None, :], other=0.0)
            values = tl.reshape(values, (SEGMENTS, PIECES * PIECE_PAD))
            sums = tl.dot(by_segment.to(DOT), values.to(DOT), sums, input_precision="ieee")
    if MOVES:
        weight = tl.where(peak > LOWEST, tl.maximum(weight, LEAST_PART), 0.0)
    store_part(output, lse, sums, peak, weight, GROUP, GROUP_PAD, CHANNELS, PIECES, PIECE_PAD)


@triton.jit
def estimate_program(
    pair, part,
    q, factors, rows, row_scales, vectors, pages, segment_of_page, segment_begin, page_count, offset, dot, segment_bonus,
    spread, left, mass, own, edge, output, lse, own_parts, rest_parts, capacity, limit, moving, estimate_spread, code_loss,
    q_stride, pages_stride, segment_begin_stride, clusters_stride, segments_stride, own_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr,
    QUARTER_PAD: tl.constexpr, FORMAT: tl.constexpr, PER_SCALE: tl.constexpr,
    PER_PAGE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_REST: tl.constexpr, SEGMENTS: tl.constexpr,
    LIMITED: tl.constexpr, MOVES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What one program does: the part-th part of the pair-th (request, kv head); pair is int64.

    Without LIMITED no request has more clusters than `limit`. MOVES: values move with the query; q, factors and q_stride are
    for this alone. Output [B, H, E, G, D], lse [B, H, E, G]; E is `capacity`.
    """
    b, h = pair // HEADS, pair % HEADS
    pages_of = tl.load(page_count + b).to(tl.int32)
    clusters = pages_of * PER_PAGE
    pages += b * pages_stride
    segment_of_page += b * pages_stride
    at = h * clusters_stride + tl.load(offset + b)
    dot += at + h * (GROUP - 1) * clusters_stride
    segment_bonus += pair * GROUP * segments_stride
    spread += at
    left += at
    output += (pair * capacity + part) * GROUP * CHANNELS
    lse += (pair * capacity + part) * GROUP
    if part < own_parts:
        count = tl.minimum(clusters, limit)
        share = tl.cdiv(count, own_parts)
        begin, end = part * share, tl.minimum((part + 1) * share, count)
        own_part(
            rows, row_scales, pages, segment_of_page, own + pair * own_stride, dot, segment_bonus, spread, left, output, lse, h,
            begin, end, estimate_spread, code_loss, clusters_stride, segments_stride, HEADS, GROUP, GROUP_PAD, CHANNELS,
            EIGHTH_PAD, FORMAT, PER_SCALE, PER_PAGE, BLOCK_OWN, LIMITED, DOT,
        )  # fmt: skip
    elif LIMITED or MOVES:
        share = tl.cdiv(tl.cdiv(clusters, BLOCK_REST), rest_parts) * BLOCK_REST
        begin = (part - own_parts) * share
        if LIMITED:
            low, high, last = tl.load(edge + pair * 3), tl.load(edge + pair * 3 + 1), tl.load(edge + pair * 3 + 2)
        else:
            low, high, last = -1, -1, 0  # all are in the list
        if MOVES:
            q += b * q_stride + h * (GROUP * CHANNELS)
        rest_part(
            q, factors, vectors, pages, segment_of_page, segment_begin + b * segment_begin_stride, mass + at, dot,
            segment_bonus, spread, left, output, lse, h, begin, tl.minimum(begin + share, clusters), pages_of, low, high, last,
            moving, estimate_spread, code_loss, clusters_stride, segments_stride, HEADS, GROUP, GROUP_PAD, CHANNELS, EIGHTH_PAD,
            QUARTER_PAD, PER_SCALE, PER_PAGE, BLOCK_REST, SEGMENTS, MOVES, DOT,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["own_parts", "rest_parts", "capacity", "q_stride", "pages_stride", "segment_begin_stride"]
)
def estimate_kernel(
    q, factors, rows, row_scales, vectors, pages, segment_of_page, segment_begin, page_count, offset, dot, segment_bonus,
    spread, left, mass, own, edge, output, lse, own_parts, rest_parts, capacity, limit, moving, estimate_spread, code_loss,
    q_stride, pages_stride, segment_begin_stride, clusters_stride, segments_stride, own_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr,
    QUARTER_PAD: tl.constexpr, FORMAT: tl.constexpr, PER_SCALE: tl.constexpr,
    PER_PAGE: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_REST: tl.constexpr, SEGMENTS: tl.constexpr,
    LIMITED: tl.constexpr, MOVES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, own_parts + rest_parts): `estimate_program`."""
    estimate_program(
        tl.program_id(0).to(tl.int64), tl.program_id(1),
        q, factors, rows, row_scales, vectors, pages, segment_of_page, segment_begin, page_count, offset, dot, segment_bonus,
        spread, left, mass, own, edge, output, lse, own_parts, rest_parts, capacity, limit, moving, estimate_spread, code_loss,
        q_stride, pages_stride, segment_begin_stride, clusters_stride, segments_stride, own_stride,
        HEADS, GROUP, GROUP_PAD, CHANNELS, EIGHTH_PAD, QUARTER_PAD, FORMAT, PER_SCALE, PER_PAGE, BLOCK_OWN, BLOCK_REST,
        SEGMENTS, LIMITED, MOVES, DOT,
    )  # fmt: skip


def listed_clusters(index: ClusterIndex, step: SparseStep) -> int:
    """Clusters of the longest request, from the shape of its list."""
    return step.pages.shape[1] * index.clusters_per_page


def own_clusters(codec: RowCodec) -> int:
    """Clusters per tile of own mean values: enough for each thread of four warps to load 16 bytes of a row."""
    return max(32, min(LEAST_OWN, 16 * 32 * 4 // triton.next_power_of_2(codec.packed_bytes)))


def estimate_constants(
    codec: RowCodec, per_page: int, limit: int, heads: int, group: int, clusters: int, dtype: torch.dtype, moving: bool
) -> dict[str, Any]:
    """The kernel's constants, by argument name, for `clusters` listed clusters of which `limit` use their own value; moving:
    all of them move with the query."""
    channels = codec.head_dim
    return {
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": padded_group(group, 8),
        "EIGHTH_PAD": triton.next_power_of_2(channels // 8),
        "QUARTER_PAD": triton.next_power_of_2(channels // 4),
        "PER_PAGE": per_page,
        "BLOCK_OWN": own_clusters(codec),
        "BLOCK_REST": REST_CLUSTERS // 2 if moving and channels > 128 else REST_CLUSTERS,  # with as many it would spill
        "SEGMENTS": REST_SEGMENTS,
        "LIMITED": is_limited(clusters, limit),
        "MOVES": moving,
        # Not float16: a mean value's scale times a weight can be too small for it.
        "DOT": tl.float32 if is_interpreted() or dtype is torch.float32 else tl.bfloat16,
        **row_constants(codec),
    }


def estimate(
    q: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    w: Workspace,
    parts: EstimateParts,
) -> None:
    """Estimate what was not recalled: `rest_output` and `rest_lse` of the workspace, the first own + rest parts.

    Args:
        q: [B, H, G, D], those of a request side by side; of float32 also products are made in float32.
        index: the cluster index.
        layer: counted from this rank's first.
        step: the lists of this step.
        scale: of the logits.
        w: holds `dot`, `segment_bonus`, `spread`, `estimate_mass`, `left`, and `own` with its edge.
        parts: programs of a (request, kv head).
    """
    arrays, shape, config = layer_arrays(index, layer), w.shape, index.config
    constants = estimate_constants(
        index.row_codec,
        index.clusters_per_page,
        config.estimate_clusters,
        shape.heads,
        shape.group,
        listed_clusters(index, step),
        q.dtype,
        moves(config),
    )
    estimate_kernel[(step.batch * shape.heads, parts.own + parts.rest)](
        *((q, arrays.factors) if moves(config) else (None, None)), arrays.value_rows, arrays.value_scales, arrays.vectors,
        step.pages, step.segment_of_page, step.segment_begin, step.page_count, w.offset, w.dot, w.segment_bonus, w.spread,
        w.left, w.estimate_mass, w.own, w.own_edge, w.rest_output, w.rest_lse, parts.own, parts.rest, parts.own + parts.rest,
        config.estimate_clusters, scale * movement.weight(config), config.estimate_spread, CODE_LOSS[config.code_bits],
        q.stride(0), step.pages.stride(0), step.segment_begin.stride(0), shape.clusters, shape.segments, w.own.shape[2],
        **constants, num_stages=STAGES,
    )  # fmt: skip


_TYPES = {
    **{"q": "*bf16", "factors": "*i32", "vectors": "*bf16", "spread": "*bf16"},
    **dict.fromkeys(("pages", "segment_of_page", "segment_begin", "page_count"), "*i64"),
    **dict.fromkeys(("dot", "segment_bonus", "mass", "output", "lse"), "*fp32"),
    **dict.fromkeys(("left", "own", "edge", "offset"), "*i32"),
    **dict.fromkeys(("own_parts", "rest_parts", "capacity", "limit"), "i32"),
    **dict.fromkeys(("moving", "estimate_spread", "code_loss"), "fp32"),
    **dict.fromkeys(
        ("q_stride", "pages_stride", "segment_begin_stride", "clusters_stride", "segments_stride", "own_stride"), "i32"
    ),
}


def moving_arguments(moving: bool) -> dict[str, None]:
    """Which arguments of a kernel are None in its compile cases, for values that move or do not."""
    return {} if moving else {"q": None, "factors": None}


def _case(codec: RowCodec, clusters: int, group: int = 4, moving: bool = False, **holds: Any) -> CompileCase:
    """A case of 2 clusters per page and 512 of their own mean value."""
    row_types, no_scales = row_arguments(codec)
    absent = no_scales | moving_arguments(moving)
    types = {name: kind for name, kind in (_TYPES | row_types).items() if name not in absent}
    constants = estimate_constants(codec, 2, 512, 8, group, clusters, torch.bfloat16, moving) | {"DOT": tl.bfloat16}
    return CompileCase(
        f"estimate {codec.name} D={codec.head_dim} G={group} C={clusters:,}" + " moving" * moving,
        estimate_kernel,
        types,
        constants | absent,
        tuple(name for name, kind in types.items() if kind[0] == "*" or name == "clusters_stride"),
        num_stages=STAGES,
        **holds,
    )


# loads_128: those of a tile's packed rows, twice for they are pipelined, and of segments' mean values where those are so wide.
COMPILE_CASES = [
    _case(RowCodec("int4", 128), 512, loads_128=2, tensor_cores=8, programs_per_sm=3),
    _case(RowCodec("int4", 64), 4096, loads_128=4, tensor_cores=8, programs_per_sm=2),
    _case(RowCodec("int4", 96), 4096, loads_128=6, tensor_cores=8, programs_per_sm=3),
    _case(RowCodec("int4", 128), 4096, loads_128=6, tensor_cores=16, programs_per_sm=3),
    _case(RowCodec("int4", 256), 4096, loads_128=12, tensor_cores=16, programs_per_sm=2),
    _case(RowCodec("int8", 128), 4096, group=8, loads_128=8, tensor_cores=16, programs_per_sm=2),
    _case(RowCodec("bf16", 128), 4096, loads_128=12, tensor_cores=16, programs_per_sm=2),
    *(
        _case(RowCodec(name, channels), clusters, group, moving=True, tensor_cores=8, programs_per_sm=2)
        for name, channels, clusters, group in (
            ("int4", 96, 4096, 4),
            ("int4", 128, 4096, 4),
            ("bf16", 128, 4096, 4),
        )
    ),
]
