"""What benchmarks/kernels.py measures on: a pool of random keys of a model's shape, clustered; and how time is taken."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import psutil  # type: ignore[import-untyped]
import torch

from sglang_clusterkv.clusters.engine import ClusterEngine, Extend
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import Geometry, index_bytes
from sglang_clusterkv.memory.huge_pages import use_huge_pages
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.movement import rank_of, row_codec
from sglang_clusterkv.memory.step import DenseStep, SparseStep, dense_step

PAGE_SIZE = 16
STEP = "whole step"
OUR_DENSE = "our dense"
CENTRES = 256  # that the keys lie around
DTYPES = {"bf16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLUSHED_BYTES = 256 << 20  # several times the L2 cache of any GPU
COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
MEMORY_SHARE = 0.6  # of what is free, that a scene may take


class Shape(NamedTuple):
    """Attention of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads


SHAPES = {
    "smollm2-135m": Shape(30, 9, 3, 64),
    "qwen2.5-7b": Shape(28, 28, 4, 128),
    "llama-3.1-8b": Shape(32, 32, 8, 128),
}


class Operation(NamedTuple):
    """One operation of a decode step.

    Attributes:
        name: of the operation.
        call: runs it on one layer.
        moved_bytes: bytes that it must read and write for one layer; 0 where they do not count.
    """

    name: str
    call: Callable[[int], object]
    moved_bytes: float


class Clustering(NamedTuple):
    """A part of clustering, for all layers of the scene.

    Attributes:
        name: of the part.
        call: runs it.
        moved_bytes: bytes that it must read and write.
        tokens: that it clusters.
        includes: name of an earlier part whose work `call` also does.
    """

    name: str
    call: Callable[[], object]
    moved_bytes: float
    tokens: int
    includes: str | None = None


class Clock(Protocol):
    """Takes time on one device."""

    def ms(self, call: Callable[[], object], repeats: int) -> float:
        """Milliseconds of a call, with nothing of it in the caches of a GPU."""


class CpuClock:
    """Least of several times: on a CPU every disturbance only adds."""

    def ms(self, call: Callable[[], object], repeats: int) -> float:
        """See `Clock`."""
        call()
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        return 1000 * min(times)


class CudaClock:
    """Median of several times between CUDA events, after the L2 cache was overwritten.

    Args:
        graphs: replay the call as a CUDA graph, as SGLang's decode does: else launches from Python are what is measured.
            The call must be capturable.
    """

    def __init__(self, graphs: bool = True) -> None:
        self._graphs = graphs
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def ms(self, call: Callable[[], object], repeats: int) -> float:
        """See `Clock`."""
        call()  # compiles
        torch.cuda.synchronize()
        launch: Callable[[], object] = call
        if self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call()
            launch = graph.replay
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            self._flushed.zero_()
            begin.record()
            launch()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)


def copy_gbps(clock: Clock, device: str) -> float:
    """Measured copy bandwidth, bytes read plus bytes written, GB/s."""
    source = torch.empty(COPIED_BYTES[torch.device(device).type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.ms(lambda: target.copy_(source), 9) / 1e6


@dataclass
class Scene:
    """`batch` requests of `context` tokens after their prefill, at the head of their first sparse step."""

    shape: Shape
    layers: int  # that exist; times are scaled to the model's
    batch: int
    context: int
    dtype: torch.dtype
    config: ClusterKVConfig
    engine: ClusterEngine
    rows: np.ndarray  # int64 [batch], lines of req_to_token
    seq_lens: np.ndarray  # int64 [batch], this step's token included
    step: SparseStep
    clustering_s: float  # plan and build of all segments
    shared: int = 0  # first tokens that all requests have in common

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.shape.head_dim**-0.5

    @property
    def segments(self) -> int:
        """Segments of all requests."""
        return self.engine.counters.segments

    @property
    def to_model(self) -> float:
        """Times of the scene's layers -> times of the model's."""
        return self.shape.layers / self.layers

    def dense_step(self) -> DenseStep:
        """The same step for dense attention."""
        return dense_step(self.rows, self.seq_lens, self.engine.req_to_token)

    def queries(self) -> torch.Tensor:
        """[batch, heads, head_dim] in the pool's dtype on a GPU, float32 on a CPU, where that is what the kernels take."""
        device = self.engine.index.device
        q = torch.randn(self.batch, self.shape.heads, self.shape.head_dim, generator=torch.Generator().manual_seed(1))
        return q.to(device, torch.float32 if device == "cpu" else self.dtype)


def geometry_of(shape: Shape, layers: int, batch: int, context: int, shared: int = 0) -> Geometry:
    """The pool of a scene: whole pages for each request and its next token, shared ones once, and the padding page."""
    own = -(-(context + 1) // PAGE_SIZE) - shared // PAGE_SIZE
    return Geometry(layers, shape.kv_heads, shape.head_dim, PAGE_SIZE, 1 + shared // PAGE_SIZE + batch * own)


def scene_bytes(config: ClusterKVConfig, geometry: Geometry, dtype: torch.dtype) -> int:
    """Bytes of a scene: keys, values and index of all its layers, and the float32 rows of one that are being made."""
    rows = geometry.slots * geometry.kv_heads * geometry.head_dim
    return 2 * geometry.layers * rows * dtype.itemsize + index_bytes(config, geometry) + 3 * 4 * rows


def free_bytes(device: str) -> int:
    """Free memory of the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def fitting_layers(
    config: ClusterKVConfig, shape: Shape, layers: int, batch: int, context: int, dtype: torch.dtype, free: int,
    shared: int = 0,
) -> int:  # fmt: skip
    """How many of `layers` layers fit in `free` bytes with room to spare; 0 where not one does."""
    for count in range(min(layers, shape.layers), 0, -1):
        if scene_bytes(config, geometry_of(shape, count, batch, context, shared), dtype) <= MEMORY_SHARE * free:
            return count
    return 0


def make_scene(
    config: ClusterKVConfig, shape: Shape, layers: int, batch: int, context: int, dtype: torch.dtype, device: str,
    shared: int = 0,
) -> Scene:  # fmt: skip
    """A scene whose keys form clusters; the same for the same arguments.

    Args:
        config: of the plugin.
        shape: of the model.
        layers: how many of its layers.
        batch: requests.
        context: tokens of each.
        dtype: of the KV pool.
        device: "cpu" or "cuda".
        shared: first tokens, whole pages, that all requests have in common: the others find them after the first one's prefill.
    """
    geometry = geometry_of(shape, layers, batch, context, shared)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, shape.kv_heads, shape.head_dim, generator=generator, device=device)

    def pool() -> torch.Tensor:
        which = torch.randint(CENTRES, (geometry.slots,), generator=generator, device=device)
        return normal(CENTRES)[which].add_(normal(geometry.slots), alpha=0.5).to(dtype)

    keys, values = [pool() for _ in range(layers)], [pool() for _ in range(layers)]
    if device == "cpu":
        use_huge_pages([*keys, *values])  # as the server's pool
    slots = torch.arange(PAGE_SIZE, geometry.slots, dtype=torch.int32)
    own = slots[shared:].view(batch, -1)
    table = torch.zeros((batch + 1, shared + own.shape[1]), dtype=torch.int32)
    table[1:, :shared], table[1:, shared:] = slots[:shared], own
    engine = ClusterEngine(ClusterIndex(config, geometry, device), keys, values, table.to(device), HandedOut())
    prefills = [Extend(row, str(row), shared if row > 1 else 0, context, context, True) for row in range(1, batch + 1)]
    rows, seq_lens = np.arange(1, batch + 1), np.full(batch, context + 1)
    begin = time.perf_counter()
    if shared:
        engine.begin_extend(prefills[:1])
        engine.begin_extend(prefills[1:])
        engine.begin_decode(
            rows, seq_lens
        )  # cuts the segment that the shared tokens end in: its rows are looked at again
    else:
        engine.begin_extend(prefills)
    step = engine.begin_decode(rows, seq_lens).sparse
    if device != "cpu":
        torch.cuda.synchronize()
    assert step is not None and step.batch == batch, f"{context} tokens decode densely: {engine.counters.dense_steps}"
    clustering_s = time.perf_counter() - begin
    return Scene(shape, layers, batch, context, dtype, config, engine, rows, seq_lens, step, clustering_s, shared)


def step_bytes(scene: Scene) -> dict[str, float]:
    """Bytes that each operation must read and write for one layer by its definition, whatever its kernels hand on besides.

    What several requests share is counted once per request.
    """
    index, step, shape, config = scene.engine.index, scene.step, scene.shape, scene.config
    kv_bytes = shape.head_dim * scene.dtype.itemsize
    pairs = scene.batch * shape.kv_heads
    clusters = int(step.page_count.sum()) * index.clusters_per_page * shape.kv_heads
    base = int(step.base_count.sum()) * shape.kv_heads
    row_bytes, code_bytes = index.row_codec.row_bytes, index.token_codec.code_bytes
    return {
        "score": clusters * (row_bytes + 4) + base * kv_bytes,  # rows, spread and end of a cluster
        "select": clusters * 8,  # a mass and a size
        "refine": pairs * config.candidate_tokens * (code_bytes + 4),  # a code, its scale and a member
        "attend": pairs * config.budget_tokens * 2 * kv_bytes + base * kv_bytes,  # score has read the base's keys
        "estimate": min(clusters, pairs * config.estimate_clusters) * row_bytes + _movement_bytes(scene),
    }


def _movement_bytes(scene: Scene) -> int:
    """Of the rows by which values move, of one layer."""
    if scene.config.moving_values != "always":
        return 0
    step = scene.step
    borders = torch.cat((step.segment_begin, step.page_count.unsqueeze(1)), 1).minimum(step.page_count.unsqueeze(1))
    rows = 2 * sum(rank_of(pages) for pages in borders.diff(dim=1).flatten().tolist())
    return rows * row_codec(scene.shape.head_dim).row_bytes * scene.shape.kv_heads


def dense_bytes(scene: Scene) -> float:
    """Bytes of all keys and values of one layer that dense attention reads."""
    return 2 * int(scene.seq_lens.sum()) * scene.shape.kv_heads * scene.shape.head_dim * scene.dtype.itemsize


def key_objective(keys: torch.Tensor, labels: torch.Tensor, clusters: int) -> float:
    """k-means' objective: mean squared distance of keys to the mean of their cluster.

    Args:
        keys: [N, M, D], N problems.
        labels: int64 [N, M], cluster of each key.
        clusters: of each problem.
    """
    keys = keys.double()
    index = labels.unsqueeze(-1).expand(-1, -1, keys.shape[-1])
    sums = keys.new_zeros(keys.shape[0], clusters, keys.shape[-1]).scatter_add_(1, index, keys)
    sizes = keys.new_zeros(keys.shape[0], clusters).scatter_add_(1, labels, keys.new_ones(labels.shape))
    means = sums / sizes.clamp(min=1).unsqueeze(-1)
    return float((keys - means.gather(1, index)).square().sum(-1).mean())
