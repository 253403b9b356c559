"""`reproducible: true`: borders follow from a request's lengths alone (`Borders.of_lengths`), whoever was served before.

A row that is looked at keeps the segments that it would have made itself. Every other one is forgotten, and what the row would
have made is built in its place. What another running request sees stays, or is cut as ever; that is counted.
"""

from __future__ import annotations

from sglang_clusterkv.clusters.planning import found
from sglang_clusterkv.clusters.planning.borders import long_enough
from sglang_clusterkv.clusters.planning.draft import Draft
from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.memory.index import UNCLUSTERED


def drop_others(snapshot: Snapshot, draft: Draft) -> None:
    """Forget the segments that the row would not have made, but for those that somebody else sees."""
    record = snapshot.row
    lengths = draft.borders.of_lengths(record, snapshot)
    for run in draft.view.runs(snapshot):
        if run.id == UNCLUSTERED or (run.whole and (run.begin, run.end) in lengths.pieces):
            continue
        if record.prefilling and run.begin >= lengths.until:
            continue  # its chunks to come decide
        if draft.is_made_here(run.id) or any(row is not record for row in draft.records.viewers(run.id)):
            draft.plan.forced += 1
            if not run.whole:
                found.cut(snapshot, run, overlaps(lengths.pieces, run.begin, run.end), draft)
            continue
        draft.forget(run.id)
        draft.view.replace(run.id, [])
        draft.records.see(record, [s for s in record.segments if s.id != run.id])


def make_own(snapshot: Snapshot, draft: Draft) -> None:
    """Build what the row would have made and has not, of its unclustered pages."""
    record = snapshot.row
    lengths = draft.borders.of_lengths(record, snapshot)
    for run in draft.view.runs(snapshot):
        if run.id == UNCLUSTERED:
            for begin, end in overlaps(lengths.pieces, run.begin, run.end):
                parts = _parts_for_all(snapshot, begin, end, draft)
                draft.plan.forced += len(parts) - 1
                for part in parts:
                    draft.claim(snapshot, *part)
    record.waits_from = lengths.until * draft.borders.page_size


def overlaps(pieces: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """What of some pieces lies in pages [begin, end), as far as it can be segments."""
    return long_enough((max(b, begin), min(e, end)) for b, e in pieces)


def _parts_for_all(snapshot: Snapshot, begin: int, end: int, draft: Draft) -> list[tuple[int, int]]:
    """Pages [begin, end) in parts that each row has whole, as far as these can be segments.

    Rows share beginnings: where one of them goes another way fewer rows have the pages that follow.
    """
    parts = []
    for border in draft.view.partings(snapshot, begin, end):
        if long_enough([(begin, border)]):
            parts.append((begin, border))
            begin = border
    return [*parts, *long_enough([(begin, end)])]
