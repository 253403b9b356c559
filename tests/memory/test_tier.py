"""Keys and values of either tier are those that were written.

Red when: a page that left the device comes back with other bytes ("auto"), or rounded by more than half a level ("int8"); a row
of another token, kv head or part is read; a refill that fails leaves a page in neither tier or a device page nowhere; or the
bytes said before anything is made are not those that are made.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import tier as moves
from sglang_clusterkv.memory.directory import stamp
from sglang_clusterkv.memory.host import HostRows, host_row_bytes
from sglang_clusterkv.memory.tier import Tier, base_pages, least_device_pages, ring_target
from tests.support.rules import assert_directory

PAGE, HEADS, D, LAYERS, PAGES = 16, 3, 32, 2, 41


def filled(dtype: torch.dtype, host_dtype: str, device_pages: int = 12) -> tuple[Tier, list[torch.Tensor]]:
    """A tier in which pages 1 to 40 were written in turn, and what was written, [2 layers * (keys, values)] by logical slot."""
    generator = torch.Generator().manual_seed(0)
    buffers = [torch.zeros((device_pages + 1) * PAGE, HEADS, D, dtype=dtype) for _ in range(2 * LAYERS)]
    tier = Tier(buffers[:LAYERS], buffers[LAYERS:], page_size=PAGE, pages=PAGES, ring_pages=4, host_dtype=host_dtype)
    written = [torch.randn(PAGES * PAGE, HEADS, D, generator=generator).to(dtype) for _ in buffers]
    for launch in range(10):
        pages = torch.arange(1 + 4 * launch, 5 + 4 * launch)
        tier.directory.map(pages, stamp(launch))
        slots = (pages.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()
        at = tier.directory.translate(slots)
        for buffer, rows in zip(buffers, written, strict=True):
            buffer[at] = rows[slots]
        refill(tier)
    return tier, written


def refill(tier: Tier, **options: bool) -> int:
    """Fill the ring as the engine does."""
    directory = tier.directory
    count = directory.ring_pages - directory.ring_level
    count = moves.refill(tier, count, directory.tail, torch.zeros(0, dtype=torch.int64), **options)
    directory.filled(count)
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("host_dtype", ["auto", "int8"])
def test_every_row_is_read_from_either_tier_as_it_was_written(dtype: torch.dtype, host_dtype: str) -> None:
    tier, written = filled(dtype, host_dtype)
    assert_directory(tier.directory)
    resident = int((tier.directory.device_page > 0).sum())
    assert 0 < resident <= 12 - 4
    slots = torch.randperm((PAGES - 1) * PAGE)[:300] + PAGE
    heads = torch.arange(HEADS).unsqueeze(1)
    for layer in range(LAYERS):
        for part, buffer in enumerate((tier.keys[layer], tier.values[layer])):
            expected = written[part * LAYERS + layer]
            away = (tier.directory.device_page[slots // PAGE] == 0).view(-1, 1, 1)
            bound = (
                0.0
                if host_dtype == "auto"
                else expected[slots].float().abs().amax(-1, keepdim=True) / 127 * 0.501 * away
            )
            whole = tier.layer(layer).gather(buffer, part, slots)
            assert whole.shape == (300, HEADS, D)
            assert ((whole.float() - expected[slots].float()).abs() <= bound).all()
            by_head = tier.layer(layer).gather(buffer, part, slots.unsqueeze(0), heads)
            assert torch.equal(by_head.transpose(0, 1).float(), whole.float())
    info = tier.server_info()
    assert info["pages_on_device"] == resident and info["pages_on_host_only"] == PAGES - 1 - resident
    assert info["written_bytes"] == (PAGES - 1 - resident) * PAGE * HEADS * LAYERS * host_row_bytes(
        D, dtype, host_dtype
    )


@pytest.mark.parametrize("host_dtype", ["auto", "int8"])
def test_a_page_that_is_brought_back_is_on_the_device_as_it_was(host_dtype: str) -> None:
    tier, written = filled(torch.float32, host_dtype)
    directory = tier.directory
    away = next(page for page in range(1, PAGES) if not directory.device_page[page])
    here = next(page for page in range(1, PAGES) if directory.device_page[page])
    before = tier.layer(1).gather(tier.values[1], 1, torch.arange(away * PAGE, (away + 1) * PAGE))
    moves.bring(tier, torch.tensor([here, away]), directory.take(2))
    assert_directory(directory)
    at = directory.translate(torch.arange(away * PAGE, (away + 1) * PAGE))
    assert (at > 0).all() and not directory.stored[away]
    assert torch.equal(tier.values[1][at], before)
    at = directory.translate(torch.arange(here * PAGE, (here + 1) * PAGE))
    assert torch.equal(tier.keys[0][at], written[0][here * PAGE : (here + 1) * PAGE]), "it was here and stays as it is"


@pytest.mark.parametrize("where", ["victims", "store", "drop", "append"])
def test_a_refill_that_fails_changes_nothing_that_anybody_reads(where: str) -> None:
    tier, written = filled(torch.float32, "auto")
    directory = tier.directory
    directory.map(torch.tensor([1, 2]), stamp(99))
    rows = torch.full((2 * PAGE, HEADS, D), 7.0)
    slots = torch.arange(PAGE, 3 * PAGE)
    for buffer in (*tier.keys, *tier.values):
        buffer[directory.translate(slots)] = rows
    owner = tier.host if where == "store" else directory
    with patch.object(owner, where, side_effect=MemoryError), pytest.raises(MemoryError):
        refill(tier)
    assert_directory(directory)
    assert torch.equal(tier.layer(1).gather(tier.keys[1], 0, slots), rows)
    others = torch.arange(5 * PAGE, PAGES * PAGE)
    assert torch.equal(tier.layer(0).gather(tier.keys[0], 0, others), written[0][others])
    level = directory.ring_level
    refill(tier)
    assert directory.ring_level == directory.ring_pages > level
    assert_directory(directory)
    assert torch.equal(tier.layer(1).gather(tier.keys[1], 0, slots), rows)


def test_a_refill_of_clean_pages_stores_none() -> None:
    tier, _ = filled(torch.float32, "auto")
    tier.directory.map(torch.tensor([1, 2, 3]), stamp(99))
    tier.directory.unmap(torch.tensor([2]))
    with patch.object(HostRows, "store", side_effect=MemoryError):
        assert refill(tier, clean_only=True) == 1, "the one that is free"
    assert_directory(tier.directory)


def test_zeros_and_extremes_keep_their_values_in_8_bits() -> None:
    host = HostRows(1, 1, 16, 2, 1, torch.float32, "int8")
    keys = torch.zeros(1, 2, 1, 16)
    keys[0, 1, 0, :3] = torch.tensor([-3e4, 1e-3, 3e4])
    host.store(0, torch.tensor([0]), keys, torch.zeros_like(keys))
    read, values = host.load(0, torch.tensor([0]))
    assert not values.any() and not read[0, 0].any()
    torch.testing.assert_close(read[0, 1, 0, :3], torch.tensor([-3e4, 0.0, 3e4]))


@pytest.mark.parametrize(
    ("dtype", "host_dtype", "row"),
    [(torch.bfloat16, "auto", 256), (torch.float32, "auto", 512), (torch.float32, "int8", 136)],
)
def test_the_bytes_are_known_before_anything_is_made(dtype: torch.dtype, host_dtype: str, row: int) -> None:
    assert host_row_bytes(64, dtype, host_dtype) == row
    host = HostRows(2, 3, 64, PAGE, 5, dtype, host_dtype)
    assert host.bytes == 5 * host.page_bytes == 5 * PAGE * 3 * 2 * row


def test_the_sizes_at_start_are_those_of_the_design() -> None:
    assert base_pages(ClusterKVConfig(), 16) == 38
    assert ring_target(512, 4, 16) == 40
    assert least_device_pages(ClusterKVConfig(), chunk_tokens=512, max_rows=4, page_size=16) == 232
    assert ring_target(500, 4, 16) == 40, "whole pages"


def test_a_device_tier_elsewhere_is_refused() -> None:
    buffers = [torch.empty(32, 1, 16, device="meta")]
    with pytest.raises(ValueError, match="meta"):
        Tier(buffers, buffers, page_size=16, pages=5, ring_pages=1)
