"""Segments of one call and their clusters, as the Triton kernels that make them (kmeans, encode) find them in the pool.

One launch of a kernel covers all layers, kv heads and segments of a call: its grid is (tile, layer * H + head, segment),
and what a segment is shorter than the longest are programs that return at once. Lengths are runtime values, so that a
prompt's length compiles nothing.

L = layers, H = kv heads, N = L * H, S = segments of the call, T = their tokens, C = their clusters, D = head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.kmeans.reference import outlier_count
from sglang_clusterkv.kernels.triton_fp8 import as_argument, widened

# These differ from call to call: no variant for 1 and multiples of 16.
LENGTHS = ("tokens_of_call", "clusters", "outliers", "length", "tiles")


class Pool(NamedTuple):
    """Keys or values of all layers, addressed from the first layer's buffer.

    Every layer's buffer has the strides of the first, and lies a whole number of 8 elements and of 16 bytes from it.
    """

    first: torch.Tensor  # [slots, H, D], as `as_argument` gives them; channels are contiguous
    layer_offsets: torch.Tensor  # int64 [L], elements from the first layer's buffer to each


class Segments(NamedTuple):
    """The segments of one call; segment s has the tokens token_begin[s] to token_begin[s + 1] of `slots`."""

    slots: torch.Tensor  # int64 [T], where tables go
    read_slots: torch.Tensor  # int64 [T], where keys and values are read; the same, or their places in a copy of them
    token_begin: torch.Tensor  # int32 [S + 1]
    cluster_begin: torch.Tensor  # int32 [S + 1]
    outlier_begin: torch.Tensor  # int32 [S + 1]
    max_tokens: int
    max_clusters: int
    max_outliers: int
    clusters: int  # C
    outliers: int

    @property
    def count(self) -> int:
        """S."""
        return self.token_begin.numel() - 1


class Clustering(NamedTuple):
    """What k-means finds; scratch of a call."""

    center: torch.Tensor  # fp32 [N, S, D], mean key
    labels: torch.Tensor  # int16 [N, T], cluster in its segment
    members: torch.Tensor  # int16 [N, T], offsets in the segment, sorted by cluster, ascending inside
    cluster_end: torch.Tensor  # int32 [N, C], end of each cluster in its segment's members


def pool_of(buffers: list[torch.Tensor]) -> Pool:
    """Address all layers' buffers ([slots, H, D] each) from the first; costs a copy to the device: keep it."""
    first = buffers[0]
    item = first.element_size()
    offsets = [buffer.data_ptr() - first.data_ptr() for buffer in buffers]
    assert all(offset % max(16, 8 * item) == 0 for offset in offsets), (
        f"layers' buffers are not aligned to each other: {offsets}"
    )
    strides = {buffer.stride() for buffer in buffers}
    assert len(strides) == 1 and first.stride(2) == 1, f"layers' buffers have strides {sorted(strides)}"
    return Pool(
        as_argument(first), torch.tensor([offset // item for offset in offsets], dtype=torch.int64).to(first.device)
    )


def stacked(rows: torch.Tensor) -> Pool:
    """Address rows [L, n, H, D] of all layers, which lie together, from the first layer's; does not wait for the device."""
    return Pool(as_argument(rows[0]), torch.arange(len(rows), device=rows.device) * rows.stride(0))


def segments_of(
    slots: list[torch.Tensor], tokens_per_cluster: int, outlier_share: float = 0.0, copied: bool = False
) -> Segments:
    """Put segments together for one call; does not wait for the device.

    Args:
        slots: int64 [M] per segment, in sequence order.
        tokens_per_cluster: on average; a segment of M tokens has M // tokens_per_cluster clusters.
        outlier_share: of them, given to outliers.
        copied: keys and values are read from a copy of these tokens, one after the other.
    """
    tokens = [segment.numel() for segment in slots]
    clusters = [count // tokens_per_cluster for count in tokens]
    assert min(clusters) > 0, f"a segment of {min(tokens)} tokens has no cluster"
    outliers = [outlier_count(count, outlier_share) for count in clusters]
    # Rows of whole 16 bytes: Triton compiles kernels anew for a pointer that is aligned otherwise.
    unused = [0] * (-(len(slots) + 1) % 4)
    lengths = torch.tensor([[0, *numbers, *unused] for numbers in (tokens, clusters, outliers)], dtype=torch.int32)
    begins = lengths.cumsum(1, dtype=torch.int32)
    device = slots[0].device
    if device.type != "cpu":
        begins = begins.pin_memory().to(device, non_blocking=True)
    longest, sums = (max(tokens), max(clusters), max(outliers)), (sum(clusters), sum(outliers))
    listed = torch.cat(slots)
    read = torch.arange(len(listed), device=device) if copied else listed
    return Segments(listed, read, *begins[:, : len(slots) + 1].unbind(), *longest, *sums)


@triton.jit
def segment_range(begin_ptr, segment):
    """Begin and length of a segment in its call, int64 and int32."""
    begin = tl.load(begin_ptr + segment)
    return begin.to(tl.int64), tl.load(begin_ptr + segment + 1) - begin


@triton.jit
def cluster_range(end_ptr, cluster, count):
    """Begin and size of clusters in their segment's member list, int32; size 0 past the last cluster."""
    live = cluster < count
    end = tl.load(end_ptr + cluster, mask=live, other=0)
    begin = tl.load(end_ptr + cluster - 1, mask=live & (cluster > 0), other=0)
    return begin, end - begin


@triton.jit
def head_pointer(first_ptr, layer_offsets_ptr, n, head_stride, H: tl.constexpr):
    """Where the rows of layer n // H, head n % H begin in the pool."""
    return first_ptr + tl.multiple_of(tl.load(layer_offsets_ptr + n // H), 8) + (n % H) * head_stride


@triton.jit
def load_rows(layer_ptr, slots, channels, row_mask, slot_stride, D: tl.constexpr):
    """Rows of one head at these slots, as fp32 [rows, channels]; zero outside of the mask."""
    mask = row_mask[:, None] & (channels < D)[None, :]
    return widened(
        tl.load(layer_ptr + slots[:, None] * slot_stride + channels[None, :], mask=mask, other=0.0), tl.float32
    )
