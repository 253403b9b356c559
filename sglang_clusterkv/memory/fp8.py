"""KV pools in 8-bit floats: SGLang keeps them as bytes, for torch has not every operation on them."""

from __future__ import annotations

from typing import Any

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def as_stored(rows: torch.Tensor) -> torch.Tensor:
    """Rows of a pool as torch can copy and index them: fp8 as its bytes, everything else as it is."""
    return rows.view(torch.uint8) if rows.dtype in FP8 else rows


def pool_rows(buffer: torch.Tensor, *at: Any) -> torch.Tensor:
    """buffer[at], on any device and in its dtype."""
    return as_stored(buffer)[at].view(buffer.dtype)
