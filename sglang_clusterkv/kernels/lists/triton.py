"""The lists of a decode step on a GPU: one launch, from one array of the host.

A program has one request and a tile of places, the same in each list: of pages, of always-attended tokens, of segments. It
finds the segment of a place by halving, in the packed borders, and its slot in req_to_token, which no later launch reads.
Requests beyond the batch become padding, so that a captured step of any size finds them in its lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.memory.step import PACKED, first_requests, to_device

if TYPE_CHECKING:
    from sglang_clusterkv.memory.step import PackedRows, SparseStep

TILE = 512
_PACKED = tl.constexpr(PACKED)
_NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def segments_until(borders, segments, halvings, place, BASE: tl.constexpr):
    """How many segments come before `place` [N] or begin there; places are of recallable tokens, or of the BASE's.

    borders: pairs of a segment's begin and of the tokens that earlier ones cover, ascending.
    """
    found = tl.zeros(place.shape, tl.int32)
    for halving in range(halvings):
        more = found + (1 << (halvings - 1 - halving))
        listed = more <= segments
        at = tl.load(borders + 2 * (more - 1) + 1, mask=listed, other=_NEVER)
        if BASE:
            at = tl.load(borders + 2 * (more - 1), mask=listed, other=_NEVER) - at
        found = tl.where(listed & (at <= place), more, found)
    return found


COUNTS = (
    "batch", "clusters", "halvings", "rows_stride", "pages_stride", "segments_stride", "base_stride", "pages_width",
    "segments_width", "base_width",
)  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def lists_kernel(
    packed, req_to_token, pages, page_count, segment_of_page, segment_begin, segment_count, base_slots, base_count,
    dense_count, offset,
    batch, clusters, halvings, rows_stride, pages_stride, segments_stride, base_stride, pages_width, segments_width,
    base_width,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (requests that there is room for, tiles of BLOCK places).

    Args, beside the lists:
        packed: see `PackedRows`.
        clusters: the last offset.
        halvings: of the most segments of a request.
        *_stride: elements between rows. *_width: of a list, places that are written: 0 where there is nothing.
    """
    b, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    real = b < batch
    head = packed + b * _PACKED
    row = tl.load(head, mask=real, other=0).to(tl.int64)
    dense = tl.load(head + 1, mask=real, other=0)
    segments = tl.load(head + 2, mask=real, other=0)
    borders = packed + tl.load(head + 3, mask=real, other=0)
    covered = tl.load(head + 4, mask=real, other=0)
    base = tl.load(head + 5, mask=real, other=0)
    if tile == 0:
        tl.store(page_count + b, (covered // PAGE).to(tl.int64))
        tl.store(segment_count + b, segments.to(tl.int64))
        tl.store(base_count + b, base.to(tl.int64))
        tl.store(dense_count + b, dense.to(tl.int64))
        tl.store(offset + b, tl.load(head + 6, mask=real, other=clusters))
        if b == tl.num_programs(0) - 1:
            tl.store(offset + b + 1, clusters)
    if real:
        slots = req_to_token + row * rows_stride
        j = tile * BLOCK + tl.arange(0, BLOCK)

        listed = j * PAGE < tl.maximum(covered, dense)
        of = tl.maximum(segments_until(borders, segments, halvings, j * PAGE, False) - 1, 0)
        clustered = listed & (segments > 0)
        begin = tl.load(borders + 2 * of, mask=clustered, other=0)
        before = tl.load(borders + 2 * of + 1, mask=clustered, other=0)
        slot = tl.load(slots + begin + (j * PAGE - before), mask=listed, other=0)
        tl.store(pages + b * pages_stride + j, (slot // PAGE).to(tl.int64), mask=j < pages_width)
        tl.store(segment_of_page + b * pages_stride + j, tl.where(clustered, of, 0).to(tl.int64), mask=j < pages_width)

        # An always-attended token follows every segment that begins after as many of them or fewer.
        attended = j < base
        passed = segments_until(borders, segments, halvings, j, True)
        inside = passed < segments
        skipped = tl.where(inside, tl.load(borders + 2 * passed + 1, mask=inside & attended, other=0), covered)
        slot = tl.load(slots + j + skipped, mask=attended, other=0)
        tl.store(base_slots + b * base_stride + j, slot.to(tl.int64), mask=j < base_width)

        before = tl.load(borders + 2 * j + 1, mask=j < segments, other=_NEVER)
        tl.store(segment_begin + b * segments_stride + j, (before // PAGE).to(tl.int64), mask=j < segments_width)


def make(packed: PackedRows, req_to_token: torch.Tensor, page_size: int, lists: SparseStep) -> SparseStep:
    """Write the lists of a batch; what lies beyond its requests' is garbage.

    Args:
        packed: the batch.
        req_to_token: int32 [rows, max_context].
        page_size: tokens per page.
        lists: with room for it; their first requests are this batch, the others become padding.

    Returns:
        The lists of the batch: views of `lists`.
    """
    assert lists.offset is not None
    shape = packed.shape
    tiles = triton.cdiv(max(shape.pages, shape.base, shape.segments), TILE)
    lists_kernel[(lists.batch, tiles)](
        to_device(packed.values, req_to_token.device.type, packed.values.dtype.type), req_to_token, lists.pages,
        lists.page_count, lists.segment_of_page, lists.segment_begin, lists.segment_count, lists.base_slots,
        lists.base_count, lists.dense_count, lists.offset,
        shape.batch, shape.clusters, shape.segments.bit_length(), req_to_token.stride(0), lists.pages.stride(0),
        lists.segment_begin.stride(0), lists.base_slots.stride(0), shape.pages, shape.segments, shape.base,
        PAGE=page_size, BLOCK=TILE,
    )  # fmt: skip
    return first_requests(lists, shape.batch)._replace(lengths=packed.lengths)


_TYPES = {
    **dict.fromkeys(("packed", "req_to_token", "offset"), "*i32"),
    **dict.fromkeys(("pages", "page_count", "segment_of_page", "segment_begin", "segment_count"), "*i64"),
    **dict.fromkeys(("base_slots", "base_count", "dense_count"), "*i64"),
    **dict.fromkeys(COUNTS, "i32"),
}

COMPILE_CASES = [
    CompileCase(
        "lists",
        lists_kernel,
        _TYPES,
        {"PAGE": 16, "BLOCK": TILE},
        tuple(name for name, kind in _TYPES.items() if kind[0] == "*"),
        programs_per_sm=4,
    )
]
