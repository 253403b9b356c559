"""What a plan is made from, and what it is: operations for the head of the next forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sglang_clusterkv.clusters.rows import Row


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
    cut: set[int] = field(default_factory=set)  # ids of segments that are forgotten because a row sees a part of them
    forced: int = 0  # segments whose borders follow from other running requests, with `reproducible: true`
    merged: set[int] = field(default_factory=set)  # ids of segments made of neighbours

    def calls(self, most_pages: int) -> Iterator[list[Make] | Forget]:
        """The operations in order. Segments that are made one after the other are put together, each counted as the longest of
        them, up to so many pages; 0: each is alone."""
        together: list[Make] = []
        longest = 0
        for operation in self.operations:
            if isinstance(operation, Make):
                longer = max(longest, operation.pages)
                if together and longer * (len(together) + 1) > most_pages:
                    yield together
                    together, longer = [], operation.pages
                together.append(operation)
                longest = longer
                continue
            if together:
                yield together
                together, longest = [], 0
            yield operation
        if together:
            yield together

    def withdraw(self, segment_id: int) -> bool:
        """Take back a segment that this plan was to make; false if it is not of this plan."""
        kept = [o for o in self.operations if not (isinstance(o, Make) and o.id == segment_id)]
        found = len(kept) < len(self.operations)
        self.operations = kept
        return found

    def made_for(self, row: int) -> set[int]:
        """Ids of the segments that this plan makes from pages of a row."""
        return {o.id for o in self.operations if isinstance(o, Make) and o.row == row}
