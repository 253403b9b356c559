"""The soak's lines: what is called flat, and what is not.

Red when: a slope, its interval or the verdict on noise, a leak or a drift is wrong.
"""

from __future__ import annotations

import random

import pytest

from benchmarks.soak import LARGEST_RISE, fit, is_flat

TIMES = [3.0 * i for i in range(500)]  # 25 minutes


def noisy(mean: float, rise: float, noise: float, seed: int) -> list[float]:
    """Samples that rise by a share of their mean over the time, with noise of a share of it."""
    generator = random.Random(seed)
    return [mean * (1 + rise * t / TIMES[-1] + generator.gauss(0, noise)) for t in TIMES]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_flat_and_a_leak_is_not(seed: int) -> None:
    limit = LARGEST_RISE["memory"]
    assert is_flat(fit(TIMES, noisy(4000, 0.0, 0.01, seed)), TIMES[-1], limit)
    assert not is_flat(fit(TIMES, noisy(4000, 0.06, 0.01, seed)), TIMES[-1], limit)
    assert is_flat(fit(TIMES, noisy(4000, -0.06, 0.01, seed)), TIMES[-1], limit), "less is no leak"


def test_the_interval_holds_the_true_slope_19_times_out_of_20() -> None:
    true = 4000 * 0.02 / TIMES[-1]
    lines = [fit(TIMES[:40], noisy(4000, 0.02, 0.01, seed)[:40]) for seed in range(400)]
    inside = sum(abs(line.slope - true) <= line.half for line in lines)
    assert 365 <= inside <= 395


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(AssertionError, match="let it run longer"):
        fit([0.0, 1.0], [1.0, 2.0])
