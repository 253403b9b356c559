"""SGLang's layers around attention on our CPU platform: a decode step's products, norms, rotations and gates by our kernels.

SGLang lets a platform name its own forward of a layer's class, and change how a model's layers multiply once it is loaded. Ours
take float32: products of any number of tokens, the others up to `MOST_TOKENS`. Everything else goes to SGLang's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding

from sglang_clusterkv.kernels.layer_cpu import compile_layers, rms_norm, rotate, silu_and_mul
from sglang_clusterkv.kernels.products_cpu import compile_products, linear
from sglang_clusterkv.kernels.token_tiles_cpu import compile_tiles, linear_by_tiles
from sglang_clusterkv.serving.cpu_weights import Halves, copies_of, in_memory

logger = logging.getLogger(__name__)

MOST_ROWS = 8  # of a product that reads its weights as fast as memory gives them; with more, tiles of tokens meet them
MOST_TOKENS = 512  # of another call, on one thread: with more, torch's operations last longer, on all cores

_taken = False  # until a model is served with clusterkv everything is SGLang's


def install(platform_key: str) -> None:
    """Have SGLang call them on the platform with this key."""
    forwards: dict[type, Any] = {RMSNorm: norm_forward, SiluAndMul: activation_forward}
    # Those that differ in their tables alone; others turn channels in another way.
    forwards |= dict.fromkeys((RotaryEmbedding, Llama3RotaryEmbedding), rotation_forward)
    for layer, forward in forwards.items():
        BaseFusedOp.register_oot_forward(layer, forward, platform_key)


class _Multiplied:
    """A method whose products in float32 are by our kernels: one for up to `MOST_ROWS` tokens, one for more.

    Args:
        halves: the layer's weights in half the bytes; None: they are read as they are.
    """

    def __init__(self, halves: Halves | None = None) -> None:
        super().__init__()
        self.halves = halves

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """See SGLang's."""
        weight = layer.weight
        if not _multiplied(weight, x, bias):
            return super().apply(layer, x, bias)  # type: ignore[misc]
        if len(x) > MOST_ROWS:
            return linear_by_tiles(x, weight, bias)
        return linear(x, weight, bias, None if self.halves is None else self.halves.of(weight))

    def weights(self, weight: torch.Tensor) -> tuple[int, int]:
        """Where a step's products may read the layer's weight, and whether it is halved there (1 or 0)."""
        copy = None if self.halves is None else self.halves.of(weight)
        return (weight.data_ptr(), 0) if copy is None else (copy.data_ptr(), 1)

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """SGLang loads other weights from now on."""
        if self.halves is not None:
            self.halves.loading(True)
        super().restore_weights_before_loading(layer)  # type: ignore[misc]

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """They are loaded."""
        super().process_weights_after_loading(layer)  # type: ignore[misc]
        if self.halves is not None:
            self.halves.loading(False)


class LinearMethod(_Multiplied, UnquantizedLinearMethod):
    """Products of a layer without quantisation."""


class LogitsMethod(_Multiplied, UnquantizedEmbeddingMethod):
    """An embedding's, of which SGLang asks a product with all words for logits, as no method of its own with these weights."""


def take_over(model: torch.nn.Module, ranks: int = 1) -> None:
    """Compile our kernels and run a model's layers by them; products of another method, quantised ones, stay as they are.

    Args:
        model: as it was loaded.
        ranks: processes on this machine that serve it, or another part or copy of it.
    """
    global _taken
    compile_layers()
    compile_products()
    compile_tiles()
    _taken = True
    others = {weight.dtype for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16)}
    if others:
        logger.info(
            "clusterkv: served in %s, the model runs by SGLang's own layers around attention; on a CPU without AMX its steps "
            "are faster with --dtype float32, by ours",
            ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others)),
        )
    methods: dict[str, type[_Multiplied]] = {}
    layers = dict(model.named_modules())
    for name, layer in layers.items():
        method = type(getattr(layer, "quant_method", None))
        if method is UnquantizedLinearMethod:
            methods[name] = LinearMethod
        elif method is UnquantizedEmbeddingMethod and layer.weight.dtype is torch.float32:
            methods[name] = LogitsMethod
    copies = copies_of({name: layers[name].weight for name in methods if _multiplies(model, layers[name])}, ranks)
    for name, ours in methods.items():
        layers[name].quant_method = ours(copies.get(name))


def _multiplies(model: torch.nn.Module, layer: torch.nn.Module) -> bool:
    """Whether a layer multiplies tokens with its weights; embeddings only look words up, unless they are the logits', too."""
    if type(layer.quant_method) is UnquantizedLinearMethod:
        return True
    return any(getattr(part, "lm_head", None) is layer for part in model.modules())


def _multiplied(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether a product of a layer's weights goes to our kernels."""
    return x.dim() == 2 and _fits(*((x, weight) if bias is None else (x, weight, bias)))


def _fits(*tensors: torch.Tensor) -> bool:
    """Whether the kernels read these."""
    return _taken and in_memory(*tensors)


def _served(*tensors: torch.Tensor) -> bool:
    """Whether the kernels around a step's products take these."""
    return len(tensors[0]) <= MOST_TOKENS and _fits(*tensors)


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
