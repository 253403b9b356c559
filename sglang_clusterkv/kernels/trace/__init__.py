"""What a layer that just ran read of one request, by its share of the mass and by position: for traces, chosen by device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_clusterkv.kernels.trace import reference

if TYPE_CHECKING:
    import torch

    from sglang_clusterkv.kernels.decode.last import LastRead
    from sglang_clusterkv.memory.tier import TierLayer


def shares(
    read: LastRead, q: torch.Tensor, keys: torch.Tensor, scale: float, tier: TierLayer | None = None
) -> reference.Shares:
    """See `reference.shares`."""
    if q.device.type == "cpu":
        from sglang_clusterkv.kernels.trace import cpu

        return cpu.shares(read, q, keys, scale, tier)
    return reference.shares(read, q, keys, scale, tier)


def placed(
    slots: torch.Tensor, count: torch.Tensor, share: torch.Tensor, pages: torch.Tensor, positions: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `reference.placed`."""
    if slots.device.type == "cpu":
        from sglang_clusterkv.kernels.trace import cpu

        return cpu.placed(slots, count, share, pages, positions, page_size)
    return reference.placed(slots, count, share, pages, positions, page_size)
