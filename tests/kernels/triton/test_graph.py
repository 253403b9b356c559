"""A captured layer, replayed over other lists, is each request alone: for any mixture, with padding, whatever was there before.

The lists are the engine's own (clusters/decoding.py), written where the capture read them. Red when: a number of the batch is
baked into a launch, lists or workspace move, padding reaches a result, something is read before it is written or beyond a
request's counts, or a captured layer waits, copies or computes outside of its launches. Mutants show it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from sglang_clusterkv.clusters import decoding
from sglang_clusterkv.kernels.attend import triton as attend_triton
from sglang_clusterkv.kernels.decode import triton as decode_triton
from sglang_clusterkv.kernels.decode import triton_parts
from sglang_clusterkv.kernels.lists import triton as lists_triton
from sglang_clusterkv.kernels.merge import triton as merge_triton
from tests.support import graph as graph_support
from tests.support.captured_layer import CONFIG, GROUP, Served
from tests.support.graph import Graph, expect_red, mutated


def test_replays_are_each_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured over padding alone; then mixtures, from one request to as many as there is room for, and fewer again."""
    served = Served(monkeypatch)
    graph = served.capture()
    assert not graph.output.any()
    for rows in ((1,), (3, 2), (2, 5, 1, 4), (4, 3)):
        served.assert_replays(graph, *rows)
        served.assert_nothing_moved(graph)


@pytest.mark.parametrize(
    "fields",
    [
        {"estimate": False},
        pytest.param({"refine": False}, marks=pytest.mark.long),
        pytest.param({"estimate_clusters": 4096}, marks=pytest.mark.long),
    ],
)
def test_so_are_those_of_other_configurations(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch, msgspec.structs.replace(CONFIG, **fields))
    graph = served.capture()
    served.assert_replays(graph, 3, 1)


def test_a_step_that_finds_no_room_runs_beside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests than it was captured for: other lists and another workspace, and the graph goes on."""
    served = Served(monkeypatch)
    graph = served.capture()
    step = served.begin(1, 2, 3, 4, 5)
    assert step.too_large == "batch"
    q = served.scene.queries(5, GROUP)
    served.assert_close(served.layer(step, q), served.expected(step, q))
    assert served.decoder._reserved is not None and served.decoder.workspace.dot is not served.decoder._reserved.dot
    served.assert_replays(graph, 2, 3)
    served.assert_nothing_moved(graph)


@pytest.mark.parametrize("much", ["pages", "segments", "base", "clusters", "listed"])
def test_what_a_step_has_too_much_of_is_said(much: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch)
    assert served.begin(1).too_large is None
    room = served.engine.decoding.room
    assert room is not None
    served.engine.decoding.room = room._replace(**{much: 0})
    assert served.begin(1).too_large == much
    assert served.begin(3).too_large is None, "a step without lists"


def test_steps_that_fit_use_the_same_memory_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch)
    step = served.begin(1, 3)
    served.poison()
    q = served.q[:2]
    served.assert_close(served.layer(step, q), served.expected(step, q))
    assert served.decoder._reserved is not None and served.decoder.workspace.dot is served.decoder._reserved.dot


def test_options_stay_as_they_were_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch)
    with pytest.raises(ValueError, match="captured"):
        served.engine.set_step_options(budget_tokens=32)


def test_an_operation_beside_the_launches_ends_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    for operation in (lambda: torch.zeros(3), lambda: torch.ones(1).item(), lambda: torch.tensor([1.0]).nonzero()):
        with pytest.raises(AssertionError, match="in a captured step"):
            Graph(operation, monkeypatch)


# -- mutants -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mild(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison that names a place which is there: a mutant's wrong address would end the process."""
    monkeypatch.setattr(graph_support, "FAR", 2)


KERNELS = {"attend": attend_triton, "merge": merge_triton, "parts": triton_parts}
MUTANTS = [  # module, text, what it becomes
    ("merge", "tl.where(whole == 0.0, 1.0, whole)", "whole"),  # a NaN row
    ("merge", 'peak = tl.where(peak == float("-inf"), 0.0, peak)', "peak = peak"),  # likewise
    ("merge", "mask=sparse & (g == 0)", "mask=g == 0"),  # padding counted for the mass
    (
        "attend",
        "listing = tl.where(is_dense, pages + b * pages_stride,",
        "listing = tl.where(False, pages + b * pages_stride,",
    ),
    (
        "attend",
        "keyed = tl.where(sparse, tl.load(recalled_count + pair), whole)",
        "keyed = tl.load(recalled_count + pair)",
    ),
    (
        "parts",
        "pair, part - parts, splits, programs,",
        "pair, part - parts, splits, splits,",
    ),  # parts where others' lie
]


@pytest.mark.parametrize(("kernel", "old", "new"), MUTANTS)
def test_a_mutant_of_a_kernel_is_noticed(
    kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mild: None
) -> None:
    served = Served(monkeypatch)
    mutant = mutated(KERNELS[kernel], old, new, tmp_path)
    if kernel == "attend":
        monkeypatch.setattr(triton_parts, "attend_part", mutant.attend_part)
    else:
        monkeypatch.setattr(decode_triton, {"parts": "triton_parts"}.get(kernel, f"{kernel}_triton"), mutant)
    with expect_red():
        graph = served.capture()
        served.assert_replays(graph, 3, 1)


@pytest.mark.parametrize(
    "baked",
    ["page_count", *(pytest.param(one, marks=pytest.mark.long) for one in ("base_count", "dense_count", "offset"))],
)
def test_a_baked_count_is_noticed(baked: str, monkeypatch: pytest.MonkeyPatch, mild: None) -> None:
    """A graph that has a number of its capture."""
    served = Served(monkeypatch)
    captured = served.engine.decoding.captured

    def copied(batch: int):
        lists = captured(batch)
        return lists._replace(**{baked: getattr(lists, baked).clone()})

    monkeypatch.setattr(served.engine.decoding, "captured", copied)
    graph = served.capture()
    with expect_red():
        served.assert_replays(graph, 2, 3)


@pytest.mark.parametrize("what", ["lists", "workspace"])
def test_memory_that_moves_is_noticed(what: str, monkeypatch: pytest.MonkeyPatch, mild: None) -> None:
    served = Served(monkeypatch)
    graph = served.capture()
    room = served.engine.decoding.room
    assert room is not None
    if what == "workspace":
        served.decoder.reserve(room)
    else:
        served.engine.decoding._lists = decoding.empty_lists(room, torch.device("cpu"))
    with expect_red():
        served.assert_replays(graph, 1)
        served.assert_nothing_moved(graph)


def test_lists_that_leave_the_last_batch_behind_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mild: None
) -> None:
    """Requests beyond a batch must become padding."""
    served = Served(monkeypatch)
    graph = served.capture()
    mutant = mutated(lists_triton, "lists_kernel[(lists.batch, tiles)]", "lists_kernel[(shape.batch, tiles)]", tmp_path)
    monkeypatch.setattr(lists_triton, "make", mutant.make)
    with expect_red():
        served.assert_replays(graph, 2, 3)
        served.assert_replays(graph, 1)
