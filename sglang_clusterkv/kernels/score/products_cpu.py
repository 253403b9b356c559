"""Products of a pair's queries with centroid rows on the CPU: in integers where the target and the rows allow, else in floats.

Rows are unpacked `UNPACKED` at a time into a thread's scratch, where they meet the queries of one request or of several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_clusterkv.kernels.cpu_math import FAST, part
from sglang_clusterkv.kernels.levels_cpu import dot_levels, serves, split_queries, unpack_levels
from sglang_clusterkv.kernels.vectors_cpu import FLOAT32, dot_rows, unpack_rows

UNPACKED = 32  # rows that are unpacked together: with head_dim 128 and in floats half of a first-level cache


class Products(NamedTuple):
    """Compiled functions; b and h are a request and a kv head, t a thread.

    Attributes:
        split: (b, h, t, q, u, scratch), once before all others.
        unpack: (rows, begin, count, h, t, index, scratch): rows[begin : begin + count], `UNPACKED` at most.
        of_unpacked: (b, h, t, count, q, u, scratch, out): out[g, i] = q[b, h, g] . unpacked row i.
        of_listed: (b, h, t, rows, begin, count, q, index, u, scratch, out): out[g, begin + i], of any number of rows.
    """

    split: Callable[..., None]
    unpack: Callable[..., None]
    of_unpacked: Callable[..., None]
    of_listed: Callable[..., None]


@functools.cache
def products_of(channels: int, group: int, row_format: int) -> Products:
    """Compile them for one head_dim, group size and row format; lists and results have room for 2 `BLOCK` more entries."""
    return _in_integers(channels, group) if serves(row_format, channels) else _in_floats(channels, group, row_format)


def _in_integers(channels: int, group: int) -> Products:
    splitting = split_queries(channels, group)

    @part
    def split(b: Any, h: Any, t: Any, q: Any, u: Any, scratch: Any) -> None:
        splitting(q[b, h], u.digits[b, h], u.digit_start[b, h], u.digit_unit[b, h], scratch.digits[t])

    @part
    def unpack(rows: Any, begin: Any, count: Any, h: Any, t: Any, index: Any, scratch: Any) -> None:
        unpack_levels(
            channels, index.key_rows, index.key_scales, rows, begin, count, h, scratch.levels[t], scratch.level_scales[t]
        )  # fmt: skip

    @part
    def of_unpacked(b: Any, h: Any, t: Any, count: Any, q: Any, u: Any, scratch: Any, out: Any) -> None:
        dot_levels(
            channels, group, scratch.levels[t], scratch.level_scales[t], count, u.digits[b, h], u.digit_start[b, h],
            u.digit_unit[b, h], out,
        )  # fmt: skip

    @part
    def of_listed(
        b: Any, h: Any, t: Any, rows: Any, begin: Any, count: Any, q: Any, index: Any, u: Any, scratch: Any, out: Any
    ) -> None:  # fmt: skip
        for first in range(begin, begin + count, UNPACKED):
            some = min(UNPACKED, begin + count - first)
            unpack(rows, first, some, h, t, index, scratch)
            of_unpacked(b, h, t, some, q, u, scratch, out[:, first:])

    return Products(split, unpack, of_unpacked, of_listed)


def _in_floats(channels: int, group: int, row_format: int) -> Products:
    @part
    def split(b: Any, h: Any, t: Any, q: Any, u: Any, scratch: Any) -> None:
        pass

    @part
    def unpack(rows: Any, begin: Any, count: Any, h: Any, t: Any, index: Any, scratch: Any) -> None:
        unpack_rows(row_format, channels, index.key_rows, index.key_scales, rows, begin, count, h, scratch.unpacked[t])

    @part(fastmath=FAST)
    def of_unpacked(b: Any, h: Any, t: Any, count: Any, q: Any, u: Any, scratch: Any, out: Any) -> None:
        tile = scratch.unpacked[t]
        dot_rows(FLOAT32, channels, group, tile, tile, scratch.order, 0, count, 0, q[b, h], out)

    @part(fastmath=FAST)
    def of_listed(
        b: Any, h: Any, t: Any, rows: Any, begin: Any, count: Any, q: Any, index: Any, u: Any, scratch: Any, out: Any
    ) -> None:  # fmt: skip
        dot_rows(row_format, channels, group, index.key_rows, index.key_scales, rows, begin, count, h, q[b, h], out)

    return Products(split, unpack, of_unpacked, of_listed)
