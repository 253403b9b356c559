"""Which neighbouring segments become one.

Short segments cost quality, and chats make many: a short message, a short answer. So neighbours are clustered again as one
when they fit a segment together and that at least doubles the largest of them: a token is clustered a few times in its
life, not once per turn.
"""

from __future__ import annotations

from collections.abc import Sequence

from sglang_clusterkv.clusters.rows import Segment


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
