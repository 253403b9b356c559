"""Which decoder layers of SGLang's are plain: attention and a gated product, each behind a norm, and sums; nothing added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layer_boundary.contracts import BatchVariant
from sglang.srt.layers.layer_boundary.residual.add_norm import NORM_QUANT_READOUT, NORM_READOUT, PLAIN_ADD
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.rope_variant import Llama3RotaryEmbedding
from sglang.srt.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from sglang.srt.models.qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP
from sglang.srt.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer
from sglang.srt.runtime_context import get_exec, get_parallel

from sglang_clusterkv.serving.cpu_layers import LinearMethod, norm_forward

_KINDS: dict[type, tuple[type, type]] = {
    LlamaDecoderLayer: (LlamaAttention, LlamaMLP),
    Qwen2DecoderLayer: (Qwen2Attention, Qwen2MLP),
    Qwen3DecoderLayer: (Qwen3Attention, Qwen2MLP),
}


def is_plain(layer: torch.nn.Module) -> bool:
    """Whether a decoder layer is made of nothing but what the kernels do."""
    attention, mlp = _KINDS.get(type(layer), (None, None))
    if attention is None or (type(layer.self_attn), type(layer.mlp)) != (attention, mlp):
        return False
    inside, mlp = layer.self_attn, layer.mlp
    norms = norms_of(layer)
    products = products_of(layer)
    kinds = [QKVParallelLinear, RowParallelLinear, MergedColumnParallelLinear, RowParallelLinear]
    attn, rotation = inside.attn, inside.rotary_emb
    heads, kv_heads, channels = attn.tp_q_head_num, attn.tp_k_head_num, attn.head_dim
    parallel, row = get_parallel(), (heads + 2 * kv_heads) * channels
    return (
        all(type(norm) is RMSNorm and _is_plain_norm(norm) for norm in norms)
        and [type(one) for one in products] == kinds
        and all(type(one.quant_method) is LinearMethod and not one.skip_bias_add for one in products)
        and not any(one.gather_output for one in products[::2])
        and all(one.input_is_parallel and not one.reduce_results for one in products[1::2])
        and not any(one.use_decode_attn_tp for one in products[1::2])
        and type(attn) is RadixAttention
        and attn.v_head_dim == channels
        and attn.tp_v_head_num == kv_heads
        and type(rotation) in (RotaryEmbedding, Llama3RotaryEmbedding)
        and rotation.head_size == channels
        and not hasattr(rotation, "sin_cos_cache")
        and rotation._forward_method is None
        and type(mlp.act_fn) is SiluAndMul
        and mlp.act_fn._forward_method is None
        and mlp.dual_gemm.mode is None
        and not mlp.activation_quant.enabled
        and products[0].weight.shape[0] == row
        and _boundaries_are_plain(layer)
        and get_exec().deterministic.rl_on_policy_target is None
        and parallel.attn_tp_size == parallel.tp_size
        and parallel.pp_size == 1
        and not any("forward" in vars(module) for module in layer.modules())
    )


def products_of(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Of queries, keys and values; of attention's output; of gate and up; of down."""
    return [layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj]


def norms_of(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """Before attention, behind it, and of queries and keys where the layer has these."""
    of_heads = [layer.self_attn.q_norm, layer.self_attn.k_norm] if hasattr(layer.self_attn, "q_norm") else []
    return [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]


def _is_plain_norm(norm: RMSNorm) -> bool:
    """Whether `norm_forward` would run a norm of float32 by our kernel."""
    own = norm._forward_method is None or getattr(norm._forward_method, "__func__", None) is norm_forward
    return own and norm.has_weight and norm.variance_size_override is None and norm.override_orig_dtype is None


def _boundaries_are_plain(layer: torch.nn.Module) -> bool:
    """Whether SGLang has nothing but sums over ranks and the residual's between a layer's parts, whatever the batch."""
    for boundary, reads in (
        (layer.attn_boundary, (NORM_QUANT_READOUT, NORM_READOUT)),
        (layer.ffn_boundary, (NORM_READOUT,)),
    ):
        said = boundary.declaration
        plain = (
            boundary.plan.paths.keys() == {BatchVariant.ORDINARY}
            and any(said.read is read for read in reads)
            and said.update is PLAIN_ADD
            and said.output_transform is None
            and said.sum_impl is None
            and said.row_transport is None
            and not said.output_complete
            and boundary.plan.fusions is None
        )
        if not plain:
            return False
    return True


class Shape(NamedTuple):
    """Of the layers that run by our kernels, all of them alike."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    of_heads: bool  # queries and keys are normed


def shape_of(layer: torch.nn.Module) -> Shape:
    """Of a plain layer."""
    attn = layer.self_attn.attn
    return Shape(
        layer.self_attn.qkv_proj.weight.shape[1],
        attn.tp_q_head_num,
        attn.tp_k_head_num,
        attn.head_dim,
        layer.mlp.down_proj.weight.shape[1],
        hasattr(layer.self_attn, "q_norm"),
    )
