"""Segments are made together where that saves launches, in the order of their plan, and pages of others are noticed.

Red when: a plan's operations change their order, a call takes more than it may, a segment of a call that failed is believed
to be there, or pages that were another segment's are marked without being counted and told, or with a wait for the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_clusterkv.clusters import build, building
from sglang_clusterkv.clusters.planning.plan import Forget, Make, Plan
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import ClusterIndex
from tests.support import rules
from tests.support.scenes import Scene
from tests.support.waits import Waits
from tests.support.world import World, stream

PAGES = 399


def plan_of(*pages: int) -> Plan:
    """Segments of so many pages in a row; 0: one is forgotten."""
    return Plan([Make(i, 1, 100 * i, count) if count else Forget(i) for i, count in enumerate(pages)])


def ids(plan: Plan, most_pages: int) -> list[list[int] | int]:
    return [[make.id for make in call] if isinstance(call, list) else call.id for call in plan.calls(most_pages)]


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (0, [[0], [1], 2, [3], [4], [5]]),
        (8, [[0, 1], 2, [3, 4], [5]]),
        (12, [[0, 1], 2, [3, 4, 5]]),
        (7, [[0], [1], 2, [3], [4], [5]]),
    ],
)
def test_neighbours_in_a_plan_are_made_together(most: int, expected: list[list[int] | int]) -> None:
    """Each counts as the longest of its call; what is forgotten keeps its place."""
    assert ids(plan_of(4, 4, 0, 4, 4, 4), most) == expected


def test_a_segment_that_is_larger_than_a_call_is_made_alone() -> None:
    assert ids(plan_of(30, 3, 3), 8) == [[0], [1, 2]]
    assert ids(plan_of(3, 3, 4, 3), 8) == [[0, 1], [2, 3]]
    assert ids(plan_of(0, 0), 8) == [0, 1]


def test_calls_are_bounded_in_bytes() -> None:
    """Llama-3.1-8B: five segments of 1,024 tokens; with a copy of their keys and values one, however large."""
    index = ClusterIndex(ClusterKVConfig(), Geometry(32, 8, 128, 16, 8), "cpu")
    assert 5 * 1024 <= build.tokens_per_call(index, copied=False) < 6 * 1024
    assert build.tokens_per_call(index, copied=True) < 1024
    assert build.tokens_per_call(ClusterIndex(ClusterKVConfig(), Geometry(32, 1, 128, 16, 8), "cpu"), False) > 40 * 1024


def prefilled(pages_per_call: int) -> World:
    world = World(pages=PAGES, pages_per_call=pages_per_call)
    for name in (1, 2):
        request = world.submit(stream(name, 900))
        world.extend(request)
        world.decode(request, steps=2)
    return world


def test_one_call_makes_what_several_make(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    built = build.build_segments

    def counted(index: Any, segment_ids: list[int], *of: Any) -> None:
        if index.geometry.pages == PAGES:  # else it is the rules' own
            calls.append(len(segment_ids))
        built(index, segment_ids, *of)

    monkeypatch.setattr(build, "build_segments", counted)
    alone, together = prefilled(0), prefilled(1000)
    assert calls == [1] * 6 + [3] * 2
    for name, array in alone.index.arrays.items():
        assert torch.equal(array.view(torch.uint8), together.index.arrays[name].view(torch.uint8)), name
    assert alone.engine.counters.segments == together.engine.counters.segments == sum(calls) // 2


def test_a_call_that_failed_made_none_of_its_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    built = build.build_segments

    def fails(*of: Any) -> None:
        monkeypatch.setattr(build, "build_segments", built)
        raise RuntimeError("a fault of the test")

    world = World(pages_per_call=1000)
    world.may_fault = True
    request = world.submit(stream(1, 900))
    world.extend(request)
    monkeypatch.setattr(build, "build_segments", fails)
    world.decode(request)
    assert world.engine.counters.faults == {"build": 1} and world.engine.counters.segments == 0
    assert world.is_dirty(request)
    world.decode(request, steps=6)
    assert len(world.segments(request)) >= 3 and not world.is_dirty(request)
    rules.assert_rules(world)


def marked_twice() -> ClusterIndex:
    """Pages 2 and 3 of a segment become another one's."""
    index = Scene(ClusterKVConfig()).index
    index.mark([7, 8], [torch.tensor([2, 3, 4, 5]), torch.tensor([9, 10, 11, 12])])
    assert int(index.violations[0]) == 0
    assert index.page_state[[2, 5, 9]].tolist() == [[7, 0, 4], [7, 3, 4], [8, 0, 4]]
    with Waits():
        index.mark([9], [torch.tensor([3, 2, 6, 13])])
    return index


def test_pages_of_another_segment_are_counted_where_they_are_marked() -> None:
    index = marked_twice()
    assert int(index.violations[0]) == 2
    assert index.page_state[[3, 2, 13]].tolist() == [[9, 0, 4], [9, 1, 4], [9, 3, 4]]
    index.forget([9])
    index.mark([10], [torch.tensor([3, 2, 6, 13])])
    assert int(index.violations[0]) == 2, "forgotten pages are nobody's"


def test_such_pages_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene(ClusterKVConfig())
    scene.index.violations[0] += 2
    for _ in range(2):
        assert scene.engine.server_info()["build_conflicts"] == 2
    scene.index.violations[0] += 1
    assert scene.engine.server_info()["build_conflicts"] == 3
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "2 pages were clustered while they were another segment's" in told[0]
    assert "1 pages" in told[1] and "3 so far" in told[1]


def test_a_build_over_another_segment_is_a_conflict_without_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where nothing asks before: the plan's mistake shows in the count."""
    monkeypatch.setattr(building.Builder, "_unclustered", lambda *of: True)
    scene = Scene(ClusterKVConfig())
    scene.prefill(1, 700)
    make = Make(5, 1, 1, 8)
    scene.engine.builder.make([make], set())
    assert scene.engine.server_info()["build_conflicts"] == 0
    scene.engine.builder.make([make._replace(id=6, first_page=5)], set())
    assert scene.engine.server_info()["build_conflicts"] == 4
