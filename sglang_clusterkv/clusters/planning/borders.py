"""Where segments may begin and end (rules 2 and 6), in pages of a row."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from sglang_clusterkv.clusters.planning.plan import Snapshot
from sglang_clusterkv.clusters.rows import Row
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES


class Lengths(NamedTuple):
    """Segments that follow from a row's lengths."""

    pieces: list[tuple[int, int]]  # pages
    until: int  # the page from which on tokens wait to become one


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
        self.merges = config.merge_segments

    def prompt_limit(self, record: Row) -> int:
        """The page beyond which no segment made during prefill ends."""
        return record.prompt_len // self.page_size - self.window_pages

    def match_end(self, record: Row) -> int:
        """The page at which what the row found ends and its own pages begin."""
        return record.found_end // self.page_size

    def aged(self, snapshot: Snapshot) -> int:
        """The page at which the row's window begins."""
        return snapshot.length // self.page_size - self.window_pages

    def known(self, snapshot: Snapshot) -> int:
        """The page at which the row's window begins, or a rewrite since the snapshot."""
        return min(self.aged(snapshot), snapshot.first_page + len(snapshot.pages))

    def block(self, page: int) -> int:
        """The page at which the aligned segment begins that has this page: the sinks' end and every segment_pages from it."""
        return page - (page - self.sink_pages) % self.segment_pages

    def last_border(self, begin: int, end: int) -> int:
        """The page up to which [begin, end) may be made while the prefill goes on."""
        return max(begin, self.block(end))

    def decoded_run(self, begin: int) -> tuple[int, int]:
        """The next decoded run from page `begin` on; too few pages before a border stay out until that segment is whole."""
        border = self.block(begin) + self.segment_pages
        if border - begin < SEGMENT_VECTOR_PAGES:
            begin, border = border, border + self.segment_pages
        return begin, min(begin + self.recluster_pages, border)

    def of_lengths(self, record: Row, snapshot: Snapshot) -> Lengths:
        """What a row has that shares nothing with anybody: `reproducible: true` asks for it, whatever the row found.

        Its prompt in aligned segments up to the prompt's window; then decoded tokens, recluster_every at a time, the ones
        before them in the same aligned segment included where segments are merged.
        """
        limit = self.prompt_limit(record)
        if record.prefilling:
            until = max(self.sink_pages, self.block(min(limit, snapshot.length // self.page_size)))
            return Lengths(self.cut(self.sink_pages, until), until)
        pieces = long_enough(self.cut(self.sink_pages, limit))
        until = end = pieces[-1][1] if pieces else self.sink_pages
        until += max(0, self.aged(snapshot) - end) // self.recluster_pages * self.recluster_pages
        if self.merges:
            return Lengths(long_enough(self.cut(self.sink_pages, until)), until)
        for begin in range(end, until, self.recluster_pages):
            pieces += self.cut(begin, begin + self.recluster_pages)
        return Lengths(long_enough(pieces), until)

    def pieces(self, begin: int, end: int, limit: int) -> list[tuple[int, int]]:
        """Segments to make of pages [begin, end): none across the border of an aligned segment, none beyond `limit`, none
        shorter than four pages."""
        return long_enough(self.cut(begin, min(end, limit)))

    def lengthens_window(self, begin: int, end: int, limit: int) -> bool:
        """Whether a segment is long and reaches into the window of a prompt, which begins at page `limit`: attended whole."""
        return end - begin > self.recluster_pages and begin + SEGMENT_VECTOR_PAGES <= limit < end

    def cut(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Pages [begin, end) in parts of aligned segments."""
        if begin >= end:
            return []
        inner = range(self.block(begin) + self.segment_pages, end, self.segment_pages)
        return list(itertools.pairwise([begin, *inner, end]))


def long_enough(pieces: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that can be segments: a segment's vectors lie on its first four pages."""
    return [(begin, end) for begin, end in pieces if end - begin >= SEGMENT_VECTOR_PAGES]
