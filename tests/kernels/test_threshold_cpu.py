"""The threshold of a weighted top-k is what sorting finds.

Red when: bins or chunks of them are skipped or counted twice, the room for ties is wrong, or a list that weighs less than the
limit has a threshold.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_clusterkv.kernels.cpu_math import njit
from sglang_clusterkv.kernels.threshold_cpu import BINS, threshold

LONGEST = 300


@njit
def found_threshold(keys, weights, count, limit, bins, near):  # type: ignore[no-untyped-def]
    return threshold(keys, weights, count, limit, bins, near)


# Keys that share their upper bits, or lie at both ends of a chunk of bins.
KEYS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 63 << 21, 64 << 21, (64 << 21) - 1, 2**32 - 1]),
    st.integers(0x3F000000, 0x3F000080),
    st.integers(0, 2**14).map(lambda low: 0x3E800000 + 1024 * 63 + low),
)


@settings(max_examples=150)
@given(entries=st.lists(st.tuples(KEYS, st.integers(0, 9)), min_size=1, max_size=LONGEST), limit=st.integers(1, 400))
def test_it_is_what_sorting_finds(entries: list[tuple[int, int]], limit: int) -> None:
    keys, weights = np.zeros(LONGEST, np.uint32), np.full(LONGEST, 7, np.int32)  # of what does not count, too
    keys[: len(entries)], weights[: len(entries)] = zip(*entries, strict=True)
    scratch = np.full(BINS, 99, np.int32), np.zeros(LONGEST, np.int32)
    key, room = found_threshold(keys, weights, len(entries), limit, *scratch)
    if sum(weight for _, weight in entries) < limit:
        assert key == 0 and room > 400
        return
    above = sum(weight for other, weight in entries if other > key)
    tied = sum(weight for other, weight in entries if other == key)
    assert above < limit <= above + tied and room == limit - above
