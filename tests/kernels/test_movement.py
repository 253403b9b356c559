"""Factors of a segment's covariance of values and keys: next to the best of their rank, the same however they are made.

Red when: a token or channel is left out or counts twice, a cluster's mean is another's, the iteration does not find the large
components, a direction without any movement becomes noise, or a head depends on the heads beside it.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.kernels.movement import cpu, reference

WAYS = pytest.mark.parametrize("factors", [cpu.factors, reference.factors], ids=["cpu", "reference"])


def segment(tokens: int, head_dim: int, heads: int = 2, decay: float = 0.8) -> tuple[torch.Tensor, ...]:
    """Keys, centroids, values, mean values and labels of clusters in which values follow the keys."""
    generator = torch.Generator().manual_seed(tokens + head_dim)
    clusters = tokens // 8
    labels = torch.randint(clusters, (heads, tokens), generator=generator)
    shares = decay ** torch.arange(head_dim)
    keys, turn = (torch.randn(heads, rows, head_dim, generator=generator) for rows in (tokens, head_dim))
    noise = torch.randn(heads, tokens, head_dim, generator=generator)
    values = (keys * shares) @ turn + 0.1 * noise + 3.0
    return keys, means_of(keys, labels, clusters), values, means_of(values, labels, clusters), labels


def means_of(rows: torch.Tensor, labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Of the clusters' members, float32 [N, C, D]."""
    one_hot = torch.nn.functional.one_hot(labels, clusters).float()
    return one_hot.transpose(1, 2) @ rows / one_hot.sum(1).clamp(min=1).unsqueeze(-1)


def covariance(
    keys: torch.Tensor, centroids: torch.Tensor, values: torch.Tensor, means: torch.Tensor, labels: torch.Tensor
):
    """float64 [N, D, D], token by token."""
    found = torch.zeros(len(keys), keys.shape[2], keys.shape[2], dtype=torch.float64)
    for n in range(len(keys)):
        for token in range(keys.shape[1]):
            c = labels[n, token]
            found[n] += torch.outer(
                (values[n, token] - means[n, c]).double(), (keys[n, token] - centroids[n, c]).double()
            )
    return found / keys.shape[1]


@WAYS
@pytest.mark.parametrize(("tokens", "head_dim", "rank"), [(64, 16, 8), (130, 80, 3), (256, 96, 8), (192, 256, 8)])
def test_they_are_next_to_the_best_of_their_rank(factors, tokens: int, head_dim: int, rank: int) -> None:
    given = segment(tokens, head_dim)
    whole = covariance(*given)
    meets, adds = factors(*given, rank)
    assert meets.shape == adds.shape == (2, rank, head_dim)
    best = torch.linalg.svdvals(whole)[:, rank:].square().sum(-1)
    left = (whole - adds.double().transpose(1, 2) @ meets.double()).square().sum((1, 2))
    energy = whole.square().sum((1, 2))
    assert (left <= 1.15 * best + 0.01 * energy).all(), (left / energy, best / energy)
    torch.testing.assert_close(meets @ meets.transpose(1, 2), torch.eye(rank).expand(2, -1, -1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_a_cpu_finds_what_the_reference_finds(head_dim: int) -> None:
    given = segment(256, head_dim)
    for ours, right in zip(cpu.factors(*given, 8), reference.factors(*given, 8), strict=True):
        torch.testing.assert_close(ours, right, atol=1e-3 * float(right.abs().max()), rtol=0)


@WAYS
def test_what_has_fewer_components_has_zeros_for_the_others(factors) -> None:
    """No noise of float32 becomes a direction, and none counts twice."""
    keys, centroids, *_, labels = segment(128, 64)
    generator = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, 64, generator=generator)
    values = keys @ torch.outer(one, one) + 2 * keys @ torch.outer(one.roll(7), two)
    given = (keys, centroids, values, means_of(values, labels, 16), labels)
    meets, adds = factors(*given, 8)
    whole = covariance(*given).float()
    torch.testing.assert_close(
        adds.transpose(1, 2) @ meets, whole, atol=1e-4 * float(whole.abs().max()), rtol=0
    )  # fmt: skip
    for still in (keys, torch.zeros_like(keys)):  # nothing moves
        meets, adds = factors(still, 0 * centroids, 0 * values, 0 * centroids, labels, 8)
        assert not adds.any() and meets.isfinite().all()


@WAYS
def test_a_head_gets_alone_what_it_gets_beside_others(factors) -> None:
    given = segment(128, 64, heads=3)
    together = factors(*given, 8)
    for head in range(3):
        alone = factors(*(part[head : head + 1] for part in given), 8)
        for mine, all_heads in zip(alone, together, strict=True):
            if factors is cpu.factors:
                assert torch.equal(mine[0], all_heads[head])
            torch.testing.assert_close(mine[0], all_heads[head], atol=1e-3, rtol=1e-3)


def test_the_number_of_threads_changes_no_bit() -> None:
    given, threads = segment(1024, 64), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(cpu.factors(*given, 8))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
