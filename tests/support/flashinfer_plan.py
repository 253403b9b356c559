"""FlashInfer's plan of a decode by tensor cores, as its scheduler makes it (PrefillPlanImpl in scheduler.cuh, version 0.7.2).

`tests/kernels/triton/test_flashinfer_scheduler.py` compiles the installed scheduler and holds this against it, byte by byte.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

LEAST_CHUNK = 128  # tokens, at page size 1
ALIGNMENT = 16  # bytes


class PlanInfo(NamedTuple):
    """What a run is launched with. Offsets are bytes, of the memory of plans or of partial results."""

    padded_batch_size: int  # programs, in a graph
    total_num_rows: int
    total_num_rows_offset: int
    cta_tile_q: int
    request_indices_offset: int
    qo_tile_indices_offset: int
    kv_tile_indices_offset: int
    merge_indptr_offset: int
    o_indptr_offset: int
    kv_chunk_size_ptr_offset: int
    v_offset: int
    s_offset: int
    block_valid_mask_offset: int
    enable_cuda_graph: int
    split_kv: int


class Memory:
    """Hands out places in a buffer, one behind the other."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, size: int, alignment: int = ALIGNMENT) -> int:
        """The first byte of a place of so many."""
        begin = -(-self.taken // alignment) * alignment
        self.taken = begin + size
        return begin


def plan(
    lengths: np.ndarray, group: int, channels: int, graph: bool, sms: int, memory: np.ndarray
) -> tuple[PlanInfo, int, int]:
    """Plan one query of each list.

    Args:
        lengths: int [B], of the lists.
        group: query heads of each.
        channels: of a head.
        graph: whether the plan is for a CUDA graph.
        sms: of the GPU, of compute capability 8.0 or newer.
        memory: uint8, where the plan is written.

    Returns:
        What a run is launched with, and the bytes of the plan and of partial results.
    """
    batch, most = len(lengths), 2 * sms
    tile = 128 if group > 64 and channels < 256 else 64 if group > 16 else 16
    tiles = -(-group // tile)  # of a query
    longest = max(1, int(lengths.max()))
    low, high = LEAST_CHUNK, longest
    while low < high:
        middle = (low + high) // 2
        if int((tiles * -(-np.maximum(lengths, 1) // middle)).sum()) > most:
            low = middle + 1
        else:
            high = middle
    chunk, split = low, graph or low < longest
    chunks = -(-np.maximum(lengths, 1) // chunk)
    work = [(b, t, c) for b in range(batch) for t in range(tiles) for c in range(chunks[b])]
    padded = max(most, -(-batch * group // tile) + batch - 1) if graph else len(work)
    assert len(work) <= padded, "new batch size should not exceed padded batch size"
    begins = np.concatenate([[0], np.cumsum(chunks)])

    ints, floats, info = Memory(), Memory(), dict.fromkeys(PlanInfo._fields, 0)

    def put(name: str, values: object, room: int, dtype: type = np.int32, alignment: int = ALIGNMENT) -> None:
        begin = info[name] = ints.take(room * np.dtype(dtype).itemsize, alignment)
        placed = np.asarray(values, dtype).view(np.uint8)
        memory[begin : begin + len(placed)] = placed

    indices = np.array(work).T
    for name, values in zip(("request_indices", "qo_tile_indices", "kv_tile_indices"), indices, strict=True):
        put(f"{name}_offset", values, padded)
    put("o_indptr_offset", begins, batch + 1)
    put("kv_chunk_size_ptr_offset", [chunk], 1, alignment=1)
    if graph:
        put("total_num_rows_offset", [batch], 1)
    if split:
        rows = -(-padded * tile // group)
        assert begins[-1] <= rows, "partial outputs need more rows than the plan reserved"
        info["v_offset"] = floats.take(4 * group * rows * channels)
        info["s_offset"] = floats.take(4 * group * rows)
        put("merge_indptr_offset", begins, batch + 1)
    if graph:
        put("block_valid_mask_offset", np.arange(padded) < len(work), padded, np.bool_)
    info |= {
        "padded_batch_size": padded, "total_num_rows": batch, "cta_tile_q": tile, "enable_cuda_graph": int(graph),
        "split_kv": int(split),
    }  # fmt: skip
    return PlanInfo(**info), ints.taken, floats.taken
