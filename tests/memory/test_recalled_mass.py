"""The recalled mass is what it is defined to be: the share of a step's attention that was read exactly.

Red when: the CPU kernel or the reference adds another share than one computed here from raw keys, counts a layer, request or
head twice or not at all, counts a dense step, or loses everything to one request that is not a number; groups of layers
overlap, leave a layer out or are named wrongly.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import cpu, reference
from sglang_clusterkv.kernels.estimate.reference import estimate
from sglang_clusterkv.kernels.merge.cpu import mass_kernel
from sglang_clusterkv.kernels.merge.reference import note_mass
from sglang_clusterkv.kernels.refine.reference import recall_all, refine
from sglang_clusterkv.kernels.score.reference import score
from sglang_clusterkv.kernels.select.reference import select
from sglang_clusterkv.memory.recalled_mass import layer_groups, mean_by_group
from tests.support.exactly import exact_logits, f64, log_sum_exp
from tests.support.scenes import Scene

SCALE = 0.2
LENGTHS = [700, 333, 1300]
SMALL = {"budget_tokens": 48, "candidate_tokens": 160, "segment_tokens": 256, "estimate_clusters": 20}


def scene_and_step(**fields: object) -> tuple[Scene, object]:
    scene = Scene(ClusterKVConfig(**(SMALL | fields)))
    for row, length in enumerate(LENGTHS, 1):
        scene.prefill(row, length)
    step = scene.decode([1, 2, 3], [length + 1 for length in LENGTHS])
    assert step.sparse is not None and step.dense is None
    return scene, step.sparse


def shares(scene: Scene, step: object, q: torch.Tensor, layer: int) -> np.ndarray:
    """Float64 [B, H, G] from raw keys, the slots that the reference recalls and what it estimates for the rest."""
    config, keys = scene.index.config, scene.keys[layer]
    arguments = (scene.index, layer, step)
    scores = score(q, keys, *arguments, SCALE)
    if config.refine:
        candidates = select(scores, *arguments, config.candidate_tokens)
        recalled = refine(q, scores, candidates, *arguments, SCALE)
    else:
        recalled = recall_all(scores, select(scores, *arguments, config.budget_tokens))
    rest = f64(estimate(scores, recalled.left, *arguments, q, SCALE, recalled.code).lse)
    found = np.empty(tuple(q.shape[:3]))
    for b, h in np.ndindex(*found.shape[:2]):
        base = step.base_slots[b, : int(step.base_count[b])]
        read = torch.cat((base, recalled.slots[b, h, : int(recalled.count[b, h])]))
        exact = log_sum_exp(exact_logits(f64(q[b, h]), f64(keys[read, h]), SCALE))
        whole = np.logaddexp(exact, rest[b, h]) if config.estimate else np.maximum(exact, f64(scores.total[b, h]))
        found[b, h] = np.exp(exact - whole)
    return found


@pytest.mark.parametrize("fields", [{}, {"estimate": False}, {"refine": False}, {"refine": False, "estimate": False}])
@pytest.mark.parametrize("chain", [cpu, reference])
def test_a_layers_mass_is_the_share_read_exactly(chain: object, fields: dict[str, object]) -> None:
    scene, step = scene_and_step(**fields)
    q = scene.queries(3, 4)
    assert not scene.index.mass.any(), "prefill and lists add nothing"
    for layer in (1, 1, 0):
        chain.sparse_decode(q, scene.keys[layer], scene.values[layer], scene.index, layer, step, SCALE)
    expected = [shares(scene, step, q.unflatten(1, (2, 2)), layer) for layer in range(2)]
    assert 0.05 < expected[0].mean() < 0.95, "a scene whose answer is 0 or 1 would show nothing"
    np.testing.assert_allclose(scene.index.mass[:, 0], [expected[0].sum(), 2 * expected[1].sum()], rtol=1e-5)
    assert scene.index.mass[:, 1].tolist() == [3 * 2 * 2, 2 * 3 * 2 * 2]


def test_a_larger_budget_recalls_more_mass() -> None:
    means = []
    for budget in (16, 64, 200):
        scene, step = scene_and_step(budget_tokens=budget, candidate_tokens=256)
        cpu.sparse_decode(scene.queries(3, 4), scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
        means.append(mean_by_group(scene.index.mass.numpy())["0"])
    assert 0 < means[0] < means[1] < means[2] < 1


def test_a_share_is_at_most_one_and_what_is_not_a_number_counts_as_nothing() -> None:
    exact = torch.tensor([0.0, 1.0, 0.0, torch.nan, 2.0]).view(1, 1, 5)
    whole = torch.tensor([np.log(4.0), 0.5, torch.inf, 0.0, torch.nan], dtype=torch.float32).view(1, 1, 5)
    mass = torch.zeros(2, dtype=torch.float64)
    note_mass(mass, exact, whole)
    torch.testing.assert_close(mass, torch.tensor([1.25, 5.0], dtype=torch.float64))
    on_cpu = np.zeros(2)
    mass_kernel(on_cpu, exact.numpy(), whole.numpy(), True)
    np.testing.assert_allclose(on_cpu, mass, rtol=1e-6)
    rest = torch.tensor([np.log(3.0), -np.inf, np.inf, 0.0, np.nan], dtype=torch.float32).view(1, 1, 5)
    on_cpu[:] = 0
    mass_kernel(on_cpu, exact.numpy(), rest.numpy(), False)
    np.testing.assert_allclose(on_cpu, mass, rtol=1e-6)


@pytest.mark.parametrize(
    ("layers", "first", "labels"),
    [
        (30, 0, ["0-7", "8-15", "16-23", "24-29"]),
        (32, 0, ["0-7", "8-15", "16-23", "24-31"]),
        (16, 16, ["16-19", "20-23", "24-27", "28-31"]),
        (5, 0, ["0-1", "2-3", "4"]),
        (2, 0, ["0", "1"]),
        (1, 3, ["3"]),
    ],
)
def test_groups_of_layers(layers: int, first: int, labels: list[str]) -> None:
    groups = layer_groups(layers, first)
    assert list(groups) == labels
    covered = [layer for group in groups.values() for layer in range(layers)[group]]
    assert covered == list(range(layers))


def test_the_mean_of_a_group_weighs_what_was_decoded() -> None:
    mass = np.array([[0, 0], [0, 0], [1.5, 2], [0.5, 6], [0.25, 1]])
    assert mean_by_group(mass, 10) == {"12-13": 0.25, "14": 0.25}


def test_server_info_has_the_means() -> None:
    scene, step = scene_and_step()
    assert scene.engine.server_info()["recalled_mass"] == {}
    cpu.sparse_decode(scene.queries(3, 4), scene.keys[1], scene.values[1], scene.index, 1, step, SCALE)
    assert scene.engine.server_info()["recalled_mass"] == mean_by_group(scene.index.mass.numpy())
    assert list(scene.engine.server_info()["recalled_mass"]) == ["1"]
