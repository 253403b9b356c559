"""The rows that run, what each of them sees, and so who sees a segment.

Rule 3 needs both directions: a row's segments, and a segment's rows. `see` is the one place where they change.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_clusterkv.clusters.rows import Extend, Row, Segment


class Records:
    """One record per running row."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        # The token position from which on a rewrite changes nothing that a row sees or is about to; None: there is none.
        self.keeps_from: Callable[[Row], int] | None = None
        self._seen_by: dict[int, list[Row]] = {}  # segment id -> running rows that see it

    def admit(self, row: int, *, rid: str, found_tokens: int, prompt_len: int) -> Row:
        """A request got this row; its first `found_tokens` tokens came from the radix tree."""
        self.free(row)
        record = Row(row=row, prompt_len=prompt_len, found_end=found_tokens, length=found_tokens, rid=rid)
        record.cached_tokens = found_tokens
        self.rows[row] = record
        return record

    def chunk(self, extend: Extend, before: bool = False) -> Row:
        """A chunk of a request's prompt is launched; `before`: it will be, and what counts is what there is until then."""
        record = self.rows.get(extend.row)
        # A session's next turn has the row and the id of the last one.
        if record is None or record.rid != extend.rid or not record.prefilling:
            record = self.admit(
                extend.row, rid=extend.rid, found_tokens=extend.prefix_tokens, prompt_len=extend.prompt_len
            )
        record.length = extend.prefix_tokens if before else extend.end_tokens
        record.prefilling = before or not extend.last_chunk
        return record

    def rewritten(self, row: int, begin: int, end: int) -> bool:
        """A checkpoint replaced the row's slots [begin, end) by the tree's; true if a record changed."""
        record = self.rows.get(row)
        if record is None or end <= begin:
            return False
        if self.keeps_from is not None and begin >= max(self.keeps_from(record), *(s.end for s in record.segments), 0):
            record.void_from = min(record.void_from, begin)
            record.found_end = max(record.found_end, end)
            return False
        record.dirty, record.prompt_walked = True, False
        record.changed += 1
        record.found_end = max(record.found_end, end)
        return True

    def free(self, row: int) -> None:
        """The row's request ended, was aborted or retracted."""
        record = self.rows.pop(row, None)
        if record is not None:
            record.changed += 1
            self.see(record, [])

    def clear(self) -> None:
        """Every row was freed."""
        for row in list(self.rows):
            self.free(row)

    def lost(self, segment_id: int) -> list[Row]:
        """A planned segment was not made: the rows that were to see it are dirty."""
        rows = self.viewers(segment_id)
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

    def viewers(self, segment_id: int) -> list[Row]:
        """The running rows that see a segment."""
        return list(self._seen_by.get(segment_id, ()))

    def watchers(self, segment_id: int) -> int:
        """How many running rows see a segment."""
        return len(self._seen_by.get(segment_id, ()))

    def see(self, record: Row, segments: list[Segment]) -> None:
        """Replace what a row sees, and keep who sees what."""
        for segment in record.segments:
            rows = self._seen_by[segment.id]
            rows.remove(record)
            if not rows:
                del self._seen_by[segment.id]
        record.segments = segments
        for segment in segments:
            self._seen_by.setdefault(segment.id, []).append(record)
