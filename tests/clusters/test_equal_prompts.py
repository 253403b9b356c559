"""Requests with one prompt that arrive together: each is prefilled and clustered, then all share one set of clusters.

The scheduler matches a request with the radix tree when it admits it, so requests of one batch, or of the launch before the
first one's result, find nothing of each other. When their results come, the tree keeps the first one's pages and the others'
rows are rewritten to them.

Red when: copies of a prompt have other borders or other clusters than one alone has; a copy goes on with pages of its own, or
densely, after the tree's replaced them; a copy's end takes clusters from the others; a later request clusters again what the
burst left, or does not find it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
import torch

from tests.support import rules
from tests.support.scenes import PAGE
from tests.support.world import SMALL, Request, World, question, served, stream

TEXT = stream(1, 700)
COPIES = 3
SIZES = {"layers": 2, "kv_heads": 2}


def in_one_batch(world: World, copies: list[Request]) -> None:
    world.extend(*copies)


def one_after_the_other(world: World, copies: list[Request]) -> None:
    """Under overlap the second is admitted before the first one's result; the third finds it."""
    for request in copies:
        world.extend(request)


def the_last_one_in_chunks(world: World, copies: list[Request]) -> None:
    world.extend(*copies[:-1], (copies[-1], 320))
    world.extend(copies[-1])


def the_others_while_the_first_has_chunks(world: World, copies: list[Request]) -> None:
    """They match its first chunk, which the tree has by then."""
    world.extend((copies[0], 320))
    world.extend(*copies)


WHOLE = [in_one_batch, one_after_the_other]
IN_CHUNKS = [the_last_one_in_chunks, the_others_while_the_first_has_chunks]


def clusters(world: World, request: Request) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """Borders and tables of what a request sees."""
    return {(begin, end): world.tables(request, begin, end) for begin, end in world.segments(request)}


def assert_equal(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for border, tables in expected.items():
        for name, table in tables.items():
            assert torch.equal(found[border][name], table), f"{name} of {border}"


def burst(world: World, arrive: Callable[[World, list[Request]], None]) -> list[Request]:
    """Copies that have arrived and decode; every row that was rewritten was looked at."""
    copies = [world.submit(TEXT) for _ in range(COPIES)]
    arrive(world, copies)
    world.decode(*copies, steps=4)
    assert not any(map(world.is_dirty, copies))
    whole = len(TEXT) // PAGE * PAGE
    assert all(torch.equal(world.pages(r, end=whole), world.pages(copies[0], end=whole)) for r in copies), (
        "one set of pages"
    )
    return copies


def assert_found_later(world: World, copies: list[Request], expected: dict) -> None:
    """The copies end one by one; then a request with the prompt and a question sees the same, and makes nothing of it."""
    made = len(world.history)
    for request in copies[:-1]:
        world.finish(request)
    world.decode(copies[-1], steps=2)
    world.finish(copies[-1])
    before = world.engine.counters.tokens_reused
    found = clusters(world, served(world, TEXT + question(1, 3)))
    assert_equal({border: found[border] for border in list(found)[: len(expected)]}, expected)
    assert world.engine.counters.tokens_reused - before == sum(end - begin for begin, end in expected)
    assert all(m.begin >= max(expected)[1] for m in world.history[made:]), "nothing of it is clustered again"


@pytest.mark.parametrize("merge", [True, False], ids=["merging", "not merging"])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("arrive", WHOLE, ids=lambda arrive: arrive.__name__)
def test_copies_end_up_with_the_clusters_of_one(
    arrive: Callable[[World, list[Request]], None], overlap: bool, merge: bool
) -> None:
    config = msgspec.structs.replace(SMALL, merge_segments=merge)
    alone = World(config, overlap=overlap, **SIZES)
    expected = clusters(alone, served(alone, TEXT))
    world = World(config, overlap=overlap, **SIZES)
    copies = burst(world, arrive)
    for request in copies:
        assert_equal(clusters(world, request), expected)
        assert world.ids(request) == world.ids(copies[0]), "one set of clusters"
    assert_found_later(world, copies, expected)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
@pytest.mark.parametrize("arrive", IN_CHUNKS, ids=lambda arrive: arrive.__name__)
def test_copies_that_meet_in_their_chunks_agree(arrive: Callable[[World, list[Request]], None], overlap: bool) -> None:
    """Where one has the tree's pages in the middle of its prompt, a border lies there, for all of them."""
    world = World(overlap=overlap, **SIZES)
    copies = burst(world, arrive)
    expected = clusters(world, copies[-1])
    assert sum(end - begin for begin, end in expected) > len(TEXT) - SMALL.sink_tokens - 3 * SMALL.window_tokens
    ids = dict(zip(expected, world.ids(copies[-1]), strict=True))
    for request in copies:
        seen = dict(zip(world.segments(request), world.ids(request), strict=True))
        assert seen.items() <= ids.items()
        # The one whose open pages another clustered may attend to that piece instead.
        assert sum(end - begin for begin, end in ids.keys() - seen.keys()) <= SMALL.window_tokens
    assert_found_later(world, copies, expected)


def test_copies_of_one_batch_are_clustered_alike_before_the_tree_has_any() -> None:
    alone = World(**SIZES)
    expected = clusters(alone, served(alone, TEXT))
    world = World(**SIZES)
    copies = [world.submit(TEXT) for _ in range(COPIES)]
    world.extend(*copies)
    world.decode(*copies)
    # The lists of this step were made before the results of the prefill: each copy has pages of its own.
    assert [m.maker.rid for m in world.history] == [r.rid for r in copies for _ in expected], "as often as they came"
    for made in world.history:
        states = world.index.page_state
        pages = (states[:, 0] == made.make.id).nonzero().squeeze(1)
        pages = pages[states[pages, 1].argsort()]
        slots = (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()
        found = rules.stored_tables(world.index, pages, slots)
        assert_equal({(made.begin, made.end): found}, {(made.begin, made.end): expected[made.begin, made.end]})
