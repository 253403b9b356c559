"""A model's attention layers: which can recall, which are clustered therefore, and what they ask for that is not served.

The pool is sized and made after the model is loaded and before the backend: so what it needs of the layers is noted while it is
sized, and read when it is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_clusterkv.clusters.rows import DenseReason
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.fp8 import FP8

_clustered: tuple[int, ...] | None = None


def attention_layers(model: torch.nn.Module | None) -> Iterator[RadixAttention]:
    """All attention layers of a model; those of SGLang's implementation of Transformers are no modules of it."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, RadixAttention):
            yield module
        instances = getattr(module, "attention_instances", None)
        if isinstance(instances, dict):
            yield from instances.values()


def dense_reason(layer: RadixAttention, dense_layers: int) -> DenseReason | None:
    """Why every request goes the dense way in a layer, if so; layers that read another one's KV show at a call.

    Args:
        layer: of the model.
        dense_layers: as configured.
    """
    if layer.sliding_window_size >= 0:
        return DenseReason.SLIDING
    if layer.logit_cap > 0:
        return DenseReason.LOGIT_CAP
    if layer.layer_id < dense_layers:
        return DenseReason.FIRST_LAYERS
    return None


def note_clustered(model: torch.nn.Module | None, config: ClusterKVConfig, first_layer: int, layers: int) -> int:
    """Find out which layers of a KV pool are clustered, for the pool that is made next; returns how many.

    A layer whose KV is read by a layer that can recall is clustered. Where no attention layer of the model is found all are.

    Args:
        model: as loaded.
        config: as resolved.
        first_layer: the model's number of the pool's first layer.
        layers: of the pool.
    """
    global _clustered
    found = list(attention_layers(model))
    recalling = {layer.layer_id - first_layer for layer in found if dense_reason(layer, config.dense_layers) is None}
    _clustered = tuple(sorted(recalling & set(range(layers)))) if found else None
    return layers if _clustered is None else len(_clustered)


def clustered() -> tuple[int, ...] | None:
    """The layers of the pool that was sized last which are clustered, counted from its first; None: all of them."""
    return _clustered


def kv_scales(layer: RadixAttention, pool: torch.dtype) -> tuple[float, float]:
    """What stored keys and values of a layer are multiplied by: the checkpoint's factors in an fp8 KV cache, else 1.

    Args:
        layer: of the model.
        pool: the KV cache's dtype.
    """
    if pool not in FP8:
        return 1.0, 1.0
    key, value = layer.k_scale_float, layer.v_scale_float
    return 1.0 if key is None else key, 1.0 if value is None else value


def scales(layer: RadixAttention, pool: torch.dtype) -> tuple[float, float]:
    """The scale of logits with stored keys, and the factor of outputs from stored values.

    Clusters are of keys and values as stored: k-means and codes are the same in any unit.
    """
    of_keys, of_values = kv_scales(layer, pool)
    return layer.scaling * of_keys, of_values


def times(output: torch.Tensor, factor: float) -> torch.Tensor:
    """`output`, multiplied where that changes it."""
    return output if factor == 1.0 else output * factor


def unserved(model: torch.nn.Module | None) -> str | None:
    """What an attention layer of a model asks for that is not served, in words; None where all of them are."""
    for layer in attention_layers(model):
        if layer.attn_type != AttentionType.DECODER:
            return f"attention of type {layer.attn_type.value} (layer {layer.layer_id})"
        if layer.is_cross_attention:
            return f"cross-attention (layer {layer.layer_id})"
        if layer.xai_temperature_len > 0:
            return f"attention with a temperature by length (layer {layer.layer_id})"
    return None


def capped(model: torch.nn.Module | None) -> str | None:
    """An attention layer of a model that caps its logits, in words; None where none does."""
    for layer in attention_layers(model):
        if layer.logit_cap > 0:
            return f"layer {layer.layer_id} of this model"
    return None
