"""Attend's kernel, and dense decode by the same kernel, give what the torch references give.

Red when: a tile reads a wrong slot, head or query row, a part of the list is read twice or not at all, padding or poison
gets into a sum, the window or the cap is off by one, or something is written outside its tensor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.attend import reference
from sglang_clusterkv.kernels.attend.triton import dense_decode
from sglang_clusterkv.kernels.grids import split_count
from tests.support.filled import FAR, LENGTHS, SCALE, Filled, Guarded, assert_close, merged, mixed, scene_of, step_on

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


def attended(filled: Filled) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch attend; its parts."""
    decoder, batch = filled.decoder, filled.step.batch
    decoder.attend(filled.q, filled.keys, filled.values, SCALE)
    output, lse = decoder.workspace.exact(batch, decoder.splits)
    return output.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0), lse  # a part without a token has no output


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype"),
    [
        (64, 1, torch.float32),
        (64, 3, torch.bfloat16),
        (64, 4, torch.float16),
        (64, 7, torch.float32),
        (64, 8, torch.bfloat16),
        (96, 3, torch.bfloat16),
        (128, 4, torch.float16),
        (256, 1, torch.bfloat16),
    ],
)
def test_attend_equals_the_reference(head_dim: int, group: int, dtype: torch.dtype, device: str) -> None:
    filled = Filled(CONFIG, device, head_dim=head_dim, group=group, dtype=dtype)
    result, expected = merged(*attended(filled)), filled.exact()
    assert_close(result.output, expected.output, dtype)
    assert_close(result.lse, expected.lse, dtype)
    filled.guarded.assert_untouched()


@pytest.mark.parametrize("tokens_per_split", [16, 40, 10_000])
def test_any_split_gives_the_same(tokens_per_split: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "TOKENS_PER_SPLIT", tokens_per_split)
    filled = Filled(CONFIG, device)
    parts = attended(filled)
    if tokens_per_split == 16:
        assert (parts[1] == -torch.inf).any(), "no split without a tile"
    assert_close(merged(*parts).output, filled.exact().output, torch.float32)


def test_nothing_recalled_is_the_base_alone(device: str) -> None:
    filled = Filled(CONFIG, device)
    chosen = filled.recalled
    filled.recall(chosen._replace(count=torch.zeros_like(chosen.count), left=filled.scores.size))
    result, expected = merged(*attended(filled)), filled.exact()
    assert_close(result.output, expected.output, torch.float32)
    assert_close(result.lse, expected.lse, torch.float32)


def test_heads_recall_different_numbers(device: str) -> None:
    filled = Filled(CONFIG, device)
    counts = torch.tensor([[0, 31], [33, 48]], device=device)
    filled.recall(filled.recalled._replace(count=counts))
    assert_close(merged(*attended(filled)).output, filled.exact().output, torch.float32)


@pytest.mark.parametrize("kinds", ["sd", "ds", "d-", "-s", "--"])
def test_a_request_is_what_its_counts_say(kinds: str, device: str) -> None:
    """Of what is not sparse nothing that other operations left is read: here it is poison, or out of range."""
    filled = Filled(CONFIG, device)
    sparse, w = filled.exact(), filled.decoder.workspace
    scene, step = scene_of(CONFIG, 64, torch.float32, 2)
    filled.step = step_on(mixed(step, scene, kinds), device)
    filled.decoder.prepare(filled.step)
    for b, kind in enumerate(kinds):
        if kind != "s":
            w.recalled[b], w.recalled_count[b], w.base_logit[b] = FAR, FAR, torch.nan
    result = merged(*attended(filled))
    for b, kind in enumerate(kinds):
        if kind == "-":
            assert not result.output[b].any() and (result.lse[b] == -torch.inf).all()
            continue
        if kind == "d":
            slots, length = scene.slots(b + 1, LENGTHS[b]).to(device)[None], torch.tensor([LENGTHS[b]], device=device)
            q = filled.q[b : b + 1].flatten(1, 2)
            expected = reference.dense_decode(q, filled.keys, filled.values, slots, length, SCALE)
            assert_close(result.output[b].flatten(0, 1), expected[0], torch.float32)
        else:
            assert_close(result.output[b], sparse.output[b], torch.float32)
            assert_close(result.lse[b], sparse.lse[b], torch.float32)
    filled.guarded.assert_untouched()


def test_splits_come_from_shapes() -> None:
    assert split_count(8, 1104) == 9  # batch 1: each 128 tokens have a program
    assert split_count(64, 1104) == 4
    assert split_count(224, 1104) == 1
    assert split_count(1000, 1) == 1


POOL = 300


def dense_arguments(device: str, head_dim: int, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, keys, values, slots and lengths of three requests; slots that none of them reads hold NaN."""
    generator = torch.Generator().manual_seed(head_dim + group)
    lengths = torch.tensor([130, 1, 77])
    slots = torch.randint(1, POOL, (3, 130), generator=generator)
    keys, values = (torch.randn(POOL, 2, head_dim, generator=generator) for _ in range(2))
    unread = torch.ones(POOL, dtype=torch.bool)
    for row, length in zip(slots, lengths.tolist(), strict=True):
        unread[row[:length]] = False
        row[length:] = 0
    keys[unread], values[unread] = torch.nan, torch.nan
    q = torch.randn(3, 2 * group, head_dim, generator=generator)
    return q.to(device, dtype), keys.to(device, dtype), values.to(device, dtype), slots.to(device), lengths.to(device)


def expected_dense(arguments: tuple[torch.Tensor, ...], **options: Any) -> torch.Tensor:
    """The reference, in float32, over a pool without NaN."""
    q, keys, values, slots, lengths = arguments
    pool = (keys.float().nan_to_num(), values.float().nan_to_num())
    return reference.dense_decode(q.float(), *pool, slots, lengths, SCALE, **options)


@pytest.mark.parametrize(
    ("head_dim", "group", "dtype"),
    [(64, 3, torch.float32), (64, 1, torch.float16), (96, 4, torch.float32), (128, 7, torch.float32)],
)
def test_dense_decode_equals_the_reference(head_dim: int, group: int, dtype: torch.dtype, device: str) -> None:
    arguments = dense_arguments(device, head_dim, group, dtype)
    result = dense_decode(*arguments, SCALE)
    assert result.dtype is dtype
    tolerance = 2e-5 if dtype is torch.float32 else 2e-3
    torch.testing.assert_close(result.float(), expected_dense(arguments), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("window", [0, 31, 76, 77, 500])
def test_dense_decode_sees_its_window(window: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "TOKENS_PER_SPLIT", 40)
    arguments = dense_arguments(device, 64, 3, torch.float32)
    result = dense_decode(*arguments, SCALE, sliding_window=window)
    torch.testing.assert_close(result, expected_dense(arguments, sliding_window=window), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_dense_decode_caps_its_logits(cap: float, device: str) -> None:
    arguments = dense_arguments(device, 64, 3, torch.float32)
    result = dense_decode(*arguments, SCALE, logit_cap=cap)
    torch.testing.assert_close(result, expected_dense(arguments, logit_cap=cap), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(result, expected_dense(arguments), atol=1e-4)


def test_dense_decode_has_sinks(device: str) -> None:
    arguments = dense_arguments(device, 64, 3, torch.float32)
    sinks = torch.linspace(-1.0, 7.0, 6).to(device)
    result = dense_decode(*arguments, SCALE, sinks=sinks)
    torch.testing.assert_close(result, expected_dense(arguments, sinks=sinks), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(result, expected_dense(arguments), atol=1e-2)


def test_a_strided_query_is_read_right(device: str) -> None:
    q, *rest = dense_arguments(device, 64, 3, torch.float32)
    wide = torch.cat((q, torch.full_like(q, torch.nan)), 1)
    result = dense_decode(wide[:, : q.shape[1]], *rest, SCALE)
    torch.testing.assert_close(result, expected_dense((q, *rest)), atol=2e-5, rtol=2e-5)


def test_slots_far_behind_in_a_large_pool_are_found(device: str) -> None:
    """Offsets beyond 2^31 elements, in a pool of keys and values alike of which almost nothing is ever touched."""
    heads, head_dim, slots = 8, 256, 2**20 + 8
    pool = torch.empty(slots, heads, head_dim, dtype=torch.float16, device=device)
    at = torch.tensor([[2**20 + 3, 5, 2**20 + 7]], device=device)
    generator = torch.Generator().manual_seed(1)
    pool[at[0]] = torch.randn(3, heads, head_dim, generator=generator).to(device, torch.float16)
    q = torch.randn(1, heads, head_dim, generator=generator).to(device, torch.float16)
    lengths = torch.tensor([3], device=device)
    rows = pool[at[0]].float()
    expected = reference.dense_decode(q.float(), rows, rows, torch.arange(3, device=device)[None], lengths, SCALE)
    result = dense_decode(q, pool, pool, at, lengths, SCALE)
    torch.testing.assert_close(result.float(), expected, atol=3e-3, rtol=3e-3)


def test_the_guard_bands_notice_a_write_outside(device: str) -> None:
    guarded = Guarded(device)
    tensor = guarded((4,), torch.float32)
    guarded.assert_untouched()
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + 4).fill_(1.0)
    with pytest.raises(AssertionError, match="outside"):
        guarded.assert_untouched()
