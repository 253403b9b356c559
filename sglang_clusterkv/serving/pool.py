"""SGLang's KV pool and page allocator, with the cluster index beside the pages, and a host tier below them.

The pool owns the index and the tier; the allocator only notes which slots it handed out, and for a tier which pages it handed
out and got back. Notes, index and tier are read on the forward stream by the engine, which the backend attaches to the pool.

With a tier, pages and slots are logical wherever SGLang sees them; `ClusterKVPool.size` counts them. The buffers have room
for fewer: what is written there is translated (translator.py), and what reads them goes through the tier.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.memory.device import Geometry, index_pages
from sglang_clusterkv.memory.host import host_row_bytes
from sglang_clusterkv.memory.huge_pages import use_huge_pages
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.tier import Tier, ring_target
from sglang_clusterkv.serving import active, host_tier, layers
from sglang_clusterkv.serving.admission import Admission, PrefixBudget, WaitingBudget


class ClusterKVPool(MHATokenToKVPool):
    """A multi-head KV pool that carries a cluster index, and a host tier where the configuration asks for one."""

    size: int  # tokens, logical

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The base constructor allocates, and the allocator's clears, before this one returns.
        self.cluster_index: ClusterIndex | None = None
        self.engine: ClusterEngine | None = None
        self.tier: Tier | None = None
        self._answers: tuple[torch.Tensor, torch.Tensor] | None = None
        self.handed_out = HandedOut()
        config = active.active_config()
        assert config is not None, "the ClusterKV pool was built without a configuration"
        self.config = config
        super().__init__(*args, **kwargs)

    @property
    def tiered(self) -> bool:
        """Whether the buffers have room for a part of the pages only."""
        return host_tier.is_on(self.config)

    def _create_buffers(self) -> None:
        size, config = self.size, self.config
        try:
            if self.tiered:
                # SGLang takes the buffers' length, and what it derives from it, from this attribute alone.
                self.size = host_tier.device_pages(config, size // self.page_size) * self.page_size
            super()._create_buffers()
        finally:
            self.size = size
        if torch.device(self.device).type == "cpu":
            use_huge_pages([*self.k_buffer, *self.v_buffer])
        geometry = Geometry(
            layers=self.layer_num,
            kv_heads=self.head_num,
            head_dim=self.head_dim,
            page_size=self.page_size,
            pages=index_pages(-(-(self.size + self.page_size) // self.page_size)),
            clustered=layers.clustered(),
        )
        self.cluster_index = ClusterIndex(config, geometry, torch.device(self.device).type)

    def make_tier(self, chunk_tokens: int, rows: int, ranks: int = 1) -> Tier:
        """The host tier over the buffers; see `Tier`. Call once, before a forward.

        Args:
            chunk_tokens: most new tokens of a prefill batch.
            rows: most running requests.
            ranks: processes on this machine that make as large a one.

        Raises:
            ConfigError: the machine's memory is too small for it.
        """
        assert self.tiered and self.tier is None and self.cluster_index is not None
        keys, values = super().get_kv_size_bytes()
        in_ram = torch.device(self.device).type == "cpu"
        host_tier.check_memory(
            self.config,
            tokens=self.size,
            host=self.size * self.host_bytes_per_token,
            others=keys + values + self.cluster_index.bytes if in_ram else 0,
            ranks=ranks,
        )
        self.tier = Tier(
            [buffer.view(self.dtype) for buffer in self.k_buffer],  # SGLang keeps fp8 as bytes
            [buffer.view(self.dtype) for buffer in self.v_buffer],
            page_size=self.page_size,
            pages=self.size // self.page_size + 1,
            ring_pages=ring_target(chunk_tokens, rows, self.page_size),
            host_dtype=self.config.host_kv_dtype,
        )
        return self.tier

    @contextmanager
    def answering(self, keys: torch.Tensor, values: torch.Tensor) -> Iterator[None]:
        """Who asks for a layer's keys and values in here gets these instead of its buffers; what is written goes there."""
        self._answers = keys, values
        try:
            yield
        finally:
            self._answers = None

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """A layer's keys, [slots, H, D]; see `answering`."""
        return super().get_key_buffer(layer_id) if self._answers is None else self._answers[0]

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """A layer's values, likewise."""
        return super().get_value_buffer(layer_id) if self._answers is None else self._answers[1]

    @property
    def host_bytes_per_token(self) -> int:
        """Bytes of a token's host rows, over all layers and kv heads."""
        row = host_row_bytes(self.head_dim, self.dtype, self.config.host_kv_dtype)
        return self.layer_num * self.head_num * row

    @property
    def host_capacity_bytes(self) -> int:
        """Bytes of keys and values that HiCache keeps on the host, for its sizing; the index stays on the device."""
        return sum(super().get_kv_size_bytes())

    def wait_for_loads(self) -> None:
        """Let the current stream wait for pages that HiCache loads for the forward that was launched last.

        A layer waits for its own where it reads them, in that forward or not at all; the engine reads all layers' of a page.
        """
        counter = self.layer_transfer_counter
        if counter is not None:
            counter.wait_until(counter.num_layers - 1)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of keys and of values on the device; half of the index counts with each."""
        keys, values = super().get_kv_size_bytes()
        index = self.cluster_index.bytes if self.cluster_index is not None else 0
        return keys + index // 2, values + index - index // 2


class ClusterKVAllocator(PagedTokenToKVPoolAllocator):
    """A page allocator that tells the index and the tier what it handed out; it changes nothing about allocation.

    Attributes:
        admission: of prefill passes; None without a tier.
        clears: how often all pages were freed at once.
    """

    def __init__(
        self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache: Any, need_sort: bool
    ) -> None:
        self._handed_out: HandedOut = kvcache.handed_out
        self._tiered: bool = kvcache.tiered
        self.admission = Admission(kvcache) if kvcache.tiered else None
        self.clears = 0
        # Where SGLang sorts its free pages first, the first ones are not those that were handed out.
        assert not (self._tiered and need_sort), (
            "a host tier needs free pages in the order in which they are handed out"
        )
        super().__init__(size, page_size, dtype, device, kvcache, need_sort)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Hand out whole pages."""
        free = self.free_pages
        return self._note(super().alloc(need_size), free)

    def alloc_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Hand out slots for new prompt tokens."""
        free = self.free_pages
        return self._note(super().alloc_extend(*args, **kwargs), free)

    def alloc_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Hand out one slot per request."""
        free = self.free_pages
        return self._note(super().alloc_decode(*args, **kwargs), free)

    def clear(self) -> None:
        """Free every page."""
        super().clear()
        self.clears += 1
        self._handed_out.clear()

    def create_prefill_budget(self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0) -> PrefillBudget:
        """What a prefill pass may take: nothing while the tier has no device pages for it, which is tried to change."""
        if self.admission is not None:
            if not self.admission.begin_pass():
                return WaitingBudget(self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
            if self.admission.most_prefix_tokens is not None:
                return PrefixBudget(self.admission, self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        return super().create_prefill_budget(tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)

    def _note(self, slots: torch.Tensor | None, free: torch.Tensor) -> torch.Tensor | None:
        """Note slots; free: the free pages before they were handed out, of which the first were taken."""
        if slots is not None and slots.numel():
            if self._tiered:
                self._handed_out.add(slots, free[: len(free) - len(self.free_pages)])
            else:
                self._handed_out.add(slots)
        return slots

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        super()._release_page_ids(*page_ids)
        if self._tiered:
            for pages in page_ids:
                self._handed_out.freed(pages.long())  # of rows of req_to_token they have 32 bits


def kv_pool_cls(default: type | None, kind: str) -> type | None:
    """Our KV pool where SGLang would take `default` (None: its own) for plain attention; `default` for other kinds."""
    if kind != "mha":
        return default
    assert default in (None, MHATokenToKVPool), f"clusterkv carries its index on MHATokenToKVPool, not on {default}"
    return ClusterKVPool


def paged_allocator_cls(default: type | None) -> type:
    """Our allocator where SGLang would take `default` (None: its own)."""
    assert default in (None, PagedTokenToKVPoolAllocator), f"clusterkv needs the paged allocator, not {default}"
    return ClusterKVAllocator
