"""A plan in the making: what it does so far, how pages will look then, and what its steps share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sglang_clusterkv.clusters.planning.borders import Borders
from sglang_clusterkv.clusters.planning.plan import Forget, Make, Plan, Snapshot
from sglang_clusterkv.clusters.planning.records import Records
from sglang_clusterkv.clusters.planning.view import View
from sglang_clusterkv.clusters.rows import Row, Segment

_MOST_BRANCH_ENDS = 1 << 16


class BranchEnds:
    """Segments at whose end a branch ended: no merge undoes what the next branch would cut again."""

    def __init__(self) -> None:
        self._ids: dict[int, None] = {}  # the oldest first

    def add(self, segment_id: int) -> None:
        """A branch ends with this segment."""
        self._ids[segment_id] = None
        if len(self._ids) > _MOST_BRANCH_ENDS:
            del self._ids[next(iter(self._ids))]

    def __contains__(self, segment_id: int) -> bool:
        return segment_id in self._ids


@dataclass
class Draft:
    """What the steps of a planning work on.

    Attributes:
        plan: the operations so far.
        view: page states as they will be once these have run.
        records: what the rows see; changed as the plan grows.
        borders: where segments may begin and end.
        branch_ends: remembered from plan to plan.
        next_id: gives the id of a new segment.
    """

    plan: Plan
    view: View
    records: Records
    borders: Borders
    branch_ends: BranchEnds
    next_id: Callable[[], int]

    def segment(self, new_id: int, begin: int, end: int) -> Segment:
        """Pages [begin, end) of a row as a segment of tokens."""
        return Segment(new_id, begin * self.borders.page_size, end * self.borders.page_size)

    def make(self, record: Row, begin: int, end: int) -> int:
        """Cluster pages [begin, end) of a row; returns the new segment's id."""
        new_id = self.next_id()
        self.plan.operations.append(Make(new_id, record.row, begin, end - begin))
        record.clustered_tokens += (end - begin) * self.borders.page_size
        return new_id

    def is_made_here(self, segment_id: int) -> bool:
        """Whether this plan makes a segment: the rows that will see it are not told yet."""
        return any(isinstance(o, Make) and o.id == segment_id for o in self.plan.operations)

    def forget(self, segment_id: int) -> None:
        """Mark a segment's pages unclustered."""
        self.plan.operations.append(Forget(segment_id))

    def claim(self, snapshot: Snapshot, begin: int, end: int) -> Segment:
        """Cluster unclustered pages [begin, end) of a row, for every row that has them."""
        new_id = self.make(snapshot.row, begin, end)
        self.view.claim(snapshot, begin, end, new_id)
        return self.segment(new_id, begin, end)

    def see_also(self, record: Row, segment: Segment, instead_of: tuple[int, int] = (0, 0)) -> None:
        """The row sees a segment more, and none any longer that lies inside tokens [begin, end) `instead_of`."""
        begin, end = instead_of
        kept = [s for s in record.segments if s.end <= begin or s.begin >= end]
        self.records.see(record, sorted([*kept, segment], key=lambda s: s.begin))
