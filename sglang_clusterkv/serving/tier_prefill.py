"""Prefill on SGLang's own backends over a pool in two tiers: what they read of a prefix lies in one place on the device.

They take the new tokens' keys and values from the model, and those of the prefix from the pool, by indices that the translator
gives them before the layers run. Two ways, chosen for each batch by what the host knows:

    all resident    every page in use has a device page: the indices are device slots, as SGLang's unified pools have them
    workspace       a layer's rows of all prefixes are gathered into one workspace, from either tier, and the indices name
                    places in it; for the time of the backend's call the pool answers the workspace instead of its buffers

In the second the rows are copied bit by bit (`host_kv_dtype` auto), so the backend computes what it would compute over a pool
that has everything on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.kernels.tier import gather
from sglang_clusterkv.memory.tier import PREFILL_HOST

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_clusterkv.memory.tier import Tier
    from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool
    from sglang_clusterkv.serving.translator import TierTranslator


class AllResident:
    """Whether every page in use has a device page, which the host knows by counting.

    A refill takes free device pages first. While the pages in use and a whole ring fit the device tier at every head, it has
    found enough of them each time, and no page has left; once one may have, only a pool that was cleared has all of them again.

    Args:
        tier: of the pool.
        allocator: counts the pages in use.
    """

    def __init__(self, tier: Tier, allocator: ClusterKVAllocator) -> None:
        self._directory, self._allocator = tier.directory, allocator
        self._all, self._clears = True, allocator.clears

    def forward(self) -> None:
        """A forward is launched, its head has run. Call for each."""
        allocator = self._allocator
        used = allocator.num_pages - allocator.available_size() // allocator.page_size
        if self._clears != allocator.clears:
            self._all, self._clears = True, allocator.clears
        self._all = self._all and used + self._directory.ring_pages <= self._directory.device_pages

    def __bool__(self) -> bool:
        return self._all


class TierPrefill:
    """What a layer's backend reads in the prefill batch under way.

    Args:
        pool: in two tiers.
        translator: gives the backend its indices.
        req_to_token: int32 [rows, max_context].
        resident: counts the pages.
    """

    def __init__(
        self, pool: ClusterKVPool, translator: TierTranslator, req_to_token: torch.Tensor, resident: AllResident
    ) -> None:
        self._pool, self._translator, self._req_to_token = pool, translator, req_to_token
        self._resident = resident
        self._slots: torch.Tensor | None = None  # int64 [P], of all prefixes of the batch, one after the other
        # The workspace: keys and values, [P or more, H, D] each.
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self) -> None:
        """A forward of whatever kind is launched, its head has run."""
        self._resident.forward()

    @contextmanager
    def reads(self, batch: ForwardBatch) -> Iterator[None]:
        """The backend makes its indices in here."""
        prefixes = batch.extend_prefix_lens_cpu
        total = sum(prefixes)
        self._slots = None
        if total == 0 or self._resident:
            with self._translator.reads_of_device():
                yield
            return
        lengths = batch.extend_prefix_lens.long()
        begins = torch.cumsum(lengths, 0) - lengths
        self._slots = self._listed(batch.req_pool_indices.long(), lengths, begins, total)
        self._take(total)
        with self._translator.reads_of_workspace(begins):
            yield

    @contextmanager
    def layer(self, layer_id: int) -> Iterator[None]:
        """A layer's backend runs in here; it writes to the pool as ever."""
        if self._slots is None:
            yield
            return
        assert self._rows is not None and self._pool.tier is not None
        local = layer_id - self._pool.start_layer
        keys, values = (rows[: self._slots.numel()] for rows in self._rows)
        gather(self._pool.tier, local, self._slots, keys.unsqueeze(0), values.unsqueeze(0), PREFILL_HOST)
        with self._pool.answering(keys, values):
            yield

    def _listed(self, rows: torch.Tensor, lengths: torch.Tensor, begins: torch.Tensor, total: int) -> torch.Tensor:
        """The prefixes' slots. The total is known on the host, so nothing waits for the device."""
        each = torch.repeat_interleave(rows, lengths, output_size=total)
        first = torch.repeat_interleave(begins, lengths, output_size=total)
        places = torch.arange(total, device=rows.device) - first
        return self._req_to_token[each, places].long()

    def _take(self, tokens: int) -> None:
        """A workspace of so many tokens at least; one for all layers, for they run one after the other."""
        if self._rows is None or self._rows[0].shape[0] < tokens:
            self._rows = None  # its memory may be what is needed
            shape = (tokens, self._pool.head_num, self._pool.head_dim)
            keys, values = (torch.empty(shape, dtype=self._pool.dtype, device=self._pool.device) for _ in range(2))
            self._rows = keys, values


def of(runner: ModelRunner, backend: Any) -> TierPrefill | None:
    """For SGLang's backend of a runner; None where everything is on the device.

    Raises ConfigError where the backend would read new tokens from the pool, as FlashInfer does in some of its modes. The
    workspace has the prefixes alone. Triton's does so in its deterministic mode only, which is refused in any case.
    """
    pool = runner.token_to_kv_pool
    if getattr(pool, "tier", None) is None:
        return None
    why = None
    if getattr(backend, "use_paged", False):
        why = "SGLANG_FLASHINFER_USE_PAGED makes FlashInfer read new tokens from the KV cache: unset it"
    elif hasattr(backend, "prefill_wrapper_ragged") and backend.is_multimodal:
        why = "FlashInfer reads the new tokens of multimodal models from the KV cache: leave out host_ratio"
    if why is not None:
        raise ConfigError(f"a host tier keeps what is read beside what is written, and {why}")
    resident = AllResident(pool.tier, runner.token_to_kv_pool_allocator)
    return TierPrefill(pool, runner.kv_index_translator, runner.req_to_token_pool.req_to_token, resident)
