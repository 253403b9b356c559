"""Pages that SGLang's HiCache loads back come as any others do: handed out by the allocator, then found in the tree.

A world whose tree keeps on the host what it frees. Loaded keys and values are there when the layers of the forward run for
which they were asked, not at its head. Red when: a loaded page shows the clusters that its place had before; it is not
clustered for its row; something is built from it before it was loaded; the model of a load that comes too late, which
shows as wrong clusters, would not be noticed.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.memory.index import UNCLUSTERED
from tests.support.scenes import PAGE
from tests.support.world import World, question, served, stream

TEXT = stream(1, 700)


def evicted(world: World) -> None:
    """A text was served and ended; its pages are on the host alone, and others were clustered in their places."""
    world.finish(served(world, TEXT))
    world.evict(1000)
    assert not world.tree
    world.finish(served(world, question(1, 900), decoded=2))
    world.evict(1000)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("lags", [False, True])
def test_what_is_loaded_is_unclustered_at_first_and_clustered_for_its_row(overlap: bool, lags: bool) -> None:
    world = World(pages=70, overlap=overlap, lags=lags, hicache=True)
    evicted(world)
    world.settle()
    before = world.engine.counters.segments
    request = world.submit([*TEXT, *question(2, 30)])
    assert world.found(request) == 688
    world.extend(request)
    world.settle()
    assert world.loaded == 688 // PAGE
    pages = world.pages(request, 0, 688)
    assert (world.index.page_state[pages, 0] == UNCLUSTERED).all(), "the clusters of what was there before"
    assert not torch.isnan(world.scene.keys[0][pages * PAGE]).any()
    world.decode(request, steps=2)
    world.settle()
    assert world.engine.counters.segments > before and world.segments(request)
    assert not world.is_dirty(request)


def test_part_of_a_path_may_be_on_the_device_and_running() -> None:
    """One request holds the beginning; another loads what follows it, and both decode on."""
    world = World(pages=150, hicache=True)
    first = served(world, [*TEXT[:400], *question(3, 20)])
    world.finish(served(world, TEXT))
    world.evict(1000)
    second = world.submit([*TEXT, 1])
    world.extend(second)
    assert 0 < world.loaded < 688 // PAGE
    world.decode(first, second, steps=150)
    assert not world.is_dirty(second) and not world.engine.counters.faults


def test_what_a_request_computed_again_goes_back_to_its_place_in_the_tree() -> None:
    """It was admitted before the text was put on the host, so it prefilled all of it; SGLang keeps its pages."""
    world = World(pages=150, hicache=True)
    first, second = (world.submit(TEXT) for _ in range(2))
    world.extend(first, second)
    world.finish(first, in_flight=0)
    world.evict(1000)
    assert world.on_host and not world.loaded
    own = world.pages(second)
    world.decode(second, steps=4)
    assert torch.equal(world.pages(second, 0, 688), own[:43])
    assert world.segments(second) and not world.is_dirty(second)


def test_a_load_that_comes_after_the_next_head_would_be_noticed() -> None:
    world = World(pages=70, hicache=True)
    evicted(world)
    world.late_loads = 1
    request = world.submit([*TEXT, *question(2, 30)])
    world.extend(request)
    with pytest.raises(AssertionError):
        world.decode(request, steps=2)
