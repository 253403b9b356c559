"""The lists of a decode step in torch, on any device; nothing here waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_clusterkv.memory.sharing import shared_segments
from sglang_clusterkv.memory.step import SparseStep, to_device

if TYPE_CHECKING:
    from sglang_clusterkv.memory.step import RowBorders


def sparse_step(borders: RowBorders, req_to_token: torch.Tensor, page_size: int) -> SparseStep:
    """Expand the borders of B rows into the lists of a step.

    Args:
        borders: of rows that have at least one recallable segment.
        req_to_token: int32 [rows, max_context], slots by position.
        page_size: tokens per page.
    """
    device = req_to_token.device.type
    most = int(borders.recallable.max())
    inside = np.arange(most) < borders.recallable[:, None]
    covered = borders.covered[np.arange(len(borders.rows)), borders.recallable]
    never = np.iinfo(np.int32).max
    begin = np.where(inside, borders.begin[:, :most], never)
    before = np.where(inside, borders.covered[:, :most], never)
    base_before = np.where(inside, borders.begin[:, :most] - borders.covered[:, :most], never)
    base = borders.seq_lens - covered

    rows = to_device(borders.rows, device).unsqueeze(1)
    begins, befores = to_device(begin, device), to_device(before, device)
    totals = to_device(borders.covered[:, : most + 1], device)

    # Recallable page j of a row lies in the segment with the largest `before` <= j.
    page_before = befores // page_size
    listed = torch.arange(int(covered.max()) // page_size, device=req_to_token.device).expand(len(borders.rows), -1)
    ordinal = torch.searchsorted(page_before, listed.contiguous(), right=True) - 1
    position = begins.gather(1, ordinal) + (listed - page_before.gather(1, ordinal)) * page_size
    page_count = to_device(covered // page_size, device)
    real = listed < page_count.unsqueeze(1)
    pages = req_to_token[rows, torch.where(real, position, 0)].long() // page_size

    # Always-attended token j follows every segment that begins after j or fewer of them.
    base_count = to_device(base, device)
    tokens = torch.arange(int(base.max()), device=req_to_token.device).expand(len(borders.rows), -1)
    passed = torch.searchsorted(to_device(base_before, device), tokens.contiguous(), right=True)
    passed = torch.minimum(passed, to_device(borders.recallable, device).unsqueeze(1))
    base_position = tokens + totals.gather(1, passed)
    base_real = tokens < base_count.unsqueeze(1)
    base_slots = req_to_token[rows, torch.where(base_real, base_position, 0)].long()
    return SparseStep(
        batch=len(borders.rows),
        pages=torch.where(real, pages, 0),
        page_count=page_count,
        segment_of_page=torch.where(real, ordinal, 0),
        segment_begin=page_before,
        segment_count=to_device(borders.recallable, device),
        base_slots=torch.where(base_real, base_slots, 0),
        base_count=base_count,
        recallable_tokens=int(covered.max()),
        dense_count=torch.zeros_like(base_count),
        lengths=np.stack([base, covered], 1),
        shared=None if borders.ids is None else shared_segments(borders.ids[:, :most], borders.recallable),
    )
