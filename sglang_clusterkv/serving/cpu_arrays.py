"""What a decoder layer of ours reads and writes in a decode step, and where it is: weights, cosines and sines, keys, values.

Compiled code takes addresses, so each array is looked at in each step: another type or shape, or one that is not in this
process's memory, leaves the step to SGLang's modules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sglang.srt.layers.linear import RowParallelLinear
from sglang.srt.runtime_context import get_parallel

from sglang_clusterkv.kernels.decoder_cpu import GATE_UP, ITEMS, OUT, QKV, Product, layer_numbers
from sglang_clusterkv.serving.cpu_weights import in_memory
from sglang_clusterkv.serving.plain_layers import Shape, norms_of, products_of
from sglang_clusterkv.serving.pool import ClusterKVPool


class Arrays:
    """Those of a plain decoder layer.

    Args:
        module: SGLang's.
        shape: of it.

    Attributes:
        numbers: `decoder_cpu.LAYER` and its products.
        items: of work in the layer's four calls.
        longest: positions that can be rotated.
        room: tokens that the pool has place for.
    """

    def __init__(self, module: torch.nn.Module, shape: Shape) -> None:
        self._shape, self._layer_id = shape, module.self_attn.attn.layer_id
        self._rotation, self._products, norms = module.self_attn.rotary_emb, products_of(module), norms_of(module)
        self._turned = self._rotation.cos_sin_cache.shape[1]
        # The modules' own dictionaries: a module looks an attribute up ten times as long.
        self._norms = norms
        self._weights = [one._parameters for one in (*self._products, *norms)]
        self._biases = [(one._parameters, one.__dict__, _adds_bias(one)) for one in self._products]
        self._eps = np.empty(0, np.float32)
        self._found: tuple[Any, ...] = ()
        self.numbers = np.empty(0, np.int64)
        self.items: list[int] = []
        self.longest = self.room = 0

    def are_there(self, pool: ClusterKVPool) -> bool:
        """Whether all are where a step of ours may read and write them; notes where."""
        place, turns = self._layer_id - pool.start_layer, self._rotation.cos_sin_cache
        weights = [kept.get("weight") for kept in self._weights]
        biases = [kept.get("bias") if adds else None for kept, _, adds in self._biases]
        settings = (self._rotation.is_neox_style, *[norm.variance_epsilon for norm in self._norms])
        arrays = (*weights, *biases, turns, pool.k_buffer[place], pool.v_buffer[place])
        looks = [None if one is None else (one.data_ptr(), one.dtype, one.shape, one.is_contiguous()) for one in arrays]
        others = any(adds and rest.get("bias") is not None for _, rest, adds in self._biases)  # that are no parameters
        if None in looks[: len(weights)] or others:
            return False
        read = [one.quant_method.weights(weight) for one, weight in zip(self._products, weights, strict=False)]
        found = (settings, *looks, *read)
        if found != self._found:
            self._found = ()
            if self._are_as_expected(weights, biases, *arrays[-3:]):
                self._note(read, weights, biases, *arrays[-3:])
                self._found = found
        return bool(self._found)

    def _are_as_expected(
        self, weights: list[torch.Tensor], biases: list[torch.Tensor | None], turns: torch.Tensor, keys: torch.Tensor,
        values: torch.Tensor,
    ) -> bool:  # fmt: skip
        """Whether they are float32 in memory, in the shapes that a model has that was just loaded."""
        shape = self._shape
        queries, both = shape.heads * shape.head_dim, (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        rows, columns = (
            (both, shape.width, 2 * shape.inner, shape.width),
            (shape.width, queries, shape.width, shape.inner),
        )
        shapes: list[tuple[int, ...]] = [*zip(rows, columns, strict=True), (shape.width,), (shape.width,)]
        if shape.of_heads:
            shapes += [(shape.head_dim,)] * 2
        return (
            in_memory(*weights, *(one for one in biases if one is not None), turns, keys, values)
            and [tuple(one.shape) for one in weights] == shapes
            and all(one is None or one.shape == (row,) for one, row in zip(biases, rows, strict=True))
            and turns.shape[1:] == (self._turned,)
            and keys.shape == values.shape
            and keys.shape[1:] == (shape.kv_heads, shape.head_dim)
        )

    def _note(
        self, read: list[tuple[int, int]], weights: list[torch.Tensor], biases: list[torch.Tensor | None],
        turns: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    ) -> None:  # fmt: skip
        shape = self._shape
        eps = [self._norms[i].variance_epsilon if i < len(self._norms) else 0.0 for i in (0, 2, 3, 1)]
        self._eps = np.array(eps, np.float32)
        norms = [one.data_ptr() for one in weights[4:]]
        before, behind, of_queries, of_keys = norms if shape.of_heads else (*norms, 0, 0)
        products = [
            Product(address, halved, weight.shape[0], weight.shape[1], 0 if bias is None else bias.data_ptr())
            for (address, halved), weight, bias in zip(read, weights, biases, strict=False)
        ]
        self.numbers = layer_numbers(
            products, width=shape.width, heads=shape.heads, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            inner=shape.inner, turned=self._turned, halves=int(self._rotation.is_neox_style),
            eps=self._eps.ctypes.data, before=before, behind=behind, of_queries=of_queries, of_keys=of_keys,
            turns=turns.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(),
        )  # fmt: skip
        self.items = [int(self.numbers[one + ITEMS]) for one in (QKV, OUT, GATE_UP, GATE_UP)]
        self.longest, self.room = len(turns), len(keys)


def _adds_bias(product: torch.nn.Module) -> bool:
    """Whether a product adds its bias on this rank, if it has one."""
    return not isinstance(product, RowParallelLinear) or get_parallel().tp_rank == 0
