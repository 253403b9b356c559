"""Keys, values and queries of a real model: one forward of the demo model over the project's LICENSE."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

TEXT = Path(__file__).parents[2] / "LICENSE"


class Captured(NamedTuple):
    """float32, keys and queries with their rotary positions; L layers, T tokens, H kv heads, G query heads of each."""

    keys: torch.Tensor  # [L, T, H, D]
    values: torch.Tensor  # [L, T, H, D]
    queries: torch.Tensor  # [L, T, H * G, D]
    scale: float  # of the logits


def capture(model: Path, layers: tuple[int, ...], tokens: int) -> Captured:
    """Run the layers up to the last of `layers` over the first tokens of TEXT, which has about 2,400, in float32.

    Args:
        model: folder of a Llama model in Hugging Face's format.
        layers: whose keys, values and queries to keep, ascending.
        tokens: of the sequence.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaModel
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :tokens]
    assert ids.shape[1] == tokens, (ids.shape, tokens)
    config = AutoConfig.from_pretrained(model, num_hidden_layers=layers[-1] + 1)
    llama = LlamaModel.from_pretrained(model, config=config, dtype=torch.float32).eval()
    kept = []

    def keep(attention: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
        hidden = kwargs["hidden_states"]
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (p(hidden).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for p in projections)
        q, k = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        kept.append(tuple(x[0].transpose(0, 1).contiguous() for x in (k, v, q)))

    for layer in layers:
        llama.layers[layer].self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.inference_mode():
        cache = llama(ids, use_cache=True).past_key_values
    for layer, (k, v, _) in zip(layers, kept, strict=True):
        # What the model itself caches: recomputing above took the same projections, heads and positions.
        torch.testing.assert_close(k.transpose(0, 1), cache.layers[layer].keys[0])
        torch.testing.assert_close(v.transpose(0, 1), cache.layers[layer].values[0])
    scale = llama.layers[0].self_attn.scaling
    return Captured(*(torch.stack(x).clone() for x in zip(*kept, strict=True)), scale)
