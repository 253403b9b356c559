"""Asking for memory changes nothing, whatever is asked for.

Red when: a run of lines has no end, or an address is computed that may not be asked for.
"""

from __future__ import annotations

import numpy as np
import pytest

from sglang_clusterkv.kernels.ahead_cpu import ask, ask_rows, lines_of
from sglang_clusterkv.kernels.cpu_math import njit


@njit
def asked(array, row, head, size, rows):
    ask(array, row, head, size)
    ask_rows(array, rows, len(rows), head, size)
    return lines_of(array, row, head, size)


@pytest.mark.parametrize(("row", "head", "size"), [(0, 0, 1), (7, 2, 20), (9, 1, 300), (3, 0, 64), (39, 2, 20)])
def test_lines_are_those_of_what_is_read(row: int, head: int, size: int) -> None:
    array = np.arange(40 * 3 * 20, dtype=np.int64).astype(np.uint8).reshape(40, 3, 20)
    before = array.copy()
    first, end = asked(array, row, head, size, np.array([5, 3, 39]))
    begin = array[row, head:].ctypes.data
    assert first % 64 == 0 and first <= begin < first + 64
    assert end == begin + size
    np.testing.assert_array_equal(array, before)
