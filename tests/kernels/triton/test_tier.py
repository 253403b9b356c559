"""A GPU's kernels over two tiers: what moves between them, and what a step and a build read of either.

The moves are compared with those of a CPU, a step and a build with the same over a pool that has everything on the device.

Red when: a kernel takes a page, slot, token, head, layer or part for another one, or reads poison; rounds otherwise than the
CPU does; writes what it should leave out; counts other rows than it read from the host; or a move waits for the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import tier as moves
from sglang_clusterkv.kernels.attend import reference as attend_reference
from sglang_clusterkv.kernels.attend.triton import dense_decode
from sglang_clusterkv.kernels.decode import reference as decode_reference
from sglang_clusterkv.kernels.decode.triton import decoder_of, sparse_decode
from sglang_clusterkv.kernels.tier import reference
from sglang_clusterkv.kernels.tier import triton as kernels
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.tier import (
    BASE_HOST,
    BUILD_HOST,
    DENSE_HOST,
    PREFILL_HOST,
    RECALLED_DEVICE,
    RECALLED_HOST,
    Tier,
)
from tests.support.filled import SCALE, index_on, scene_of, step_on
from tests.support.scenes import PAGE, Scene
from tests.support.tiers import tier_on, tiered
from tests.support.waits import Waits

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
FORMATS = [("auto", torch.float32), ("auto", torch.bfloat16), ("int8", torch.float32), ("int8", torch.float16)]


def small(host_dtype: str, dtype: torch.dtype, head_dim: int = 48) -> Tier:
    """Two layers and two kv heads, 24 pages, of which 8 or fewer are on the device."""
    return tiered(Scene(CONFIG, pages=25, head_dim=head_dim, dtype=dtype), host_dtype)


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Bit for bit, what nobody may write included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # kernels write to host rows
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(("host_dtype", "dtype"), FORMATS)
def test_pages_are_stored_as_a_cpu_stores_them(host_dtype: str, dtype: torch.dtype, device: str) -> None:
    expected = small(host_dtype, dtype)
    for buffer in (*expected.keys, *expected.values):
        buffer.nan_to_num_(0.7)
    expected.keys[1][PAGE : 2 * PAGE, 1] = 0  # rows whose scales are 0
    for rows in expected.host.rows:
        rows[1:] = 0xFF
    ours = tier_on(expected, device)
    pages, at = torch.tensor([7, 0, 3, 24]), torch.tensor([1, 2, 5, 3])
    reference.store(expected, pages, at)
    kernels.store(ours, pages.to(device), at.to(device))
    assert_equal(ours.host.rows, expected.host.rows)


@pytest.mark.parametrize(("host_dtype", "dtype"), FORMATS)
def test_pages_are_fetched_as_a_cpu_fetches_them(host_dtype: str, dtype: torch.dtype, device: str) -> None:
    expected = small(host_dtype, dtype)
    away = (expected.directory.stored & (expected.directory.device_page == 0)).nonzero().flatten()[:3]
    at = torch.tensor([4, 0, 6])
    ours = tier_on(expected, device)
    reference.fetch(expected, away, at)
    kernels.fetch(ours, away.to(device), at.to(device))
    assert_equal([*ours.keys, *ours.values], [*expected.keys, *expected.values])


@pytest.mark.parametrize(("host_dtype", "dtype"), FORMATS)
def test_rows_are_gathered_from_either_tier_and_counted(host_dtype: str, dtype: torch.dtype, device: str) -> None:
    expected = small(host_dtype, dtype)
    ours = tier_on(expected, device)
    slots = torch.randperm(24 * PAGE, generator=torch.Generator().manual_seed(1))[:70] + PAGE
    # Of the second layer, into the first rows of a workspace.
    rows = [torch.full((2, 1, 80, 2, 48), 7.0, dtype=dtype, device=tier.keys[0].device) for tier in (ours, expected)]
    kernels.gather(ours, 1, slots.to(device), *rows[0][:, :, :70], PREFILL_HOST)
    reference.gather(expected, 1, slots, *rows[1][:, :, :70], PREFILL_HOST)
    assert_equal([rows[0]], [rows[1]])
    assert ours.reads.tolist() == expected.reads.tolist() and expected.reads[PREFILL_HOST] > 0


def test_the_detector_of_waits_fires() -> None:
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), lambda x: x.nonzero()):
        with Waits(), pytest.raises(AssertionError, match="waits"):
            wait(torch.arange(3))


def test_no_move_of_a_head_waits_for_the_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory's own work with it; launches are left out, for the interpreter asks for numbers."""
    tier = tier_on(small("int8", torch.float32), device)
    launched: list[str] = []
    for name in ("store_kernel", "load_kernel"):
        noted = type(
            "Kernel", (), {"__getitem__": lambda self, grid, name=name: lambda *_, **__: launched.append(name)}
        )
        monkeypatch.setattr(kernels, name, noted())
    monkeypatch.setattr(moves, "_for", lambda tier: kernels)
    kernels._arguments(tier)  # made once
    directory = tier.directory
    none = torch.zeros(0, dtype=torch.int64, device=device)
    pages = torch.tensor([1, 2], device=device)
    with Waits():
        directory.unmap(pages)
        directory.map(pages[:1], 1)
        directory.note(pages, pages)
        moves.bring(tier, pages[1:], directory.take(1))
        count = directory.ring_pages - directory.ring_level
        directory.filled(moves.refill(tier, count, directory.tail, none))
        directory.translate(pages)
        moves.gather(tier, 0, pages, *torch.empty(2, 2, 2, 2, 48, device=device), BUILD_HOST)
        tier.layer(0).count(PREFILL_HOST, pages)
        directory.clear()
    assert launched == ["load_kernel", "store_kernel", "load_kernel"]


def sparse(host_dtype: str, dtype: torch.dtype, head_dim: int, heads: int, device: str) -> tuple[Any, ...]:
    """A scene, its step, a CPU's tier of it, the same on the device, and queries."""
    scene, step = scene_of(CONFIG, head_dim, dtype, heads)
    tier = tiered(scene, host_dtype)
    q = torch.randn(step.batch, 2 * heads, head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    return scene, step, tier, tier_on(tier, device), q


@pytest.mark.parametrize(
    ("host_dtype", "dtype", "head_dim", "heads"),
    [
        ("auto", torch.float32, 64, 2),
        ("auto", torch.bfloat16, 64, 1),
        ("int8", torch.float32, 64, 2),
        ("int8", torch.float32, 256, 1),
    ],
)
def test_a_sparse_layer_reads_either_tier(
    host_dtype: str, dtype: torch.dtype, head_dim: int, heads: int, device: str
) -> None:
    scene, step, on_cpu, tier, q = sparse(host_dtype, dtype, head_dim, heads, device)
    index, lists, layer = index_on(scene.index, device), step_on(step, device), tier.layer(0)
    ours = sparse_decode(q.to(device), tier.keys[0], tier.values[0], index, 0, lists, SCALE, layer)
    counts = tier.reads.tolist()
    w = decoder_of(index, 2).workspace
    recalled = [w.recalled[b, h, : w.recalled_count[b, h]] for b in range(step.batch) for h in range(heads)]
    base = torch.cat([step.base_slots[b, : step.base_count[b]] for b in range(step.batch)])
    device_page = on_cpu.directory.device_page
    away = [int((device_page[slots.cpu() // PAGE] == 0).sum()) for slots in (torch.cat(recalled), base)]
    assert counts[RECALLED_HOST] == away[0] > 0 and counts[BASE_HOST] == away[1] * heads > 0
    assert counts[RECALLED_DEVICE] == len(torch.cat(recalled)) - away[0] > 0
    assert counts[DENSE_HOST] == counts[PREFILL_HOST] == 0
    if host_dtype == "auto":
        pool = scene.keys[0].to(device), scene.values[0].to(device)
        whole = sparse_decode(q.to(device), *pool, index_on(scene.index, device), 0, lists, SCALE)
        # With a tier attend is a launch of its own, which divides a list into other parts.
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours, whole, atol=tolerance, rtol=10 * tolerance)
        assert ours.isfinite().all()
    else:
        expected = decode_reference.sparse_decode(
            q, on_cpu.keys[0], on_cpu.values[0], scene.index, 0, step, SCALE, on_cpu.layer(0)
        )
        torch.testing.assert_close(ours.cpu(), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("host_dtype", "dtype", "head_dim"),
    [("auto", torch.float32, 64), ("int8", torch.float32, 96), ("auto", torch.float16, 64)],
)
def test_a_dense_layer_reads_either_tier(host_dtype: str, dtype: torch.dtype, head_dim: int, device: str) -> None:
    scene, _, on_cpu, tier, q = sparse(host_dtype, dtype, head_dim, 1, device)
    lengths = torch.tensor([60, 131])
    slots = torch.stack([scene.slots(row, 131) for row in (1, 2)])
    lists = slots.to(device), lengths.to(device), SCALE
    ours = dense_decode(q.to(device), tier.keys[0], tier.values[0], *lists, tier=tier.layer(0))
    read = torch.cat([slots[0, :60], slots[1]])
    assert tier.reads[DENSE_HOST] == (on_cpu.directory.device_page[read // PAGE] == 0).sum() > 0
    assert int(tier.reads.sum()) == int(tier.reads[DENSE_HOST])
    if host_dtype == "auto":
        whole = dense_decode(q.to(device), scene.keys[0].to(device), scene.values[0].to(device), *lists)
        assert torch.equal(ours, whole) and ours.isfinite().all()
    else:
        expected = attend_reference.dense_decode(
            q, on_cpu.keys[0], on_cpu.values[0], slots, lengths, SCALE, tier=on_cpu.layer(0)
        )
        torch.testing.assert_close(ours.cpu(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("layers", "clustered"), [(2, None), (3, (0, 2))])
def test_a_segment_is_built_from_both_tiers_as_from_one(
    device: str, monkeypatch: pytest.MonkeyPatch, layers: int, clustered: tuple[int, ...] | None
) -> None:
    scene = Scene(CONFIG, pages=25, dtype=torch.float16, layers=layers, clustered=clustered)
    tier = tier_on(tiered(scene, "auto"), device)
    monkeypatch.setattr(moves, "_for", lambda tier: kernels)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))[:9] + 1
    slots = (order.unsqueeze(1) * PAGE + torch.arange(PAGE)).to(device)
    segments = [slots[:4].flatten(), slots[4:].flatten()]
    indices = [ClusterIndex(CONFIG, scene.index.geometry, device) for _ in range(2)]
    pool = [[rows.to(device) for rows in buffers] for buffers in (scene.keys, scene.values)]
    build.write_in_place(indices[0], segments, *pool)
    build.write_in_place(indices[1], segments, tier.keys, tier.values, tier)
    for name, array in indices[0].arrays.items():
        assert torch.equal(array.view(torch.uint8), indices[1].arrays[name].view(torch.uint8)), name
    away = int((tier.directory.device_page[order.to(device)] == 0).sum())
    assert tier.reads.tolist() == [0] * BUILD_HOST + [away * PAGE * 2 * 2] and away > 0, "of two layers and kv heads"
