"""The lists that FlashInfer reads: of every (request, kv head), which rows of the pool it attends to (see `flashinfer.py`).

Row of token slot s and kv head h: s * H + h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.grids import LISTED_TOKENS

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.step import SparseStep

TILE = LISTED_TOKENS  # per program


@triton.jit(do_not_specialize=["slots_stride", "pages_stride"])
def listed_kernel(
    slots, counts, pages, dense_counts, indptr, indices, slots_stride, pages_stride,
    HEADS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (requests, tiles of `BLOCK` tokens): what a request attends to in every layer, in each kv head's list.

    Its always-attended tokens, all tokens where it is dense; of padding slot 0, for no list may be empty.
    """
    request = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    count, dense = tl.load(counts + request), tl.load(dense_counts + request)
    base = tl.load(slots + request * slots_stride + t, mask=(dense == 0) & (t < count), other=0)
    page = tl.load(pages + request * pages_stride + t // PAGE, mask=t < dense, other=0)
    slot = tl.where(dense > 0, page * PAGE + t % PAGE, base)
    listed = t < tl.maximum(tl.where(dense > 0, dense, count), 1)
    for head in range(HEADS):
        begin = tl.load(indptr + request * HEADS + head)
        tl.store(indices + begin + t, (slot * HEADS + head).to(tl.int32), mask=listed)


@triton.jit
def recalled_kernel(
    recalled, recalled_count, page_count, base_count, indptr, indices, q, queries, recalled_stride, q_stride,
    HEADS: tl.constexpr, QUERIES: tl.constexpr, QUERIES_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, tiles of `BLOCK` tokens): the recalled tokens of a sparse request, behind the others.

    And, of any request, q [B, H, QUERIES elements], `q_stride` between requests, to `queries` [B * H, QUERIES]: models cut a
    request's queries from one product with keys and values, and FlashInfer takes one stride.
    """
    pair = tl.program_id(0).to(tl.int64)
    request, head = pair // HEADS, pair % HEADS
    t = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) == 0:
        i = tl.arange(0, QUERIES_PAD)
        row = tl.load(q + request * q_stride + head * QUERIES + i, mask=i < QUERIES, other=0.0)
        tl.store(queries + pair * QUERIES + i, row, mask=i < QUERIES)
    if tl.load(page_count + request) > 0:
        listed = t < tl.load(recalled_count + pair)
        slot = tl.load(recalled + pair * recalled_stride + t, mask=listed, other=0)
        begin = tl.load(indptr + pair) + tl.load(base_count + request)
        tl.store(indices + begin + t, (slot * HEADS + head).to(tl.int32), mask=listed)


def list_always(
    step: SparseStep, most: int, page_size: int, indptr: torch.Tensor, indices: torch.Tensor, heads: int
) -> None:
    """Write what all layers of a step attend to.

    Args:
        step: its lists.
        most: tokens that a request always attends to at most, those of dense requests included.
        page_size: tokens per page.
        indptr: int32 [B * heads + 1], where each (request, kv head)'s list begins.
        indices: int32, the lists.
        heads: kv heads.
    """
    listed_kernel[(step.batch, triton.cdiv(most, TILE))](
        step.base_slots, step.base_count, step.pages, step.dense_count, indptr, indices,
        step.base_slots.stride(0), step.pages.stride(0), HEADS=heads, PAGE=page_size, BLOCK=TILE,
    )  # fmt: skip


def lay_out(
    step: SparseStep, w: Workspace, q: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, queries: torch.Tensor
) -> None:
    """Write what a layer has recalled, and its queries as FlashInfer takes them.

    Args:
        step: its lists.
        w: as recall left it.
        q: [B, H, G, D], those of a request side by side.
        indptr: int32 [B * H + 1], where each (request, kv head)'s list begins.
        indices: int32, the lists.
        queries: where these go, like q, [B or more, H, G, D].
    """
    shape, elements = w.shape, q.shape[2] * q.shape[3]
    recalled_kernel[(step.batch * shape.heads, triton.cdiv(shape.budget, TILE))](
        w.recalled, w.recalled_count, step.page_count, step.base_count, indptr, indices, q, queries,
        shape.budget, q.stride(0), HEADS=shape.heads, QUERIES=elements, QUERIES_PAD=triton.next_power_of_2(elements),
        BLOCK=TILE,
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("q", "queries"), "*bf16"),
    **dict.fromkeys(("slots", "counts", "pages", "dense_counts", "recalled", "page_count", "base_count"), "*i64"),
    **dict.fromkeys(("recalled_count", "indptr", "indices"), "*i32"),
    **dict.fromkeys(("slots_stride", "pages_stride", "recalled_stride", "q_stride"), "i32"),
}


def _case(name: str, kernel: object, constants: dict[str, int]) -> CompileCase:
    names = [name for name in kernel.arg_names if name in _TYPES]  # type: ignore[attr-defined]
    aligned = tuple(name for name in names if _TYPES[name][0] == "*" or name in ("recalled_stride", "q_stride"))
    return CompileCase(name, kernel, {name: _TYPES[name] for name in names}, constants, aligned, programs_per_sm=8)


COMPILE_CASES = [
    _case("attend listed", listed_kernel, {"HEADS": 8, "PAGE": 16, "BLOCK": TILE}),
    _case("attend listed, recalled", recalled_kernel, {"HEADS": 8, "QUERIES": 512, "QUERIES_PAD": 512, "BLOCK": TILE}),
]
