"""What the launches of one call of encode share, and what types their kernels' arguments have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.encode.triton.target import Target
from sglang_clusterkv.kernels.kmeans.triton.segments import LENGTHS, Clustering, Pool, Segments
from sglang_clusterkv.memory.codec import SLICES, RowCodec, TokenCodec

# Of calls and of pools: no variants for 1 and multiples of 16.
SIZES = (*LENGTHS, "rows_of_layer", "slots_of_layer", "pages_of_layer")


class Call(NamedTuple):
    """One call; see `write`."""

    keys: Pool
    values: Pool
    segments: Segments
    found: Clustering
    target: Target
    page_size: int
    clusters_per_page: int
    row_codec: RowCodec
    token_codec: TokenCodec

    @property
    def rows(self) -> int:
        """N."""
        return self.found.labels.shape[0]

    @property
    def tokens(self) -> int:
        """T."""
        return self.segments.slots.numel()

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.first.shape[2]

    @property
    def strides(self) -> tuple[int, int]:
        """From slot to slot and from head to head, of keys and of values."""
        return self.keys.first.stride(0), self.keys.first.stride(1)

    @property
    def read_slots(self) -> torch.Tensor | None:
        """Where a kernel reads keys and values; None: where it writes."""
        return None if self.segments.read_slots is self.segments.slots else self.segments.read_slots

    @property
    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A kernel's arguments by which it finds a segment's tokens and clusters."""
        return self.segments.token_begin, self.segments.cluster_begin

    @property
    def rows_of_layer(self) -> int:
        """Cluster rows of the index, of one layer and head."""
        return self.target.key_rows.shape[1]

    @property
    def slots_of_layer(self) -> int:
        """Token slots of the index, likewise."""
        return self.target.members.shape[1]

    @property
    def sizes(self) -> dict[str, int]:
        """A kernel's constants for the shape of a head."""
        return {"H": self.keys.first.shape[1], "D": self.head_dim}

    @property
    def pages(self) -> dict[str, int]:
        """Those for pages."""
        return {"PAGE": self.page_size, "PER_PAGE": self.clusters_per_page}

    @property
    def form(self) -> dict[str, Any]:
        """Those for the format of rows, and for tiles of channels ordered by slices."""
        return {
            "PAD": slice_columns(self.head_dim),
            "FORMAT": self.row_codec.name,
            "SCALES": self.row_codec.scales,
        }

    def grid(self, longest: int, tile: int) -> tuple[int, int, int]:
        """Programs of a launch whose longest segment has so many elements, `tile` per program."""
        return triton.cdiv(longest, tile), self.rows, self.segments.count


def slice_columns(head_dim: int) -> int:
    """Columns of a tile for a slice of channels."""
    return triton.next_power_of_2(head_dim // SLICES)


def case(
    kernel: Any,
    head_dim: int,
    tiles: dict[str, int],
    row_format: str = "int4",
    bits: int = 2,
    copied: bool = False,
    **holds: Any,
) -> CompileCase:
    """A case of one kernel at Llama's shape, or at another head_dim or format; copied: see `segments_of`."""
    codec = RowCodec(row_format, head_dim)
    packed, scales = {"int4": "*i32", "int8": "*i8", "bf16": "*i16"}[row_format], ("key_scales_ptr", "value_scales_ptr")
    types = {
        "keys_ptr": "*bf16", "key_offsets_ptr": "*i64", "values_ptr": "*bf16", "value_offsets_ptr": "*i64",
        "layer_offsets_ptr": "*i64", "slot_stride": "i32", "head_stride": "i32", "slots_ptr": "*i64",
        **({"read_slots_ptr": "*i64"} if copied else {}),
        "token_begin_ptr": "*i32", "cluster_begin_ptr": "*i32", "center_ptr": "*fp32", "labels_ptr": "*i16",
        "members_ptr": "*i16", "cluster_end_ptr": "*i32", "key_rows_ptr": packed, "value_rows_ptr": packed,
        "ends_ptr": "*i16", "variance_ptr": "*fp32", "parts_ptr": "*fp32", "spread_ptr": "*i16", "vectors_ptr": "*i16",
        "index_members_ptr": "*i16", "rotation_ptr": "*fp32", "codes_ptr": "*i16" if bits == 2 else "*u8",
        "scales_ptr": "*i16", "tokens_of_call": "i32", "clusters": "i32", "tiles": "i32", "rows_of_layer": "i32",
        "slots_of_layer": "i32", "pages_of_layer": "i32", **dict.fromkeys(scales if codec.scales else (), "*i16"),
    }  # fmt: skip
    sizes = {
        "H": 8, "D": head_dim, "DP": triton.next_power_of_2(head_dim), "PAGE": 16, "PER_PAGE": 2,
        "PAD": slice_columns(head_dim), "FORMAT": row_format, "SCALES": codec.scales,
        "BITS": bits, **tiles, **dict.fromkeys(() if codec.scales else scales),
        **({} if copied else {"read_slots_ptr": None}),
    }  # fmt: skip
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return CompileCase(
        f"encode {kernel.__name__.removesuffix('_kernel')} {row_format} {bits} D={head_dim}"
        + (" copied" if copied else ""),
        kernel,
        signature,
        {name: sizes[name] for name in kernel.arg_names if name in sizes},
        tuple(name for name in signature if name.endswith(("_ptr", "_stride"))),
        **holds,
    )
