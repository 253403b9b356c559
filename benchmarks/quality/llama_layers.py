"""A Llama or Qwen2 model layer by layer, in float32: all tokens of a text through one layer, then through the next.

A text that is given can be decoded so: a layer's keys and values at each token depend on the layers below alone. What attends
is the caller's, so that it may be what a decode step does, for many steps at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

# (layer, queries [N, H, G, D], keys [N, H, D], values [N, H, D]) -> output [N, H, G, D]
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
ROWS = 512  # of a prompt's attention at a time


class LayeredModel:
    """The weights of a folder with a Hugging Face checkpoint."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        self._weights = {
            name.removeprefix("model."): value.float()
            for file in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }
        self.layers: int = about["num_hidden_layers"]
        self.heads: int = about["num_attention_heads"]
        self.kv_heads: int = about["num_key_value_heads"]
        self.head_dim: int = about.get("head_dim") or about["hidden_size"] // self.heads
        self._epsilon: float = about["rms_norm_eps"]
        theta = about.get("rope_theta") or about["rope_parameters"]["rope_theta"]
        self._frequencies = 1.0 / theta ** (torch.arange(0, self.head_dim, 2).double() / self.head_dim)

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.head_dim**-0.5

    def __call__(self, ids: list[int], first: int, attend: Attend) -> torch.Tensor:
        """Hidden states behind the last layer, float32 [N, width].

        Args:
            ids: N tokens.
            first: position of the first one.
            attend: called once per layer.
        """
        x = self._weights["embed_tokens.weight"][torch.tensor(ids)]
        angle = torch.arange(first, first + len(ids)).double()[:, None] * self._frequencies
        cos, sin = (f(angle).float().repeat(1, 2).unsqueeze(1) for f in (torch.cos, torch.sin))
        for layer in range(self.layers):
            y = self._norm(x, f"layers.{layer}.input_layernorm")
            q, k, v = (
                self._linear(y, f"layers.{layer}.self_attn.{n}_proj").unflatten(1, (-1, self.head_dim)) for n in "qkv"
            )
            q, k = (self._turned(z, cos, sin) for z in (q, k))
            y = attend(layer, q.unflatten(1, (self.kv_heads, -1)), k, v).flatten(1)
            x = x + self._linear(y, f"layers.{layer}.self_attn.o_proj")
            y = self._norm(x, f"layers.{layer}.post_attention_layernorm")
            gate, up = (self._linear(y, f"layers.{layer}.mlp.{n}_proj") for n in ("gate", "up"))
            x = x + self._linear(silu(gate) * up, f"layers.{layer}.mlp.down_proj")
        return self._norm(x, "norm")

    def log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [N, vocabulary]."""
        head = self._weights.get("lm_head.weight", self._weights["embed_tokens.weight"])
        return linear(hidden, head).double().log_softmax(-1).float()

    def prefill(self, ids: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of a prompt by layer, float32 [N, H, D] each, by dense attention."""
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []

        def attend(layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            kept.append((keys, values))
            rows = q.flatten(1, 2).transpose(0, 1).unsqueeze(0)
            k, v = (z.transpose(0, 1).unsqueeze(0) for z in (keys, values))
            found = []
            for begin in range(0, len(ids), ROWS):
                end = min(begin + ROWS, len(ids))
                mask = torch.arange(end) <= torch.arange(begin, end).unsqueeze(1)
                found.append(
                    scaled_dot_product_attention(
                        rows[:, :, begin:end], k[:, :, :end], v[:, :, :end], mask, scale=self.scale, enable_gqa=True
                    )
                )
            return torch.cat(found, 2)[0].transpose(0, 1).reshape(q.shape)

        self(ids, 0, attend)
        return kept

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, x.shape[-1:], self._weights[f"{name}.weight"], self._epsilon)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    @staticmethod
    def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotary positions."""
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat((-right, left), -1) * sin
