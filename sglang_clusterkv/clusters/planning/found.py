"""What a match found: segments that are seen in part are cut (rule 3), unclustered runs are closed (rule 2), and what is whole
then is seen.

Only dirty rows are looked at here: a match at admission, or a checkpoint's rewrite, brings pages that others made.
"""

from __future__ import annotations

from sglang_clusterkv.clusters.planning.draft import Draft
from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.clusters.planning.view import Run
from sglang_clusterkv.memory.index import UNCLUSTERED


def cut_segments(snapshot: Snapshot, draft: Draft) -> None:
    """Cut the segments that this row sees in part, and a long one that reaches into the prompt's window."""
    borders = draft.borders
    match_end, limit = borders.match_end(snapshot.row), borders.prompt_limit(snapshot.row)
    for run in draft.view.runs(snapshot):
        if run.id == UNCLUSTERED or run.id in draft.view.forgotten:
            continue
        if not run.whole or (run.end <= match_end and borders.lengthens_window(run.begin, run.end, limit)):
            cut(snapshot, run, borders.pieces(run.begin, run.end, limit), draft)


def cut(snapshot: Snapshot, run: Run, own: list[tuple[int, int]], draft: Draft) -> None:
    """Split a segment at what this row makes of the part that it sees. The rest is rebuilt only if a running row sees it."""
    record, borders = snapshot.row, draft.borders
    first = run.begin - run.offset  # the page of the row at which the segment would begin
    if not own:
        return  # it stays whole for others; this row attends to its part
    viewers = [row for row in draft.records.viewers(run.id) if row is not record]
    owner = next((row for row in viewers if not row.dirty), None)
    draft.plan.cut.add(run.id)
    draft.forget(run.id)
    # Index begin, index end, new id.
    pieces = [(b - first, e - first, draft.make(record, b, e)) for b, e in own]
    if run.end - first < run.pages:  # beyond it this row goes another way
        draft.branch_ends.add(pieces[-1][2])
    if owner is not None:
        ends = [first, *(page for piece in own for page in piece), first + run.pages]
        for begin, end in zip(ends[::2], ends[1::2], strict=True):
            pieces += [(b - first, e - first, draft.make(owner, b, e)) for b, e in borders.pieces(begin, end, end)]
    pieces.sort()
    draft.view.replace(run.id, pieces)
    replacement = [draft.segment(new_id, first + b, first + e) for b, e, new_id in pieces]
    for row in viewers:
        if not row.dirty:
            kept = [s for s in row.segments if s.id != run.id]
            draft.records.see(row, sorted(kept + replacement, key=lambda s: s.begin))
            if row.segments:  # a piece too short at the end waits with what follows
                row.waits_from = min(row.waits_from, row.segments[-1].end)
            draft.plan.touched.append(row)


def close_runs(snapshot: Snapshot, draft: Draft) -> None:
    """Cluster the unclustered runs that the row found."""
    record, borders = snapshot.row, draft.borders
    match_end = borders.match_end(record)
    for run in draft.view.runs(snapshot):
        if run.id == UNCLUSTERED and run.begin < match_end:
            limit = borders.prompt_limit(record)
            for begin, end in borders.pieces(run.begin, min(run.end, match_end), limit):
                draft.claim(snapshot, begin, end)


def see_whole_segments(snapshot: Snapshot, draft: Draft) -> None:
    """The row sees the segments that it has all pages of: those that it saw before the snapshot's first page, and these."""
    record = snapshot.row
    begin = snapshot.first_page * draft.borders.page_size
    seen = [] if record.dirty else [s for s in record.segments if s.end <= begin]
    for run in draft.view.runs(snapshot):
        if run.id != UNCLUSTERED and run.whole:
            seen.append(draft.segment(run.id, run.begin, run.end))
    if not record.walked:
        made = draft.plan.made_for(record.row)
        record.reused_tokens = sum(s.tokens for s in seen if s.id not in made)
        record.walked = True
    draft.records.see(record, seen)
