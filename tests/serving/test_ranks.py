"""Two tensor-parallel ranks replay the same graph over the same lists in every launch, whatever fails on one of them.

Each rank is an engine over its own kv head and a thread; they meet where SGLang's ranks would. The lists are the definition's.
Red when: ranks take different graphs, or one takes none, in any launch; a fault on one rank is not overcome; lists of ranks
without a fault differ; or a step that another rank made dense is counted otherwise. Without the agreement it is red.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters import build, decoding
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.lists import triton as lists_triton
from sglang_clusterkv.memory.step import first_requests
from sglang_clusterkv.serving import ranks
from tests.support.scenes import Scene

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, recluster_every=64)
LENGTHS = {1: 334, 2: 601, 3: 90}  # row 3 has too few tokens to cluster
CONTEXT, MOST = 1024, 3


class Group:
    """Two ranks that wait for each other and take the least that they say."""

    def __init__(self) -> None:
        self._meet = threading.Barrier(2, timeout=60)
        self._said: dict[int, int] = {}

    def least(self, number: int) -> int:
        self._said[threading.get_ident()] = number
        self._meet.wait()
        least = min(self._said.values())
        if self._meet.wait() == 0:
            self._said.clear()
        self._meet.wait()
        return least


class Ranks:
    """Two ranks with captured graphs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decoding, "takes_mixtures", lambda device: True)
        monkeypatch.setattr(decoding, "prepare", lambda *of: None)
        monkeypatch.setattr(decoding, "reserve", lambda *of: 1000)
        monkeypatch.setattr(lists_triton, "make", self.made)
        monkeypatch.setattr(ranks, "least_of_ranks", Group().least)
        self.scenes = [Scene(CONFIG, layers=1, kv_heads=1, head_dim=32, context=CONTEXT, seed=rank) for rank in (0, 1)]
        self.scenes[1].free_pages = list(self.scenes[0].free_pages)  # SGLang's allocators hand out the same
        self.lengths = dict(LENGTHS)
        for scene in self.scenes:
            for row, length in LENGTHS.items():
                scene.prefill(row, length)
            scene.engine.decoding.reserve(MOST, CONTEXT)
        self.packed: dict[int, np.ndarray] = {}

    def made(self, packed: Any, table: torch.Tensor, page_size: int, lists: Any) -> Any:
        """The kernel: what it is given is what the lists come to."""
        self.packed[table.data_ptr()] = packed.values
        return first_requests(lists, packed.batch)

    def launch(self, *rows: int) -> list[DecodeStep]:
        """A decode batch, on both ranks at once."""
        for row in rows:
            self.lengths[row] += 1
        self.packed.clear()
        steps: dict[int, DecodeStep] = {}

        def rank(number: int) -> None:
            scene = self.scenes[number]
            steps[number] = ranks.agreed(scene.engine, scene.decode([*rows], [self.lengths[row] for row in rows]))

        threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [steps[0], steps[1]]

    def labels(self, *rows: int) -> tuple[str, ...]:
        """What each rank does: the label of its graph, or why it runs without one."""
        return tuple("dense" if step.sparse is None else step.too_large or "sparse" for step in self.launch(*rows))

    def assert_together(self, *rows: int) -> str:
        one, other = self.labels(*rows)
        assert one == other
        return one

    def assert_same_lists(self) -> None:
        one, other = (self.packed[scene.req_to_token.data_ptr()] for scene in self.scenes)
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(monkeypatch)


def failing(name: str, owner: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call on this rank raises."""
    original: Callable[..., Any] = getattr(owner, name)
    left = [1]

    def raises(*of: Any, **named: Any) -> Any:
        if left and any(one is scene.index for one in of):
            left.clear()
            raise RuntimeError("a fault of the test")
        return original(*of, **named)

    monkeypatch.setattr(owner, name, raises)


def test_ranks_without_a_fault_have_the_same_graph_and_lists(two: Ranks) -> None:
    found = []
    for rows in ((1, 2, 3), (1,), (3,), (2, 3), *[(1, 2)] * 80):  # decoded tokens become segments too
        found.append(two.assert_together(*rows))
        if found[-1] == "sparse":
            two.assert_same_lists()
    assert set(found) == {"sparse", "dense"} and found[2] == "dense"
    segments = [scene.engine.server_info()["segments"] for scene in two.scenes]
    assert segments[0] == segments[1] > 4


def test_a_step_whose_lists_fail_on_one_rank_is_dense_on_all(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert two.assert_together(1, 2) == "sparse"
    failing("prepare", decoding, two.scenes[1], monkeypatch)
    assert two.assert_together(1, 2) == "dense"
    assert two.assert_together(1, 2) == "sparse"
    two.assert_same_lists()
    infos = [scene.engine.server_info() for scene in two.scenes]
    assert infos[0]["faults"] == {} and infos[1]["faults"] == {"lists": 1}
    assert infos[0]["dense_steps"] == infos[1]["dense_steps"] == {"fault": 2}
    assert infos[0]["sparse_steps"] == infos[1]["sparse_steps"] == 4


def test_ranks_stay_together_after_a_build_that_failed_on_one(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    failing("build_segments", build, two.scenes[0], monkeypatch)
    two.lengths[4] = 500
    for scene in two.scenes:
        scene.prefill(4, 500)
    found = [two.assert_together(4) for _ in range(8)]
    assert two.scenes[0].engine.counters.faults == {"build": 1}
    assert found[0] == "dense" and found[-1] == "sparse", found
    two.assert_same_lists()


def test_where_one_rank_has_no_room_all_run_without_a_graph(two: Ranks) -> None:
    """It may have other segments than the others for a while, after a fault."""
    room = two.scenes[1].engine.decoding.room
    assert room is not None
    two.scenes[1].engine.decoding.room = room._replace(segments=0)
    assert two.labels(1, 3) == ("rank", "segments")
    assert two.labels(3) == ("dense", "dense")


def test_without_an_agreement_they_part(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "least_of_ranks", lambda number: number)
    failing("prepare", decoding, two.scenes[1], monkeypatch)
    assert two.labels(1, 2) == ("sparse", "dense")


def test_without_graphs_nothing_is_asked(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "least_of_ranks", lambda number: pytest.fail("ranks were asked"))
    for scene in two.scenes:
        scene.engine.decoding.room = None
    two.launch(1, 2)
