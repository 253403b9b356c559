"""What was served before a prompt, and where its borders lie: aligned segments in any case, with `reproducible: true` nothing
else. Segments have up to 256 tokens from the 16 sinks on, windows 64, decoded runs 64.

Red when: a prompt whose beginning was served before ends with other borders than after a flush although its aligned segments
are complete, or although its last one has a third more tokens than its largest part; with `reproducible`, a border, a dense
step or a decoded token's KV tells of anything but the prompt and what runs beside it, or what neighbours force is not counted.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import msgspec
import pytest

from sglang_clusterkv.config import ClusterKVConfig
from tests.support.rules import cold_borders
from tests.support.scenes import PAGE
from tests.support.world import SMALL, Pieces, Request, World, question, served, stream

MERGING = msgspec.structs.replace(SMALL, recluster_every=64, merge_segments=True)
REPRODUCIBLE = msgspec.structs.replace(MERGING, reproducible=True)
TEXT = stream(1, 1500)


def serve(world: World, tokens: list[int], decoded: int = 1) -> Request:
    """A request that ends before the next one comes."""
    request = served(world, tokens, decoded=decoded)
    world.finish(request)
    return request


# ---- at no option


@pytest.mark.parametrize("length", [700, 960, 1001])
@pytest.mark.parametrize("shares", [(1 / 2,), (1 / 3, 2 / 3), (0.1, 0.4, 0.6, 0.7)])
def test_complete_aligned_segments_are_those_of_an_empty_cache(length: int, shares: tuple[float, ...]) -> None:
    world = World(MERGING)
    for share in shares:
        serve(world, TEXT[: int(share * length)])
    request = served(world, TEXT[:length])
    cold = cold_borders(MERGING, length, length)
    assert world.segments(request)[: len(cold) - 1] == cold[:-1]


def test_an_aligned_segment_is_completed_although_its_largest_part_is_not_doubled() -> None:
    world = World(MERGING)
    request = served(world, TEXT[:752])
    assert world.segments(request) == [(16, 272), (272, 528), (528, 688)]
    world.finish(request)
    assert world.segments(served(world, TEXT[:900])) == [(16, 272), (272, 528), (528, 784)]
    assert world.engine.counters.merges == 1


@pytest.mark.parametrize(("before", "seen"), [(380, [(16, 432)]), (416, [(16, 352), (352, 416)])])
def test_a_prompts_last_segment_is_whole_where_that_makes_its_largest_part_a_third_longer(
    before: int, seen: Pieces
) -> None:
    world = World(msgspec.structs.replace(MERGING, segment_tokens=512))
    serve(world, TEXT[:before])  # makes [16, 304) or [16, 352)
    request = served(world, TEXT[:496])
    assert world.segments(request) == seen
    clustered = world.engine.counters.tokens_clustered
    world.decode(request, steps=30)
    assert world.segments(request) == seen and world.engine.counters.tokens_clustered == clustered, "once, or never"


def test_a_prompts_last_segment_is_not_made_whole_where_another_running_request_sees_a_part() -> None:
    world = World(MERGING)
    other = served(world, TEXT[:700])
    request = served(world, TEXT[:830])
    world.decode(other, request)
    assert (528, 624) in world.segments(request) and (528, 624) in world.segments(other)


def test_a_prompts_last_segment_is_not_made_whole_across_a_branchs_end() -> None:
    """The next branch would cut it again, at each turn of two chats."""
    world = World(MERGING)
    serve(world, TEXT[:830])
    serve(world, TEXT[:640] + question(1, 200))  # cuts (528, 752)
    assert world.segments(served(world, TEXT[:830]))[2:] == [(528, 640), (640, 752)]


@pytest.mark.parametrize("chunks", [(), (272,), (64, 64, 64)])
def test_what_is_left_of_a_segment_that_lost_pages_goes_into_the_whole_one(chunks: tuple[int, ...]) -> None:
    world = World(MERGING)
    serve(world, TEXT[:480])
    world.evict(len(world.tree) - 19)  # two pages of (272, 416) are left, too few for a segment
    request = world.submit(TEXT[:900])
    assert world.found(request) == 304
    for chunk in chunks:
        world.extend((request, chunk))
    world.extend(request)
    world.decode(request)
    assert world.segments(request) == cold_borders(MERGING, 900, 900)


def test_what_is_left_of_an_own_segment_goes_into_the_whole_one_while_decoding() -> None:
    world = World(MERGING)
    shorter, request = world.submit(TEXT[:740]), world.submit(TEXT[:900])
    world.extend(shorter, request)
    world.decode(shorter, request, steps=3)
    # It made (528, 784); then it took the shorter one's pages. Three pages are left of what it made.
    assert (528, 784) not in world.segments(request)
    world.finish(shorter)
    world.decode(request, steps=100)
    assert (528, 784) in world.segments(request)


def test_gaps_beside_an_aligned_border_go_into_the_segment() -> None:
    world = World(MERGING)
    request = served(world, stream(1, 300), decoded=1)
    assert world.segments(request) == [(16, 224)], "three pages are left before the border"
    world.decode(request, steps=402 - request.length)
    assert world.segments(request) == [(16, 272), (272, 336)]


# ---- with `reproducible`


def chat(world: World) -> None:
    tokens = TEXT[:400]
    for turn in range(3):
        request = serve(world, tokens, decoded=90)
        tokens = request.tokens + question(turn, 40)


HISTORIES: dict[str, Callable[[World, int], object]] = {
    "the half": lambda world, length: serve(world, TEXT[: length // 2]),
    "two thirds by turns": lambda world, length: [serve(world, TEXT[: i * length // 9]) for i in range(1, 7)],
    "all of it": lambda world, length: serve(world, TEXT[:length]),
    "all of it, and more": lambda world, length: serve(world, TEXT, decoded=200),
    "all but a few": lambda world, length: serve(world, TEXT[: length - 40], decoded=70),
    "a branch": lambda world, length: serve(world, TEXT[: length // 2] + question(1, 300)),
    "a branch in its window": lambda world, length: serve(world, TEXT[: length - 30] + question(1, 300)),
    "a chat over its beginning": lambda world, length: chat(world),
    "a longer one, half evicted": lambda world, length: (serve(world, TEXT), world.evict(50)),
    "a longer one, a page evicted": lambda world, length: (serve(world, TEXT), world.evict(1)),
}


def decoded_by(world: World, request: Request) -> list[tuple[int, Pieces, bool]]:
    """Each change of what a request sees while it decodes 80 tokens: at which length, and whether the step was dense."""
    seen: list[tuple[int, Pieces, bool]] = []
    for _ in range(80):
        step = world.decode(request)
        if not seen or seen[-1][1:] != (world.segments(request), step.sparse is None):
            seen.append((request.length, world.segments(request), step.sparse is None))
    return seen


@functools.cache
def alone(config: ClusterKVConfig, length: int) -> list[tuple[int, Pieces, bool]]:
    """The same in an empty world."""
    world = World(config)
    request = world.submit(TEXT[:length])
    world.extend(request)
    return decoded_by(world, request)


@pytest.mark.parametrize(("length", "merge"), [(90, True), (699, True), (1008, True), (640, False)])
@pytest.mark.parametrize("history", HISTORIES)
def test_borders_are_those_of_an_empty_cache(history: str, length: int, merge: bool) -> None:
    config = msgspec.structs.replace(REPRODUCIBLE, merge_segments=merge)
    world = World(config)
    HISTORIES[history](world, length)
    request = world.submit(TEXT[:length])
    world.extend(request)
    found = decoded_by(world, request)
    assert found == alone(config, length), (
        "1,008 are whole pages: such a row takes the tree's last page after its prefill"
    )
    assert found[0][1] == cold_borders(config, length, length)
    assert world.engine.counters.forced_borders == 0


def test_any_history_leaves_the_borders_of_an_empty_cache() -> None:
    rng = random.Random(0)
    for number in range(15):
        world = World(REPRODUCIBLE, pages=150, overlap=bool(number % 2))
        texts = [TEXT, TEXT[: rng.randrange(300, 900)] + question(number, 600)]
        for _ in range(rng.randrange(1, 6)):
            text = rng.choice(texts)
            request = serve(world, text[: rng.randrange(100, 1100)], decoded=rng.choice([1, 20, 150]))
            texts.append(request.tokens + question(rng.randrange(10**6), 700))
            if rng.random() < 0.3:
                world.evict(rng.randrange(1, 60))
        final = rng.choice(texts)[: rng.randrange(300, 1200)]
        request = served(world, final)
        assert world.segments(request) == cold_borders(REPRODUCIBLE, len(final), len(final)), number


def test_what_was_decoded_sparsely_is_not_found() -> None:
    world = World(REPRODUCIBLE)
    request = serve(world, TEXT[:700], decoded=100)
    assert world.found(world.submit([*request.tokens, 1])) == 700 // PAGE * PAGE
    assert world.engine.counters.sparse_steps > 0
    short = serve(world, stream(2, 60), decoded=150)  # its steps are dense until tokens have aged, so their KV is exact
    until = world.found(world.submit([*short.tokens, 1]))
    assert 60 // PAGE * PAGE < until < len(short.tokens) - PAGE


def test_without_the_option_all_that_was_decoded_is_found() -> None:
    world = World(MERGING)
    request = serve(world, TEXT[:700], decoded=100)
    assert world.found(world.submit([*request.tokens, 1])) == (len(request.tokens) - 1) // PAGE * PAGE


def test_what_a_running_neighbour_forces_is_counted_and_ends_with_it() -> None:
    world = World(REPRODUCIBLE)
    neighbour = served(world, TEXT[:700])  # (528, 624)
    request = served(world, TEXT[:1001])
    cold = cold_borders(REPRODUCIBLE, 1001, 1001)
    assert world.segments(request) != cold and (528, 624) in world.segments(request)
    assert world.segments(neighbour) == [*cold_borders(REPRODUCIBLE, 700, 700), (624, 688)], "what both have is in both"
    assert world.engine.counters.forced_borders > 0 == world.engine.counters.splits
    world.finish(request)
    world.finish(neighbour)
    assert world.segments(served(world, TEXT[:1001])) == cold


def test_a_neighbour_that_goes_on_elsewhere_is_cut_and_counted() -> None:
    world = World(REPRODUCIBLE)
    neighbour = served(world, TEXT[:900])
    request = served(world, TEXT[:640] + question(1, 300))
    assert (528, 640) in world.segments(request) and world.segments(neighbour)[-1] == (640, 784)
    assert world.engine.counters.splits == 1 and world.engine.counters.forced_borders > 0


def test_a_retracted_request_gets_the_borders_of_what_it_then_prefills() -> None:
    world = World(REPRODUCIBLE)
    request = served(world, TEXT[:700], decoded=200)
    world.retract(request)
    world.extend(request)
    world.decode(request)
    assert world.segments(request) == cold_borders(REPRODUCIBLE, 900, 900)


@pytest.mark.parametrize("chunks", [(256,), (64,) * 10, (272, 512), (16, 640)])
def test_chunks_of_a_prompt_that_was_found_in_part_do_not_show(chunks: tuple[int, ...]) -> None:
    world = World(REPRODUCIBLE)
    serve(world, TEXT[:450], decoded=30)
    request = world.submit(TEXT[:1100])
    for chunk in chunks:
        if request.length + chunk < 1100:
            world.extend((request, chunk))
    world.extend(request)
    world.decode(request)
    assert world.segments(request) == cold_borders(REPRODUCIBLE, 1100, 1100)


def borders_of(world: World, *requests: Request) -> list[Pieces]:
    """What each sees."""
    return [world.segments(request) for request in requests]


def test_equal_prompts_at_once_have_the_borders_of_one_alone() -> None:
    world = World(REPRODUCIBLE)
    batch = [world.submit(TEXT[:700]) for _ in range(3)]
    world.extend(*batch)
    world.decode(*batch, steps=3)
    assert borders_of(world, *batch) == [cold_borders(REPRODUCIBLE, 700, 700)] * 3
