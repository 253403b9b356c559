"""The operations of a decode step as the CPU runs them: numba kernels, one thread unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.kernel_scene import OUR_DENSE, Clustering, Operation, Scene, step_bytes
from sglang_clusterkv.clusters import build
from sglang_clusterkv.kernels import kmeans
from sglang_clusterkv.kernels.attend.cpu import dense_decode
from sglang_clusterkv.kernels.cpu_math import bits
from sglang_clusterkv.kernels.decode import cpu


def operations(scene: Scene) -> list[Operation]:
    """Those of a step in their order; each reads what the ones before it left in buffers that they share."""
    engine, step, shape = scene.engine, scene.step, scene.shape
    index = engine.index
    grouped = scene.queries().unflatten(1, (shape.kv_heads, -1)).contiguous()
    q, scale = grouped.numpy(), scene.scale
    decoder = cpu.decoder_of(index, shape.group, scene.dtype)
    decoder.prepare(step, shape.kv_heads, shape.group, shape.head_dim)
    out = np.empty_like(q)
    keys, values = [bits(k) for k in engine.key_buffers], [bits(v) for v in engine.value_buffers]

    moved = step_bytes(scene)
    return [
        Operation("rotate", lambda layer: decoder.rotate(q), 0),
        Operation("score", lambda layer: decoder.score(q, keys[layer], layer, scale), moved["score"]),
        Operation("select", lambda layer: decoder.select(), moved["select"]),
        Operation("refine", lambda layer: decoder.refine(layer, scale), moved["refine"]),
        Operation("recall", lambda layer: decoder.recall(), 0),
        Operation("attend", lambda layer: decoder.attend(q, keys[layer], values[layer], scale, out), moved["attend"]),
        Operation("estimate", lambda layer: decoder.estimate(q, layer, scale), moved["estimate"]),
        Operation("merge", lambda layer: decoder.merge(out), 0),
    ]


def whole_step(scene: Scene) -> Callable[[int], object]:
    """Attention of one layer, as the backend calls it."""
    q, engine, step, scale = scene.queries(), scene.engine, scene.step, scene.scale

    def attention(layer: int) -> torch.Tensor:
        keys, values = engine.key_buffers[layer], engine.value_buffers[layer]
        return cpu.sparse_decode(q, keys, values, engine.index, layer, step, scale)

    return attention


def dense_steps(scene: Scene) -> dict[str, Callable[[int], object]]:
    """Dense attention of one layer over the same pool, by name."""
    q, engine, step, scale = scene.queries(), scene.engine, scene.dense_step(), scene.scale

    def attention(layer: int) -> torch.Tensor:
        keys, values = engine.key_buffers[layer], engine.value_buffers[layer]
        return dense_decode(q, keys, values, step.slots, step.seq_lens, scale)

    return {OUR_DENSE: attention}


def clustering(scene: Scene) -> list[Clustering]:
    """k-means alone, and with it all that makes a segment's tables: one segment of every layer."""
    engine, config = scene.engine, scene.config
    tokens = config.segment_tokens
    clusters = tokens // config.tokens_per_cluster
    slots = engine.req_to_token[1, config.sink_tokens : config.sink_tokens + tokens].long()

    def rows(buffer: torch.Tensor) -> torch.Tensor:
        return buffer.index_select(0, slots).float().transpose(0, 1).contiguous()

    keys, values = [rows(b) for b in engine.key_buffers], [rows(b) for b in engine.value_buffers]
    centered = [k - k.mean(1, keepdim=True) for k in keys]
    read = sum(k.numel() * 4 for k in keys)

    def labels() -> None:
        for layer in centered:
            kmeans.labels_of(
                layer, clusters, config.kmeans_passes, kmeans.outlier_count(clusters, config.outlier_share)
            )

    def tables() -> None:
        for layer_keys, layer_values in zip(keys, values, strict=True):
            build.cluster_segment(engine.index, layer_keys, layer_values)

    return [
        Clustering("k-means", labels, read * config.kmeans_passes, tokens),
        Clustering("encode", tables, 2 * read, tokens, includes="k-means"),
    ]


def kmeans_comparison(scene: Scene, repeats: int) -> list[dict[str, Any]]:
    """There is no other k-means to compare with on a CPU."""
    return []


def model_ms(scene: Scene) -> dict[str, list[float]]:
    """The model of a step is one of a GPU's."""
    return {}
