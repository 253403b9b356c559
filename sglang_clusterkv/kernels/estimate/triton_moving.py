"""How the estimate's values move with the query, on a GPU (docs/design.md "Exactly": movement).

The programs that read all clusters of a (request, kv head) add it, segment by segment as their tiles pass: of two segments at
a time the rows that meet the query, weighted by their clusters' weights and spreads, and the rows that these add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES

RANK = tl.constexpr(movement.RANK)
TOGETHER = tl.constexpr(2)  # segments: those that a tile of 256 clusters touches, with 8 tokens to a cluster
_FIRST = tl.constexpr(SEGMENT_VECTOR_PAGES)  # page of a segment's first component
_MEETS, _ADDS, _SCALES = tl.constexpr(movement.MEETS), tl.constexpr(movement.ADDS), tl.constexpr(movement.SCALES)


@triton.jit
def int4_levels(rows, row, live, EIGHTH_PAD: tl.constexpr, CHANNELS: tl.constexpr):
    """Levels of int4 rows (int64 [N]), float32 [N, 8, EIGHTH_PAD]: slices of channels; 0 where a row is not live."""
    EIGHTH: tl.constexpr = CHANNELS // 8
    j, i = tl.arange(0, 8), tl.arange(0, EIGHTH_PAD)
    mask = live[:, None] & (i < EIGHTH)[None, :]
    words = tl.load(rows + row[:, None] * EIGHTH + i[None, :], mask=mask, other=0)
    return ((words[:, None, :] << (28 - 4 * j)[None, :, None]) >> 28).to(tl.float32)


@triton.jit
def load_query(
    q, factor, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Queries [G, 8 * EIGHTH_PAD] of a (request, kv head), times `factor`, in eight padded slices of channels."""
    EIGHTH: tl.constexpr = CHANNELS // 8
    g, d = tl.arange(0, GROUP_PAD), tl.arange(0, 8 * EIGHTH_PAD)
    at = q + g[:, None] * CHANNELS + (d // EIGHTH_PAD * EIGHTH + d % EIGHTH_PAD)[None, :]
    query = tl.load(at, mask=(g < GROUP)[:, None] & (d % EIGHTH_PAD < EIGHTH)[None, :], other=0.0)
    return (query.to(tl.float32) * factor).to(DOT)


@triton.jit
def _moving_rows(
    factors, vectors, row, there, WHICH: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr,
    PER_SCALE: tl.constexpr,
):  # fmt: skip
    """Rows float32 [N, 8 * EIGHTH_PAD] of components: row is of the page and kv head, as `memory.movement` packs them."""
    j = tl.arange(0, 8)
    levels = int4_levels(factors, row * 3 + WHICH, there, EIGHTH_PAD, CHANNELS)
    at = (row * 3 + _SCALES)[:, None] * (CHANNELS // 4)
    at += WHICH * (CHANNELS // PER_SCALE) + (j * (CHANNELS // 8) // PER_SCALE)[None, :]
    scales = tl.load(vectors + at, mask=there[:, None], other=0.0).to(tl.float32)
    return tl.reshape(levels * scales[:, :, None], (row.shape[0], 8 * EIGHTH_PAD))


@triton.jit
def add_movement(
    sums, wide, query, segment, first, last, final, clustered, factors, vectors, pages, segment_begin, head,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, EIGHTH_PAD: tl.constexpr, PER_SCALE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`sums` [G, 8 * EIGHTH_PAD] with what the clusters of a tile, of segments `first` to `last`, add by the query.

    Args:
        wide: [G, N], the clusters' weights times their spreads.
        query: as `load_query` gives it.
        segment: int32 [N], of each cluster.
        final: the request's last segment, which ends where its `clustered` pages do.
        factors: the segments' vectors as int32 words.
    """
    r = tl.arange(0, TOGETHER * RANK)
    for s in range(first, last + 1, TOGETHER):
        of = s + r // RANK
        listed = of <= last
        place = tl.load(segment_begin + of, mask=listed, other=0) + _FIRST + r % RANK
        end = tl.load(segment_begin + of + 1, mask=listed & (of < final), other=0)
        there = listed & (place < tl.where(of < final, end, clustered))
        row = tl.load(pages + place, mask=there, other=0) * HEADS + head
        meets = _moving_rows(factors, vectors, row, there, _MEETS, CHANNELS, EIGHTH_PAD, PER_SCALE)
        found = tl.dot(query, tl.trans(meets).to(DOT), input_precision="ieee")  # [G, TOGETHER * RANK]
        of_row = (segment[:, None] == of[None, :]).to(DOT)
        found *= tl.dot(wide.to(DOT), of_row, input_precision="ieee")
        adds = _moving_rows(factors, vectors, row, there, _ADDS, CHANNELS, EIGHTH_PAD, PER_SCALE)
        sums = tl.dot(found.to(DOT), adds.to(DOT), sums, input_precision="ieee")
    return sums
