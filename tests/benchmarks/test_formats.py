"""Ours in other formats.

Red when: the format that is served differs from the kernels' definition or from the bytes that the index has, a rounding loses
more than its bits must, or a part of the step that is done otherwise does something else than it says.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from benchmarks.policies import FORMATS, POLICIES, Reading
from benchmarks.policies.estimates import Source
from benchmarks.policies.formats import Bytes, Format
from benchmarks.policies.reformed import in_eight_bits, in_steps, in_three_bits, looks, moved_with, tables
from benchmarks.policies.steps import Reformed, Step, dots
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import reference
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec
from sglang_clusterkv.memory.movement import RANK
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import Scene

SCALE = 0.2
LENGTHS = [700, 333]
CONFIG = ClusterKVConfig(budget_tokens=64, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
MOVING = msgspec.structs.replace(CONFIG, moving_values="always")


class World:
    """Two requests, the step that decodes both, and queries."""

    def __init__(self, sharp: float = 1.0, config: ClusterKVConfig = CONFIG) -> None:
        self.scene = Scene(config)
        if config is MOVING:
            for values, keys in zip(self.scene.values, self.scene.keys, strict=True):
                values[..., :6] += 4 * keys[..., 6:12]
        for row, length in enumerate(LENGTHS, 1):
            self.scene.prefill(row, length)
        step = self.scene.decode([1, 2], [length + 1 for length in LENGTHS]).sparse
        assert step is not None
        self.step: SparseStep = step
        self.q = sharp * self.scene.queries(2, 4)

    @property
    def arguments(self) -> tuple[object, ...]:
        return self.with_queries(self.q)

    def with_queries(self, q: torch.Tensor) -> tuple[object, ...]:
        scene = self.scene
        return q, scene.keys[0], scene.values[0], scene.index, 0, self.step, SCALE

    def source(self) -> Source:
        scene = self.scene
        grouped = self.q.unflatten(1, (2, 2))
        return Source(scene.index, 0, self.step, SCALE, grouped, scene.keys[0], scene.values[0])


def run(world: World, form: Format) -> torch.Tensor:
    return Reformed(form)(*world.arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_the_format_that_is_served_is_ours(sharp: float) -> None:
    world = World(sharp)
    for codes in (True, False):
        world.scene.index.config = msgspec.structs.replace(CONFIG, estimate_codes=codes)
        served = reference.sparse_decode(*world.arguments)  # type: ignore[arg-type]
        torch.testing.assert_close(run(world, Format(codes_in_estimate=codes)), served)
    torch.testing.assert_close(run(world, Format(tokens_per_cluster=8)), run(world, Format()))


def test_values_move_as_they_are_served_to_move() -> None:
    """Here by the best factors of their rank, there by some that are next to them: four bits round them differently."""
    world = World(1.0, MOVING)
    served = reference.sparse_decode(*world.arguments)  # type: ignore[arg-type]
    still, moved = (run(world, Format(codes_in_estimate=True, rank=rank)) for rank in (0, RANK))
    assert (served - moved).norm() < 0.35 * (moved - still).norm()
    assert (moved - still).norm() > 0.005 * still.norm()


def test_every_change_changes_something() -> None:
    world = World()
    ours = run(world, Format())
    for name, (_, form) in FORMATS.items():
        # The first step has nothing to reuse; here no cluster lies beyond a margin, and 3 % of a scale change no choice.
        if form.every == 1 and form.margin is None and form not in (Format(), Format(scale="token8")):
            assert not torch.equal(run(world, form), ours), name


def test_what_is_stored_has_the_bytes_of_the_index() -> None:
    for head_dim in (64, 128):
        scene = Scene(CONFIG, head_dim=head_dim, layers=1, pages=20)
        found = Bytes(Format(), Reading(4000, 200, head_dim, CONFIG)).stored()
        states = scene.index.page_state.numel() * scene.index.page_state.element_size()
        per_token = (scene.index.bytes - states) / (20 * 16 * scene.index.geometry.kv_heads)
        assert sum(found.values()) == pytest.approx(per_token)


def test_bytes_by_hand() -> None:
    config = ClusterKVConfig(budget_tokens=128, candidate_tokens=1024, moving_values="never")
    reading = Reading(4000, 200, 64, config)
    ours = POLICIES["ours"].metadata_bytes(reading)
    by_hand = {
        "ours-tables": ours,
        "ours-candidates-2": ours,
        # 250 clusters less with a row, spread and end, and as many own values.
        "ours-16-tokens": ours - 250 * 40 - 250 * 36,
        "ours-3-bit-centroids": ours - 500 * 8,
        "ours-3-bit-turned-centroids": ours - 500 * 10,
        # A byte for each of 64 channels, and two for each of four quarters.
        "ours-8-bit-vectors": ours - 4000 / 1024 * 3 * (64 - 8),
        "ours-shared-values": ours - 250 * 36 + 500,
        "ours-1-bit": ours - 1024 * 8,
        "ours-second-look": ours - 512 * 8,
        "ours-8-bit-scales": ours - 1024,
        "ours-cluster-scales": ours - 1024 * 2 + 128 * 2,
        "ours-rank-8": ours + 4000 / 1024 * 16 * 36,
        "ours-codes-in-estimate": ours,
        "ours-left-values": ours,
    }
    for name, expected in by_hand.items():
        assert POLICIES[name].metadata_bytes(reading) == pytest.approx(expected), name
    one_bit = Bytes(Format(code_bits=1), Reading(4000, 200, 128, config))
    assert one_bit.share() == pytest.approx((66.5 - 16) / 512)
    half = reading._replace(chosen=0.5)
    whole = POLICIES["ours-recalled-2-alike-90"].metadata_bytes
    assert whole(reading) == whole(half) == pytest.approx(ours - 512 * 20)


def test_roundings_lose_what_their_bits_must() -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(2))
    packed, scales = RowCodec("int4", 64).encode(x)
    assert torch.equal(in_steps(x, 4), RowCodec("int4", 64).decode(packed, scales))
    energy = x.square().mean()
    assert 0.030 < (in_three_bits(x) - x).square().mean() / energy < 0.038  # of a normal variable: 0.0345 (Max, 1960)
    assert 0.03 < (in_steps(x, 3) - x).square().mean() / energy < 0.06
    scale = x[0].abs()
    assert ((in_eight_bits(scale) / scale).log2().abs() <= 1 / 32 + 1e-5).all()
    assert in_eight_bits(torch.zeros(1)) == 0


def test_looks_are_the_stored_codes() -> None:
    y = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(300).expand(2, -1) // 10
    for bits in (1, 2):
        codec = TokenCodec(bits, 32)
        for look in looks(y, labels, 30, Format(code_bits=bits)):
            torch.testing.assert_close(look, codec.decode(*codec.encode(y)))
    first, second = looks(y, labels, 30, Format(second_look=True))
    assert torch.equal(first.sign(), second.sign()) and (first.abs().std(-1) < 1e-6).all()
    lost = [(look - y).square().mean() / y.square().mean() for look in (first, second)]
    assert lost[0] == pytest.approx(0.363, abs=0.03) and lost[1] == pytest.approx(0.1175, abs=0.02)
    shared = looks(y, labels, 30, Format(scale="cluster"))[1].abs().unflatten(1, (30, 10))
    assert (shared.flatten(2).amax(-1) / shared.flatten(2).amin(-1)).std() < 1e-5, (
        "two levels and one scale per cluster"
    )


def test_values_move_by_the_covariance_inside_clusters() -> None:
    random = torch.Generator().manual_seed(4)
    keys = torch.randn(1, 400, 32, generator=random)
    values = keys.roll(1, -1)
    spread, of_token = torch.ones(1, 400), torch.arange(400) // 200
    found = moved_with(keys, values, spread, of_token, 2, 32)
    exact = torch.stack([values[:, s : s + 200].transpose(1, 2) @ keys[:, s : s + 200] / 200 for s in (0, 200)], 1)
    assert (found - exact).norm() < 0.2 * exact.norm()
    assert torch.linalg.matrix_rank(moved_with(keys, values, spread, of_token, 2, 4)[0, 1], rtol=1e-4) == 4


def test_neighbours_have_one_mean_value() -> None:
    world = World()
    found = tables(world.source(), 0, Format(clusters_per_value=2))
    real = found.size[0] > 0
    assert len(found.value[0, real].unique(dim=0)) <= len(found.segment) // 2


def test_heads_that_share_keep_the_total() -> None:
    world = World()
    for shared in ("now", "last"):
        policy = Reformed(Format(shared=shared))
        policy(*world.arguments)  # type: ignore[arg-type]
        assert policy.recalled[1].sum(1).tolist() == [2 * 64] * 2
    before = policy.recalled[1]
    policy(*world.with_queries(-world.q))  # type: ignore[arg-type]
    assert torch.equal(policy.recalled[1], before), "the last step's masses decide"


def test_candidates_serve_two_steps() -> None:
    world, other = World(), World().scene.queries(2, 4).flip(0)
    recalled = []
    for queries in ((world.q, other, other), (other,)):
        policy = Reformed(Format(every=2))
        for q in queries:
            policy(*world.with_queries(q))  # type: ignore[arg-type]
            recalled.append([set(slots.tolist()) for slots in policy.recalled[0].flatten(0, 1)])
    first, reused, anew, alone = recalled
    assert anew == alone and reused not in (first, anew)
    assert Reformed(Format(every=2)).counts() == {"candidates": 0, "chosen": 0}
    policy = Reformed(Format(every=2, least_cosine=0.99))
    for q in (world.q, 2 * world.q, -world.q):
        policy(*world.with_queries(q))  # type: ignore[arg-type]
    assert policy.counts()["chosen"] == pytest.approx(2 / 3)


def test_a_margin_ends_the_candidates() -> None:
    world, candidates = World(), []
    for margin in (0.0, 1.0, 100.0):
        policy = Reformed(Format(margin=margin))
        policy(*world.arguments)  # type: ignore[arg-type]
        candidates.append(policy.counts()["candidates"])
    assert 64 <= candidates[0] < candidates[1] < candidates[2] == 160


def test_what_is_left_is_the_cluster_without_what_was_recalled() -> None:
    """With a centroid and a mean value that are exact, the estimate of one cluster's rest is that of the rest itself."""
    world, h = World(), 1
    source = world.source()
    q = source.q[:1]
    for form in (Format(left_values=True), Format(left_logits=True)):
        made = tables(source, 0, form)
        cluster = int(made.size[h].argmax())
        members = (made.of_cluster[h] == cluster).nonzero().flatten()
        recalled, rest = members[:2], members[2:]
        at = (torch.tensor(h), torch.tensor(cluster))
        exact = made._replace(
            centroid=made.centroid.index_put(at, made.keys[h, members].mean(0)),
            value=made.value.index_put(at, made.values[h, members].mean(0)),
            size=torch.zeros_like(made.size).index_put(at, torch.tensor(float(len(members)))),
            spread=torch.zeros_like(made.spread),
        )
        step = Step(exact, form, CONFIG, SCALE)
        read = torch.zeros(1, 2, len(made.slots), dtype=torch.bool)
        read[0, h, recalled] = True
        logits = SCALE * dots(q, made.keys)
        scored = step.score(q, torch.zeros(1, 2, 2))
        part = step._estimate(q, scored, read, read, logits.masked_fill(~read.unsqueeze(2), -torch.inf))
        if form.left_values:
            expected = made.values[h, rest].mean(0).expand(2, -1)
            torch.testing.assert_close(part.output[0, h], expected, atol=1e-4, rtol=1e-4)
        else:
            expected = logits[0, h, :, rest].mean(-1) + torch.tensor(float(len(rest))).log()
            torch.testing.assert_close(part.lse[0, h], expected, atol=1e-4, rtol=1e-4)


def test_codes_tell_the_mass_of_candidates_that_were_not_recalled() -> None:
    """Where all tokens are candidates, codes tell the rest's mass better than means and spreads do."""
    source = World(2.0).source()
    q, masses = source.q[:1], []
    for form in (Format(), Format(codes_in_estimate=True)):
        t = tables(source, 0, form)
        step = Step(t, form, CONFIG, SCALE)
        scored = step.score(q, torch.zeros(1, 2, 2))
        everything = torch.ones(1, 2, len(t.slots), dtype=torch.bool)
        read, _ = step._recall(q, scored, everything, None)
        assert read.sum(-1).tolist() == [[64, 64]]
        logits = SCALE * dots(q, t.keys)
        recalled = logits.masked_fill(~read.unsqueeze(2), -torch.inf)
        masses.append(step._estimate(q, scored, everything, read, recalled).lse)
    exact = logits.masked_fill(read.unsqueeze(2), -torch.inf).logsumexp(-1)
    by_mean, by_code = ((mass - exact).abs().mean() for mass in masses)
    assert by_code < 0.75 * by_mean


def test_steps_at_once_are_steps_one_by_one() -> None:
    """Of what steps share nothing is lost or leaks: candidates, recalled tokens and budgets of the step before."""
    source = World().source()
    q = torch.randn(5, 2, 2, 32, generator=torch.Generator().manual_seed(5))
    base, values = torch.randn(5, 2, 2, 3), torch.randn(2, 3, 32)
    for form in (
        Format(every=2),
        Format(every=3, reused="recalled", least_cosine=-0.2),
        Format(shared="last"),
        Format(second_look=True, rank=8),
    ):
        step = Step(tables(source, 0, form), form, CONFIG, SCALE)
        together = step(q, base, values, None)
        state, chosen = None, 0
        for n in range(5):
            alone = step(q[n : n + 1], base[n : n + 1], values, state)
            state, chosen = alone.state, chosen + alone.chosen
            torch.testing.assert_close(alone.whole.output[0], together.whole.output[n])
            assert torch.equal(alone.read[0], together.read[n])
        assert chosen == together.chosen
