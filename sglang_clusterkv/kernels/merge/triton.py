"""Merge on a GPU: all parts of one query head by their log-sum-exps, in a fixed order; and the recalled mass.

One program has one query head: the parts are few (splits of attend, parts of the estimate), and all of them are loaded at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_clusterkv.kernels.compile_case import CompileCase
from sglang_clusterkv.kernels.triton_softmax import LOG2_E
from sglang_clusterkv.kernels.workspace import Workspace

# Shares are added to the float64 accumulator as multiples of this: sums below 2^33 are exact then, so that atomic additions
# give the same sum in any order.
SHARE_STEPS = tl.constexpr(1048576.0)
PARTS_AT_ONCE = 32


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
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """(sum [D], weight) of `parts` normalised outputs, relative to exp(peak); the first is row `first`."""
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    weight = 0.0
    for begin in range(0, parts, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        row = first + p * GROUP
        listed = p < parts
        share = tl.exp2((tl.load(lse + row, mask=listed, other=float("-inf")) - peak) * LOG2_E)
        at = output + row[:, None] * CHANNELS + d[None, :]
        rows = tl.load(at, mask=listed[:, None] & (d < CHANNELS)[None, :], other=0.0)
        total += tl.sum(rows * share[:, None], 0)
        weight += tl.sum(share, 0)
    return total, weight


COUNTS = ("splits", "parts", "exact_capacity", "rest_capacity", "queries")  # they change from step to step


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(
    exact_output, exact_lse, rest_output, rest_lse, total, merged, mass, splits, parts, exact_capacity, rest_capacity,
    queries,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
    ESTIMATED: tl.constexpr, NOTED: tl.constexpr,
):  # fmt: skip
    """Grid (requests * kv heads, query heads of a group).

    exact_output [B, H, P, G, D], exact_lse [B, H, P, G]; rest_* likewise, if ESTIMATED; merged [B, H, G, D]. If NOTED, the
    share of the mass that was read exactly goes to mass float64 [2] (see `reference.note_mass`); the whole is the parts'
    sum or, not ESTIMATED, exp(total [B, H, G]).
    """
    pair, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    exact_first = pair * exact_capacity * GROUP + g
    exact_peak = highest_lse(exact_lse, exact_first, splits, GROUP, BLOCK_P)
    peak = exact_peak
    if ESTIMATED:
        rest_first = pair * rest_capacity * GROUP + g
        peak = tl.maximum(peak, highest_lse(rest_lse, rest_first, parts, GROUP, BLOCK_P))
    sums, exact = sum_parts(exact_output, exact_lse, exact_first, splits, peak, GROUP, CHANNELS, BLOCK_D, BLOCK_P)
    whole = exact
    if ESTIMATED:
        others, rest = sum_parts(rest_output, rest_lse, rest_first, parts, peak, GROUP, CHANNELS, BLOCK_D, BLOCK_P)
        sums += others
        whole += rest
    d = tl.arange(0, BLOCK_D)
    tl.store(merged + (pair * GROUP + g) * CHANNELS + d, (sums / whole).to(merged.dtype.element_ty), mask=d < CHANNELS)
    if NOTED:
        if ESTIMATED:
            share = exact / whole
        else:
            share = exact * tl.exp2((peak - tl.load(total + pair * GROUP + g)) * LOG2_E)
        share = tl.where(share == share, tl.minimum(share, 1.0), 0.0)  # NaN counts as 0
        # A power of two, so exact; divided by, it would be as exact as the hardware's fast division happens to be.
        rounded = tl.floor(share * SHARE_STEPS + 0.5) * (1.0 / SHARE_STEPS)
        tl.atomic_add(mass, rounded.to(tl.float64), sem="relaxed")
        if (pair == 0) & (g == 0):
            tl.atomic_add(mass + 1, queries.to(tl.float64), sem="relaxed")


def _launch(
    exact: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    rest: tuple[torch.Tensor, torch.Tensor] | None,
    parts: int,
    total: torch.Tensor | None,
    mass: torch.Tensor | None,
    merged: torch.Tensor,
) -> None:
    """Launch over merged [B, H, G, D]; `exact` and `rest` are (output, lse) with capacities of their own."""
    batch, heads, group, channels = merged.shape
    rest_output, rest_lse = rest or (None, None)
    merge_kernel[(batch * heads, group)](
        *exact, rest_output, rest_lse, total, merged, mass, splits, parts, exact[1].shape[2],
        0 if rest_lse is None else rest_lse.shape[2], batch * heads * group,
        GROUP=group, CHANNELS=channels, BLOCK_D=triton.next_power_of_2(channels), BLOCK_P=PARTS_AT_ONCE,
        ESTIMATED=rest is not None, NOTED=mass is not None,
    )  # fmt: skip


def merge(w: Workspace, batch: int, splits: int, parts: int, mass: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Merge what attend and the estimate left in the workspace, and note the recalled mass.

    Args:
        w: the workspace.
        batch: requests.
        splits: parts that attend wrote.
        parts: parts that the estimate wrote; 0: there was none, then only the mass knows of what was not recalled.
        mass: float64 [2] of the layer.
        dtype: of the result.

    Returns:
        [batch, heads, D].
    """
    shape = w.shape
    merged = torch.empty((batch, shape.heads, shape.group, shape.channels), dtype=dtype, device=w.exact_lse.device)
    rest = (w.rest_output, w.rest_lse) if parts else None
    _launch((w.exact_output, w.exact_lse), splits, rest, parts, w.total, mass, merged)
    return merged.flatten(1, 2)


def merge_parts(output: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Merge the parts of one attention: output [B, H, P, G, D], lse [B, H, P, G] -> [B, H * G, D] in `dtype`."""
    batch, heads, parts, group, channels = output.shape
    merged = torch.empty((batch, heads, group, channels), dtype=dtype, device=output.device)
    _launch((output, lse), parts, None, 0, None, None, merged)
    return merged.flatten(1, 2)


_TYPES = {
    **dict.fromkeys(("exact_output", "exact_lse", "rest_output", "rest_lse", "total"), "*fp32"),
    **{"merged": "*bf16", "mass": "*fp64"},
    **dict.fromkeys(COUNTS, "i32"),
}


def _case(channels: int) -> CompileCase:
    """A case of Llama's group."""
    constants = {
        "GROUP": 4, "CHANNELS": channels, "BLOCK_D": channels, "BLOCK_P": PARTS_AT_ONCE, "ESTIMATED": True, "NOTED": True,
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
