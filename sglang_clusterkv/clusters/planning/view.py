"""How pages look to the rows that were looked at, once the plan so far has run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.memory.index import UNCLUSTERED


class Run(NamedTuple):
    """Consecutive pages [begin, end) of a row in one state."""

    begin: int
    end: int
    id: int  # UNCLUSTERED, or a segment
    offset: int  # index in the segment of the first page
    pages: int  # pages of the segment

    @property
    def whole(self) -> bool:
        """Whether the row has all of the segment's pages, in order."""
        return self.offset == 0 and self.end - self.begin == self.pages


class View:
    """Page states as they will be once the plan so far has run: the snapshots, plus what was claimed and cut.

    The states of all rows lie in one array, so that who has a page is one look-up, however many rows share a prefix.
    """

    def __init__(self, snapshots: list[Snapshot]) -> None:
        self._all = np.concatenate([s.state for s in snapshots]) if snapshots else np.empty((0, 3), np.int32)
        ends = np.cumsum([len(s.state) for s in snapshots])
        # Views into `_all`.
        self._state = {id(s.row): self._all[end - len(s.state) : end] for s, end in zip(snapshots, ends, strict=True)}
        pages = np.concatenate([s.pages for s in snapshots]) if snapshots else np.empty(0, np.int64)
        self._by_page = np.argsort(pages, kind="stable")  # places in `_all`
        self._sorted_pages = pages[self._by_page]
        self.forgotten: set[int] = set()

    def runs(self, snapshot: Snapshot) -> list[Run]:
        """The row's full pages, as maximal runs of one segment or of unclustered pages."""
        state = self._state[id(snapshot.row)]
        if not len(state):
            return []
        ids, index = state[:, 0], state[:, 1]
        same = (ids[1:] == ids[:-1]) & ((ids[1:] == UNCLUSTERED) | (index[1:] == index[:-1] + 1))
        starts = np.concatenate(([0], np.flatnonzero(~same) + 1, [len(state)]))
        first = snapshot.first_page
        return [
            Run(int(first + b), int(first + e), int(state[b, 0]), int(state[b, 1]), int(state[b, 2]))
            for b, e in zip(starts[:-1], starts[1:], strict=True)
        ]

    def is_unclustered(self, snapshot: Snapshot, begin: int, end: int) -> bool:
        """Whether pages [begin, end) of a row are known to be unclustered, or none."""
        state = self._state[id(snapshot.row)]
        inside = state[max(0, begin - snapshot.first_page) : max(0, end - snapshot.first_page), 0]
        return begin == end or begin >= snapshot.first_page and bool((inside == UNCLUSTERED).all())

    def segments(self, snapshot: Snapshot, begin: int, end: int) -> set[int]:
        """Ids of the segments that pages [begin, end) of a row are of, as far as these pages are known."""
        state = self._state[id(snapshot.row)]
        inside = state[max(0, begin - snapshot.first_page) : max(0, end - snapshot.first_page), 0]
        return set(inside[inside != UNCLUSTERED].tolist())

    def partings(self, snapshot: Snapshot, begin: int, end: int) -> list[int]:
        """Pages inside [begin, end) of a row from which on fewer of the rows that were looked at have its pages."""
        pages = snapshot.pages[begin - snapshot.first_page : end - snapshot.first_page]
        first = np.searchsorted(self._sorted_pages, pages, side="left")
        rows = np.searchsorted(self._sorted_pages, pages, side="right") - first
        return (begin + 1 + np.flatnonzero(rows[1:] < rows[:-1])).tolist()

    def claim(self, snapshot: Snapshot, begin: int, end: int, new_id: int) -> None:
        """Pages [begin, end) of a snapshotted row become segment `new_id`, in every row that has these pages.

        Those before the snapshot's first page are nobody else's that was looked at.
        """
        known = max(begin, snapshot.first_page)
        pages = snapshot.pages[known - snapshot.first_page : end - snapshot.first_page]
        first = np.searchsorted(self._sorted_pages, pages, side="left")
        count = np.searchsorted(self._sorted_pages, pages, side="right") - first
        index = np.repeat(np.arange(len(pages)), count)  # of the page among these, for each row that has it
        nth = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
        at = self._by_page[first[index] + nth]
        self._all[at, 0] = new_id
        self._all[at, 1] = index + known - begin
        self._all[at, 2] = end - begin

    def replace(self, segment_id: int, pieces: list[tuple[int, int, int]]) -> None:
        """Segment `segment_id` falls apart into pieces (index begin, index end, new id); the rest is unclustered."""
        self.forgotten.add(segment_id)
        old = np.flatnonzero(self._all[:, 0] == segment_id)
        index = self._all[old, 1]
        self._all[old, 0] = UNCLUSTERED
        for begin, end, new_id in pieces:
            inside = (index >= begin) & (index < end)
            at = old[inside]
            self._all[at, 0] = new_id
            self._all[at, 1] = index[inside] - begin
            self._all[at, 2] = end - begin
