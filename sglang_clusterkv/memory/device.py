"""The device tier: shapes, allocation and byte accounting of everything the cluster index keeps beside the KV pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sglang_clusterkv.memory.codec import RowCodec, TokenCodec

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig

SEGMENT_VECTOR_PAGES = 4  # a segment's mean key, mean value and variance lie in quarters on its first four pages


@dataclass(frozen=True)
class Geometry:
    """Sizes of the KV pool that the index lies beside, of one tensor-parallel rank.

    Attributes:
        layers: attention layers of this rank (pipeline stage).
        kv_heads: kv heads of this rank.
        head_dim: channels of a key and of a value.
        page_size: tokens per page.
        pages: pages of the pool, its padding page 0 included; see `index_pages`.
        clustered: the layers that have clusters, ascending, counted from this rank's first; None: all of them.
    """

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    clustered: tuple[int, ...] | None = None

    @property
    def clustered_layers(self) -> tuple[int, ...]:
        """`clustered`, spelt out: the i-th row of the index's arrays is of the i-th of these."""
        return tuple(range(self.layers)) if self.clustered is None else self.clustered

    @property
    def slots(self) -> int:
        """Token slots of the pool."""
        return self.pages * self.page_size


def index_pages(pool_pages: int) -> int:
    """Pages that an index has room for: so many that every layer's part of every array begins at 16 bytes.

    Wide loads need that, and Triton would compile its kernels once more for parts that begin elsewhere.
    """
    return -(-pool_pages // 8) * 8


def index_shapes(config: ClusterKVConfig, geometry: Geometry) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of every array of the index."""
    g = geometry
    rows = RowCodec(config.centroid_dtype, g.head_dim)
    tokens = TokenCodec(config.code_bits, g.head_dim)
    layers = len(g.clustered_layers)
    clusters = (layers, g.pages * (g.page_size // config.tokens_per_cluster), g.kv_heads)
    slots = (layers, g.slots, g.kv_heads)
    shapes = {
        "key_rows": ((*clusters, rows.packed_bytes), torch.uint8),
        "value_rows": ((*clusters, rows.packed_bytes), torch.uint8),
        "spread": (clusters, torch.bfloat16),
        "cluster_end": (clusters, torch.int16),
        "segment_vectors": ((layers, g.pages, g.kv_heads, 3, g.head_dim // SEGMENT_VECTOR_PAGES), torch.bfloat16),
        "members": (slots, torch.int16),
        "page_state": ((g.pages, 3), torch.int32),
    }
    if rows.scales:
        shapes["key_scales"] = ((*clusters, rows.scales), torch.bfloat16)
        shapes["value_scales"] = ((*clusters, rows.scales), torch.bfloat16)
    if config.refine:
        shapes["codes"] = ((*slots, tokens.code_bytes), torch.uint8)
        shapes["code_scales"] = (slots, torch.bfloat16)
    return shapes


def allocate(config: ClusterKVConfig, geometry: Geometry, device: str) -> dict[str, torch.Tensor]:
    """Allocate the arrays of `index_shapes`, zeroed, on `device`."""
    shapes = index_shapes(config, geometry)
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}


def index_bytes(config: ClusterKVConfig, geometry: Geometry) -> int:
    """Bytes of all arrays of the index."""
    total = 0
    for shape, dtype in index_shapes(config, geometry).values():
        total += torch.Size(shape).numel() * dtype.itemsize
    return total


def metadata_bytes_per_token(
    config: ClusterKVConfig, *, page_size: int, head_dim: int, kv_heads: int, layers: int
) -> int:
    """Bytes of the index per token slot of the pool, of this rank's kv heads and the layers with clusters, rounded up."""
    page = index_bytes(config, Geometry(layers, kv_heads, head_dim, page_size, pages=1))
    return -(-page // page_size)
