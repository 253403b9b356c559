"""The kernels' own exponentials are within their errors.

Red when: a coefficient or the reduction by powers of two is wrong, or the least argument gives less than nothing.
"""

from __future__ import annotations

import numpy as np

from sglang_clusterkv.kernels.cpu_math import exp_below_one, fast_exp, njit


@njit
def both(x, first, second):
    for i in range(len(x)):
        first[i], second[i] = fast_exp(x[i]), exp_below_one(x[i])


def test_exponentials_are_within_their_errors() -> None:
    x = np.linspace(-87, 1, 300_001, dtype=np.float32)
    first, second = np.empty_like(x), np.empty_like(x)
    both(x, first, second)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(first / exact - 1) < 3e-7).all()
    assert (np.abs(second / exact - 1) < 2e-7 + 6e-8 * np.abs(x)).all()


def test_far_below_nothing_is_left() -> None:
    x = np.float32([-np.inf, -1e30, -200.0])
    first, second = np.empty_like(x), np.empty_like(x)
    both(x, first, second)
    assert (first == 0).all() and (second >= 0).all() and (second < 2e-38).all()
