"""A captured layer in which FlashInfer attends, replayed over other lists, is each request alone.

FlashInfer is the stand-in of tests/support: a captured run keeps the numbers of the plan that it was captured with, and reads
what the last plan wrote to memory. Red when: a replay finds another step's plan, what a run reads or writes moves, padding's
part is merged, its log-sum-exps are merged as natural ones, or a plan is written over one whose copy may still wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sglang_clusterkv.kernels.attend import flashinfer, triton_index
from sglang_clusterkv.kernels.decode import triton as decode_triton
from sglang_clusterkv.kernels.merge import triton as merge_triton
from tests.support import flashinfer_stand_in as stand_in
from tests.support.captured_layer import CONFIG, GRAPH, Served
from tests.support.graph import Graph, expect_red, mutated

HEADS = 2
FLASHINFER = msgspec.structs.replace(CONFIG, attend_engine="flashinfer")


@pytest.fixture(autouse=True)
def _stand_in(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("launches are captured in the interpreter")
    stand_in.install(monkeypatch, HEADS)
    monkeypatch.setattr(flashinfer, "_said", set())


def served_by(monkeypatch: pytest.MonkeyPatch, **fields: object) -> Served:
    # The interpreter cuts bf16 off instead of rounding it.
    config = msgspec.structs.replace(FLASHINFER, **fields)
    return Served(monkeypatch, config, kv_heads=HEADS, head_dim=64, dtype=torch.float16, tolerance=3e-3)


def engine_of(served: Served) -> flashinfer.FlashInferAttend:
    engine = served.decoder.engine
    assert engine is not None
    return engine


def test_replays_are_each_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured over padding alone; then mixtures, whose dense requests have lists that are split, and padding."""
    served = served_by(monkeypatch)
    graph = served.capture()
    assert not graph.output.any()
    wrapper = engine_of(served)._captured[GRAPH].wrapper
    captured, plans = wrapper._info, wrapper.plans
    for number, rows in enumerate(((1,), (3, 2), (2, 5, 1, 4), (4, 3)), 1):
        served.assert_replays(graph, *rows)
        served.assert_nothing_moved(graph)
        assert wrapper.plans == plans + number, "one plan for each step"
        assert wrapper._info == captured, "what a run is launched with follows from the number of requests alone"
    assert wrapper.runs == 2, "once before the capture, and in it"


@pytest.mark.parametrize("fields", [{"estimate": False}, {"refine": False}])
def test_so_are_those_of_other_configurations(fields: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    served = served_by(monkeypatch, **fields)
    served.assert_replays(served.capture(), 3, 1)


def test_steps_without_a_graph_run_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that finds no room, and one that SGLang runs without a graph although it fits."""
    served = served_by(monkeypatch)
    graph = served.capture()
    for rows, too_large in (((1, 2, 3, 4, 5), "batch"), ((3, 1), None)):
        step = served.begin(*rows)
        assert step.too_large == too_large
        q = served.scene.queries(len(rows), served.heads).to(served.q.dtype)
        served.assert_close(served.layer(step, q), served.expected(step, q))
        served.assert_replays(graph, 2, 3)
        served.assert_nothing_moved(graph)


def test_lists_beyond_their_room_run_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    served = served_by(monkeypatch)
    graph = served.capture()
    room = served.engine.decoding.room
    assert room is not None and room.listed == min(GRAPH * 1024, 3 * served.scene.index.geometry.slots // 2)
    served.engine.decoding.room = room._replace(listed=200)
    step = served.begin(3, 1, 4)
    assert step.too_large == "listed"
    served.engine.decoding.room = room
    served.assert_replays(graph, 3, 1)


def test_a_step_may_be_padded_further_than_it_has_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes are captured, and SGLang replays the larger one: its plan is made in front of the replay."""
    served = served_by(monkeypatch)
    served.engine.decoding.captured(2)
    graph = served.capture()
    small, large = (engine_of(served)._captured[batch].wrapper for batch in (2, GRAPH))
    plans = small.plans, large.plans
    served.assert_replays(graph, 1)
    assert (small.plans, large.plans) == (plans[0] + 1, plans[1] + 1)
    served.begin(1)
    served.engine.decoding.replay(2)
    assert (small.plans, large.plans) == (plans[0] + 2, plans[1] + 1), "once, where it fits"


def test_a_plan_is_not_written_over_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its copy to the device may wait for a forward that the host is ahead of."""
    served = served_by(monkeypatch)
    served.capture()
    wrapper = engine_of(served)._captured[GRAPH].wrapper
    served.begin(1)
    staged = wrapper._pin_memory_int_workspace_buffer
    kept = staged.clone()
    served.begin(3, 2)
    assert wrapper._pin_memory_int_workspace_buffer is not staged and torch.equal(staged, kept)
    assert len({one.data_ptr() for one in engine_of(served)._staging}) == 2
    assert not torch.equal(wrapper._pin_memory_int_workspace_buffer, kept), "plans of other lists"


def test_wrappers_share_what_one_step_needs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    served = served_by(monkeypatch)
    for batch in range(1, GRAPH + 1):
        served.engine.decoding.captured(batch)
    wrappers = [run.wrapper for run in engine_of(served)._captured.values()]
    assert len(wrappers) == GRAPH
    assert len({wrapper._int_workspace_buffer.data_ptr() for wrapper in wrappers}) == 1
    assert len({wrapper._float_workspace_buffer.data_ptr() for wrapper in wrappers}) == 1


def test_where_it_cannot_be_planned_for_graphs_ours_attends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flashinfer, "graph_partial_bytes", lambda *_: 64)
    with caplog.at_level(logging.INFO):
        served = served_by(monkeypatch)
    (line,) = [record.message for record in caplog.records if "attend_engine" in record.message]
    assert "our own kernel attends: it cannot be planned for decode graphs (AssertionError: buffer overflow" in line
    assert served.decoder.engine is None and served.decoder._reserved is not None
    assert served.decoder._reserved.exact_output.numel() > 0, "our own kernel has room for its parts"


def test_memory_that_lacks_for_captured_steps_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    served = served_by(monkeypatch)

    def short(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GB")

    monkeypatch.setattr(engine_of(served), "reserve", short)
    room = served.engine.decoding.room
    assert room is not None
    with pytest.raises(torch.OutOfMemoryError):
        served.decoder.reserve(room)


# -- mutants -------------------------------------------------------------------------------------------------------------


def no_plan(served: Served, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is not planned: the graph reads what was planned for its capture."""
    monkeypatch.setattr(engine_of(served), "_plan_fast", lambda *_, **__: None)


def plan_of_others(served: Served, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that the plan gives to lists as they were in the step before; where lists begin is of this step."""
    served.begin(2)
    memory = engine_of(served)._plan_memory
    assert memory is not None
    kept, plan = memory.clone(), engine_of(served)._plan_fast

    def mutant(*of: Any, **named: Any) -> None:
        plan(*of, **named)
        memory.copy_(kept)

    monkeypatch.setattr(engine_of(served), "_plan_fast", mutant)


def moved_buffers(served: Served, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs read and write is made anew behind the capture."""
    room = served.engine.decoding.room
    assert room is not None
    engine_of(served).reserve(room, FLASHINFER.budget_tokens)
    served.engine.decoding.captured(GRAPH)


def moved_plan(served: Served, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans go to other memory than the capture reads."""
    engine = engine_of(served)
    assert engine._plan_memory is not None
    engine._captured[GRAPH].wrapper._int_workspace_buffer = torch.empty_like(engine._plan_memory)


def base_e(served: Served, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    """A FlashInfer whose log-sum-exps are natural."""
    monkeypatch.setattr(stand_in.Wrapper, "base", 2.718281828)


BEHIND_THE_CAPTURE: dict[str, Callable[[Served, Graph, pytest.MonkeyPatch], None]] = {
    one.__name__: one for one in (no_plan, plan_of_others, moved_buffers, moved_plan, base_e)
}


@pytest.mark.parametrize("mutant", BEHIND_THE_CAPTURE)
def test_a_mutant_behind_the_capture_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served = served_by(monkeypatch)
    graph = served.capture()
    served.assert_replays(graph, 2)
    BEHIND_THE_CAPTURE[mutant](served, graph, monkeypatch)
    with expect_red():
        served.assert_replays(graph, 3, 1)
        served.assert_nothing_moved(graph)


MUTANTS = {  # module, text, what it becomes
    "padding is merged": (
        merge_triton,
        "splits = tl.where(tl.load(base_count + request) + tl.load(dense_count + request) > 0, splits, 0)",
        "splits = tl.where(request >= 0, splits, 0)",
    ),
    "natural log-sum-exps": (merge_triton, "math.log(2),", "1.0,"),
    "queries are left": (triton_index, "mask=i < QUERIES)\n    if", "mask=i < 0)\n    if"),
    "recalled tokens over the others": (
        triton_index,
        "tl.load(indptr + pair) + tl.load(base_count + request)",
        "tl.load(indptr + pair)",
    ),
    "padding has no list": (
        triton_index, "listed = t < tl.maximum(tl.where(dense > 0, dense, count), 1)", "listed = t < count",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_a_kernel_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, old, new = MUTANTS[mutant]
    broken = mutated(module, old, new, tmp_path)
    if module is merge_triton:
        monkeypatch.setattr(decode_triton, "merge_triton", broken)
    else:
        for name in ("list_always", "lay_out"):
            monkeypatch.setattr(flashinfer, name, getattr(broken, name))
    with expect_red():
        served = served_by(monkeypatch)
        graph = served.capture()
        served.assert_replays(graph, 3, 1)


@pytest.mark.parametrize(("pairs", "group", "channels"), [(8, 4, 128), (2048, 4, 128), (640, 8, 256), (300, 24, 64)])
def test_partial_results_have_the_room_that_a_plan_asks_for(pairs: int, group: int, channels: int) -> None:
    lengths = np.random.default_rng(pairs).integers(1, 3000, pairs)
    memory = np.zeros(stand_in.PLAN_BYTES, np.uint8)
    _, _, taken = stand_in.plan(lengths, group, channels, True, 132, memory)
    assert taken <= flashinfer.graph_partial_bytes(pairs, group, channels, 132) <= taken + 32
