"""The host tier's rows: logical page p is row p, so that it has no allocator and cannot leak.

A row is a page: per kv head and token, its key and its value side by side. Formats: "auto" has the pool's bytes; "int8" rounds
each key and each value to 8 bits with one float32 scale: D levels of the key, D of the value, then the two scales.

For a GPU the rows are page-locked, so that its kernels read and write them where they lie. torch's allocator of such memory
rounds up to a power of two, so ordinary memory is registered with CUDA instead.
"""

from __future__ import annotations

import mmap
import weakref

import torch

from sglang_clusterkv.config import ConfigError
from sglang_clusterkv.memory.fp8 import pool_rows

HOST_DTYPES = ("auto", "int8")
LEVELS = 127.0


def host_row_bytes(head_dim: int, kv_dtype: torch.dtype, host_dtype: str) -> int:
    """Bytes of a token's key and value of one kv head on the host.

    Args:
        head_dim: channels of a key and of a value.
        kv_dtype: of the pool.
        host_dtype: "auto" or "int8".
    """
    assert host_dtype in HOST_DTYPES, host_dtype
    return 2 * head_dim + 8 if host_dtype == "int8" else 2 * head_dim * kv_dtype.itemsize


class HostRows:
    """The rows of all layers.

    Args:
        layers: of the pool.
        kv_heads: of this rank.
        head_dim: channels, a multiple of 16.
        page_size: tokens per page.
        pages: rows, page 0 included.
        dtype: of the pool.
        host_dtype: "auto" or "int8".
        device: type of the pool's device, whose kernels read the rows; "cuda": they are page-locked.

    Attributes:
        rows: per layer uint8 [pages, kv_heads, page_size, row_bytes]; uninitialised but for row 0.
        layer_bytes: from a layer's rows to the next one's, a multiple of the system's page.

    Raises ConfigError where memory cannot be page-locked.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        pages: int,
        dtype: torch.dtype,
        host_dtype: str,
        device: str = "cpu",
    ) -> None:
        self.kv_heads, self.head_dim, self.page_size = kv_heads, head_dim, page_size
        self.dtype, self.host_dtype = dtype, host_dtype
        self.row_bytes = host_row_bytes(head_dim, dtype, host_dtype)
        self.page_bytes = layers * kv_heads * page_size * self.row_bytes
        size = pages * kv_heads * page_size * self.row_bytes
        # Whole pages of the system: what is registered with CUDA may not share one.
        self.layer_bytes = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = torch.empty(layers * self.layer_bytes + mmap.PAGESIZE, dtype=torch.uint8)
        begin = -memory.data_ptr() % mmap.PAGESIZE
        by_layer = memory[begin : begin + layers * self.layer_bytes].view(layers, self.layer_bytes)
        self.rows = [rows[:size].view(pages, kv_heads, page_size, self.row_bytes) for rows in by_layer]
        for rows in self.rows:
            rows[0].zero_()  # what pads a list is read as zeros
        if device == "cuda":
            unlock = weakref.finalize(self, _unlock, _lock(list(by_layer)))
            unlock.atexit = False  # the process's end does it

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return sum(rows.numel() for rows in self.rows)

    def channels(self, layer: int) -> torch.Tensor:
        """A layer's keys and values as stored, [pages, kv_heads, page_size, 2 D or more]: levels (int8) or the pool's dtype."""
        return self.rows[layer].view(torch.int8 if self.host_dtype == "int8" else self.dtype)

    def scales(self, layer: int) -> torch.Tensor:
        """A layer's rows as float32 [pages, kv_heads, page_size, row_bytes / 4]: int8 rows end with two scales."""
        return self.rows[layer].view(torch.float32)

    def store(self, layer: int, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write pages (int64 [n], different ones) of a layer; keys and values [n, page_size, kv_heads, D]."""
        self.rows[layer].index_copy_(0, pages, self.encode(keys, values))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Host rows of whole pages: two [n, page_size, kv_heads, D] -> uint8 [n, kv_heads, page_size, row_bytes]."""
        both = torch.stack((keys, values), 3).transpose(1, 2)  # [n, H, page, 2, D]
        if self.host_dtype == "auto":
            return both.contiguous().flatten(3).view(torch.uint8)
        wide = both.float()
        scales = wide.abs().amax(-1) / LEVELS
        levels = wide / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
        levels = levels.round_().clamp_(-LEVELS, LEVELS).to(torch.int8).flatten(3)
        return torch.cat((levels.view(torch.uint8), scales.contiguous().view(torch.uint8)), -1)

    def load(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole pages (int64 [n]) of a layer: keys and values [n, page_size, kv_heads, D], in the pool's dtype."""
        rows = self.channels(layer).index_select(0, pages)[..., : 2 * self.head_dim].unflatten(-1, (2, self.head_dim))
        if self.host_dtype == "int8":
            rows = rows.float() * self.scales(layer).index_select(0, pages)[..., -2:].unsqueeze(-1)
        keys, values = rows.transpose(1, 2).to(self.dtype).unbind(3)
        return keys, values

    def gather(self, layer: int, slots: torch.Tensor, heads: torch.Tensor | None, part: int) -> torch.Tensor:
        """Keys or values of listed tokens.

        Args:
            layer: counted from this rank's first.
            slots: int64 [...], logical slots.
            heads: int64, broadcasts to `slots`: the kv head of each; None: all of them.
            part: 0 for keys, 1 for values.

        Returns:
            [..., D], or [..., kv_heads, D] where heads is None; in the pool's dtype, int8 rows in float32.
        """
        page = torch.div(slots, self.page_size, rounding_mode="floor")
        at = (page, slice(None) if heads is None else heads, slots - page * self.page_size)
        channels = slice(part * self.head_dim, (part + 1) * self.head_dim)
        rows = pool_rows(self.channels(layer)[..., channels], *at)
        if self.host_dtype == "int8":
            rows = rows.float() * self.scales(layer)[..., part - 2][at].unsqueeze(-1)
        return rows


def _lock(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Page-lock uint8 tensors that lie on whole pages of the system; returns them, for `_unlock`."""
    cudart = torch.cuda.cudart()
    locked: list[torch.Tensor] = []
    for part in parts:
        code = int(cudart.cudaHostRegister(part.data_ptr(), part.numel(), 0))
        if code:
            _unlock(locked)
            total = sum(part.numel() for part in parts)
            raise ConfigError(
                f"the host tier's {total / 1e9:.1f} GB could not be page-locked (CUDA's error {code} after "
                f"{sum(part.numel() for part in locked) / 1e9:.1f} GB): lower --max-total-tokens or host_ratio, or raise the "
                "limit of locked memory (ulimit -l)"
            )
        locked.append(part)
    return locked


def _unlock(parts: list[torch.Tensor]) -> None:
    """Undo `_lock`."""
    cudart = torch.cuda.cudart()
    for part in parts:
        cudart.cudaHostUnregister(part.data_ptr())
