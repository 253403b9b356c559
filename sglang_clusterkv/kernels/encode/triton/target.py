"""The index's arrays as Triton's kernels write them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sglang_clusterkv.memory.codec import RowCodec, TokenCodec


class Target(NamedTuple):
    """The index's arrays of all layers, as kernels write them; see `memory.index.LayerView` for their meaning."""

    key_rows: torch.Tensor  # [L, clusters of the pool, H, ...]: int32 words of int4, int8, or int16 (bits of bf16)
    key_scales: torch.Tensor | None  # int16 (bits of bf16) [L, clusters of the pool, H, scales]; None for rows in bf16
    value_rows: torch.Tensor  # as the keys'
    value_scales: torch.Tensor | None
    spread: torch.Tensor  # int16 (bits of bf16) [L, clusters of the pool, H]
    cluster_end: torch.Tensor  # int16, likewise
    segment_vectors: torch.Tensor  # int16 (bits of bf16) [L, pages, H, 3, D/4]
    members: torch.Tensor  # int16 [L, slots, H]
    codes: torch.Tensor | None  # int16 or uint8 [L, slots, H, D/8]
    code_scales: torch.Tensor | None  # int16 (bits of bf16) [L, slots, H]


_PACKED_DTYPES = {"int4": torch.int32, "int8": torch.int8, "bf16": torch.int16}


def target_of(arrays: dict[str, torch.Tensor], rows: RowCodec, tokens: TokenCodec) -> Target:
    """View the arrays of `memory.device.index_shapes` as the kernels write them."""

    def half_words(name: str) -> torch.Tensor | None:
        return arrays[name].view(torch.int16) if name in arrays else None

    return Target(
        key_rows=arrays["key_rows"].view(_PACKED_DTYPES[rows.name]),
        key_scales=half_words("key_scales"),
        value_rows=arrays["value_rows"].view(_PACKED_DTYPES[rows.name]),
        value_scales=half_words("value_scales"),
        spread=arrays["spread"].view(torch.int16),
        cluster_end=arrays["cluster_end"],
        segment_vectors=arrays["segment_vectors"].view(torch.int16),
        members=arrays["members"],
        codes=half_words("codes") if tokens.bits == 2 else arrays.get("codes"),
        code_scales=half_words("code_scales"),
    )
