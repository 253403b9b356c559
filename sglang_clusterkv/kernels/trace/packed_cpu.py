"""A trace's bytes, put together on the host (docs/explain.md has what they mean)."""

from __future__ import annotations

from typing import Any

from sglang_clusterkv.kernels.cpu_math import njit


@njit(cache=True, nogil=True)
def put_step(
    positions: Any, count: Any, levels: Any, halves: int, listed: Any, listed_at: Any, weights: Any, weights_at: Any
) -> None:
    """Write a step's positions and levels behind those of the steps before it.

    Args:
        positions: int32 [L, H, R], of which `count` [L, H] are meant.
        levels: uint8 [L, H, R].
        halves: of 16 bits, in which a number is written, lower first.
        listed: uint16, for each kv head how many positions there are, and these.
        listed_at: int64 [L], where each layer's next number goes; moved on.
        weights: uint8, the levels alone.
        weights_at: int64 [L], likewise.
    """
    for layer in range(positions.shape[0]):
        at, weight_at = listed_at[layer], weights_at[layer]
        for h in range(positions.shape[1]):
            found = count[layer, h]
            for half in range(halves):
                listed[at + half] = (found >> (16 * half)) & 0xFFFF
            at += halves
            if halves == 1:
                for t in range(found):
                    listed[at + t] = positions[layer, h, t] & 0xFFFF
            else:
                for t in range(found):
                    listed[at + 2 * t] = positions[layer, h, t] & 0xFFFF
                    listed[at + 2 * t + 1] = positions[layer, h, t] >> 16
            for t in range(found):
                weights[weight_at + t] = levels[layer, h, t]
            at += halves * found
            weight_at += found
        listed_at[layer], weights_at[layer] = at, weight_at


@njit(cache=True, nogil=True)
def put_segment(members: Any, ends: Any, rows: Any, begin: int, first: int, numbers: Any) -> None:
    """Write the numbers of a segment's clusters at its tokens.

    Args:
        members: int16 [K, M, H], offsets in the segment, sorted by cluster; K layers.
        ends: int16 [K, C, H], end of each cluster in `members`.
        rows: int64 [L], the layers that are meant.
        begin: position of the segment's first token.
        first: number of its first cluster.
        numbers: int32 [L, H, tokens], written; a token beyond is left out.
    """
    for layer in range(len(rows)):
        row = rows[layer]
        for h in range(members.shape[2]):
            start = 0
            for c in range(ends.shape[1]):
                stop = ends[row, c, h]
                for i in range(start, stop):
                    at = begin + members[row, i, h]
                    if at < numbers.shape[2]:
                        numbers[layer, h, at] = first + c
                start = max(start, stop)
