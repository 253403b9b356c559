"""Triton's kernels over a pool in fp8 give what they give over its numbers in float32, bit for bit.

Red when: one of the 256 codes is another number than torch's; a kernel reads bytes as numbers, or e5m2 as e4m3; queries are
rounded to the pool's type; or a move between tiers changes a byte.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from sglang_clusterkv.clusters import build
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.triton import dense_decode
from sglang_clusterkv.kernels.decode.triton import sparse_decode
from sglang_clusterkv.kernels.tier import reference
from sglang_clusterkv.kernels.tier import triton as kernels
from sglang_clusterkv.kernels.triton_fp8 import as_argument, widened
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.fp8 import FP8
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.tier import PREFILL_HOST
from tests.support.filled import SCALE, index_on, scene_of, step_on
from tests.support.scenes import PAGE, Scene
from tests.support.tiers import tier_on, tiered

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


@triton.jit
def _widen(codes, numbers, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(numbers + at, widened(tl.load(codes + at), DTYPE).to(tl.float32))


@pytest.mark.parametrize("dtype", FP8)
def test_every_code_is_the_number_that_torch_makes_of_it(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(dtype)
    numbers, right = torch.empty(256, device=device), codes.float()
    _widen[(1,)](as_argument(codes), numbers, SIZE=256, DTYPE=tl.float32)
    real = right.isfinite()
    assert int(real.sum()) == {torch.float8_e4m3fn: 254, torch.float8_e5m2: 248}[dtype]
    assert torch.equal(numbers[real], right[real])


@pytest.mark.parametrize("dtype", FP8)
def test_a_step_over_either_tier_is_one_over_the_numbers_in_float32(dtype: torch.dtype, device: str) -> None:
    scene, step = scene_of(CONFIG, 64, dtype, 1)
    q = torch.randn(step.batch, 2, 64, generator=torch.Generator().manual_seed(1)).to(device)
    pool = scene.keys[0].to(device), scene.values[0].to(device)
    wide = [rows.float() for rows in pool]
    tier = tier_on(tiered(scene, "auto"), device)
    layer, buffers = tier.layer(0), (tier.keys[0], tier.values[0])

    def decode(rows: object, *more: object) -> torch.Tensor:
        return sparse_decode(q, *rows, index_on(scene.index, device), 0, step_on(step, device), SCALE, *more)

    expected = decode(wide)
    assert expected.isfinite().all() and expected.dtype is torch.float32
    assert torch.equal(decode(pool), expected)
    # With a tier attend is a launch of its own, which divides a list into other parts.
    torch.testing.assert_close(decode(buffers, layer), expected, rtol=1e-5, atol=1e-6)
    lists = (
        torch.stack([scene.slots(row, 131) for row in (1, 2)]).to(device),
        torch.tensor([60, 131], device=device),
        SCALE,
    )
    expected = dense_decode(q[:2], *wide, *lists)
    assert torch.equal(dense_decode(q[:2], *pool, *lists), expected)
    assert torch.equal(dense_decode(q[:2], *buffers, *lists, tier=layer), expected)


@pytest.mark.parametrize("dtype", FP8)
def test_a_segment_is_built_as_from_its_numbers_in_float32(dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    pools = [[torch.randn(24 * PAGE, 1, 32, generator=generator).to(dtype).to(device)] for _ in range(2)]
    slots = (torch.tensor([7, 3, 20, 11]).unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten().to(device)
    made = []
    for keys, values in (pools, [[rows.float() for rows in part] for part in pools]):
        index = ClusterIndex(ClusterKVConfig(), Geometry(1, 1, 32, PAGE, 24), device)
        build.write_in_place(index, [slots], keys, values)
        made.append(index.arrays)
    for name, array in made[0].items():
        assert torch.equal(array.view(torch.uint8), made[1][name].view(torch.uint8)), name
    assert made[0]["members"].any()


@pytest.mark.parametrize("dtype", FP8)
def test_moves_between_tiers_change_no_byte(dtype: torch.dtype, device: str) -> None:
    expected = tiered(Scene(CONFIG, pages=25, head_dim=48, dtype=dtype), "auto")
    ours = tier_on(expected, device)
    slots = torch.randperm(24 * PAGE, generator=torch.Generator().manual_seed(1))[:70] + PAGE
    rows = [torch.zeros((2, 1, 70, 2, 48), device=tier.keys[0].device).to(dtype) for tier in (ours, expected)]
    kernels.gather(ours, 1, slots.to(device), *rows[0], PREFILL_HOST)
    reference.gather(expected, 1, slots, *rows[1], PREFILL_HOST)
    away = (expected.directory.stored & (expected.directory.device_page == 0)).nonzero().flatten()[:3]
    for moves, tier in ((kernels, ours), (reference, expected)):
        at = tier.directory.device_page.device
        moves.fetch(tier, away.to(at), torch.tensor([4, 0, 6], device=at))
        moves.store(tier, torch.tensor([7, 0, 3], device=at), torch.tensor([1, 2, 5], device=at))
    pairs = [*zip(ours.keys + ours.values, expected.keys + expected.values, strict=True), tuple(rows)]
    pairs += zip(ours.host.rows, expected.host.rows, strict=True)
    if device == "cuda":
        torch.cuda.synchronize()  # kernels write to host rows
    for one, other in pairs:
        assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8))
    assert rows[0].cpu().view(torch.uint8).any()
