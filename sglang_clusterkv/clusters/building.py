"""Device work of a plan: its segments are made, several in one call where that saves launches."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.clusters.counters import Counters, Faults
from sglang_clusterkv.clusters.planning.plan import Make
from sglang_clusterkv.memory.index import UNCLUSTERED, ClusterIndex
from sglang_clusterkv.memory.tier import Tier

logger = logging.getLogger(__name__)


class Builder:
    """Makes the segments of plans.

    Args:
        index: the index to write.
        req_to_token: int32 [rows, max_context].
        key_buffers: the pool's keys, one [slots, kv_heads, head_dim] per layer.
        value_buffers: likewise.
        counters: raised after a segment was made.
        faults: told of what failed.
        lost: called with the ids of segments that were not made.
        tier: of the pool, if it is in two tiers.

    Attributes:
        most_pages: of the segments of one call together, where it has more than one; 0: each is made alone.
    """

    def __init__(
        self,
        index: ClusterIndex,
        req_to_token: torch.Tensor,
        key_buffers: list[torch.Tensor],
        value_buffers: list[torch.Tensor],
        counters: Counters,
        faults: Faults,
        lost: Callable[[Iterable[int]], None],
        tier: Tier | None = None,
    ) -> None:
        self.index = index
        self.req_to_token = req_to_token
        self.tier = tier
        self._pool = key_buffers, value_buffers
        self._counters = counters
        self._faults = faults
        self.lost = lost
        # On a CPU a segment alone stays in its cache, and there are no launches to save.
        at_once = makes_several(index.device)
        self.most_pages = build.tokens_per_call(index, tier is not None) // index.geometry.page_size if at_once else 0

    def make(self, makes: list[Make], merged: set[int]) -> None:
        """Build some segments in one call.

        Args:
            makes: of pages that are unclustered.
            merged: ids of those that are made of neighbours.
        """
        page_size = self.index.geometry.page_size
        try:
            started = time.perf_counter()
            slots = [
                self.req_to_token[
                    make.row, make.first_page * page_size : (make.first_page + make.pages) * page_size
                ].long()
                for make in makes
            ]
            if self.index.checks is not None:
                for listed in slots:
                    self.index.checks.slots(listed)
            # Elsewhere `mark` counts it, without waiting for the device.
            if self.index.device == "cpu" and not self._unclustered(slots, makes):
                self.lost([make.id for make in makes])
                return
            build.build_segments(self.index, [make.id for make in makes], slots, *self._pool, self.tier)
            if self.index.device == "cpu":
                self._counters.build_s += time.perf_counter() - started
            self._counters.segments += len(makes)
            self._counters.tokens_clustered += sum(make.pages for make in makes) * page_size
            self._counters.merges += sum(make.id in merged for make in makes)
        except Exception as error:
            self._faults.note("build", error)
            self.lost([make.id for make in makes])

    def _unclustered(self, slots: list[torch.Tensor], makes: list[Make]) -> bool:
        """Whether no page is another segment's; asked where it costs nothing."""
        page_size = self.index.geometry.page_size
        owners = self.index.page_state[torch.cat(slots)[::page_size] // page_size, 0]
        if not bool((owners != UNCLUSTERED).any()):
            return True
        self._counters.build_conflicts += len(makes)
        first = makes[0]
        logger.warning(
            "clusterkv: segment %d of row %d was not built: pages %d to %d belong to segments %s. "
            "The request decodes densely until looked at again; please report this.",
            first.id, first.row, first.first_page, first.first_page + first.pages, sorted(set(owners.tolist())),
        )  # fmt: skip
        return False


def makes_several(device: str) -> bool:
    """Whether the segments of a plan are made together there."""
    return device != "cpu"
