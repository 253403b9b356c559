"""A pool with few device pages serves what one with all of them serves, bit for bit; what fails costs room, nothing else.

Red when: a layer's output depends on how many pages are on the device; a page is written or read in the wrong tier, or its last
one leaves while its row is held; events of pages are applied in another order than they happened; a session's next turn
writes to a page that is not there; a refill that fails reaches the scheduler, loses a page, is not counted, or is said in a
warning that names no setting; a base page that is read in every step leaves before what is older.
"""

from __future__ import annotations

import logging
from typing import Any
from unittest.mock import Mock, patch

import msgspec
import numpy as np
import pytest
import torch

from sglang_clusterkv.clusters.engine import Extend
from sglang_clusterkv.clusters.handed_out import HandedOut, PageEvent
from sglang_clusterkv.clusters.residency import TOUCH_EVERY, TieredResidency
from sglang_clusterkv.kernels import tier as moves
from sglang_clusterkv.kernels.attend import dense_decode
from sglang_clusterkv.memory.directory import Directory
from sglang_clusterkv.memory.host import HostRows
from sglang_clusterkv.memory.step import dense_step
from sglang_clusterkv.memory.tier import Tier
from tests.support import rules
from tests.support.scenes import PAGE, Scene, Tiers
from tests.support.waits import Waits
from tests.support.world import SMALL, Request, World, stream

CONFIG = msgspec.structs.replace(SMALL, merge_segments=True, recluster_every=64)
SIZES = {"layers": 2, "kv_heads": 2, "head_dim": 32}
PAGES, CHUNK, RUNNING = 300, 256, 6
SCALE = 0.2


class Served:
    """A world whose decode layers run, and what they gave."""

    def __init__(self, tiers: Tiers | None, **options: Any) -> None:
        self.world = World(CONFIG, pages=PAGES, tiers=tiers, **options, **SIZES)
        self.outputs: list[torch.Tensor] = []
        self._generator = torch.Generator().manual_seed(7)

    def prefill(self, tokens: list[int]) -> Request:
        """A request, in chunks."""
        request = self.world.submit(tokens)
        while not request.running or request.prefilling:
            self.world.extend((request, CHUNK))
        return request

    def decode(self, *requests: Request, steps: int = 1) -> None:
        """Steps with all their layers."""
        world, engine, scene = self.world, self.world.engine, self.world.scene
        for _ in range(steps):
            step = world.decode(*requests)
            q = torch.randn(len(requests), 4, SIZES["head_dim"], generator=self._generator)
            for layer in range(SIZES["layers"]):
                keys, values, tier = scene.keys[layer], scene.values[layer], engine.residency.layer(layer)
                if step.sparse is not None:
                    output = engine.sparse_layer(q, keys, values, layer, step, SCALE)
                    assert output is not None
                    self.outputs.append(output if step.sparse_at is None else output[step.sparse_at])
                # As layers do that never recall.
                dense = dense_step(step.rows, step.seq_lens, scene.req_to_token)
                self.outputs.append(dense_decode(q, keys, values, dense.slots, dense.seq_lens, SCALE, **tier))


def scenario(served: Served) -> None:
    """Long prompts, an idle request, one that was evicted, a chat's turn on a prefix of the host, and aged tokens."""
    first, second = served.prefill(stream(1, 900)), served.prefill(stream(2, 700))
    served.decode(first, second, steps=3)
    for name in range(3, 6):  # the first rests, and its pages leave
        other = served.prefill(stream(name, 600))
        served.decode(other, second)
        served.world.finish(other)
    served.decode(first, second, steps=40)
    turn = served.prefill(other.tokens + stream(9, 100))
    served.decode(first, second, turn, steps=2)


def tiers(ratio: int, host_dtype: str = "auto") -> Tiers:
    """Of a pool of PAGES."""
    return Tiers.of(PAGES, ratio, CHUNK, RUNNING)._replace(host_dtype=host_dtype)


def test_outputs_are_those_of_everything_on_the_device_bit_for_bit() -> None:
    whole = Served(None)
    scenario(whole)
    for ratio in (1, 4):
        served = Served(tiers(ratio))
        scenario(served)
        assert len(served.outputs) == len(whole.outputs) > 100
        assert all(torch.equal(a, b) for a, b in zip(served.outputs, whole.outputs, strict=True))
        info = served.world.engine.server_info()["host_tier"]
        moved = [info[name] for name in ("recalled_rows_host", "read_bytes_build", "dense_rows_host", "written_bytes")]
        assert all(moved) if ratio == 4 else not any(moved), moved
        assert info["recalled_rows_device"] > 0
        assert info["pages_on_device"] <= info["device_pages"] - info["ring_level"]
        rules.assert_plans_do_not_depend_on_the_tier(served.world)


def test_rounded_rows_change_little_and_are_rounded_once() -> None:
    whole, served = Served(None), Served(tiers(4, "int8"), checks=False)
    for one in (whole, served):
        request = one.prefill(stream(1, 900))
        one.decode(request, steps=2)
        for name in range(3, 6):
            one.world.finish(one.prefill(stream(name, 600)))
        one.decode(request, steps=30)
    rules.assert_tiers(served.world)
    assert served.world.tier is not None and served.world.tier.stored_pages > 30
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(served.outputs, whole.outputs, strict=True)]
    assert 0 < np.median(errors) < 0.02, errors


def test_events_of_pages_keep_their_order() -> None:
    handed_out = HandedOut()
    one, two = torch.tensor([1]), torch.tensor([2])
    handed_out.add(one * PAGE, one)
    handed_out.freed(one)
    handed_out.freed(two)
    handed_out.add(one * PAGE, one)
    handed_out.add(torch.tensor([1 * PAGE + 1]), torch.tensor([], dtype=torch.int64))
    taken = [(events.event, torch.cat(events.pages).tolist()) for events in handed_out.take_pages()]
    assert taken == [(PageEvent.NEW, [1]), (PageEvent.FREED, [1, 2]), (PageEvent.NEW, [1])]
    assert handed_out.take_pages() == []
    handed_out.freed(two)
    handed_out.clear()
    handed_out.add(two * PAGE, two)
    assert [events.event for events in handed_out.take_pages()] == [PageEvent.CLEARED, PageEvent.NEW]


def tiered_scene(device_pages: int = 40, ring_pages: int = 12) -> tuple[Scene, Tier]:
    """An engine over an empty pool of 120 pages."""
    scene = Scene(SMALL, pages=121, tiers=Tiers(device_pages, ring_pages))
    assert scene.tier is not None
    return scene, scene.tier


def give(scene: Scene, row: int, begin: int, pages: list[int]) -> None:
    """Pages are handed out to a row from position `begin` on."""
    new = torch.tensor(pages, dtype=torch.int64)
    slots = (new.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()
    scene.req_to_token[row, begin : begin + len(slots)] = slots.int()
    scene.handed_out.add(slots, new)


def fill(scene: Scene, tier: Tier, pages: list[int], value: float) -> None:
    """Write a number to whole pages."""
    at = tier.directory.translate((torch.tensor(pages).unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten())
    assert (at >= PAGE).all()
    for buffer in (*scene.keys, *scene.values):
        buffer[at] = value


def others_come(scene: Scene, tier: Tier, first: int, pages: int = 10) -> None:
    """Requests that take every device page that they may, and end."""
    for launch in range(5):
        mine = list(range(first + pages * launch, first + pages * (launch + 1)))
        give(scene, 5, 0, mine)
        scene.engine.begin_extend([Extend(5, f"o{first}{launch}", 0, pages * PAGE, pages * PAGE, True)])
        fill(scene, tier, mine, float(launch))
        scene.engine.row_freed(5)


def test_a_session_s_next_turn_writes_where_its_last_one_ended() -> None:
    scene, tier = tiered_scene()
    give(scene, 1, 0, [1, 2, 3])
    scene.engine.begin_extend([Extend(1, "s", 0, 40, 40, True)])
    fill(scene, tier, [1, 2, 3], 7.0)
    others_come(scene, tier, 10)
    device_page = tier.directory.device_page
    assert device_page[3] > 0 and not device_page[1:3].any(), "the last, partial page stays"
    give(scene, 1, 48, [4])
    scene.engine.begin_extend([Extend(1, "s", 40, 60, 60, True)])
    assert (tier.directory.translate(scene.slots(1, 60)[40:]) >= PAGE).all()
    rules.assert_directory(tier.directory)
    # The same, but shorter than what was launched: a page that was full, and has left, is written again.
    others_come(scene, tier, 60)
    assert not device_page[2]
    scene.engine.begin_extend([Extend(1, "s", 20, 32, 32, True)])
    rules.assert_directory(tier.directory)
    at = tier.directory.translate(scene.slots(1, 32)[16:])
    assert (at >= PAGE).all() and not tier.directory.stored[2]
    assert (scene.keys[1][at] == 7.0).all() and (scene.values[0][at] == 7.0).all(), "with what it held"


def test_a_session_s_last_page_stays_though_its_touch_could_not_be_noted() -> None:
    scene, tier = tiered_scene()
    give(scene, 1, 0, [1, 2])
    scene.engine.begin_extend([Extend(1, "s", 0, 20, 20, True)])
    fill(scene, tier, [1, 2], 7.0)
    others_come(scene, tier, 60)
    give(scene, 1, 32, [3, 4])
    with patch.object(TieredResidency, "_note", side_effect=MemoryError("a fault of the test")):
        scene.engine.begin_extend([Extend(1, "s", 20, 60, 60, True)])
    assert scene.engine.counters.faults["offload"] == 1
    assert (tier.directory.translate(scene.slots(1, 60)[20:]) >= PAGE).all(), "a token's KV has no place"


def test_what_every_step_reads_counts_as_new() -> None:
    scene, tier = tiered_scene(60, 12)
    for begin in (0, 160, 320):
        mine = list(range(begin // PAGE + 1, begin // PAGE + 11))
        give(scene, 1, begin, mine)
        scene.engine.begin_extend([Extend(1, "r", begin, begin + 160, 480, begin == 320)])
        fill(scene, tier, mine, 1.0)
    give(scene, 1, 480, [31, 32])
    for length in range(481, 481 + TOUCH_EVERY):
        scene.engine.begin_decode(np.array([1]), np.array([length]))
    touch = tier.directory.touch
    old = touch[2:11].max()
    assert touch[1] > old, "sinks"
    assert (touch[scene.slots(1, 480)[-SMALL.window_tokens :] // PAGE] > old).all(), "window"
    assert touch[2:11].tolist() == sorted(touch[2:11].tolist()), "the earliest positions leave first"


def test_a_pool_is_as_new_after_it_was_cleared() -> None:
    scene, tier = tiered_scene()
    give(scene, 1, 0, [1, 2, 3])
    scene.engine.begin_extend([Extend(1, "s", 0, 40, 40, True)])
    fill(scene, tier, [1, 2, 3], 7.0)
    others_come(scene, tier, 10)
    scene.engine.rows_cleared()
    scene.handed_out.clear()
    give(scene, 2, 0, [9])
    scene.engine.begin_extend([Extend(2, "t", 0, 16, 16, True)])
    rules.assert_directory(tier.directory)
    assert tier.directory.device_page.nonzero().flatten().tolist() == [9] and not tier.directory.stored.any()
    assert tier.directory.ring_level == tier.directory.ring_pages


def test_a_batch_that_no_ring_holds_is_refused_and_not_written_to_no_page() -> None:
    scene, tier = tiered_scene()
    give(scene, 1, 0, list(range(1, 14)))
    with pytest.raises(RuntimeError, match="host_ratio"):
        scene.engine.begin_extend([Extend(1, "s", 0, 200, 200, True)])


def test_no_head_waits_for_the_device() -> None:
    """But in what copies pages, which is a GPU's kernels'."""
    scene, _ = tiered_scene()
    residency = scene.engine.residency
    with patch.object(moves, "_for", lambda tier: Mock()), Waits():
        for begin in (0, 160):
            give(scene, 1, begin, list(range(begin // PAGE + 1, begin // PAGE + 11)))
            residency.extend([Extend(1, "r", begin, begin + 160, 320, begin == 160)])
            residency.fill()
        for length in range(321, 321 + 2 * TOUCH_EVERY):
            if length % PAGE == 1:
                give(scene, 1, length - 1, [length // PAGE + 1])
            residency.decode(np.array([1]), np.array([length]))
            residency.fill()
        residency.extend([Extend(1, "r", 350, 352, 352, True)])
        residency.fill()
        scene.handed_out.freed(torch.tensor([1, 2]))
        residency.decode(np.array([1]), np.array([353]))
        residency.fill()
        scene.handed_out.clear()
        residency.decode(np.array([1]), np.array([1]))
    assert not scene.engine.counters.faults


OPERATIONS: dict[str, tuple[Any, str]] = {
    "refill": (moves, "refill"),
    "choose": (Directory, "victims"),
    "store": (HostRows, "store"),
    "drop": (Directory, "drop"),
    "append": (Directory, "append"),
    "touch": (Directory, "note"),
}


def pressed(served: Served) -> None:
    """A request that others push off the device, and that goes on."""
    request = served.prefill(stream(1, 900))
    served.decode(request)
    for name in (3, 4):
        served.world.finish(served.prefill(stream(name, 500)), in_flight=0)
    served.decode(request, steps=18)


@pytest.fixture(scope="module")
def undisturbed() -> list[torch.Tensor]:
    """What its layers give where nothing fails."""
    served = Served(tiers(4))
    pressed(served)
    return served.outputs


@pytest.mark.parametrize(
    ("operation", "begin", "lasts"), [*((name, 2, 1) for name in OPERATIONS), ("store", 1, 3), ("append", 6, 1)]
)
def test_what_fails_is_counted_and_loses_nothing(
    operation: str, begin: int, lasts: int, undisturbed: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    owner, name = OPERATIONS[operation]
    original, calls = getattr(owner, name), [0]

    def fails(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if begin <= calls[0] < begin + lasts:
            raise MemoryError("a fault of the test")
        return original(*arguments, **options)

    served = Served(tiers(4))
    served.world.may_fault = True
    with patch.object(owner, name, fails), caplog.at_level(logging.WARNING):
        pressed(served)
    assert calls[0] >= begin + lasts
    assert served.world.engine.counters.faults == {"offload": lasts}
    warnings = [record.getMessage() for record in caplog.records if "failed" in record.getMessage()]
    assert len(warnings) == 1 and "host_ratio" in warnings[0] and "device tier" in warnings[0]
    assert all(torch.equal(a, b) for a, b in zip(served.outputs, undisturbed, strict=True))
    rules.assert_tiers(served.world)
    assert served.world.tier is not None
    directory = served.world.tier.directory
    assert directory.ring_level == directory.ring_pages


def test_while_nothing_can_be_stored_decode_goes_on_and_prefill_is_told_to_wait() -> None:
    served = Served(tiers(4))
    request = served.prefill(stream(1, 900))
    engine, directory = served.world.engine, served.world.tier.directory
    served.world.may_fault = True
    with patch.object(HostRows, "store", side_effect=MemoryError("none left")):
        served.decode(request, steps=20)
        assert not engine.residency.refill()
    faults = engine.counters.faults["offload"]
    assert faults > 1 and request.length == 920
    assert engine.residency.refill() and directory.ring_level == directory.ring_pages
    assert engine.counters.faults["offload"] == faults
    rules.assert_tiers(served.world)
