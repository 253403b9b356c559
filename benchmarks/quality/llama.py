"""A Llama in a few lines over a pool of ours: dense prefill, decode by a step's lists. No server, no scheduler."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import DenseStep, SparseStep

Buffers = list[torch.Tensor]


class Llama:
    """A Hugging Face checkpoint in float32.

    Args:
        folder: of the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import LlamaForCausalLM

        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        config = self._model.config
        self.layers, self.kv_heads = config.num_hidden_layers, config.num_key_value_heads
        self.head_dim: int = self._model.model.layers[0].self_attn.head_dim

    def extend(self, ids: list[int], row: torch.Tensor, keys: Buffers, values: Buffers) -> torch.Tensor:
        """Compute the last tokens of a row densely and write their KV; the hidden state of the last one.

        Args:
            ids: of those tokens.
            row: int64, slots of all tokens, theirs included.
            keys, values: one [slots, kv_heads, head_dim] per layer.
        """
        begin = len(row) - len(ids)
        mask = torch.ones(len(ids), len(row), dtype=torch.bool).tril(begin)

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            k, v = (buffers[layer][row].transpose(0, 1)[None] for buffers in (keys, values))
            q = q.transpose(0, 1)[None]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return self._run(ids, begin, row[begin:], keys, values, attend)

    def decode(
        self,
        token: int,
        position: int,
        slot: torch.Tensor,
        keys: Buffers,
        values: Buffers,
        index: ClusterIndex,
        sparse: SparseStep | None,
        dense: DenseStep | None,
    ) -> torch.Tensor:
        """One decode step of one request; the hidden state of its token."""
        scale = self.head_dim**-0.5

        def attend(layer: int, q: torch.Tensor) -> torch.Tensor:
            if sparse is not None:
                return sparse_decode(q, keys[layer], values[layer], index, layer, sparse, scale)
            assert dense is not None
            row = dense.slots[0, : int(dense.seq_lens[0])]
            k, v = (buffers[layer][row].transpose(0, 1)[None] for buffers in (keys, values))
            return F.scaled_dot_product_attention(q[None].transpose(1, 2), k, v, enable_gqa=True)[0].transpose(0, 1)

        return self._run([token], position, slot.reshape(1), keys, values, attend)

    @torch.inference_mode()
    def _run(self, ids, begin, slots, keys, values, attend) -> torch.Tensor:  # type: ignore[no-untyped-def]
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        model = self._model.model
        hidden = model.embed_tokens(torch.tensor([ids]))
        rotary = model.rotary_emb(hidden, torch.arange(begin, begin + len(ids))[None])
        for number, layer in enumerate(model.layers):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
            q, k = apply_rotary_pos_emb(q, k, *rotary)
            keys[number][slots], values[number][slots] = k[0].transpose(0, 1), v[0].transpose(0, 1)
            out = attend(number, q[0].transpose(0, 1).contiguous())
            hidden = hidden + attention.o_proj(out.reshape(1, len(ids), -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden[0, -1]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of the next token. Apart from the rest: most steps are not asked for them."""
        return self._model.lm_head(self._model.model.norm(hidden))
