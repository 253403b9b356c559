"""Factors of the movement lie on a segment's pages behind its first four, in the room that these have.

Red when: a row or a scale lies elsewhere, or does not fit, at some head size; a bit is lost; a segment has components for which
it has no page.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.codec import RowCodec

HEAD_SIZES = [16, 32, 64, 80, 96, 128, 192, 256]


def packed_of(meets: torch.Tensor, adds: torch.Tensor) -> torch.Tensor:
    rows, scales = movement.row_codec(meets.shape[-1]).encode(torch.stack((meets, adds), -2))
    assert scales is not None
    return movement.pack(rows, scales)


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_rows_come_back_as_their_codec_has_them(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    meets, adds = (size * torch.randn(2, 8, head_dim, generator=generator) for size in (1.0, 30.0))
    packed = packed_of(meets, adds)
    assert packed.shape == (2, 8, 3, head_dim // 4) and packed.dtype is torch.bfloat16
    codec = RowCodec("int4", head_dim)
    for found, rows in zip(movement.unpack(packed), (meets, adds), strict=True):
        assert torch.equal(found, codec.decode(*codec.encode(rows)))


@pytest.mark.parametrize("head_dim", HEAD_SIZES)
def test_each_row_lies_in_the_place_of_a_quarter(head_dim: int) -> None:
    """As kernels find them: two packed rows, then their scales, one set behind the other."""
    meets, adds = torch.randn(2, 1, head_dim, generator=torch.Generator().manual_seed(1))
    bits = packed_of(meets, adds)[0].view(torch.int16)
    codec = RowCodec("int4", head_dim)
    for part, rows in ((movement.MEETS, meets), (movement.ADDS, adds)):
        packed, scales = codec.encode(rows)
        assert torch.equal(bits[part].view(torch.uint8), packed[0])
        assert scales is not None
        place = codec.scales * (part == movement.ADDS)
        assert torch.equal(bits[movement.SCALES, place : place + codec.scales], scales[0].view(torch.int16))
    assert not bits[movement.SCALES, 2 * codec.scales :].any()


def test_a_segment_has_a_component_for_each_page_behind_its_first_four() -> None:
    assert [movement.rank_of(pages) for pages in (4, 5, 8, 12, 13, 64)] == [0, 1, 4, 8, 8, 8]
