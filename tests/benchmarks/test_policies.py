"""Every policy of the evaluation, on the engine's own lists.

Red when: a policy reads a token that the request does not own, differs from dense attention where its budget covers everything,
chooses otherwise than its paper says, costs other bytes than it reads, or a policy is registered that these tests leave out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.policies import EVERYTHING, POLICIES, Reading, kv_bytes
from benchmarks.policies.baselines import BinaryCodes, PublishedTables, Quest, Window
from benchmarks.policies.choices import LayerBudgets, ReusedChoice, SharedBudget
from benchmarks.policies.control import switch
from benchmarks.policies.estimates import (
    ExactInside,
    MovingValues,
    OtherCap,
    Source,
    TwoBitValues,
    TwoLevels,
    all_tokens,
    in_two_bits,
    of_rank,
)
from benchmarks.policies.policy import TokenPolicy, clustered_slots
from benchmarks.policies.recorder import BONUS_EDGES, Recorder
from benchmarks.quality.attention_level import bonus_below
from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.kernels.attend.reference import dense_decode
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.kernels.decode.cpu import decoder_of
from sglang_clusterkv.kernels.estimate.reference import token_logits
from sglang_clusterkv.kernels.refine.reference import refine
from sglang_clusterkv.kernels.score.reference import score, segment_vectors
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.memory.masses import SPREAD_CAP
from sglang_clusterkv.memory.step import SparseStep, dense_step
from tests.support.scenes import PAGE, Scene

SCALE = 0.2
LENGTHS = [700, 333]
CONFIG = ClusterKVConfig(budget_tokens=64, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


@pytest.fixture
def scene() -> Scene:
    made = Scene(CONFIG)
    for row, length in enumerate(LENGTHS, 1):
        made.prefill(row, length)
    return made


def step_of(scene: Scene, more: int = 1) -> SparseStep:
    step = scene.decode([1, 2], [length + more for length in LENGTHS])
    assert step.sparse is not None and step.dense is None
    return step.sparse


def run(scene: Scene, step: SparseStep, q: torch.Tensor) -> torch.Tensor:
    return scene.engine.sparse_decode(q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)


def dense(scene: Scene, q: torch.Tensor, more: int = 1) -> torch.Tensor:
    lists = dense_step(np.array([1, 2]), np.array(LENGTHS) + more, scene.req_to_token)
    return dense_decode(q, scene.keys[0], scene.values[0], lists.slots, lists.seq_lens, SCALE)


SPARSE = [name for name in POLICIES if name != "dense"]


@pytest.mark.parametrize("name", SPARSE)
def test_what_the_request_does_not_own_is_never_read(scene: Scene, name: str) -> None:
    step = step_of(scene)
    owned = torch.cat([scene.slots(row, length + 1) for row, length in enumerate(LENGTHS, 1)])
    others = torch.ones(scene.keys[0].shape[0], dtype=torch.bool)
    others[owned] = False
    others[:PAGE] = False  # lists are padded with slot 0, of the pool's padding page, and its weight is zero
    switch(scene.engine, name, {})
    q = scene.queries(2, 4)
    before = run(scene, step, q)
    scene.keys[0][others] = torch.nan
    scene.values[0][others] = torch.nan
    torch.testing.assert_close(run(scene, step, q), before)


@pytest.mark.parametrize("name", SPARSE)
def test_a_budget_of_everything_is_dense(scene: Scene, name: str) -> None:
    step = step_of(scene)
    switch(scene.engine, name, {"budget_tokens": 1024, "candidate_tokens": 1024})
    q = scene.queries(2, 4)
    torch.testing.assert_close(run(scene, step, q), dense(scene, q), atol=1e-5, rtol=1e-5)


def test_the_dense_policy_makes_dense_steps(scene: Scene) -> None:
    switch(scene.engine, "dense", {"budget_tokens": 64})
    step = scene.decode([1, 2], [length + 1 for length in LENGTHS])
    assert step.sparse is None and step.dense is not None


def test_a_switch_goes_back_to_what_the_server_was_started_with(scene: Scene) -> None:
    switch(scene.engine, "ours-no-spread", {"budget_tokens": 32})
    assert (scene.engine.config.choice_spread, scene.engine.config.budget_tokens) == (0.0, 32)
    switch(scene.engine, "ours", {})
    assert scene.engine.config == CONFIG


def test_options_that_are_stored_are_refused(scene: Scene) -> None:
    with pytest.raises(ConfigError, match="segment_tokens is fixed when the server starts"):
        scene.engine.set_step_options(segment_tokens=512)
    with pytest.raises(ConfigError, match="candidate_tokens=160 is less than budget_tokens=256"):
        scene.engine.set_step_options(budget_tokens=256)
    assert scene.engine.config == CONFIG


def test_refining_needs_stored_codes() -> None:
    scene = Scene(ClusterKVConfig(budget_tokens=64, candidate_tokens=160, refine=False))
    with pytest.raises(ConfigError, match="no codes are stored"):
        scene.engine.set_step_options(refine=True)


def test_the_oracle_reads_the_most_mass(scene: Scene, tmp_path: Any) -> None:
    step = step_of(scene)
    q = scene.queries(2, 4)
    mass = {}
    for name in set(SPARSE) - {"ours-layer-budgets"}:  # which recalls more than the budget in this layer
        switch(scene.engine, name, {}, {"file": tmp_path / f"{name}.npz", "heads": 4})
        run(scene, step, q)
        assert isinstance(scene.engine.sparse_decode, Recorder)
        switch(scene.engine, "ours", {})
        with np.load(tmp_path / f"{name}.npz") as found:
            assert found["steps"].tolist() == [2, 0]
            mass[name] = found["mass"][0].mean()
    assert max(mass, key=lambda name: mass[name]) == "oracle"
    # Random queries of a small scene: still, whoever looks at keys reads more than who takes the last ones.
    assert min(mass, key=lambda name: mass[name]) == "window", mass


def test_the_recorder_measures_what_it_says(scene: Scene, tmp_path: Any) -> None:
    step = step_of(scene)
    q = scene.queries(2, 4)
    switch(scene.engine, "window", {}, {"file": tmp_path / "window.npz", "heads": 4})
    output = run(scene, step, q)
    switch(scene.engine, "ours", {})
    exact = dense(scene, q)
    with np.load(tmp_path / "window.npz") as found:
        expected = ((output - exact).norm(dim=-1) / exact.norm(dim=-1)).mean(0)
        np.testing.assert_allclose(found["error"][0], expected, rtol=1e-4)
        # The window policy attends to the clustered tokens' last 64 and to what is always attended.
        for head in range(4):
            shares = []
            for b, length in enumerate(LENGTHS):
                slots = scene.slots(b + 1, length + 1)
                weights = (SCALE * scene.keys[0][slots, head // 2] @ q[b, head]).softmax(0)
                clustered = clustered_slots(step, b, PAGE)
                dropped = torch.isin(slots, clustered[:-64])
                shares.append(1 - float(weights[dropped].sum()))
            np.testing.assert_allclose(found["mass"][0, head], np.mean(shares), rtol=1e-4)


def test_spread_terms_are_counted_by_size(scene: Scene, tmp_path: Any) -> None:
    step, q = step_of(scene), 3 * scene.queries(2, 4)
    switch(scene.engine, "ours", {}, {"file": tmp_path / "ours.npz", "heads": 4})
    run(scene, step, q)
    switch(scene.engine, "ours", {})
    scores = score(q.unflatten(1, (2, 2)), scene.keys[0], scene.index, 0, step, SCALE)
    bonus = scores.bonus[(scores.size > 0).unsqueeze(2).expand_as(scores.bonus)].numpy()
    with np.load(tmp_path / "ours.npz") as found:
        counts = found["bonus"]
    assert counts.sum(1).tolist() == [bonus.size, 0]
    for below, share in zip(bonus_below(counts[0]), (0.5, 0.99, 0.999, 1.0), strict=True):
        assert np.mean(bonus <= below) >= share > np.mean(bonus <= BONUS_EDGES[np.searchsorted(BONUS_EDGES, below) - 1])


def test_another_cap_changes_what_it_caps(scene: Scene) -> None:
    step, q = step_of(scene), 6 * scene.queries(2, 4)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    grouped = q.unflatten(1, (2, 2))
    scores = score(grouped, scene.keys[0], scene.index, 0, step, SCALE)
    assert scores.bonus.min() < SPREAD_CAP < scores.bonus.max()
    source = Source(scene.index, 0, step, SCALE, grouped, scene.keys[0], scene.values[0])
    for ours, served in zip(OtherCap(SPREAD_CAP).rescored(scores, source), scores, strict=True):
        torch.testing.assert_close(ours, served)
    torch.testing.assert_close(OtherCap(SPREAD_CAP)(*arguments), reference.sparse_decode(*arguments))
    uncapped = OtherCap(np.inf).rescored(scores, source)
    torch.testing.assert_close(uncapped.estimate_bonus, CONFIG.estimate_spread * scores.bonus)
    assert (uncapped.total > scores.total).all() and torch.equal(uncapped.log_mass, scores.log_mass)
    both = OtherCap(SPREAD_CAP, SPREAD_CAP).rescored(scores, source)
    torch.testing.assert_close(both.total, scores.total)
    widest = scores.bonus.mean(2).argmax(-1, keepdim=True)
    assert (both.log_mass.gather(-1, widest) < scores.log_mass.gather(-1, widest)).all()


def chosen(policy: TokenPolicy, q: torch.Tensor, keys: torch.Tensor) -> list[list[int]]:
    """Places that a policy recalls, with two tokens always attended."""
    return policy.choose(q, keys, torch.zeros(keys.shape[0], 2, keys.shape[2]), 0, 0, 1.0).tolist()


def test_window_takes_the_last() -> None:
    assert chosen(Window(3), torch.zeros(1, 2, 4), torch.randn(1, 10, 4)) == [[7, 8, 9]]


def test_quest_bounds_a_page_by_its_extremes() -> None:
    keys = torch.zeros(1, 48, 2)
    keys[0, 20] = torch.tensor([3.0, 0.0])  # page 1: the bound of q = (1, 1) is 3 + 2, no single token has more than 3
    keys[0, 25] = torch.tensor([0.0, 2.0])
    keys[0, 40] = torch.tensor([4.0, 0.0])  # page 2: 4
    assert chosen(Quest(16), torch.ones(1, 1, 2), keys) == [list(range(16, 32))]
    assert chosen(Quest(16), -torch.ones(1, 1, 2), keys) == [list(range(16))]


def test_published_clusters_are_those_of_cosine_similarity() -> None:
    keys = torch.randn(2, 400, 8)
    clusters = PublishedTables().build(keys)
    assert clusters.centroids.shape == (2, 5, 8) and clusters.sizes.sum(1).tolist() == [400, 400]
    for h in range(2):
        for c in range(5):
            torch.testing.assert_close(clusters.centroids[h, c], keys[h, clusters.labels[h] == c].mean(0))


def test_published_tables_grow_and_start_over() -> None:
    tables = PublishedTables()
    keys = torch.randn(1, 240, 4)
    first = tables.of(keys[:, :160], 0, 0)
    grown = tables.of(keys, 0, 0)
    assert len(first) == 1 and len(grown) == 2 and grown[0] is first[0]
    assert tables.of(keys, 0, 0)[1] is grown[1]
    other = keys.clone()
    other[0, 3] += 1
    assert len(tables.of(other, 0, 0)) == 1
    assert len(tables.of(keys, 0, 1)) == 1, "another request has its own"


def test_a_choice_serves_some_steps_while_queries_are_alike(scene: Scene) -> None:
    step = step_of(scene)
    first, other = scene.queries(2, 4), scene.queries(2, 4)

    def recalled(policy: ReusedChoice, *queries: torch.Tensor) -> list[list[int]]:
        """Slots that the last of these steps recalled for the first head of the first request, each step's in turn."""
        found = []
        for q in queries:
            policy(q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
            buffers = decoder_of(scene.index, 2, torch.float32).buffers
            found.append(sorted(buffers.recalled[0, 0, : buffers.recalled_count[0, 0]].tolist()))
        return found

    anew = recalled(ReusedChoice(1), first, other)
    assert anew[0] != anew[1]
    assert recalled(ReusedChoice(2), first, other, other) == [anew[0], anew[0], anew[1]]
    assert recalled(ReusedChoice(9, 0.9), first, 2 * first, other, first) == [anew[0], anew[0], anew[1], anew[0]]


def test_heads_that_share_a_budget_take_the_best_of_all_candidates(scene: Scene) -> None:
    step, q = step_of(scene), scene.queries(2, 4)
    for least, most in ((0.0, 9.0), (0.5, 1.25)):
        budget = CONFIG.budget_tokens
        SharedBudget(budget, least, most)(q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
        u = decoder_of(scene.index, 2, torch.float32).buffers
        assert u.recalled_count.sum(1).tolist() == [2 * budget] * 2
        assert u.recalled_count.min() >= least * budget and u.recalled_count.max() <= most * budget
        assert (u.taken.sum(2) == u.recalled_count).all()
        for b in range(2):
            recalled = [set(u.recalled[b, h, : u.recalled_count[b, h]].tolist()) for h in range(2)]
            if not least:
                pages = step.pages[b].numpy()
                slots = [pages[u.place[b, h] // PAGE] * PAGE + u.place[b, h] % PAGE for h in range(2)]
                listed = [(u.value[b, h, k], h, int(slots[h][k])) for h in range(2) for k in range(u.candidates[b, h])]
                best = sorted(listed, reverse=True)[: 2 * budget]
                assert [{slot for _, head, slot in best if head == h} for h in range(2)] == recalled


def test_layers_recall_by_their_errors(scene: Scene) -> None:
    step, q = step_of(scene), scene.queries(2, 4)
    policy = LayerBudgets(CONFIG.budget_tokens, np.array([3.0, 1.0, 2.0]))
    for layer, tokens in ((0, 96), (1, 32)):
        policy(q, scene.keys[layer], scene.values[layer], scene.index, layer, step, SCALE)
        u = decoder_of(scene.index, 2, torch.float32).buffers
        assert u.recalled_count.tolist() == u.taken.sum(2).tolist() == [[tokens] * 2] * 2
        for b, h in np.ndindex(2, 2):
            place = u.place[b, h, np.argsort(-u.value[b, h, : u.candidates[b, h]], kind="stable")[:tokens]]
            slots = step.pages[b].numpy()[place // PAGE] * PAGE + place % PAGE
            assert set(slots.tolist()) == set(u.recalled[b, h, :tokens].tolist())


def test_groups_that_are_all_opened_change_nothing(scene: Scene) -> None:
    step, q = step_of(scene), scene.queries(2, 4)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    torch.testing.assert_close(TwoLevels(9)(*arguments), reference.sparse_decode(*arguments))


def test_what_closed_groups_tell_is_better_than_nothing(scene: Scene) -> None:
    step, q = step_of(scene), scene.queries(2, 4)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    policy = TwoLevels(1)
    two_levels = policy(*arguments)
    scene.engine.set_step_options(estimate=False)
    without = reference.sparse_decode(*arguments)
    exact = dense(scene, q)
    assert (two_levels - exact).norm() < (without - exact).norm()
    groups = [policy._kept[0, b][1] for b in range(2)]
    clusters_per_page = PAGE // CONFIG.tokens_per_cluster
    for b in range(2):
        sizes, is_open = groups[b].size, policy._is_open[b]
        clusters = int(step.page_count[b]) * clusters_per_page
        assert sizes.sum(1).tolist() == [int(step.page_count[b]) * PAGE] * 2
        opened = torch.zeros_like(sizes).scatter_add_(
            1, groups[b].of_cluster[:, :clusters], is_open[:, :clusters].float()
        )
        tokens = torch.where(opened > 0, sizes, 0).sum(1)
        assert ((tokens >= CONFIG.candidate_tokens) & (tokens < CONFIG.candidate_tokens + sizes.amax(1))).all()
        assert tokens.max() < sizes.sum(1).max(), "some groups are closed"


def test_groups_are_what_their_clusters_are(scene: Scene) -> None:
    step, layer = step_of(scene), 0
    policy = TwoLevels(1)
    policy(scene.queries(2, 4), scene.keys[layer], scene.values[layer], scene.index, layer, step, SCALE)
    groups, view, h = policy._kept[layer, 0][1], scene.index.layer(layer), 1
    rows = scene.index.cluster_rows(step.pages[0]).flatten()
    centroids = scene.index.row_codec.decode(view.key_rows[rows, h], view.key_scales[rows, h])
    means = scene.index.row_codec.decode(view.value_rows[rows, h], view.value_scales[rows, h])
    sizes = score(scene.queries(2, 4).unflatten(1, (2, 2)), scene.keys[layer], scene.index, layer, step, SCALE).size
    vectors = segment_vectors(scene.index, layer, step)[0]
    for group in (0, 3, len(groups.segment) - 1):
        own = torch.nonzero(groups.of_cluster[h, : int(step.page_count[0]) * 2] == group).flatten()
        segment, weight = int(groups.segment[group]), sizes[0, h, own].double()
        assert len(own) and step.segment_of_page[0, own // 2].tolist() == [segment] * len(own)
        center = (weight @ centroids[own].double()) / weight.sum()
        apart = (centroids[own] - center).square().sum(1) / vectors[segment, h, 2].sum()
        wide = (weight @ (view.spread[rows[own], h].double() + apart)) / weight.sum()
        assert groups.size[h, group] == weight.sum()
        torch.testing.assert_close(
            groups.center[h, group].double(), center + vectors[segment, h, 0], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(groups.spread[h, group].double(), wide, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            groups.value[h, group].double(), (weight @ means[own].double()) / weight.sum(), atol=1e-4, rtol=1e-4
        )


def test_inside_clusters_every_token_has_its_exact_share(scene: Scene) -> None:
    step, q = step_of(scene), scene.queries(2, 4)
    keys, values = scene.keys[0], scene.values[0]
    output = ExactInside()(q, keys, values, scene.index, 0, step, SCALE)
    # Where all values are one only the masses are left, and those are ours.
    ones = ExactInside()(q, keys, torch.ones_like(values), scene.index, 0, step, SCALE)
    torch.testing.assert_close(ones, torch.ones_like(q))

    b, h, g = 1, 1, 0
    grouped = q.unflatten(1, (2, 2))
    scores = score(grouped, keys, scene.index, 0, step, SCALE)
    tokens = all_tokens(scores, Source(scene.index, 0, step, SCALE, grouped, keys, values))
    recalled = refine(
        grouped,
        scores,
        select(scores, scene.index, 0, step, CONFIG.candidate_tokens),
        scene.index,
        0,
        step,
        SCALE,
    )
    exact = [*recalled.slots[b, h, : recalled.count[b, h]].tolist()]
    exact += step.base_slots[b, : step.base_count[b]].tolist()
    weights = {slot: float((SCALE * grouped[b, h, g].double() @ keys[slot, h].double()).exp()) for slot in exact}
    estimated = token_logits(scores, scene.index, recalled.code)[b, h, g].double().exp()
    for cluster in range(int(step.page_count[b]) * 2):
        own = tokens.slot[b, h, tokens.real[b, h] & (tokens.cluster[b, h] == cluster)].tolist()
        left = [slot for slot in own if slot not in exact]
        assert len(own) == scores.size[b, h, cluster] and len(left) == recalled.left[b, h, cluster]
        if left:
            inside = (SCALE * keys[left, h].double() @ grouped[b, h, g].double()).softmax(0)
            weights |= dict(zip(left, (len(left) * estimated[cluster] * inside).tolist(), strict=True))
    by_hand = sum(weight * values[slot, h].double() for slot, weight in weights.items()) / sum(weights.values())
    torch.testing.assert_close(output[b, 2 * h + g].double(), by_hand, atol=1e-4, rtol=1e-4)


def test_values_that_move_with_keys_are_estimated_better() -> None:
    scene = Scene(CONFIG)
    keys = scene.keys[0]
    moving = scene.values[0].copy_(keys.roll(1, -1))
    for row, length in enumerate(LENGTHS, 1):
        scene.prefill(row, length)
    step, q, h = step_of(scene), 0.5 * scene.queries(2, 4), 1
    scene.engine.set_step_options(budget_tokens=16, candidate_tokens=16)
    policy = MovingValues(weight=1.0)
    arguments = (q, keys, moving, scene.index, 0, step, SCALE)
    exact = dense(scene, q)
    assert (policy(*arguments) - exact).norm() < 0.8 * (reference.sparse_decode(*arguments) - exact).norm()

    grouped = q.unflatten(1, (2, 2))
    source = Source(scene.index, 0, step, SCALE, grouped, keys, moving)
    scores = score(grouped, keys, scene.index, 0, step, SCALE)
    covariance = policy._covariance(scores, source)
    tokens = all_tokens(scores, source)
    own = tokens.real[0, h] & (source.segment[0, tokens.cluster[0, h]] == 1)
    labels = tokens.cluster[0, h, own]
    apart = torch.zeros_like(tokens.keys[0, h, own])
    spread = 0.0
    for cluster in labels.unique():
        members = labels == cluster
        apart[members] = tokens.keys[0, h, own][members] - tokens.keys[0, h, own][members].mean(0)
        spread += float(members.sum() * scene.index.layer(0).spread[source.rows[0, cluster], h])
    assert torch.linalg.matrix_rank(of_rank(covariance, 3)[0, 1, h]) == 3
    torch.testing.assert_close(of_rank(covariance, 32), covariance, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(covariance[0, 1, h], apart.roll(1, 1).T @ apart / spread, atol=1e-3, rtol=1e-3)


def test_two_bits_keep_most_of_a_mean_value(scene: Scene) -> None:
    step, q = step_of(scene), scene.queries(2, 4)
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    ours, exact = reference.sparse_decode(*arguments), dense(scene, q)
    coarse = TwoBitValues()(*arguments)
    assert 0 < (coarse - ours).norm() < (ours - exact).norm()
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    loss = (in_two_bits(x) - x).square().mean()
    assert 0.10 < loss < 0.13  # of a normal variable in two bits: 0.1175 (Max, 1960)
    # Other values at the same pages are noticed.
    policy = TwoBitValues()
    policy(*arguments)
    scene.index.arrays["value_rows"][0] ^= 0x77
    torch.testing.assert_close(policy(*arguments), TwoBitValues()(*arguments))
    assert not torch.allclose(policy(*arguments), coarse)


def test_codes_find_the_strongest_token() -> None:
    torch.manual_seed(3)
    keys = torch.randn(1, 200, 64)
    q = torch.randn(1, 2, 64)
    strong = int((q.mean(1) @ keys[0].T).argmax())
    keys[0, strong] += q[0].mean(0)
    assert strong in chosen(BinaryCodes(8), q, keys)[0]


def test_bytes_by_hand() -> None:
    # 4,000 clustered tokens, 200 others, head_dim 64, bf16: a token's key and value are 256 bytes.
    reading = Reading(4000, 200, 64, ClusterKVConfig(budget_tokens=128, candidate_tokens=1024))
    recalled = 256 * (128 + 200)
    by_hand = {
        "window": recalled,
        "oracle": recalled,
        "quest": recalled + 250 * 256,
        "published": recalled + 50 * (128 + 4) + 2 * 128,
        "codes": recalled + 4000 * 10,
        # 500 clusters of 36-byte rows, spread and end; 3.9 segments of three vectors and 16 rows by which values move; 500 mean
        # values; codes of 18 + 2 bytes.
        "ours": recalled + 500 * 40 + 4000 / 1024 * 960 + 500 * 36 + 1024 * 20,
        "ours-still-values": recalled + 500 * 40 + 4000 / 1024 * 384 + 500 * 36 + 1024 * 20,
        "ours-no-estimate": recalled + 500 * 40 + 4000 / 1024 * 384 + 1024 * 20,
        "ours-whole-clusters": recalled + 500 * 40 + 4000 / 1024 * 960 + 500 * 36 + 2 * 128,
        "ours-reused-4": recalled + 500 * 40 + 4000 / 1024 * 960 + 500 * 36 + 1024 * 20 / 4,
        # Two scales and 16 bytes of two-bit values.
        "ours-two-bit-values": recalled + 500 * 40 + 4000 / 1024 * 960 + 500 * 20 + 1024 * 20,
        # 62.5 groups with both rows, spread, place and size; 128 clusters of 1,024 opened tokens.
        "ours-two-levels-1": recalled + 62.5 * 78 + 128 * 42 + 128 * 36 + 4000 / 1024 * 960 + 1024 * 20,
        # 64 rows of 36 bytes for each segment.
        "ours-moving-values": recalled + 500 * 40 + 4000 / 1024 * (384 + 64 * 36) + 500 * 36 + 1024 * 20,
        "ours-moving-values-rank-8": recalled + 500 * 40 + 4000 / 1024 * (384 + 16 * 36) + 500 * 36 + 1024 * 20,
        "ours-moving-values-shared": recalled + 500 * 40 + 4000 / 1024 * 384 + 64 * 36 + 500 * 36 + 1024 * 20,
        "dense": 256 * 4200,
    }
    for name, expected in by_hand.items():
        assert POLICIES[name].step_bytes(reading, 30) == pytest.approx(expected), name
    two_layers = POLICIES["published-dense2"].step_bytes(reading, 30)
    assert two_layers == pytest.approx(28 / 30 * by_hand["published"] + 2 / 30 * by_hand["dense"])
    assert kv_bytes(1, 64) == 256 and EVERYTHING > 1 << 20


def test_codes_are_stored_while_steps_do_not_refine() -> None:
    refining, switched = Scene(CONFIG), Scene(CONFIG)
    switch(switched.engine, "ours-whole-clusters", {})
    for scene in (refining, switched):
        scene.prefill(1, 700)
        step = scene.decode([1], [701])
        assert step.sparse is not None
    np.testing.assert_array_equal(switched.index.arrays["codes"], refining.index.arrays["codes"])
    assert switched.index.arrays["codes"].any()
