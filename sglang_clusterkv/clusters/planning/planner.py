"""The order of a planning's steps: snapshots of rows in, a plan out.

At the head of forward N the rows that need a look are snapshotted (pages and their states). When the host launches N + 1
it plans from that snapshot, and the resulting operations run at the head of N + 1. What the host keeps between steps is
only what each running row's last walk saw (`records.py`); a row that was rewritten since its snapshot is dirty and is looked
at again.
"""

from __future__ import annotations

import numpy as np

from sglang_clusterkv.clusters.planning import found, merging, own, reproducible
from sglang_clusterkv.clusters.planning.borders import Borders
from sglang_clusterkv.clusters.planning.draft import BranchEnds, Draft
from sglang_clusterkv.clusters.planning.plan import Plan, Snapshot
from sglang_clusterkv.clusters.planning.records import Records
from sglang_clusterkv.clusters.planning.view import View
from sglang_clusterkv.clusters.rows import Row
from sglang_clusterkv.config import ClusterKVConfig

_MOST_IDS = np.iinfo(np.int32).max  # as a page's state holds them


class Planner:
    """Turns snapshots into plans.

    Args:
        config: the resolved configuration.
        page_size: tokens per page.
        records: what the running rows see.
    """

    def __init__(self, config: ClusterKVConfig, page_size: int, records: Records) -> None:
        self.records = records
        self.borders = Borders(config, page_size)
        self._reproducible = config.reproducible
        records.keeps_from = lambda record: self.borders.prompt_limit(record) * page_size
        self.branch_ends = BranchEnds()
        self._last_id = 0

    def first_page_to_look_at(self, record: Row) -> int:
        """Where a snapshot of the row begins: everything for a dirty row and where its prefill has ended, else what follows its
        last segment."""
        if record.dirty or not record.segments:
            return self.borders.sink_pages
        if self._reproducible:  # its last aligned segment may be made anew
            return self.borders.block(record.segments[-1].begin // self.borders.page_size)
        if self.borders.merges and not record.prefilling and not record.prompt_walked:
            return self.borders.sink_pages  # its prompt's gaps may go into segments now
        return record.segments[-1].end // self.borders.page_size

    def plan(self, snapshots: list[Snapshot]) -> Plan:
        """Decide what to make and forget. Snapshots of rows that changed since are ignored: those rows stay dirty."""
        rows = self.records.rows
        current = [s for s in snapshots if rows.get(s.row.row) is s.row and s.changed == s.row.changed]
        draft = Draft(Plan(), View(current), self.records, self.borders, self.branch_ends, self._next_id)
        # Shorter matches first: what they leave of a run or of a cut segment, the longer ones close.
        dirty = sorted((s for s in current if s.row.dirty), key=lambda s: s.row.found_end)
        if self._reproducible:
            self._plan_by_lengths([*dirty, *(s for s in current if not s.row.dirty)], draft)
        else:
            self._plan_by_matches(current, dirty, draft)
        return draft.plan

    def _plan_by_matches(self, current: list[Snapshot], dirty: list[Snapshot], draft: Draft) -> None:
        """What a match found stays as it is as far as it can."""
        # Rule 3: a running request sees a segment whole or not at all.
        for snapshot in dirty:
            found.cut_segments(snapshot, draft)
        # Rule 2: what a request found is clustered before its first sparse step.
        for snapshot in dirty:
            found.close_runs(snapshot, draft)
        # Rule 2: own pages wait until a segment is complete or the prefill ends, decoded ones until they have aged.
        for snapshot in current:
            found.see_whole_segments(snapshot, draft)
            own.cluster_own_pages(snapshot, draft)
            snapshot.row.dirty = False
            draft.plan.touched.append(snapshot.row)
        # Neighbours that one request alone sees become one.
        if self.borders.merges:
            for snapshot in current:
                merging.merge_neighbours(snapshot, draft)
                snapshot.row.prompt_walked = not snapshot.row.prefilling

    def _plan_by_lengths(self, current: list[Snapshot], draft: Draft) -> None:
        """What a match found becomes what the row would have made."""
        for snapshot in current:
            reproducible.drop_others(snapshot, draft)
        for snapshot in current:
            reproducible.make_own(snapshot, draft)
        for snapshot in current:
            found.see_whole_segments(snapshot, draft)
            snapshot.row.dirty = False
            draft.plan.touched.append(snapshot.row)

    def _next_id(self) -> int:
        self._last_id = self._last_id % _MOST_IDS + 1
        return self._last_id
