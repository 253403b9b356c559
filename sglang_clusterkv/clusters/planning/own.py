"""A row's own pages (rule 2): whole segments while the prefill runs, the rest when it ends, decoded tokens as they age."""

from __future__ import annotations

from sglang_clusterkv.clusters.planning.draft import Draft
from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.memory.index import UNCLUSTERED


def cluster_own_pages(snapshot: Snapshot, draft: Draft) -> None:
    """Make the segments that are due, and note from which token on the row's pages wait."""
    record, borders = snapshot.row, draft.borders
    match_end, prompt_limit, aged = borders.match_end(record), borders.prompt_limit(record), borders.known(snapshot)
    runs = draft.view.runs(snapshot)
    for run in runs[:-1]:
        if run.id == UNCLUSTERED and run.begin >= match_end:  # between segments: a rewrite left it
            _make_pieces(snapshot, run.begin, run.end, min(prompt_limit, aged), draft)
    begin = max(match_end, borders.sink_pages)
    if runs and runs[-1].id != UNCLUSTERED:
        begin = max(begin, runs[-1].end)
    elif runs:
        if runs[-1].begin < begin <= aged and not record.prefilling:
            # What it found at its prompt's end, then too young to be clustered, is a segment of its own.
            _make_pieces(snapshot, runs[-1].begin, begin, aged, draft)
        begin = max(begin, runs[-1].begin)
        end = min(runs[-1].end, prompt_limit)
        if record.prefilling:
            end = borders.last_border(begin, end)
        begin = _make_pieces(snapshot, begin, end, prompt_limit, draft)
        while not record.prefilling:
            begin, end = borders.decoded_run(begin)
            if aged - begin < borders.recluster_pages:
                break
            begin = _make_pieces(snapshot, begin, end, aged, draft)
    if record.segments and record.segments[-1].end // borders.page_size < snapshot.first_page:
        # Its last segment was cut by this plan, and the snapshot begins behind what is left of it.
        begin = max(match_end, record.segments[-1].end // borders.page_size)
    record.waits_from = begin * borders.page_size


def _make_pieces(snapshot: Snapshot, begin: int, end: int, limit: int, draft: Draft) -> int:
    """Make segments of own pages [begin, end); returns the page where the last one ends (begin if none)."""
    for b, e in draft.borders.pieces(begin, end, limit):
        draft.see_also(snapshot.row, draft.claim(snapshot, b, e))
        begin = e
    return begin
