"""A random Llama of two layers for tests of the server: it starts in seconds and decodes in milliseconds.

Its attention is sharp: a few of a thousand tokens carry nearly all weight, and the next token depends on which. So with a
generous budget the sparse way is nearly exact wherever segments have their borders, and an answer changes as soon as one
of those few is missed. Tests of answers lean on this: they compare tokens under load with those of an idle server
although load may move borders.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch

from sglang_clusterkv.tools.demo_model import cache_dir, default_out

SEED = 11
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Standard deviation of attention logits over the tokens of a text.
SHARPNESS = 8.0


def tiny_model() -> Path:
    """The folder of the checkpoint, made on the first call: weights, and the demo model's tokenizer and chat template."""
    recipe = json.dumps([SEED, SHARPNESS, SHAPE, Path(__file__).read_text()])
    path = cache_dir() / f"tiny-llama-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not (path / "config.json").exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            _make(Path(folder) / "model")
            # Another process may have been first.
            if not path.exists():
                os.replace(Path(folder) / "model", path)
    return path


def _make(path: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    demo = default_out()
    assert (demo / "tokenizer.json").exists(), f"{demo} has no tokenizer: run `make demo-model`"
    config = LlamaConfig(vocab_size=len(AutoTokenizer.from_pretrained(demo)), dtype=torch.float32, **SHAPE)
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(SEED)
    hidden = SHAPE["hidden_size"]
    # A linear map of a normalised input gives channels of this deviation.
    gains = {"q_proj": SHARPNESS**0.5, "k_proj": SHARPNESS**0.5, "embed_tokens": hidden**0.5, "o_proj": 1.5}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            gain = next((gain for part, gain in gains.items() if part in name), 1.0)
            weight.data.normal_(0, gain / weight.shape[1] ** 0.5, generator=generator)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, path)
