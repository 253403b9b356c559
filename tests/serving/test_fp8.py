"""A KV cache in fp8 and the factors that a checkpoint brings for its keys and values, through the backend as SGLang calls it.

Red when: a factor is left out of logits or outputs, taken twice, or taken for the other one; it is not given to the pool, which
divides by it; or it is given where the pool is in the model's own dtype.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_clusterkv.serving import layers
from tests.serving.test_layer_faults import HEAD_DIM, KV_HEADS, MIXED, SCALE, Served
from tests.support.scenes import Scene

FP8 = torch.float8_e4m3fn
OF_KEYS, OF_VALUES = 0.5, 4.0  # powers of two, by which every rounding stays the same


def served(of_keys: float | None = None, of_values: float | None = None, dtype: torch.dtype = FP8) -> Served:
    """Requests over a pool of this dtype, in layers with these factors."""
    made = Served(MIXED, dtype=dtype)
    for layer in made.layers:
        layer.k_scale_float, layer.v_scale_float = of_keys, of_values
    return made


def in_float32(factor: float) -> Served:
    """The same over a pool in float32 that has the numbers of the one in fp8, times a factor."""
    drawn = Scene.clustered
    with patch.object(Scene, "clustered", lambda self, geometry: factor * drawn(self, geometry).to(FP8).float()):
        return served(3.0, 3.0, torch.float32)  # of no account there


def extended(made: Served) -> torch.Tensor:
    """A prefill of three new tokens of the first request, [3, heads, D]."""
    made.backend._extend_slots, made.backend._extend, made.backend._extend_lists = [made.scene.slots(1, 500)], None, {}
    q = made.q[:1].repeat(3, 1, 1) * torch.arange(1, 4).view(3, 1, 1)
    batch: Any = SimpleNamespace(extend_seq_lens_cpu=[3])
    output = made.backend.forward_extend(q.flatten(1), q, q, made.layers[1], batch, save_kv_cache=False)
    return output.unflatten(1, q.shape[1:])


@pytest.mark.parametrize(("of_keys", "of_values"), [(None, None), (OF_KEYS, OF_VALUES)])
def test_factors_make_keys_and_values_of_what_is_stored(of_keys: float | None, of_values: float | None) -> None:
    stored, wide = served(of_keys, of_values), in_float32(of_keys or 1.0)
    factor = (of_values or 1.0) / (of_keys or 1.0)  # the twin's values have that of the keys
    for actual, expected in zip(stored.decode(), wide.decode(), strict=True):
        torch.testing.assert_close(actual, factor * expected, atol=1e-5, rtol=1e-4)
    assert stored.counted()[0] == 2 and stored.counted() == wide.counted()
    torch.testing.assert_close(extended(stored), factor * extended(wide), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "given"), [(FP8, True), (torch.bfloat16, False)])
def test_the_pool_gets_the_factors_that_it_divides_by(dtype: torch.dtype, given: bool) -> None:
    layer = RadixAttention(2 * KV_HEADS, HEAD_DIM, SCALE, KV_HEADS, 0)
    layer.k_scale, layer.v_scale = torch.tensor(OF_KEYS), torch.tensor(OF_VALUES)
    made, written = served(), []
    made.backend.token_to_kv_pool = SimpleNamespace(
        dtype=dtype, set_kv_buffer=lambda *arguments: written.append(arguments)
    )
    with patch.object(KVWriteLoc, "for_layer", lambda *_: "there"):
        made.backend._write(made.q, made.q, layer, None, True)
    assert written[0][4:] == ((layer.k_scale, layer.v_scale) if given else ())
    assert layers.kv_scales(layer, dtype) == (1.0, 1.0), "no factors as floats: none were loaded"
