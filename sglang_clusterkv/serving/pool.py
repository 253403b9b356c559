"""SGLang's KV pool and page allocator, with the cluster index beside the pages.

The pool owns the index; the allocator only notes which slots it handed out. Both notes and index are read on the forward
stream by the engine, which the backend attaches to the pool.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.memory.device import Geometry, index_pages
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.serving import active


class ClusterKVPool(MHATokenToKVPool):
    """A multi-head KV pool that carries a cluster index."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The base constructor allocates, and the allocator's clears, before this one returns.
        self.cluster_index: ClusterIndex | None = None
        self.engine: ClusterEngine | None = None
        self.handed_out = HandedOut()
        super().__init__(*args, **kwargs)

    def _create_buffers(self) -> None:
        super()._create_buffers()
        config = active.active_config()
        assert config is not None, "the ClusterKV pool was built without a configuration"
        geometry = Geometry(
            layers=self.layer_num,
            kv_heads=self.head_num,
            head_dim=self.head_dim,
            page_size=self.page_size,
            pages=index_pages(-(-(self.size + self.page_size) // self.page_size)),
        )
        self.cluster_index = ClusterIndex(config, geometry, torch.device(self.device).type)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Bytes of keys and of values; half of the index counts with each."""
        keys, values = super().get_kv_size_bytes()
        index = self.cluster_index.bytes if self.cluster_index is not None else 0
        return keys + index // 2, values + index - index // 2


class ClusterKVAllocator(PagedTokenToKVPoolAllocator):
    """A page allocator that tells the index which slots it handed out; it changes nothing about allocation."""

    def __init__(
        self, size: int, page_size: int, dtype: torch.dtype, device: str, kvcache: Any, need_sort: bool
    ) -> None:
        self._handed_out: HandedOut = kvcache.handed_out
        super().__init__(size, page_size, dtype, device, kvcache, need_sort)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Hand out whole pages."""
        return self._note(super().alloc(need_size))

    def alloc_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Hand out slots for new prompt tokens."""
        return self._note(super().alloc_extend(*args, **kwargs))

    def alloc_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """Hand out one slot per request."""
        return self._note(super().alloc_decode(*args, **kwargs))

    def clear(self) -> None:
        """Free every page."""
        super().clear()
        self._handed_out.clear()

    def _note(self, slots: torch.Tensor | None) -> torch.Tensor | None:
        if slots is not None and slots.numel():
            self._handed_out.add(slots)
        return slots


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
