"""The page tables of the host tier: every device page is in one state, and pages leave in docs/design.md's order.

Red when: a device page is lost or has two pages, a page that was handed out again keeps its old device page or counts as
stored, the ring gives out a page twice, a pinned page or one of more value leaves first, or a write is sent to another
page's slots.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_clusterkv.memory.directory import Directory, stamp
from tests.support.rules import assert_directory


def refill(directory: Directory, count: int, pinned: list[int] = ()) -> list[int]:
    """Fill the ring; returns the pages that left."""
    victims = directory.victims(count, torch.tensor(pinned, dtype=torch.int64))
    pages = directory.pages_on(victims)
    directory.drop(victims)
    directory.append(victims, directory.tail)
    directory.filled(count)
    return [page for page in pages.tolist() if page]


def test_pages_leave_by_their_touch_after_free_ones_and_never_pinned() -> None:
    directory = Directory(20, 10, 2, 16, "cpu")
    for launch, pages in enumerate(([3, 4], [7, 8], [5, 6]), 1):
        directory.map(torch.tensor(pages), stamp(launch))
        refill(directory, 2)
    assert refill(directory, 0) == []
    directory.note(torch.tensor([3, 7]), torch.tensor([stamp(4, 1), stamp(4, 0)]))
    directory.map(torch.tensor([9, 10]), stamp(5))
    assert refill(directory, 2, pinned=[8]) == [], "two device pages were free"
    directory.map(torch.tensor([11, 12]), stamp(6))
    assert refill(directory, 2, pinned=[8, 0, 19]) == [4, 5]
    directory.map(torch.tensor([13, 14]), stamp(7))
    assert refill(directory, 2) == [8, 6]
    directory.map(torch.tensor([15]), stamp(8))
    assert refill(directory, 1) == [7], "of one found prefix the oldest positions leave first"
    directory.unmap(torch.tensor([9]))
    directory.map(torch.tensor([16, 17]), stamp(9))
    assert refill(directory, 2) == [3], "one that is free, then the least touched"
    assert_directory(directory)
    assert directory.stored.nonzero().flatten().tolist() == [3, 4, 5, 6, 7, 8]


def test_a_write_goes_to_the_page_s_device_slots_and_padding_to_padding() -> None:
    directory = Directory(20, 10, 4, 16, "cpu")
    directory.map(torch.tensor([5, 2]))
    slots = torch.tensor([0, 3, 5 * 16, 5 * 16 + 7, 2 * 16 + 15, 9 * 16 + 1])
    assert directory.translate(slots).tolist() == [0, 0, 16, 23, 47, 0]


def test_a_page_that_is_handed_out_again_is_new() -> None:
    directory = Directory(20, 10, 4, 16, "cpu")
    directory.map(torch.tensor([5, 6]))
    refill(directory, 2)
    directory.stored[5] = True
    directory.map(torch.tensor([5]))
    assert not directory.stored[5]
    assert_directory(directory)
    assert (directory.page_of == 5).sum() == 1
    directory.unmap(torch.tensor([5, 6, 7]))
    assert_directory(directory)
    assert not directory.device_page.any()


def test_a_ring_that_is_short_says_so_and_stays_as_it_was() -> None:
    directory = Directory(20, 10, 4, 16, "cpu")
    directory.map(torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="2 device pages are needed and 1 are free"):
        directory.map(torch.tensor([4, 5]))
    assert_directory(directory)
    directory.map(torch.tensor([4]))
    assert directory.device_page[1:5].all()


def test_a_page_that_was_dropped_gets_a_device_page_before_it_is_written() -> None:
    directory = Directory(20, 5, 2, 16, "cpu")
    directory.map(torch.tensor([1, 2]))
    refill(directory, 2)
    directory.map(torch.tensor([3, 4]))
    assert refill(directory, 2) == [1]
    at = directory.missing(torch.tensor([1, 3]), directory.take(2))
    assert at[0] == directory.device_page[1] > 0 and at[1] == 0
    assert not directory.stored[1]
    assert_directory(directory)


@given(data=st.data())
def test_no_order_of_events_loses_a_device_page(data: st.DataObject) -> None:
    directory = Directory(24, 12, 4, 16, "cpu")
    allocated: list[int] = []
    for launch in range(data.draw(st.integers(1, 25))):
        event = data.draw(st.sampled_from(["map", "map", "free", "refill", "refill", "clear"]))
        if event == "map":
            free = [page for page in range(1, 25) if page not in allocated]
            pages = data.draw(st.permutations(free))[: data.draw(st.integers(0, directory.ring_level))]
            directory.map(torch.tensor(pages, dtype=torch.int64), stamp(launch))
            allocated += pages
        elif event == "free":
            pages = data.draw(st.permutations(allocated))[: data.draw(st.integers(0, 5))]
            directory.unmap(torch.tensor(pages, dtype=torch.int64))
            allocated = [page for page in allocated if page not in pages]
        elif event == "refill":
            pinned = data.draw(st.permutations(allocated))[:4]
            left = refill(directory, directory.ring_pages - directory.ring_level, pinned)
            assert not set(left) & set(pinned)
        else:
            directory.clear()
            allocated = []
            assert directory.ring_level == directory.ring_pages
        assert_directory(directory)
        for page in allocated:
            assert directory.device_page[page] > 0 or directory.stored[page], "the page is in neither tier"
