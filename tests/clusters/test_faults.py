"""An exception in our own code costs speed, nothing else: the n-th call of each operation raises, for n all over a scenario
(for every n with CLUSTERKV_FAULTS=all).

Red when: the exception reaches the scheduler; a rule breaks (a token attended that is not the request's, a page lost, a
record left behind); it is not counted, or not said in a warning that names a setting; a step or a segment is counted that was
not made, or one twice; requests do not decode sparsely again afterwards, with the segments that they have without a fault.
Faults inside a layer: tests/serving/test_layer_faults.py.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from sglang_clusterkv.clusters import build, decoding
from sglang_clusterkv.clusters.counters import Faults
from sglang_clusterkv.clusters.decoding import DecodeLists
from sglang_clusterkv.clusters.planning import found, merging
from sglang_clusterkv.clusters.planning.planner import Planner
from sglang_clusterkv.clusters.planning.records import Records
from sglang_clusterkv.clusters.rows import RowTables
from sglang_clusterkv.clusters.snapshots import Snapshots
from sglang_clusterkv.memory.index import ClusterIndex
from tests.support import rules
from tests.support.world import SMALL, World, stream

EVERY_CALL = os.environ.get("CLUSTERKV_FAULTS") == "all"  # else some six of each operation's calls
CONFIG = msgspec.structs.replace(SMALL, merge_segments=True, recluster_every=64)
# Where it may happen, and what it is counted as.
OPERATIONS: dict[str, tuple[Any, str, set[str]]] = {
    "invalidate": (ClusterIndex, "invalidate", {"invalidate"}),
    "copy to the host": (Snapshots, "_copy", {"copy"}),
    "read the copy": (Snapshots, "read", {"copy"}),
    "plan": (Planner, "plan", {"plan"}),
    "cut in the plan": (found, "cut", {"plan"}),
    "walk": (found, "see_whole_segments", {"plan"}),
    "merge": (merging, "merge_neighbours", {"plan"}),
    "admit": (Records, "admit", {"admit"}),
    "rewrite": (Records, "rewritten", {"rewrite"}),
    "free": (Records, "free", {"free", "admit"}),
    "cut": (ClusterIndex, "forget", {"cut"}),
    "build": (build, "build_segments", {"build"}),
    "mark": (ClusterIndex, "mark", {"build"}),
    "publish": (RowTables, "write", {"plan", "admit"}),
    "lists": (DecodeLists, "sparse", {"lists"}),
    "memory of the layers": (decoding, "prepare", {"lists"}),
    "dense lists": (decoding, "dense_step", {"lists"}),
    "all lists": (DecodeLists, "step", {"lists"}),
}


def scenario(world: World) -> None:
    """Twins, a branch, a chat, aged tokens, a retraction and an abort: every operation is called."""
    chat = world.submit(stream(4, 150))
    world.extend(chat)
    world.decode(chat)
    world.finish(chat)
    chat = world.submit(chat.tokens + stream(5, 100))  # its two segments of 64 tokens become one
    world.extend(chat)
    world.decode(chat)
    world.finish(chat)
    twins = [
        world.submit(stream(1, 399)) for _ in range(2)
    ]  # leaves 48 tokens, which soon are a run with what is decoded
    world.extend(*twins)
    world.decode(*twins, steps=5)
    branch = world.submit(stream(1, 220) + stream(2, 180))
    world.extend((branch, 64))
    world.extend(branch)
    world.decode(*twins, branch, steps=3)
    world.retract(branch)
    world.finish(twins[0])
    turn = world.submit(twins[0].tokens + stream(3, 150))
    world.extend(turn)
    world.extend(branch)
    world.decode(twins[1], turn, branch, steps=4)
    world.abort(branch)
    world.finish(twins[1])
    world.finish(turn)


class Nth:
    """Stands in for a function: its n-th call raises, or none where n is 0.

    Args:
        original: the function.
        n: which call.
        before: whether to raise before it has done its work, else after it.
    """

    def __init__(self, original: Callable[..., Any], n: int, before: bool) -> None:
        self._original, self._n, self._before = original, n, before
        self.calls = 0

    def __get__(self, instance: Any, owner: Any) -> Callable[..., Any]:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self._n and self._before:
            raise RuntimeError("a fault of the test")
        result = self._original(*args, **kwargs)
        if self.calls == self._n:
            raise RuntimeError("a fault of the test")
        return result


@contextlib.contextmanager
def fault(operation: str, n: int, before: bool = True) -> Iterator[Nth]:
    """The n-th call of an operation raises."""
    owner, name, _ = OPERATIONS[operation]
    nth = Nth(getattr(owner, name), n, before)
    with patch.object(owner, name, nth):
        yield nth


def world_with_faults() -> World:
    world = World(CONFIG)
    world.may_fault = True
    return world


def assert_nothing_is_left(world: World) -> None:
    assert not world.running and not world.engine.records.rows and not world.engine.tables.known.any()
    rules.assert_partition(world)


def later(world: World) -> tuple[int, list[tuple[int, int]]]:
    """A new request, some steps after: how many of its steps were sparse, and its segments."""
    idle = world.submit(stream(8, 40))
    world.extend(idle)
    world.decode(idle, steps=4)  # as long as the engine may wait before it looks again
    world.finish(idle)
    request = world.submit(stream(9, 700))
    world.extend(request)
    world.decode(request, steps=2)
    before = world.engine.counters.sparse_steps
    world.decode(request, steps=3)
    segments = world.segments(request)
    world.finish(request)
    return world.engine.counters.sparse_steps - before, segments


@pytest.fixture(scope="module")
def calls() -> dict[str, int]:
    """How often the scenario calls each operation."""
    counted = {}
    for operation in OPERATIONS:
        world = world_with_faults()
        with fault(operation, 0) as nth:
            scenario(world)
        counted[operation] = nth.calls
        assert not world.engine.counters.faults and world.engine.counters.merges and world.engine.counters.splits
    assert min(counted.values()) > 0, f"the scenario does not call everything: {counted}"
    return counted


@pytest.mark.parametrize("before", [True, False], ids=["before its work", "after its work"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_nth_call_raises(
    operation: str, before: bool, calls: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    clean = later(World(CONFIG))
    most = calls[operation]
    every = range(1, most + 1)
    for n in every if EVERY_CALL or most <= 6 else sorted({1, 2, 3, *every[3 :: max(1, most // 4)], most}):
        caplog.clear()
        world = world_with_faults()
        with fault(operation, n, before), caplog.at_level(logging.WARNING):
            scenario(world)
        said = f"call {n} of {most} of {operation}"
        faults = world.engine.counters.faults
        assert sum(faults.values()) == 1 and set(faults) <= OPERATIONS[operation][2], f"{said}: {faults}"
        warnings = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
        assert len(warnings) == 1 and "--mem-fraction-static" in warnings[0], f"{said}: {warnings}"
        if operation in ("build", "mark"):
            made = [m for i, m in enumerate(world.history, 1) if i != n]
            counted = (world.engine.counters.segments, world.engine.counters.merges)
            assert counted == (len(made), sum(m.merged for m in made)), f"{said}: segments and merges {counted}"
        assert_nothing_is_left(world)
        assert later(world) == clean, said


@pytest.mark.parametrize("operation", ["build", "plan", "copy to the host", "cut"])
def test_what_always_fails_is_tried_less_and_less(operation: str) -> None:
    world = world_with_faults()
    owner, name, counted = OPERATIONS[operation]

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a fault of the test")

    first = world.submit(stream(1, 500))
    if operation == "cut":
        world.extend(first)
        world.decode(first, steps=2)
    with patch.object(owner, name, fails):
        second = world.submit(stream(1, 300) + stream(2, 200))
        world.extend(*([] if first.running else [first]), second)
        world.decode(first, second, steps=200)
    faults = sum(world.engine.counters.faults[kind] for kind in counted)
    assert 1 <= faults <= 24, f"{faults} tries in 200 steps"
    assert world.engine.counters.dense_steps["fault"] > 0, "dense steps have their reason"
    world.finish(first)
    world.finish(second)
    assert_nothing_is_left(world)


def test_one_warning_a_minute(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import Counter

    counts: Counter[str] = Counter()
    faults, now = Faults(counts), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for second in range(150):
        now[0] = float(second)
        faults.note("build", RuntimeError("out of memory"))
        faults.note("plan", ValueError("a bug"))
    assert counts == {"build": 150, "plan": 150}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 6 and sum("build failed (RuntimeError: out of memory), " in m for m in messages) == 3
    assert sum(record.exc_info is not None for record in caplog.records) == 2, "the traceback is said once for each"
