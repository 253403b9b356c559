"""A decoder layer in two calls gives what its parts give one by one, to the bit.

Red when: a number differs from the kernels that are called alone, for any number of tokens and threads, weights in halves, with
or without biases and norms of heads; keys or values go to another slot, or to more than the tokens' own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels import decoder_cpu
from sglang_clusterkv.kernels.decoder_cpu import (
    FEED,
    NEXT,
    PROJECT,
    STAGES,
    Product,
    all_inside,
    before_kernel,
    behind_kernel,
    layer_numbers,
    step_numbers,
)  # fmt: skip
from sglang_clusterkv.kernels.layer_cpu import rms_norm, rotate, silu_and_mul
from sglang_clusterkv.kernels.products_cpu import halve, linear
from sglang_clusterkv.kernels.threads_cpu import run, set_threads

HEADS, KV_HEADS, SLOTS, POSITIONS = 6, 2, 40, 64


class Layer(NamedTuple):
    """What a layer has."""

    width: int
    head_dim: int
    inner: int
    norms: list[torch.Tensor]  # before, behind; of queries and of keys, if there are four
    weights: list[torch.Tensor]
    biases: list[torch.Tensor | None]
    halves: list[torch.Tensor | None]
    turns: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def layer_of(width: int, head_dim: int, inner: int, turned: int, *, rich: bool, halved: bool = False) -> Layer:
    torch.manual_seed(3)
    shapes = [
        ((HEADS + 2 * KV_HEADS) * head_dim, width), (width, HEADS * head_dim), (2 * inner, width), (width, inner),
    ]  # fmt: skip
    weights = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
    halves: list[torch.Tensor | None] = [None] * 4
    if halved:
        weights = [weight.bfloat16().float() for weight in weights]
        halves = [torch.empty(len(weight), weight.shape[1] // 2, dtype=torch.int32) for weight in weights]
        assert all(halve(weight, half) for weight, half in zip(weights, halves, strict=True) if half is not None)
    sizes = [width, width, head_dim, head_dim] if rich else [width, width]
    return Layer(
        width,
        head_dim,
        inner,
        [torch.randn(size) for size in sizes],
        weights,
        [torch.randn(len(weight)) if rich else None for weight in weights],
        halves,
        torch.randn(POSITIONS, turned),
        torch.zeros(SLOTS, KV_HEADS, head_dim),
        torch.zeros(SLOTS, KV_HEADS, head_dim),
    )


def one_by_one(
    layer: Layer,
    x: torch.Tensor,
    added: torch.Tensor | None,
    positions: torch.Tensor,
    attended: torch.Tensor,
    halves: bool,
) -> list[torch.Tensor]:
    """Queries, keys, values, the layer's output and residual, by kernels that are called alone."""

    def product(which: int, x: torch.Tensor) -> torch.Tensor:
        return linear(x, layer.weights[which], layer.biases[which], layer.halves[which])

    normed, whole = rms_norm(x, added, layer.norms[0], 1e-5)
    size = HEADS * layer.head_dim
    q, k, v = product(0, normed).split([size, KV_HEADS * layer.head_dim, KV_HEADS * layer.head_dim], 1)
    if len(layer.norms) == 4:
        q, k = (
            rms_norm(part.reshape(-1, layer.head_dim), None, weight, eps)[0].view(len(x), -1)
            for part, weight, eps in zip((q, k), layer.norms[2:], (1e-6, 2e-6), strict=True)
        )
    q, k = (rotate(part, positions, layer.turns, layer.head_dim, halves=halves) for part in (q, k))
    normed, residual = rms_norm(product(1, attended), x if whole is None else whole, layer.norms[1], 3e-6)
    assert residual is not None
    return [q, k, v, product(3, silu_and_mul(product(2, normed))), residual]


class Called:
    """The calls of a layer, and what they leave."""

    def __init__(self, layer: Layer, positions: torch.Tensor, slots: torch.Tensor, halves: bool) -> None:
        tokens, size = len(positions), HEADS * layer.head_dim
        self.tokens = tokens
        self.eps = np.array([1e-5, 1e-6, 2e-6, 3e-6], np.float32)
        before, behind, *of_heads = (weight.data_ptr() for weight in layer.norms)
        of_queries, of_keys = of_heads or (0, 0)
        products = [
            Product(
                (weight if half is None else half).data_ptr(), int(half is not None), *weight.shape,
                0 if bias is None else bias.data_ptr(),
            )
            for weight, bias, half in zip(layer.weights, layer.biases, layer.halves, strict=True)
        ]  # fmt: skip
        self.layer = layer_numbers(
            products, width=layer.width, heads=HEADS, kv_heads=KV_HEADS, head_dim=layer.head_dim, inner=layer.inner,
            turned=layer.turns.shape[1], halves=int(halves), eps=self.eps.ctypes.data, before=before, behind=behind,
            of_queries=of_queries, of_keys=of_keys, turns=layer.turns.data_ptr(), keys=layer.keys.data_ptr(),
            values=layer.values.data_ptr(),
        )  # fmt: skip
        sizes = {
            "normed": layer.width, "projected": size + 2 * KV_HEADS * layer.head_dim, "by_head": size, "queries": size,
            "sum": layer.width, "output": layer.width, "gates": 2 * layer.inner, "gated": layer.inner,
            "residual": layer.width, "hidden": layer.width,
        }  # fmt: skip
        self.left = {name: torch.full((tokens, size), torch.nan) for name, size in sizes.items()}
        self.given = positions, slots
        addresses = {name: one.data_ptr() for name, one in self.left.items()}
        self.step = step_numbers(positions=positions.data_ptr(), slots=slots.data_ptr(), **addresses)

    def before(self, x: torch.Tensor, added: torch.Tensor | None) -> None:
        added_at = 0 if added is None else added.data_ptr()
        run(before_kernel(), 8, self.tokens, self.layer, self.step, x.data_ptr(), added_at, stages=STAGES)

    def behind(self, parts: int, attended: torch.Tensor, residual: torch.Tensor) -> None:
        args = parts, attended.data_ptr(), residual.data_ptr()
        run(behind_kernel(), 8, self.tokens, self.layer, self.layer, self.step, *args, stages=STAGES)


CASES = {
    "plain": layer_of(64, 16, 96, 16, rich=False),
    "rich": layer_of(72, 24, 100, 8, rich=True),
    "halved": layer_of(576, 64, 1536, 64, rich=False, halved=True),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("case", CASES)
def test_calls_give_what_their_parts_give(case: str, tokens: int, threads: int) -> None:
    layer, halves = CASES[case], case != "rich"
    positions, slots = torch.randint(POSITIONS, (tokens,)), torch.randperm(SLOTS)[:tokens]
    x, added, attended = (torch.randn(tokens, size) for size in (layer.width, layer.width, HEADS * layer.head_dim))
    set_threads(threads)
    try:
        for more in (None, added):
            expected = one_by_one(layer, x, more, positions, attended, halves)
            for parts in ([PROJECT | FEED], [PROJECT, FEED]):
                layer.keys.zero_(), layer.values.zero_()
                called = Called(layer, positions, slots, halves)
                called.before(x, more)
                residual = x if more is None else called.left["sum"]
                for part in parts:
                    called.behind(part, attended, residual)
                found = [
                    called.left["queries"], layer.keys[slots].flatten(1), layer.values[slots].flatten(1),
                    called.left["hidden"], called.left["residual"],
                ]  # fmt: skip
                for name, mine, theirs in zip(("q", "k", "v", "output", "residual"), found, expected, strict=True):
                    assert torch.equal(mine, theirs), name
                # The next layer, as if it were the same.
                called.behind(PROJECT | FEED | NEXT, attended, residual.clone())
                following = one_by_one(layer, expected[3], expected[4], positions, attended, halves)
                found = [called.left["queries"], layer.keys[slots].flatten(1), layer.values[slots].flatten(1)]
                assert all(map(torch.equal, found, following))
                assert torch.equal(called.left["sum"], expected[3] + expected[4])
                others = [place for place in range(SLOTS) if place not in slots.tolist()]
                assert not layer.keys[others].any() and not layer.values[others].any()
    finally:
        set_threads(None)


def test_numbers_are_looked_at_before_they_are_places() -> None:
    assert all_inside(np.array([0, 4]), 5) and not all_inside(np.array([0, 5]), 5) and not all_inside(np.array([-1]), 5)


def test_kernels_compile_without_a_layer() -> None:
    decoder_cpu.compile_decoder()
