"""The chain on the CPU: one numba kernel per layer over buffers that are kept between layers and steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.kernels.bundle_cpu import bundle_of
from sglang_clusterkv.kernels.cpu_math import NEGLIGIBLE, bits
from sglang_clusterkv.kernels.decode import chain_cpu, reference
from sglang_clusterkv.kernels.decode.chain_cpu import Buffers, Lists, Numbers, Scratch, make_buffers, make_scratch
from sglang_clusterkv.kernels.merge.cpu import mass_kernel
from sglang_clusterkv.kernels.merge.reference import by_kv_head
from sglang_clusterkv.kernels.row_cpu import POOL_FORMATS
from sglang_clusterkv.kernels.threads_cpu import run, threads
from sglang_clusterkv.kernels.trace.cpu import nobody
from sglang_clusterkv.kernels.trace.last import LastRead
from sglang_clusterkv.kernels.vectors_cpu import ROW_FORMATS
from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.rotation import rotation_signs
from sglang_clusterkv.memory.sharing import no_shared_segments

if TYPE_CHECKING:
    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierArrays, TierLayer


_NO_SCALES = np.empty((0, 0, 0), np.uint16)


class LayerArrays(NamedTuple):
    """One layer of the index as numpy views, bf16 as its bits."""

    key_rows: np.ndarray  # uint8 [C, H, packed_bytes]
    key_scales: np.ndarray  # uint16 [C, H, scales]; empty for rows in bf16
    value_rows: np.ndarray
    value_scales: np.ndarray
    spread: np.ndarray  # uint16 [C, H]
    cluster_end: np.ndarray  # int16 [C, H]
    # uint16 [pages, H, 3, D/4]; on other pages than a segment's first, of its movement the rows that meet the query, and apart,
    # of the same memory:
    vectors: np.ndarray
    meets_scales: np.ndarray  # uint16 [pages, H, ...], their scales
    adds: np.ndarray  # uint16 [pages, H, D/4], the rows that are added
    adds_scales: np.ndarray
    members: np.ndarray  # int16 [S, H]
    codes: np.ndarray  # uint8 [S, H, code_bytes]; empty where nothing is refined
    code_scales: np.ndarray  # uint16 [S, H]


def layer_arrays(index: ClusterIndex, layer: int) -> LayerArrays:
    """Views of a layer of the index."""
    view = index.layer(layer)
    vectors = bits(view.segment_vectors)
    scales = vectors[:, :, movement.SCALES]
    return LayerArrays(
        key_rows=view.key_rows.numpy(),
        key_scales=_NO_SCALES if view.key_scales is None else bits(view.key_scales),
        value_rows=view.value_rows.numpy(),
        value_scales=_NO_SCALES if view.value_scales is None else bits(view.value_scales),
        spread=bits(view.spread),
        cluster_end=view.cluster_end.numpy(),
        vectors=vectors,
        meets_scales=scales,
        adds=vectors[:, :, movement.ADDS],
        adds_scales=scales[:, :, movement.row_codec(index.geometry.head_dim).scales :],
        members=view.members.numpy(),
        codes=np.empty((0, 0, 0), np.uint8) if view.codes is None else view.codes.numpy(),
        code_scales=np.empty((0, 0), np.uint16) if view.code_scales is None else bits(view.code_scales),
    )


def _room(needed: int) -> int:
    """Entries of a buffer's row: rounded up, so that it is outgrown rarely."""
    return -(-needed // 256) * 256


class CpuDecoder:
    """The operations of a layer for one geometry, callable one by one (benchmarks) or as a chain.

    Args:
        index: the cluster index.
        group: query heads per kv head.
        pool: the pool's dtype, one of `POOL_FORMATS`.
    """

    buffers: Buffers
    scratch: Scratch

    def __init__(self, index: ClusterIndex, group: int, pool: torch.dtype) -> None:
        config, geometry = index.config, index.geometry
        channels = geometry.head_dim
        self.index = index
        self.config = config
        self.layers = {layer: layer_arrays(index, layer) for layer in index.row_of}
        self.masses = {layer: index.mass_cells[layer, 0].numpy() for layer in index.row_of}
        self._any_layer = next(iter(self.layers))
        self._layers = {layer: bundle_of(arrays) for layer, arrays in self.layers.items()}
        self.limit = config.candidate_tokens if config.refine else config.budget_tokens
        # With the rotation's factor.
        self.signs = (rotation_signs(channels) / (channels & -channels) ** 0.5).numpy()
        row_format = ROW_FORMATS[config.centroid_dtype]
        self._kernel = chain_cpu.chain_kernel(channels, group, row_format, config.code_bits, POOL_FORMATS[pool])
        self._nothing = bits(torch.empty((0, 0, 0), dtype=pool))
        self._operations = (
            chain_cpu.SCORE
            | chain_cpu.SELECT
            | (chain_cpu.ROTATE | chain_cpu.REFINE | chain_cpu.RECALL if config.refine else chain_cpu.RECALL_ALL)
            | chain_cpu.ATTEND
            | (chain_cpu.ESTIMATE | chain_cpu.MERGE if config.estimate else 0)
        )
        self._nobody = nobody()
        self.sinks: np.ndarray | None = None  # of the layer that was scored last
        self._no_sinks = np.full((geometry.kv_heads, group), NEGLIGIBLE)
        self._step: SparseStep | None = None
        self._shape: tuple[int, ...] = ()
        self._numbers: dict[tuple[float, int], Numbers] = {}

    def prepare(self, step: SparseStep, heads: int, group: int, channels: int) -> None:
        """Take a step's lists and make the buffers fit; once per step."""
        if step is self._step:
            return
        self._step = None  # nothing is prepared, should memory run out now
        clusters = _room(step.pages.shape[1] * self.index.clusters_per_page)
        tokens, base = _room(step.recallable_tokens), _room(step.base_slots.shape[1])
        candidates, recalled = min(self.limit, tokens), min(self.config.budget_tokens, tokens)
        segments = -(-step.segment_begin.shape[1] // 16) * 16
        shape = (step.batch, heads, group, channels, segments, clusters, base, candidates, recalled, threads())
        if shape != self._shape:
            self._shape = ()
            self.buffers = make_buffers(*shape[:9])
            self.scratch = make_scratch(threads(), group, channels, clusters, base, candidates, recalled)
            self._bundle()
            self._shape = shape
        shared = no_shared_segments(step.batch, step.segment_begin.shape[1]) if step.shared is None else step.shared
        pages, page_count = step.pages.numpy(), step.page_count.numpy()
        rows = chain_cpu.cluster_rows(pages, page_count, self.index.clusters_per_page)
        self.lists = Lists(
            pages, rows, page_count, step.segment_begin.numpy(), step.segment_count.numpy(),
            step.base_slots.numpy(), step.base_count.numpy(), *shared,
        )  # fmt: skip
        self._lists = bundle_of(self.lists)
        # All heads of a request, unless some thread would then have nothing left to do while another has a long one.
        self._pairs_at_once = heads if 2 * threads() * page_count.max() <= page_count.sum() else 1
        self._step = step

    def _bundle(self) -> None:
        self._buffers, self._scratch = bundle_of(self.buffers), bundle_of(self.scratch)

    def make_room(self, tokens: int) -> None:
        """For so many recalled tokens of a head, where someone else chooses them; what was recalled stays."""
        u = self.buffers
        more = tokens - u.recalled.shape[2]
        if more > 0:
            self.buffers = u._replace(recalled=np.pad(u.recalled, ((0, 0), (0, 0), (0, more))))
            clusters, base = u.size.shape[2], u.base_logit.shape[3]
            self.scratch = make_scratch(
                len(self.scratch.bins), u.dot.shape[2], u.rotated.shape[3], clusters, base, u.value.shape[2], tokens
            )
            self._bundle()

    def _do(
        self,
        operations: int,
        layer: int,
        scale: float,
        q: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        output: np.ndarray,
        host: TierArrays | None = None,
        seen: Any = None,
    ) -> None:
        numbers = self._numbers.get((scale, self._pairs_at_once)) or self._numbers_of(scale)
        run(
            self._kernel, -(-self.buffers.candidates.size // self._pairs_at_once), operations, q,
            self._no_sinks if self.sinks is None else self.sinks, self.signs, keys, values, host,
            self._layers[layer], self._lists, numbers, self._buffers, self._scratch, output,
            self.index.row_of[layer], self._nobody if seen is None else seen, most=len(self.scratch.bins),
        )  # fmt: skip

    def _numbers_of(self, scale: float) -> Numbers:
        """The kernel's numbers for layers of this scale; made once."""
        config, at_once = self.config, self._pairs_at_once
        by_code, moved = config.refine and config.estimate_codes, np.float32(movement.weight(config))
        numbers = self._numbers[scale, at_once] = Numbers(
            np.float32(scale), np.float32(config.choice_spread), np.float32(config.estimate_spread),
            self.index.geometry.page_size, self.index.clusters_per_page, self.limit, config.budget_tokens,
            config.estimate_clusters, config.moving_values == "always", moved, by_code, at_once,
        )  # fmt: skip
        return numbers

    def run(
        self,
        q: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        layer: int,
        scale: float,
        output: np.ndarray,
        host: TierArrays | None = None,
        sinks: np.ndarray | None = None,
    ) -> None:
        """All operations of a layer.

        Args:
            q: float32 [B, H, G, D].
            keys: [slots, H, D], the layer's pool, as `bits` gives it.
            values: likewise.
            layer: counted from this rank's first.
            scale: of the logits.
            output: float32 [B, H, G, D], written.
            host: where some slots' keys and values are on the host.
            sinks: float32 [H, G], learned ones; None: there are none.
        """
        self.sinks = sinks
        operations, seen, watched = self._operations, None, self.index.watched
        if watched is not None and watched[0] is self._step:
            operations, seen = operations | chain_cpu.LOOK, watched[1]
        self._do(operations, layer, scale, q, keys, values, output, host, seen)
        if host is not None:
            host.reads[:] += self.buffers.reads.sum((0, 1))

    # -- one operation each, for whoever looks at what it leaves ------------------------------------------------------

    def score(self, q: np.ndarray, keys: np.ndarray, layer: int, scale: float, sinks: np.ndarray | None = None) -> None:
        """Clusters' masses and totals, always-attended tokens' logits; sinks [H, G] as `attend` adds them."""
        self.sinks = sinks
        self._do(chain_cpu.SCORE, layer, scale, q, keys, keys, q)

    def select(self) -> None:
        """Members of each cluster that are candidates."""
        self._alone(chain_cpu.SELECT)

    def rotate(self, q: np.ndarray) -> None:
        """Queries as their codes want them."""
        self._do(chain_cpu.ROTATE, self._any_layer, 1.0, q, self._nothing, self._nothing, q)

    def refine(self, layer: int, scale: float) -> None:
        """Candidates' scores from their codes, by rotated queries."""
        self._alone(chain_cpu.REFINE, layer, scale)

    def recall(self) -> None:
        """The best candidates' slots."""
        self._alone(chain_cpu.RECALL)

    def recall_all(self, layer: int) -> None:
        """All candidates' slots, where nothing is refined."""
        self._alone(chain_cpu.RECALL_ALL, layer)

    def attend(self, q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float, output: np.ndarray) -> None:
        """Exact attention over always-attended and recalled tokens."""
        self._do(chain_cpu.ATTEND, self._any_layer, scale, q, keys, values, output)

    def estimate(self, q: np.ndarray, layer: int, scale: float) -> None:
        """What was not recalled, by clusters."""
        self._do(chain_cpu.ESTIMATE, layer, scale, q, self._nothing, self._nothing, q)

    def merge(self, output: np.ndarray) -> None:
        """Both parts into `output`."""
        self._do(chain_cpu.MERGE, self._any_layer, 1.0, self.buffers.rotated, self._nothing, self._nothing, output)

    def _alone(self, operation: int, layer: int | None = None, scale: float = 1.0) -> None:
        """An operation that reads neither queries nor the pool."""
        rotated = self.buffers.rotated  # of their shape
        layer = self._any_layer if layer is None else layer
        self._do(operation, layer, scale, rotated, self._nothing, self._nothing, rotated)

    def note_mass(self, layer: int) -> None:
        """How much of the mass was read exactly; counted last, once nothing can fail any more."""
        u, mass = self.buffers, self.masses[layer]
        if self.config.estimate:
            mass_kernel(mass, u.exact_lse, u.estimate_lse, False)
        else:
            mass_kernel(mass, u.lse, u.total, True)


def decoder_of(index: ClusterIndex, group: int, pool: torch.dtype) -> CpuDecoder:
    """The decoder of an index; made once."""
    key = (group, pool)
    if key not in index.scratch:
        index.scratch[key] = CpuDecoder(index, group, pool)
    return index.scratch[key]


def prepare(index: ClusterIndex, group: int, dtype: torch.dtype, step: SparseStep) -> None:
    """See `kernels.decode.prepare`."""
    if dtype in POOL_FORMATS:
        geometry = index.geometry
        decoder_of(index, group, dtype).prepare(step, geometry.kv_heads, group, geometry.head_dim)


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
    if keys.dtype not in POOL_FORMATS:
        return reference.sparse_decode(q, keys, values, index, layer, step, scale, tier, sinks)
    kv_heads, channels = keys.shape[1:]
    group = q.shape[1] // kv_heads
    grouped = q.float().reshape(len(q), kv_heads, group, channels).contiguous()
    decoder = decoder_of(index, group, keys.dtype)
    decoder.prepare(step, kv_heads, group, channels)
    output = torch.empty_like(grouped)
    host = None if tier is None else tier.arrays
    by_head = None if sinks is None else by_kv_head(sinks, kv_heads).numpy()
    decoder.run(grouped.numpy(), bits(keys), bits(values), layer, scale, output.numpy(), host, by_head)
    result = output.view(q.shape).to(q.dtype)
    decoder.note_mass(layer)
    return result


def last_read(decoder: CpuDecoder, place: int) -> LastRead:
    """See `kernels.decode.last_read`."""
    u = decoder.buffers
    base = torch.from_numpy(u.base_logit[place, :, :, : decoder.lists.base_count[place]])
    if decoder.sinks is not None:  # they count with the base
        base = torch.cat((base, torch.from_numpy(decoder.sinks).unsqueeze(-1)), -1)
    if decoder.config.estimate:
        exact, whole = torch.from_numpy(u.exact_lse[place]), torch.from_numpy(u.lse[place])
    else:
        exact = torch.from_numpy(u.lse[place])
        whole = torch.maximum(exact, torch.from_numpy(u.total[place]))
    recalled, count = torch.from_numpy(u.recalled[place]), torch.from_numpy(u.recalled_count[place])
    return LastRead(recalled, count, base, exact, whole)
