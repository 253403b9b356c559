"""DESIGN.md's rules 1 to 6, in the engine, under what SGLang's scheduler does to it (`world.py` models that).

`assert_rules` and `assert_lists` run after every launch of every test here. Red when: a page keeps its clusters when it is
handed out, a segment is made across what was found and what is own or reaches into the window, a running row's record is
not whole in its pages, tables are not those of the keys, or a token is attended twice, not at all, or of another request.
"""

from __future__ import annotations

import random

import pytest
import torch
from world import SMALL, Request, World, stream

SINKS, WINDOW, SEGMENT, EVERY = SMALL.sink_tokens, SMALL.window_tokens, SMALL.segment_tokens, SMALL.recluster_every


def clustered(world: World) -> int:
    return world.engine.counters.tokens_clustered


def started(world: World, tokens: list[int], *, steps: int = 2) -> Request:
    """A request that was prefilled and decodes."""
    request = world.submit(tokens)
    world.extend(request)
    world.decode(request, steps=steps)
    return request


def test_chunk_borders_do_not_show() -> None:
    borders = []
    for chunk in (1000, 272, 64):
        world = World()
        request = world.submit(stream(1, 1000))
        while not request.running or request.prefilling:
            world.extend((request, chunk))
        world.decode(request, steps=2)
        borders.append(world.segments(request))
    assert borders[0] == [(16, 272), (272, 528), (528, 784), (784, 928)]
    assert borders == [borders[0]] * 3


def test_decoded_tokens_become_segments_as_they_age() -> None:
    world = World()
    request = started(world, stream(1, 400))
    end = world.segments(request)[-1][1]
    world.decode(request, steps=3 * EVERY)
    aged = (request.length - 1) // 16 * 16 - WINDOW  # of the launch before, which was looked at
    expected = [(begin, begin + EVERY) for begin in range(end, aged - EVERY + 1, EVERY)]
    assert len(expected) >= 2 and world.segments(request)[-len(expected) :] == expected


def test_a_second_request_cuts_one_segment_and_a_third_none() -> None:
    world = World()
    document = stream(1, 1200)
    world.finish(started(world, document + stream(2, 200)))
    before, splits = clustered(world), world.engine.counters.splits
    second = started(world, document + stream(3, 200))
    prefix_again = sum(e - b for b, e in world.segments(second) if e <= world.found(second) and e > 1200 - SEGMENT)
    assert clustered(world) - before <= SEGMENT + 200 and prefix_again
    assert world.engine.counters.splits - splits <= 1
    before, splits = clustered(world), world.engine.counters.splits
    third = started(world, document + stream(4, 100))
    assert clustered(world) - before <= 100, "of the prefix nothing"
    assert world.engine.counters.splits == splits
    assert world.segments(third)[: len(world.segments(second)) - 1] == world.segments(second)[:-1]


def test_the_next_turn_of_a_chat_clusters_no_segment_again() -> None:
    world = World()
    first = started(world, stream(1, 700), steps=90)
    seen = world.segments(first)
    world.finish(first)
    before = clustered(world)
    second = started(world, first.tokens[:-1] + stream(2, 120))
    assert world.engine.counters.splits == 0
    assert world.segments(second)[: len(seen)] == seen
    assert clustered(world) - before <= WINDOW + 16 + 90 + 120


def test_the_window_is_short_after_a_match() -> None:
    world = World()
    document = stream(1, 1200)
    world.finish(started(world, document + stream(2, 300)))
    question = started(world, document + stream(3, 10), steps=3)
    recallable = [(b, e) for b, e in world.segments(question) if e <= question.length - WINDOW]
    assert question.length - recallable[-1][1] <= 2 * WINDOW + 16 + 10


def test_a_branch_cuts_a_segment_while_its_far_side_is_decoded() -> None:
    world = World()
    document = stream(1, 1000)
    far = started(world, document)
    splits = world.engine.counters.splits
    near = world.submit(document[:656] + stream(2, 90))
    world.extend(near)
    world.decode(far, near, steps=4)
    assert world.engine.counters.splits == splits + 1
    assert not world.is_dirty(far) and not world.is_dirty(near)
    head = [piece for piece in world.segments(near) if piece[1] <= 656]
    assert head == [piece for piece in world.segments(far) if piece[1] <= 656], "both see the pieces of the head"
    assert any(b >= 656 and e <= 784 for b, e in world.segments(far)), "the far side's rest was built again"


def test_identical_prompts_of_one_batch_are_clustered_once_they_share_pages() -> None:
    world = World()
    copies = [world.submit(stream(1, 700)) for _ in range(3)]
    world.extend(*copies)
    world.decode(*copies, steps=4)
    assert len({tuple(world.ids(copy)) for copy in copies}) == 1, "all see the tree's segments"
    assert len({tuple(world.segments(copy)) for copy in copies}) == 1
    assert world.pages(copies[0], 0, 640).tolist() == world.pages(copies[2], 0, 640).tolist()


def test_copies_that_age_together_cluster_what_they_share_once() -> None:
    """Two find the prompt's end unclustered, in their window; it ages for both in the same step."""
    world = World()
    world.finish(started(world, stream(1, 700)))
    copies = [world.submit(stream(1, 700)) for _ in range(2)]
    world.extend(*copies)
    world.decode(*copies, steps=2 * EVERY)
    assert world.segments(copies[0]) == world.segments(copies[1])
    shared = [i for i, (_, end) in enumerate(world.segments(copies[0])) if end <= 688]
    assert world.segments(copies[0])[shared[-1]] == (624, 688), "what they found is a segment of its own"
    assert [world.ids(copies[0])[i] for i in shared] == [world.ids(copies[1])[i] for i in shared]


def test_a_row_rewritten_in_the_middle_of_a_segment_is_walked_before_its_next_sparse_step() -> None:
    """SGLANG.md 4.5, the second inversion: the tree's pages of a shorter copy replace the head of a segment."""
    world = World()
    a, b = world.submit(stream(1, 800)), world.submit(stream(1, 800))
    world.extend(a, (b, 320))  # b's chunk ends inside a's second segment
    world.extend(b)  # b's first chunk is canonical now; a's checkpoint, after this launch, rewrites its row
    assert world.is_dirty(a)
    world.decode(a, b, steps=3)
    assert not world.is_dirty(a) and not world.is_dirty(b)


def test_an_owner_goes_on_after_what_another_request_closed() -> None:
    world = World()
    owner = world.submit(stream(1, 900))
    world.extend((owner, 480))  # pages [272, 480) wait for a whole segment
    other = world.submit(stream(1, 448) + stream(2, 120))
    world.extend((owner, 160), other)  # finds them, up to 448
    world.extend(owner)
    world.decode(owner, other, steps=2)
    assert (272, 448) in world.segments(owner) or any(e == 448 for _, e in world.segments(owner))
    assert any(b == 448 for b, _ in world.segments(owner)), "the owner's next run begins after it"


def test_a_retracted_request_comes_back() -> None:
    world = World()
    request = started(world, stream(1, 500), steps=150)
    before = world.segments(request)
    world.retract(request)
    world.evict(5)
    world.extend(request)
    world.decode(request, steps=2)
    assert world.segments(request)[0] == before[0]
    assert world.engine.counters.build_conflicts == 0


def test_an_abort_between_chunks_leaves_nothing_behind() -> None:
    world = World(pages=90)
    request = world.submit(stream(1, 900))
    world.extend((request, 512))
    world.abort(request)
    world.evict(90)
    again = started(world, stream(2, 900), steps=4)  # takes the same pages
    assert world.segments(again)[0] == (16, 272)
    assert len(world.engine.planner.rows) == 1


def test_evicted_pages_never_show_their_old_clusters() -> None:
    world = World(pages=150)
    for name in range(12):
        world.finish(started(world, stream(name, 900), steps=3))
    assert world.engine.counters.build_conflicts == 0


def test_pages_of_a_request_retracted_while_it_clusters_are_the_next_owners() -> None:
    """The first inversion: step N clusters aged tokens; scheduling N + 1 retracts the request and hands its pages out."""
    world = World(pages=80)
    request = started(world, stream(1, 400), steps=EVERY - 40)
    while not world.made:
        world.decode(request)
    world.retract(request)
    world.evict(80)
    other = started(world, stream(2, 700), steps=3)
    assert world.segments(other)[0] == (16, 272)


def test_a_flush_forgets_everything() -> None:
    world = World()
    world.finish(started(world, stream(1, 600)))
    world.flush()
    before = clustered(world)
    started(world, stream(1, 600))
    assert clustered(world) - before >= 512
    assert world.engine.counters.tokens_reused == 0


def test_a_segments_tables_do_not_depend_on_the_batch() -> None:
    """Rule 5, bit for bit; `assert_whole` compares every segment with one built alone, here with two layers and heads."""
    sizes = {"layers": 2, "kv_heads": 2, "head_dim": 32}
    alone, crowded = World(**sizes), World(**sizes)
    one = started(alone, stream(1, 600))
    others = [crowded.submit(stream(name, 300 + 90 * name)) for name in (5, 3)]
    crowded.extend(*others)
    two = crowded.submit(stream(1, 600))
    crowded.extend(two)
    crowded.decode(two, *others, steps=2)
    assert alone.segments(one) == crowded.segments(two)
    for begin, end in alone.segments(one):
        expected = alone.tables(one, begin, end)
        for name, table in crowded.tables(two, begin, end).items():
            assert torch.equal(table, expected[name]), name


def test_a_dirty_row_decodes_densely_and_says_so() -> None:
    world = World()
    request = started(world, stream(1, 600))
    dense = world.engine.counters.dense_steps["dirty"]
    world.engine.row_rewritten(request.row, 16, 64)
    request.news_at = world.launches
    step = world.decode(request)
    assert step.sparse is None and world.engine.counters.dense_steps["dirty"] == dense + 1
    assert world.decode(request).sparse is not None


class Walk:
    """Random users and a random scheduler over one world."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world = World(pages=self.random.choice([250, 330, 500]), overlap=self.random.random() < 0.8)
        self.waiting: list[Request] = []
        self.texts = [stream(name, 900) for name in range(3)]

    def fresh(self) -> list[int]:
        return stream(self.random.randrange(10**6, 10**7), self.random.choice([1, 5, 20, 70, 150, 300]))

    def prompt(self) -> list[int]:
        """A text known, continued, branched, or new."""
        base, kind = self.random.choice(self.texts[-8:]), self.random.random()
        if kind < 0.25:
            return base[:900]
        if kind < 0.5:
            return (base + self.fresh())[:900]
        if kind < 0.9:
            return (base[: self.random.randrange(1, len(base) + 1)] + self.fresh())[:900]
        return stream(self.random.randrange(10**6, 10**7), self.random.randrange(1, 700))

    def extend(self) -> None:
        world, chunks = self.world, [r for r in self.world.running if r.prefilling and self.random.random() < 0.9]
        room = world.index.geometry.pages - 1 - sum(-(-(len(r.tokens) + 100) // 16) for r in world.running)
        while len(world.running) + sum(not c.running for c in chunks) < 6 and self.random.random() < 0.6:
            if not self.waiting or self.random.random() < 0.4:
                tokens = self.prompt()
                self.waiting += [world.submit(tokens) for _ in range(self.random.choice([1, 1, 1, 2, 3]))]
            room -= -(-(len(self.waiting[0].tokens) + 100) // 16)
            if room < 0:
                break
            chunks.append(self.waiting.pop(0))
        if chunks:
            sizes = (64, 128, 256, 272)
            world.extend(*(c if self.random.random() < 0.5 else (c, self.random.choice(sizes)) for c in chunks))

    def step(self) -> None:
        world = self.world
        ready = [r for r in world.running if not r.prefilling and len(r.tokens) < 1000]
        operation = self.random.choices(
            ["extend", "decode", "finish", "retract", "abort", "evict", "flush"], [4, 5, 1.5, 0.5, 0.3, 1, 0.1]
        )[0]
        if operation == "extend":
            self.extend()
        elif operation == "decode" and ready:
            for _ in range(self.random.choice([1, 1, 2, 5, 20])):
                world.decode(*ready)
        elif operation == "finish" and (ended := [r for r in world.running if not r.prefilling]):
            request = self.random.choice(ended)
            self.texts.append(list(request.tokens))
            world.finish(request, in_flight=0 if request.length == request.prompt_len else 1)
        elif operation == "retract" and ready:
            request = self.random.choice(ready)
            world.retract(request)
            self.waiting.append(request)
        elif operation == "abort" and world.running:
            world.abort(self.random.choice(world.running))
        elif operation == "evict":
            world.evict(self.random.randrange(1, 60))
        elif operation == "flush" and not world.running:
            world.flush()


@pytest.mark.parametrize("seed", range(4))
def test_the_rules_hold_whatever_happens(seed: int) -> None:
    walk = Walk(seed)
    while walk.world.launches < 250:
        walk.step()
    counters = walk.world.engine.counters
    assert counters.splits and counters.tokens_reused and counters.sparse_steps > 50, "the walk met too little"
    assert not counters.dense_steps["window"], "a window outgrew the list"
