"""Which neighbouring segments become one.

Short segments cost quality, and chats make many: a short message, a short answer. So neighbours are clustered again as one
when that completes an aligned segment, which is where a prompt that nobody else had a part of would have its borders too, or
when it at least doubles the largest of them inside one: a token is clustered a few times in its life, not once per turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from sglang_clusterkv.clusters.planning.draft import Draft
from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.clusters.rows import Segment
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES


class _Merge(NamedTuple):
    """Pages [begin, end) to become one segment, among them segments `first` to `last` of a row."""

    first: int
    last: int
    begin: int
    end: int


def merge_neighbours(snapshot: Snapshot, draft: Draft) -> None:
    """Make one segment of neighbours that no other running request sees, up to the window."""
    record, records, borders = snapshot.row, draft.records, draft.borders
    if record.prefilling or record.dirty:
        return
    page, limit = borders.page_size, borders.aged(snapshot)
    segments = [s for s in record.segments if s.end <= limit * page]
    alone = [records.watchers(s.id) == 1 for s in segments]
    neighbours = [
        alone[i] and alone[i + 1]
        and borders.block(left.begin // page) == borders.block(right.begin // page)
        and draft.view.is_unclustered(snapshot, left.end // page, right.begin // page)
        for i, (left, right) in enumerate(itertools.pairwise(segments))
    ]  # fmt: skip
    merges = _complete_ones(snapshot, segments, neighbours, draft)
    taken = {i for merge in merges for i in range(merge.first, merge.last)}
    joins = [may and i not in taken and segments[i].id not in draft.branch_ends for i, may in enumerate(neighbours)]
    for first, last in groups_to_merge(segments, joins, borders.segment_pages * page):
        merges.append(_Merge(first, last, segments[first].begin // page, segments[last].end // page))
    for merge in merges:
        _merge(snapshot, segments[merge.first : merge.last + 1], merge.begin, merge.end, draft)


def _complete_ones(
    snapshot: Snapshot, segments: Sequence[Segment], neighbours: Sequence[bool], draft: Draft
) -> list[_Merge]:
    """Aligned segments before the window of which all parts are there, but for gaps at their ends."""
    borders = draft.borders
    merges, first = [], 0
    for last, segment in enumerate(segments):
        if last < len(neighbours) and neighbours[last]:
            continue
        parts = segments[first].begin // borders.page_size, segment.end // borders.page_size
        begin = borders.block(parts[0])
        end = begin + borders.segment_pages
        if (
            parts[1] <= end <= borders.aged(snapshot)
            and (first < last or parts != (begin, end))
            and draft.records.watchers(segment.id) == 1
            and _is_gap(snapshot, begin, parts[0], draft)
            and _is_gap(snapshot, parts[1], end, draft)
        ):
            merges.append(_Merge(first, last, begin, end))
        first = last + 1
    return merges


def _is_gap(snapshot: Snapshot, begin: int, end: int, draft: Draft) -> bool:
    """Whether pages [begin, end) of a row are too few for a segment, and in none: other rows may have them too."""
    return end - begin < SEGMENT_VECTOR_PAGES and draft.view.is_unclustered(snapshot, begin, end)


def _merge(snapshot: Snapshot, parts: Sequence[Segment], begin: int, end: int, draft: Draft) -> None:
    """Make one segment of pages [begin, end) in place of its parts."""
    record = snapshot.row
    for part in parts:
        if draft.plan.withdraw(part.id):
            record.clustered_tokens -= part.tokens
        else:
            draft.forget(part.id)
    merged = draft.claim(snapshot, begin, end)
    if parts[-1].id in draft.branch_ends:
        draft.branch_ends.add(merged.id)
    draft.see_also(record, merged, instead_of=(merged.begin, merged.end))
    draft.plan.merged.add(merged.id)


def groups_to_merge(segments: Sequence[Segment], joins: Sequence[bool], limit_tokens: int) -> list[tuple[int, int]]:
    """Groups of neighbours, each as long as it may be, from the last segment backwards.

    Args:
        segments: of one row, ascending.
        joins: whether segments i and i + 1 may be of one group, one less than segments.
        limit_tokens: longest segment.

    Returns:
        Indices (first, last) of disjoint groups of two or more, the last group first.
    """
    groups = []
    last = len(segments) - 1
    while last > 0:
        largest, found, first = segments[last].tokens, None, last
        while first > 0 and joins[first - 1] and segments[last].end - segments[first - 1].begin <= limit_tokens:
            first -= 1
            largest = max(largest, segments[first].tokens)
            if segments[last].end - segments[first].begin >= 2 * largest:
                found = first
        if found is not None:
            groups.append((found, last))
            last = found
        last -= 1
    return groups
