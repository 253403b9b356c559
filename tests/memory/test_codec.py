"""Rows and codes are stored as docs/design.md "Exactly" says, byte for byte, against the float64 oracle.

Red when: a channel lands in another nibble, crumb, bit or byte; a group of channels gets another scale; a value is
rounded otherwise than to the nearest (halves to even) or leaves its range; a row's size or alignment changes; a scale is
not bf16; a zero is not zero; decoding is not exactly level times scale.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_clusterkv.memory.codec import INNER_LEVEL, OUTER_LEVEL, RowCodec, TokenCodec, channels_per_scale, rows_at
from sglang_clusterkv.memory.rotation import rotation_matrix, rotation_signs
from tests.support import exactly as ex

HEAD_DIMS = range(16, 257, 16)
INT_BITS = {"int4": 4, "int8": 8}
ROWS = 16


def some_rows(head_dim: int) -> torch.Tensor:
    """float32 [ROWS, head_dim]; the values of one row differ by orders of magnitude, some groups and rows are zero."""
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(ROWS, head_dim, generator=generator)
    x *= 10.0 ** torch.randint(-3, 4, (ROWS, head_dim // 16), generator=generator).repeat_interleave(16, 1)
    x[1, : channels_per_scale(head_dim)] = 0
    x[2] = 0
    x[3] = -x[3].abs()
    x[4] *= 1e-30
    x[5] *= 1e30
    x[6] = 1e-44  # its scale is too small for bf16
    return x


def in_float32(x: np.ndarray) -> np.ndarray:
    """What the oracle's float64 is as float32; bf16 values lose nothing."""
    return x.astype(np.float32)


def bf16_of(stored: np.ndarray) -> np.ndarray:
    """float64 of bytes uint8 [..., 2 n] that hold n little-endian bf16 each."""
    bits = np.ascontiguousarray(stored).view("<u2").astype(np.uint32) << 16
    return bits.view(np.float32).astype(np.float64)


@pytest.mark.parametrize("name", INT_BITS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_integer_rows_hold_the_oracles_bytes(name: str, head_dim: int) -> None:
    codec, x = RowCodec(name, head_dim), some_rows(head_dim)
    packed, scales = codec.encode(x)
    assert packed.shape == (ROWS, codec.packed_bytes) and packed.dtype == torch.uint8
    assert scales is not None and scales.shape == (ROWS, codec.scales) and scales.dtype == torch.bfloat16
    decoded, scale_bytes = codec.decode(packed, scales).numpy(), scales.view(torch.uint8).numpy()
    for row, stored, scale, back in zip(x.numpy(), packed.numpy(), scale_bytes, decoded, strict=True):
        expected = ex.encode_int(row, INT_BITS[name])
        np.testing.assert_array_equal(bf16_of(scale), expected.scale)
        if name == "int4":
            words = stored.view("<u4")
            values = ex.unpack_int4(words)
            np.testing.assert_array_equal(words, ex.pack_int4(values))
        else:
            values = stored.view(np.int8).astype(np.int64)
        differ = values != expected.values
        distance = np.abs(expected.quotient - np.floor(expected.quotient) - 0.5)
        assert not np.any(differ & (distance > 1e-5)), (expected.quotient[differ], values[differ])
        np.testing.assert_array_equal(back, in_float32(ex.decode_int(values, expected.scale)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_bf16_rows_are_the_rounded_values(head_dim: int) -> None:
    codec, x = RowCodec("bf16", head_dim), some_rows(head_dim)
    rows, scales = codec.encode(x)
    assert rows.shape == (ROWS, 2 * head_dim) == (ROWS, codec.packed_bytes) and rows.dtype == torch.uint8
    assert scales is None and codec.scales == 0
    np.testing.assert_array_equal(bf16_of(rows.numpy()), ex.bf16(x.numpy()))
    np.testing.assert_array_equal(codec.decode(rows, None).numpy(), in_float32(ex.bf16(x.numpy())))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_row_bytes_count_channels_and_scales(head_dim: int) -> None:
    assert channels_per_scale(head_dim) == ex.group_channels(head_dim)
    groups = head_dim // ex.group_channels(head_dim)
    for name, packed in (("int4", head_dim // 2), ("int8", head_dim)):
        codec = RowCodec(name, head_dim)
        assert (codec.packed_bytes, codec.scales) == (packed, groups)
        assert codec.row_bytes == packed + 2 * groups
    assert RowCodec("bf16", head_dim).row_bytes == 2 * head_dim


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("name", ["int4", "int8", "bf16"])
def test_packed_rows_begin_where_16_bytes_can_be_loaded(name: str, head_dim: int) -> None:
    assert RowCodec(name, head_dim).packed_bytes % 16 == 0


def test_row_bytes_of_usual_models() -> None:
    sizes = {64: (36, 68, 128), 80: (48, 88, 160), 96: (56, 104, 192), 128: (72, 136, 256), 256: (144, 272, 512)}
    for head_dim, expected in sizes.items():
        assert tuple(RowCodec(name, head_dim).row_bytes for name in ("int4", "int8", "bf16")) == expected


def test_a_head_dim_without_whole_slices_is_refused() -> None:
    with pytest.raises(AssertionError, match="head_dim=72"):
        RowCodec("int4", 72)


@pytest.mark.parametrize(("name", "top"), [("int4", 7), ("int8", 127)])
def test_integers_round_halves_to_even_and_stay_in_range(name: str, top: int) -> None:
    codec = RowCodec(name, 32)
    halves = [top, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, top - 0.5, 0.5 - top]
    x = torch.tensor(halves + [0.0] * (32 - len(halves)))
    expected = [top, 0, 0, 2, -2, 2, -2, top - 1, 1 - top]
    assert codec.decode(*codec.encode(x))[: len(halves)].tolist() == expected
    # Half a step of bf16 above 1, the scale is rounded down by the largest factor there is: the extremes stay in range.
    x = torch.full((32,), top * (1 + 2**-8 - 2**-20))
    x[16:] *= -1
    assert codec.decode(*codec.encode(x)).tolist() == [top] * 16 + [-top] * 16


@pytest.mark.parametrize("name", ["int4", "int8", "bf16"])
def test_rows_do_not_depend_on_how_they_are_batched(name: str) -> None:
    codec, x = RowCodec(name, 80), some_rows(80)
    rows, strided = codec.encode(x), codec.encode(x.view(2, ROWS // 2, 80).transpose(0, 1))
    for whole, part, one in zip(rows, strided, codec.encode(x[7]), strict=True):
        if whole is None or part is None or one is None:
            assert name == "bf16" and whole is part is one
            continue
        torch.testing.assert_close(part.transpose(0, 1).flatten(0, 1), whole, rtol=0, atol=0)
        torch.testing.assert_close(one, whole[7], rtol=0, atol=0)
    torch.testing.assert_close(
        codec.decode(*rows_at(*rows, slice(3, None, 2))), codec.decode(*rows)[3::2], rtol=0, atol=0
    )
    within = torch.full((ROWS, codec.packed_bytes + 4), 255, dtype=torch.uint8)
    within[:, : codec.packed_bytes] = rows[0]
    apart = within[:, : codec.packed_bytes], None if rows[1] is None else rows[1].repeat(1, 2)[:, : codec.scales]
    torch.testing.assert_close(codec.decode(*apart), codec.decode(*rows), rtol=0, atol=0)


def levels_of(codes: np.ndarray, bits: int, head_dim: int) -> np.ndarray:
    """Levels [head_dim] of one token's packed code, by the words of the docstring alone."""
    levels = np.empty(head_dim)
    for channel in range(head_dim):
        j, i = divmod(channel, head_dim // 8)
        if bits == 1:
            levels[channel] = -1 if codes[i] >> j & 1 else 1
        else:
            crumb = (int(codes[2 * i]) | int(codes[2 * i + 1]) << 8) >> 2 * j
            levels[channel] = (OUTER_LEVEL if crumb & 1 else INNER_LEVEL) * (-1 if crumb & 2 else 1)
    return levels


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_hold_the_oracles_levels_and_scale(bits: int, head_dim: int) -> None:
    codec, y = TokenCodec(bits, head_dim), some_rows(head_dim)[7:]
    y[0, ::3] = 0
    codes, scales = codec.encode(y)
    assert codes.shape == (len(y), head_dim * bits // 8) == (len(y), codec.code_bytes) and codes.dtype == torch.uint8
    assert scales.dtype == torch.bfloat16
    decoded = codec.decode(codes, scales).numpy()
    for row, code, scale, back in zip(y.numpy(), codes.numpy(), scales.double().tolist(), decoded, strict=True):
        levels, expected = levels_of(code, bits, head_dim), ex.encode_code(row, bits)
        differ = levels != ex.code_levels(expected.codes, bits)
        assert not np.any(differ & ~ex.code_is_close(row, bits, 1e-5))
        assert np.all(levels[row == 0] > 0)
        least_squares = ex.code_scale(row, levels) if row.any() else 0.0
        assert ex.bf16(least_squares * (1 - 1e-5)) <= scale <= ex.bf16(least_squares * (1 + 1e-5))
        np.testing.assert_allclose(back, scale * levels, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bits", [1, 2])
def test_a_zero_residual_decodes_to_zero(bits: int) -> None:
    codec = TokenCodec(bits, 48)
    codes, scales = codec.encode(torch.tensor([0.0, -0.0]).repeat(24))
    assert scales == 0 and not codec.decode(codes, scales).any()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_rotation_is_the_oracles(head_dim: int) -> None:
    signs = rotation_signs(head_dim).numpy()
    assert len(np.unique(signs)) == 2, "random signs, not one"
    np.testing.assert_allclose(rotation_matrix(head_dim).numpy(), ex.hadamard_rotation(head_dim, signs), atol=1e-7)
