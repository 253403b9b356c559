"""What moves keys and values between a pool's two tiers: whole pages down and up, and rows of either to where a kernel reads.

All of it is device work of a forward's head or of a prefill's layer, in launch order; on a GPU nothing waits for the device.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.kernels.tier import reference

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import Tier


def _for(tier: Tier) -> ModuleType:
    if tier.device == "cuda":
        from sglang_clusterkv.kernels.tier import triton

        return triton
    return reference


def refill(tier: Tier, count: int, tail: int, pinned: torch.Tensor, clean_only: bool = False) -> int:
    """Take the `count` device pages of least value from their pages and append them to the ring at `tail`.

    Where it raises before its end nothing has left the device, and host rows that were written are those of their pages.

    Args:
        tier: of the pool.
        count: at most as many pages as are neither in the ring nor pinned.
        tail: the ring's place, as of the launch.
        pinned: int64 [n], logical pages that stay.
        clean_only: take only pages that are free or stored; waits for the device.

    Returns:
        The pages appended: `count`, or fewer with `clean_only`.
    """
    directory = tier.directory
    victims = directory.victims(count, pinned, clean_only)
    pages = directory.pages_on(victims)
    unsaved = (pages > 0) & ~directory.stored.index_select(0, pages)
    _for(tier).store(tier, torch.where(unsaved, pages, 0), victims)
    directory.drop(victims)
    directory.append(victims, tail)
    tier.stored_pages += unsaved.sum()
    tier.refills += 1
    return victims.numel()


def bring(tier: Tier, pages: torch.Tensor, first: int) -> None:
    """Pages (int64 [n]) that the forward writes to, but were not handed out to it, get device copies.

    Args:
        tier: of the pool.
        pages: different ones, full or partial.
        first: the place in the ring from which one page each was taken; those not needed are free afterwards.
    """
    _for(tier).fetch(tier, pages, tier.directory.missing(pages, first))


def store(tier: Tier, pages: torch.Tensor, device_pages: torch.Tensor) -> None:
    """Write host rows of pages, all layers.

    Args:
        tier: of the pool.
        pages: int64 [n], different logical pages; 0: nothing is written.
        device_pages: int64 [n], where each is on the device.
    """
    _for(tier).store(tier, pages, device_pages)


def fetch(tier: Tier, pages: torch.Tensor, device_pages: torch.Tensor) -> None:
    """Copy host rows of pages to the device, all layers.

    Args:
        tier: of the pool.
        pages: int64 [n], logical.
        device_pages: int64 [n], where each goes, different ones; 0: nothing is copied.
    """
    _for(tier).fetch(tier, pages, device_pages)


def gather(
    tier: Tier, first_layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kind: int
) -> None:
    """Copy the rows of listed tokens, of all kv heads, from either tier.

    Args:
        tier: of the pool.
        first_layer: of those copied, counted from this rank's first.
        slots: int64 [n], logical.
        keys: [layers, n, H, D] in the pool's dtype, contiguous from n on; rows of int8 are rounded to it.
        values: likewise.
        kind: one of `memory.tier.Reads`: as what rows of the host are counted.
    """
    _for(tier).gather(tier, first_layer, slots, keys, values, kind)
