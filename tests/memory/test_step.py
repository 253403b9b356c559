"""The lists of a decode step are what a reader of the borders would write down, for ragged batches with gaps anywhere.

Red when: a list names a slot or page of another row or position, a token twice or never; its order is not the sequence's;
a segment's ordinal or begin is wrong; a count includes padding, or padding is not zero; a shared
segment is left out, listed without one of its requests, or with one that has it in its window.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_clusterkv.clusters.rows import Row, RowTables, Segment
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.memory.sharing import shared_segments
from sglang_clusterkv.memory.step import RowBorders, dense_step

CONTEXT = 800


class Sequence(NamedTuple):
    """One request of a batch."""

    row: int
    length: int
    segments: list[tuple[int, int]]  # recallable, ascending


def table_of(rows: int, page_size: int) -> torch.Tensor:
    """Pages scattered over a pool that no two rows share; page 0 is nobody's."""
    per_row = CONTEXT // page_size
    pages = 1 + torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(1)).view(rows, per_row)
    return (pages.repeat_interleave(page_size, 1) * page_size + torch.arange(page_size).repeat(per_row)).int()


def borders_of(batch: list[Sequence], spare: int) -> RowBorders:
    """Padded by `spare` more segments than any row has."""
    most = max(len(sequence.segments) for sequence in batch) + spare
    begin, end = np.full((2, len(batch), most), np.iinfo(np.int32).max, np.int32)
    covered = np.full((len(batch), most + 1), 12345, np.int32)
    for b, sequence in enumerate(batch):
        count = len(sequence.segments)
        begin[b, :count] = [s[0] for s in sequence.segments]
        end[b, :count] = [s[1] for s in sequence.segments]
        covered[b, : count + 1] = np.cumsum([0, *(e - s for s, e in sequence.segments)])
    return RowBorders(
        np.array([s.row for s in batch]),
        np.array([s.length for s in batch]),
        np.array([len(s.segments) for s in batch]),
        begin,
        end,
        covered,
    )


def assert_lists(batch: list[Sequence], table: torch.Tensor, page_size: int, *, spare: int = 0) -> None:
    step = sparse_step(borders_of(batch, spare), table, page_size)
    assert step.batch == len(batch)
    assert step.recallable_tokens == max(sum(e - b for b, e in s.segments) for s in batch)
    for i, (row, length, segments) in enumerate(batch):
        pages, ordinals, begins, inside = [], [], [], set()
        for ordinal, (begin, end) in enumerate(segments):
            begins.append(len(pages))
            pages += [int(table[row, at]) // page_size for at in range(begin, end, page_size)]
            ordinals += [ordinal] * ((end - begin) // page_size)
            inside |= set(range(begin, end))
        base = [int(table[row, at]) for at in range(length) if at not in inside]
        count, attended = int(step.page_count[i]), int(step.base_count[i])
        assert step.pages[i, :count].tolist() == pages and not step.pages[i, count:].any()
        assert step.segment_of_page[i, :count].tolist() == ordinals and not step.segment_of_page[i, count:].any()
        assert int(step.segment_count[i]) == len(segments)
        assert step.segment_begin[i, : len(segments)].tolist() == begins
        assert step.base_slots[i, :attended].tolist() == base and not step.base_slots[i, attended:].any()


def random_batch(generator: random.Random, page_size: int) -> list[Sequence]:
    """Up to six requests, of six rows."""
    batch = []
    for row in generator.sample(range(6), generator.randint(1, 6)):
        at, segments = generator.choice([0, 1, 1, 3]), []
        while not segments or (generator.random() < 0.7 and at + 4 <= CONTEXT // page_size):
            end = min(at + generator.randint(4, 12), CONTEXT // page_size)
            segments.append((at * page_size, end * page_size))
            at = end + generator.choice([0, 0, 1, 2, 7])
        batch.append(Sequence(row, generator.randint(segments[-1][1], CONTEXT), segments))
    return batch


@pytest.mark.parametrize("spare", [0, 3])
@pytest.mark.parametrize(
    "batch",
    [
        [Sequence(0, 700, [(16, 272), (272, 528), (528, 624)])],
        [Sequence(2, 700, [(16, 272), (320, 528)]), Sequence(0, 150, [(16, 80)])],  # a gap between segments
        [Sequence(1, 65, [(0, 64)]), Sequence(0, 800, [(736, 800)])],  # no sinks; nothing behind
        [Sequence(0, 64, [(0, 64)]), Sequence(1, 799, [(64, 128), (144, 208), (256, 320), (336, 400), (400, 784)])],
        [Sequence(row, 800 - 150 * row, [(16 * row, 16 * row + 64)]) for row in (3, 1, 0, 2)],
    ],
)
def test_lists_of_known_batches(batch: list[Sequence], spare: int) -> None:
    assert_lists(batch, table_of(4, 16), 16, spare=spare)


@pytest.mark.parametrize("page_size", [16, 32])
def test_lists_of_random_batches(page_size: int) -> None:
    generator = random.Random(page_size)
    table = table_of(6, page_size)
    for _ in range(60):
        assert_lists(random_batch(generator, page_size), table, page_size, spare=generator.randint(0, 2))


@given(st.data())
def test_shared_segments_are_listed_with_all_their_requests(data: st.DataObject) -> None:
    """Of requests whose segments are paths of random trees; a request may have fewer recallable than it sees."""
    batch, depth = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    ids = np.full((batch, depth), -1)
    for b in range(batch):  # as an earlier request down to some depth, then its own
        common = data.draw(st.integers(0, depth))
        ids[b] = 100 * (b + 1) + np.arange(depth)[::-1]
        ids[b, :common] = ids[data.draw(st.integers(0, b)), :common]
    count = np.array([data.draw(st.integers(1, depth)) for _ in range(batch)])
    shared = shared_segments(ids, count)

    seen: dict[int, list[tuple[int, int]]] = {}
    for b in range(batch):
        for s in range(count[b]):
            seen.setdefault(int(ids[b, s]), []).append((b, s))
    expected = [seen[i] for i in sorted(seen) if len(seen[i]) > 1]
    members = list(zip(shared.request.tolist(), shared.ordinal.tolist(), strict=True))
    assert [members[begin:end] for begin, end in itertools.pairwise(shared.first.tolist())] == expected
    assert sorted(map(tuple, np.argwhere(shared.of_request).tolist())) == sorted(members)


def test_the_dense_list_is_the_row() -> None:
    table = table_of(4, 16)
    rows, lengths = np.array([3, 0, 2]), np.array([17, 800, 1])
    step = dense_step(rows, lengths, table)
    assert step.batch == 3 and step.seq_lens.tolist() == lengths.tolist()
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert step.slots[i, :length].tolist() == table[row, :length].tolist() and not step.slots[i, length:].any()


def test_segments_that_reach_into_the_window_are_not_recallable() -> None:
    tables = RowTables(rows=3, window_tokens=64)
    segments = [Segment(7, 16, 272), Segment(9, 320, 400), Segment(8, 400, 480)]
    tables.write(Row(row=2, prompt_len=0, found_end=0, length=0, segments=segments))
    tables.write(Row(row=1, prompt_len=0, found_end=0, length=0))
    lengths = np.array([335, 336, 463, 464, 543, 544, 2000])
    assert tables.recallable(np.full(7, 2), lengths).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert tables.recallable(np.array([1, 2]), np.array([500, 500])).tolist() == [0, 2]
    assert tables.covered[2, :4].tolist() == [0, 256, 336, 416]
    tables.write(Row(row=2, prompt_len=0, found_end=0, length=0, segments=segments[:1]))
    assert tables.recallable(np.array([2]), np.array([2000])).tolist() == [1]
    # More than there is room for: the other rows' stay.
    many = [Segment(i, 16 + 64 * i, 80 + 64 * i) for i in range(100)]
    tables.write(Row(row=0, prompt_len=0, found_end=0, length=0, segments=many))
    found = tables.recallable(np.array([0, 0, 1, 2]), np.array([20000, 16 + 64 * 51, 2000, 2000]))
    assert found.tolist() == [100, 50, 0, 1]
    assert tables.covered[0, :101].tolist() == list(range(0, 6401, 64)) and tables.covered[2, 1] == 256
