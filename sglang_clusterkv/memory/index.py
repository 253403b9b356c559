"""The cluster index: arrays beside the KV pool, indexed by page, slot and kv head, and the state of each page.

Layers that never recall have no part in it; `ClusterIndex.row_of` has where the others' parts are.

A segment of n pages has n * clusters_per_page clusters; those of its j-th page's rows are clusters
j * clusters_per_page, ... of the segment. The index needs no allocator: it lives and dies with the pages.

Page state is read and written on the forward stream only, in launch order; this table is the truth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.memory import device as device_tier
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec
from sglang_clusterkv.memory.step import to_device

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig
    from sglang_clusterkv.memory.device import Geometry

UNCLUSTERED = -1
CONFLICTS, OUT_OF_RANGE = 0, 1  # pages marked that were another segment's; indices, where they are checked


class LayerView(NamedTuple):
    """The index of one layer. C = clusters of the pool, S = slots of the pool, H = kv heads, D = head_dim."""

    key_rows: torch.Tensor  # uint8 [C, H, packed_bytes], centroid relative to the segment's mean key as stored
    key_scales: torch.Tensor | None  # bf16 [C, H, scales]; None for rows in bf16
    value_rows: torch.Tensor  # uint8 [C, H, packed_bytes], mean value
    value_scales: torch.Tensor | None  # bf16 [C, H, scales]
    spread: torch.Tensor  # bf16 [C, H]
    cluster_end: torch.Tensor  # int16 [C, H], end of the cluster in its segment's member list
    segment_vectors: torch.Tensor  # bf16 [pages, H, 3, D/4]: quarters of mean key, mean value, variance; movement
    members: torch.Tensor  # int16 [S, H], offsets in the segment, sorted by cluster
    codes: torch.Tensor | None  # uint8 [S, H, code_bytes], in the order of `members`
    code_scales: torch.Tensor | None  # bf16 [S, H]


class ClusterIndex:
    """Owns the arrays and the page states.

    Args:
        config: the resolved configuration.
        geometry: sizes of the KV pool.
        device: where the arrays live.
    """

    def __init__(self, config: ClusterKVConfig, geometry: Geometry, device: str) -> None:
        self.config = config
        self.geometry = geometry
        self.device = device
        self.row_codec = RowCodec(config.centroid_dtype, geometry.head_dim)
        self.token_codec = TokenCodec(config.code_bits, geometry.head_dim)
        self.clusters_per_page = geometry.page_size // config.tokens_per_cluster
        self.arrays = device_tier.allocate(config, geometry, device)
        self.keeps_movement = config.moving_values == "always"  # of values, whether or not a step reads it just now
        self.page_state = self.arrays["page_state"]  # int32 [pages, 3]: segment id, index in the segment, its pages
        self.page_state[:, 0] = UNCLUSTERED
        # Recalled mass of all sparse steps since the start, its sum and how many (request, query head): float64
        # [layers, H, 2], a cell for each kv head so that a GPU's programs do not all add to one. A CPU has the first's.
        self.mass_cells = torch.zeros((geometry.layers, geometry.kv_heads, 2), dtype=torch.float64, device=device)
        # How often happened what never may, int64 [2]: at `CONFLICTS` and `OUT_OF_RANGE`.
        self.violations = torch.zeros(2, dtype=torch.int64, device=device)
        self.checks: Any = None  # of indices, where they are asked for: kernels.checks.IndexChecks
        self.scratch: dict[Any, Any] = {}  # what kernels keep with the index: views and buffers
        self.watched: tuple[Any, Any] | None = None  # on a CPU, a step with traced requests, and what is noted of them
        self.row_of = {
            layer: row for row, layer in enumerate(geometry.clustered_layers)
        }  # in arrays that begin with layers
        self._layers = {layer: self._view(row) for layer, row in self.row_of.items()}

    def _view(self, row: int) -> LayerView:
        return LayerView(*(self.arrays[name][row] if name in self.arrays else None for name in LayerView._fields))

    def layer(self, layer: int) -> LayerView:
        """The arrays of one layer (counted from this rank's first). Raises KeyError for one without clusters."""
        return self._layers[layer]

    @property
    def mass(self) -> torch.Tensor:
        """Recalled mass by layer, float64 [layers, 2]: the kv heads' cells together."""
        return self.mass_cells.sum(1)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.numel() * array.element_size() for array in self.arrays.values())

    @property
    def clusters(self) -> int:
        """Clusters stored now, over layers and kv heads; pages that are free but not yet handed out again count.

        Waits for the device: not for a decode step.
        """
        return int(self.clustered_pages()) * self.clusters_of_a_page

    @property
    def clusters_of_a_page(self) -> int:
        """Clusters at one page, over kv heads and the layers that have any."""
        return self.clusters_per_page * len(self.row_of) * self.geometry.kv_heads

    def clustered_pages(self) -> torch.Tensor:
        """Pages that belong to a segment, int64 [] on the device: does not wait for it."""
        return (self.page_state[:, 0] != UNCLUSTERED).sum()

    def invalidate(self, pages: torch.Tensor) -> None:
        """Mark pages (int64 [n], any device order) unclustered: they were handed out again."""
        self.page_state[:, 0].index_fill_(0, pages, UNCLUSTERED)

    def invalidate_all(self) -> None:
        """Mark every page unclustered: the allocator was cleared."""
        self.page_state[:, 0] = UNCLUSTERED

    def forget(self, segment_ids: list[int]) -> None:
        """Mark every page of these segments unclustered, whoever sees it."""
        ids = torch.tensor(segment_ids, dtype=torch.int32).to(self.device, non_blocking=True)
        owner = self.page_state[:, 0]
        owner.masked_fill_(torch.isin(owner, ids), UNCLUSTERED)

    def mark(self, segment_ids: list[int], pages: list[torch.Tensor]) -> None:
        """Make `pages` (int64 [n] each, in sequence order) the pages of these segments; does not wait for the device.

        A page that is another segment's is counted: a plan and the device disagree. It becomes the new one's all the same, for
        its tables are, and whoever looks at the old segment finds that it is not whole.
        """
        listed = pages[0] if len(pages) == 1 else torch.cat(pages)
        owner = self.page_state[:, 0]
        self.violations[CONFLICTS] += (owner[listed] != UNCLUSTERED).sum()
        state = np.concatenate(
            [
                np.stack(np.broadcast_arrays(segment, np.arange(len(of)), len(of)), 1)
                for segment, of in zip(segment_ids, pages, strict=True)
            ]
        )
        self.page_state[listed] = to_device(state, listed.device.type, np.int32)

    def cluster_rows(self, pages: torch.Tensor) -> torch.Tensor:
        """Rows of the clusters at `pages` [...]: int64 [..., clusters_per_page]."""
        offsets = torch.arange(self.clusters_per_page, device=pages.device)
        return pages.unsqueeze(-1) * self.clusters_per_page + offsets
