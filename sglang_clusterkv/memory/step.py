"""The lists of one decode step: which pages hold clusters that may be recalled, and which slots are always attended.

Built once per step for all layers, from the rows' borders (host) and req_to_token (device), by kernels/lists/. Nothing here
waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from sglang_clusterkv.memory.sharing import SharedSegments


class SparseStep(NamedTuple):
    """B requests that decode sparsely. Lists are padded to the longest; N pages, W always-attended tokens, S segments.

    On a GPU the lists take every request of a batch, and what one is, its counts say: it has pages of recallable segments and
    is sparse, or a `dense_count`, of tokens in `pages`, which are all of its own then; or neither, which is padding.
    """

    batch: int
    pages: torch.Tensor  # int64 [B, N], pages of recallable segments, in sequence order; padding 0
    page_count: torch.Tensor  # int64 [B], 0 for a request that is not sparse
    segment_of_page: torch.Tensor  # int64 [B, N], ordinal of the page's segment in the request
    segment_begin: torch.Tensor  # int64 [B, S], index in `pages` of the segment's first page
    segment_count: torch.Tensor  # int64 [B]
    base_slots: torch.Tensor  # int64 [B, W], sinks, gaps and window, in sequence order; padding 0
    base_count: torch.Tensor  # int64 [B]
    recallable_tokens: int  # most over the batch
    dense_count: torch.Tensor  # int64 [B], tokens of a request that attends to all of them; 0 for any other
    lengths: np.ndarray | None = (
        None  # int64 [B, 2], on the host: always-attended tokens (all, where dense), recallable ones
    )
    dense_tokens: int = 0  # most of these over the batch
    offset: torch.Tensor | None = (
        None  # int32 [B + 1], where each request's clusters begin in a GPU's workspace; None: anywhere
    )
    clusters: int = 0  # the last offset, or more
    shared: SharedSegments | None = None  # None: nobody looked for any


class DenseStep(NamedTuple):
    """B requests that decode over all their tokens."""

    batch: int
    slots: torch.Tensor  # int64 [B, T], in sequence order; padding 0
    seq_lens: torch.Tensor  # int64 [B]


class RowBorders(NamedTuple):
    """Borders of the recallable segments of B rows, host arrays int32; padding: the largest int32."""

    rows: np.ndarray  # [B]
    seq_lens: np.ndarray  # [B]
    recallable: np.ndarray  # [B], recallable segments
    begin: np.ndarray  # [B, S], token positions
    end: np.ndarray  # [B, S]
    covered: np.ndarray  # [B, S + 1], tokens of the first i segments
    ids: np.ndarray | None = None  # [B, S], of the segments; None: not known, so no request is taken to share any


class ListShape(NamedTuple):
    """Room for the lists of a step."""

    batch: int  # requests
    pages: int  # of a request
    segments: int  # likewise
    base: int  # always-attended tokens, likewise
    clusters: int  # of all requests, each one's rounded up
    listed: int  # tokens that every layer attends to: of all requests, one at least of each


class PackedRows(NamedTuple):
    """The requests of a batch in one array of the host, from which a GPU makes its lists (kernels/lists/).

    Of each request `PACKED` numbers (see `pack_rows`), then of each of their segments its begin, in tokens of the sequence, and
    how many tokens the segments before it cover.
    """

    values: np.ndarray  # int32
    shape: ListShape  # what the lists come to
    recallable_tokens: int  # most over the batch
    dense_tokens: int  # likewise
    lengths: np.ndarray  # int64 [B, 2], as in `SparseStep`

    @property
    def batch(self) -> int:
        """Requests."""
        return self.shape.batch


PACKED = (
    8  # numbers of a request: row, dense tokens, segments, where these begin, covered and base tokens, first cluster, 0
)


def pack_rows(borders: RowBorders, sparse: np.ndarray, page_size: int, clusters_per_page: int, tile: int) -> PackedRows:
    """Pack the requests of a batch.

    Args:
        borders: of all requests; those of one that is not sparse mean nothing.
        sparse: bool [B]; the others attend to all of their tokens.
        page_size: tokens per page.
        clusters_per_page: of the index.
        tile: clusters; a request's begin at multiples of it.
    """
    batch, segments = len(borders.rows), np.where(sparse, borders.recallable, 0)
    inside = np.arange(borders.begin.shape[1]) < segments[:, None]
    covered = np.where(sparse, borders.covered[np.arange(batch), borders.recallable], 0)
    dense = np.where(sparse, 0, borders.seq_lens)
    base = np.where(sparse, borders.seq_lens - covered, 0)
    ends = np.cumsum(-(-(covered // page_size * clusters_per_page) // tile) * tile)
    values = np.zeros(batch * PACKED + 2 * int(segments.sum()), np.int32)
    head, tail = values[: batch * PACKED].reshape(batch, PACKED), values[batch * PACKED :].reshape(-1, 2)
    head[:, 0], head[:, 1], head[:, 2] = borders.rows, dense, segments
    head[:, 3] = batch * PACKED + 2 * (np.cumsum(segments) - segments)
    head[:, 4], head[:, 5], head[1:, 6] = covered, base, ends[:-1]
    tail[:, 0], tail[:, 1] = borders.begin[inside], borders.covered[:, :-1][inside]
    pages = np.maximum(covered // page_size, -(-dense // page_size))
    lengths = np.stack([base + dense, covered], 1).astype(np.int64)
    listed = int(np.maximum(lengths[:, 0], 1).sum())
    shape = ListShape(batch, int(pages.max()), int(segments.max()), int(base.max()), int(ends[-1]), listed)
    return PackedRows(values, shape, int(covered.max()), int(dense.max()), lengths)


def empty_lists(shape: ListShape, device: torch.device) -> SparseStep:
    """Lists of this shape, all zeros: every request is padding."""

    def zeros(*sizes: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    pages, counts = (shape.batch, max(1, shape.pages)), (shape.batch,)
    return SparseStep(
        batch=shape.batch,
        pages=zeros(*pages),
        page_count=zeros(*counts),
        segment_of_page=zeros(*pages),
        segment_begin=zeros(shape.batch, max(1, shape.segments)),
        segment_count=zeros(*counts),
        base_slots=zeros(shape.batch, max(1, shape.base)),
        base_count=zeros(*counts),
        recallable_tokens=0,
        dense_count=zeros(*counts),
        offset=zeros(shape.batch + 1, dtype=torch.int32),
        clusters=shape.clusters,
    )


def lists_bytes(step: SparseStep) -> int:
    """Bytes of all lists of a step."""
    return sum(value.numel() * value.element_size() for value in step if isinstance(value, torch.Tensor))


def first_requests(step: SparseStep, batch: int) -> SparseStep:
    """The lists of the first requests of a step: views."""
    lists = {name: value[:batch] for name, value in step._asdict().items() if isinstance(value, torch.Tensor)}
    if step.offset is not None:
        lists["offset"] = step.offset[: batch + 1]
    return step._replace(batch=batch, **lists)


def to_device(array: np.ndarray, device: str, dtype: type = np.int64) -> torch.Tensor:
    """Host numbers on a device of this type, through pinned memory of their own: the copy waits for nothing."""
    tensor = torch.from_numpy(array.astype(dtype))
    if device != "cpu":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def dense_step(rows: np.ndarray, seq_lens: np.ndarray, req_to_token: torch.Tensor) -> DenseStep:
    """List every token of B rows.

    Args:
        rows: int [B], lines of req_to_token.
        seq_lens: int [B].
        req_to_token: int32 [rows, max_context].
    """
    device = req_to_token.device.type
    longest = int(seq_lens.max())
    lengths = to_device(seq_lens, device)
    slots = req_to_token[to_device(rows, device), :longest].long()
    real = torch.arange(longest, device=req_to_token.device) < lengths.unsqueeze(1)
    return DenseStep(len(rows), torch.where(real, slots, 0), lengths)
