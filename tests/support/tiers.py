"""A scene's pages in two tiers, written through the directory, with poison wherever nothing is held."""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels import tier as moves
from sglang_clusterkv.memory.tier import Tier
from tests.support.scenes import PAGE, Scene


def tiered(scene: Scene, host_dtype: str) -> Tier:
    """The scene's pages, written through a tier that keeps a third of them on the device, poison elsewhere."""
    pages = scene.index.geometry.pages
    ring = min(8, pages // 12)
    shape = ((pages // 3 + 1) * PAGE, *scene.keys[0].shape[1:])
    buffers = [torch.full(shape, torch.nan, dtype=scene.keys[0].dtype) for _ in range(2 * len(scene.keys))]
    layers = len(scene.keys)
    tier = Tier(buffers[:layers], buffers[layers:], page_size=PAGE, pages=pages, ring_pages=ring, host_dtype=host_dtype)
    for rows in tier.host.rows:
        rows[1:] = 0xFF  # NaN, in every format
    for buffer in buffers:
        buffer[:PAGE] = 0
    directory = tier.directory
    order = torch.randperm(pages - 1, generator=torch.Generator().manual_seed(3)) + 1
    for launch, some in enumerate(order.split(ring)):
        directory.map(some, launch << 20)
        slots = (some.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()
        at = directory.translate(slots)
        for buffer, rows in zip(buffers, (*scene.keys, *scene.values), strict=True):
            buffer[at] = rows[slots]
        count = directory.ring_pages - directory.ring_level
        moves.refill(tier, count, directory.tail, torch.zeros(0, dtype=torch.int64))
        directory.filled(count)
    for buffer in buffers:
        buffer.view(torch.uint8).unflatten(0, (-1, PAGE))[directory.page_of < 0] = 0xFF  # NaN too
        buffer[:PAGE] = 0
    assert 0 < int((directory.device_page > 0).sum()) < pages // 3
    return tier


def tier_on(tier: Tier, device: str) -> Tier:
    """The same tier, with its own buffers, tables and host rows, on a device."""
    directory, host = tier.directory, tier.host
    keys, values = ([buffer.to(device, copy=True) for buffer in buffers] for buffers in (tier.keys, tier.values))
    moved = Tier(
        keys,
        values,
        page_size=directory.page_size,
        pages=directory.logical_pages + 1,
        ring_pages=directory.ring_pages,
        host_dtype=host.host_dtype,
    )
    for name in ("device_page", "page_of", "stored", "touch", "ring"):
        getattr(moved.directory, name).copy_(getattr(directory, name))
    moved.directory.head, moved.directory.ring_level = directory.head, directory.ring_level
    for own, rows in zip(moved.host.rows, host.rows, strict=True):
        own.copy_(rows)
    return moved
