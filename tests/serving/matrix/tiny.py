"""Random weights for an architecture, as its own checkpoints name them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.serving.matrix.architectures import Architecture

SEED = 3
SHARPNESS = 3.0  # about the standard deviation of attention logits, with norms of queries and keys too


def _embedding(architecture: Architecture) -> float:
    """How long embeddings are. Tied, they give the logits too, of which none may be certain; Gemma makes them longer."""
    if not architecture.config.get("tie_word_embeddings"):
        return architecture.config["hidden_size"] ** 0.5
    return 0.25 if "gemma" in architecture.model_type else 2.0


def make(architecture: Architecture, path: Path) -> None:
    """Write a checkpoint; the weights by the class of Transformers, the configuration as the table has it."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(architecture.config))
    if architecture.config_only:
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    for name, weight in model.named_parameters():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        noise = torch.randn(weight.shape, generator=generator)
        if "sinks" in name:
            weight.data = 2.0 + noise
        elif any(part in name for part in ("q_norm", "k_norm", "query_layernorm", "key_layernorm")):
            # Gemma adds one to it. Some norm all heads together, which is the same here.
            weight.data = torch.full(weight.shape, SHARPNESS**0.5 - ("gemma" in architecture.model_type))
        elif weight.dim() < 2:
            if name.endswith("bias"):
                weight.data = 0.1 * noise
        elif kind in ("q_proj", "k_proj", "qkv_proj"):
            weight.data = noise * SHARPNESS**0.5 / weight.shape[1] ** 0.5
        elif "embed" in name:
            weight.data = noise * _embedding(architecture) / weight.shape[1] ** 0.5
        else:
            weight.data = noise / weight.shape[-1] ** 0.5
    model.save_pretrained(path)
    (path / "config.json").write_text(json.dumps(architecture.config))
