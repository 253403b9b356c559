"""The table: real configurations, with fewer layers, narrower and with a smaller vocabulary.

What decides how attention is computed is as in the model's own config.json: head size, rope and its scaling, windows and their
pattern, biases, norms, scales, tied embeddings, layers without rope. Weights are random.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 1024
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


@dataclass(frozen=True)
class Architecture:
    """One row of the matrix.

    Attributes:
        name: of the models that have it, as people say it.
        architecture: as config.json names it.
        model_type: likewise.
        head_dim: true.
        about: what is particular about its attention.
        fields: of config.json, beside the sizes that all have.
        recalls: layers that recall.
        dense: reasons of the other layers.
        arguments: of sgl.Engine that it needs.
        outcome: "works", "refused" or "not startable".
        config_only: nothing makes weights for it: it is refused, or ends, before they are read.
        taken: its decoder layers run by kernels of ours in a decode step (serving/cpu_decoder.py).
        own_config: the class of its configuration, which checkpoints bring as code, for Transformers does not know it; `tiny`
            names its weights.
    """

    name: str
    architecture: str
    model_type: str
    head_dim: int
    about: str
    fields: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    recalls: tuple[int, ...] = (0, 1)
    dense: frozenset[str] = frozenset()
    arguments: dict[str, Any] = field(default_factory=dict)
    outcome: str = "works"
    config_only: bool = False
    taken: bool = False
    own_config: str = ""

    @property
    def config(self) -> dict[str, Any]:
        """The whole config.json."""
        hidden = self.heads * self.head_dim
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": "float32",
            "vocab_size": VOCABULARY,
            "hidden_size": hidden,
            "intermediate_size": 256,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 32768,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **({"auto_map": {"AutoConfig": f"configuration.{self.own_config}"}} if self.own_config else {}),
            **self.fields,
        }


ARCHITECTURES = (
    Architecture(
        "Llama 3.1, 3.2, 3.3", "LlamaForCausalLM", "llama", 128, "rope scaled by wavelength",
        {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "rms_norm_eps": 1e-5},
        taken=True,
    ),
    Architecture(
        "Falcon 3", "LlamaForCausalLM", "llama", 256, "",
        {"head_dim": 256, "rope_theta": 1000042.0, "rms_norm_eps": 1e-6},
        heads=2, kv_heads=1,  # as Gemma 3, for which the same kernels are compiled
        taken=True,
    ),
    Architecture(
        "Qwen 2.5", "Qwen2ForCausalLM", "qwen2", 128, "biases of queries, keys and values",
        {
            "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 131072,
            "max_window_layers": 28,
        },
        taken=True,
    ),
    Architecture(
        "Qwen 3", "Qwen3ForCausalLM", "qwen3", 128, "norms of queries and keys; tied embeddings",
        {
            "head_dim": 128, "hidden_size": 256, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_bias": False,
            "tie_word_embeddings": True,
        },
        taken=True,
    ),
    *(
        Architecture(
            f"Qwen 3 (KV cache in {dtype})", "Qwen3ForCausalLM", "qwen3", 128, "keys and values in 8 bits",
            {"head_dim": 128, "hidden_size": 256, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
            arguments={"kv_cache_dtype": dtype},
        )
        for dtype in ("fp8_e4m3", "fp8_e5m2")
    ),
    Architecture(
        "Qwen 3 MoE", "Qwen3MoeForCausalLM", "qwen3_moe", 128, "norms of queries and keys",
        {
            "head_dim": 128, "hidden_size": 256, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "attention_bias": False,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], **MOE,
        },
    ),
    Architecture(
        "Mistral 7B v0.3, Nemo, Small", "MistralForCausalLM", "mistral", 128, "",
        {"head_dim": 128, "hidden_size": 320, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None},
        taken=True,
    ),
    Architecture(
        "Mixtral", "MixtralForCausalLM", "mixtral", 128, "",
        {
            "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    Architecture(
        "Phi-3 mini", "Phi3ForCausalLM", "phi3", 96, "as many kv heads as query heads",
        {
            "rope_theta": 1e4, "rms_norm_eps": 1e-5, "sliding_window": 2047, "original_max_position_embeddings": 4096,
            "max_position_embeddings": 4096,
        },
        kv_heads=4,
        taken=True,
    ),
    Architecture(
        "Phi-4", "Phi3ForCausalLM", "phi3", 128, "",
        {"rope_theta": 25e4, "rms_norm_eps": 1e-5, "sliding_window": None, "original_max_position_embeddings": 16384},
        taken=True,
    ),
    Architecture(
        "Gemma 3 (text)", "Gemma3ForCausalLM", "gemma3_text", 256, "five of six layers slide; norms of queries and keys",
        {
            "head_dim": 256, "hidden_size": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rms_norm_eps": 1e-6,
            "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
            "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        },
        layers=6, heads=2, kv_heads=1, recalls=(5,), dense=frozenset({"sliding"}),
    ),
    Architecture(
        "Gemma 2", "Gemma2ForCausalLM", "gemma2", 256, "every layer caps its logits",
        {
            "head_dim": 256, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "sliding_window": 4096,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
        },
        outcome="refused", config_only=True,
    ),
    Architecture(
        "gpt-oss", "GptOssForCausalLM", "gpt_oss", 64, "learned sinks; every second layer slides; biases",
        {
            "head_dim": 64, "hidden_size": 256, "rope_theta": 150000.0, "rms_norm_eps": 1e-5, "attention_bias": True,
            "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"], "num_local_experts": 4,
            "num_experts_per_tok": 2, "hidden_act": "silu", "swiglu_limit": 7.0, "initial_context_length": 4096,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        heads=6, recalls=(1,), dense=frozenset({"sliding"}),  # of a group of three, as the demo model
        arguments={"disable_hybrid_swa_memory": True, "moe_runner_backend": "triton"},
    ),
    Architecture(
        "GLM-4 (0414)", "Glm4ForCausalLM", "glm4", 128, "half of the channels are rotated; norms around attention",
        {
            "head_dim": 128, "rope_theta": 1e4, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5,
            "attention_bias": False,
        },
    ),
    Architecture(
        "GLM-4.5, 4.6", "Glm4MoeForCausalLM", "glm4_moe", 128, "half of the channels are rotated; norms of queries and keys",
        {
            "head_dim": 128, "rope_theta": 1e6, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "attention_bias": True,
            "use_qk_norm": True, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True,
            "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0,
        },
    ),
    Architecture(
        "OLMo 2", "Olmo2ForCausalLM", "olmo2", 128, "norms of all queries and of all keys; norms behind attention",
        {"rope_theta": 5e5, "rms_norm_eps": 1e-6, "attention_bias": False},
    ),
    Architecture(
        "OLMo 3", "Olmo3ForCausalLM", "olmo3", 128, "three of four layers slide",
        {
            "rope_theta": 5e5, "rms_norm_eps": 1e-6, "attention_bias": False, "sliding_window": 4096,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        layers=4, recalls=(3,), dense=frozenset({"sliding"}),
    ),
    Architecture(
        "SmolLM3", "SmolLM3ForCausalLM", "smollm3", 128, "every fourth layer has no rope",
        {
            "rope_theta": 5e6, "rms_norm_eps": 1e-6, "no_rope_layers": [1, 1, 1, 0], "use_sliding_window": False,
            "sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True,
        },
        layers=4, recalls=(0, 1, 2, 3),
    ),
    Architecture(
        "Granite 3", "GraniteForCausalLM", "granite", 128, "a scale of the logits of its own",
        {
            "rope_theta": 1e7, "rms_norm_eps": 1e-5, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22, "logits_scaling": 16.0, "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "StarCoder 2", "Starcoder2ForCausalLM", "starcoder2", 128, "biases; LayerNorm",
        {
            "rope_theta": 1e6, "norm_epsilon": 1e-5, "use_bias": True, "sliding_window": 4096,
            "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True,
        },
    ),
    Architecture(
        "Command R", "CohereForCausalLM", "cohere", 128, "attention beside the MLP; LayerNorm without bias",
        {"rope_theta": 8e6, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "use_qk_norm": False,
         "tie_word_embeddings": True},
    ),
    Architecture(
        "Command R7B, A", "Cohere2ForCausalLM", "cohere2", 128, "three of four layers slide, the others have no rope",
        {
            "head_dim": 128, "rope_theta": 5e4, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": 256,
            "sliding_window_pattern": 4, "tie_word_embeddings": True,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        layers=4, recalls=(3,), dense=frozenset({"sliding"}),
    ),
    Architecture(
        "InternLM 2, 2.5", "InternLM2ForCausalLM", "internlm2", 128, "its configuration is code beside the weights",
        {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "bias": False, "hidden_act": "silu"},
        arguments={"trust_remote_code": True}, own_config="InternLM2Config",
    ),
    Architecture(
        "InternLM 3", "InternLM3ForCausalLM", "internlm3", 128, "its configuration is code beside the weights",
        {
            "head_dim": 128, "rope_theta": 5e7, "rms_norm_eps": 1e-5, "qkv_bias": False, "bias": False, "hidden_act": "silu",
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}, "tie_word_embeddings": False,
        },
        arguments={"trust_remote_code": True}, own_config="InternLM3Config",
    ),
    Architecture(
        "EXAONE 4 1.2B", "Exaone4ForCausalLM", "exaone4", 64, "norms of queries and keys",
        {
            "head_dim": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "rope_scaling": LLAMA3_ROPE, "sliding_window": None,
            "sliding_window_pattern": None, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True,
        },
        outcome="refused", config_only=True,
    ),
    Architecture(
        "EXAONE 4 32B", "Exaone4ForCausalLM", "exaone4", 128, "three of four layers slide, the others have no rope",
        {
            "head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": 4096,
            "sliding_window_pattern": "LLLG", "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
        layers=4, outcome="refused", config_only=True,
    ),
    Architecture(
        "Hunyuan (dense)", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", 128, "norms of queries and keys behind rope",
        {
            "head_dim": 128, "rope_theta": 1e4, "rms_norm_eps": 1e-5, "use_qk_norm": True, "attention_bias": False,
            "rope_scaling": {
                "type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            "tie_word_embeddings": True,
        },
        outcome="not startable",  # SGLang takes the heads of its normed queries for padded tokens, with any backend
    ),
    Architecture(
        "Ernie 4.5 (dense)", "Ernie4_5_ForCausalLM", "ernie4_5", 128, "rotates pairs of neighbouring channels",
        {"head_dim": 128, "hidden_size": 256, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "use_bias": False,
         "tie_word_embeddings": True},
    ),
    Architecture(
        "Seed-OSS", "SeedOssForCausalLM", "seed_oss", 128, "biases of queries, keys and values",
        {
            "head_dim": 128, "hidden_size": 256, "rope_theta": 1e7, "rms_norm_eps": 1e-6, "attention_bias": True,
            "attention_out_bias": False, "mlp_bias": False,
        },
    ),
)  # fmt: skip
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
ON_TWO_RANKS = ("Qwen 3", "gpt-oss")
