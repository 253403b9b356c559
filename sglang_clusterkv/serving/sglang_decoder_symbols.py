"""The part of `sglang_symbols` that decoder layers by our kernels rely on (cpu_decoder.py); older releases keep their own."""

from __future__ import annotations

from sglang_clusterkv.serving.symbol import Symbol

_SINCE = "0.5.23"
_BOUNDARY = "layers.layer_boundary."
_BOUNDARIES = (
    "self.attn_boundary.prepare(",
    "hidden_states = self.attn_boundary.finish(hidden_states, forward_batch)",
    "hidden_states = self.ffn_boundary.prepare(",
    "hidden_states = self.mlp(hidden_states, forward_batch=forward_batch)",
    "self.ffn_boundary.finish(hidden_states, forward_batch)",
)
_ATTENTION = (
    "qkv, _ = self.qkv_proj(hidden_states)",
    "q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)",
    "q, k = self.rotary_emb(positions, q, k)",
)
_MLP = (
    "if self.dual_gemm.can_run(x, self.gate_up_proj):",
    "gate_up, _ = self.gate_up_proj(x)",
    "x = self.activation_quant.forward_decode(",
    "x, _ = self.down_proj(x",
)

DECODER = (
    Symbol(
        "models.llama.LlamaDecoderLayer.forward",
        "what ours stands for",
        "self positions hidden_states forward_batch capture_output",
        mentions=_BOUNDARIES,
        since=_SINCE,
    ),
    Symbol("models.llama.LlamaAttention.forward_prepare_native", "likewise", mentions=_ATTENTION, since=_SINCE),
    Symbol("models.llama.LlamaMLP.forward", "likewise", "self x forward_batch", mentions=_MLP, since=_SINCE),
    Symbol(
        "models.qwen2.Qwen2DecoderLayer.forward",
        "likewise",
        "self positions hidden_states forward_batch capture_output",
        mentions=_BOUNDARIES,
        since=_SINCE,
    ),
    Symbol("models.qwen2.Qwen2Attention.forward", "likewise", mentions=_ATTENTION, since=_SINCE),
    Symbol("models.qwen2.Qwen2MLP.forward", "likewise", "self x forward_batch", mentions=_MLP, since=_SINCE),
    Symbol(
        "models.qwen3.Qwen3DecoderLayer.forward",
        "likewise",
        "self positions hidden_states forward_batch post_residual_addition capture_output",
        mentions=_BOUNDARIES,
        since=_SINCE,
    ),
    Symbol(
        "models.qwen3.Qwen3Attention.forward_prepare_native",
        "likewise",
        mentions=(*_ATTENTION, "q, k = apply_qk_norm("),
        since=_SINCE,
    ),
    Symbol(_BOUNDARY + "residual.stream.ResidualStream", "between layers", attributes="residual pending", since=_SINCE),
    Symbol(_BOUNDARY + "residual.stream.ResidualStream.write", "likewise", "self residual", since=_SINCE),
    Symbol(
        _BOUNDARY + "residual.stream.ResidualStream.record", "likewise", "self output update declared_sum", since=_SINCE
    ),
    Symbol(_BOUNDARY + "residual.stream.ResidualStream.export", "likewise", "self hidden takes_handoff", since=_SINCE),
    Symbol(
        _BOUNDARY + "residual.add_norm.PlainAdd.update",
        "PLAIN_ADD, between plain layers",
        "self hidden_states residual",
        mentions=("hidden_states += residual",),
        since=_SINCE,
    ),
    Symbol(
        _BOUNDARY + "residual.add_norm.NormReadout.update_and_read",
        "NORM_READOUT, likewise",
        mentions=("return norm(hidden_states, residual)",),
        since=_SINCE,
    ),
    Symbol(
        _BOUNDARY + "residual.add_norm._update_and_read_residual_plain",
        "NORM_QUANT_READOUT, likewise",
        "norm hidden_states residual post_residual_addition",
        mentions=("return norm(hidden_states, residual, post_residual_addition)",),
        since=_SINCE,
    ),
    Symbol(_BOUNDARY + "stage.StageBoundary", "likewise", attributes="plan declaration", since=_SINCE),
    Symbol(_BOUNDARY + "construction.StagePlan", "likewise", attributes="paths fusions", since=_SINCE),
    Symbol(
        "layers.radix_attention.RadixAttention.forward",
        "what is between a layer and us",
        mentions=("return get_attn_backend().forward(",),
        since=_SINCE,
    ),
    Symbol(
        "mem_cache.memory_pool._set_kv_buffer_impl",
        "how keys and values are stored",
        mentions=("k_cache[indices] = k", "v_cache[indices] = v"),
        since=_SINCE,
    ),
    Symbol("distributed.attention_tensor_model_parallel_all_reduce", "sums over ranks", "input_", since=_SINCE),
    Symbol("distributed.tensor_model_parallel_all_reduce", "likewise", "input_", since=_SINCE),
)
