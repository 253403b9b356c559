"""Moves between the tiers of a pool on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.memory.fp8 import as_stored

if TYPE_CHECKING:
    from sglang_clusterkv.memory.tier import Tier


def store(tier: Tier, pages: torch.Tensor, device_pages: torch.Tensor) -> None:
    """See `kernels.tier.store`."""
    written = pages > 0
    if not bool(written.any()):
        return
    saved, at = pages[written], device_pages[written]
    for layer, (keys, values) in enumerate(zip(tier.keys, tier.values, strict=True)):
        tier.host.store(layer, saved, _pages(tier, keys).index_select(0, at), _pages(tier, values).index_select(0, at))


def fetch(tier: Tier, pages: torch.Tensor, device_pages: torch.Tensor) -> None:
    """See `kernels.tier.fetch`."""
    read = device_pages > 0
    if not bool(read.any()):
        return
    for layer, buffers in enumerate(zip(tier.keys, tier.values, strict=True)):
        for buffer, rows in zip(buffers, tier.host.load(layer, pages[read]), strict=True):
            as_stored(_pages(tier, buffer)).index_copy_(0, device_pages[read], as_stored(rows))


def gather(
    tier: Tier, first_layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kind: int
) -> None:
    """See `kernels.tier.gather`."""
    for i in range(len(keys)):
        layer = first_layer + i
        keys[i] = tier.layer(layer).gather(tier.keys[layer], 0, slots)
        values[i] = tier.layer(layer).gather(tier.values[layer], 1, slots)
        tier.layer(layer).count(kind, slots)


def _pages(tier: Tier, buffer: torch.Tensor) -> torch.Tensor:
    """A buffer by device pages, [d + 1, page_size, H, D]."""
    return buffer.unflatten(0, (-1, tier.directory.page_size))
