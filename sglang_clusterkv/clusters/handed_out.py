"""Which slots the allocator gave out since the last forward (rule 1: a page is unclustered from then on)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sglang_clusterkv.clusters.stream import ForwardStream
    from sglang_clusterkv.memory.index import ClusterIndex


class HandedOut:
    """What the allocator gave out since the last forward was launched: the index forgets it at the next one's head.

    Filled on the scheduler's side, applied on the forward stream: the pages may still be read by a forward in flight.
    """

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._all = False

    def add(self, slots: torch.Tensor) -> None:
        """Note slots (int64 [n]). A page that is merely continued may be among them: it is unclustered, for no
        clustered page is partial."""
        self._slots.append(slots)

    def clear(self) -> None:
        """All pages are free again."""
        self._slots.clear()
        self._all = True

    def apply(self, index: ClusterIndex, stream: ForwardStream) -> None:
        """Mark the pages unclustered at this point of the stream. What fails is kept for the next time."""
        if self._all:
            stream.run(index.invalidate_all)
            self._all = False
        if self._slots:
            stream.run(index.invalidate, torch.cat(self._slots) // index.geometry.page_size)
            self._slots.clear()
