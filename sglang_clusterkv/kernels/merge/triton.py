"""Merge on a GPU: all parts of one query head by their log-sum-exps, in a fixed order; and the recalled mass.

One program has one query head: the parts are few (splits of attend, parts of the estimate), and all of them are loaded at once.
A part whose log-sum-exp is -inf is not read. A request that has no other gives 0: padding of a captured batch, for one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.triton_softmax import LOG2_E
from sglang_clusterkv.kernels.workspace import Workspace

if TYPE_CHECKING:
    from sglang_clusterkv.memory.step import SparseStep

# Shares are added to the float64 accumulator as multiples of this: sums below 2^33 are exact then, so that atomic additions
# give the same sum in any order.
SHARE_STEPS = tl.constexpr(1048576.0)
PARTS_AT_ONCE = 32
NATURAL, BINARY = (
    1.0,
    math.log(2),
)  # natural units of a log-sum-exp, by its base: ours are of base e, FlashInfer's of base 2


@triton.jit
def highest_lse(lse, first, parts, GROUP: tl.constexpr, BLOCK_P: tl.constexpr):
    """The largest of `parts` log-sum-exps, `GROUP` apart, the first at `first`."""
    highest = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    for begin in range(0, parts, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        highest = tl.maximum(highest, tl.load(lse + first + p * GROUP, mask=p < parts, other=float("-inf")))
    return tl.max(highest, 0)


@triton.jit
def sum_parts(
    output, lse, first, parts, peak, GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """(sum [D], weight) of `parts` normalised outputs, relative to exp(peak), which is finite; the first is row `first`.

    UNIT: of their log-sum-exps, in natural ones.
    """
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    weight = 0.0
    for begin in range(0, parts, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        row = first + p * GROUP
        listed = p < parts
        own = tl.load(lse + row, mask=listed, other=float("-inf"))
        share = tl.exp2((own * UNIT - peak) * LOG2_E)
        at = output + row[:, None] * CHANNELS + d[None, :]
        rows = tl.load(at, mask=(own != float("-inf"))[:, None] & (d < CHANNELS)[None, :], other=0.0)
        total += tl.sum(rows * share[:, None], 0)
        weight += tl.sum(share, 0)
    return total, weight


COUNTS = ("splits", "parts")  # they change from step to step


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    exact_output, exact_lse, rest_output, rest_lse, sinks, total, page_count, exact_count, base_count, dense_count, merged,
    mass, splits, parts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ESTIMATED: tl.constexpr, NOTED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, query heads of a group).

    exact_output [B, H, splits, G, D], exact_lse [B, H, splits, G]; rest_* likewise, if ESTIMATED; merged [B, H, G, D].
    exact_count: int32 [B, H], where both have room for `parts` parts: so many are exact, all others of the rest; None: all have
    theirs. If NOTED, a request without pages of clusters (page_count [B]) has no rest, and of all others the share of the mass
    that was read exactly goes to mass float64 [H, 2] (see `reference.note_mass`); the whole is the parts' sum or, not
    ESTIMATED, exp(total [B, H, G]). sinks: [H, G], learned logits that are read exactly and have no value; None: none.
    base_count, dense_count: [B]; a request with neither is padding, whose exact parts count for nothing; None: it has none.
    UNIT: of exact_lse, in natural ones.
    """
    pair, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    exact_first = pair * splits * GROUP + g
    rest_first = pair * parts * GROUP + g
    if exact_count is not None:
        splits = tl.load(exact_count + pair)
        parts -= splits
    if NOTED:
        sparse = tl.load(page_count + pair // HEADS) > 0
        parts = tl.where(sparse, parts, 0)
    if base_count is not None:
        request = pair // HEADS
        splits = tl.where(tl.load(base_count + request) + tl.load(dense_count + request) > 0, splits, 0)
    peak = highest_lse(exact_lse, exact_first, splits, GROUP, BLOCK_P) * UNIT
    if ESTIMATED:
        peak = tl.maximum(peak, highest_lse(rest_lse, rest_first, parts, GROUP, BLOCK_P))
    if sinks is not None:
        sink = tl.load(sinks + pair % HEADS * GROUP + g).to(tl.float32)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    sums, exact = sum_parts(exact_output, exact_lse, exact_first, splits, peak, GROUP, CHANNELS, BLOCK_D, BLOCK_P, UNIT)
    if sinks is not None:
        exact += tl.exp2((sink - peak) * LOG2_E)
    whole = exact
    if ESTIMATED:
        others, rest = sum_parts(rest_output, rest_lse, rest_first, parts, peak, GROUP, CHANNELS, BLOCK_D, BLOCK_P, 1.0)
        sums += others
        whole += rest
    d = tl.arange(0, BLOCK_D)
    normalised = sums / tl.where(whole == 0.0, 1.0, whole)
    tl.store(merged + (pair * GROUP + g) * CHANNELS + d, normalised.to(merged.dtype.element_ty), mask=d < CHANNELS)
    if NOTED:
        if ESTIMATED:
            share = exact / whole
        else:
            share = exact * tl.exp2((peak - tl.load(total + pair * GROUP + g)) * LOG2_E)
        share = tl.where(share == share, tl.minimum(share, 1.0), 0.0)  # NaN counts as 0
        # A power of two, so exact; divided by, it would be as exact as the hardware's fast division happens to be.
        rounded = tl.floor(share * SHARE_STEPS + 0.5) * (1.0 / SHARE_STEPS)
        cell = mass + pair % HEADS * 2
        tl.atomic_add(cell, rounded.to(tl.float64), mask=sparse, sem="relaxed")
        tl.atomic_add(cell + 1, tl.full((), GROUP, tl.float64), mask=sparse & (g == 0), sem="relaxed")


NO_COUNTS = None, None  # all parts count


def _launch(
    exact: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    rest: tuple[torch.Tensor, torch.Tensor] | None,
    parts: int,
    total: torch.Tensor | None,
    page_count: torch.Tensor | None,
    exact_count: torch.Tensor | None,
    attended: tuple[torch.Tensor | None, torch.Tensor | None],
    mass: torch.Tensor | None,
    merged: torch.Tensor,
    sinks: torch.Tensor | None,
    unit: float = NATURAL,
) -> None:
    """Launch over merged [B, H, G, D]; `exact` and `rest` are (output, lse), `attended` the kernel's (base_count, dense_count);
    `unit` is that of exact's log-sum-exps."""
    batch, heads, group, channels = merged.shape
    rest_output, rest_lse = rest or (None, None)
    merge_kernel[(batch * heads, group)](
        *exact, rest_output, rest_lse, sinks, total, page_count, exact_count, *attended, merged, mass, splits, parts,
        HEADS=heads, GROUP=group, CHANNELS=channels, BLOCK_D=triton.next_power_of_2(channels), BLOCK_P=PARTS_AT_ONCE,
        ESTIMATED=rest is not None, NOTED=mass is not None, UNIT=unit,
    )  # fmt: skip


def merge(
    w: Workspace,
    step: SparseStep,
    splits: int,
    parts: int,
    mass: torch.Tensor,
    dtype: torch.dtype,
    sinks: torch.Tensor | None = None,
    binary: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    joined: bool = False,
) -> torch.Tensor:
    """Merge what attend and the estimate left in the workspace, and note the recalled mass of the sparse requests.

    Args:
        w: the workspace.
        step: the lists of this step.
        splits: parts of a (request, kv head) that attend wrote.
        parts: that the estimate wrote; 0: there was none, then only the mass knows of what was not recalled.
        mass: float64 [H, 2] of the layer.
        dtype: of the result.
        sinks: [heads], learned logits that have no token; None: there are none.
        binary: the exact part of whoever attended in our kernel's place, output [B, H, 1, G, D] and log-sum-exps of base 2
            [B, H, 1, G]; then the workspace has the estimate alone. Padding has a part there too, which is left out.
        joined: both were one launch with so many parts, `splits` as `parts`, of which `exact_count` are exact.

    Returns:
        [B, heads, D]; 0 for a request that attended to nothing.
    """
    shape = w.shape
    merged = torch.empty((step.batch, shape.heads, shape.group, shape.channels), dtype=dtype, device=w.exact_lse.device)
    rest = (w.rest_output, w.rest_lse) if parts else None
    if binary is not None:
        attended = step.base_count, step.dense_count
        _launch(binary, 1, rest, parts, w.total, step.page_count, None, attended, mass, merged, sinks, BINARY)
    else:
        exact = (w.exact_output, w.exact_lse)
        count = w.exact_count if joined else None
        _launch(exact, splits, rest, parts, w.total, step.page_count, count, NO_COUNTS, mass, merged, sinks)
    return merged.flatten(1, 2)


def merge_parts(
    output: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Merge the parts of one attention: output [B, H, P, G, D], lse [B, H, P, G] -> [B, H * G, D] in `dtype`; sinks [H * G]."""
    batch, heads, parts, group, channels = output.shape
    merged = torch.empty((batch, heads, group, channels), dtype=dtype, device=output.device)
    _launch((output, lse), parts, None, 0, None, None, None, NO_COUNTS, None, merged, sinks)
    return merged.flatten(1, 2)


_TYPES = {
    **dict.fromkeys(("exact_output", "exact_lse", "rest_output", "rest_lse", "total"), "*fp32"),
    **{"merged": "*bf16", "mass": "*fp64", "page_count": "*i64", "exact_count": "*i32"},
    **dict.fromkeys(COUNTS, "i32"),
}


def _case(channels: int) -> CompileCase:
    """A case of Llama's group."""
    constants = {
        "HEADS": 8, "GROUP": 4, "CHANNELS": channels, "BLOCK_D": channels, "BLOCK_P": PARTS_AT_ONCE, "ESTIMATED": True,
        "NOTED": True, "sinks": None, "base_count": None, "dense_count": None, "UNIT": NATURAL,
    }  # fmt: skip
    return CompileCase(
        f"merge D={channels}",
        merge_kernel,
        _TYPES,
        constants,
        tuple(name for name, kind in _TYPES.items() if kind[0] == "*" and name != "mass"),
        programs_per_sm=4,
    )


COMPILE_CASES = [_case(64), _case(128), _case(256)]
