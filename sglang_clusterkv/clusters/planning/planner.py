"""Which segments to make, cut and forget: decided on the host, from snapshots of rows taken on the forward stream.

At the head of forward N the rows that need a look are snapshotted (pages and their states). When the host launches N + 1
it plans from that snapshot, and the resulting operations run at the head of N + 1. What the host keeps between steps is
only what each running row's last walk saw; a row that was rewritten since its snapshot is dirty and is looked at again.

Rules kept here (docs/design.md, "Rules"): a segment is made of pages its maker wrote or of one run of unclustered pages that it
found (2); a running request sees a segment whole or not at all (3); borders depend on positions alone where nothing is
shared (5); borders are set so that the window stays short (6).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sglang_clusterkv.clusters.merging import groups_to_merge
from sglang_clusterkv.clusters.rows import Row, Segment
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES
from sglang_clusterkv.memory.index import UNCLUSTERED

_MOST_BRANCH_ENDS = 1 << 16
_MOST_IDS = np.iinfo(np.int32).max  # as a page's state holds them


class Snapshot(NamedTuple):
    """A row as the forward stream saw it at the head of a forward, from page `first_page` on."""

    row: Row
    changed: int  # row.changed when the snapshot was taken
    first_page: int
    length: int  # row.length then
    pages: np.ndarray  # int [n], page ids
    state: np.ndarray  # int [n, 3]: segment id, index, pages of the segment


class Make(NamedTuple):
    """Cluster pages [first_page, first_page + pages) of a row as segment `id`."""

    id: int
    row: int
    first_page: int
    pages: int


class Forget(NamedTuple):
    """Mark the pages of segment `id` unclustered."""

    id: int


@dataclass
class Plan:
    """Operations for the head of the next forward, in order, and what they come from."""

    operations: list[Make | Forget] = field(default_factory=list)
    touched: list[Row] = field(default_factory=list)  # rows whose record changed
    splits: int = 0
    merged: set[int] = field(default_factory=set)  # ids of segments made of neighbours

    def withdraw(self, segment_id: int) -> bool:
        """Take back a segment that this plan was to make; false if it is not of this plan."""
        kept = [o for o in self.operations if not (isinstance(o, Make) and o.id == segment_id)]
        found = len(kept) < len(self.operations)
        self.operations = kept
        return found


class _Run(NamedTuple):
    """Consecutive pages [begin, end) of a row in one state."""

    begin: int
    end: int
    id: int  # UNCLUSTERED, or a segment
    offset: int  # index in the segment of the first page
    pages: int  # pages of the segment

    @property
    def whole(self) -> bool:
        return self.offset == 0 and self.end - self.begin == self.pages


class Planner:
    """Keeps the rows' records and turns snapshots into plans.

    Args:
        config: the resolved configuration.
        page_size: tokens per page.
    """

    def __init__(self, config: ClusterKVConfig, page_size: int) -> None:
        self.page_size = page_size
        self.segment_pages = config.segment_tokens // page_size
        self.window_pages = config.window_tokens // page_size
        self.sink_pages = config.sink_tokens // page_size
        self.recluster_pages = config.recluster_every // page_size
        self.rows: dict[int, Row] = {}
        self.merges = config.merge_segments
        self._next_id = 0
        self._branch_ends: dict[int, None] = {}  # segments at whose end a branch ended, the oldest first
        self._seen_by: dict[int, list[Row]] = {}  # segment id -> running rows that see it

    # -- what happens to rows -------------------------------------------------------------------------------------

    def admit(self, row: int, *, rid: str, found_tokens: int, prompt_len: int) -> Row:
        """A request got this row; its first `found_tokens` tokens came from the radix tree."""
        self.free(row)
        record = Row(row=row, prompt_len=prompt_len, found_end=found_tokens, length=found_tokens, rid=rid)
        record.cached_tokens = found_tokens
        self.rows[row] = record
        return record

    def rewritten(self, row: int, begin: int, end: int) -> bool:
        """A checkpoint replaced the row's slots [begin, end) by the tree's; true if a record changed."""
        record = self.rows.get(row)
        if record is None or end <= begin:
            return False
        record.dirty = True
        record.changed += 1
        record.found_end = max(record.found_end, end)
        return True

    def free(self, row: int) -> None:
        """The row's request ended, was aborted or retracted."""
        record = self.rows.pop(row, None)
        if record is not None:
            record.changed += 1
            self._see(record, [])

    def clear(self) -> None:
        """Every row was freed."""
        for row in list(self.rows):
            self.free(row)

    def lost(self, segment_id: int) -> list[Row]:
        """A planned segment was not made: the rows that were to see it are dirty."""
        rows = list(self._seen_by.get(segment_id, ()))
        for record in rows:
            record.dirty = True
            record.changed += 1
        return rows

    def forget_what_rows_see(self) -> None:
        """The records may be wrong: every row is dirty and sees nothing until it is walked."""
        self._seen_by.clear()
        for record in self.rows.values():
            record.dirty, record.segments = True, []
            record.changed += 1

    def watchers(self, segment_id: int) -> int:
        """How many running requests see a segment."""
        return len(self._seen_by.get(segment_id, ()))

    # -- what to look at ------------------------------------------------------------------------------------------

    def first_page_to_look_at(self, record: Row) -> int:
        """Where a snapshot of the row begins: everything for a dirty row, else what follows its last segment."""
        if record.dirty or not record.segments:
            return self.sink_pages
        return record.segments[-1].end // self.page_size

    # -- planning -------------------------------------------------------------------------------------------------

    def plan(self, snapshots: list[Snapshot]) -> Plan:
        """Decide what to make and forget. Snapshots of rows that changed since are ignored: those rows stay dirty."""
        plan = Plan()
        current = [s for s in snapshots if self.rows.get(s.row.row) is s.row and s.changed == s.row.changed]
        view = _View(current)
        # Shorter matches first: what they leave of a run or of a cut segment, the longer ones close.
        dirty = sorted((s for s in current if s.row.dirty), key=lambda s: s.row.found_end)
        for snapshot in dirty:
            self._cut_segments(snapshot, view, plan)
        for snapshot in dirty:
            self._close_what_it_found(snapshot, view, plan)
        for snapshot in current:
            self._walk(snapshot, view, plan)
        if self.merges:
            for snapshot in current:
                self._merge(snapshot, view, plan)
        return plan

    def _cut_segments(self, snapshot: Snapshot, view: _View, plan: Plan) -> None:
        """Cut the segments that this row sees in part, and the one that needs a border before the match's end."""
        match_end = snapshot.row.found_end // self.page_size
        for run in view.runs(snapshot):
            if run.id == UNCLUSTERED or run.id in view.forgotten:
                continue
            if not run.whole or (run.end <= match_end and self._needs_border(run.begin, run.end, match_end)):
                self._cut(snapshot, run, view, plan)

    def _close_what_it_found(self, snapshot: Snapshot, view: _View, plan: Plan) -> None:
        """Cluster the unclustered runs that the row found."""
        record = snapshot.row
        match_end = record.found_end // self.page_size
        for run in view.runs(snapshot):
            if run.id == UNCLUSTERED and run.begin < match_end:
                for b, e in self._pieces(run.begin, min(run.end, match_end), self._prompt_limit(record), match_end):
                    view.claim(snapshot, b, e, self._make(record.row, b, e - b, record, plan))

    def _cut(self, snapshot: Snapshot, run: _Run, view: _View, plan: Plan) -> None:
        """Split a segment at the part that this row sees. The rest is rebuilt only if a running row sees it."""
        record = snapshot.row
        first = run.begin - run.offset  # the page of the row at which the segment would begin
        match_end = record.found_end // self.page_size
        own = self._pieces(run.begin, run.end, self._prompt_limit(record), match_end)
        if not own:
            return  # it stays whole for others; this row attends to its part
        viewers = [row for row in self._seen_by.get(run.id, []) if row is not record]
        owner = next((row for row in viewers if not row.dirty), None)
        plan.splits += 1
        plan.operations.append(Forget(run.id))
        # Index begin, index end, new id.
        pieces = [(b - first, e - first, self._make(record.row, b, e - b, record, plan)) for b, e in own]
        if run.end - first < run.pages:  # beyond it this row goes another way
            self._end_of_branch(pieces[-1][2])
        if owner is not None:
            borders = [first, *(page for piece in own for page in piece), first + run.pages]
            for begin, end in zip(borders[::2], borders[1::2], strict=True):
                pieces += [
                    (b - first, e - first, self._make(owner.row, b, e - b, owner, plan))
                    for b, e in self._pieces(begin, end, end, None)
                ]
        pieces.sort()
        view.replace(run.id, pieces)
        replacement = [
            Segment(new_id, (first + b) * self.page_size, (first + e) * self.page_size) for b, e, new_id in pieces
        ]
        for row in viewers:
            if not row.dirty:
                kept = [s for s in row.segments if s.id != run.id]
                self._see(row, sorted(kept + replacement, key=lambda s: s.begin))
                if row.segments:  # a piece too short at the end waits with what follows
                    row.waits_from = min(row.waits_from, row.segments[-1].end)
                plan.touched.append(row)

    def _walk(self, snapshot: Snapshot, view: _View, plan: Plan) -> None:
        """See whole segments, make segments of what the row wrote itself, and publish its record."""
        record = snapshot.row
        seen = [] if record.dirty else [s for s in record.segments if s.end <= snapshot.first_page * self.page_size]
        for run in view.runs(snapshot):
            if run.id != UNCLUSTERED and run.whole:
                seen.append(Segment(run.id, run.begin * self.page_size, run.end * self.page_size))
        if not record.walked:
            made = {o.id for o in plan.operations if isinstance(o, Make) and o.row == record.row}
            record.reused_tokens = sum(s.tokens for s in seen if s.id not in made)
            record.walked = True
        self._see(record, seen)
        self._make_own(snapshot, view, plan)
        record.dirty = False
        plan.touched.append(record)

    def _make_own(self, snapshot: Snapshot, view: _View, plan: Plan) -> None:
        """Own pages: whole segments while the prefill runs, the rest when it ends, decoded tokens as they age."""
        record = snapshot.row
        match_end, prompt_limit = record.found_end // self.page_size, self._prompt_limit(record)
        aged = snapshot.length // self.page_size - self.window_pages
        runs = view.runs(snapshot)
        for run in runs[:-1]:
            if run.id == UNCLUSTERED and run.begin >= match_end:  # between segments: a rewrite left it
                self._own_pieces(snapshot, run.begin, run.end, min(prompt_limit, aged), view, plan)
        begin = max(match_end, self.sink_pages)
        if runs and runs[-1].id != UNCLUSTERED:
            begin = max(begin, runs[-1].end)
        elif runs:
            if runs[-1].begin < begin <= aged and not record.prefilling:
                # What it found at its prompt's end, then too young to be clustered, is a segment of its own.
                self._own_pieces(snapshot, runs[-1].begin, begin, aged, view, plan)
            begin = max(begin, runs[-1].begin)
            end = min(runs[-1].end, prompt_limit)
            if record.prefilling:
                end = begin + (end - begin) // self.segment_pages * self.segment_pages
            begin = self._own_pieces(snapshot, begin, end, prompt_limit, view, plan)
            while not record.prefilling and aged - begin >= self.recluster_pages:
                begin = self._own_pieces(snapshot, begin, begin + self.recluster_pages, aged, view, plan)
        if record.segments and record.segments[-1].end // self.page_size < snapshot.first_page:
            # Its last segment was cut by this plan, and the snapshot begins behind what is left of it.
            begin = max(match_end, record.segments[-1].end // self.page_size)
        record.waits_from = begin * self.page_size

    def _own_pieces(self, snapshot: Snapshot, begin: int, end: int, limit: int, view: _View, plan: Plan) -> int:
        """Make segments of own pages [begin, end); returns the page where the last one ends (begin if none)."""
        record = snapshot.row
        for b, e in self._pieces(begin, end, limit, None):
            new_id = self._make(record.row, b, e - b, record, plan)
            view.claim(snapshot, b, e, new_id)
            segment = Segment(new_id, b * self.page_size, e * self.page_size)
            self._see(record, sorted([*record.segments, segment], key=lambda s: s.begin))
            begin = e
        return begin

    def _merge(self, snapshot: Snapshot, view: _View, plan: Plan) -> None:
        """Make one segment of neighbours that no other running request sees, up to the window."""
        record, page = snapshot.row, self.page_size
        if record.prefilling or record.dirty:
            return
        limit = (snapshot.length // page - self.window_pages) * page
        segments = [s for s in record.segments if s.end <= limit]
        alone = [self.watchers(s.id) == 1 for s in segments]
        joins = [
            alone[i] and alone[i + 1] and left.id not in self._branch_ends
            and view.is_unclustered(snapshot, left.end // page, right.begin // page)
            for i, (left, right) in enumerate(itertools.pairwise(segments))
        ]  # fmt: skip
        for first, last in groups_to_merge(segments, joins, self.segment_pages * page):
            begin, end = segments[first].begin // page, segments[last].end // page
            for segment in segments[first : last + 1]:
                if plan.withdraw(segment.id):
                    record.clustered_tokens -= segment.tokens
                else:
                    plan.operations.append(Forget(segment.id))
            merged = Segment(self._make(record.row, begin, end - begin, record, plan), begin * page, end * page)
            if segments[last].id in self._branch_ends:
                self._end_of_branch(merged.id)
            kept = [s for s in record.segments if s.end <= merged.begin or s.begin >= merged.end]
            self._see(record, sorted([*kept, merged], key=lambda s: s.begin))
            plan.merged.add(merged.id)

    def _end_of_branch(self, segment_id: int) -> None:
        """Remember that a branch ends with this segment, so that no merge undoes what the next branch would cut again."""
        self._branch_ends[segment_id] = None
        if len(self._branch_ends) > _MOST_BRANCH_ENDS:
            del self._branch_ends[next(iter(self._branch_ends))]

    def _pieces(self, begin: int, end: int, limit: int, match_end: int | None) -> list[tuple[int, int]]:
        """Segments to make of pages [begin, end): cut every segment_pages from the begin, none beyond `limit`, none
        shorter than four pages; a border window_pages before `match_end` where a long one would reach beyond that."""
        end = min(end, limit)
        pieces = self._every_segment(begin, end)
        if match_end is not None and any(self._needs_border(b, e, match_end) for b, e in pieces):
            border = match_end - self.window_pages
            pieces = self._every_segment(begin, border) + self._every_segment(border, end)
        return [(b, e) for b, e in pieces if e - b >= SEGMENT_VECTOR_PAGES]

    def _every_segment(self, begin: int, end: int) -> list[tuple[int, int]]:
        starts = range(begin, end, self.segment_pages)
        return [(start, min(start + self.segment_pages, end)) for start in starts]

    def _needs_border(self, begin: int, end: int, match_end: int) -> bool:
        """Whether a segment would make the window of a short question after the match a long one."""
        border = match_end - self.window_pages
        return end - begin > self.recluster_pages and begin + SEGMENT_VECTOR_PAGES <= border < end

    def _make(self, row: int, first_page: int, pages: int, record: Row, plan: Plan) -> int:
        self._next_id = self._next_id % _MOST_IDS + 1
        plan.operations.append(Make(self._next_id, row, first_page, pages))
        record.clustered_tokens += pages * self.page_size
        return self._next_id

    def _prompt_limit(self, record: Row) -> int:
        """The page beyond which no segment made during prefill ends."""
        return record.prompt_len // self.page_size - self.window_pages

    def _see(self, record: Row, segments: list[Segment]) -> None:
        """Replace what a row sees, and keep who sees what."""
        for segment in record.segments:
            rows = self._seen_by[segment.id]
            rows.remove(record)
            if not rows:
                del self._seen_by[segment.id]
        record.segments = segments
        for segment in segments:
            self._seen_by.setdefault(segment.id, []).append(record)


class _View:
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

    def runs(self, snapshot: Snapshot) -> list[_Run]:
        """The row's full pages, as maximal runs of one segment or of unclustered pages."""
        state = self._state[id(snapshot.row)]
        if not len(state):
            return []
        ids, index = state[:, 0], state[:, 1]
        same = (ids[1:] == ids[:-1]) & ((ids[1:] == UNCLUSTERED) | (index[1:] == index[:-1] + 1))
        starts = np.concatenate(([0], np.flatnonzero(~same) + 1, [len(state)]))
        first = snapshot.first_page
        return [
            _Run(int(first + b), int(first + e), int(state[b, 0]), int(state[b, 1]), int(state[b, 2]))
            for b, e in zip(starts[:-1], starts[1:], strict=True)
        ]

    def is_unclustered(self, snapshot: Snapshot, begin: int, end: int) -> bool:
        """Whether pages [begin, end) of a row are known to be unclustered, or none."""
        state = self._state[id(snapshot.row)]
        inside = state[max(0, begin - snapshot.first_page) : max(0, end - snapshot.first_page), 0]
        return begin == end or begin >= snapshot.first_page and bool((inside == UNCLUSTERED).all())

    def claim(self, snapshot: Snapshot, begin: int, end: int, new_id: int) -> None:
        """Pages [begin, end) of a snapshotted row become segment `new_id`, in every row that has these pages."""
        pages = snapshot.pages[begin - snapshot.first_page : end - snapshot.first_page]
        first = np.searchsorted(self._sorted_pages, pages, side="left")
        count = np.searchsorted(self._sorted_pages, pages, side="right") - first
        index = np.repeat(np.arange(len(pages)), count)  # of the page in the segment, for each row that has it
        nth = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
        at = self._by_page[first[index] + nth]
        self._all[at, 0] = new_id
        self._all[at, 1] = index
        self._all[at, 2] = len(pages)

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
