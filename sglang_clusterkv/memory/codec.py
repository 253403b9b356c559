"""Formats of what the index stores: centroid and mean-value rows (int4, int8, bf16) and the residual codes of tokens.

Nothing else in the project knows a format. A row is its packed channels and one bf16 scale per group of channels, each in an
array of its own: packed rows of head_dim 64, 96, 128, ... then begin at multiples of 16 bytes and are loaded 16 bytes at a
time. Packed channels are ordered by slices: word i of a row holds channels i, i + D/8, i + 2D/8, ..., so that a kernel
unpacks slice j of all words with one shift and one mask, and multiplies it with a contiguous slice of the query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

# Levels of a 2-bit code, in units of the root mean square: the optimal quantiser of a normal variable (Max, 1960).
INNER_LEVEL, OUTER_LEVEL, LEVEL_BORDER = 0.453, 1.510, 0.9816

# Share of a normal variable's energy that codes of so many bits leave out (Max, 1960).
CODE_LOSS = {1: 1 - 2 / math.pi, 2: 0.1175}

SLICES = 8  # a row has eight slices of head_dim / 8 channels


def channels_per_scale(head_dim: int) -> int:
    """Channels that share one scale: whole slices, at most 32 channels where a slice has that many or fewer."""
    slices = SLICES
    while slices > 1 and slices * (head_dim // SLICES) > 32:
        slices //= 2
    return slices * (head_dim // SLICES)


@dataclass(frozen=True)
class RowCodec:
    """One row format.

    Args:
        name: "int4", "int8" or "bf16".
        head_dim: channels of a row, a multiple of 16.
    """

    name: str
    head_dim: int

    def __post_init__(self) -> None:
        assert self.name in ("int4", "int8", "bf16"), self.name
        assert self.head_dim % 16 == 0, f"head_dim={self.head_dim} is not a multiple of 16"

    @property
    def packed_bytes(self) -> int:
        """Bytes of the channels of a row, without scales."""
        return {"int4": self.head_dim // 2, "int8": self.head_dim, "bf16": 2 * self.head_dim}[self.name]

    @property
    def scales(self) -> int:
        """Scales per row; rows in bf16 have none."""
        return 0 if self.name == "bf16" else self.head_dim // channels_per_scale(self.head_dim)

    @property
    def row_bytes(self) -> int:
        """Bytes of a whole row: packed channels and scales."""
        return self.packed_bytes + 2 * self.scales

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 [..., head_dim] -> (packed uint8 [..., packed_bytes], scales bf16 [..., scales], None for bf16 rows)."""
        assert x.shape[-1] == self.head_dim, (x.shape, self.head_dim)
        if self.name == "bf16":
            return x.to(torch.bfloat16).contiguous().view(torch.uint8), None
        limit = 7.0 if self.name == "int4" else 127.0
        groups = x.unflatten(-1, (self.scales, -1))
        scale = (groups.abs().amax(-1, keepdim=True) / limit).to(torch.bfloat16)
        wide = scale.float()
        levels = torch.where(wide > 0, groups / torch.where(wide > 0, wide, 1.0), 0.0)
        levels = levels.round().clamp(-limit - 1, limit).to(torch.int32).flatten(-2)
        packed = _pack_int4(levels) if self.name == "int4" else levels.to(torch.int8).view(torch.uint8)
        return packed, scale.squeeze(-1)

    def decode(self, packed: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """(uint8 [..., packed_bytes], bf16 [..., scales] or None) -> float32 [..., head_dim]."""
        packed = packed.contiguous()
        if scales is None:
            return packed.view(torch.bfloat16).float()
        levels = _unpack_int4(packed) if self.name == "int4" else packed.view(torch.int8).float()
        groups = levels.unflatten(-1, (self.scales, -1)) * scales.float().unsqueeze(-1)
        return groups.flatten(-2)


def rows_at(packed: torch.Tensor, scales: torch.Tensor | None, at: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows at an index of the leading dimensions: the same of the packed rows and of their scales."""
    return packed[at], None if scales is None else scales[at]


def _pack_int4(levels: torch.Tensor) -> torch.Tensor:
    """int32 [..., D] in [-8, 7] -> uint8 [..., D/2]: nibble j of 32-bit word i is channel j D/8 + i."""
    nibbles = levels.unflatten(-1, (SLICES, -1)) & 15
    words = torch.zeros_like(nibbles[..., 0, :])
    for j in range(SLICES):
        words |= nibbles[..., j, :] << (4 * j)
    return words.contiguous().view(torch.uint8)


def _unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `_pack_int4`, float32 [..., D]."""
    words = packed.view(torch.int32).unsqueeze(-2)
    shifts = torch.arange(28, -4, -4, dtype=torch.int32, device=packed.device).unsqueeze(-1)
    return ((words << shifts) >> 28).float().flatten(-2)


@dataclass(frozen=True)
class TokenCodec:
    """Codes of rotated residuals: `bits` (1 or 2) per channel and one bf16 scale per token.

    2 bits: a channel's code is magnitude (bit 0: outer level) and sign (bit 1: negative); uint16 word i holds channels
    i, i + D/8, ... in crumbs 0 to 7. 1 bit: byte i holds the signs of channels i, i + D/8, ... in bits 0 to 7.
    """

    bits: int
    head_dim: int

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's code, without its scale."""
        return self.head_dim * self.bits // 8

    def encode(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 [..., head_dim] -> (codes uint8 [..., code_bytes], scales bf16 [...]).

        The scale is the least-squares fit of the levels to y; zero where y is zero.
        """
        negative = y < 0
        if self.bits == 1:
            level, crumbs = torch.ones_like(y), negative.to(torch.int32)
            scale = y.abs().mean(-1)
        else:
            outer = y.abs() >= LEVEL_BORDER * y.square().mean(-1, keepdim=True).sqrt()
            level = torch.where(outer, OUTER_LEVEL, INNER_LEVEL)
            crumbs = outer.to(torch.int32) + 2 * negative.to(torch.int32)
            scale = (y.abs() * level).sum(-1) / level.square().sum(-1)
        slices = crumbs.unflatten(-1, (SLICES, -1))
        words = torch.zeros_like(slices[..., 0, :])
        for j in range(SLICES):
            words |= slices[..., j, :] << (self.bits * j)
        if self.bits == 1:
            codes = words.to(torch.uint8)
        else:
            # Two little-endian bytes per word; torch has no shift for uint16.
            codes = torch.stack((words & 255, words >> 8), -1).to(torch.uint8).flatten(-2)
        return codes, scale.to(torch.bfloat16)

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """(uint8 [..., code_bytes], bf16 [...]) -> float32 [..., head_dim]."""
        if self.bits == 1:
            words = codes.to(torch.int32)
        else:
            pairs = codes.to(torch.int32).unflatten(-1, (-1, 2))
            words = pairs[..., 0] | pairs[..., 1] << 8
        shifts = torch.arange(0, SLICES * self.bits, self.bits, dtype=torch.int32, device=codes.device).unsqueeze(-1)
        crumbs = (words.unsqueeze(-2) >> shifts).flatten(-2)
        if self.bits == 1:
            levels = 1.0 - 2.0 * (crumbs & 1).float()
        else:
            levels = torch.where(crumbs & 1 == 1, OUTER_LEVEL, INNER_LEVEL) * (1.0 - (crumbs & 2).float())
        return levels * scales.float().unsqueeze(-1)
