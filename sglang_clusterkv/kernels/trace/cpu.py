"""What the layers of a step read of its traced requests, on the CPU: the chain itself notes it, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.bundle_cpu import bundle_of
from sglang_clusterkv.kernels.cpu_math import fast_exp, ones_of, part
from sglang_clusterkv.kernels.trace.reference import LEVELS_PER_OCTAVE, NOWHERE, Found, Looks, Traced

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep

_NOT_RUN = -1  # a count


class Seen(NamedTuple):
    """Of K traced requests among a step's B, in L layers; H kv heads, R recalled tokens at most."""

    number: np.ndarray  # int64 [B], which of the traced ones a request is, -1: none
    begin_of_page: np.ndarray  # int64 [K, pages], position of a page's first token; of recallable pages
    marks: np.ndarray  # uint64 [K, H, context / 64], a bit by position, for the kernel alone
    position: np.ndarray  # int32 [K, L, H, R], as `Found`
    count: np.ndarray  # int32 [K, L, H], `_NOT_RUN` in layers that did not
    level: np.ndarray  # uint8 [K, L, H, R], as `Found`
    mass: np.ndarray  # float32 [K, L, H, 3], as `Found`


def _empty(batch: int, traced: int, layers: int, heads: int, recalled: int, pages: int, context: int) -> Seen:
    by_head = (traced, layers, heads)
    return Seen(
        number=np.full(batch, -1, np.int64),
        begin_of_page=np.empty((traced, pages), np.int64),
        marks=np.empty((traced, heads, -(-context // 64)), np.uint64),
        position=np.empty((*by_head, recalled), np.int32),
        count=np.full(by_head, _NOT_RUN, np.int32),
        level=np.empty((*by_head, recalled), np.uint8),
        mass=np.empty((*by_head, 3), np.float32),
    )


def nobody() -> Any:
    """The bundle of a step without traced requests."""
    return bundle_of(_empty(0, 0, 0, 0, 0, 0, 0))


@part
def look_pair(
    b: Any, h: Any, t: Any, row: Any, estimates: Any, sinks: Any, lists: Any, n: Any, u: Any, scratch: Any, seen: Any
) -> None:  # fmt: skip
    """Note what one (request b, kv head h) read, if it is traced: after attend and merge, whose weights are in `scratch`.

    Args:
        row: of the layer, in `seen`.
        estimates: what was not recalled is estimated.
    """
    k = seen.number[b]
    if k < 0:
        return
    weights, slots, group = scratch.logits[t], scratch.slots[t], u.lse.shape[2]
    base, count = lists.base_count[b], u.recalled_count[b, h]
    one, each = np.float32(1.0), np.float32(1.0 / group)
    mass, share = seen.mass[k, row, h], np.zeros(count, np.float32)
    mass[:] = 0.0
    for g in range(group):
        exact_lse = u.exact_lse[b, h, g] if estimates else u.lse[b, h, g]
        whole_lse = u.lse[b, h, g] if estimates else max(exact_lse, u.total[b, h, g])
        of_head, of_all = weights[g], fast_exp(exact_lse - whole_lse)
        for i in range(count):
            share[i] += min(one, of_head[base + i] * of_all)
        read = fast_exp(sinks[h, g] - exact_lse)
        for i in range(base):
            read += of_head[i]
        exact = min(one, of_all)
        read = min(read * of_all, exact)
        if exact == exact and read == read:  # what is not a number counts as 0
            mass[0] += read * each
            mass[1] += (exact - read) * each
            mass[2] += (one - exact) * each
    marks, begin_of_page = seen.marks[k, h], seen.begin_of_page[k]
    position, level = seen.position[k, row, h], seen.level[k, row, h]
    marks[:] = 0
    for i in range(count):
        page = slots[base + i] // n.page_size
        slots[base + i] += begin_of_page[page] - page * n.page_size
        marks[slots[base + i] >> 6] |= np.uint64(1) << np.uint64(slots[base + i] & 63)
    before = np.empty(len(marks), np.int32)
    found = np.int32(0)
    for word in range(len(marks)):
        before[word] = found
        found += ones_of(marks[word])
    for i in range(count):
        at = slots[base + i]
        lower = marks[at >> 6] & ((np.uint64(1) << np.uint64(at & 63)) - np.uint64(1))
        place = before[at >> 6] + ones_of(lower)
        value = np.rint(255 + LEVELS_PER_OCTAVE * np.log2(share[i] * each))
        position[place] = at
        level[place] = np.uint8(min(max(value, 0.0), 255.0)) if value == value else np.uint8(0)
    position[count:] = NOWHERE
    level[count:] = 0
    seen.count[k, row, h] = count


class CpuLooks(Looks):
    """See `Looks`: the index has what the chain needs while the layers run."""

    at_layers = False

    def __init__(self, index: ClusterIndex, step: SparseStep, requests: Sequence[Traced]) -> None:
        super().__init__(index, step, requests)
        geometry, page_size = index.geometry, index.geometry.page_size
        self._seen = _empty(
            step.batch,
            len(requests),
            len(index.row_of),
            geometry.kv_heads,
            min(index.config.budget_tokens, step.recallable_tokens),
            1 + max(int(request.pages.max()) for request in requests),
            page_size + max(int(request.positions[-1]) for request in requests),
        )
        for number, request in enumerate(requests):
            self._seen.number[request.place] = number
            self._seen.begin_of_page[number, request.pages.numpy()] = request.positions
        index.watched = step, bundle_of(self._seen)

    def look(self, *read: Any) -> None:
        """See `Looks`: the chain has done it."""

    def end(self) -> None:
        """See `Looks`."""
        self._index.watched = None

    def found(self, number: int) -> tuple[tuple[int, ...], Found] | None:
        """See `Looks`."""
        seen = self._seen
        ran = np.flatnonzero(seen.count[number].min(-1) > _NOT_RUN)
        if not ran.size:
            return None
        layers, parts = tuple(self._index.row_of), (seen.position, seen.count, seen.level, seen.mass)
        position, count, level, mass = (torch.from_numpy(part[number]) for part in parts)
        if ran.size < len(layers):
            position, count, level, mass = (part[ran] for part in (position, count, level, mass))
        return tuple(layers[row] for row in ran.tolist()), Found(position, count, level, mass.to(torch.float16))
