"""Neighbouring segments become one where only one running request sees them, and fall apart again where another branches.

Segments have up to 256 tokens, windows 64, decoded runs 64.

Red when: a group doubles less than the largest of it, exceeds a segment or reaches into the window; decoded runs or a
chat's last turns stay short; what another running request sees is merged; a merge undoes what a branch cut; anything is
merged with `merge_segments: false`.
"""

from __future__ import annotations

import random

import msgspec
import pytest

from sglang_clusterkv.clusters.planning.merging import groups_to_merge
from sglang_clusterkv.clusters.rows import Segment
from tests.support.scenes import PAGE
from tests.support.world import SMALL, Pieces, World, question, served, stream

MERGING = msgspec.structs.replace(SMALL, recluster_every=64, merge_segments=True)


def row_of(*lengths: int, gap: int = 0) -> list[Segment]:
    """Segments of these tokens, one behind the other."""
    segments, begin = [], 16
    for i, length in enumerate(lengths):
        segments.append(Segment(i, begin, begin + length))
        begin += length + gap
    return segments


# ---- which


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ((), []),
        ((256,), []),
        ((256, 256), [(0, 1)]),
        ((512, 256), []),
        ((512, 256, 256), [(0, 2)]),
        ((1024, 256, 256), [(1, 2)]),
        ((300, 100, 50, 80), [(1, 3)]),
        ((300, 230, 60, 90), [(0, 3)]),
        ((600, 600), []),
        ((64,) * 16, [(0, 15)]),
        ((64,) * 17, [(1, 16)]),
        ((100, 100, 1024, 64, 64), [(3, 4), (0, 1)]),
    ],
)
def test_a_group_doubles_its_largest_and_fits_a_segment(lengths: tuple[int, ...], groups: Pieces) -> None:
    assert groups_to_merge(row_of(*lengths), [True] * (len(lengths) - 1), 1024) == groups


def test_groups_are_what_they_promise_whatever_the_lengths() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.choice([64, 80, 128, 256, 512, 1024]) for _ in range(rng.randrange(12))]
        segments = row_of(*lengths, gap=rng.choice([0, 16]))
        joins = [rng.random() < 0.8 for _ in lengths[1:]]
        last_first = len(lengths)
        for first, last in groups_to_merge(segments, joins, 1024):
            assert first < last < last_first and all(joins[first:last])
            span = segments[last].end - segments[first].begin
            assert 2 * max(lengths[first : last + 1]) <= span <= 1024
            last_first = first


def test_a_segment_that_may_not_join_ends_a_group() -> None:
    assert groups_to_merge(row_of(64, 64, 64, 64), [True, False, True], 1024) == [(2, 3), (0, 1)]


# ---- when


def test_decoded_runs_merge_at_the_second_and_the_fourth() -> None:
    world = World(MERGING)
    request = served(world, stream(1, 140))
    assert world.segments(request) == []
    borders: list[Pieces] = []
    while request.length < 600:
        world.decode(request)
        if world.segments(request) and (not borders or borders[-1] != world.segments(request)):
            borders.append(world.segments(request))
    assert borders == [
        [(16, 80)],
        [(16, 144)],
        [(16, 144), (144, 208)],
        [(16, 272)],
        [(16, 272), (272, 336)],
        [(16, 272), (272, 400)],
        [(16, 272), (272, 400), (400, 464)],
        [(16, 272), (272, 528)],
    ]
    # The second, fourth, sixth and eighth run are not built first and then again as part of a larger one.
    assert world.engine.counters.tokens_clustered == 2 * (64 + 128 + 64 + 256)
    assert world.engine.counters.merges == 4 and world.engine.counters.splits == 0


def chat(world: World, turns: int, message: int = 20, answer: int = 50) -> list[Pieces]:
    """A chat of short turns; the segments that each turn decodes by."""
    tokens, seen = stream(1, 200), []
    for turn in range(turns):
        request = served(world, tokens, decoded=answer)
        seen.append(world.segments(request))
        world.finish(request)
        tokens = request.tokens + question(turn, message)
    return seen


def test_a_chats_last_turns_become_one_segment() -> None:
    turns = 20
    merged, short = (
        chat(World(config), turns) for config in (MERGING, msgspec.structs.replace(MERGING, merge_segments=False))
    )
    assert len(short[-1]) >= 15, "a segment of every turn"
    assert len(merged[-1]) <= 8
    assert all(b - a >= 192 for a, b in merged[-1][:-2]), merged[-1]
    # What is not in a segment is always attended: gaps between turns go into the merged ones.
    assert sum(b - a for a, b in merged[-1]) >= sum(b - a for a, b in short[-1])


def test_a_token_is_clustered_about_three_times_in_a_chat() -> None:
    world = World(MERGING)
    segments = chat(world, 20)[-1]
    assert world.engine.counters.tokens_clustered <= 3.2 * segments[-1][1]


def test_no_merge_reaches_into_the_window() -> None:
    world = World(MERGING)
    for turn in range(12):
        request = served(world, stream(1, 100 + 40 * turn))
        end = request.length - MERGING.window_tokens
        made = [m for m in world.history if m.merged]
        assert all(m.end <= m.maker.length - MERGING.window_tokens for m in made)
        assert all(b <= end for _, b in world.segments(request))
        world.finish(request)


def test_prefill_chunks_merge_nothing_before_the_last() -> None:
    world = World(MERGING)
    world.finish(served(world, stream(1, 150)))
    world.finish(served(world, stream(1, 150) + question(1, 100)))
    request = world.submit(stream(1, 150) + question(1, 100) + question(2, 400))
    world.extend((request, 64 - world.found(request) % PAGE))
    world.extend((request, 128))
    assert not any(m.merged and m.maker.prefilling for m in world.history)
    world.extend(request)
    world.decode(request)
    world.decode(request)


# ---- with others


def test_what_another_running_request_sees_is_left_alone() -> None:
    world = World(MERGING)
    tokens = chat_of(world, 3)
    first = served(world, tokens + question(11, 5), decoded=1)
    before = world.segments(first)
    second = world.submit(tokens + question(12, 100))
    world.extend(second)
    world.decode(first, second)
    world.decode(first, second, steps=100)
    shared = {s for s in world.ids(second) if s in world.ids(first)}
    assert shared and before
    world.finish(second)
    merges = world.engine.counters.merges
    world.decode(first, steps=100)
    assert world.engine.counters.merges > merges, "alone again, it merges what it decodes"


def chat_of(world: World, turns: int) -> list[int]:
    """The tokens of a chat that has ended."""
    tokens = stream(1, 200)
    for turn in range(turns):
        request = served(world, tokens, decoded=50)
        world.finish(request)
        tokens = request.tokens + question(turn, 20)
    return tokens[:-20]


def test_a_branch_inside_a_merged_segment_splits_it_again() -> None:
    world = World(MERGING)
    request = served(world, stream(1, 140), decoded=330)
    merged = world.segments(request)[0]
    assert merged == (16, 272)
    world.finish(request)
    branch = served(world, request.tokens[:160] + question(1, 150))
    assert world.engine.counters.splits == 1
    assert world.segments(branch)[0] == (16, 96) or world.segments(branch)[0] == (16, 160)


def two_chats(world: World, turns: int) -> list[int]:
    """Two chats over one beginning of 180 tokens, by turns; the tokens that each turn clustered."""
    chats, clustered = [stream(1, 180) + question(i, 120) for i in (1, 2)], []
    for turn in range(turns):
        for i in range(2):
            before = world.engine.counters.tokens_clustered
            request = served(world, chats[i], decoded=30)
            world.finish(request)
            chats[i] = request.tokens + question(10 * turn + i + 50, 30)
            clustered.append(world.engine.counters.tokens_clustered - before)
    return clustered


def test_two_chats_over_one_beginning_do_not_undo_each_other() -> None:
    """A merge across the point where they part would be cut by the other's next turn, and so on for ever."""
    world = World(msgspec.structs.replace(MERGING, segment_tokens=1024))
    two_chats(world, 9)
    assert world.engine.counters.splits == 1, "the second chat's first turn parts from the first's"
    assert world.engine.counters.merges >= 2


def test_an_aligned_segment_that_two_chats_part_in_is_completed_by_each_turn() -> None:
    """So both have the borders of an empty cache; it costs a segment and what the turn adds."""
    world = World(MERGING)
    clustered = two_chats(world, 6)
    assert world.engine.counters.splits > 2
    assert max(clustered[2:]) <= 2 * MERGING.segment_tokens + 60, "the parted one, and one of its own"


def test_nothing_is_merged_when_it_is_off() -> None:
    world = World(msgspec.structs.replace(MERGING, merge_segments=False))
    chat(world, 5)
    served(world, stream(9, 140), decoded=330)
    assert world.engine.counters.merges == 0 and not any(m.merged for m in world.history)
