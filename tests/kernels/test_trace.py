"""What the layers of a step read of its traced requests: the CPU's chain notes what the references define.

Red when: a share is not a recalled token's own, the shares of the mass do not add up to all of it, another request's or
another step's tokens are noted, a layer that did not run is, a host tier reads another key, positions are not in order, a
page's position is another page's, or what is beyond the count shows; or a page that Quest would read is not among those with
the largest bounds.
"""

from __future__ import annotations

from functools import partial

import msgspec
import numpy as np
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import trace
from sglang_clusterkv.kernels.decode import cpu, last_read
from sglang_clusterkv.kernels.trace import reference
from sglang_clusterkv.kernels.trace.quest import PageBounds
from sglang_clusterkv.kernels.trace.reference import NOWHERE, Traced, levels
from sglang_clusterkv.memory.step import SparseStep
from sglang_clusterkv.memory.tier import Tier
from tests.support.scenes import PAGE, Scene

SCALE = 0.2
CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


def sparse(scene: Scene, rows: list[int], lengths: list[int]) -> SparseStep:
    """The lists of a step in which all are sparse."""
    step = scene.decode(rows, lengths).sparse
    assert step is not None and step.batch == len(rows)
    return step


def traced(step: SparseStep, *places: int) -> list[Traced]:
    """Requests of a step whose pages lie behind each other from the second one on."""
    pages = [step.pages[place, : int(step.page_count[place])] for place in places]
    return [Traced(place, own, PAGE * np.arange(1, 1 + len(own))) for place, own in zip(places, pages, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "group", "options"),
    [
        (torch.float32, 1, {"code_bits": 1}),
        (torch.bfloat16, 2, {}),
        (torch.float32, 2, {"estimate": False}),
        (torch.float32, 2, {"refine": False}),
        (torch.float32, 2, {"sinks": True}),
    ],
    ids=str,
)
def test_what_is_noted_is_what_the_reference_finds(dtype: torch.dtype, group: int, options: dict[str, bool]) -> None:
    learned = torch.tensor([2.0] * group + [-1.0] * group) if options.pop("sinks", False) else None
    scene = Scene(msgspec.structs.replace(CONFIG, **options), dtype=dtype)
    for row, tokens in ((1, 700), (2, 333), (3, 500)):
        scene.prefill(row, tokens)
    step = sparse(scene, [1, 2, 3], [701, 334, 501])
    requests = traced(step, 2, 0)
    noted, expected = trace.looks(scene.index, step, requests), reference.Looks(scene.index, step, requests)
    q = scene.queries(3, 2 * group)
    read = partial(last_read, scene.index, group, dtype)
    for layer in (0, 1):
        cpu.sparse_decode(q, scene.keys[layer], scene.values[layer], scene.index, layer, step, SCALE, None, learned)
        expected.look(read, q.unflatten(1, (2, group)), scene.keys[layer], layer, SCALE)
    for number in (0, 1):
        layers, found = noted.found(number)
        also, by_reference = expected.found(number)
        assert layers == also == (0, 1)
        assert torch.equal(found.positions, by_reference.positions[..., : found.positions.shape[2]])
        assert torch.equal(found.count, by_reference.count) and int(found.count.min()) > 30
        # A share that is rounded the other way is a level away.
        away = found.levels.int() - by_reference.levels[..., : found.positions.shape[2]].int()
        assert int(away.abs().max()) <= 1 and float((away != 0).float().mean()) < 1e-2
        torch.testing.assert_close(found.mass.float(), by_reference.mass.float(), rtol=2e-3, atol=1e-4)
        torch.testing.assert_close(found.mass.float().sum(-1), torch.ones(2, 2), rtol=0, atol=2e-3)
        shares = 2 ** ((found.levels.float() - 255) / 8) * (found.positions != NOWHERE)
        torch.testing.assert_close(shares.sum(-1), found.mass[..., 1].float(), rtol=0.05, atol=1e-4)


def test_nothing_is_noted_of_another_step_nor_once_it_has_ended() -> None:
    scene = Scene(CONFIG)
    scene.prefill(1, 700)
    step, other = (sparse(scene, [1], [length]) for length in (701, 702))
    noted = trace.looks(scene.index, step, traced(step, 0))
    cpu.sparse_decode(scene.queries(1, 4), scene.keys[0], scene.values[0], scene.index, 0, other, SCALE)
    assert noted.found(0) is None
    noted.end()
    cpu.sparse_decode(scene.queries(1, 4), scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    assert noted.found(0) is None


def test_layers_that_did_not_run_are_left_out() -> None:
    scene = Scene(CONFIG)
    scene.prefill(1, 700)
    step = sparse(scene, [1], [701])
    noted = trace.looks(scene.index, step, traced(step, 0))
    cpu.sparse_decode(scene.queries(1, 4), scene.keys[1], scene.values[1], scene.index, 1, step, SCALE)
    layers, found = noted.found(0)
    assert layers == (1,) and len(found.positions) == 1 and int(found.count.min()) > 30


@pytest.mark.parametrize("host_dtype", ["auto", "int8"])
def test_keys_of_the_host_count_as_those_of_the_device(host_dtype: str) -> None:
    scene = Scene(CONFIG)
    scene.prefill(1, 700)
    step = sparse(scene, [1], [701])
    q = scene.queries(1, 4)
    cpu.sparse_decode(q, scene.keys[0], scene.values[0], scene.index, 0, step, SCALE)
    read = last_read(scene.index, 2, torch.float32, 0)
    on_device = reference.shares(read, q[0].unflatten(0, (2, 2)), scene.keys[0], SCALE)
    pages = scene.index.geometry.pages
    buffers = [[torch.zeros(2 * PAGE, 2, 32)] for _ in range(2)]
    tier = Tier(*buffers, page_size=PAGE, pages=pages, ring_pages=1, host_dtype=host_dtype)
    tier.host.store(0, torch.arange(pages), *(b.unflatten(0, (pages, PAGE)) for b in (scene.keys[0], scene.values[0])))
    on_host = reference.shares(read, q[0].unflatten(0, (2, 2)), buffers[0][0], SCALE, tier.layer(0))
    close = {"auto": {"rtol": 1e-5, "atol": 1e-9}, "int8": {"rtol": 0.1, "atol": 1e-6}}[host_dtype]
    torch.testing.assert_close(on_host.share, on_device.share, **close)


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
    found = reference.placed(slots, count, share, pages, positions, 16)
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
