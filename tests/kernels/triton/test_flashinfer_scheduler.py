"""What a captured run of FlashInfer keeps of its plan does not follow from the lengths of its lists.

By FlashInfer's own scheduler, the installed one, compiled for the host. Red when: a number of a run changes with the lengths, a
plan writes beyond the memory that another one of as many lists writes, or the stand-in plans otherwise than the installed
FlashInfer.
"""

from __future__ import annotations

import numpy as np
import pytest

from sglang_clusterkv.kernels.attend.flashinfer import graph_partial_bytes
from tests.support.flashinfer_plan import plan
from tests.support.flashinfer_scheduler import Scheduler, missing

SMS = 132
SHAPES = [
    (8, 4, 128),
    (24, 3, 64),
    (224, 4, 128),
    (512, 8, 256),
    (40, 24, 64),
    (3, 80, 128),
]  # lists, query heads of each, D
BYTES = 1 << 22


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Scheduler:
    lacks = missing()
    if lacks is not None:
        pytest.skip(f"{lacks} is not here")
    return Scheduler(tmp_path_factory.mktemp("scheduler"))


def lengths_of(lists: int, seed: int) -> list[np.ndarray]:
    """Padding alone; as a sparse step has them; and some that are dense, and long."""
    generator = np.random.default_rng(seed)
    sparse = generator.integers(600, 4200, lists)
    mixed = np.where(generator.random(lists) < 0.2, generator.integers(1, 131072, lists), sparse)
    padded = np.where(np.arange(lists) < lists // 2, sparse, 1)
    return [np.ones(lists, np.int64), sparse, mixed, padded, np.full(lists, 128), np.full(lists, 131072)]


@pytest.mark.parametrize(("lists", "group", "channels"), SHAPES)
def test_a_runs_numbers_do_not_follow_from_lengths(scheduler: Scheduler, lists: int, group: int, channels: int) -> None:
    plans, written = set(), []
    for lengths in lengths_of(lists, 1):
        memory = np.full(BYTES, 0xAB, np.uint8)
        plans.add(scheduler.plan(lengths, group, channels, True, SMS, memory))
        written.append(int(np.flatnonzero(memory != 0xAB)[-1]))
    (info,) = plans
    assert info.enable_cuda_graph and info.split_kv and info.total_num_rows == lists
    assert max(written) < info.block_valid_mask_offset + info.padded_batch_size, "the last of what a plan writes"


def test_without_a_graph_they_do(scheduler: Scheduler) -> None:
    """So the test above can see it."""
    memory = np.zeros(BYTES, np.uint8)
    plans = {scheduler.plan(lengths, 4, 128, False, SMS, memory) for lengths in lengths_of(24, 1)}
    assert len(plans) > 3 and len({info.padded_batch_size for info in plans}) > 3


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize(("lists", "group", "channels"), SHAPES)
def test_the_stand_in_plans_as_it_does(
    scheduler: Scheduler, lists: int, group: int, channels: int, graph: bool
) -> None:
    for number, lengths in enumerate(lengths_of(lists, 2)):
        theirs, ours = (np.zeros(BYTES, np.uint8) for _ in range(2))
        info, _, partial = plan(lengths, group, channels, graph, SMS, ours)
        assert info == scheduler.plan(lengths, group, channels, graph, SMS, theirs), number
        assert np.array_equal(ours, theirs), number
        if graph:
            assert partial <= graph_partial_bytes(lists, group, channels, SMS) <= partial + 32
