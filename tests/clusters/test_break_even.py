"""On a GPU a step whose batch has too little context attends to everything: the whole step, counted, from host numbers alone.

Red when one request of such a batch is sparse, a batch that has enough is dense, requests that are dense for another reason are
counted as of the batch or their tokens with it, a CPU or a host tier has the rule, or it does not follow batch and tokens.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters.decoding import DecodeLists
from sglang_clusterkv.clusters.rows import DenseReason, RowTables
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.break_even import MODELLED, BreakEven
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import ClusterIndex
from tests.support.scenes import Scene

CONFIG = ClusterKVConfig(budget_tokens=64, candidate_tokens=128, segment_tokens=256)
NEVER = msgspec.structs.replace(CONFIG, dense_below="never")
TOKEN_BYTES = 2 * 2 * 32 * 4  # of keys and values of the scene, one layer: two heads of 32 channels in float32


def scene_of(lengths: list[int], config: ClusterKVConfig = CONFIG) -> Scene:
    """Rows with prompts of these lengths, clustered."""
    scene = Scene(config)
    for row, length in enumerate(lengths):
        scene.prefill(row, length)
    for _ in range(2):  # the head of a forward plans what the one before it saw
        scene.decode([0], [lengths[0] + 1])
    return scene


def covered(scene: Scene, rows: list[int]) -> int:
    """Clustered tokens of these rows."""
    return sum(segment.tokens for row in rows for segment in scene.engine.records.rows[row].segments)


def reasons(scene: Scene, lengths: list[int]) -> list[int]:
    step = scene.engine.begin_decode(np.arange(len(lengths)), np.array([length + 1 for length in lengths]))
    assert step.reasons is not None
    assert (step.sparse is None) == bool(step.reasons.all())
    return [int(reason) for reason in step.reasons]


@pytest.mark.parametrize("by_pair", [False, True])
def test_a_batch_is_dense_up_to_the_token_where_sparse_pays(by_pair: bool) -> None:
    lengths = [600, 900]
    scene = scene_of(lengths)
    least = covered(scene, [0, 1]) * TOKEN_BYTES
    for above, expected in ((0, 0), (1, int(DenseReason.FASTER))):
        bytes_ = least + above
        # Two rows of two kv heads.
        rule = BreakEven(bytes_ / 4, 0) if by_pair else BreakEven(0, bytes_)
        scene.engine.decoding.break_even = rule
        assert reasons(scene, lengths) == [expected] * 2
    scene.engine.count_step()
    assert scene.engine.counters.dense_steps["faster"] == 2


def test_a_row_that_is_dense_by_itself_adds_nothing_to_the_batch() -> None:
    lengths = [600, 80, 900]
    scene = scene_of(lengths)
    alone = [0, 2]
    scene.engine.decoding.break_even = BreakEven(0, covered(scene, alone) * TOKEN_BYTES)
    assert reasons(scene, lengths) == [0, DenseReason.BUDGET, 0]
    scene.engine.decoding.break_even = BreakEven(0, covered(scene, alone) * TOKEN_BYTES + 1)
    assert reasons(scene, lengths) == [DenseReason.FASTER, DenseReason.BUDGET, DenseReason.FASTER]


def test_each_request_by_itself_where_it_is_asked_for() -> None:
    lengths = [600, 900]
    scene = scene_of(lengths, NEVER)
    scene.engine.decoding.break_even = BreakEven(0, 1e12)
    assert reasons(scene, lengths) == [0, 0]
    scene.engine.set_step_options(dense_below="auto")
    assert reasons(scene, lengths) == [DenseReason.FASTER] * 2


def test_a_cpu_and_a_host_tier_have_no_such_rule() -> None:
    def rule_of(device: str, host_ratio: float) -> BreakEven | None:
        index = object.__new__(ClusterIndex)
        index.device, index.config = device, ClusterKVConfig(host_ratio=host_ratio)
        index.geometry = Geometry(1, 8, 128, 16, 8)
        table = torch.zeros(1, 1, dtype=torch.int32)
        return DecodeLists(index, RowTables(1, 64), table, torch.bfloat16, None).break_even

    assert rule_of("cpu", 1.0) is None and rule_of("cuda", 4.0) is None
    assert rule_of("cuda", 1.0) is MODELLED


def test_more_requests_need_more_tokens_and_half_the_heads_half_the_bytes() -> None:
    def least_tokens(batch: int, heads: int) -> int:
        row = 2 * 128 * 2
        found = (n for n in range(0, 2_000_000, 1000) if MODELLED.pays(batch * heads, n * heads * row))
        return next(found)

    assert least_tokens(1, 8) < least_tokens(64, 8)
    # A rank of two has half of each token's bytes, to the thousand.
    assert 0 <= 2 * least_tokens(1, 8) - least_tokens(1, 4) <= 1000
    assert least_tokens(64, 4) == least_tokens(64, 8)  # and half of the work, where that is what counts
