"""Where segments may begin and end (rules 2 and 6), in pages of a row."""

from __future__ import annotations

from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.clusters.rows import Row
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES


class Borders:
    """The configuration's lengths in pages, and how they cut a run.

    Args:
        config: the resolved configuration.
        page_size: tokens per page.
    """

    def __init__(self, config: ClusterKVConfig, page_size: int) -> None:
        self.page_size = page_size
        self.sink_pages = config.sink_tokens // page_size
        self.window_pages = config.window_tokens // page_size
        self.segment_pages = config.segment_tokens // page_size
        self.recluster_pages = config.recluster_every // page_size

    def prompt_limit(self, record: Row) -> int:
        """The page beyond which no segment made during prefill ends."""
        return record.prompt_len // self.page_size - self.window_pages

    def match_end(self, record: Row) -> int:
        """The page at which what the row found ends and its own pages begin."""
        return record.found_end // self.page_size

    def aged(self, snapshot: Snapshot) -> int:
        """The page at which the row's window begins."""
        return snapshot.length // self.page_size - self.window_pages

    def pieces(self, begin: int, end: int, limit: int, match_end: int | None) -> list[tuple[int, int]]:
        """Segments to make of pages [begin, end): cut every segment_pages from the begin, none beyond `limit`, none
        shorter than four pages; a border window_pages before `match_end` where a long one would reach beyond that."""
        end = min(end, limit)
        pieces = self._every_segment(begin, end)
        if match_end is not None and any(self.needs_border(b, e, match_end) for b, e in pieces):
            border = match_end - self.window_pages
            pieces = self._every_segment(begin, border) + self._every_segment(border, end)
        return [(b, e) for b, e in pieces if e - b >= SEGMENT_VECTOR_PAGES]

    def needs_border(self, begin: int, end: int, match_end: int) -> bool:
        """Whether a segment would make the window of a short question after the match a long one."""
        border = match_end - self.window_pages
        return end - begin > self.recluster_pages and begin + SEGMENT_VECTOR_PAGES <= border < end

    def _every_segment(self, begin: int, end: int) -> list[tuple[int, int]]:
        starts = range(begin, end, self.segment_pages)
        return [(start, min(start + self.segment_pages, end)) for start in starts]
