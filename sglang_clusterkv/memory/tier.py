"""Keys and values in two tiers: a pool's buffers with few device pages, and host rows of all logical pages.

Every reader reads a page from either tier; only a write needs a device page. Slots are logical everywhere but at a write.
What moves pages and rows between the tiers: kernels/tier/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.memory.directory import Directory
from sglang_clusterkv.memory.fp8 import as_stored, pool_rows
from sglang_clusterkv.memory.host import HostRows

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig


class TierTensors(NamedTuple):
    """A layer's tier as kernels of the pool's device read it; host rows are in page-locked memory for a GPU."""

    device_page: torch.Tensor  # int64 [L + 1]
    rows: torch.Tensor  # [L + 1, H, page_size, 2 D or more]: levels (int8), or the pool's dtype
    scales: (
        torch.Tensor | None
    )  # float32 [L + 1, H, page_size, row_bytes / 4]; int8 rows end with two scales; else None
    page_size: int
    reads: torch.Tensor  # int64 [len(Reads._fields)], all layers', added to


class TierArrays(NamedTuple):
    """A layer's tier as the CPU kernels read it."""

    device_page: np.ndarray  # int64 [L + 1]
    rows: (
        np.ndarray
    )  # [L + 1, H * page_size, 2 D or more]: levels (int8), or as the pool (bf16 as uint16, fp8 as uint8)
    scales: np.ndarray  # float32 [L + 1, H * page_size, row_bytes / 4]; int8 rows end with two scales
    page_size: int
    row_bytes: int
    rounded: bool  # the rows are int8
    reads: np.ndarray  # int64 [len(Reads._fields)], all layers', added to


class Reads(NamedTuple):
    """Rows that were read: a token's key and value of one kv head of one layer each."""

    recalled_device: int  # recalled by a sparse step, from the device
    recalled_host: int  # from the host
    base_host: int  # always attended by a sparse step, from the host
    dense_host: int  # by a dense step, from the host
    prefill_host: int  # by a prefill, from the host
    build_host: int  # by the build of a segment, from the host


RECALLED_DEVICE, RECALLED_HOST, BASE_HOST, DENSE_HOST, PREFILL_HOST, BUILD_HOST = range(6)


class TierLayer:
    """What the readers of one layer's keys and values take besides its buffers.

    Attributes:
        tensors: for the kernels of the pool's device.
    """

    def __init__(self, tier: Tier, layer: int) -> None:
        self._directory, self._host, self._layer = tier.directory, tier.host, layer
        self._reads = tier.reads
        channels, rounded = tier.host.channels(layer), tier.host.host_dtype == "int8"
        scales = tier.host.scales(layer)
        self.tensors = TierTensors(
            tier.directory.device_page, channels, scales if rounded else None, tier.directory.page_size, tier.reads
        )
        self._arrays: TierArrays | None = None
        if tier.device == "cpu":
            self._arrays = TierArrays(
                device_page=tier.directory.device_page.numpy(),
                rows=(channels.view(torch.uint16) if channels.dtype is torch.bfloat16 else as_stored(channels))
                .flatten(1, 2)
                .numpy(),
                scales=scales.flatten(1, 2).numpy(),
                page_size=tier.directory.page_size,
                row_bytes=tier.host.row_bytes,
                rounded=rounded,
                reads=tier.reads.numpy(),
            )

    @property
    def arrays(self) -> TierArrays:
        """For the CPU kernels; only where the pool is on a CPU."""
        assert self._arrays is not None, "a GPU's kernels take tensors"
        return self._arrays

    def gather(
        self, buffer: torch.Tensor, part: int, slots: torch.Tensor, heads: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows of listed tokens from either tier, of a pool on a CPU; `kernels.tier.gather` is for any device.

        Args:
            buffer: [device slots, H, D], the layer's keys or values.
            part: 0 for keys, 1 for values.
            slots: int64 [...], logical.
            heads: int64, broadcasts to `slots`: the kv head of each; None: all of them.

        Returns:
            [..., D], or [..., H, D] where heads is None; in the pool's dtype, float32 where host rows are int8.
        """
        page_size = self._directory.page_size
        page = torch.div(slots, page_size, rounding_mode="floor")
        device = self._directory.device_page[page]
        at = device * page_size + slots - page * page_size
        rows = pool_rows(buffer, at) if heads is None else pool_rows(buffer, at, heads)
        away = device == 0
        if not bool(away.any()):
            return rows
        if heads is not None:
            away, slots, heads = torch.broadcast_tensors(away, slots, heads)
            heads = heads[away]
        stored = self._host.gather(self._layer, slots[away], heads, part)
        rows = rows.to(stored.dtype)
        rows[away] = stored
        return rows

    def count(self, kind: int, slots: torch.Tensor) -> None:
        """Note that the rows of these logical slots (int64 [n]) were read, of all kv heads; one of `Reads`, of the host's."""
        page = torch.div(slots, self._directory.page_size, rounding_mode="floor")
        away = (self._directory.device_page.index_select(0, page) == 0).sum()
        self._reads[kind] += away * self._host.kv_heads


class Tier:
    """A directory and host rows over a pool's buffers.

    Args:
        key_buffers: one [(d + 1) * page_size, H, D] per layer; page 0 is padding.
        value_buffers: likewise.
        page_size: tokens per page.
        pages: logical pages, page 0 included: L + 1.
        ring_pages: see `ring_target`.
        host_dtype: "auto" (bit for bit) or "int8".

    Attributes:
        device: type of the pool's device, "cpu" or "cuda", where the tables are too.
        reads: int64 on the device, by the fields of `Reads`, since the start.
        refills: how often the ring was filled.
        stored_pages: int64 [] on the device, pages written to the host, all layers each.
        scratch: what kernels keep with the tier.
    """

    def __init__(
        self,
        key_buffers: list[torch.Tensor],
        value_buffers: list[torch.Tensor],
        *,
        page_size: int,
        pages: int,
        ring_pages: int,
        host_dtype: str = "auto",
    ) -> None:
        slots, kv_heads, head_dim = key_buffers[0].shape
        self.device = key_buffers[0].device.type
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"a host tier below {self.device} is not served: a CPU's or CUDA's memory")
        self.keys, self.values = key_buffers, value_buffers
        at = str(key_buffers[0].device)
        self.directory = Directory(pages - 1, slots // page_size - 1, ring_pages, page_size, at)
        dtype = key_buffers[0].dtype
        self.host = HostRows(len(key_buffers), kv_heads, head_dim, page_size, pages, dtype, host_dtype, self.device)
        self.reads = torch.zeros(len(Reads._fields), dtype=torch.int64, device=at)
        self.refills = 0
        self.stored_pages = torch.zeros((), dtype=torch.int64, device=at)
        self.scratch: dict[Any, Any] = {}
        self._layers = [TierLayer(self, layer) for layer in range(len(key_buffers))]

    def layer(self, layer: int) -> TierLayer:
        """What the readers of a layer take (counted from this rank's first)."""
        return self._layers[layer]

    @property
    def bytes(self) -> int:
        """Bytes of tables and host rows."""
        return self.directory.bytes + self.host.bytes

    def server_info(self) -> dict[str, int]:
        """Counts as they are now; waits for the device."""
        directory, reads = self.directory, Reads(*self.reads.tolist())
        resident = directory.device_page > 0
        decode_rows = reads.recalled_host + reads.base_host + reads.dense_host
        return {
            "logical_pages": directory.logical_pages,
            "device_pages": directory.device_pages,
            "pages_on_device": int(resident.sum()),
            "pages_on_host_only": int((directory.stored & ~resident).sum()),
            "ring_pages": directory.ring_pages,
            "ring_level": directory.ring_level,
            "refills": self.refills,
            "written_bytes": int(self.stored_pages) * self.host.page_bytes,
            "read_bytes_decode": decode_rows * self.host.row_bytes,
            "read_bytes_prefill": reads.prefill_host * self.host.row_bytes,
            "read_bytes_build": reads.build_host * self.host.row_bytes,
            "recalled_rows_device": reads.recalled_device,
            "recalled_rows_host": reads.recalled_host,
            "dense_rows_host": reads.dense_host,
            "bytes": self.bytes,
        }


def ring_target(chunk_tokens: int, max_rows: int, page_size: int) -> int:
    """Device pages to keep free: what one chunk of prefill tokens and two pages of every running request may take.

    A chunk's tokens lie in `chunk_tokens / page_size` pages and one more per request; a request's first page may have to be
    brought back. So decode goes on with what a prefill may not take.
    """
    return -(-chunk_tokens // page_size) + 2 * max_rows


def base_pages(config: ClusterKVConfig, page_size: int) -> int:
    """Most pages of a running request that every step attends to: sinks, window and what waits to be clustered."""
    tokens = config.sink_tokens + config.window_tokens + 2 * config.recluster_every + page_size
    return -(-tokens // page_size)


def least_device_pages(config: ClusterKVConfig, *, chunk_tokens: int, max_rows: int, page_size: int) -> int:
    """Device pages with which a server starts: two rings, one of them being filled, and every running request's base."""
    return 2 * ring_target(chunk_tokens, max_rows, page_size) + max_rows * base_pages(config, page_size)
