"""Masses far below the peak, which no float holds, are ranked alike by the references, the CPU's kernels and Triton's.

Red when: one of them ranks what is below by other numbers (clusters by exponentials instead of logs, tokens and the estimate's
own values by a mass that another one cut off), or breaks ties of what is nothing upwards.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import cpu, reference
from sglang_clusterkv.kernels.decode.triton import TritonDecoder
from sglang_clusterkv.kernels.refine.reference import candidate_logits, candidate_scores, recall
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.memory.masses import NO_MASS
from tests.support.filled import index_on, of_request, step_on
from tests.support.sharp import GROUP, HEAD_DIM, KV_HEADS, SCALE, SharpScene

CONFIG = ClusterKVConfig(budget_tokens=256, candidate_tokens=320, segment_tokens=256, estimate_clusters=40)
LEAST_FLOAT_LOG = -104.0  # below, exp is 0 even where denormal numbers are kept
APART = 0.01  # more than the rounding of logits of some hundreds


def sets(slots: torch.Tensor | np.ndarray, counts: torch.Tensor | np.ndarray) -> list[set[int]]:
    """Listed slots [1, H, K] of each head."""
    return [set(slots[0, h, : int(counts[0, h])].tolist()) for h in range(KV_HEADS)]


@pytest.mark.parametrize("deviation", [48, 96])
def test_what_is_far_below_the_peak_is_ranked_alike(deviation: int, device: str) -> None:
    sharp = SharpScene(CONFIG, 700, seed=4)
    grouped = sharp.queries(deviation).unflatten(1, (KV_HEADS, GROUP))
    index, step = sharp.index, sharp.step
    scores = score(grouped, sharp.keys, index, 0, step, SCALE)
    candidates = select(scores, index, 0, step, CONFIG.candidate_tokens)
    value = candidate_scores(candidate_logits(grouped, scores, candidates, index, 0, SCALE), scores, candidates)
    recalled = recall(value, scores, candidates, CONFIG.budget_tokens)
    clusters = scores.size.shape[-1]
    taken = torch.zeros_like(scores.size)
    listed = torch.arange(value.shape[-1]) < candidates.count.unsqueeze(-1)
    taken.scatter_add_(-1, candidates.cluster, listed.long())

    # There are such masses, they decide who is a candidate, and who is recalled; and no cluster is chosen by rounding.
    for h in range(KV_HEADS):
        own = scores.log_mass[0, h]
        last, left_out = own[taken[0, h] > 0].min(), own[(taken[0, h] < scores.size[0, h])].max()
        assert last < LEAST_FLOAT_LOG and own.isfinite().sum() > 60, last
        ranked = own[own.isfinite()].sort().values
        at = int((ranked < last).sum())
        assert ranked[at] - ranked[at - 1] > APART and ranked[at + 1] - ranked[at] > APART, (last, left_out)
        assert 0 < int((value[0, h] >= NO_MASS).sum()) < CONFIG.budget_tokens

    decoder = cpu.CpuDecoder(index, GROUP, torch.float32)
    decoder.prepare(step, KV_HEADS, GROUP, HEAD_DIM)
    decoder.score(grouped.contiguous().numpy(), sharp.keys.numpy(), 0, SCALE)
    decoder.select()
    u = decoder.buffers
    np.testing.assert_array_equal(u.taken[..., :clusters], taken)
    np.testing.assert_allclose(u.log_mass[..., :clusters], scores.log_mass, atol=APART / 2)
    decoder.rotate(grouped.contiguous().numpy())
    decoder.refine(0, SCALE)
    decoder.recall()
    assert sets(u.recalled, u.recalled_count) == sets(recalled.slots, recalled.count)

    moved, pool = index_on(index, device), sharp.keys.to(device)
    on_gpu = TritonDecoder(moved, GROUP)
    on_gpu.prepare(step_on(step, device))
    on_gpu.score(grouped.contiguous().to(device), pool, 0, SCALE)
    on_gpu.select()
    w = on_gpu.workspace
    torch.testing.assert_close(
        of_request(w, w.log_mass, 0, clusters)[None].cpu(), scores.log_mass, atol=APART / 2, rtol=0
    )
    chosen = torch.zeros_like(scores.size)
    for h in range(KV_HEADS):
        packed = w.candidates[0, h, : int(w.candidate_count[0, h])].cpu()
        chosen[0, h] = (packed >> 32).bincount(minlength=clusters)
    assert torch.equal(chosen, taken)
    on_gpu.refine(0, SCALE, torch.float32)
    on_gpu.recall(0)
    assert sets(w.recalled[:1].cpu(), w.recalled_count[:1].cpu()) == sets(recalled.slots, recalled.count)

    # Which clusters have their own mean values: on the CPU it shows in the output alone.
    on_gpu.estimate(grouped.contiguous().to(device), 0, SCALE)
    mass = scores.estimate_mass * recalled.left
    mass = mass.masked_fill(mass < NO_MASS, 0.0)
    assert int((mass > 0).sum(-1).max()) < CONFIG.estimate_clusters
    best = mass.argsort(dim=-1, descending=True, stable=True)[..., : CONFIG.estimate_clusters].sort(-1).values
    assert w.own[:1].tolist() == best.tolist()
    q = sharp.queries(deviation)
    expected = reference.sparse_decode(*sharp.arguments(q))
    torch.testing.assert_close(cpu.sparse_decode(*sharp.arguments(q)), expected, atol=1e-3, rtol=1e-3)
