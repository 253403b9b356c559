"""The lists of a decode step on a CPU: one compiled pass over the requests' segments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_clusterkv.kernels.cpu_math import njit
from sglang_clusterkv.memory.sharing import shared_segments
from sglang_clusterkv.memory.step import SparseStep

if TYPE_CHECKING:
    from sglang_clusterkv.memory.step import RowBorders

_NEVER = np.iinfo(np.int32).max


@njit(cache=True)
def _list(
    rows: Any, seq_lens: Any, recallable: Any, begin: Any, covered: Any, table: Any, page_size: Any, pages: Any,
    segment_of_page: Any, segment_begin: Any, base_slots: Any,
) -> None:  # fmt: skip
    for i in range(len(rows)):
        slots = table[rows[i]]
        page = token = position = 0
        for s in range(recallable[i]):
            segment_begin[i, s] = covered[i, s] // page_size
            while position < begin[i, s]:
                base_slots[i, token] = slots[position]
                token, position = token + 1, position + 1
            for _ in range((covered[i, s + 1] - covered[i, s]) // page_size):
                pages[i, page] = slots[position] // page_size
                segment_of_page[i, page] = s
                page, position = page + 1, position + page_size
        while position < seq_lens[i]:
            base_slots[i, token] = slots[position]
            token, position = token + 1, position + 1


def make(borders: RowBorders, req_to_token: torch.Tensor, page_size: int) -> SparseStep:
    """See `reference.sparse_step`.

    Raises:
        IndexError: a segment ends behind its request.
    """
    batch, recallable, seq_lens = len(borders.rows), borders.recallable, borders.seq_lens
    most = int(recallable.max())
    ends = borders.begin[:, :most].astype(np.int64) + np.diff(borders.covered[:, : most + 1])
    if ((ends > seq_lens[:, None]) & (np.arange(most) < recallable[:, None])).any():
        raise IndexError("a segment ends behind its request")  # compiled code would read and write beyond its arrays
    covered = borders.covered[np.arange(batch), recallable].astype(np.int64)
    base, longest = seq_lens - covered, int(covered.max())
    pages = np.zeros((batch, longest // page_size), np.int64)
    segment_of_page = np.zeros_like(pages)
    segment_begin = np.full((batch, most), _NEVER // page_size)
    base_slots = np.zeros((batch, int(base.max())), np.int64)
    _list(
        borders.rows, seq_lens, recallable, borders.begin, borders.covered, req_to_token.numpy(), page_size, pages,
        segment_of_page, segment_begin, base_slots,
    )  # fmt: skip
    return SparseStep(
        batch=batch,
        pages=torch.from_numpy(pages),
        page_count=torch.from_numpy(covered // page_size),
        segment_of_page=torch.from_numpy(segment_of_page),
        segment_begin=torch.from_numpy(segment_begin),
        segment_count=torch.from_numpy(recallable.astype(np.int64)),
        base_slots=torch.from_numpy(base_slots),
        base_count=torch.from_numpy(base),
        recallable_tokens=longest,
        dense_count=torch.zeros(batch, dtype=torch.int64),
        lengths=np.stack([base, covered], 1),
        shared=None if borders.ids is None else shared_segments(borders.ids[:, :most], recallable),
    )
