"""Attend on a GPU: split flash decoding over a list of slots, gathered from the pool row by row.

The list of a (request, kv head) is the always-attended tokens, shared by the kv heads, then the head's recalled tokens. It is
cut into up to `splits` parts of whole tiles, as many as its length is worth; one program attends to one part with all query
heads of the kv head, so every key and value row is read once. The always-attended tokens' logits are taken from score, which
has read their keys already: the 4 bytes of each query head are fewer than a key row.

What a request of a step is, its counts say: one with `dense_count` tokens attends to that many of its pages, one with neither
pages of clusters nor these is padding and gives nothing. So one launch takes any mixture, and a captured graph as well. Dense
decode is a kernel of its own, for batches without a sparse request and for layers with a window or a cap.
With a host tier a program reads each row from where it is, and counts what it read from the host.

Parts are merged in the order of the splits (kernels/merge/triton.py), so the result is a function of the inputs alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.merge.triton import merge_parts
from sglang_clusterkv.kernels.triton_fp8 import POINTERS, as_argument, query_dtype
from sglang_clusterkv.kernels.triton_rows import dot_dtype, padded_group
from sglang_clusterkv.kernels.triton_softmax import LOG2_E, LOWEST, add_tile, natural_lse, normalise
from sglang_clusterkv.kernels.triton_tier import (
    OFF,
    ROUNDED,
    SAME,
    find_slots,
    load_rows,
    tier_arguments,
    tier_case,
    tier_constants,
)
from sglang_clusterkv.memory.tier import DENSE_HOST, RECALLED_DEVICE, RECALLED_HOST

if TYPE_CHECKING:
    from sglang_clusterkv.kernels.workspace import Workspace
    from sglang_clusterkv.memory.step import SparseStep
    from sglang_clusterkv.memory.tier import TierLayer

_RECALLED_DEVICE, _RECALLED_HOST = tl.constexpr(RECALLED_DEVICE), tl.constexpr(RECALLED_HOST)
_DENSE_HOST = tl.constexpr(DENSE_HOST)
NO_WINDOW = 2**30  # tokens before the query's own that a layer without a sliding window sees


@triton.jit
def key_logits(
    query, keys, host, host_scales, at, line, away, listed, h, scale, cap,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 [G, N] of a query tile [G, D] and the keys of N tokens, found by `find_slots`; -inf if not listed."""
    d = tl.arange(0, BLOCK_D)[:, None]
    key = load_rows(
        keys, host, host_scales, at[None, :], line[None, :], away[None, :], listed[None, :], h, d, 0, HEADS, CHANNELS, PAGE,
        TIER, DOT,
    )  # fmt: skip
    logits = tl.dot(query, key, input_precision="ieee") * scale
    if CAPPED:  # cap tanh(logit / cap), with tanh(x) = 1 - 2 / (exp(2x) + 1)
        logits = cap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2_E / cap)) + 1.0))
    return tl.where(listed[None, :], logits * LOG2_E, float("-inf"))


@triton.jit
def value_rows(
    values, host, host_scales, at, line, away, listed, h,
    HEADS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Value rows [N, D] of N tokens, found by `find_slots`; 0 where one is not listed."""
    d = tl.arange(0, BLOCK_D)[None, :]
    return load_rows(
        values, host, host_scales, at[:, None], line[:, None], away[:, None], listed[:, None], h, d, 1, HEADS, CHANNELS, PAGE,
        TIER, DOT,
    )  # fmt: skip


@triton.jit
def attend_part(
    pair, split, splits, room, q, keys, values, device_page, host, host_scales, reads, base_slots, base_count, base_logit,
    recalled, recalled_count, pages, page_count, dense_count, output, lse, scale, cap, window, q_stride, base_stride,
    logit_stride, recalled_stride, pages_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, SHARE: tl.constexpr, SCORED: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr,
    TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What one program does: attend to the split-th part of the list of the pair-th (request, kv head); pair is int64.

    SCORED: of a request with pages of clusters the base tokens' logits are in base_logit [B, H, G, W], and recalled tokens
    follow; of one with a dense count its pages' tokens are the list. Else the base is all, and its logits come from keys.
    SHARE: least tiles that are worth a part. Output [B, H, room, G, D] and lse [B, H, room, G]; a part without a token leaves
    -inf and no output.
    """
    b, h = pair // HEADS, pair % HEADS
    g, d, n = tl.arange(0, GROUP_PAD), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    real = (g < GROUP)[:, None] & (d < CHANNELS)[None, :]
    queries = q + b * q_stride + (h * GROUP + g)[:, None] * CHANNELS + d[None, :]
    if not SCORED:
        query = tl.load(queries, mask=real, other=0.0).to(DOT)
    end = tl.load(base_count + b).to(tl.int32)
    keyed = 0
    if SCORED:
        whole = tl.load(dense_count + b).to(tl.int32)
        sparse = tl.load(page_count + b) > 0
        is_dense = whole > 0
        keyed = tl.where(sparse, tl.load(recalled_count + pair), whole)
        # One list of tokens of either kind: of slots, or of pages.
        unit = tl.where(is_dense, PAGE, 1)
        listing = tl.where(is_dense, pages + b * pages_stride, recalled + pair * recalled_stride)
    first = tl.maximum(end - 1 - window, 0)
    base_tiles = tl.cdiv(end - first, BLOCK_N)
    tiles = base_tiles + tl.cdiv(keyed, BLOCK_N)
    share = tl.maximum(tl.cdiv(tiles, splits), SHARE)
    begin_tile, end_tile = split * share, tl.minimum((split + 1) * share, tiles)

    sums = tl.zeros((GROUP_PAD, BLOCK_D), tl.float32)
    peak = tl.full((GROUP_PAD,), LOWEST, tl.float32)
    weight = tl.zeros((GROUP_PAD,), tl.float32)
    if TIER:
        from_host = tl.zeros((BLOCK_N,), tl.int32)
        found = 0
    for tile in range(begin_tile, tl.minimum(end_tile, base_tiles)):
        t = first + tile * BLOCK_N + n
        listed = t < end
        slots = tl.load(base_slots + b * base_stride + t, mask=listed, other=0)
        at, line, away = find_slots(device_page, slots, listed, HEADS, PAGE, TIER)
        if SCORED:
            scored = base_logit + (pair * GROUP + g)[:, None] * logit_stride + t[None, :]
            logits = tl.load(scored, mask=(g < GROUP)[:, None] & listed[None, :], other=0.0) * LOG2_E
            logits = tl.where(listed[None, :], logits, float("-inf"))
        else:
            logits = key_logits(
                query, keys, host, host_scales, at, line, away, listed, h, scale, cap,
                HEADS, CHANNELS, BLOCK_D, CAPPED, PAGE, TIER, DOT,
            )  # fmt: skip
            if TIER:
                from_host += (listed & away).to(tl.int32)
        rows = value_rows(
            values, host, host_scales, at, line, away, listed, h, HEADS, CHANNELS, BLOCK_D, PAGE, TIER, DOT
        )
        sums, peak, weight = add_tile(sums, peak, weight, logits, rows, DOT)
    if SCORED:
        query = tl.load(queries, mask=real, other=0.0).to(DOT)
        for tile in range(tl.maximum(begin_tile, base_tiles), end_tile):
            t = (tile - base_tiles) * BLOCK_N + n
            listed = t < keyed
            slots = tl.load(listing + tl.where(is_dense, t // PAGE, t), mask=listed, other=0) * unit + tl.where(
                is_dense, t % PAGE, 0
            )
            at, line, away = find_slots(device_page, slots, listed, HEADS, PAGE, TIER)
            logits = key_logits(
                query, keys, host, host_scales, at, line, away, listed, h, scale, cap,
                HEADS, CHANNELS, BLOCK_D, CAPPED, PAGE, TIER, DOT,
            )  # fmt: skip
            rows = value_rows(
                values, host, host_scales, at, line, away, listed, h, HEADS, CHANNELS, BLOCK_D, PAGE, TIER, DOT
            )
            sums, peak, weight = add_tile(sums, peak, weight, logits, rows, DOT)
            if TIER:
                from_host += (listed & away).to(tl.int32)
                found += tl.minimum(keyed - (tile - base_tiles) * BLOCK_N, BLOCK_N)

    row = (pair * room + split) * GROUP + g
    tl.store(
        output + row[:, None] * CHANNELS + d[None, :], normalise(sums, weight), mask=real & (begin_tile < end_tile)
    )
    tl.store(lse + row, natural_lse(peak, weight), mask=g < GROUP)
    if TIER:
        away_rows = tl.sum(from_host).to(tl.int64)
        if SCORED:
            if is_dense:
                tl.atomic_add(reads + _DENSE_HOST, away_rows)
            else:
                tl.atomic_add(reads + _RECALLED_HOST, away_rows)
                tl.atomic_add(reads + _RECALLED_DEVICE, found - away_rows)
        else:
            tl.atomic_add(reads + _DENSE_HOST, away_rows)


# What differs from step to step must not make a variant of the kernel: it would be compiled while serving.
@triton.jit(do_not_specialize=["splits", "base_stride", "pages_stride"])
def attend_kernel(
    q, keys, values, device_page, host, host_scales, reads, base_slots, base_count, base_logit, recalled, recalled_count,
    pages, page_count, dense_count, output, lse, scale, splits, q_stride, base_stride, logit_stride, recalled_stride,
    pages_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, SHARE: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, splits): one part of the always-attended and the recalled tokens, or of all tokens."""
    attend_part(
        tl.program_id(0).to(tl.int64), tl.program_id(1), splits, splits, q, keys, values, device_page, host, host_scales, reads,
        base_slots, base_count, base_logit, recalled, recalled_count, pages, page_count, dense_count, output, lse, scale, 0.0,
        1 << 30, q_stride, base_stride, logit_stride, recalled_stride, pages_stride,
        HEADS, GROUP, GROUP_PAD, CHANNELS, BLOCK_D, BLOCK_N, SHARE, True, False, PAGE, TIER, DOT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["window", "splits", "slots_stride"])
def dense_kernel(
    q, keys, values, device_page, host, host_scales, reads, slots, seq_lens, output, lse, scale, cap, window, splits,
    q_stride, slots_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, PAGE: tl.constexpr, TIER: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, splits): one part of a request's whole list, or of its last `window` + 1 tokens."""
    attend_part(
        tl.program_id(0).to(tl.int64), tl.program_id(1), splits, splits, q, keys, values, device_page, host, host_scales, reads,
        slots, seq_lens, None, None, None, None, None, None, output, lse, scale, cap, window, q_stride, slots_stride, 0, 0, 0,
        HEADS, GROUP, GROUP_PAD, CHANNELS, BLOCK_D, BLOCK_N, 1, False, CAPPED, PAGE, TIER, DOT,
    )  # fmt: skip


def tile_constants(heads: int, group: int, channels: int, dtype: torch.dtype, tier: int = OFF.value) -> dict[str, Any]:
    """The kernels' constants, by argument name; tier: a value of TIER."""
    # Two stages of keys and values have to fit beside another program's.
    tokens = 64 if channels <= 128 and dtype.itemsize == 2 else 32
    if tier == ROUNDED.value:
        tokens //= 2  # registers hold them beside those of the device
    return {
        "HEADS": heads,
        "GROUP": group,
        "GROUP_PAD": padded_group(group),
        "CHANNELS": channels,
        "BLOCK_D": triton.next_power_of_2(channels),
        "BLOCK_N": tokens,
        "DOT": dot_dtype(dtype),
    }


def _stages(channels: int, tier: int) -> int:
    """Of a launch. With a third one the compiler takes the registers that two tiers' addresses need, instead of spilling."""
    return 3 if tier == SAME.value and channels <= 64 else 2


def _constants(heads: int, group: int, channels: int, dtype: torch.dtype, tier: TierLayer | None) -> dict[str, Any]:
    """A launch's constants and stages."""
    constants = tier_constants(tier)
    form = constants["TIER"]
    return tile_constants(heads, group, channels, dtype, form) | constants | {"num_stages": _stages(channels, form)}


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: SparseStep,
    page_size: int,
    scale: float,
    w: Workspace,
    splits: int,
    tier: TierLayer | None = None,
) -> None:
    """Attend to sinks, window and recalled tokens, or all tokens of dense requests: the workspace's `exact`.

    Args:
        q: [B, H, G, D], contiguous but for its first dimension, in the dtype that `query_dtype` gives.
        keys: [slots, H, D], contiguous.
        values: likewise.
        step: the lists of this step.
        page_size: tokens per page.
        scale: of the logits.
        w: holds `base_logit` and `recalled`.
        splits: parts of a list at most; the workspace has room for so many of each (request, kv head).
        tier: where some slots' keys and values are on the host.
    """
    batch, heads, group, channels = q.shape
    constants = _constants(heads, group, channels, q.dtype, tier) | {"PAGE": page_size}
    attend_kernel[(batch * heads, splits)](
        q, as_argument(keys), as_argument(values), *tier_arguments(tier),
        step.base_slots, step.base_count, w.base_logit, w.recalled, w.recalled_count,
        step.pages, step.page_count, step.dense_count, w.exact_output, w.exact_lse, scale, splits, q.stride(0),
        step.base_slots.stride(0), w.shape.base, w.shape.budget, step.pages.stride(0),
        SHARE=max(1, grids.TOKENS_PER_SPLIT // constants["BLOCK_N"]), **constants,
    )  # fmt: skip


def dense_decode(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *,
    sliding_window: int = -1,
    logit_cap: float = 0.0,
    tier: TierLayer | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `reference.dense_decode`; two launches."""
    batch, heads, channels = q.shape[0], keys.shape[1], keys.shape[2]
    grouped = q.to(query_dtype(keys.dtype, q.dtype)).unflatten(1, (heads, -1))
    group = grouped.shape[2]
    window = sliding_window if sliding_window >= 0 else NO_WINDOW
    splits = grids.split_count(batch * heads, min(slots.shape[1], window + 1))
    output = torch.empty((batch, heads, splits, group, channels), dtype=torch.float32, device=q.device)
    lse = torch.empty((batch, heads, splits, group), dtype=torch.float32, device=q.device)
    dense_kernel[(batch * heads, splits)](
        grouped, as_argument(keys), as_argument(values), *tier_arguments(tier),
        slots, seq_lens, output, lse, scale, logit_cap, window, splits,
        grouped.stride(0), slots.stride(0), CAPPED=logit_cap > 0, **_constants(heads, group, channels, grouped.dtype, tier),
    )  # fmt: skip
    return merge_parts(output, lse, q.dtype, sinks)


_TYPES = {
    **dict.fromkeys(("q", "keys", "values"), "*bf16"),
    **dict.fromkeys(("base_slots", "base_count", "recalled", "slots", "seq_lens"), "*i64"),
    **dict.fromkeys(("pages", "page_count", "dense_count"), "*i64"),
    **{"recalled_count": "*i32"},
    **dict.fromkeys(("base_logit", "output", "lse"), "*fp32"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
    **dict.fromkeys(("splits", "window", "q_stride"), "i32"),
    **dict.fromkeys(("base_stride", "logit_stride", "recalled_stride", "slots_stride", "pages_stride"), "i32"),
}


def _case(
    name: str, kernel: Any, channels: int, group: int, tier: int = OFF.value, pool: str = "bf16", **holds: Any
) -> CompileCase:
    """A case of 8 kv heads, queries in bf16; tier: a value of TIER; pool: bf16 or one of `triton_fp8.POINTERS`."""
    pointer = POINTERS.get(pool, "*bf16")
    tier_types, tier_values = tier_case(tier, pointer)
    constants = tile_constants(8, group, channels, torch.bfloat16, tier)
    share = max(1, grids.TOKENS_PER_SPLIT // constants["BLOCK_N"])
    constants |= {"DOT": tl.bfloat16, "CAPPED": False, "SHARE": share, **tier_values}
    if kernel is attend_kernel:
        constants["PAGE"] = 16
    types = _TYPES | dict.fromkeys(("keys", "values"), pointer) | tier_types
    signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
    aligned = tuple(a for a, kind in signature.items() if kind[0] == "*" or a in ("logit_stride", "q_stride"))
    used = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    where = {OFF.value: "", SAME.value: " tier", ROUNDED.value: " int8 tier"}[tier]
    return CompileCase(
        f"{name} D={channels} G={group}{where}" + ("" if pool == "bf16" else f" {pool}"),
        kernel,
        signature,
        used,
        aligned,
        num_stages=_stages(channels, tier),
        **holds,
    )


COMPILE_CASES = [
    *(
        _case("attend", attend_kernel, d, g, tensor_cores=16, async_loads_128=8, programs_per_sm=2)
        for d, g in ((64, 3), (128, 4), (128, 8), (256, 4))
    ),
    *(
        _case("attend dense", dense_kernel, d, g, tensor_cores=16, async_loads_128=8, programs_per_sm=2)
        for d, g in ((64, 3), (128, 4), (256, 4))
    ),
    *(
        _case(name, kernel, d, g, SAME.value, tensor_cores=16, async_loads_128=8, programs_per_sm=2)
        for name, kernel in (("attend", attend_kernel), ("attend dense", dense_kernel))
        for d, g in ((64, 3), (128, 4), (256, 4))
    ),
    *(
        _case(name, kernel, d, g, ROUNDED.value, tensor_cores=8, async_loads_128=8, programs_per_sm=2)
        for name, kernel in (("attend", attend_kernel), ("attend dense", dense_kernel))
        for d, g in ((64, 3), (128, 4), (256, 4))
    ),
    *(
        _case("attend", attend_kernel, 128, 4, OFF.value, pool, tensor_cores=16, async_loads_128=8, programs_per_sm=2)
        for pool in POINTERS
    ),
    _case("attend", attend_kernel, 128, 4, SAME.value, "e4m3", tensor_cores=16, async_loads_128=8, programs_per_sm=2),
    _case(
        "attend dense", dense_kernel, 128, 4, OFF.value, "e4m3", tensor_cores=16, async_loads_128=8, programs_per_sm=2
    ),
]
