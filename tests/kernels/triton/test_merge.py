"""Merging on a GPU is the torch reference's, over all parts at once, and so is the recalled mass.

Red when: a part is read at the wrong place, counted twice or left out, a weightless or broken part spoils the others, padding
gives a NaN, the mass counts something else than what sparse requests read exactly, or its sum depends on the order of
additions.
"""

from __future__ import annotations

import pytest
import torch

from sglang_clusterkv.kernels.merge import reference
from sglang_clusterkv.kernels.merge.reference import Partial
from sglang_clusterkv.kernels.merge.triton import merge, merge_parts
from sglang_clusterkv.kernels.workspace import WorkspaceShape, make_workspace
from sglang_clusterkv.memory.step import SparseStep
from tests.support.filled import Guarded, merged

BATCH, HEADS = 2, 2
STEP = 2.0**-20  # of the accumulated shares


class Parts:
    """Random parts of a step in a workspace that has room for more of everything.

    Attributes:
        step: its lists, of which merge reads how many pages each request has.
        mass: float64 [H, 2], of the layer.
    """

    def __init__(
        self,
        device: str,
        *,
        splits: int,
        parts: int,
        group: int = 3,
        channels: int = 64,
        guarded: Guarded | None = None,
    ) -> None:
        shape = WorkspaceShape(
            batch=BATCH + 1, heads=HEADS, group=group, channels=channels, clusters=1, segments=1, base=1, candidates=1,
            budget=1, own=1, exact_parts=BATCH * HEADS * splits + 3, rest_parts=BATCH * HEADS * parts + 1,
        )  # fmt: skip
        self.w = make_workspace(shape, device, guarded or Guarded(device))
        self.splits, self.parts = splits, parts
        self.step = lists_of(torch.full((BATCH,), 7, device=device))
        self.mass = torch.zeros(HEADS, 2, dtype=torch.float64, device=device)
        generator = torch.Generator().manual_seed(splits)
        for values, factor in zip((*self.exact, *self.rest), (1.0, 20.0, 1.0, 20.0), strict=True):
            values.copy_(factor * torch.randn(values.shape, generator=generator))
        self.w.total[:BATCH] = merged(*self.exact).lse.float() + 1.0

    @property
    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w.exact(BATCH, self.splits)

    @property
    def rest(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w.rest(BATCH, self.parts)

    def merge(self, *, estimated: bool = True) -> torch.Tensor:
        parts = self.parts if estimated else 0
        return merge(self.w, self.step, self.splits, parts, self.mass, torch.float32)

    def halves(self) -> tuple[Partial, Partial]:
        """(exact, rest), each as one part."""
        return merged(*self.exact), merged(*self.rest)


def lists_of(page_count: torch.Tensor) -> SparseStep:
    """A step of which nothing but its pages' number is read."""
    nothing = page_count.new_zeros(len(page_count), 1)
    zeros = nothing[:, 0]
    return SparseStep(len(page_count), nothing, page_count, nothing, nothing, zeros, nothing, zeros, 0, zeros)


def noted(exact: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The reference's accumulators after one step, [H, 2]."""
    mass = torch.zeros(HEADS, 2, dtype=torch.float64, device=exact.device)
    for head in range(HEADS):
        reference.note_mass(mass[head], exact[:, head], whole[:, head])
    return mass


@pytest.mark.parametrize(
    ("splits", "parts", "group", "channels"),
    [(1, 1, 1, 64), (9, 4, 3, 64), (33, 40, 2, 64), (5, 3, 7, 96), (2, 1, 1, 256)],
)
def test_all_parts_become_one(splits: int, parts: int, group: int, channels: int, device: str) -> None:
    guarded = Guarded(device)
    filled = Parts(device, splits=splits, parts=parts, group=group, channels=channels, guarded=guarded)
    result = filled.merge()
    exact, rest = filled.halves()
    expected = reference.merge(exact, rest)
    torch.testing.assert_close(result, expected.output.flatten(1, 2).float(), atol=1e-5, rtol=1e-5)
    shares = BATCH * group
    torch.testing.assert_close(filled.mass, noted(exact.lse, expected.lse), atol=shares * STEP, rtol=1e-6)
    assert filled.mass[:, 1].tolist() == [shares] * HEADS
    guarded.assert_untouched()


def test_without_an_estimate_the_mass_is_a_part_of_the_total(device: str) -> None:
    filled = Parts(device, splits=3, parts=1)
    filled.w.total[0, 0] -= 2.0  # less than what was read: a share is one at most
    filled.mass += 5.0
    result = filled.merge(estimated=False)
    exact, _ = filled.halves()
    torch.testing.assert_close(result, exact.output.flatten(1, 2).float(), atol=1e-5, rtol=1e-5)
    expected = 5.0 + noted(exact.lse, filled.w.total[:BATCH].double())
    torch.testing.assert_close(filled.mass, expected, atol=12 * STEP, rtol=1e-6)


def test_weightless_parts_count_nothing(device: str) -> None:
    """Nor are their outputs read: nothing was written there."""
    filled = Parts(device, splits=3, parts=2)
    (output, lse), (rest_output, rest_lse) = filled.exact, filled.rest
    output[:, :, 1], lse[:, :, 1] = torch.nan, -torch.inf
    rest_output[0], rest_lse[0] = torch.nan, -torch.inf
    result = filled.merge()
    output.nan_to_num_(), rest_output.nan_to_num_()
    exact, rest = filled.halves()
    torch.testing.assert_close(result[0], exact.output[0].flatten(0, 1).float(), atol=1e-5, rtol=1e-5)
    whole = reference.merge(exact, rest)
    torch.testing.assert_close(result, whole.output.flatten(1, 2).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(filled.mass, noted(exact.lse, whole.lse), atol=12 * STEP, rtol=1e-6)


@pytest.mark.parametrize("estimated", [True, False])
def test_only_sparse_requests_have_an_estimate_and_count_for_the_mass(estimated: bool, device: str) -> None:
    """The other one is dense or padding: what lies at its parts of the estimate is another step's."""
    filled = Parts(device, splits=3, parts=2)
    filled.step = lists_of(torch.tensor([0, 7], device=device))
    filled.rest[0][0], filled.rest[1][0], filled.w.total[0] = torch.nan, torch.nan, torch.nan
    result = filled.merge(estimated=estimated)
    exact, rest = filled.halves()
    whole = reference.merge(exact, rest) if estimated else exact
    torch.testing.assert_close(result[0], exact.output[0].flatten(0, 1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result[1], whole.output[1].flatten(0, 1).float(), atol=1e-5, rtol=1e-5)
    total = whole.lse if estimated else filled.w.total[:BATCH].double()
    torch.testing.assert_close(filled.mass, noted(exact.lse[1:], total[1:]), atol=12 * STEP, rtol=1e-6)


@pytest.mark.parametrize("pages", [0, 7])
def test_a_request_that_attends_to_nothing_gives_nothing(pages: int, device: str) -> None:
    """Padding of a captured batch: one NaN would reach every request where a model scales by a batch's largest number."""
    filled = Parts(device, splits=3, parts=2)
    filled.step = lists_of(torch.tensor([pages, 7], device=device))
    filled.exact[0][0], filled.exact[1][0] = torch.nan, -torch.inf
    filled.rest[0][0], filled.rest[1][0] = torch.nan, -torch.inf
    result = filled.merge()
    assert not result[0].any() and result[1].isfinite().all() and filled.mass.isfinite().all()


def test_one_broken_head_does_not_hide_the_others(device: str) -> None:
    filled = Parts(device, splits=2, parts=1)
    filled.exact[1][0, 0, 0, 1] = torch.nan
    result = filled.merge()
    exact, rest = filled.halves()
    expected = noted(exact.lse, reference.merge(exact, rest).lse)
    torch.testing.assert_close(filled.mass, expected, atol=12 * STEP, rtol=1e-6)
    assert result.isnan().any(-1).flatten().tolist() == [False, True] + 10 * [False]


def test_the_mass_is_a_multiple_of_its_step(device: str) -> None:
    """Multiples of 2^-20 below 2^33 are exact in float64, so additions in any order give the same sum."""
    filled = Parts(device, splits=3, parts=2)
    filled.merge()
    sums = filled.mass[:, 0] / STEP
    assert sums.tolist() == sums.round().tolist() and (sums > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_queries_dtype(dtype: torch.dtype, device: str) -> None:
    output, lse = Parts(device, splits=3, parts=2).exact
    result = merge_parts(output, lse, dtype)
    assert result.dtype is dtype and result.shape == (BATCH, 6, 64)
    expected = merged(output, lse).output.flatten(1, 2)
    # The interpreter cuts bf16 off instead of rounding: one unit in the last place.
    torch.testing.assert_close(result.double(), expected, atol=0, rtol=2.0**-7 if dtype is torch.bfloat16 else 2.0**-9)
