"""Bytes that a decode step has to read of one request, by what its lists come to (docs/quality.md's tables count so too)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_clusterkv.memory.codec import RowCodec, TokenCodec
from sglang_clusterkv.memory.movement import RANK, row_codec

if TYPE_CHECKING:
    from sglang_clusterkv.config import ClusterKVConfig

_SPREAD_AND_END = 4  # of a cluster
_OFFSET = 2  # of a candidate in its segment
_SCALE = 2  # of a candidate's code
_VECTOR_CHANNEL = 2  # of a segment's mean key, mean value and variance


def kv_bytes(tokens: int, head_dim: int, item_bytes: int) -> int:
    """Keys and values of so many tokens, of one layer and kv head."""
    return 2 * head_dim * item_bytes * tokens


def sparse_bytes(
    config: ClusterKVConfig, head_dim: int, item_bytes: int, *, clustered: int, base: int, segments: int
) -> int:
    """What a sparse step reads of a layer and kv head; a short segment has fewer rows of its movement than are counted here.

    Args:
        config: the options.
        head_dim: channels of a key and of a value.
        item_bytes: of a channel in the KV pool.
        clustered: tokens that may be recalled.
        base: tokens that are always attended.
        segments: that may be recalled from.
    """
    row = RowCodec(config.centroid_dtype, head_dim).row_bytes
    clusters = clustered // config.tokens_per_cluster
    chosen = clusters * (row + _SPREAD_AND_END) + segments * 3 * _VECTOR_CHANNEL * head_dim
    if config.estimate:
        chosen += min(clusters, config.estimate_clusters) * row
        if config.moving_values == "always":
            chosen += segments * 2 * RANK * row_codec(head_dim).row_bytes
    if config.refine:
        code = TokenCodec(config.code_bits, head_dim).code_bytes + _SCALE
        chosen += min(clustered, config.candidate_tokens) * (code + _OFFSET)
    else:
        chosen += config.budget_tokens * _OFFSET
    return chosen + kv_bytes(min(clustered, config.budget_tokens) + base, head_dim, item_bytes)
