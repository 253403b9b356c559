"""A GPU's lists of a step are those of `kernels.lists.reference.sparse_step`, for any mixture of requests, wherever they are
written.

Red when: a program finds another segment than the definition, reads a slot of another row or position, a list or a count of a
request that is dense or padding is another one, or what an earlier step left shows in a later one.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.lists import triton as lists_triton
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.memory.step import ListShape, RowBorders, SparseStep, empty_lists, pack_rows

PAGE, CONTEXT, ROWS, PER_PAGE, TILE = 16, 800, 6, 2, 8
NEVER = np.iinfo(np.int32).max


@pytest.fixture(autouse=True)
def _several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists_triton, "TILE", 32)


def table() -> torch.Tensor:
    """Pages scattered over a pool that no two rows share."""
    per_row = CONTEXT // PAGE
    pages = 1 + torch.randperm(ROWS * per_row, generator=torch.Generator().manual_seed(1)).view(ROWS, per_row)
    return (pages.repeat_interleave(PAGE, 1) * PAGE + torch.arange(PAGE).repeat(per_row)).int()


def borders_of(generator: random.Random) -> RowBorders:
    """A batch with gaps anywhere, its borders padded."""
    rows, lengths, all_segments = [], [], []
    for row in generator.sample(range(ROWS), generator.randint(1, ROWS)):
        at, segments = generator.choice([0, 1, 3]), []
        while not segments or (generator.random() < 0.8 and at + 4 <= CONTEXT // PAGE):
            end = min(at + generator.randint(4, 9), CONTEXT // PAGE)
            segments.append((at * PAGE, end * PAGE))
            at = end + generator.choice([0, 0, 1, 2, 7])
        rows.append(row)
        lengths.append(generator.randint(segments[-1][1], CONTEXT))
        all_segments.append(segments)
    most = max(map(len, all_segments)) + 2
    begin, end = np.full((2, len(rows), most), NEVER, np.int32)
    covered = np.full((len(rows), most + 1), 12345, np.int32)
    for b, segments in enumerate(all_segments):
        begin[b, : len(segments)], end[b, : len(segments)] = np.array(segments).T
        covered[b, : len(segments) + 1] = np.cumsum([0, *(e - s for s, e in segments)])
    counts = np.array([len(segments) for segments in all_segments])
    return RowBorders(np.array(rows), np.array(lengths), counts, begin, end, covered)


def assert_are_the_lists(found: SparseStep, borders: RowBorders, sparse: np.ndarray, rows: torch.Tensor) -> None:
    expected = sparse_step(borders, rows, PAGE)
    assert found.batch == len(sparse) and found.offset is not None
    offset = 0
    for b, is_sparse in enumerate(sparse.tolist()):
        assert int(found.offset[b]) == offset
        pages, base, segments = (int(count[b]) for count in (found.page_count, found.base_count, found.segment_count))
        if not is_sparse:
            length = int(borders.seq_lens[b])
            assert (pages, base, segments, int(found.dense_count[b])) == (0, 0, 0, length)
            count = -(-length // PAGE)
            assert found.pages[b, :count].tolist() == (rows[borders.rows[b], :length:PAGE] // PAGE).tolist()
            continue
        counts = (expected.page_count[b], expected.base_count[b], expected.segment_count[b], 0)
        assert (pages, base, segments, int(found.dense_count[b])) == counts
        assert torch.equal(found.pages[b, :pages].cpu(), expected.pages[b, :pages])
        assert torch.equal(found.segment_of_page[b, :pages].cpu(), expected.segment_of_page[b, :pages])
        assert torch.equal(found.segment_begin[b, :segments].cpu(), expected.segment_begin[b, :segments])
        assert torch.equal(found.base_slots[b, :base].cpu(), expected.base_slots[b, :base])
        offset += -(-pages * PER_PAGE // TILE) * TILE
    assert int(found.offset[found.batch]) >= offset


def kinds_of(generator: random.Random, batch: int) -> np.ndarray:
    """Which requests are sparse."""
    return np.array([generator.random() < 0.6 for _ in range(batch)])


def test_lists_of_their_own_size_are_the_definitions(device: str) -> None:
    generator, rows = random.Random(3), table()
    for _ in range(8):
        borders = borders_of(generator)
        sparse = kinds_of(generator, len(borders.rows))
        packed = pack_rows(borders, sparse, PAGE, PER_PAGE, TILE)
        lists = empty_lists(packed.shape, torch.device(device))
        found = lists_triton.make(packed, rows.to(device), PAGE, lists)
        assert_are_the_lists(found, borders, sparse, rows)
        assert int(found.offset[-1]) == packed.shape.clusters
        for b in range(found.batch):  # as all lists of a step: what lies beyond a request's is 0
            assert not found.base_slots[b, int(found.base_count[b]) :].any()
            assert not found.segment_of_page[b, int(found.page_count[b]) :].any()


def test_lists_that_never_move_hold_step_after_step(device: str) -> None:
    """Poisoned at first; afterwards each step finds what the last one left. Requests beyond the batch are padding."""
    generator, rows = random.Random(5), table()
    room = ListShape(batch=ROWS + 2, pages=CONTEXT // PAGE, segments=20, base=CONTEXT, clusters=1000, listed=1000)
    fixed = empty_lists(room, torch.device(device))
    for value in fixed:
        if isinstance(value, torch.Tensor):
            value.fill_(2**30)
    addresses = [value.data_ptr() for value in fixed if isinstance(value, torch.Tensor)]
    for _ in range(8):
        borders = borders_of(generator)
        sparse = kinds_of(generator, len(borders.rows))
        packed = pack_rows(borders, sparse, PAGE, PER_PAGE, TILE)
        found = lists_triton.make(packed, rows.to(device), PAGE, fixed)
        assert_are_the_lists(found, borders, sparse, rows)
        for counts in (fixed.page_count, fixed.base_count, fixed.segment_count, fixed.dense_count):
            assert not counts[found.batch :].any(), "requests beyond the batch"
        assert fixed.offset is not None
        assert fixed.offset[found.batch :].tolist() == [packed.shape.clusters] * (room.batch + 1 - found.batch)
        kept = [value.data_ptr() for value in found if isinstance(value, torch.Tensor)]
        assert kept == addresses


def test_shapes_say_what_the_lists_come_to() -> None:
    generator, rows = random.Random(7), table()
    for _ in range(10):
        borders = borders_of(generator)
        packed = pack_rows(borders, np.ones(len(borders.rows), bool), PAGE, PER_PAGE, TILE)
        lists = sparse_step(borders, rows, PAGE)
        counts = (lists.page_count, lists.segment_count, lists.base_count)
        assert packed.shape[:4] == (lists.batch, *(int(count.max()) for count in counts))
        assert packed.shape.listed == int(lists.base_count.sum()), "no request has none"
        assert packed.recallable_tokens == lists.recallable_tokens and packed.dense_tokens == 0
