"""What the launches of one call of k-means share, and what types their kernels' arguments have."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.kmeans.triton.segments import Clustering, Pool, Segments
from sglang_clusterkv.kernels.triton_fp8 import POINTERS

ROWS = 64  # keys, or centroids to be compared with all others, per program
MEANS = 16  # clusters per program where centroids are made of keys


class Call(NamedTuple):
    """One call: what is read, what is found, and scratch."""

    keys: Pool
    segments: Segments
    found: Clustering
    centroids: torch.Tensor  # bf16 [N, C, 2, D], relative to the segment's mean; each is the sum of two
    norms: torch.Tensor  # fp32 [N, C], their squared lengths
    distance: torch.Tensor  # fp32 [N, T], of each key to its cluster's centroid, squared

    @property
    def rows(self) -> int:
        """N."""
        return self.found.labels.shape[0]

    @property
    def tokens(self) -> int:
        """T."""
        return self.segments.slots.numel()

    @property
    def pool(self) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """A kernel's arguments by which it finds keys."""
        first = self.keys.first
        return first, self.keys.layer_offsets, first.stride(0), first.stride(1)

    @property
    def ranges(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those by which it finds a segment's tokens and clusters."""
        return self.segments.token_begin, self.segments.cluster_begin

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.first.shape[2]

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of a kernel that reads keys."""
        return {"H": self.keys.first.shape[1], **channels_of(self.head_dim)}

    def grid(self, longest: int, tile: int) -> tuple[int, int, int]:
        """Programs of a launch whose longest segment has so many elements, `tile` per program."""
        return triton.cdiv(longest, tile), self.rows, self.segments.count


def channels_of(head_dim: int) -> dict[str, int]:
    """A kernel's constants for the channels of a head."""
    return {"D": head_dim, "DP": triton.next_power_of_2(head_dim)}


def call_of(keys: Pool, segments: Segments) -> Call:
    """Take the memory of one call."""
    layers, (_, heads, head_dim) = keys.layer_offsets.numel(), keys.first.shape
    rows, tokens, clusters = layers * heads, segments.slots.numel(), segments.clusters
    device = keys.first.device
    return Call(
        keys,
        segments,
        Clustering(
            center=torch.empty((rows, segments.count, head_dim), device=device),
            labels=torch.empty((rows, tokens), dtype=torch.int16, device=device),
            members=torch.empty((rows, tokens), dtype=torch.int16, device=device),
            cluster_end=torch.empty((rows, clusters), dtype=torch.int32, device=device),
        ),
        centroids=torch.empty((rows, clusters, 2, head_dim), dtype=torch.bfloat16, device=device),
        norms=torch.empty((rows, clusters), device=device),
        distance=torch.empty((rows, tokens), device=device),
    )


def case(kernel: Any, head_dim: int, tiles: dict[str, Any], pool: str = "bf16", **holds: Any) -> CompileCase:
    """A case of one kernel at Llama's shape, or at another head_dim; pool: bf16 or one of `triton_fp8.POINTERS`."""
    types = {
        "keys_ptr": POINTERS.get(pool, "*bf16"), "layer_offsets_ptr": "*i64", "slot_stride": "i32", "head_stride": "i32",
        "slots_ptr": "*i64", "token_begin_ptr": "*i32", "cluster_begin_ptr": "*i32", "center_ptr": "*fp32",
        "centroids_ptr": "*bf16", "norms_ptr": "*fp32", "labels_ptr": "*i16", "members_ptr": "*i16", "cluster_end_ptr": "*i32",
        "distance_ptr": "*fp32", "cheapness_ptr": "*fp32", "numbers_ptr": "*fp32", "begin_ptr": "*i32",
        "outlier_begin_ptr": "*i32", "largest_ptr": "*i16", "gains_ptr": "*i32", "far_ptr": "*i16", "moved_ptr": "*i16",
        "length": "i32", "outliers": "i32", "tokens_of_call": "i32", "clusters": "i32",
    }  # fmt: skip
    sizes = {"H": 8, **channels_of(head_dim), **tiles}
    signature = {name: types[name] for name in kernel.arg_names if name in types}
    return CompileCase(
        f"kmeans {kernel.__name__.removesuffix('_kernel')} D={head_dim}" + ("" if pool == "bf16" else f" {pool}"),
        kernel,
        signature,
        {name: sizes[name] for name in kernel.arg_names if name in sizes},
        tuple(name for name in signature if name.endswith(("_ptr", "_stride"))),
        **holds,
    )
