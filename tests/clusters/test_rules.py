"""docs/design.md's rules of cluster storage hold after every launch, whatever requests and the scheduler do.

`world.py` is the scheduler, `rules.py` the rules. First each rule's assertion is shown to fire when the engine is broken
(`make mutants` shows more, by the state machine of test_machine.py).

Red when: pages keep clusters that they had before they were handed out (1); a segment mixes pages found and written, or
reaches into its prompt's window (2); a row attends a segment that it does not see whole, or a rewritten one sparsely (3);
clusters are of other tokens than the row's (4) or depend on the batch (5); a token is attended twice or never (6).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from tests.support.mutants import MUTANTS
from tests.support.world import World, stream

TEXT = stream(1, 700)

# ---- the assertions fire


def pages_come_back(world: World) -> None:
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    world.retract(first)
    world.evict(50)
    world.extend(world.submit(stream(2, 700)))


def one_decodes(world: World) -> None:
    request = world.submit(TEXT)
    world.extend(request)
    world.decode(request, steps=3)


def twins_decode(world: World) -> None:
    batch = [world.submit(TEXT) for _ in range(2)]
    world.extend(*batch)
    world.decode(*batch, steps=4)


def one_branches(world: World) -> None:
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    second = world.submit(TEXT[:400] + stream(3, 300))
    world.extend(second)
    world.decode(first, second)


def a_page_is_handed_out_while_its_build_waits(world: World) -> None:
    world = World(lags=True)
    first = world.submit(TEXT[:300])
    world.extend(first)
    world.decode(first, steps=464 - 300)
    world.settle()
    world.decode(first)  # clusters aged tokens, when the forward's stream comes to it
    assert world.made and not world.settled
    world.retract(first)
    world.extend(second := world.submit(stream(2, 300)))
    world.settle()
    world.decode(second)
    world.settle()


def one_finds_its_window_clustered(world: World) -> None:
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    world.finish(first)
    second = world.submit(TEXT[:630] + [7])
    world.extend(second)
    world.decode(second)
    assert world.segments(second)[-1] == (528, 624)


@pytest.mark.parametrize(
    ("mutant", "scenario", "message"),
    [
        ("handed-out pages keep their clusters", pages_come_back, "rule 1: pages"),
        ("invalidated on the scheduler's stream", a_page_is_handed_out_while_its_build_waits, "rule 1: pages"),
        ("segments reach into the prompt's window", one_decodes, "rule 2: r1 made"),
        ("rewritten rows go on as they were", twins_decode, "rule 3: r2 sees"),
        ("only the one that cuts is told", one_branches, "rule 3: r1 sees"),
        ("tables of other keys", one_decodes, "rules 4, 5: r1 sees"),
        ("clusters inside the window", one_finds_its_window_clustered, "rule 6: "),
    ],
)
def test_a_broken_engine_is_noticed(mutant: str, scenario: Callable, message: str) -> None:
    scenario(World())
    with MUTANTS[mutant].broken(), pytest.raises(AssertionError, match=message):
        scenario(World())


# ---- rule 1 and 4: pages that are handed out again


def test_handing_out_changes_nothing_before_the_next_forward() -> None:
    """A decode step clusters aged tokens; while it runs its request is retracted and its pages are handed out."""
    world = World()
    first = world.submit(TEXT[:300])
    world.extend(first)
    world.decode(first, steps=465 - 300)
    (made,) = world.made
    assert (made.begin, made.end) == (272, 400), "this step clusters aged tokens"
    pages = world.pages(first, 304, 352)
    during = world.index.page_state.clone()
    world.retract(first)

    second = world.submit(stream(2, 300))
    begin_extend, before = world.engine.begin_extend, []
    world.engine.begin_extend = lambda extends: (before.append(world.index.page_state.clone()), begin_extend(extends))
    world.extend(second)
    assert torch.isin(pages, world.pages(second)).all(), "the scene: the new request has these pages"
    assert torch.equal(before[0], during), "only the forward stream writes page states"
    assert (world.index.page_state[world.pages(second), 0] < 0).all()
    world.decode(second)
    assert world.segments(second) == [(16, 224)]


def test_a_plan_for_a_row_that_ended_since_its_snapshot_is_dropped() -> None:
    world = World()
    first = world.submit(TEXT[:300])
    world.extend(first)
    world.decode(first, steps=464 - 300)  # the last of them looked at the row: its tokens are old enough
    world.retract(first)
    second = world.submit(stream(2, 300))
    world.extend(second)
    assert not world.made
    third = world.submit(stream(3, 300))
    world.extend(third)
    world.decode(second, third)
    assert world.segments(second) == world.segments(third) == [(16, 224)]


def test_a_row_of_another_request_is_not_taken_for_the_one_before() -> None:
    world = World()
    first, second = world.submit(TEXT), world.submit(stream(2, 400))
    world.extend(first)
    row = first.row
    world.abort(first)
    world.extend(second)
    assert second.row == row and not world.made
    world.decode(second)
    assert world.segments(second) == [(16, 272), (272, 336)]


# ---- rule 3: rows that change


def test_a_row_that_is_rewritten_between_snapshot_and_plan_stays_dense() -> None:
    world = World()
    first, second = world.submit(TEXT), world.submit(TEXT + stream(2, 100))
    world.extend(first, (second, 512))
    world.extend(second)
    assert world.is_dirty(first), "its row took the other's pages after this launch"
    step = world.decode(first, second)
    assert step.dense_at.tolist() == [0]
    # The second's checkpoint came after that launch and took the first's pages where its own had been.
    assert world.decode(first, second).dense_at.tolist() == [1]
    assert world.decode(first, second).dense is None and world.engine.counters.dense_steps == Counter(dirty=2)


def test_a_paused_request_keeps_what_it_saw() -> None:
    world = World()
    paused, other = world.submit(stream(1, 900)), world.submit(stream(2, 300))
    world.extend((paused, 400), other)
    world.decode(other)
    assert world.segments(paused) == [(16, 272)]
    branch = world.submit(stream(1, 200) + stream(3, 200))
    world.extend(branch)
    world.decode(other, branch)
    assert world.segments(paused) == [(16, 192), (192, 272)]
    assert world.ids(paused)[0] == world.ids(branch)[0]
    world.extend(paused)
    world.decode(other, branch, paused)
    assert world.segments(paused)[2:] == [(272, 528), (528, 784)]


# ---- rule 5: the same tokens, the same clusters


def test_clusters_do_not_depend_on_the_batch() -> None:
    sizes = {"layers": 2, "kv_heads": 2}
    alone = World(**sizes)
    request = alone.submit(TEXT)
    alone.extend(request)
    alone.decode(request)

    busy = World(pages=200, **sizes)
    busy.extend(busy.submit(stream(5, 333)))
    batch = [busy.submit(stream(6, 450)), busy.submit(TEXT), busy.submit(stream(7, 300))]
    busy.extend(batch[0], (batch[1], 64), batch[2])
    busy.extend((batch[1], 512))
    busy.extend(batch[1])
    busy.decode(*batch)
    busy.decode(*batch)
    assert alone.segments(request) == busy.segments(batch[1])
    for begin, end in alone.segments(request):
        others = busy.tables(batch[1], begin, end)
        for name, table in alone.tables(request, begin, end).items():
            assert torch.equal(table, others[name]), f"{name} of [{begin}, {end})"


def test_a_segment_that_is_rebuilt_is_what_it_was() -> None:
    world = World()
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    before = {border: world.tables(first, *border) for border in world.segments(first)}
    world.finish(first)
    world.evict(100)
    second = world.submit(TEXT)
    world.extend(second)
    world.decode(second)
    assert world.segments(second) == list(before)
    for border, tables in before.items():
        assert all(torch.equal(table, tables[name]) for name, table in world.tables(second, *border).items())
