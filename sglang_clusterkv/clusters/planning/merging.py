"""Which neighbouring segments become one.

Short segments cost quality, and chats make many: a short message, a short answer. So neighbours are clustered again as one
when they fit a segment together and that at least doubles the largest of them: a token is clustered a few times in its
life, not once per turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from sglang_clusterkv.clusters.planning.draft import Draft
from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.clusters.rows import Segment


def merge_neighbours(snapshot: Snapshot, draft: Draft) -> None:
    """Make one segment of neighbours that no other running request sees, up to the window."""
    record, records, page = snapshot.row, draft.records, draft.borders.page_size
    if record.prefilling or record.dirty:
        return
    limit = draft.borders.aged(snapshot) * page
    segments = [s for s in record.segments if s.end <= limit]
    alone = [records.watchers(s.id) == 1 for s in segments]
    joins = [
        alone[i] and alone[i + 1] and left.id not in draft.branch_ends
        and draft.view.is_unclustered(snapshot, left.end // page, right.begin // page)
        for i, (left, right) in enumerate(itertools.pairwise(segments))
    ]  # fmt: skip
    for first, last in groups_to_merge(segments, joins, draft.borders.segment_pages * page):
        begin, end = segments[first].begin, segments[last].end
        for segment in segments[first : last + 1]:
            if draft.plan.withdraw(segment.id):
                record.clustered_tokens -= segment.tokens
            else:
                draft.forget(segment.id)
        merged = Segment(draft.make(record, begin // page, end // page), begin, end)
        if segments[last].id in draft.branch_ends:
            draft.branch_ends.add(merged.id)
        draft.see_also(record, merged, instead_of=(begin, end))
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
