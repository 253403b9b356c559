"""Head sizes that are no power of two: what a code loses of a residual, on the demo model's keys joined to such heads.

No model with heads of 80 or 96 was at hand. A head here is one of the demo model's and some channels of its neighbour's, whole
rotary pairs of both, so that channels have the sizes, the outliers and the correlations of a real model's.

Red when: a rotation mixes fewer channels, so that residuals are less normal and the levels of the codes lose more;
docs/quality.md ("Head sizes") says what it is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_clusterkv.kernels.kmeans import labels_of, outlier_count, sum_by_label
from sglang_clusterkv.memory.codec import INNER_LEVEL, OUTER_LEVEL, TokenCodec
from sglang_clusterkv.memory.rotation import rotation_matrix
from tests.support.captured import Captured, capture

SINKS = 16


@pytest.fixture(scope="module")
def captured(model: Path) -> Captured:
    return capture(model, (2, 8, 14), SINKS + 768)


def joined(keys: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Heads of 64 channels [..., H, 64] made longer by rotary pairs of the next one."""
    if head_dim == keys.shape[-1]:
        return keys
    more, other = (head_dim - 64) // 2, keys.roll(-1, -2)
    return torch.cat((keys[..., :32], other[..., :more], keys[..., 32:], other[..., 32 : 32 + more]), -1)


def rotated_residuals(keys: torch.Tensor) -> torch.Tensor:
    """[N, M, D] keys of a segment's heads -> their residuals against their cluster's mean, as they are coded."""
    clusters = keys.shape[1] // 8
    centered = (keys - keys.mean(1, keepdim=True)).contiguous()
    labels = labels_of(centered, clusters, 3, outlier_count(clusters, 0.125))
    sizes = torch.zeros(len(keys), clusters).scatter_add_(1, labels, torch.ones_like(labels, dtype=torch.float32))
    means = sum_by_label(centered, labels, clusters) / sizes.clamp(min=1).unsqueeze(-1)
    residuals = centered - means.gather(1, labels.unsqueeze(-1).expand_as(centered))
    return residuals @ rotation_matrix(keys.shape[-1]).T


def best_levels(y: torch.Tensor) -> tuple[float, float]:
    """The two levels that lose least on these residuals, in units of the root mean square (Lloyd, 1982)."""
    size = (y / y.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-9)).abs().flatten()
    border = torch.tensor(1.0)
    for _ in range(30):
        inner, outer = size[size < border].mean(), size[size >= border].mean()
        border = (inner + outer) / 2
    return float(inner), float(outer)


@pytest.mark.parametrize(("head_dim", "lost"), [(64, 0.112), (80, 0.125), (96, 0.118), (128, 0.115)])
def test_a_code_loses_about_as_much_at_every_head_size(head_dim: int, lost: float, captured: Captured) -> None:
    keys = joined(captured.keys[:, SINKS:], head_dim).transpose(1, 2).flatten(0, 1)
    y = rotated_residuals(keys)
    codec = TokenCodec(2, head_dim)
    error = float((y - codec.decode(*codec.encode(y))).square().sum() / y.square().sum())
    assert abs(error - lost) < 0.004, f"{error:.4f} of the residuals' energy"
    inner, outer = best_levels(y)
    assert abs(inner / INNER_LEVEL - 1) < 0.03 and abs(outer / OUTER_LEVEL - 1) < 0.04, (inner, outer)
