"""What the allocator gave out and took back since the last forward (rule 1: a page is unclustered from then on)."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from sglang_clusterkv.clusters.stream import ForwardStream
    from sglang_clusterkv.memory.index import ClusterIndex


class PageEvent(enum.Enum):
    """What happened to pages."""

    NEW = enum.auto()  # left the free list
    FREED = enum.auto()  # came back to it
    CLEARED = enum.auto()  # all did


class PageEvents(NamedTuple):
    """The same happened to these pages."""

    event: PageEvent
    pages: list[torch.Tensor]  # int64 [n] each


class HandedOut:
    """What the allocator gave out since the last forward was launched: the index forgets it at the next one's head.

    Filled on the scheduler's side, applied on the forward stream: the pages may still be read by a forward in flight. With a
    host tier the allocator also notes which pages left its free list and which came back, in the order of these events.
    """

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []
        self._all = False
        self._pages: list[PageEvents] = []

    def add(self, slots: torch.Tensor, new_pages: torch.Tensor | None = None) -> None:
        """Note slots (int64 [n]). A page that is merely continued may be among them: it is unclustered, for no
        clustered page is partial. With a host tier, new_pages: int64 [n], the pages that left the free list for them."""
        self._slots.append(slots)
        if new_pages is not None and new_pages.numel():
            self._note(PageEvent.NEW, new_pages)

    def freed(self, pages: torch.Tensor) -> None:
        """Pages (int64 [n]) came back to the free list. Only with a host tier, whose engine takes the notes."""
        if pages.numel():
            self._note(PageEvent.FREED, pages)

    def clear(self) -> None:
        """All pages are free again."""
        self._slots.clear()
        self._all = True
        self._pages = [PageEvents(PageEvent.CLEARED, [])]

    def _note(self, event: PageEvent, pages: torch.Tensor) -> None:
        if not self._pages or self._pages[-1].event is not event:
            self._pages.append(PageEvents(event, []))
        self._pages[-1].pages.append(pages)

    def apply(self, index: ClusterIndex, stream: ForwardStream) -> None:
        """Mark the pages unclustered at this point of the stream. What fails is kept for the next time."""
        if self._all:
            stream.run(index.invalidate_all)
            self._all = False
        if self._slots:
            stream.run(index.invalidate, torch.cat(self._slots) // index.geometry.page_size)
            self._slots.clear()

    def take_pages(self) -> list[PageEvents]:
        """What happened to pages since this was asked last, in order."""
        taken, self._pages = self._pages, []
        return taken
