"""What a layer read of one request, by its share of the mass and by position (docs/explain.md): the definition, on any device.

Nothing here waits for the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sglang_clusterkv.memory.step import to_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from sglang_clusterkv.kernels.trace.last import LastRead
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer


LEVELS_PER_OCTAVE = 8  # of a weight: 255 is all of the mass, eight less is half as much
NOWHERE = torch.iinfo(torch.int32).max  # a position beyond the count


class Traced(NamedTuple):
    """A request of a step that is traced."""

    place: int  # in the step's lists
    pages: torch.Tensor  # int64 [N], those of its recallable segments, in their order in the request
    positions: np.ndarray  # int64 [N], of their first tokens


class Found(NamedTuple):
    """What a step read of one request; L layers, H kv heads, R recalled tokens at most."""

    positions: torch.Tensor  # int32 [L, H, R], ascending, `NOWHERE` beyond the count
    count: torch.Tensor  # int32 [L, H]
    levels: torch.Tensor  # uint8 [L, H, R], of the shares there; 0 beyond the count
    mass: torch.Tensor  # float16 [L, H, 3], as `Shares`


class Looks:
    """A step with traced requests, looked at layer by layer.

    Args:
        index: that the layers read.
        step: its lists.
        requests: those that are traced.
    """

    at_layers = True  # whether `look` has to be called

    def __init__(self, index: ClusterIndex, step: SparseStep, requests: Sequence[Traced]) -> None:
        self._index = index
        self._step = step
        self._requests = requests
        self._layers: list[int] = []
        self._shares: list[list[Shares]] = [[] for _ in requests]

    def look(
        self, read: Callable[[int], LastRead], q: torch.Tensor, keys: torch.Tensor, layer: int, scale: float,
        tier: TierLayer | None = None,
    ) -> None:  # fmt: skip
        """A layer has run.

        Args:
            read: what it read of the request at a place in the lists.
            q: [B, H, G, D], queries of all requests in the lists.
            keys: [slots, H, D], the layer's pool.
            layer: counted from this rank's first.
            scale: of the logits.
            tier: where some slots' keys are on the host.
        """
        self._layers.append(layer)
        for request, found in zip(self._requests, self._shares, strict=True):
            found.append(shares(read(request.place), q[request.place], keys, scale, tier))

    def end(self) -> None:
        """The layers of the step were launched."""

    def found(self, number: int) -> tuple[tuple[int, ...], Found] | None:
        """The layers that ran, and what they read of one of the requests; None: none ran."""
        if not self._layers:
            return None
        slots, count, share, mass = (torch.stack(part) for part in zip(*self._shares[number], strict=True))
        pages, order = self._requests[number].pages.sort()
        positions = to_device(self._requests[number].positions, pages.device.type)[order]
        position, level = placed(slots, count, share, pages, positions, self._index.geometry.page_size)
        return tuple(self._layers), Found(position, count, level, mass.to(torch.float16))


class Shares(NamedTuple):
    """Of one request in one layer; means over the query heads of a kv head."""

    slots: torch.Tensor  # int64 [H, R], what was recalled; 0 beyond the count
    count: torch.Tensor  # int32 [H]
    share: torch.Tensor  # float32 [H, R], of the whole mass; anything beyond the count
    mass: torch.Tensor  # float32 [H, 3], shares of the base, of what was recalled, and of the rest


def shares(read: LastRead, q: torch.Tensor, keys: torch.Tensor, scale: float, tier: TierLayer | None = None) -> Shares:
    """Shares of what the chain's last layer read.

    Args:
        read: of the request.
        q: [H, G, D], its queries.
        keys: [slots, H, D], the layer's pool.
        scale: of the logits.
        tier: where some slots' keys are on the host.
    """
    heads = torch.arange(len(q), device=q.device).unsqueeze(1)
    real = torch.arange(read.recalled.shape[1], device=q.device) < read.count.unsqueeze(1)
    slots = read.recalled.where(real, 0)
    rows = keys[slots, heads] if tier is None else tier.gather(keys, 0, slots, heads)
    logits = scale * torch.matmul(q.float(), rows.float().transpose(1, 2))  # [H, G, R]
    share = (logits - read.whole_lse.unsqueeze(-1)).exp().clamp(max=1.0).mean(1)
    exact = (read.exact_lse - read.whole_lse).exp().clamp(max=1.0)
    base = torch.minimum((read.base_logit.logsumexp(-1) - read.whole_lse).exp(), exact)
    mass = torch.stack((base, exact - base, 1.0 - exact), -1).mean(1).nan_to_num(0.0)
    return Shares(slots, read.count.clone(), share, mass)


def placed(
    slots: torch.Tensor, count: torch.Tensor, share: torch.Tensor, pages: torch.Tensor, positions: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What was recalled, by position.

    Args:
        slots: int64 [L, H, R], of some layers, each on one of the pages.
        count: int32 [L, H].
        share: float32 [L, H, R].
        pages: int64 [N], ascending.
        positions: int64 [N], of their first tokens.
        page_size: tokens per page.

    Returns:
        int32 [L, H, R], ascending, `NOWHERE` beyond the count; and uint8 [L, H, R], the levels of the shares there.
    """
    page = slots // page_size
    at = torch.searchsorted(pages, page).clamp(max=len(pages) - 1)
    real = torch.arange(slots.shape[2], device=slots.device) < count.unsqueeze(2)
    position = (positions[at] + slots - page * page_size).where(real, NOWHERE)
    position, order = position.to(torch.int32).sort(-1)
    return position, levels(share.gather(2, order)).where(real, 0)


def levels(share: torch.Tensor) -> torch.Tensor:
    """Shares of a mass, float32 in [0, 1], as uint8: 255 is 1, each level down a factor of 2^(1/8), 0 is none."""
    found = (255 + LEVELS_PER_OCTAVE * share.log2()).round()
    return found.nan_to_num(0.0, posinf=255.0, neginf=0.0).clamp(0, 255).to(torch.uint8)
