"""What the new tokens of a prefill attend to, as the kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class ExtendLists(NamedTuple):
    """The requests of a prefill that attend to everything, B of them."""

    slots: torch.Tensor  # int64 [sum of T]: all tokens of each request, prefix first
    first: np.ndarray  # int64 [B + 1]: where each one's slots begin, and all end
    begin: np.ndarray  # int64 [B]: where its new tokens begin among the queries
    new: np.ndarray  # int64 [B]: how many these are

    def slots_of(self, request: int) -> torch.Tensor:
        """Slots of one request, int64 [T]."""
        return self.slots[self.first[request] : self.first[request + 1]]


def extend_lists(
    slots: Sequence[torch.Tensor], new: Sequence[int], chosen: Sequence[bool] | None = None
) -> ExtendLists:
    """Lists for some requests of a batch.

    Args:
        slots: int64 [T], of each request of the batch, prefix first.
        new: how many of them are new.
        chosen: which requests; None: all.
    """
    at = np.arange(len(new)) if chosen is None else np.flatnonzero(np.asarray(chosen))
    counts = np.array(new, np.int64)
    listed = [slots[i] for i in at.tolist()]
    lengths = [0, *(len(one) for one in listed)]
    return ExtendLists(
        torch.cat(listed) if listed else torch.empty(0, dtype=torch.int64),
        np.cumsum(np.array(lengths, np.int64)),
        (np.cumsum(counts) - counts)[at],
        counts[at],
    )
