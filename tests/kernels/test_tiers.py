"""What is read of keys and values is the same from either tier: sparse and dense decode, prefill, build, and the references.

Red when: a reader takes a slot for a device slot, or a row of another page, token, head or part; with `auto` a bit differs from
the same with all pages on the device; with `int8` the numba kernels differ from the references; or a reader says that it read
other rows from the host than it did.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend import cpu as attend_cpu
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.decode import cpu, reference
from sglang_clusterkv.kernels.extend import cpu as extend_cpu
from sglang_clusterkv.kernels.extend import reference as extend_reference
from sglang_clusterkv.memory.fp8 import FP8
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.step import SparseStep
from sglang_clusterkv.memory.tier import (
    BASE_HOST,
    BUILD_HOST,
    DENSE_HOST,
    PREFILL_HOST,
    RECALLED_DEVICE,
    RECALLED_HOST,
    Tier,
)
from tests.support.scenes import PAGE, Scene
from tests.support.tiers import tiered

SCALE, HEADS = 0.2, 4
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@dataclass
class Case:
    """A pool, the same in two tiers with a third of its pages on the device, and a sparse step."""

    scene: Scene
    tier: Tier
    step: SparseStep
    lengths: torch.Tensor
    q: torch.Tensor

    def arguments(self, tiered: bool) -> tuple[torch.Tensor, torch.Tensor, ClusterIndex, int, SparseStep, float]:
        """Of a layer of a sparse step after its queries."""
        keys, values = self.buffers(tiered)
        return keys, values, self.scene.index, 1, self.step, SCALE

    def buffers(self, tiered: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of layer 1."""
        return (self.tier.keys[1], self.tier.values[1]) if tiered else (self.scene.keys[1], self.scene.values[1])

    def slots(self) -> torch.Tensor:
        """All slots of the requests, [B, T]."""
        longest = int(self.lengths.max())
        return torch.stack([self.scene.slots(row, longest) for row in range(1, len(self.lengths) + 1)])

    def reads(self) -> list[int]:
        """Rows read so far, by kind; counted anew from here."""
        counts = self.tier.reads.tolist()
        self.tier.reads[:] = 0
        return counts


def case_of(dtype: torch.dtype, host_dtype: str = "auto") -> Case:
    """Two requests that decode sparsely."""
    config = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
    scene = Scene(config, dtype=dtype)
    lengths = [700, 333]
    for row, length in enumerate(lengths, 1):
        scene.prefill(row, length)
    step = scene.decode([1, 2], [length + 1 for length in lengths])
    assert step.sparse is not None and step.dense is None
    q = scene.queries(2, HEADS)
    q = q if dtype in FP8 else q.to(dtype)
    return Case(scene, tiered(scene, host_dtype), step.sparse, torch.tensor(lengths) + 1, q)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chain", [cpu, reference], ids=["cpu", "reference"])
def test_a_sparse_layer_is_the_same_bit_for_bit(chain: object, dtype: torch.dtype) -> None:
    case = case_of(dtype)
    here = chain.sparse_decode(case.q, *case.arguments(False))
    there = chain.sparse_decode(case.q, *case.arguments(True), tier=case.tier.layer(1))
    assert torch.equal(there, here) and here.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attend", [attend_cpu, attend_reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40, "logit_cap": 2.0}])
def test_a_dense_layer_is_the_same_bit_for_bit(attend: object, dtype: torch.dtype, options: dict[str, float]) -> None:
    case = case_of(dtype)
    lists = (case.slots(), case.lengths, SCALE)
    here = attend.dense_decode(case.q, *case.buffers(False), *lists, **options)
    there = attend.dense_decode(case.q, *case.buffers(True), *lists, **options, tier=case.tier.layer(1))
    assert torch.equal(there, here) and here.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [3, 200])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 40}])
def test_a_prefill_is_the_same_bit_for_bit(dtype: torch.dtype, new: int, options: dict[str, int]) -> None:
    case = case_of(dtype)
    q, slots = case.scene.queries(new, HEADS).to(case.q.dtype), case.scene.slots(1, 700)
    for extend in (extend_cpu, extend_reference):
        here = extend.extend(q, *case.buffers(False), slots, SCALE, **options)
        there = extend.extend(q, *case.buffers(True), slots, SCALE, **options, tier=case.tier.layer(1))
        assert torch.equal(there, here) and here.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clustered", [(0, 1), (1,)])
def test_a_segment_that_is_built_from_both_tiers_is_the_same_bit_for_bit(
    dtype: torch.dtype, clustered: tuple[int, ...]
) -> None:
    case = case_of(dtype)
    slots = case.scene.slots(2, 272)[16:]
    geometry = dataclasses.replace(case.scene.index.geometry, clustered=clustered)
    indices = [ClusterIndex(case.scene.index.config, geometry, "cpu") for _ in range(2)]
    build.build_segments(indices[0], [7], [slots], case.scene.keys, case.scene.values)
    build.build_segments(indices[1], [7], [slots], case.tier.keys, case.tier.values, case.tier)
    for name, array in indices[0].arrays.items():
        assert torch.equal(array, indices[1].arrays[name]), name
    away = int((case.tier.directory.device_page[slots // PAGE] == 0).sum())
    assert case.reads()[BUILD_HOST] == away * len(clustered) * 2 > 0  # of two kv heads


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype not in FP8]
)  # rows of 8 bits are not rounded again
def test_rounded_rows_give_the_kernels_what_they_give_the_references(dtype: torch.dtype) -> None:
    case = case_of(dtype, "int8")
    bound = 3e-5 if dtype is torch.float32 else 0.02
    layer, q = case.tier.layer(1), case.q
    pairs = [
        [chain.sparse_decode(q, *case.arguments(True), tier=layer) for chain in (cpu, reference)],
        [
            attend.dense_decode(q, *case.buffers(True), case.slots(), case.lengths, SCALE, tier=layer)
            for attend in (attend_cpu, attend_reference)
        ],
    ]
    for new in (3, 200):
        queries, slots = case.scene.queries(new, HEADS).to(dtype), case.scene.slots(1, 700)
        pairs.append(
            [
                extend.extend(queries, *case.buffers(True), slots, SCALE, tier=layer)
                for extend in (extend_cpu, extend_reference)
            ]
        )
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, atol=bound, rtol=bound)
    exact = attend_cpu.dense_decode(q, *case.buffers(False), case.slots(), case.lengths, SCALE)
    assert 0 < (pairs[1][0] - exact).float().norm() < 0.02 * exact.float().norm(), "rounded, and no more than that"


def test_what_is_read_from_the_host_is_counted() -> None:
    case = case_of(torch.float32)
    layer, device_page = case.tier.layer(1), case.tier.directory.device_page
    cpu.sparse_decode(case.q, *case.arguments(True), tier=layer)
    counts, buffers = case.reads(), cpu.decoder_of(case.scene.index, 2, torch.float32).buffers
    recalled, base = [], []
    for b in range(2):
        base += case.step.base_slots[b, : case.step.base_count[b]].tolist()
        for h in range(2):
            recalled += buffers.recalled[b, h, : buffers.recalled_count[b, h]].tolist()
    away = int((device_page[torch.tensor(recalled) // PAGE] == 0).sum())
    assert counts[RECALLED_HOST] == away > 0
    assert counts[RECALLED_DEVICE] == len(recalled) - away > 0
    assert counts[BASE_HOST] == 2 * int((device_page[torch.tensor(base) // PAGE] == 0).sum()) > 0
    assert counts[DENSE_HOST] == counts[PREFILL_HOST] == 0

    attend_cpu.dense_decode(case.q, *case.buffers(True), case.slots(), case.lengths, SCALE, tier=layer)
    read = torch.cat([case.scene.slots(row, int(length)) for row, length in enumerate(case.lengths, 1)])
    assert case.reads() == [0, 0, 0, 2 * int((device_page[read // PAGE] == 0).sum()), 0, 0]
    for new in (3, 200):
        slots = case.scene.slots(1, 700)
        extend_cpu.extend(case.scene.queries(new, HEADS), *case.buffers(True), slots, SCALE, tier=layer)
        assert case.reads() == [0, 0, 0, 0, 2 * int((device_page[slots // PAGE] == 0).sum()), 0]
