"""The chain on the CPU: numba kernels over buffers that are kept between layers and steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_clusterkv.kernels.attend.cpu import attend_kernel
from sglang_clusterkv.kernels.cpu_math import NEGLIGIBLE, bits
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.kernels.decode.last import LastRead
from sglang_clusterkv.kernels.estimate.cpu import estimate_kernel
from sglang_clusterkv.kernels.merge.cpu import mass_kernel, merge_kernel, sinks_kernel
from sglang_clusterkv.kernels.merge.reference import by_kv_head
from sglang_clusterkv.kernels.refine.cpu import recall_all_kernel, recall_kernel, value_kernel
from sglang_clusterkv.kernels.row_cpu import ROW_FORMATS, row_views
from sglang_clusterkv.kernels.score.cpu import score_kernel
from sglang_clusterkv.kernels.select.cpu import select_kernel
from sglang_clusterkv.memory.codec import channels_per_scale
from sglang_clusterkv.memory.rotation import rotation_matrix

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierArrays, TierLayer


KERNEL_DTYPES = (torch.bfloat16, torch.float32)  # of pools that the kernels read; others go by the reference


class LayerArrays:
    """One layer of the index as numpy views."""

    def __init__(self, index: ClusterIndex, layer: int) -> None:
        view = index.layer(layer)
        self.key_rows = row_views(view.key_rows, view.key_scales)
        self.value_rows = row_views(view.value_rows, view.value_scales)
        self.spread = bits(view.spread)
        self.cluster_end = view.cluster_end.numpy()
        self.vectors = bits(view.segment_vectors)
        self.members = view.members.numpy()
        self.mass = index.mass_cells[layer, 0].numpy()
        if view.codes is not None and view.code_scales is not None:
            codes = view.codes.numpy()
            self.codes = codes.view(np.uint16) if index.config.code_bits == 2 else codes
            self.code_scales = bits(view.code_scales)


@dataclass
class Buffers:
    """What the operations of one layer hand to each other; B, H, G, D as in the references. C clusters, W tokens that are
    always attended, K candidates and R recalled tokens: what the step has, rounded up, whatever the configuration allows."""

    size: np.ndarray  # int32 [B, H, C]
    begin: np.ndarray  # int32 [B, H, C]
    taken: np.ndarray  # int32 [B, H, C]: members that are candidates, then tokens recalled
    log_mass: np.ndarray  # float32 [B, H, C]
    dot: np.ndarray  # float32 [B, H, G, C]
    weight: np.ndarray  # float32 [B, H, G, C]
    base_logit: np.ndarray  # float32 [B, H, G, W]
    peak: np.ndarray  # float32 [B, H, G]
    total: np.ndarray  # float32 [B, H, G]
    candidates: np.ndarray  # int32 [B, H]
    value: np.ndarray  # float32 [B, H, K]
    place: np.ndarray  # int32 [B, H, K]
    of_cluster: np.ndarray  # int32 [B, H, K]
    recalled: np.ndarray  # int64 [B, H, R]
    recalled_count: np.ndarray  # int32 [B, H]
    lse: np.ndarray  # float32 [B, H, G]: of what was read, then of all tokens
    exact_lse: np.ndarray  # float32 [B, H, G]: of what was read
    estimate: np.ndarray  # float32 [B, H, G, D]
    estimate_lse: np.ndarray  # float32 [B, H, G]


def make_buffers(
    batch: int, heads: int, group: int, channels: int, clusters: int, base: int, candidates: int, recalled: int
) -> Buffers:
    """Allocate the buffers of a step."""
    by_head, by_query = (batch, heads), (batch, heads, group)

    def floats(*shape: int) -> np.ndarray:
        return np.empty(shape, np.float32)

    def ints(*shape: int) -> np.ndarray:
        return np.empty(shape, np.int32)

    return Buffers(
        size=ints(*by_head, clusters),
        begin=ints(*by_head, clusters),
        taken=ints(*by_head, clusters),
        log_mass=floats(*by_head, clusters),
        dot=floats(*by_query, clusters),
        weight=floats(*by_query, clusters),
        base_logit=floats(*by_query, base),
        peak=floats(*by_query),
        total=floats(*by_query),
        candidates=ints(*by_head),
        value=floats(*by_head, candidates),
        place=ints(*by_head, candidates),
        of_cluster=ints(*by_head, candidates),
        recalled=np.empty((*by_head, recalled), np.int64),
        recalled_count=ints(*by_head),
        lse=floats(*by_query),
        exact_lse=floats(*by_query),
        estimate=floats(*by_query, channels),
        estimate_lse=floats(*by_query),
    )


def _room(needed: int) -> int:
    """Entries of a buffer's row: rounded up, so that it is outgrown rarely."""
    return -(-needed // 256) * 256


class CpuDecoder:
    """The operations of a layer for one geometry, callable one by one (benchmarks) or as a chain.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        is_bf16: the pool's dtype is bf16 (else float32).
    """

    def __init__(self, index: ClusterIndex, group: int, is_bf16: bool) -> None:
        config, geometry = index.config, index.geometry
        channels = geometry.head_dim
        row_format, per_scale = ROW_FORMATS[config.centroid_dtype], channels_per_scale(channels)
        self.index = index
        self.config = config
        self.layers = {layer: LayerArrays(index, layer) for layer in index.row_of}
        self.limit = config.candidate_tokens if config.refine else config.budget_tokens
        self._score = score_kernel(channels, group, row_format, per_scale, is_bf16)
        self._value = value_kernel(channels, group, config.code_bits)
        self._attend = attend_kernel(channels, group, is_bf16)
        self._estimate = estimate_kernel(channels, group, row_format, per_scale)
        self.sinks: np.ndarray | None = None  # of the layer that was scored last
        self._no_sinks = np.full((geometry.kv_heads, group), NEGLIGIBLE)
        self._step: SparseStep | None = None
        self._shape: tuple[int, ...] = ()

    def prepare(self, step: SparseStep, heads: int, group: int, channels: int) -> None:
        """Take a step's lists and make the buffers fit; once per step."""
        if step is self._step:
            return
        self._step = None  # nothing is prepared, should memory run out now
        clusters = _room(step.pages.shape[1] * self.index.clusters_per_page)
        tokens = _room(step.recallable_tokens)
        candidates, recalled = min(self.limit, tokens), min(self.config.budget_tokens, tokens)
        shape = (step.batch, heads, group, channels, clusters, _room(step.base_slots.shape[1]), candidates, recalled)
        if shape != self._shape:
            self.buffers = make_buffers(*shape)
            self._shape = shape
        self.pages = step.pages.numpy()
        self.page_count = step.page_count.numpy()
        self.segment_begin = step.segment_begin.numpy()
        self.segment_count = step.segment_count.numpy()
        self.base_slots = step.base_slots.numpy()
        self.base_count = step.base_count.numpy()
        self._step = step

    def score(
        self,
        q: np.ndarray,
        keys: np.ndarray,
        layer: int,
        scale: float,
        host: TierArrays | None = None,
        sinks: np.ndarray | None = None,
    ) -> None:
        """Clusters' masses and totals, always-attended tokens' logits; sinks [H, G] as `attend` adds them."""
        a, u = self.layers[layer], self.buffers
        self.sinks = sinks
        self._score(
            q, keys, host, *a.key_rows, a.spread, a.cluster_end, a.vectors, self.pages, self.segment_begin,
            self.segment_count, self.page_count, self.base_slots, self.base_count,
            self._no_sinks if sinks is None else sinks, np.float32(scale),
            np.float32(self.config.choice_spread), np.float32(self.config.estimate_spread),
            self.index.geometry.page_size, self.index.clusters_per_page,
            u.size, u.begin, u.dot, u.weight, u.log_mass, u.base_logit, u.peak, u.total,
        )  # fmt: skip

    def select(self) -> None:
        """Members of each cluster that are candidates."""
        u = self.buffers
        select_kernel(
            u.log_mass, u.size, self.page_count, self.index.clusters_per_page, self.limit, u.taken, u.candidates
        )

    def refine(self, rotated: np.ndarray, layer: int, scale: float) -> None:
        """Candidates' scores from their codes."""
        a, u = self.layers[layer], self.buffers
        self._value(
            rotated, a.codes, a.code_scales, a.members, self.pages, self.page_count, self.index.geometry.page_size,
            self.index.clusters_per_page, self.segment_begin, self.segment_count, np.float32(scale), u.dot, u.begin,
            u.taken, u.total, u.value, u.place, u.of_cluster,
        )  # fmt: skip

    def recall(self) -> None:
        """The best candidates' slots."""
        u = self.buffers
        recall_kernel(
            u.value, u.place, u.of_cluster, u.candidates, self.pages, self.index.geometry.page_size,
            self.config.budget_tokens, u.taken, u.recalled, u.recalled_count,
        )  # fmt: skip

    def recall_all(self, layer: int) -> None:
        """All candidates' slots, where nothing is refined."""
        u = self.buffers
        recall_all_kernel(
            self.layers[layer].members, self.pages, self.page_count, self.index.geometry.page_size,
            self.index.clusters_per_page, self.segment_begin, self.segment_count, u.begin, u.taken, u.recalled,
            u.recalled_count,
        )  # fmt: skip

    def attend(
        self,
        q: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        scale: float,
        output: np.ndarray,
        host: TierArrays | None = None,
    ) -> None:
        """Exact attention over always-attended and recalled tokens, and the learned sinks that score was given."""
        u = self.buffers
        self._attend(
            q, keys, values, host, self.base_slots, self.base_count, u.base_logit, u.recalled, u.recalled_count,
            np.float32(scale), output, u.lse,
        )  # fmt: skip
        if self.sinks is not None:
            sinks_kernel(output, u.lse, self.sinks)

    def estimate(self, layer: int) -> None:
        """What was not recalled, by clusters."""
        a, u = self.layers[layer], self.buffers
        self._estimate(
            *a.value_rows, a.vectors, self.pages, self.segment_begin, self.segment_count, self.page_count,
            self.index.clusters_per_page, self.config.estimate_clusters, u.size, u.taken, u.weight, u.peak, u.total,
            u.estimate, u.estimate_lse,
        )  # fmt: skip

    def note_mass(self, layer: int) -> None:
        """How much of the mass was read exactly; counted last, once nothing can fail any more."""
        u, mass = self.buffers, self.layers[layer].mass
        if self.config.estimate:
            mass_kernel(mass, u.exact_lse, u.estimate_lse, False)
        else:
            mass_kernel(mass, u.lse, u.total, True)

    def merge(self, output: np.ndarray) -> None:
        """Both parts into `output`."""
        u = self.buffers
        u.exact_lse[...] = u.lse
        merge_kernel(output, u.lse, u.estimate, u.estimate_lse)


def decoder_of(index: ClusterIndex, group: int, is_bf16: bool) -> CpuDecoder:
    """The decoder of an index; made once."""
    key = (group, is_bf16)
    if key not in index.scratch:
        index.scratch[key] = CpuDecoder(index, group, is_bf16)
    return index.scratch[key]


def prepare(index: ClusterIndex, group: int, dtype: torch.dtype, step: SparseStep) -> None:
    """See `kernels.decode.prepare`."""
    if dtype in KERNEL_DTYPES:
        geometry = index.geometry
        decoder_of(index, group, dtype is torch.bfloat16).prepare(step, geometry.kv_heads, group, geometry.head_dim)


def sparse_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: ClusterIndex,
    layer: int,
    step: SparseStep,
    scale: float,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `kernels.decode.sparse_decode`."""
    if keys.dtype not in KERNEL_DTYPES:
        return reference.sparse_decode(q, keys, values, index, layer, step, scale, tier, sinks)
    kv_heads, channels = keys.shape[1:]
    grouped = q.float().unflatten(1, (kv_heads, -1)).contiguous()
    decoder = decoder_of(index, grouped.shape[2], keys.dtype is torch.bfloat16)
    decoder.prepare(step, kv_heads, grouped.shape[2], channels)
    output = torch.empty_like(grouped)
    q_rows, key_rows, out = grouped.numpy(), bits(keys), output.numpy()
    host = None if tier is None else tier.arrays
    by_head = None if sinks is None else by_kv_head(sinks, kv_heads).numpy()
    decoder.score(q_rows, key_rows, layer, scale, host, by_head)
    decoder.select()
    if index.config.refine:
        decoder.refine((grouped @ rotation_matrix(channels).T).numpy(), layer, scale)
        decoder.recall()
    else:
        decoder.recall_all(layer)
    decoder.attend(q_rows, key_rows, bits(values), scale, out, host)
    if index.config.estimate:
        decoder.estimate(layer)
        decoder.merge(out)
    result = output.flatten(1, 2).to(q.dtype)
    decoder.note_mass(layer)
    return result


def last_read(decoder: CpuDecoder, place: int) -> LastRead:
    """See `kernels.decode.last_read`."""
    u = decoder.buffers
    base = torch.from_numpy(u.base_logit[place, :, :, : decoder.base_count[place]])
    if decoder.sinks is not None:  # they count with the base
        base = torch.cat((base, torch.from_numpy(decoder.sinks).unsqueeze(-1)), -1)
    if decoder.config.estimate:
        exact, whole = torch.from_numpy(u.exact_lse[place]), torch.from_numpy(u.lse[place])
    else:
        exact = torch.from_numpy(u.lse[place])
        whole = torch.maximum(exact, torch.from_numpy(u.total[place]))
    recalled, count = torch.from_numpy(u.recalled[place]), torch.from_numpy(u.recalled_count[place])
    return LastRead(recalled, count, base, exact, whole)
