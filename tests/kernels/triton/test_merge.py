"""Merging on a GPU is the torch reference's, over all parts at once, and so is the recalled mass.

Red when: a part is read at the wrong place, counted twice or left out, a weightless or broken part spoils the others, the
mass counts something else than what was read exactly, or its sum depends on the order of additions.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.kernels.merge import reference
from sglang_clusterkv.kernels.merge.reference import Partial
from sglang_clusterkv.kernels.merge.triton import merge, merge_parts
from sglang_clusterkv.kernels.workspace import Workspace, WorkspaceShape, make_workspace
from tests.support.filled import Guarded, merged

BATCH, HEADS = 2, 2
STEP = 2.0**-20  # of the accumulated shares


def filled_workspace(
    device: str, guarded: Guarded, *, splits: int, parts: int, group: int = 3, channels: int = 64
) -> Workspace:
    """Random parts in a workspace that has room for more of everything."""
    shape = WorkspaceShape(
        batch=BATCH + 1, heads=HEADS, group=group, channels=channels, clusters=1, segments=1, base=1, candidates=1,
        budget=1, own=1, splits=splits + 2, parts=parts + 1,
    )  # fmt: skip
    w = make_workspace(shape, device, guarded)
    generator = torch.Generator().manual_seed(splits)

    def put(tensor: torch.Tensor, count: int, factor: float) -> None:
        there = tensor[:BATCH, :, :count]
        there.copy_(factor * torch.randn(there.shape, generator=generator))

    put(w.exact_output, splits, 1.0)
    put(w.exact_lse, splits, 20.0)
    put(w.rest_output, parts, 1.0)
    put(w.rest_lse, parts, 20.0)
    w.total[:BATCH] = merged(w.exact_output[:BATCH, :, :splits], w.exact_lse[:BATCH, :, :splits]).lse.float() + 1.0
    return w


def halves(w: Workspace, splits: int, parts: int) -> tuple[Partial, Partial]:
    """(exact, rest), each as one part."""
    exact = merged(w.exact_output[:BATCH, :, :splits], w.exact_lse[:BATCH, :, :splits])
    return exact, merged(w.rest_output[:BATCH, :, :parts], w.rest_lse[:BATCH, :, :parts])


def noted(exact: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The reference's accumulator after one step."""
    mass = torch.zeros(2, dtype=torch.float64, device=exact.device)
    reference.note_mass(mass, exact, whole)
    return mass


@pytest.mark.parametrize(
    ("splits", "parts", "group", "channels"),
    [(1, 1, 1, 64), (9, 4, 3, 64), (33, 40, 2, 64), (5, 3, 7, 96), (2, 1, 1, 256)],
)
def test_all_parts_become_one(splits: int, parts: int, group: int, channels: int, device: str) -> None:
    guarded = Guarded(device)
    w = filled_workspace(device, guarded, splits=splits, parts=parts, group=group, channels=channels)
    mass = torch.zeros(2, dtype=torch.float64, device=device)
    result = merge(w, BATCH, splits, parts, mass, torch.float32)
    exact, rest = halves(w, splits, parts)
    expected = reference.merge(exact, rest)
    torch.testing.assert_close(result, expected.output.flatten(1, 2).float(), atol=1e-5, rtol=1e-5)
    shares = BATCH * HEADS * group
    torch.testing.assert_close(mass, noted(exact.lse, expected.lse), atol=shares * STEP, rtol=1e-6)
    assert float(mass[1]) == shares
    guarded.assert_untouched()


def test_without_an_estimate_the_mass_is_a_part_of_the_total(device: str) -> None:
    w = filled_workspace(device, Guarded(device), splits=3, parts=1)
    w.total[0, 0] -= 2.0  # less than what was read: a share is one at most
    mass = torch.full((2,), 5.0, dtype=torch.float64, device=device)
    result = merge(w, BATCH, 3, 0, mass, torch.float32)
    exact, _ = halves(w, 3, 1)
    torch.testing.assert_close(result, exact.output.flatten(1, 2).float(), atol=1e-5, rtol=1e-5)
    expected = 5.0 + noted(exact.lse, w.total[:BATCH].double())
    torch.testing.assert_close(mass, expected, atol=12 * STEP, rtol=1e-6)


def test_weightless_parts_count_nothing(device: str) -> None:
    w = filled_workspace(device, Guarded(device), splits=3, parts=2)
    w.exact_output[:, :, 1], w.exact_lse[:, :, 1] = 0.0, -torch.inf
    w.rest_output[0], w.rest_lse[0] = 0.0, -torch.inf
    mass = torch.zeros(2, dtype=torch.float64, device=device)
    result = merge(w, BATCH, 3, 2, mass, torch.float32)
    exact, rest = halves(w, 3, 2)
    torch.testing.assert_close(result[0], exact.output[0].flatten(0, 1).float(), atol=1e-5, rtol=1e-5)
    whole = reference.merge(exact, rest)
    torch.testing.assert_close(result, whole.output.flatten(1, 2).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mass, noted(exact.lse, whole.lse), atol=12 * STEP, rtol=1e-6)


def test_one_broken_head_does_not_hide_the_others(device: str) -> None:
    w = filled_workspace(device, Guarded(device), splits=2, parts=1)
    w.exact_lse[0, 0, 0, 1] = torch.nan
    mass = torch.zeros(2, dtype=torch.float64, device=device)
    result = merge(w, BATCH, 2, 1, mass, torch.float32)
    exact, rest = halves(w, 2, 1)
    torch.testing.assert_close(mass, noted(exact.lse, reference.merge(exact, rest).lse), atol=12 * STEP, rtol=1e-6)
    assert result.isnan().any(-1).flatten().tolist() == [False, True] + 10 * [False]


def test_the_mass_is_a_multiple_of_its_step(device: str) -> None:
    """Multiples of 2^-20 below 2^33 are exact in float64, so additions in any order give the same sum."""
    w = filled_workspace(device, Guarded(device), splits=3, parts=2)
    mass = torch.zeros(2, dtype=torch.float64, device=device)
    merge(w, BATCH, 3, 2, mass, torch.float32)
    assert float(mass[0] / STEP) == round(float(mass[0] / STEP)) and float(mass[0]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_queries_dtype(dtype: torch.dtype, device: str) -> None:
    w = filled_workspace(device, Guarded(device), splits=3, parts=2)
    output, lse = w.exact_output[:BATCH, :, :3].contiguous(), w.exact_lse[:BATCH, :, :3].contiguous()
    result = merge_parts(output, lse, dtype)
    assert result.dtype is dtype and result.shape == (BATCH, 6, 64)
    expected = merged(output, lse).output.flatten(1, 2)
    # The interpreter cuts bf16 off instead of rounding: one unit in the last place.
    torch.testing.assert_close(result.double(), expected, atol=0, rtol=2.0**-7 if dtype is torch.bfloat16 else 2.0**-9)
