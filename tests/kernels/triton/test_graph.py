"""A captured layer, replayed over other lists, is each request alone: for any mixture, with padding, whatever was there before.

The lists are the engine's own (clusters/decoding.py), written where the capture read them. Red when: a number of the batch is
baked into a launch, lists or workspace move, padding reaches a result, something is read before it is written or beyond a
request's counts, or a captured layer waits, copies or computes outside of its launches. Mutants show it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters import decoding
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.attend import triton as attend_triton
from sglang_clusterkv.kernels.decode import reference, triton_parts
from sglang_clusterkv.kernels.decode import triton as decode_triton
from sglang_clusterkv.kernels.decode.triton import TritonDecoder, decoder_of, sparse_decode
from sglang_clusterkv.kernels.lists import triton as lists_triton
from sglang_clusterkv.kernels.merge import triton as merge_triton
from sglang_clusterkv.memory.step import dense_step, sparse_step
from tests.support import graph as graph_support
from tests.support.filled import SCALE, assert_close
from tests.support.graph import Graph, expect_red, poison_lists, poison_workspace
from tests.support.scenes import PAGE, Scene

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
LENGTHS = {1: 334, 2: 601, 3: 90, 4: 420, 5: 17}  # rows 3 and 5 have too few tokens to cluster: they are dense
GROUP, HEAD_DIM, CONTEXT = 2, 32, 1024
GRAPH = 4  # requests that the graph is captured for


class Served:
    """An engine whose lists take mixtures, as on a GPU, and one layer of captured steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: ClusterKVConfig = CONFIG, room: int = GRAPH) -> None:
        monkeypatch.setattr(decoding, "takes_mixtures", lambda device: True)
        monkeypatch.setattr(decoding, "prepare", lambda index, group, _, step: decoder_of(index, group).prepare(step))
        self.monkeypatch = monkeypatch
        self.scene = Scene(config, layers=1, kv_heads=1, head_dim=HEAD_DIM, context=CONTEXT)
        self.lengths = dict(LENGTHS)
        for row, length in LENGTHS.items():
            self.scene.prefill(row, length)
        self.engine = self.scene.engine
        self.engine.begin_decode(np.array([1]), np.array([LENGTHS[1]]))  # what was prefilled is clustered at this head
        self.engine.decoding.reserve(room, CONTEXT)
        self.q = torch.full((room, GROUP, HEAD_DIM), torch.nan)

    @property
    def decoder(self) -> TritonDecoder:
        return decoder_of(self.scene.index, GROUP)

    def layer(self, step: DecodeStep, q: torch.Tensor) -> torch.Tensor:
        assert step.sparse is not None
        return sparse_decode(q, self.scene.keys[0], self.scene.values[0], self.scene.index, 0, step.sparse, SCALE)

    def capture(self) -> Graph:
        lists = self.engine.decoding.captured(GRAPH)
        step = DecodeStep(None, lists, None, None, np.zeros(0), np.zeros(0))
        return Graph(lambda: self.layer(step, self.q[:GRAPH]), self.monkeypatch)

    def begin(self, *rows: int) -> DecodeStep:
        """The next step of these requests, and their queries."""
        for row in rows:
            self.lengths[row] += 1
        step = self.scene.decode([*rows], [self.lengths[row] for row in rows])
        self.q.fill_(torch.nan)
        self.q[: len(rows)] = self.scene.queries(len(rows), GROUP)[: len(self.q)]
        return step

    def expected(self, step: DecodeStep, q: torch.Tensor) -> torch.Tensor:
        """Each request by the references, by lists of its own."""
        assert step.reasons is not None
        outputs = []
        pool = self.scene.keys[0], self.scene.values[0]
        for b, reason in enumerate(step.reasons):
            rows, lengths = step.rows[b : b + 1], step.seq_lens[b : b + 1]
            if reason:
                dense = dense_step(rows, lengths, self.scene.req_to_token)
                outputs.append(attend_reference.dense_decode(q[b : b + 1], *pool, dense.slots, dense.seq_lens, SCALE))
                continue
            count = self.engine.tables.recallable(rows, lengths)
            lists = sparse_step(self.engine.decoding._borders(rows, lengths, count), self.scene.req_to_token, PAGE)
            kept = self.scene.index.mass_cells.clone()
            outputs.append(reference.sparse_decode(q[b : b + 1], *pool, self.scene.index, 0, lists, SCALE))
            self.scene.index.mass_cells.copy_(kept)
        return torch.cat(outputs)

    def poison(self) -> None:
        assert self.decoder._reserved is not None
        poison_workspace(self.decoder._reserved)
        poison_lists(self.engine.decoding.captured(GRAPH), PAGE)

    def assert_replays(self, graph: Graph, *rows: int) -> None:
        step = self.begin(*rows)
        assert step.too_large is None and step.counts is not None
        before = self.scene.index.mass[0, 1]
        self.poison()
        result = graph.replay()
        assert_close(result[: len(rows)], self.expected(step, self.q[: len(rows)]), torch.float32)
        assert not result[len(rows) :].any(), "padding gives 0"
        assert self.scene.index.mass[0, 1] == before + GROUP * step.counts.sparse, "the mass counts sparse requests"

    def assert_nothing_moved(self, graph: Graph) -> None:
        """What the graph writes and reads of ours is what the engine has."""
        workspace, lists = self.decoder._reserved, self.engine.decoding.captured(GRAPH)
        assert workspace is not None
        ours = [value for value in vars(workspace).values() if isinstance(value, torch.Tensor)]
        used = graph.addresses()
        missing = {value.data_ptr() for value in ours if value is not workspace.offset and value.numel()} - used
        assert not missing, "the workspace moved"
        assert {value.data_ptr() for value in lists if isinstance(value, torch.Tensor)} - {
            lists.segment_count.data_ptr()
        } <= used


def test_replays_are_each_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured over padding alone; then mixtures, from one request to as many as there is room for, and fewer again."""
    served = Served(monkeypatch)
    graph = served.capture()
    assert not graph.output.any()
    for rows in ((1,), (3, 2), (2, 5, 1, 4), (4, 3)):
        served.assert_replays(graph, *rows)
        served.assert_nothing_moved(graph)


@pytest.mark.parametrize("fields", [{"estimate": False}, {"refine": False}, {"estimate_clusters": 4096}])
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
    assert_close(served.layer(step, q), served.expected(step, q), torch.float32)
    assert served.decoder._reserved is not None and served.decoder.workspace.dot is not served.decoder._reserved.dot
    served.assert_replays(graph, 2, 3)
    served.assert_nothing_moved(graph)


@pytest.mark.parametrize("much", ["pages", "segments", "base", "clusters"])
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
    assert_close(served.layer(step, q), served.expected(step, q), torch.float32)
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


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A module with one text of its source replaced by another."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} is not once in {module.__name__}"
    path = folder / f"mutant_{module.__name__.replace('.', '_')}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = mutant
    spec.loader.exec_module(mutant)
    return mutant


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


@pytest.mark.parametrize("baked", ["page_count", "base_count", "dense_count", "offset"])
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
