"""Policies that let something stand for what they do not read.

Red when: a share breaks its limits or its total, Double-P's reads drift away from the budget, a sample is not representative,
or PQ-HSA's tables tell other logits than the keys they were made from.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.policies import POLICIES, Reading
from benchmarks.policies.anchors import DoubleP, PqHsa, Tokens, lloyd, share
from benchmarks.policies.control import switch
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.reference import dense_decode
from tests.support.scenes import Scene

SCALE = 0.2
HEADS, GROUP, CHANNELS, COUNT = 2, 2, 32, 600


def made(seed: int = 0, sharp: float = 1.0) -> Tokens:
    """Keys around a few directions, and queries near them."""
    random = torch.Generator().manual_seed(seed)
    centers = torch.randn(HEADS, 40, CHANNELS, generator=random)
    at = torch.randint(40, (HEADS, COUNT), generator=random)
    keys = centers.gather(1, at.unsqueeze(-1).expand(-1, -1, CHANNELS))
    keys = keys + 0.3 * torch.randn(keys.shape, generator=random)
    q = sharp * (keys[:, :GROUP] + torch.randn(HEADS, GROUP, CHANNELS, generator=random))
    values, base = torch.randn(2, HEADS, COUNT, CHANNELS, generator=random)
    return Tokens(q, keys, values, base[:, :20], base[:, 20:40], SCALE)


def test_a_share_keeps_its_limits_and_its_total() -> None:
    need = torch.tensor([1.0, 4.0, 1e9], dtype=torch.float64)
    least, most = torch.tensor([3.0, 3.0, 3.0]), torch.tensor([50.0, 100.0, 40.0])
    found = share(need, least.double(), most.double(), 90)
    assert found.tolist() == [10, 40, 40]
    assert share(torch.zeros(3).double(), least.double(), most.double(), 90).tolist() == [3, 3, 3]


def test_lloyd_ends_where_no_label_changes() -> None:
    rows = made().keys
    centroids, labels = lloyd(rows, 40)
    distance = torch.cdist(rows, centroids)
    assert torch.equal(distance.argmin(-1), labels)
    assert distance.amin(-1).square().mean() < 0.5 * rows.var(dim=1).sum(-1).mean()


def test_double_p_reads_the_budget_on_average() -> None:
    policy, read = DoubleP(100), []
    for seed in range(60):
        policy.next_step()
        read += [float(policy.see(made(seed % 7, 2.0), 0, 0).read.sum(-1).float().mean())]
    assert sum(read[20:]) / 40 == pytest.approx(100, rel=0.1)


def test_double_p_reads_whole_clusters_and_never_what_stands_for_itself() -> None:
    policy, tokens = DoubleP(100), made(1)
    seen = policy.see(tokens, 0, 0)
    (run,) = policy._tables.of(tokens.keys, 0, 0)
    for h in range(HEADS):
        stands = seen.logits[h, 0].isfinite()
        for cluster, size in enumerate(run.sizes[h].tolist()):  # type: ignore[attr-defined]
            members = seen.read[h, run.labels[h] == cluster]  # type: ignore[attr-defined]
            assert int(members.sum()) in (0, size)
            assert not (stands[cluster] and members.any())


def test_pq_hsa_tells_logits_from_its_tables() -> None:
    policy, tokens = PqHsa(64), made(2)
    found, labels, lists = policy._looked_up(tokens, 0, 0)
    exact = tokens.scale * tokens.q @ tokens.keys.transpose(1, 2)
    assert (found - exact).var() < 0.1 * exact.var()
    assert lists == COUNT // 14 and int(labels.max()) < lists
    read = policy.see(tokens, 0, 0).read
    assert read.sum(-1).tolist() == [64, 64]


def test_pq_hsa_lists_stand_for_all_that_is_not_read() -> None:
    policy, tokens = PqHsa(64), made(3)
    seen = policy.see(tokens, 0, 0)
    logits, _, _ = policy._looked_up(tokens, 0, 0)
    unread = logits.masked_fill(seen.read.unsqueeze(1), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(seen.logits.logsumexp(-1), unread)


def test_a_sample_stands_for_the_rest_without_bias() -> None:
    config = ClusterKVConfig(budget_tokens=64, candidate_tokens=160, segment_tokens=256)
    scene = Scene(config)
    scene.prefill(1, 700)
    step = scene.decode([1], [701]).sparse
    assert step is not None
    switch(scene.engine, "vattention", {})
    q = scene.queries(1, 4)
    slots = scene.slots(1, 701).unsqueeze(0)
    exact = dense_decode(q, scene.keys[0], scene.values[0], slots, torch.tensor([701]), SCALE)
    decode = scene.engine.sparse_decode
    arguments = (q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    output = decode(*arguments)
    assert torch.equal(decode(*arguments), output), "the draw is the step's own"
    assert decode.recalled[1].sum().item() <= 2 * 64  # type: ignore[attr-defined]
    # Other draws, as of other layers: their mean is nearer than one of them.
    alone = (output - exact).norm() / exact.norm()
    draws = []
    for seed in range(30):
        decode.seed = seed  # type: ignore[attr-defined]
        draws.append(decode(*arguments))
    together = (torch.stack(draws).mean(0) - exact).norm() / exact.norm()
    assert together < 0.6 * alone
    switch(scene.engine, "ours-no-estimate", {"budget_tokens": 32})
    assert together < (scene.engine.sparse_decode(*arguments) - exact).norm() / exact.norm()


def test_their_bytes_by_hand() -> None:
    reading = Reading(7168, 100, 64, ClusterKVConfig(budget_tokens=256))
    assert POLICIES["pq-hsa"].metadata_bytes(reading) == 512 * 256 + 16 * 128 + 7168 * 8
    assert POLICIES["double-p"].metadata_bytes(reading) == 448 * 260 + 512
    assert POLICIES["vattention"].options == {"estimate": False}
