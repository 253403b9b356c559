"""Which pages Quest (arXiv 2406.10774) would read in a step that recalls: for traces that ask for it, on any device.

Quest ranks pages by an upper bound of their logits, from each channel's least and largest key. Nothing here waits for the
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_clusterkv.memory.fp8 import pool_rows
from sglang_clusterkv.memory.step import to_device

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import TierLayer


class PageBounds:
    """The least and the largest key by channel of a request's pages in one layer, taken once when a page can be recalled.

    Args:
        page_size: tokens per page.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._known = np.zeros(0, bool)  # by a page's number in its request
        self._bounds: torch.Tensor | None = None  # float32 [pages, 2, H, D]: least, largest

    def see(self, numbers: np.ndarray, pages: torch.Tensor, keys: torch.Tensor, tier: TierLayer | None = None) -> None:
        """Note pages that were not seen yet.

        Args:
            numbers: int64 [N], of the pages in their request, ascending.
            pages: int64 [N], where the pool has them.
            keys: [slots, H, D], the layer's pool.
            tier: where some pages' keys are on the host.
        """
        if numbers.size and numbers[-1] >= len(self._known):
            room = 2 * (int(numbers[-1]) + 1)
            bounds = torch.empty((room, 2, *keys.shape[1:]), dtype=torch.float32, device=keys.device)
            if self._bounds is not None:
                bounds[: len(self._known)] = self._bounds
            self._known = np.concatenate((self._known, np.zeros(room - len(self._known), bool)))
            self._bounds = bounds
        new = np.flatnonzero(~self._known[numbers])
        if self._bounds is None or not new.size:
            return
        device = keys.device.type
        slots = pages[to_device(new, device), None] * self._page_size + torch.arange(self._page_size, device=device)
        rows = pool_rows(keys, slots) if tier is None else tier.gather(keys, 0, slots)
        rows = rows.float()
        self._bounds[to_device(numbers[new], device)] = torch.stack((rows.amin(1), rows.amax(1)), 1)
        self._known[numbers[new]] = True

    def chosen(self, q: torch.Tensor, numbers: np.ndarray, count: int) -> torch.Tensor:
        """The pages with the largest bounds, mean over the query heads of a kv head; ties go to the lower page.

        Args:
            q: [H, G, D], queries.
            numbers: int64 [N], of pages that were seen, ascending.
            count: how many, at most N.

        Returns:
            int32 [H, count], numbers, ascending.
        """
        assert self._bounds is not None, "no page was seen"
        numbers_there = to_device(numbers, q.device.type)
        least, largest = self._bounds[numbers_there].permute(1, 2, 3, 0)  # [H, D, N] each
        wide = q.float()
        # max(q least, q largest) by channel: the positive part of q meets the largest key, the negative one the least.
        bound = torch.matmul(wide.clamp(min=0), largest) + torch.matmul(wide.clamp(max=0), least)
        best = bound.mean(1).argsort(dim=-1, descending=True, stable=True)[:, :count]
        return numbers_there[best].sort(-1).values.to(torch.int32)
