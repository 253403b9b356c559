"""SGLang's layers around attention on our CPU platform: a decode step's products, norms, rotations and gates by our kernels.

SGLang lets a platform name its own forward of a layer's class, and change how a model's layers multiply once it is loaded. Ours
take float32 batches of a few tokens, as a decode step has them, and hand everything else to SGLang's.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding

from sglang_clusterkv.kernels.layer_cpu import compile_layers, linear, rms_norm, rotate, silu_and_mul

MOST_ROWS = 8  # of a product: with more, torch's own is faster
MOST_TOKENS = 64  # of another call: with more, torch's operations last longer than their calls, and run on all cores

_taken = False  # until a model is served with clusterkv everything is SGLang's


def install(platform_key: str) -> None:
    """Have SGLang call them on the platform with this key."""
    forwards: dict[type, Any] = {RMSNorm: norm_forward, SiluAndMul: activation_forward}
    # Those that differ in their tables alone; others turn channels in another way.
    forwards |= dict.fromkeys((RotaryEmbedding, Llama3RotaryEmbedding), rotation_forward)
    for layer, forward in forwards.items():
        BaseFusedOp.register_oot_forward(layer, forward, platform_key)


class LinearMethod(UnquantizedLinearMethod):
    """Products of a layer without quantisation."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See SGLang's; by our kernel for `MOST_ROWS` tokens in float32."""
        return linear(x, layer.weight, bias) if _multiplied(layer, x, bias) else super().apply(layer, x, bias)


class LogitsMethod(UnquantizedEmbeddingMethod):
    """An embedding's, of which SGLang asks a product with all words for logits, as no method of its own with these weights."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See SGLang's; by our kernel for `MOST_ROWS` tokens in float32."""
        return linear(x, layer.weight, bias) if _multiplied(layer, x, bias) else super().apply(layer, x, bias)


def take_over(model: torch.nn.Module) -> None:
    """Compile our kernels and run a model's layers by them; products of another method, quantised ones, stay as they are."""
    global _taken
    compile_layers()
    _taken = True
    for layer in model.modules():
        method = type(getattr(layer, "quant_method", None))
        if method is UnquantizedLinearMethod:
            layer.quant_method = LinearMethod()
        elif method is UnquantizedEmbeddingMethod and layer.weight.dtype is torch.float32:
            layer.quant_method = LogitsMethod()


def _multiplied(layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product of a layer's weights goes to our kernel."""
    tensors = (x, layer.weight) if bias is None else (x, layer.weight, bias)
    return x.dim() == 2 and len(x) <= MOST_ROWS and _served(*tensors)


def _served(*tensors: torch.Tensor) -> bool:
    """Whether the kernels take these."""
    fits = len(tensors[0]) <= MOST_TOKENS and all(t.dtype is torch.float32 and t.is_contiguous() for t in tensors)
    return _taken and fits


def norm_forward(
    layer: RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    **more: Any,
) -> Any:
    """In place of `RMSNorm.forward_native`: the normed x, and with a residual the sum of both."""
    plain = (
        layer.variance_size_override is None
        and post_residual_addition is None
        and layer.override_orig_dtype is None
        and x.shape[-1] == layer.hidden_size
    )
    tensors = (x, layer.weight) if residual is None else (x, residual, layer.weight)
    if not plain or not _served(*tensors):
        return layer.forward_native(x, residual, post_residual_addition, **more)
    out, whole = rms_norm(x, residual, layer.weight, layer.variance_epsilon)
    return out if residual is None else (out, whole)


def activation_forward(layer: SiluAndMul, x: torch.Tensor) -> torch.Tensor:
    """In place of `SiluAndMul.forward_native`."""
    return silu_and_mul(x) if _served(x) else layer.forward_native(x)


def rotation_forward(
    layer: RotaryEmbedding, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *more: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of `RotaryEmbedding.forward_native`: both rotated by their positions."""
    turns = layer.cos_sin_cache
    plain = not more and not any(value is not None for value in named.values()) and not hasattr(layer, "sin_cos_cache")
    served = (
        _taken
        and positions.dtype is torch.int64
        and positions.dim() == 1
        and positions.is_contiguous()
        and len(positions) <= MOST_TOKENS
        and turns.dtype is torch.float32
        and turns.is_contiguous()
    )
    for x in (query, key):  # as they are cut from one product
        served = served and x.dtype is torch.float32 and x.dim() == 2 and x.stride(1) == 1
    if not plain or not served:
        return layer.forward_native(positions, query, key, *more, **named)
    queries, keys = (rotate(x, positions, turns, layer.head_size, halves=layer.is_neox_style) for x in (query, key))
    return queries, keys
