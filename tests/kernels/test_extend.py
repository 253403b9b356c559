"""Prefill attention on the CPU equals its definition, whatever is prefix and whatever is new.

Red when: a new token sees a later one, the prefix is read at wrong slots or merged with a wrong weight, or a window or cap
is ignored; or what a token gets depends on which tokens before it are new, on its batch, or on how many threads there are;
or lists of more tokens than there are queries reach compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sglang_clusterkv.kernels.attend import cpu as attend_cpu
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.extend import cpu, reference
from sglang_clusterkv.kernels.extend.lists import extend_lists
from sglang_clusterkv.kernels.threads_cpu import set_threads
from sglang_clusterkv.memory.fp8 import FP8

POOL, KV_HEADS, HEADS, CHANNELS = 900, 3, 9, 64
SINKS = torch.linspace(-2.0, 8.0, HEADS)
LONG = 2600  # tokens: several chunks


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    yield
    set_threads(None)


def pool(dtype: torch.dtype, seed: int = 0, size: int = POOL) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and a permutation of their slots."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(size, KV_HEADS, CHANNELS, generator=generator).to(dtype) for _ in range(2)]
    return rows[0], rows[1], torch.randperm(size, generator=generator)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 17},
        {"sliding_window": 300, "sinks": SINKS},
        {"logit_cap": 1.5},
        {"sliding_window": 3, "logit_cap": 30.0},
    ],
    ids=str,
)
def test_windows_and_caps_hold_for_every_new_token(dtype: torch.dtype, options: dict[str, object]) -> None:
    keys, values, slots = pool(dtype)
    bound = {torch.float32: 1e-5, torch.float16: 3e-3}.get(dtype, 0.02)
    for new, total in ((1, 500), (130, 700), (200, 200)):
        q = 3 * torch.randn(new, HEADS, CHANNELS, generator=torch.Generator().manual_seed(2))
        expected = reference.extend(q.to(dtype), keys, values, slots[:total], 0.125, **options)
        actual = cpu.extend(q.to(dtype), keys, values, slots[:total], 0.125, **options)
        assert actual.dtype is dtype and (actual.float() - expected.float()).abs().max() < bound


@pytest.mark.parametrize("options", [{}, {"sliding_window": 1500, "logit_cap": 20.0, "sinks": SINKS}], ids=str)
def test_what_a_token_gets_depends_on_nothing_but_what_it_sees(options: dict[str, object]) -> None:
    """Not on which tokens before it are new, how many there are, what else is in its batch, or on threads."""
    keys, values, slots = pool(torch.float32, size=LONG)
    q = torch.randn(LONG, HEADS, CHANNELS, generator=torch.Generator().manual_seed(3))
    set_threads(2)
    whole = cpu.extend(q, keys, values, slots, 0.125, **options)
    expected = reference.extend(q[-100:], keys, values, slots, 0.125, **options)
    torch.testing.assert_close(whole[-100:], expected, atol=4e-6, rtol=2e-5)
    for threads in (1, 2, 9):
        set_threads(threads)
        for begin, end in ((2596, 2600), (1000, 1030), (1020, 1100)):
            alone = cpu.extend(q[begin:end], keys, values, slots[:end], 0.125, **options)
            assert torch.equal(alone, whole[begin:end])
        cuts = [(0, 70), (2500, 2600), (1023, 1024), (1017, 1200)]
        lists = extend_lists([slots[:end] for _, end in cuts], [end - begin for begin, end in cuts])
        batch = torch.cat([q[begin:end] for begin, end in cuts])
        parts = cpu.extend_all(batch, keys, values, lists, 0.125, **options).split(lists.new.tolist())
        for part, (begin, end) in zip(parts, cuts, strict=True):
            assert torch.equal(part, whole[begin:end])


def test_requests_that_are_not_listed_are_left_alone() -> None:
    keys, values, slots = pool(torch.float32)
    new = [5, 30, 3]
    q = torch.randn(sum(new), HEADS, CHANNELS)
    lists = extend_lists([slots[:200], slots[:300], slots[:50]], new, [False, True, False])
    output = torch.full(q.shape, 7.0)
    cpu.extend_all(q, keys, values, lists, 0.125, output=output)
    assert torch.equal(output[5:35], cpu.extend(q[5:35], keys, values, slots[:300], 0.125))
    assert (output[:5] == 7).all() and (output[35:] == 7).all()
    empty = cpu.extend_all(
        q, keys, values, extend_lists([slots[:200]] * 3, new, [False] * 3), 0.125, output=output.clone()
    )
    assert torch.equal(empty, output)


def test_fewer_queries_than_listed_tokens_are_refused() -> None:
    keys, values, slots = pool(torch.float32)
    lists = extend_lists([slots[:40], slots[40:90]], [20, 30])
    with pytest.raises(ValueError, match="50 new tokens are listed and there are queries of 25"):
        cpu.extend_all(torch.randn(25, HEADS, CHANNELS), keys, values, lists, 0.125)
