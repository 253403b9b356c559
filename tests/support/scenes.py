"""Small scenes for the engine's tests: a pool with keys that cluster, rows of req_to_token, and an engine over them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.engine import ClusterEngine, Extend
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.tier import Tier, ring_target

PAGE = 16


class Tiers(NamedTuple):
    """A pool in two tiers."""

    device_pages: int
    ring_pages: int
    host_dtype: str = "auto"

    @classmethod
    def of(cls, pages: int, ratio: int, chunk_tokens: int, running: int) -> Tiers:
        """With `ratio` times as many logical pages as device pages, or as few of these as the rules need, bases left out.

        Args:
            pages: of the pool, page 0 included.
            ratio: 1: everything fits the device.
            chunk_tokens: most tokens of a prefill.
            running: most requests with a row.
        """
        ring = ring_target(chunk_tokens, running, PAGE)
        return cls(min(pages - 1, max(-(-(pages - 1) // ratio), 2 * ring + running)), ring)


class Scene:
    """A pool of `pages` pages whose slots hold random keys and values, and an engine that clusters them.

    Args:
        config: of the engine.
        layers, kv_heads, head_dim: of the pool.
        pages: of the pool.
        rows: lines of req_to_token.
        context: tokens per line.
        dtype: of keys and values.
        seed: of everything random.
        stream: that the engine's device work goes to.
        page_size: tokens per page.
        tiers: of the pool, which then is empty, with poison in all but page 0; None: everything is on the device.
        clustered: the layers that have clusters; None: all.
    """

    def __init__(
        self,
        config: ClusterKVConfig,
        *,
        layers: int = 2,
        kv_heads: int = 2,
        head_dim: int = 32,
        pages: int = 200,
        rows: int = 8,
        context: int = 2048,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        stream: ForwardStream | None = None,
        page_size: int = PAGE,
        tiers: Tiers | None = None,
        clustered: tuple[int, ...] | None = None,
    ) -> None:
        self.page_size = page_size
        self.generator = torch.Generator().manual_seed(seed)
        geometry = Geometry(layers, kv_heads, head_dim, page_size, pages, clustered)
        self.tier: Tier | None = None
        if tiers is None:
            self.keys = [self.clustered(geometry).to(dtype) for _ in range(layers)]
            self.values = [self.clustered(geometry).to(dtype) for _ in range(layers)]
        else:
            shape = ((tiers.device_pages + 1) * page_size, kv_heads, head_dim)
            self.keys, self.values = ([torch.zeros(shape, dtype=dtype) for _ in range(layers)] for _ in range(2))
            self.tier = Tier(
                self.keys,
                self.values,
                page_size=page_size,
                pages=pages,
                ring_pages=tiers.ring_pages,
                host_dtype=tiers.host_dtype,
            )
            self.poison_what_nobody_holds()
        self.req_to_token = torch.zeros((rows, context), dtype=torch.int32)
        self.handed_out = HandedOut()
        self.index = ClusterIndex(config, geometry, "cpu")
        self.engine = ClusterEngine(
            self.index, self.keys, self.values, self.req_to_token, self.handed_out, stream, group=2, tier=self.tier
        )
        self.free_pages = list(torch.randperm(pages - 1, generator=self.generator).add(1).numpy())

    def clustered(self, geometry: Geometry) -> torch.Tensor:
        """Rows around a few dozen centres, with a common offset, [slots, H, D]."""
        shape = (geometry.kv_heads, geometry.head_dim)
        centres = 2 * torch.randn(40, *shape, generator=self.generator)
        which = torch.randint(40, (geometry.slots,), generator=self.generator)
        noise = torch.randn(geometry.slots, *shape, generator=self.generator)
        return centres[which] + 0.7 * noise + torch.randn(shape, generator=self.generator)

    def poison_what_nobody_holds(self) -> None:
        """NaN in the device pages that no page has, and in the host rows that hold no page."""
        assert self.tier is not None
        directory = self.tier.directory
        void = directory.page_of < 0
        void[0] = False
        for buffer in (*self.keys, *self.values):
            buffer.unflatten(0, (-1, self.page_size))[void] = torch.nan
        unstored = ~directory.stored
        unstored[0] = False
        for rows in self.tier.host.rows:
            rows[unstored] = 0xFF  # as float32, bf16 and scales of int8 rows

    def poison(self, page: int) -> None:
        """NaN in both copies of a page."""
        assert self.tier is not None
        device = int(self.tier.directory.device_page[page])
        if device:
            for buffer in (*self.keys, *self.values):
                buffer[device * self.page_size : (device + 1) * self.page_size] = torch.nan
        for rows in self.tier.host.rows:
            rows[page] = 0xFF

    def rows_of(self, layer: int, part: int, slots: torch.Tensor) -> torch.Tensor:
        """Keys (part 0) or values of logical slots [n], from where they are, [n, H, D]."""
        buffer = (self.values if part else self.keys)[layer]
        return buffer[slots] if self.tier is None else self.tier.layer(layer).gather(buffer, part, slots)

    def write(self, row: int, begin: int, end: int) -> None:
        """Give a row fresh pages for positions [begin, end); a page that it already has is continued."""
        page_size = self.page_size
        while begin < end:
            if begin % page_size == 0:
                page = int(self.free_pages.pop())
                self.handed_out.add(torch.arange(page * page_size, (page + 1) * page_size))
            else:
                page = int(self.req_to_token[row, begin - 1]) // page_size
            stop = min(end, (begin // page_size + 1) * page_size)
            offset = begin % page_size
            slots = torch.arange(page * page_size + offset, page * page_size + offset + stop - begin)
            self.req_to_token[row, begin:stop] = slots.int()
            begin = stop

    def prefill(self, row: int, tokens: int, *, rid: str | None = None, found: int = 0) -> None:
        """Launch one prefill of `tokens` tokens in one chunk, `found` of them already in the row."""
        self.write(row, found, tokens)
        self.engine.begin_extend([Extend(row, rid or f"r{row}", found, tokens, tokens, True)])

    def decode(self, rows: list[int], seq_lens: list[int]) -> DecodeStep:
        """Launch one decode step; seq_lens count the step's token."""
        for row, length in zip(rows, seq_lens, strict=True):
            self.write(row, length - 1, length)
        return self.engine.begin_decode(np.array(rows), np.array(seq_lens))

    def queries(self, batch: int, heads: int) -> torch.Tensor:
        """float32 [batch, heads, D]."""
        return torch.randn(batch, heads, self.keys[0].shape[2], generator=self.generator)

    def slots(self, row: int, length: int) -> torch.Tensor:
        """The row's slots, int64 [length]."""
        return self.req_to_token[row, :length].long()
