"""What the host knows of each running request: its lengths and the segments that its last walk saw.

A *row* is a line of SGLang's req_to_token. The tables here are numpy arrays indexed by row, so that a decode step looks up
all of its requests at once.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

NEVER = int(np.iinfo(np.int32).max)  # a position that no token has
_COLUMNS = 16  # at first


class Segment(NamedTuple):
    """A segment that a row sees whole."""

    id: int
    begin: int  # token position of its first token
    end: int

    @property
    def tokens(self) -> int:
        """Tokens of the segment."""
        return self.end - self.begin


class Extend(NamedTuple):
    """One request of a prefill batch, as the scheduler launches it."""

    row: int
    rid: str
    prefix_tokens: int  # tokens whose KV existed before this chunk
    end_tokens: int  # tokens whose KV exists after it
    prompt_len: int
    last_chunk: bool


class DenseReason(enum.IntEnum):
    """Why a decode step of a request goes the dense way."""

    SHORT = 1  # seq_len < dense_below_tokens
    BUDGET = 2  # the budget covers all clustered tokens
    DIRTY = 3  # the row was rewritten or never walked
    WINDOW = 4  # sinks, gaps and window are too many beside what is clustered
    SLIDING = 5  # the layer has a sliding window
    LOGIT_CAP = 6  # the layer caps its logits
    SHARED_KV = 7  # the layer reads another layer's KV
    FIRST_LAYERS = 8  # below dense_layers
    FAULT = 9  # our own code failed for it: counted in `faults`, looked at again later
    FASTER = 10  # on a GPU the whole batch has too few clustered tokens: dense is likely faster


@dataclass(eq=False)
class Row:
    """One running request.

    Attributes:
        row: line of req_to_token.
        prompt_len: tokens to prefill (a retracted request's include its output).
        found_end: tokens that the radix match (or a rewrite) gave it; the rest it wrote itself.
        length: tokens whose KV is written once the last launched forward has run.
        prefilling: the last chunk has not been launched.
        dirty: decodes densely until walked.
        changed: counts rewrites; a snapshot from before a change is void.
        void_from: token position from which on a snapshot under way is void.
        segments: what the last walk saw whole, ascending.
        walked: was walked at least once.
        prompt_walked: was walked, and its segments merged, since its last chunk was launched.
        failures: times in a row that a segment of its last plan was not made.
        waits_from: token position from which own tokens wait to become a segment.
        cached_tokens, clustered_tokens, reused_tokens: for the log and the counters.
    """

    row: int
    prompt_len: int
    found_end: int
    length: int
    prefilling: bool = True
    dirty: bool = True
    changed: int = 0
    void_from: int = NEVER
    segments: list[Segment] = field(default_factory=list)
    rid: str = ""
    cached_tokens: int = 0
    clustered_tokens: int = 0
    reused_tokens: int = 0
    walked: bool = False
    prompt_walked: bool = False
    announced: bool = False
    failures: int = 0
    waits_from: int = 0


class RowTables:
    """Segment borders of all rows as arrays, for one vectorised look-up per decode step.

    Their columns, a segment each, are as many as some row has needed: a model's longest context would take many more.

    Args:
        rows: lines of req_to_token.
        window_tokens: the window's least length.
    """

    def __init__(self, rows: int, window_tokens: int) -> None:
        self.window_tokens = window_tokens
        self.known = np.zeros(rows, bool)
        self.dirty = np.zeros(rows, bool)
        self.begin = np.full((rows, _COLUMNS), NEVER, np.int32)
        self.end = np.full((rows, _COLUMNS), NEVER, np.int32)
        self.covered = np.zeros((rows, _COLUMNS + 1), np.int32)  # tokens of the first i segments
        self.ids = np.full((rows, _COLUMNS), -1, np.int32)
        self.waits_from = np.zeros(rows, np.int32)
        self.exact = np.full(rows, NEVER, np.int32)  # tokens before the first whose KV follows a sparse step
        self.look_from = np.zeros(rows, np.int64)  # launch from which a row may be looked at, after a fault

    def write(self, row: Row) -> None:
        """Publish a row's record to the decode steps that are launched from now on."""
        count = len(row.segments)
        while count > self.begin.shape[1]:
            self._widen()
        borders = np.array([(s.begin, s.end) for s in row.segments], np.int32).reshape(-1, 2)
        self.known[row.row] = True
        self.dirty[row.row] = row.dirty
        self.waits_from[row.row] = row.waits_from
        self.begin[row.row] = NEVER
        self.end[row.row] = NEVER
        self.begin[row.row, :count] = borders[:, 0]
        self.end[row.row, :count] = borders[:, 1]
        self.ids[row.row, :count] = [segment.id for segment in row.segments]
        lengths = borders[:, 1] - borders[:, 0]
        self.covered[row.row, 0] = 0
        self.covered[row.row, 1 : count + 1] = np.cumsum(lengths)

    def _widen(self) -> None:
        """Twice the columns."""
        more = ((0, 0), (0, self.begin.shape[1]))
        self.begin = np.pad(self.begin, more, constant_values=NEVER)
        self.end = np.pad(self.end, more, constant_values=NEVER)
        self.covered = np.pad(self.covered, more)
        self.ids = np.pad(self.ids, more, constant_values=-1)

    def clear(self) -> None:
        """All rows were freed."""
        self.known[:] = False
        self.look_from[:] = 0
        self.exact[:] = NEVER

    def drop(self, row: int) -> None:
        """The row was freed."""
        self.known[row] = False
        self.look_from[row] = 0
        self.exact[row] = NEVER

    def recallable(self, rows: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
        """How many leading segments of each row end before the window, int64 [B]: the others are attended whole."""
        return (self.end[rows] <= (seq_lens - self.window_tokens)[:, None]).sum(1)
