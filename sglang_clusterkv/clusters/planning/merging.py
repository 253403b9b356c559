"""Which neighbouring segments become one.

Short segments cost quality, and chats make many: a short message, a short answer. So neighbours are clustered again as one
when that completes an aligned segment, which is where a prompt that nobody else had a part of would have its borders too, or
when it at least doubles the largest of them inside one: a token is clustered a few times in its life, not once per turn. The
last aligned segment of a prompt, which the prompt's window cuts short, is made whole once, when the prefill ends, if that
makes the largest part longer by a third: then too the prompt has the borders of one that was alone, and tokens that were
clustered before are clustered again only for so many new ones.
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
    page, limit = borders.page_size, borders.known(snapshot)
    segments = [s for s in record.segments if s.end <= limit * page]
    alone = [records.watchers(s.id) == 1 for s in segments]
    neighbours = [
        alone[i] and alone[i + 1]
        and borders.block(left.begin // page) == borders.block(right.begin // page)
        and draft.view.is_unclustered(snapshot, left.end // page, right.begin // page)
        for i, (left, right) in enumerate(itertools.pairwise(segments))
    ]  # fmt: skip
    merges = _aligned_ones(snapshot, segments, alone, draft)
    taken = {i for merge in merges for i in range(merge.first, merge.last)}
    joins = [may and i not in taken and segments[i].id not in draft.branch_ends for i, may in enumerate(neighbours)]
    for first, last in groups_to_merge(segments, joins, borders.segment_pages * page):
        merges.append(_Merge(first, last, segments[first].begin // page, segments[last].end // page))
    for merge in merges:
        _merge(snapshot, segments[merge.first : merge.last + 1], merge.begin, merge.end, draft)


def _aligned_ones(snapshot: Snapshot, segments: Sequence[Segment], alone: Sequence[bool], draft: Draft) -> list[_Merge]:
    """Aligned segments before the window of which all parts are there, but for gaps."""
    borders, page, merges = draft.borders, draft.borders.page_size, []
    blocks = itertools.groupby(range(len(segments)), key=lambda i: borders.block(segments[i].begin // page))
    for begin, places in blocks:
        first, *rest = places
        last = rest[-1] if rest else first
        parts = [(s.begin // page, s.end // page) for s in segments[first : last + 1]]
        end = begin + borders.segment_pages
        if end > borders.known(snapshot):
            end = borders.prompt_limit(snapshot.row)
            if snapshot.row.prompt_walked or not _is_worth_it(parts, begin, end):
                continue
            if any(segments[i].id in draft.branch_ends for i in range(first, last)):
                continue  # the next branch would cut it again
        sides = [begin, *itertools.chain.from_iterable(parts), end]
        gaps = [(b, e) for b, e in zip(sides[::2], sides[1::2], strict=True) if b < e]
        if (gaps or rest) and all(alone[first : last + 1]) and all(_is_gap(snapshot, b, e, draft) for b, e in gaps):
            merges.append(_Merge(first, last, begin, end))
    return merges


def _is_worth_it(parts: Sequence[tuple[int, int]], begin: int, end: int) -> bool:
    """Whether pages [begin, end) are a third more than the largest of their parts, and no part reaches beyond them."""
    return parts[-1][1] <= end and 3 * (end - begin) >= 4 * max(e - b for b, e in parts)


def _is_gap(snapshot: Snapshot, begin: int, end: int, draft: Draft) -> bool:
    """Whether pages [begin, end) of a row are too few for a segment, and in none that a running row sees: what is left of one
    that lost pages, say. Other rows may have them too."""
    ids = draft.view.segments(snapshot, begin, end)
    is_short = snapshot.first_page <= begin and end - begin < SEGMENT_VECTOR_PAGES
    return is_short and not any(map(draft.records.watchers, ids))


def _merge(snapshot: Snapshot, parts: Sequence[Segment], begin: int, end: int, draft: Draft) -> None:
    """Make one segment of pages [begin, end) in place of its parts."""
    record = snapshot.row
    for part in parts:
        if draft.plan.withdraw(part.id):
            record.clustered_tokens -= part.tokens
        else:
            draft.forget(part.id)
    for segment_id in draft.view.segments(snapshot, begin, end):
        if segment_id not in {part.id for part in parts}:  # in a gap
            draft.forget(segment_id)
            draft.view.replace(segment_id, [])
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
