"""With `CLUSTERKV_CHECK=1`: indices that kernels turn into addresses are held inside of what they index, and counted if wrong.

An address beyond a pool ends a GPU's process, long after and far from the mistake. Here a wrong index becomes 0 before the
launch that would follow it, and a number says that there was one. The checks are operations of torch between the launches: none
waits for the device, and a graph captures them. Without the variable there are none, and no kernel is another one.

On a GPU the workspace is checked between the stages of the chain. A CPU's chain is one kernel, whose lists and tables are
checked; there a wrong index ends the layer, or the build, with an IndexError, which costs speed as any fault of ours does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

_ENTRY = (1 << 32) - 1  # of a candidate: its place in the member lists; above it, its cluster


class IndexChecks:
    """The checks of one index.

    Args:
        index: the arrays, which know the sizes of the pool.
        wrong: int64 [], on the index's device: raised by the number of wrong indices.
    """

    def __init__(self, index: ClusterIndex, wrong: torch.Tensor) -> None:
        self._index = index
        self._wrong = wrong
        self._page = index.geometry.page_size

    def hold(self, values: torch.Tensor, limit: torch.Tensor | int, listed: torch.Tensor | None = None) -> None:
        """Set those of `values` to 0 that are negative or not below `limit`, and count them; only where `listed`."""
        outside = (values < 0) | (values >= limit) & (values > 0)  # 0 is a place of everything
        if listed is not None:
            outside = outside & listed
        self._wrong += outside.sum()
        values.masked_fill_(outside, 0)

    def slots(self, slots: torch.Tensor) -> None:
        """Slots int64 [M] of a segment that is to be built."""
        with self._looked_at("a segment's slots"):
            self.hold(slots, self._index.geometry.slots)

    @contextmanager
    def _looked_at(self, what: str) -> Iterator[None]:
        """Where nothing waits for that, look at the count: raises IndexError if a check in here finds something."""
        on_cpu = self._index.device == "cpu"
        before = int(self._wrong) if on_cpu else 0
        yield
        if on_cpu and int(self._wrong) > before:
            raise IndexError(f"{int(self._wrong) - before} indices of {what} are out of range")

    def lists(self, step: SparseStep) -> None:
        """The lists of a step, counts first: they say how much of the others is read."""
        pages, segments, base = (step.pages.shape[1], step.segment_begin.shape[1], step.base_slots.shape[1])
        self.hold(step.page_count, pages + 1)
        self.hold(step.segment_count, segments + 1)
        self.hold(step.base_count, base + 1)
        self.hold(step.dense_count, pages * self._page + 1)
        dense = -(-step.dense_count // self._page)
        self.hold(step.pages, self._index.geometry.pages, _first(pages, torch.maximum(step.page_count, dense)))
        self.hold(step.segment_of_page, step.segment_count.unsqueeze(1), _first(pages, step.page_count))
        self.hold(step.segment_begin, step.page_count.unsqueeze(1), _first(segments, step.segment_count))
        self.hold(step.base_slots, self._index.geometry.slots, _first(base, step.base_count))
        if step.offset is not None:
            self.hold(step.offset, step.clusters + 1)

    def tables(self, step: SparseStep, layer: int) -> None:
        """Member lists and ends of clusters at the pages of a step, in one layer."""
        arrays, page_state = self._index.layer(layer), self._index.page_state
        listed = _first(step.pages.shape[1], step.page_count)
        pages = torch.where(listed, step.pages, 0)
        tokens = (page_state[pages, 2] * self._page).clamp_(min=0)
        slots = (pages.unsqueeze(-1) * self._page + torch.arange(self._page, device=pages.device)).flatten(1)
        for table, rows, limits in (
            (arrays.members, slots, tokens.repeat_interleave(self._page, 1)),
            (
                arrays.cluster_end,
                self._index.cluster_rows(pages).flatten(1),
                tokens.repeat_interleave(self._index.clusters_per_page, 1) + 1,
            ),
        ):
            found = table[rows]
            read = listed.repeat_interleave(rows.shape[1] // max(1, listed.shape[1]), 1)
            self.hold(found, limits.unsqueeze(-1), read.unsqueeze(-1))
            table[rows] = found

    def candidates(self, step: SparseStep, w: Workspace) -> None:
        """What select listed: clusters, and places in the member lists of a request."""
        batch, pages = step.batch, step.page_count.view(-1, 1, 1)
        self.hold(w.candidate_count[:batch], w.candidates.shape[2] + 1)
        listed = _first(w.candidates.shape[2], w.candidate_count[:batch])
        both = w.candidates[:batch]
        clusters, entries = both >> 32, both & _ENTRY
        self.hold(clusters, pages * self._index.clusters_per_page, listed)
        self.hold(entries, pages * self._page, listed)
        both.copy_(clusters << 32 | entries)

    def positions(self, step: SparseStep, w: Workspace) -> None:
        """What refine's values left: the candidates' positions."""
        listed = _first(w.position.shape[2], w.candidate_count[: step.batch])
        self.hold(w.position[: step.batch], step.page_count.view(-1, 1, 1) * self._page, listed)

    def recalled(self, step: SparseStep, w: Workspace) -> None:
        """What was recalled: slots."""
        batch, slots = step.batch, w.recalled.shape[2]
        self.hold(w.recalled_count[:batch], slots + 1)
        self.hold(w.recalled[:batch], self._index.geometry.slots, _first(slots, w.recalled_count[:batch]))

    def around(self, decode: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A layer whose lists and tables are checked before it runs; see `kernels.decode.sparse_decode`."""

        def checked(
            q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, index: ClusterIndex, layer: int, step: SparseStep,
            *of: Any, **more: Any,
        ) -> torch.Tensor:  # fmt: skip
            with self._looked_at("a step's lists or tables"):
                self.lists(step)
                self.tables(step, layer)
            return decode(q, keys, values, index, layer, step, *of, **more)

        return checked


def _first(width: int, count: torch.Tensor) -> torch.Tensor:
    """Which of `width` places are below `count` [...]: bool [..., width]."""
    return torch.arange(width, device=count.device) < count.unsqueeze(-1)
