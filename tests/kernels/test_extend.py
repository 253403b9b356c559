"""Prefill attention on the CPU equals its definition, whatever is prefix and whatever is new.

Red when: a new token sees a later one, the prefix is read at wrong slots or merged with a wrong weight, or a window or cap
is ignored.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.kernels.attend import cpu as attend_cpu
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.extend import cpu, reference
from sglang_clusterkv.memory.fp8 import FP8

POOL, KV_HEADS, HEADS, CHANNELS = 900, 3, 9, 64
SINKS = torch.linspace(-2.0, 8.0, HEADS)


def pool(dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and a permutation of their slots."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(POOL, KV_HEADS, CHANNELS, generator=generator).to(dtype) for _ in range(2)]
    return rows[0], rows[1], torch.randperm(POOL, generator=generator)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.02), (torch.float8_e4m3fn, 2e-6)]
)
@pytest.mark.parametrize(("new", "total"), [(1, 1), (1, 700), (10, 777), (21, 600), (22, 600), (130, 300), (64, 64)])
def test_new_tokens_see_their_prefix_and_themselves(dtype: torch.dtype, bound: float, new: int, total: int) -> None:
    keys, values, slots = pool(dtype)
    q = torch.randn(new, HEADS, CHANNELS, generator=torch.Generator().manual_seed(1))
    q = q if dtype in FP8 else q.to(dtype)
    for sinks in (None, SINKS):
        actual = cpu.extend(q, keys, values, slots[:total], 0.125, sinks=sinks)
        expected = reference.extend(q, keys, values, slots[:total], 0.125, sinks=sinks)
        assert (actual.float() - expected.float()).abs().max() < bound


@pytest.mark.parametrize("sinks", [None, SINKS])
def test_the_definition_is_softmax_over_earlier_tokens(sinks: torch.Tensor | None) -> None:
    keys, values, slots = pool(torch.float32)
    q = torch.randn(5, HEADS, CHANNELS)
    outputs = reference.extend(q, keys, values, slots[:40], 0.125, sinks=sinks)
    for i in range(5):
        k, v = keys[slots[: 36 + i], 1].double(), values[slots[: 36 + i], 1].double()
        logits = 0.125 * k @ q[i, 4].double()
        more = logits if sinks is None else torch.cat((logits, sinks[4:5].double()))
        weights = torch.softmax(more, 0)[: len(logits)]
        torch.testing.assert_close(outputs[i, 4].double(), weights @ v, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 17},
        {"logit_cap": 1.5},
        {"sliding_window": 3, "logit_cap": 2.0},
        {"sinks": SINKS},
        {"sliding_window": 17, "sinks": SINKS},
    ],
    ids=str,
)
def test_windows_caps_and_sinks_hold_in_decode_as_in_prefill(options: dict[str, object]) -> None:
    keys, values, slots = pool(torch.float32)
    q = torch.randn(2, HEADS, CHANNELS)
    lengths = torch.tensor([500, 37])
    listed = torch.stack([slots[:500], slots[:500]])
    expected = torch.cat(
        [
            reference.extend(q[i : i + 1], keys, values, slots[:length], 0.125, **options)
            for i, length in enumerate(lengths)
        ]
    )
    for decode in (attend_cpu.dense_decode, attend_reference.dense_decode):
        actual = decode(q, keys, values, listed, lengths, 0.125, **options)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-5)
    full = reference.extend(q[:1], keys, values, slots[:500], 0.125)
    assert not torch.allclose(full, expected[:1], atol=1e-3), "the option changed nothing"
