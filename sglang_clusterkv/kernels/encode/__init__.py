"""Describe a segment's clusters and code its tokens, once their labels are known.

On a GPU `clusters.build.write_in_place` uses `triton` instead, which reads the pool where it lies.
"""

from __future__ import annotations

import torch

from sglang_clusterkv.kernels.encode import reference
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec


def within_variance(centered: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> reference.Variance:
    """Variances of a segment's keys around their centroids; see `reference.within_variance`."""
    if centered.device.type == "cpu":
        from sglang_clusterkv.kernels.encode import cpu

        return cpu.within_variance(centered, centroids, labels)
    return reference.within_variance(centered, centroids, labels)


def rows(codec: RowCodec, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `codec` makes of float32 [..., D]: see `RowCodec.encode`."""
    if x.device.type == "cpu" and codec.name == "int4":
        from sglang_clusterkv.kernels.encode import cpu

        return cpu.int4_rows(codec, x)
    return codec.encode(x)


def token_codes(
    keys: torch.Tensor, stored: torch.Tensor, labels: torch.Tensor, members: torch.Tensor, codec: TokenCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a segment's tokens; see `reference.token_codes`."""
    if keys.device.type == "cpu":
        from sglang_clusterkv.kernels.encode import cpu

        return cpu.token_codes(keys, stored, labels, members, codec)
    return reference.token_codes(keys, stored, labels, members, codec)
