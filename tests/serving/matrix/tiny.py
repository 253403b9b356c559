"""Random weights for an architecture, as its own checkpoints name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.serving.matrix.architectures import VOCABULARY, Architecture

SEED = 3
SHARPNESS = 3.0  # about the standard deviation of attention logits, with norms of queries and keys too


def _embedding(architecture: Architecture) -> float:
    """How long embeddings are. Tied, they give the logits too, of which none may be certain; Gemma makes them longer."""
    if not architecture.config.get("tie_word_embeddings"):
        return architecture.config["hidden_size"] ** 0.5
    return 0.25 if "gemma" in architecture.model_type else 2.0


def _weight(architecture: Architecture, name: str, initial: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A parameter's value; what is not drawn stays as it is initially."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if "sinks" in name:
        return 2.0 + noise
    if any(part in name for part in ("q_norm", "k_norm", "query_layernorm", "key_layernorm")):
        # Gemma adds one to it. Some norm all heads together, which is the same here.
        return torch.full(initial.shape, SHARPNESS**0.5 - ("gemma" in architecture.model_type))
    if initial.dim() < 2:
        return 0.1 * noise if name.endswith("bias") else initial
    if kind in ("q_proj", "k_proj", "qkv_proj", "wqkv"):
        return noise * SHARPNESS**0.5 / initial.shape[1] ** 0.5
    if "embed" in name:
        return noise * _embedding(architecture) / initial.shape[1] ** 0.5
    return noise / initial.shape[-1] ** 0.5


def _internlm2(config: dict[str, Any], head_dim: int) -> dict[str, torch.Tensor]:
    """Parameters as InternLM 2's checkpoints name them: a kv head's queries, its key and its value lie together."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    rows = (heads + 2 * config["num_key_value_heads"]) * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.tok_embeddings.weight": (VOCABULARY, hidden),
        "model.norm.weight": (hidden,),
        "output.weight": (VOCABULARY, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        parts = {
            "attention.wqkv": (rows, hidden),
            "attention.wo": (hidden, heads * head_dim),
            "feed_forward.w1": (inner, hidden),
            "feed_forward.w2": (hidden, inner),
            "feed_forward.w3": (inner, hidden),
            "attention_norm": (hidden,),
            "ffn_norm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return {name: torch.ones(shape) for name, shape in shapes.items()}


def make(architecture: Architecture, path: Path) -> None:
    """Write a checkpoint; the weights by the class of Transformers where it has one, the configuration as the table has it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(architecture.config))
    if architecture.config_only:
        return
    generator = torch.Generator().manual_seed(SEED)
    if architecture.own_config:
        (path / "configuration.py").write_text(
            "from transformers import PretrainedConfig\n\n\n"
            f"class {architecture.own_config}(PretrainedConfig):\n    model_type = {architecture.model_type!r}\n"
        )
    if architecture.model_type == "internlm2":
        weights = _internlm2(architecture.config, architecture.head_dim)
        for name, weight in weights.items():
            weights[name] = _weight(architecture, name, weight, torch.randn(weight.shape, generator=generator))
        save_file(weights, path / "model.safetensors")
        return
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    # InternLM 3 names its weights as Llama does.
    config = LlamaConfig(**architecture.config) if architecture.own_config else AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        weight.data = _weight(architecture, name, weight.data, torch.randn(weight.shape, generator=generator))
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(architecture.config))
