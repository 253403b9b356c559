"""Rows in 4 bits from the CPU's kernel are those of the codec, bit for bit.

Red when: a scale is rounded otherwise, a tie goes up, a nibble lies elsewhere, or what is no number becomes one.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.kernels.encode import cpu
from sglang_clusterkv.memory.codec import RowCodec


def rows_of(head_dim: int) -> torch.Tensor:
    """Of many sizes, with zeros, ties, equal channels and the largest numbers."""
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(3, 200, head_dim, generator=generator) * torch.exp(8 * torch.randn(3, 200, 1, generator=generator))
    x[0, :20] = torch.randint(-14, 15, (20, head_dim), generator=generator) / 2  # halves of a scale of 1, often
    x[0, 20] = 0.0
    x[0, 21] = -1.5
    x[0, 22] = 3e38
    x[0, 23, : head_dim // 2] = 0.0
    x[0, 24] = 1e-30
    return x


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_rows_in_four_bits_are_those_of_the_codec(head_dim: int) -> None:
    codec, x = RowCodec("int4", head_dim), rows_of(head_dim)
    packed, scales = cpu.int4_rows(codec, x)
    expected, expected_scales = codec.encode(x)
    assert expected_scales is not None
    assert torch.equal(packed, expected)
    assert torch.equal(scales.view(torch.int16), expected_scales.view(torch.int16))


def test_what_is_no_number_stays_none() -> None:
    codec, x = RowCodec("int4", 64), rows_of(64)[0, :4]
    x[1, 40] = torch.nan
    packed, scales = cpu.int4_rows(codec, x)
    expected, expected_scales = codec.encode(x)
    assert expected_scales is not None and scales[1, 1].isnan()
    assert torch.equal(packed, expected) and torch.equal(scales.isnan(), expected_scales.isnan())
