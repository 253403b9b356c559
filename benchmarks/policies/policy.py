"""What a policy is: which clustered tokens a decode step reads, through the engine's own interface, and what that costs.

A policy that is not ours replaces `ClusterEngine.sparse_decode`. It gets the lists of the step as the kernels do, so sinks,
gaps and window are the same for all, and its dense layers, short rows and dirty rows go the engine's way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import torch

from sglang_clusterkv.clusters.engine import SparseDecode
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.reference import attend
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep


class Reading(NamedTuple):
    """One decode step of one (request, layer, kv head): sizes in tokens."""

    clustered: int  # tokens that may be recalled
    base: int  # sinks, gaps and window
    head_dim: int
    config: ClusterKVConfig
    chosen: float | None = None  # share of (step, kv head) that chose anew, where it was counted


def kv_bytes(tokens: float, head_dim: int) -> float:
    """Key and value in bf16."""
    return 4.0 * head_dim * tokens


@dataclass(frozen=True)
class Policy:
    """One row of the tables.

    Attributes:
        title: as the tables name it.
        metadata_bytes: bytes that a step reads to choose and to estimate, beside the tokens it attends to.
        options: step options that go with it (config.STEP_OPTIONS).
        make: its decode function for a budget of tokens; None: the engine's own.
        counted: its function has `counts()`: `candidates` of a head on average, and the share that was `chosen` anew.
        is_method: false for what no system could do at the bytes counted for it (an oracle), or for dense.
    """

    title: str
    metadata_bytes: Callable[[Reading], float]
    options: dict[str, object] = field(default_factory=dict)
    make: Callable[[int], SparseDecode] | None = None
    counted: bool = False
    is_method: bool = True

    def step_bytes(self, reading: Reading, layers: int) -> float:
        """Bytes that a step reads per layer and kv head, mean over the layers: metadata, recalled tokens, sinks, window."""
        everything = kv_bytes(reading.clustered + reading.base, reading.head_dim)
        config = msgspec.structs.replace(reading.config, **self.options)
        if reading.clustered <= config.budget_tokens or reading.clustered + reading.base < config.dense_below_tokens:
            return everything
        recalled = kv_bytes(config.budget_tokens + reading.base, reading.head_dim)
        dense = min(config.dense_layers, layers) / layers
        return (1 - dense) * (recalled + self.metadata_bytes(reading._replace(config=config))) + dense * everything


class TokenPolicy(ABC):
    """Attends exactly to sinks, window and the clustered tokens that `choose` names; nothing is estimated.

    Args:
        budget_tokens: most tokens that are recalled per kv head.
    """

    def __init__(self, budget_tokens: int) -> None:
        self.budget = budget_tokens
        # What the last call recalled: slots, int64 [B, H, budget], and how many, int64 [B, H].
        self.recalled = (torch.empty(0), torch.empty(0))

    @abstractmethod
    def choose(
        self, q: torch.Tensor, keys: torch.Tensor, base: torch.Tensor, layer: int, request: int, scale: float
    ) -> torch.Tensor:
        """Places of the recalled tokens, int64 [H, at most budget], each once.

        Args:
            q: float32 [H, G, D].
            keys: float32 [H, T, D], of all clustered tokens in sequence order.
            base: float32 [H, W, D], keys of sinks, gaps and window.
            layer: counted from this rank's first.
            request: its place in the batch.
            scale: of the logits.
        """

    def __call__(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        index: ClusterIndex,
        layer: int,
        step: SparseStep,
        scale: float,
    ) -> torch.Tensor:
        """See `kernels.decode.sparse_decode`."""
        grouped = q.float().unflatten(1, (keys.shape[1], -1))
        recalled = torch.zeros((step.batch, keys.shape[1], self.budget), dtype=torch.int64, device=q.device)
        count = torch.zeros((step.batch, keys.shape[1]), dtype=torch.int64, device=q.device)
        for request in range(step.batch):
            slots = clustered_slots(step, request, index.geometry.page_size)
            base = step.base_slots[request, : int(step.base_count[request])]
            rows, base_rows = (keys[at].transpose(0, 1).float() for at in (slots, base))
            places = self.choose(grouped[request], rows, base_rows, layer, request, scale)
            recalled[request, :, : places.shape[1]] = slots[places]
            count[request] = places.shape[1]
        self.recalled = recalled, count
        return attend(grouped, keys, values, step, recalled, count, scale).output.flatten(1, 2).to(q.dtype)


def clustered_slots(step: SparseStep, request: int, page_size: int) -> torch.Tensor:
    """Slots of a request's clustered tokens in sequence order, int64 [T]."""
    pages = step.pages[request, : int(step.page_count[request])]
    return (pages.unsqueeze(1) * page_size + torch.arange(page_size, device=pages.device)).flatten()


class KeyTables(ABC):
    """What a policy keeps of a prefix's keys, per layer and request: grown when tokens join, made anew for another prefix."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, list[object]]] = {}

    @abstractmethod
    def build(self, keys: torch.Tensor) -> object:
        """Tables of a run of tokens, from float32 [H, T, D]."""

    def of(self, keys: torch.Tensor, layer: int, request: int) -> list[object]:
        """Tables of all runs, in order, that together are the tokens of `keys`, float32 [H, T, D]."""
        known, tables = self._kept.get((layer, request), (keys[:, :0], []))
        same = known.shape[1] <= keys.shape[1] and torch.equal(known, keys[:, : known.shape[1]])
        if not same:
            known, tables = keys[:, :0], []
        if known.shape[1] < keys.shape[1]:
            tables = [*tables, self.build(keys[:, known.shape[1] :])]
            self._kept[layer, request] = (keys, tables)
        return tables
