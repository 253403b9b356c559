"""With CLUSTERKV_CHECK=1 an index that would become a wrong address becomes 0 and is counted; right ones stay as they are.

The checks are shown on the definition's lists and on a workspace as select and refine leave it. Red when: a wrong index of a
list, a table or the workspace passes, a right one is changed or counted, the count does not reach /server_info, or without the
variable anything of it runs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.planning.plan import Make
from sglang_clusterkv.config import ClusterKVConfig, checks_indices
from sglang_clusterkv.kernels.checks import IndexChecks
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.kernels.workspace import Workspace, WorkspaceShape, make_workspace
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import PAGE, Scene
from tests.support.waits import Waits

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256)
LENGTHS = {1: 334, 2: 601}
FAR = 1 << 20


class Checked:
    """Two requests that decode, in a process with the variable."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLUSTERKV_CHECK", "1")
        self.scene = Scene(CONFIG, layers=2, kv_heads=2)
        for row, length in LENGTHS.items():
            self.scene.prefill(row, length)
        step = self.scene.decode([*LENGTHS], [length + 1 for length in LENGTHS.values()])
        assert step.sparse is not None and step.dense is None
        self.step: SparseStep = step.sparse
        self.index, self.engine = self.scene.index, self.scene.engine
        assert self.index.checks is not None
        self.checks: IndexChecks = self.index.checks
        self.counted = 0

    def layer(self) -> torch.Tensor:
        q = self.scene.queries(2, 4)
        return self.engine.sparse_decode(q, self.scene.keys[1], self.scene.values[1], self.index, 1, self.step, 0.2)

    def fails(self) -> None:
        """The next layer: on a CPU its own code ends at the wrong index, and the step is dense."""
        with pytest.raises(IndexError, match="out of range"):
            self.layer()

    def news(self) -> int:
        """Wrong indices since the last call."""
        before, self.counted = self.counted, int(self.index.violations[1])
        return self.counted - before


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(monkeypatch)


def test_without_the_variable_there_are_no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "0"):
        monkeypatch.delenv("CLUSTERKV_CHECK", raising=False)
        if value is not None:
            monkeypatch.setenv("CLUSTERKV_CHECK", value)
        assert not checks_indices()
        scene = Scene(CONFIG)
        assert scene.index.checks is None and scene.engine.sparse_decode is sparse_decode


def test_right_indices_stay_and_nothing_waits_for_the_device(checked: Checked) -> None:
    lists = [value.clone() for value in checked.step if isinstance(value, torch.Tensor)]
    tables = {name: array.clone() for name, array in checked.index.arrays.items()}
    with Waits():
        checked.checks.lists(checked.step)
        checked.checks.tables(checked.step, 0)
        checked.index.device = "cuda"  # where nobody looks at the count
        checked.checks.slots(torch.arange(64))
        checked.index.device = "cpu"
    output = checked.layer()
    assert checked.news() == 0 and output.isfinite().all()
    assert all(map(torch.equal, lists, (value for value in checked.step if isinstance(value, torch.Tensor))))
    assert all(torch.equal(array, tables[name]) for name, array in checked.index.arrays.items())
    assert checked.engine.server_info()["index_violations"] == 0


WRONG_LISTS = {  # a value that is out of range at the first place
    "pages": FAR,
    "segment_of_page": -1,
    "segment_begin": FAR,
    "base_slots": -5,
    "page_count": FAR,
    "segment_count": -3,
    "base_count": FAR,
    "dense_count": FAR,
}


@pytest.mark.parametrize("name", WRONG_LISTS)
def test_a_wrong_list_is_counted_and_harmless(name: str, checked: Checked) -> None:
    target = getattr(checked.step, name)
    target[(0,) * target.dim()] = WRONG_LISTS[name]
    checked.fails()
    assert checked.news() >= 1 and int(target[(0,) * target.dim()]) == 0
    checked.checks.lists(checked.step)
    assert checked.news() == 0, "it was put right"


@pytest.mark.parametrize("name", ["members", "cluster_end"])
def test_a_wrong_table_is_counted_and_harmless(name: str, checked: Checked) -> None:
    table = checked.index.arrays[name]
    page = int(checked.step.pages[1, 2])
    row = page * PAGE if name == "members" else int(checked.index.cluster_rows(torch.tensor(page))[0])
    kept = table[1, row, 1].clone()
    table[1, row, 1] = 30_000
    checked.fails()
    assert checked.news() == 1 and int(table[1, row, 1]) == 0
    table[1, row, 1] = kept
    table[1, 0, 0] = 30_000  # of the padding page, which no list names
    checked.layer()
    assert checked.news() == 0


def test_what_lies_beyond_the_counts_is_not_looked_at(checked: Checked) -> None:
    for name, counts in (("pages", checked.step.page_count), ("base_slots", checked.step.base_count)):
        shorter = int(counts.argmin())
        getattr(checked.step, name)[shorter, int(counts[shorter]) :] = FAR
    checked.checks.lists(checked.step)
    assert checked.news() == 0 and int(checked.step.pages.max()) == FAR


def test_slots_of_a_build_are_checked(checked: Checked) -> None:
    checked.scene.req_to_token[1, 40] = FAR
    checked.engine.builder.make([Make(99, 1, 1, 4)], set())
    assert checked.news() == 1 and checked.engine.counters.faults == {"build": 1}


def workspace() -> Workspace:
    """As select and refine leave it, with garbage beyond the counts."""
    shape = WorkspaceShape(
        batch=2, heads=2, group=2, channels=32, clusters=256, segments=16, base=512, candidates=16, budget=16, own=8,
        exact_parts=4, rest_parts=4,
    )  # fmt: skip
    w = make_workspace(shape, "cpu")
    w.candidates.fill_(-(1 << 40))
    w.position.fill_(FAR)
    w.recalled.fill_(FAR)
    w.candidate_count.fill_(3)
    w.recalled_count.fill_(2)
    w.candidates[:, :, :3] = torch.tensor([0 << 32 | 0, 1 << 32 | 9, 5 << 32 | 40])
    w.position[:, :, :3] = torch.tensor([0, 7, 100])
    w.recalled[:, :, :2] = torch.tensor([PAGE, 5 * PAGE + 3])
    return w


def test_a_right_workspace_stays(checked: Checked) -> None:
    w = workspace()
    kept = [w.candidates.clone(), w.position.clone(), w.recalled.clone()]
    with Waits():
        checked.checks.candidates(checked.step, w)
        checked.checks.positions(checked.step, w)
        checked.checks.recalled(checked.step, w)
    assert checked.news() == 0
    assert all(map(torch.equal, kept, (w.candidates, w.position, w.recalled)))


SPOILED: dict[str, tuple[str, Callable[[Workspace], None]]] = {
    "a candidate's cluster": ("candidates", lambda w: w.candidates.__setitem__((0, 1, 2), FAR << 32 | 4)),
    "a candidate's entry": ("candidates", lambda w: w.candidates.__setitem__((1, 1, 0), 3 << 32 | FAR)),
    "how many candidates": ("candidates", lambda w: w.candidate_count.__setitem__((1, 0), 17)),
    "a position": ("positions", lambda w: w.position.__setitem__((1, 0, 2), -1)),
    "a recalled slot": ("recalled", lambda w: w.recalled.__setitem__((0, 0, 1), FAR * PAGE)),
    "how many recalled": ("recalled", lambda w: w.recalled_count.__setitem__((0, 0), -2)),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_wrong_index_of_the_workspace_is_counted_and_put_right(what: str, checked: Checked) -> None:
    stage, spoil = SPOILED[what]
    w = workspace()
    spoil(w)
    getattr(checked.checks, stage)(checked.step, w)
    assert checked.news() == 1
    getattr(checked.checks, stage)(checked.step, w)
    assert checked.news() == 0


def test_a_wrong_cluster_leaves_its_entry(checked: Checked) -> None:
    w = workspace()
    w.candidates[0, 1, 2] = FAR << 32 | 4
    checked.checks.candidates(checked.step, w)
    assert int(w.candidates[0, 1, 2]) == 4


def test_what_was_wrong_is_told(checked: Checked, caplog: pytest.LogCaptureFixture) -> None:
    checked.step.pages[0, 0] = FAR
    step = DecodeStep(None, checked.step, None, None, np.array([1, 2]), np.array([335, 602]))
    q, (keys, values) = checked.scene.queries(2, 4), (checked.scene.keys[1], checked.scene.values[1])
    assert checked.engine.sparse_layer(q, keys, values, 1, step, 0.2) is None, "the step is dense"
    assert checked.engine.counters.faults == {"layer": 1}
    assert checked.engine.server_info()["index_violations"] >= 1
    assert "indices were out of range" in caplog.text
