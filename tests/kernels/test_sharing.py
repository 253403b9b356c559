"""What requests of a batch share is read once and changes no bit: each gets what it gets alone, whoever is beside it.

Red when: a shared segment's products land in another request, segment or head, or are taken from another one's queries; a
request takes them for segments that it does not share; a thread reads them before they are there; sums are in another order
than alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import cpu
from sglang_clusterkv.kernels.threads_cpu import set_threads
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import Scene

SCALE, HEADS = 0.2, 4
# Row: its tokens, the row that it shares a prefix with, how much of it. Row 7 is too short to decode sparsely.
ROWS = {
    1: (1300, 0, 0), 2: (1010, 1, 784), 3: (1340, 2, 912), 4: (700, 0, 0), 5: (1301, 1, 1296), 6: (905, 4, 528), 7: (60, 0, 0),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    yield
    set_threads(None)


@functools.cache
def scene_of_a_tree() -> Scene:
    """Rows whose prefixes nest, each prefilled after the one that it shares with."""
    small = {"budget_tokens": 48, "candidate_tokens": 160, "segment_tokens": 256, "estimate_clusters": 20}
    scene = Scene(ClusterKVConfig(**small), pages=400)
    for row, (tokens, other, shared) in ROWS.items():
        scene.req_to_token[row, :shared] = scene.req_to_token[other, :shared]
        scene.prefill(row, tokens, found=shared)
    for _ in range(3):  # rows whose segments were cut are looked at again
        scene.engine.begin_decode(np.array(list(ROWS)), np.array([ROWS[row][0] for row in ROWS]))
    return scene


def lists_of(rows: list[int]) -> SparseStep:
    step = scene_of_a_tree().engine.decoding.sparse(
        np.array(rows), np.array([ROWS[row][0] for row in rows]), recallable(rows)
    )
    assert step.shared is not None
    return step


def recallable(rows: list[int]) -> np.ndarray:
    lengths = np.array([ROWS[row][0] for row in rows])
    return scene_of_a_tree().engine.tables.recallable(np.array(rows), lengths)


def queries(rows: list[int]) -> torch.Tensor:
    """Of each row the same, whoever is beside it."""
    return torch.stack([torch.randn(HEADS, 32, generator=torch.Generator().manual_seed(row)) for row in rows])


def decoded(rows: list[int], step: SparseStep, layer: int = 1) -> torch.Tensor:
    scene = scene_of_a_tree()
    return cpu.sparse_decode(queries(rows), scene.keys[layer], scene.values[layer], scene.index, layer, step, SCALE)


@functools.cache
def alone(row: int) -> torch.Tensor:
    return decoded([row], lists_of([row]))[0]


@settings(max_examples=25)
@given(rows=st.permutations([1, 2, 3, 4, 5, 6]), count=st.integers(2, 6), threads=st.sampled_from([1, 2, 4]))
def test_a_request_gets_in_any_batch_what_it_gets_alone(rows: list[int], count: int, threads: int) -> None:
    set_threads(threads)
    found = decoded(rows[:count], lists_of(rows[:count]))
    for row, output in zip(rows[:count], found, strict=True):
        assert torch.equal(output, alone(row)), f"row {row} beside {rows[:count]}"


def test_the_scene_shares_in_a_tree() -> None:
    """Else the tests above show nothing."""
    shared = lists_of([1, 2, 3, 4, 5, 6]).shared
    assert shared is not None
    groups = [
        shared.request[begin:end].tolist() for begin, end in zip(shared.first[:-1], shared.first[1:], strict=True)
    ]
    assert {(0, 1, 2, 4), (3, 5), (0, 4)} <= set(map(tuple, groups)), groups
    assert not shared.of_request.all(), "every request has segments of its own, too"


def test_beside_a_dense_request() -> None:
    scene, rows = scene_of_a_tree(), [7, 1, 2, 5]
    step = scene.engine.begin_decode(np.array(rows), np.array([ROWS[row][0] for row in rows]))
    assert step.sparse_at is not None and step.sparse_at.tolist() == [1, 2, 3] and len(step.sparse.shared.request)
    found = scene.engine.sparse_layer(queries(rows), scene.keys[1], scene.values[1], 1, step, SCALE)
    for place in step.sparse_at.tolist():
        assert torch.equal(found[place], alone(rows[place]))


def test_what_is_shared_is_read_by_its_lists() -> None:
    """With a list that names other segments the output is another one: nothing is computed beside it."""
    rows = [1, 5]
    step = lists_of(rows)
    assert step.shared is not None and len(step.shared.first) > 2
    turned = step.shared.ordinal.reshape(-1, 2).copy()
    turned[:2, 1] = turned[1::-1, 1]  # the second request's first two
    turned = step._replace(shared=step.shared._replace(ordinal=turned.flatten()))
    assert torch.equal(decoded(rows, turned)[0], alone(1)) and not torch.equal(decoded(rows, turned)[1], alone(5))
    assert torch.equal(decoded(rows, step._replace(shared=None)), decoded(rows, step._replace()))
