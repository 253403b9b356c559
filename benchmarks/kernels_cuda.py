"""The operations of a decode step as a GPU runs them, and what they are compared with: SGLang's dense Triton decode,
FlashInfer's dense decode, flash-kmeans."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.kernel_scene import (
    OUR_DENSE,
    PAGE_SIZE,
    STEP,
    Clustering,
    CudaClock,
    Operation,
    Scene,
    key_objective,
    step_bytes,
)
from sglang_clusterkv.clusters import build
from sglang_clusterkv.kernels.attend.triton import dense_decode
from sglang_clusterkv.kernels.decode import triton as chain
from sglang_clusterkv.kernels.kmeans.triton import cluster
from sglang_clusterkv.kernels.kmeans.triton.segments import pool_of, segments_of
from sglang_clusterkv.kernels.step_model import BANDWIDTHS_TBS, Launch, StepShape, dense_launches, sparse_launches

KV_SPLITS = (8, 16, 32, 64)  # of SGLang's decode; its server's default is 8
FLASHINFER_WORKSPACE_BYTES = 256 << 20
OF_LAUNCH = {
    "select: masses": "select",
    "select: clusters": "select",
    "refine: values": "refine",
    "refine: choice": "recall",
}  # launches of the model: the operations that they belong to, where these have other names
MOST_DIFFERENCE = 0.02  # between dense outputs of about 1 in bf16: more is not rounding

Attention = Callable[[int], torch.Tensor]


def operations(scene: Scene) -> list[Operation]:
    """Those of a step in their order; each reads what the ones before it left in the workspace."""
    engine, shape, scale = scene.engine, scene.shape, scene.scale
    keys, values = engine.key_buffers, engine.value_buffers
    q = scene.queries().unflatten(1, (shape.kv_heads, -1)).contiguous()
    decoder = chain.decoder_of(engine.index, shape.group)
    decoder.prepare(scene.step)
    moved = step_bytes(scene)
    return [
        Operation("score", lambda layer: decoder.score(q, keys[layer], layer, scale), moved["score"]),
        Operation("select", lambda layer: decoder.select(), moved["select"]),
        Operation("refine", lambda layer: decoder.refine(layer, scale, q.dtype), moved["refine"]),
        Operation("recall", decoder.recall, 0),
        Operation("attend", lambda layer: decoder.attend(q, keys[layer], values[layer], scale), moved["attend"]),
        Operation("estimate", lambda layer: decoder.estimate(q, layer, scale), moved["estimate"]),
        Operation("merge", lambda layer: decoder.merge(layer, q.dtype), 0),
    ]


def whole_step(scene: Scene) -> Attention:
    """Attention of one layer, as the backend calls it."""
    q, engine, step, scale = scene.queries(), scene.engine, scene.step, scene.scale
    keys, values = engine.key_buffers, engine.value_buffers
    return lambda layer: chain.sparse_decode(q, keys[layer], values[layer], engine.index, layer, step, scale)


def dense_steps(scene: Scene) -> dict[str, Attention]:
    """Dense attention of one layer over the same pool, by name. One that does not run here is left out and said so.

    Raises AssertionError where one computes something else than the others: it would be no baseline.
    """
    made: dict[str, Callable[[Scene], Attention]] = {
        OUR_DENSE: _our_dense,
        **{f"SGLang Triton, {n} splits": partial(_sglang_triton, splits=n) for n in KV_SPLITS},
        "FlashInfer": _flashinfer,
    }
    steps: dict[str, Attention] = {}
    first: torch.Tensor | None = None
    for name, make in made.items():
        try:
            attention = make(scene)
            output = attention(0).float()
        except Exception as error:
            tqdm.write(f"{name} is left out: {type(error).__name__}: {error}")
            continue
        first = output if first is None else first
        difference = float((output - first).abs().max())
        assert difference <= MOST_DIFFERENCE, f"{name} differs from {next(iter(steps))} by {difference}"
        steps[name] = attention
    return steps


def _our_dense(scene: Scene) -> Attention:
    q, engine, step, scale = scene.queries(), scene.engine, scene.dense_step(), scene.scale
    keys, values = engine.key_buffers, engine.value_buffers
    return lambda layer: dense_decode(q, keys[layer], values[layer], step.slots, step.seq_lens, scale)


def _sglang_triton(scene: Scene, splits: int) -> Attention:
    """As SGLang's Triton backend calls it, with one number of KV splits for every request."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd_grouped

    q, engine, scale = scene.queries(), scene.engine, scene.scale
    tokens = int(scene.seq_lens[0])
    slots = engine.req_to_token[1:, :tokens].flatten().long()
    indptr = torch.arange(scene.batch + 1, dtype=torch.int32, device=q.device) * tokens
    output = torch.empty_like(q)
    sizes = (scene.batch, scene.shape.heads, splits)
    logits = torch.empty((*sizes, scene.shape.head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(sizes, dtype=torch.float32, device=q.device)
    counts = torch.full((scene.batch,), splits, dtype=torch.int32, device=q.device)

    def attention(layer: int) -> torch.Tensor:
        keys, values = engine.key_buffers[layer], engine.value_buffers[layer]
        decode_attention_fwd_grouped(q, keys, values, output, indptr, slots, logits, lse, counts, splits, scale, 1.0)
        return output

    return attention


def _flashinfer(scene: Scene) -> Attention:
    """Planned once, as a server does for all layers of a step; tensor cores where SGLang's backend uses them."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    q, engine, shape = scene.queries(), scene.engine, scene.shape
    tokens = int(scene.seq_lens[0])
    pages = engine.req_to_token[1:, :tokens:PAGE_SIZE] // PAGE_SIZE
    indptr = torch.arange(scene.batch + 1, dtype=torch.int32, device=q.device) * pages.shape[1]
    last = torch.full((scene.batch,), (tokens - 1) % PAGE_SIZE + 1, dtype=torch.int32, device=q.device)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=shape.group >= 4)
    wrapper.plan(
        indptr, pages.flatten().int(), last, shape.heads, shape.kv_heads, shape.head_dim, PAGE_SIZE,
        q_data_type=q.dtype, kv_data_type=scene.dtype, sm_scale=scene.scale,
    )  # fmt: skip
    output = torch.empty_like(q)

    def paged(buffer: torch.Tensor) -> torch.Tensor:
        return buffer.unflatten(0, (-1, PAGE_SIZE))

    def attention(layer: int) -> torch.Tensor:
        return wrapper.run(q, (paged(engine.key_buffers[layer]), paged(engine.value_buffers[layer])), out=output)

    return attention


def _whole_segments(scene: Scene) -> list[torch.Tensor]:
    """Slots of the first request's segments of full length."""
    config = scene.config
    row = scene.engine.req_to_token[1]
    last = scene.context - config.window_tokens - config.segment_tokens
    begins = range(config.sink_tokens, last + 1, config.segment_tokens)
    return [row[begin : begin + config.segment_tokens].long() for begin in begins]


def clustering(scene: Scene) -> list[Clustering]:
    """k-means alone, and with it all that is stored, of the first request's whole segments: all layers of the scene at once."""
    engine, config, shape = scene.engine, scene.config, scene.shape
    slots = _whole_segments(scene)
    pool = pool_of(engine.key_buffers)
    segments = segments_of(slots, config.tokens_per_cluster, config.outlier_share)
    tokens = len(slots) * config.segment_tokens
    key_bytes = scene.layers * tokens * shape.kv_heads * shape.head_dim * scene.dtype.itemsize
    # Each pass reads the keys to assign them, and all but the last to move the centroids; before them one reads the mean.
    passes = 2 * config.kmeans_passes
    return [
        Clustering("k-means", lambda: cluster(pool, segments, config.kmeans_passes), passes * key_bytes, tokens),
        Clustering(
            "encode",
            lambda: build.write_in_place(engine.index, slots, engine.key_buffers, engine.value_buffers),
            2 * key_bytes,
            tokens,
            includes="k-means",
        ),
    ]


def kmeans_comparison(scene: Scene, repeats: int) -> list[dict[str, Any]]:
    """Time and objective of our k-means and of flash-kmeans, which starts from the same keys; nothing where it is missing.

    flash-kmeans asks the device after every pass, so that neither is replayed as a graph here.
    """
    try:
        flash_kmeans = importlib.import_module("flash_kmeans")
    except ImportError:
        return []
    config, engine = scene.config, scene.engine
    slots = _whole_segments(scene)
    clusters = config.segment_tokens // config.tokens_per_cluster
    # [layers * H * segments, tokens, D], the order of our labels.
    keys = torch.stack([k[torch.stack(slots)] for k in engine.key_buffers]).permute(0, 3, 1, 2, 4).flatten(0, 2)
    keys = keys.contiguous()
    strided = torch.arange(clusters, device=keys.device) * config.segment_tokens // clusters
    start = keys[:, strided].contiguous()
    pool = pool_of(engine.key_buffers)
    segments = segments_of(slots, config.tokens_per_cluster)
    clock = CudaClock(graphs=False)

    def ours() -> torch.Tensor:
        labels = cluster(pool, segments, config.kmeans_passes).labels
        return labels.view(-1, config.segment_tokens)

    def flash() -> torch.Tensor:
        # No shift is below -1: all passes are made.
        found = flash_kmeans.batch_kmeans_Euclid(
            keys, clusters, max_iters=config.kmeans_passes, tol=-1.0, init_centroids=start.clone()
        )
        return found[0]

    return [
        {
            "name": name,
            "ms": clock.ms(call, repeats) * scene.to_model,
            "objective": key_objective(keys, call().long(), clusters),
        }
        for name, call in (("ours", ours), ("flash-kmeans", flash))
    ]


def model_ms(scene: Scene) -> dict[str, list[float]]:
    """What the model of the step predicts: milliseconds of all layers at each of `BANDWIDTHS_TBS`, by operation.

    The whole step has attend and the estimate as one launch, beside which they are measured alone.
    """
    shape = StepShape(*scene.shape, scene.batch, scene.context + 1, scene.dtype.itemsize, PAGE_SIZE)
    single, sparse = (sparse_launches(shape, scene.config, joined=joined) for joined in (False, True))
    dense = dense_launches(shape)

    def of(launches: list[Launch]) -> list[float]:
        return [shape.layers * sum(launch.microseconds(tbs) for launch in launches) / 1000 for tbs in BANDWIDTHS_TBS]

    names = dict.fromkeys(OF_LAUNCH.get(launch.name, launch.name) for launch in single)
    alone = {name: of([one for one in single if OF_LAUNCH.get(one.name, one.name) == name]) for name in names}
    return alone | {STEP: of(sparse), OUR_DENSE: of(dense)}
