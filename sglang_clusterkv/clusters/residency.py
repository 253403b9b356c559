"""What a pool with a host tier needs at the head of a forward: device pages for what it writes, and free ones for the next.

    what was freed is unmapped, what was handed out mapped | (the engine forgets and builds) | the ring is filled again

The host knows how many device pages a forward takes, never which pages are resident. A page is pinned while somebody may write
to it: the last page of every row that is held, what was handed out to this forward, and pages that its rows go on in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_clusterkv.clusters.handed_out import HandedOut, PageEvent
from sglang_clusterkv.kernels import tier as moves
from sglang_clusterkv.memory.directory import stamp
from sglang_clusterkv.memory.step import to_device

if TYPE_CHECKING:
    from sglang_clusterkv.clusters.counters import Faults
    from sglang_clusterkv.clusters.rows import Extend
    from sglang_clusterkv.clusters.stream import ForwardStream
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.memory.tier import Tier, TierLayer

TOUCH_EVERY = 16  # launches after which the pages that running rows always attend to count as new again


class Residency:
    """A pool whose pages are all on the device: nothing to do. `TieredResidency` is the other one."""

    def extend(self, extends: list[Extend]) -> None:
        """A prefill batch is launched: its new pages get device pages."""

    def decode(self, rows: np.ndarray, seq_lens: np.ndarray) -> None:
        """A decode batch is launched: its new pages get device pages. Both int64 [B], on the host."""

    def refill(self) -> bool:
        """Fill the ring now, on the forward stream, at a head or between two; whether it is full."""
        return True

    def fill(self) -> None:
        """The head's last device work but for the snapshot: the ring is filled for the next forward."""

    def row_freed(self, row: int) -> None:
        """The row's request ended."""

    def rows_cleared(self) -> None:
        """All rows were freed."""

    def layer(self, layer: int) -> dict[str, TierLayer]:
        """What readers of a layer's keys and values take by name, besides its buffers."""
        return {}

    def server_info(self) -> dict[str, object]:
        """Its part of the engine's."""
        return {}


class TieredResidency(Residency):
    """Keeps a tier's directory in step with the forwards.

    Args:
        tier: of the pool.
        config: what a running row always attends to.
        req_to_token: int32 [rows, max_context].
        handed_out: the allocator's notes.
        stream: takes the device's work.
        faults: notes refills that failed, as "offload".
    """

    def __init__(
        self,
        tier: Tier,
        config: ClusterKVConfig,
        req_to_token: torch.Tensor,
        handed_out: HandedOut,
        stream: ForwardStream,
        faults: Faults,
    ) -> None:
        self._tier, self._directory = tier, tier.directory
        self._page_size = tier.directory.page_size
        self._req_to_token, self._handed_out, self._stream, self._faults = req_to_token, handed_out, stream, faults
        # Not the planner's records, which faults drop: a partial page that left would swallow the next token's KV.
        self._lengths = np.zeros(len(req_to_token), np.int64)  # tokens of a row once the last launched forward has run
        self._new: list[torch.Tensor] = []  # pages handed out to the forward that is about to run
        self._brought: list[tuple[np.ndarray, np.ndarray]] = []  # rows and positions of pages that it goes on in
        self._launch = 0
        self._failed = False  # the last refill
        # Positions from a row's end that a step always attends to, a page each; sinks from its begin.
        tail = config.window_tokens + config.recluster_every + self._page_size
        self._sinks = np.arange(0, config.sink_tokens, self._page_size)
        self._tail = np.arange(0, tail, self._page_size)

    def extend(self, extends: list[Extend]) -> None:
        """A prefill batch is launched: its new pages get device pages."""
        self._map()
        page_size, lengths = self._page_size, self._lengths
        rows = np.array([extend.row for extend in extends], np.int64)
        begins = np.array([extend.prefix_tokens for extend in extends], np.int64)
        ends = np.array([extend.end_tokens for extend in extends], np.int64)
        # Pages that these write to and did not get now: a session's next turn goes on in its row's last page, or before.
        goes_on = (begins % page_size > 0) | (lengths[rows] > begins)
        first_time = lengths[rows] == 0
        lengths[rows] = ends
        if goes_on.any():
            self._bring(rows[goes_on], begins[goes_on])
        # What was found and what is written now counts as of this launch; of one row the earliest positions leave first.
        first = np.where(first_time, 0, begins // page_size)
        counts = -(-ends // page_size) - first
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)
        self._touch(np.repeat(rows, counts), place * page_size)

    def decode(self, rows: np.ndarray, seq_lens: np.ndarray) -> None:
        """A decode batch is launched: its new pages get device pages."""
        self._map()
        self._lengths[rows] = seq_lens
        if self._launch % TOUCH_EVERY == 0:
            tail = np.maximum((seq_lens - 1)[:, None] - self._tail, 0) // self._page_size * self._page_size
            at = np.concatenate((np.minimum(self._sinks, (seq_lens - 1)[:, None]), tail), 1)
            # As the latest of this launch: what is always attended to leaves last.
            self._touch(np.repeat(rows, at.shape[1]), at.ravel(), latest=True)

    def fill(self) -> None:
        """The ring is filled for the next forward; where that fails it is tried again at the next head."""
        self.refill()
        self._new.clear()
        self._brought.clear()

    def refill(self) -> bool:
        """Fill the ring now, on the forward stream, at a head or between two; whether it is full.

        A failure is counted and costs nothing but room for the next forward: no page has left the device.
        """
        directory = self._directory
        count = self._wanted()
        if count:
            try:
                rows = np.flatnonzero(self._lengths)
                written = [(rows, self._lengths[rows] - 1), *self._brought]
                last = self._at(*(np.concatenate(parts) for parts in zip(*written, strict=True)))
                if self._failed:
                    # Storing may be what fails: first what needs none. A wait that only a failure costs.
                    self._stream.event().synchronize()
                    directory.filled(self._fill(count, directory.tail, last, list(self._new), True))
                    count = self._wanted()
                if count:
                    self._stream.run(self._fill, count, directory.tail, last, list(self._new))
                    directory.filled(count)
                self._failed = False
            except Exception as error:
                self._failed = True
                self._faults.note("offload", error)
        return directory.ring_level == directory.ring_pages

    def _wanted(self) -> int:
        """Pages that the ring lacks and that surely can leave: known without a look at the tables."""
        directory = self._directory
        pinned = np.count_nonzero(self._lengths) + sum(pages.numel() for pages in self._new)
        pinned += sum(len(rows) for rows, _ in self._brought)
        movable = directory.device_pages - directory.ring_level - int(pinned)
        return max(0, min(directory.ring_pages - directory.ring_level, movable))

    def _fill(
        self, count: int, tail: int, last: torch.Tensor, new: list[torch.Tensor], clean_only: bool = False
    ) -> int:
        """Device work of `refill`."""
        return moves.refill(self._tier, count, tail, torch.cat((self._pages(last), *new)), clean_only)

    def row_freed(self, row: int) -> None:
        """The row's request ended."""
        self._lengths[row] = 0

    def rows_cleared(self) -> None:
        """All rows were freed."""
        self._lengths[:] = 0

    def layer(self, layer: int) -> dict[str, TierLayer]:
        """What readers of a layer's keys and values take by name, besides its buffers."""
        return {"tier": self._tier.layer(layer)}

    def server_info(self) -> dict[str, object]:
        """Its part of the engine's."""
        return {"host_tier": self._tier.server_info()}

    def _map(self) -> None:
        """Apply the allocator's notes. Nothing here may fail: the forward would write to no page, and nobody would know."""
        self._launch += 1
        directory = self._directory
        for event, parts in self._handed_out.take_pages():
            if event is PageEvent.CLEARED:
                directory.emptied()
                self._new.clear()
                self._brought.clear()
                self._stream.run(directory.clear_tables)
                continue
            pages = parts[0] if len(parts) == 1 else torch.cat(parts)
            if event is PageEvent.FREED:
                self._stream.run(directory.unmap, pages)
                continue
            self._stream.run(directory.put, pages, self._take(pages.numel()), stamp(self._launch))
            self._new.append(pages)

    def _take(self, pages: int) -> int:
        """Places in the ring; where it is short, because a refill failed, after one more."""
        if pages > self._directory.ring_level:
            self.refill()
        return self._directory.take(pages)

    def _bring(self, rows: np.ndarray, positions: np.ndarray) -> None:
        """Rows are about to be written at positions whose pages they have already."""
        first = self._take(len(rows))
        self._brought.append((rows, positions))
        self._stream.run(self._bring_pages, self._at(rows, positions), first)

    def _bring_pages(self, at: torch.Tensor, first: int) -> None:
        moves.bring(self._tier, self._pages(at), first)

    def _touch(self, rows: np.ndarray, positions: np.ndarray, latest: bool = False) -> None:
        """Pages of rows at positions count as of this launch. Only their order hangs on it, so it may fail."""
        try:
            places = positions // self._page_size
            touches = np.full(len(rows), stamp(self._launch)) if latest else stamp(self._launch, 0) + places
            self._stream.run(self._note, self._at(rows, positions), to_device(touches, self._req_to_token.device.type))
        except Exception as error:
            self._faults.note("offload", error)

    def _note(self, at: torch.Tensor, touches: torch.Tensor) -> None:
        self._directory.note(self._pages(at), touches)

    def _at(self, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Places in req_to_token, int64 [2, n]."""
        return to_device(np.stack((rows, positions)), self._req_to_token.device.type)

    def _pages(self, at: torch.Tensor) -> torch.Tensor:
        """Device work: the pages at places in req_to_token, int64 [n]."""
        return torch.div(self._req_to_token[at[0], at[1]].long(), self._page_size, rounding_mode="floor")


def residency_of(
    tier: Tier | None,
    config: ClusterKVConfig,
    req_to_token: torch.Tensor,
    handed_out: HandedOut,
    stream: ForwardStream,
    faults: Faults,
) -> Residency:
    """A pool's, with or without a host tier; the arguments of `TieredResidency`."""
    return Residency() if tier is None else TieredResidency(tier, config, req_to_token, handed_out, stream, faults)
