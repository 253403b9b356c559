"""Prompts that find nearly all of their tokens recall for the others as decode steps would (`recall_extend_tokens`).

Red when: a new token reads other lists than a decode step at its position, a later token, or what is not its request's; a row
is walked with pages that are not written yet; a prompt in chunks, one with too many new tokens, or one that the budget covers
recalls; a request that recalls changes what the others of its batch do; counts are raised for what did not happen; with a host
tier more is read from the host than what was recalled.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters import extending
from sglang_clusterkv.clusters.extending import ExtendStep
from sglang_clusterkv.clusters.rows import Extend
from sglang_clusterkv.config import ClusterKVConfig, ConfigError, validate
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.kernels.extend import reference as exact
from tests.support.scenes import PAGE, Scene, Tiers
from tests.support.world import SMALL, World, stream

MOST, SCALE, HEADS = 40, 0.2, 4
CONFIG = ClusterKVConfig(
    budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20, recall_extend_tokens=MOST
)


def found(scene: Scene, row: int, of: int, tokens: int, new: int) -> Extend:
    """A request in `row` that found the first tokens of another row's, and has `new` more; all of it is in the pool."""
    scene.req_to_token[row, :tokens] = scene.req_to_token[of, :tokens]
    scene.write(row, tokens, tokens + new)
    return Extend(row, f"found{row}", tokens, tokens + new, tokens + new, True)


def scene_with(config: ClusterKVConfig = CONFIG, **sizes: Any) -> Scene:
    """Row 1 has 700 tokens that are clustered and may be found."""
    scene = Scene(config, pages=260, **sizes)
    scene.prefill(1, 700)
    scene.decode([1], [701])
    return scene


def outputs(scene: Scene, step: ExtendStep, q: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """What a layer gives for all new tokens of the batch, q [tokens, heads, D]."""
    found = scene.engine.sparse_layer(q, scene.keys[layer], scene.values[layer], layer, step, SCALE)
    assert found is not None
    return found


def by_decode(scene: Scene, row: int, seq_len: int, q: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """What the references give for a decode step of one request at this length, q [heads, D]."""
    rows, lengths = np.array([row]), np.array([seq_len])
    lists = scene.engine.decoding.step(rows, lengths, scene.engine._looks, scene.engine._layers).sparse
    assert lists is not None
    more = scene.engine.residency.layer(layer)
    return reference.sparse_decode(
        q.unsqueeze(0), scene.keys[layer], scene.values[layer], scene.index, layer, lists, SCALE, **more
    )[0]


@pytest.mark.parametrize("together", [64, 7])
@pytest.mark.parametrize("new", [1, MOST])
def test_each_new_token_is_a_decode_step_at_its_position(new: int, together: int) -> None:
    """Over the window's end, too: segments become recallable from one new token to the next."""
    scene = scene_with()
    with patch.object(extending, "MOST_TOGETHER", together):
        step = scene.engine.begin_extend([found(scene, 2, 1, 688, new)])
    assert step is not None and step.recalls.tolist() == [True]
    assert len(step.parts) == -(-new // together) and len({len(at) for at, _ in step.parts}) == 1
    q = scene.queries(new, HEADS)
    for layer in range(2):
        actual = outputs(scene, step, q, layer)
        for i in range(new):
            expected = by_decode(scene, 2, 688 + i + 1, q[i], layer)
            torch.testing.assert_close(actual[i], expected, atol=2e-5, rtol=2e-5)
    scene.engine.count_step()
    assert scene.engine.counters.recalled_extends == 1 and scene.engine.counters.recalled_extend_tokens == new
    assert scene.engine.counters.sparse_steps == 1 and not scene.engine.counters.dense_steps["fault"], (
        "of the first row"
    )


def test_with_a_budget_of_nearly_all_it_is_the_exact_extend() -> None:
    scene = scene_with(msgspec.structs.replace(CONFIG, budget_tokens=500, candidate_tokens=600))
    step = scene.engine.begin_extend([found(scene, 2, 1, 688, 20)])
    assert step is not None
    covered = {int(count) for _, lists in step.parts for count in lists.page_count * PAGE}
    scene.engine.set_step_options(budget_tokens=min(covered) - 1, candidate_tokens=max(covered))
    q = scene.queries(20, HEADS)
    expected = exact.extend(q, scene.keys[0], scene.values[0], scene.slots(2, 708), SCALE)
    torch.testing.assert_close(outputs(scene, step, q), expected, atol=5e-3, rtol=5e-3)
    # With a budget of all there is nothing to choose: the request attends to everything, exactly.
    scene.engine.set_step_options(budget_tokens=max(covered), candidate_tokens=max(covered))
    assert scene.engine.begin_extend([found(scene, 3, 1, 688, 20)]) is None


def test_neither_later_tokens_nor_those_of_others_are_read() -> None:
    scene = scene_with()
    scene.prefill(4, 300)
    step = scene.engine.begin_extend([found(scene, 2, 1, 688, 20)])
    assert step is not None
    q = scene.queries(20, HEADS)
    expected = outputs(scene, step, q)
    own = scene.slots(2, 688 + 11)
    for buffer in (scene.keys[0], scene.values[0]):
        kept = buffer[own].clone()
        buffer[PAGE:] = torch.nan
        buffer[own] = kept
    actual = outputs(scene, step, q)
    assert torch.equal(actual[:11], expected[:11]) and actual[11:].isnan().flatten(1).all(1).all()


def test_the_others_of_a_batch_attend_to_everything() -> None:
    """Places of the new tokens in the batch are those of the requests that recall."""
    scene = scene_with()
    scene.prefill(5, 64)
    batch = [
        found(scene, 2, 1, 688, MOST + 1),  # too many
        found(scene, 3, 1, 672, 5),
        found(scene, 4, 5, 32, 3),  # little context
        found(scene, 6, 1, 624, 2),
    ]
    step = scene.engine.begin_extend(batch)
    assert step is not None and step.recalls.tolist() == [False, True, False, True]
    (at, lists), = step.parts  # fmt: skip
    assert at.tolist() == [*range(MOST + 1, MOST + 6), *range(MOST + 9, MOST + 11)] and lists.batch == 7
    q = scene.queries(MOST + 11, HEADS)
    actual = outputs(scene, step, q)
    for place, row, length in ((MOST + 1, 3, 673), (MOST + 10, 6, 626)):
        torch.testing.assert_close(actual[place], by_decode(scene, row, length, q[place]), atol=2e-5, rtol=2e-5)


def test_only_a_whole_prompts_rest_recalls() -> None:
    scene = scene_with()
    extend = found(scene, 2, 1, 640, MOST)
    first = extend._replace(end_tokens=656, last_chunk=False)
    assert scene.engine.begin_extend([first]) is None, "more is to come"
    assert scene.engine.begin_extend([extend._replace(prefix_tokens=656)]) is None, "a chunk, not what was found"
    plain = scene_with(msgspec.structs.replace(CONFIG, recall_extend_tokens=0))
    assert plain.engine.begin_extend([found(plain, 2, 1, 640, 1)]) is None


def test_a_host_tier_is_read_for_what_was_recalled_alone() -> None:
    given = {}
    for tiers in (None, Tiers.of(200, 4, 256, 6)):
        config = msgspec.structs.replace(CONFIG, host_ratio=1.0 if tiers is None else 4.0)
        world = World(config, pages=200, tiers=tiers, kv_heads=2, head_dim=32)
        first = world.submit(stream(0, 700))
        while first.left:
            world.extend((first, min(256, first.left)))
        world.decode(first)
        world.finish(first)
        other = world.submit(stream(1, 256))
        world.extend(other)  # takes device pages from the first
        world.finish(other)
        again = world.submit([*stream(0, 688), 1, 2, 3])
        steps: list[ExtendStep] = []
        begin = world.engine.begin_extend
        with patch.object(world.engine, "begin_extend", lambda extends: steps.append(begin(extends))):  # noqa: B023
            world.extend(again)
        (step,) = steps
        reads = None if world.tier is None else world.tier.server_info()
        q = torch.randn(3, HEADS, world.index.geometry.head_dim, generator=torch.Generator().manual_seed(3))
        scene = world.scene
        given[tiers is None] = world.engine.sparse_layer(q, scene.keys[0], scene.values[0], 0, step, SCALE)
        if world.tier is not None and reads is not None:
            after = world.tier.server_info()
            rows = after["recalled_rows_host"] - reads["recalled_rows_host"]
            heads = world.index.geometry.kv_heads
            assert 0 < rows <= 3 * heads * CONFIG.budget_tokens
            assert after["read_bytes_prefill"] == reads["read_bytes_prefill"]
    assert torch.equal(given[True], given[False])


def test_a_fault_of_the_lists_costs_recall_and_nothing_else() -> None:
    scene = scene_with()
    with patch.object(scene.engine.decoding, "sparse", side_effect=RuntimeError("a fault of the test")):
        assert scene.engine.begin_extend([found(scene, 2, 1, 688, 4)]) is None
    assert scene.engine.counters.faults == {"lists": 1} and scene.engine.counters.recalled_extends == 0
    assert scene.decode([2], [693]).sparse is not None, "its row was walked"


def test_it_goes_with_no_reproducible_answers() -> None:
    with pytest.raises(ConfigError, match="not reproducible: leave one out"):
        validate(ClusterKVConfig(reproducible=True, recall_extend_tokens=8), 16)


def test_pages_that_are_not_written_yet_are_not_clustered() -> None:
    """A prompt with nothing found is admitted beside one that recalls: the world has NaN where nothing was written."""
    config = msgspec.structs.replace(SMALL, recall_extend_tokens=MOST, merge_segments=True)
    for lags in (False, True):
        world = World(config, pages=400, lags=lags)
        first = world.submit(stream(0, 700))
        world.extend(first)
        world.decode(first, steps=3)
        again = [world.submit([*stream(0, 640 + 16 * i), 5, 6]) for i in range(3)]
        fresh = world.submit(stream(1, 600))
        steps: list[ExtendStep | None] = []
        begin = world.engine.begin_extend
        with patch.object(world.engine, "begin_extend", lambda extends: steps.append(begin(extends))):  # noqa: B023
            world.extend(again[0], fresh, again[1])
            world.extend(again[2])
        assert [None if step is None else step.recalls.tolist() for step in steps] == [[True, False, True], [True]]
        world.decode(first, fresh, *again, steps=40)
        assert world.engine.counters.sparse_steps > 100
