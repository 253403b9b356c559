"""The part of `sglang_symbols` that matters on a GPU alone."""

from sglang_clusterkv.serving.symbol import Symbol

PREFILL = (
    Symbol(
        "layers.attention.attention_registry",
        "names of what prefills",
        mentions=tuple(
            f'@register_attention_backend("{name}")' for name in ("fa3", "trtllm_mha", "flashinfer", "triton")
        ),
    ),
    Symbol(
        "arg_groups.model_override_base.get_default_attn_backend",
        "what prefills unless one is named",
        "server_args use_mla_backend model_config",
    ),
    Symbol("runtime_context.get_platform", "what can prefill here", ""),
    Symbol(
        "runtime_context",
        "facts about the GPU",
        mentions=('"is_sm100":', '"has_flashinfer":', '"device_capability":'),
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend",
        "what prefill asks of a backend",
        attributes="extend_dummy_seqs_capped_by_req_pool supports_prefill_cuda_graph_max_context_size "
        "prefill_cuda_graph_max_batch_size",
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend",
        "likewise, and which 0.5.22 does not ask",
        attributes="prefill_cuda_graph_default_max_seq_len",
        since="0.5.23",
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend.get_fused_kv_write_buffers",
        "forwarded in prefill",
        "self layer forward_batch",
        since="0.5.23",
    ),
)
