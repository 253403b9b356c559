"""What a layer read of one request: the CPU kernels do what the references define.

Red when: a share is not a recalled token's own, the shares of the mass do not add up to all of it, a type of pool or a host
tier reads another key, positions are not in order, a page's position is another page's, or what is beyond the count shows; or
a page that Quest would read is not among those with the largest bounds.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import trace
from sglang_clusterkv.kernels.decode import cpu, last_read
from sglang_clusterkv.kernels.trace import reference
from sglang_clusterkv.kernels.trace.quest import PageBounds
from sglang_clusterkv.kernels.trace.reference import NOWHERE, levels
from sglang_clusterkv.memory.tier import Tier
from tests.support.scenes import PAGE, Scene

SCALE = 0.2
CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


@pytest.mark.parametrize(("dtype", "group"), [(torch.float32, 3), (torch.bfloat16, 1)])
def test_shares_are_those_of_the_reference(dtype: torch.dtype, group: int) -> None:
    scene = Scene(CONFIG, dtype=dtype)
    scene.prefill(1, 700)
    scene.prefill(2, 333)
    step = scene.decode([1, 2], [701, 334]).sparse
    assert step is not None and step.batch == 2
    q = scene.queries(2, 2 * group)
    cpu.sparse_decode(q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    for place in (0, 1):
        queries = q[place].unflatten(0, (2, group))
        read = last_read(scene.index, group, dtype, step, place)
        found = trace.shares(read, queries, scene.keys[0], SCALE)
        expected = reference.shares(read, queries, scene.keys[0], SCALE)
        assert torch.equal(found.slots, expected.slots) and torch.equal(found.count, expected.count)
        real = torch.arange(found.slots.shape[1]) < found.count.unsqueeze(1)
        torch.testing.assert_close(found.share[real], expected.share[real], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found.mass, expected.mass, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.mass.sum(1), torch.ones(2), rtol=0, atol=1e-5)
        torch.testing.assert_close((found.share * real).sum(1), found.mass[:, 1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("host_dtype", ["auto", "int8"])
def test_keys_of_the_host_count_as_those_of_the_device(host_dtype: str) -> None:
    scene = Scene(CONFIG)
    scene.prefill(1, 700)
    step = scene.decode([1], [701]).sparse
    assert step is not None
    q = scene.queries(1, 4)
    cpu.sparse_decode(q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    read = last_read(scene.index, 2, torch.float32, step, 0)
    on_device = trace.shares(read, q[0].unflatten(0, (2, 2)), scene.keys[0], SCALE)
    pages = scene.index.geometry.pages
    buffers = [[torch.zeros(2 * PAGE, 2, 32)] for _ in range(2)]
    tier = Tier(*buffers, page_size=PAGE, pages=pages, ring_pages=1, host_dtype=host_dtype)
    tier.host.store(0, torch.arange(pages), *(b.unflatten(0, (pages, PAGE)) for b in (scene.keys[0], scene.values[0])))
    on_host = trace.shares(read, q[0].unflatten(0, (2, 2)), buffers[0][0], SCALE, tier.layer(0))
    close = {"auto": {"rtol": 1e-5, "atol": 1e-9}, "int8": {"rtol": 0.1, "atol": 1e-6}}[host_dtype]
    torch.testing.assert_close(on_host.share, on_device.share, **close)
    by_reference = reference.shares(read, q[0].unflatten(0, (2, 2)), buffers[0][0], SCALE, tier.layer(0))
    real = torch.arange(on_host.slots.shape[1]) < on_host.count.unsqueeze(1)
    torch.testing.assert_close(on_host.share[real], by_reference.share[real], rtol=1e-4, atol=1e-7)


def test_positions_are_in_order_and_their_levels_with_them() -> None:
    generator = torch.Generator().manual_seed(0)
    pages = torch.randperm(50, generator=generator)[:20].sort().values
    positions = 16 + 16 * torch.randperm(20, generator=generator)
    slots = torch.zeros((2, 3, 40), dtype=torch.int64)
    count = torch.tensor([[40, 0, 17], [1, 39, 5]], dtype=torch.int32)
    for layer in range(2):
        for head in range(3):
            picked = torch.randperm(320, generator=generator)[: int(count[layer, head])]
            slots[layer, head, : len(picked)] = pages[picked // 16] * 16 + picked % 16
    share = torch.rand((2, 3, 40), generator=generator) ** 30
    share[0, 0, 3], share[0, 0, 4] = 0.0, torch.nan
    found = trace.placed(slots, count, share, pages, positions, 16)
    expected = reference.placed(slots, count, share, pages, positions, 16)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    position_of = {int(page): int(begin) for page, begin in zip(pages, positions, strict=True)}
    for layer in range(2):
        for head in range(3):
            n = int(count[layer, head])
            told = {position_of[slot // 16] + slot % 16: at for at, slot in enumerate(slots[layer, head, :n].tolist())}
            assert found[0][layer, head].tolist() == sorted(told) + [NOWHERE] * (40 - n)
            order = [told[position] for position in sorted(told)]
            assert found[1][layer, head, :n].tolist() == levels(share[layer, head, order]).tolist()
            assert not found[1][layer, head, n:].any()


def test_levels_are_eighths_of_an_octave() -> None:
    shares = torch.tensor([1.0, 0.5, 2.0**-31, 2.0**-40, 0.0, torch.nan, torch.inf])
    assert levels(shares).tolist() == [255, 247, 7, 0, 0, 0, 255]


def test_quest_reads_the_pages_with_the_largest_bounds_whenever_they_were_seen() -> None:
    heads, group, dim, pages = 2, 3, 8, 40
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn((pages * PAGE, heads, dim), generator=generator)
    places = torch.randperm(pages, generator=generator)  # where the pool has a request's pages
    bounds = PageBounds(PAGE)
    for last, numbers in ((7, np.arange(1, 7)), (30, np.r_[1:7, 9:30]), (30, np.arange(1, 30))):
        bounds.see(numbers, places[numbers], keys)
        q = torch.randn((heads, group, dim), generator=generator)
        count = min(5, len(numbers))
        found = bounds.chosen(q, numbers, count)
        for head in range(heads):
            score = {}
            for number in numbers.tolist():
                slot = int(places[number]) * PAGE
                page = keys[slot : slot + PAGE, head].double().numpy()
                sides = np.maximum(q[head].double().numpy() * page.min(0), q[head].double().numpy() * page.max(0))
                score[number] = sides.sum(1).mean()
            best = sorted(score, key=lambda number: -score[number])[:count]
            assert found[head].tolist() == sorted(best) and max(best) < last
    keys.zero_()  # what was seen is not read again
    assert torch.equal(bounds.chosen(q, numbers, count), found)
    assert bounds.chosen(torch.zeros((heads, group, dim)), numbers, 3).tolist() == [[1, 2, 3]] * heads


def test_quests_bounds_are_of_the_keys_of_both_tiers() -> None:
    keys, numbers = torch.randn((6 * PAGE, 2, 32)), np.array([0, 1, 2, 3])
    pages = torch.tensor([4, 1, 5, 2])
    buffers = [[torch.zeros(2 * PAGE, 2, 32)] for _ in range(2)]
    tier = Tier(*buffers, page_size=PAGE, pages=6, ring_pages=1)
    tier.host.store(0, torch.arange(6), *(keys.unflatten(0, (6, PAGE)) for _ in range(2)))
    found = []
    for pool, options in ((keys, {}), (buffers[0][0], {"tier": tier.layer(0)})):
        bounds = PageBounds(PAGE)
        bounds.see(numbers, pages, pool, **options)
        found.append(bounds.chosen(keys[:3].transpose(0, 1), numbers, 2))
    assert torch.equal(*found)
