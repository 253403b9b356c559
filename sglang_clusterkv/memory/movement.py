"""Where the factors lie by which a segment's values move with the query, and in which format.

A segment's first four pages hold quarters of its three vectors (`segment_vectors`). Each page behind them has the same room,
and takes one component of the covariance of values and keys: page 4 + j the j-th. In the place of the mean key's quarter lies,
in 4 bits, the row that meets the query, in that of the mean value's the row that is added to the output, in that of the
variance's the scales of both. So the index has no more bytes than without, and a segment of n pages at most n - 4 components.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from sglang_clusterkv.memory.codec import RowCodec
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig

RANK = 8  # components of a segment, where it has the pages
# Of the movement that a cluster has whose tokens are all left: of clusters with candidates that were not recalled, of which
# the best were, and of all others. Where codes are not in the estimate all have `estimate_spread`.
CODED_WEIGHT, OTHER_WEIGHT = 0.5, 1.0
MEETS, ADDS, SCALES = range(3)  # what lies in the place of a page's quarters


def resolve(config: ClusterKVConfig, device: str) -> ClusterKVConfig:
    """The configuration with `moving_values` as "auto" is on a device of this type. An index takes "auto" as "never"."""
    if config.moving_values != "auto":
        return config
    return msgspec.structs.replace(config, moving_values="always" if device == "cpu" else "never")


def moves(config: ClusterKVConfig) -> bool:
    """Whether estimated values move with the query."""
    return config.estimate and config.moving_values == "always"


def weight(config: ClusterKVConfig) -> float:
    """Of the movement of clusters that codes tell nothing of."""
    return OTHER_WEIGHT if config.refine and config.estimate_codes else config.estimate_spread


def rank_of(pages: int) -> int:
    """Components of a segment of so many pages."""
    return max(0, min(RANK, pages - SEGMENT_VECTOR_PAGES))


def row_codec(head_dim: int) -> RowCodec:
    """Format of the rows, whatever that of centroids is."""
    return RowCodec("int4", head_dim)


def pack(rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What pages hold of their components: bf16 [..., 3, D/4], bits that are no numbers.

    Args:
        rows: uint8 [..., 2, D/2], by `row_codec`, of the rows that meet the query and of those that are added.
        scales: bf16 [..., 2, scales], theirs.
    """
    packed = torch.zeros((*rows.shape[:-2], 3, rows.shape[-1] // 2), dtype=torch.int16, device=rows.device)
    packed[..., :SCALES, :] = rows.view(torch.int16)
    packed[..., SCALES, : 2 * scales.shape[-1]] = scales.flatten(-2).view(torch.int16)
    return packed.view(torch.bfloat16)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of `pack`: the rows that meet the query, and those that are added."""
    codec = row_codec(4 * packed.shape[-1])
    rows = packed.contiguous().view(torch.uint8)
    scales = packed[..., SCALES, : 2 * codec.scales].unflatten(-1, (2, -1))
    meets, adds = codec.decode(rows[..., :SCALES, :], scales).unbind(-2)
    return meets, adds
