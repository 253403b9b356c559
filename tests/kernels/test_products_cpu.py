"""Products of a decode step on a CPU against torch's, and copies of weights in half the bytes.

Red when: a block of rows or tokens, or what is left behind one, is taken for another; a token's product depends on the tokens
or threads beside it, or on whether the weights were halved; weights are halved of which a bit is lost.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sglang_clusterkv.kernels.products_cpu import halve, linear
from sglang_clusterkv.kernels.threads_cpu import set_threads

SHAPES = [(5, 33), (17, 4), (31, 576), (1100, 576), (40, 1536)]


def as_in_bf16(rows: int, channels: int) -> torch.Tensor:
    return torch.randn(rows, channels).bfloat16().float()


def halves(weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(weight), weight.shape[1] // 2, dtype=torch.int32)
    assert halve(weight, out)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("tokens", [*range(10), 23])
@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_products_are_of_all_rows_with_all_tokens(tokens: int, rows: int, channels: int) -> None:
    x, weight, bias = torch.randn(tokens, channels), as_in_bf16(rows, channels), torch.randn(rows)
    for more in (None, bias):
        expected = F.linear(x.double(), weight.double(), None if more is None else more.double())
        found = linear(x, weight, more)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-4)
        if channels % 32 == 0:
            assert same_bits(linear(x, weight, more, halves(weight)), found)


@pytest.mark.parametrize("is_halved", [False, True])
def test_a_tokens_products_are_the_same_alone_and_by_any_number_of_threads(is_halved: bool) -> None:
    x, weight = torch.randn(8, 576), as_in_bf16(3001, 576)
    copy = halves(weight) if is_halved else None
    expected = linear(x, weight, None, copy)
    for tokens in range(1, 9):
        for count in (1, 2, 4):
            set_threads(count)
            assert same_bits(linear(x[8 - tokens :], weight, None, copy), expected[8 - tokens :])
    set_threads(None)


def test_what_is_no_number_and_what_is_least_goes_through_a_copy() -> None:
    x, weight = torch.randn(3, 64), as_in_bf16(20, 64)
    bits = weight.view(torch.int32)
    bits[:7, 40] = torch.tensor([0x7F80, 0xFF80, 0x7FC1, 0x0001, 0x8001, 0x8000, 0x007F]).int() << 16
    found = linear(x, weight)
    assert found[:, :3].isfinite().sum() == 0 and found[:, 3:].isfinite().all()
    assert same_bits(linear(x, weight, None, halves(weight)), found)


def test_weights_are_halved_where_nothing_is_lost() -> None:
    weight = as_in_bf16(9, 96)
    out = torch.empty(9, 48, dtype=torch.int32)
    assert halve(weight, out)
    halved = set(out.view(torch.int16).flatten().tolist())
    assert halved == set(weight.bfloat16().view(torch.int16).flatten().tolist())
    for row in (0, 8):
        for channel in (0, 15, 16, 95):
            for bit in (0, 15):
                lossy = weight.clone()
                lossy.view(torch.int32)[row, channel] |= 1 << bit
                assert not halve(lossy, out)
    assert not halve(torch.zeros(3, 72), torch.empty(3, 36, dtype=torch.int32))  # 72 channels are no whole vectors
