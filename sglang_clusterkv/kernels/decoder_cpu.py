"""A decoder layer of a few tokens on a CPU, but for its attention: one compiled call before it and one behind it; in float32.

    before:  norm | queries', keys' and values' product | norms of heads, rotation, keys and values into the pool
    behind:  output's product | norm | gate's and up's product | gate | down's product, and then what is before the next layer's

Threads take items of each stage, which begins when the one before is done. Each stage calls what `layer_cpu.py` and
`products_cpu.py` call from Python, so the numbers are the same to the bit. What a call needs to know lies in two arrays of
integers: one of the layer, made once, and one of the step. Neither is ever changed: a thread that comes late reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numba import carray

from sglang_clusterkv.kernels.call_cpu import call_at
from sglang_clusterkv.kernels.cpu_math import njit, part
from sglang_clusterkv.kernels.layer_cpu import addresses, floats_at, places_at
from sglang_clusterkv.kernels.products_cpu import product_rows, rows_of_item
from sglang_clusterkv.kernels.threads_cpu import cached, done, leave, run, take, wait

if TYPE_CHECKING:  # what `cached` gives the kernels

    def given(*args: Any) -> Any: ...

    product = norm = gate = ready = given

# Of a layer, addresses unless it says otherwise. Heads: of queries, and of keys and values.
LAYER = (
    "width",  # channels of a token
    "heads",
    "kv_heads",
    "head_dim",
    "turned",  # channels of a head that are rotated
    "halves",  # 1: a channel is paired with the one half of the turned ones further; 0: with its neighbour
    "inner",  # channels between gate and down
    "eps",  # float32 [4]: of the norm before attention, of queries, of keys, of the norm behind it
    "before",  # float32 [width], weights of a norm, as are the next three
    "of_queries",  # [head_dim]; 0: no such norm
    "of_keys",
    "behind",
    "turns",  # float32 [positions, turned]: cosines and sines
    "keys",  # float32 [slots, kv_heads, head_dim], the pool's
    "values",
    "norm",  # of layer_cpu.norm_rows, and so on
    "gate",
    "rotate",
)  # behind them four products: of queries, keys and values; of attention's output; of gate and up; of down
# Of a product of these.
PRODUCT = (
    "weights",  # as `product_rows` takes them, as are the next four
    "halved",
    "rows",
    "channels",
    "bias",
    "each",  # rows of an item of work
    "items",
)
# Of a step: addresses, float32 [tokens, ...] unless it says otherwise.
STEP = (
    "positions",  # int64 [tokens]
    "slots",  # int64 [tokens], where keys and values go
    "normed",  # [width]
    "projected",  # [heads + 2 kv_heads, head_dim]
    "by_head",  # [heads, head_dim], normed queries or keys of a token
    "queries",  # [heads, head_dim], what attention is asked
    "sum",  # [width]: what is added to attention's output, where a layer adds it up
    "output",  # [width], of attention's product
    "gates",  # [2 inner]
    "gated",  # [inner]
    "residual",  # [width], what the next layer adds to `hidden`
    "hidden",  # [width], a layer's output
)
(
    WIDTH, HEADS, KV_HEADS, HEAD_DIM, TURNED, HALVES, INNER, EPS, BEFORE, OF_QUERIES, OF_KEYS, BEHIND, TURNS, KEYS, VALUES,
    NORM, GATE, ROTATE,
) = range(len(LAYER))  # fmt: skip
WEIGHTS, HALVED, ROWS, CHANNELS, BIAS, EACH, ITEMS = range(len(PRODUCT))
QKV, OUT, GATE_UP, DOWN = (len(LAYER) + i * len(PRODUCT) for i in range(4))
(
    POSITIONS, SLOTS, NORMED, PROJECTED, BY_HEAD, QUERIES, SUM, OUTPUT, GATES, GATED, RESIDUAL, HIDDEN,
) = range(len(STEP))  # fmt: skip
STAGES = 8  # of the longer call
# Parts of what is behind attention, for whoever adds up between them; and what is before the next layer's.
PROJECT, FEED, NEXT = 1, 2, 4


@part
def _product(stage: Any, layer: Any, which: int, x_at: int, tokens: int, out_at: int) -> int:
    """A thread's share of a product of the layer's; returns how many items it has."""
    rows, each, items = layer[which + ROWS], layer[which + EACH], layer[which + ITEMS]
    item = take(stage)
    while item < items:
        product_rows(
            item * each, min(rows, (item + 1) * each), x_at, tokens, layer[which + CHANNELS], layer[which + WEIGHTS],
            layer[which + HALVED], rows, layer[which + BIAS], out_at,
        )  # fmt: skip
        done(stage)
        item = take(stage)
    return items


@part
def _norm(
    stage: Any, layer: Any, x_at: int, added_at: int, weight_at: int, eps: Any, tokens: int, out_at: int, sum_at: int
) -> None:
    """A norm by the thread that is there first; all wait for it."""
    if take(stage) == 0:
        call_at(layer[NORM], (x_at, added_at, weight_at, eps, tokens, layer[WIDTH], out_at, sum_at))
        done(stage)
    wait(stage, 1)


@part
def _gate(stage: Any, tokens: int, layer: Any, step: Any) -> None:
    """A thread's share of the tokens' gates; all wait for all of them."""
    token, inner = take(stage), layer[INNER]
    while token < tokens:
        call_at(layer[GATE], (step[GATES] + 8 * token * inner, 1, inner, step[GATED] + 4 * token * inner))
        done(stage)
        token = take(stage)
    wait(stage, tokens)


@part
def _place(token: int, layer: Any, step: Any) -> None:
    """Normed and rotated queries of a token, its normed and rotated keys in the pool, and its values."""
    heads, kv_heads, channels, turned = layer[HEADS], layer[KV_HEADS], layer[HEAD_DIM], layer[TURNED]
    halves, turns, eps = layer[HALVES], layer[TURNS], carray(floats_at(layer[EPS]), 4)
    position_at = step[POSITIONS] + 8 * token
    row = 4 * kv_heads * channels * carray(places_at(step[SLOTS]), token + 1)[token]
    queries = step[PROJECTED] + 4 * token * (heads + 2 * kv_heads) * channels
    keys, scratch = queries + 4 * heads * channels, step[BY_HEAD] + 4 * token * heads * channels
    source, out = queries, step[QUERIES] + 4 * token * heads * channels
    if layer[OF_QUERIES]:
        call_at(layer[NORM], (queries, 0, layer[OF_QUERIES], eps[1], heads, channels, scratch, 0))
        source = scratch
    call_at(layer[ROTATE], (source, 0, turns, position_at, 1, heads, channels, turned, halves, out))
    source, out = keys, layer[KEYS] + row
    if layer[OF_KEYS]:
        call_at(layer[NORM], (keys, 0, layer[OF_KEYS], eps[2], kv_heads, channels, scratch, 0))
        source = scratch
    call_at(layer[ROTATE], (source, 0, turns, position_at, 1, kv_heads, channels, turned, halves, out))
    values = carray(floats_at(keys + 4 * kv_heads * channels), kv_heads * channels)
    stored = carray(floats_at(layer[VALUES] + row), kv_heads * channels)
    for d in range(kv_heads * channels):
        stored[d] = values[d]


@part
def _ready(counter: Any, tokens: int, layer: Any, step: Any, x_at: int, added_at: int) -> Any:
    """A thread's share of what is before attention, in three stages; returns the last one, which may not be done."""
    eps = carray(floats_at(layer[EPS]), 4)
    _norm(counter, layer, x_at, added_at, layer[BEFORE], eps[0], tokens, step[NORMED], step[SUM])
    stage = counter[2:]
    wait(stage, _product(stage, layer, QKV, step[NORMED], tokens, step[PROJECTED]))
    stage = counter[4:]
    token = take(stage)
    while token < tokens:
        _place(token, layer, step)
        done(stage)
        token = take(stage)
    return stage


@functools.cache
def before_kernel() -> Any:
    """Compile what is before attention, for `threads_cpu.run` with `STAGES`.

    Takes `tokens`, the integers of layer and step, and two addresses: `x_at`, the layer's input, and `added_at`, what is added
    to it first, so that the sum goes to the step's `sum`; 0: nothing.
    """

    def before(number: int, counter: Any, _: int, tokens: int, layer: Any, step: Any, x_at: int, added_at: int) -> None:
        leave(number, ready(counter, tokens, layer, step, x_at, added_at), tokens)

    return cached(before, (), ready=_ready)


@functools.cache
def behind_kernel() -> Any:
    """Compile what is behind attention, for `threads_cpu.run` with `STAGES`.

    It takes `tokens`, the integers of the layer, of the one behind it and of the step, `parts`, a sum of `PROJECT`, `FEED` and
    `NEXT`, and two addresses: `attended_at`, attention's output, and `residual_at`, what is added to its product.
    """

    def behind(
        number: int, counter: Any, _: int, tokens: int, layer: Any, following: Any, step: Any, parts: int,
        attended_at: int, residual_at: int,
    ) -> None:  # fmt: skip
        stage, last = counter, 0
        if parts & PROJECT:
            last = product(stage, layer, OUT, attended_at, tokens, step[OUTPUT])
        if parts & FEED:
            if parts & PROJECT:
                wait(stage, last)
            eps = carray(floats_at(layer[EPS]), 4)
            norm(
                counter[2:],
                layer,
                step[OUTPUT],
                residual_at,
                layer[BEHIND],
                eps[3],
                tokens,
                step[NORMED],
                step[RESIDUAL],
            )
            stage = counter[4:]
            wait(stage, product(stage, layer, GATE_UP, step[NORMED], tokens, step[GATES]))
            gate(counter[6:], tokens, layer, step)
            stage = counter[8:]
            last = product(stage, layer, DOWN, step[GATED], tokens, step[HIDDEN])
        if parts & NEXT:
            wait(stage, last)
            stage, last = ready(counter[10:], tokens, following, step, step[HIDDEN], step[RESIDUAL]), tokens
        leave(number, stage, last)

    return cached(behind, (), norm=_norm, product=_product, gate=_gate, ready=_ready)


@njit(cache=True, nogil=True)
def all_inside(places: Any, end: int) -> bool:
    """Whether all of some numbers are at least 0 and below `end`."""
    inside = True
    for place in places:
        inside = inside and 0 <= place < end
    return inside


class Product(NamedTuple):
    """A product with weights [rows, channels]."""

    weights: int  # their address
    halved: int  # 1: as `products_cpu.halve` made them
    rows: int
    channels: int
    bias: int  # address of float32 [rows], which is added; 0: nothing


def layer_numbers(products: Sequence[Product], **values: int) -> np.ndarray:
    """The integers of a layer: int64, as `LAYER` names them, and its four products."""
    values |= addresses()._asdict()
    listed = [values[name] for name in LAYER]
    for one in products:
        each = rows_of_item(one.rows, one.channels)
        listed += [*one, each, -(-one.rows // each)]
    return np.array(listed, np.int64)


def step_numbers(**values: int) -> np.ndarray:
    """The integers of a step: int64, as `STEP` names them."""
    return np.array([values[name] for name in STEP], np.int64)


def compile_decoder() -> None:
    """Compile all of it."""
    eps = np.zeros(4, np.float32)
    nothing = Product(0, 0, 1, 4, 0)
    values = dict.fromkeys(LAYER, 0) | {"eps": eps.ctypes.data}
    layer, step = layer_numbers([nothing] * 4, **values), step_numbers(**dict.fromkeys(STEP, 0))
    run(before_kernel(), 1, 0, layer, step, 0, 0, stages=STAGES)
    run(behind_kernel(), 1, 0, layer, layer, step, PROJECT | FEED | NEXT, 0, 0, stages=STAGES)
    all_inside(np.zeros(1, np.int64), 1)
