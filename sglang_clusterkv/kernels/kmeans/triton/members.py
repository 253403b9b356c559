"""The members of each cluster, listed by counting; what reads them sums in their order."""

from __future__ import annotations

import triton
import triton.language as tl

from sglang_clusterkv.kernels.kmeans.triton.call import Call, case
from sglang_clusterkv.kernels.kmeans.triton.segments import LENGTHS, segment_range

_LISTS = 128  # clusters per program
_SCANNED = 32  # labels per step


@triton.jit(do_not_specialize=LENGTHS)
def list_kernel(
    labels_ptr, token_begin_ptr, cluster_begin_ptr, members_ptr, cluster_end_ptr, tokens_of_call, clusters,
    LISTS: tl.constexpr, SCANNED: tl.constexpr,
):  # fmt: skip
    """Member lists of LISTS clusters, by counting.

    One program reads all labels of the segment's head twice: to count, then to give each token of its clusters its place.
    """
    n, segment = tl.program_id(1), tl.program_id(2)
    token_begin, tokens = segment_range(token_begin_ptr, segment)
    cluster_begin, count = segment_range(cluster_begin_ptr, segment)
    lowest = tl.program_id(0) * LISTS
    if lowest >= count:
        return
    cluster = lowest + tl.arange(0, LISTS)
    step = tl.arange(0, SCANNED)
    row = n.to(tl.int64) * tokens_of_call + token_begin
    sizes = tl.zeros((LISTS,), tl.int32)
    before = tl.zeros((SCANNED,), tl.int32)
    for first in range(0, tokens, SCANNED):
        label = tl.load(labels_ptr + row + first + step, mask=first + step < tokens, other=-1).to(tl.int32)
        before += ((label >= 0) & (label < lowest)).to(tl.int32)
        sizes += tl.sum((label[:, None] == cluster[None, :]).to(tl.int32), 0)
    end = tl.sum(before) + tl.cumsum(sizes, 0)
    tl.store(cluster_end_ptr + n.to(tl.int64) * clusters + cluster_begin + cluster, end, mask=cluster < count)

    begin = end - sizes
    for first in range(0, tokens, SCANNED):
        label = tl.load(labels_ptr + row + first + step, mask=first + step < tokens, other=-1).to(tl.int32)
        own = (label[:, None] == cluster[None, :]).to(tl.int32)
        place = tl.sum(own * (begin[None, :] + tl.cumsum(own, 0) - own), 1)
        tl.store(members_ptr + row + place, (first + step).to(tl.int16), mask=tl.sum(own, 1) > 0)
        begin += tl.sum(own, 0)


def list_members(call: Call) -> None:
    """List the members of all clusters by their labels."""
    segments, found = call.segments, call.found
    list_kernel[call.grid(segments.max_clusters, _LISTS)](
        found.labels, *call.ranges, found.members, found.cluster_end, call.tokens, segments.clusters,
        LISTS=_LISTS, SCANNED=_SCANNED, num_warps=4,
    )  # fmt: skip


COMPILE_CASES = [case(list_kernel, 128, {"LISTS": _LISTS, "SCANNED": _SCANNED}, programs_per_sm=2)]
