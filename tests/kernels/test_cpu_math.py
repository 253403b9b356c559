"""The kernels' own exponentials are within their errors; kernels are made where none can be kept.

Red when: a coefficient or the reduction by powers of two is wrong, or the least argument gives less than nothing; where no
folder can be written to, a kernel is not made, or it is not said.
"""

from __future__ import annotations

import logging

import numpy as np
import pytest
from numba.core import caching

from sglang_clusterkv.kernels import cpu_math
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


def test_kernels_are_made_where_none_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    cpu_math._say_that_nothing_stays.cache_clear()

    def more(x):
        return x + 1

    with caplog.at_level(logging.WARNING):
        kernels = [njit(cache=True)(more), njit(more, cache=True, nogil=True)]
    assert [kernel(1) for kernel in kernels] == [2, 2]
    assert caplog.text.count("set NUMBA_CACHE_DIR") == 1
