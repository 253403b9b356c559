"""DESIGN.md's rules of cluster storage hold after every launch, whatever requests and the scheduler do.

`world.py` is the scheduler, `rules.py` the rules. First each rule's assertion is shown to fire when the engine is broken.

Red when: pages keep clusters that they had before they were handed out (1); a segment mixes pages found and written, or
reaches into its prompt's window (2); a row attends a segment that it does not see whole, or a rewritten one sparsely (3);
clusters are of other tokens than the row's (4) or depend on the batch (5); a token is attended twice or never (6).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import msgspec
import pytest
import torch
from scenes import PAGE
from world import SMALL, Request, World, stream

from sglang_clusterkv.clusters.index import ClusterIndex
from sglang_clusterkv.clusters.plan import Planner
from sglang_clusterkv.clusters.rows import RowTables

TEXT = stream(1, 700)
WINDOW = SMALL.window_tokens

# ---- the assertions fire


def pages_come_back(world: World) -> None:
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    world.retract(first)
    world.evict(50)
    world.extend(world.submit(stream(2, 700)))


def one_decodes(world: World) -> None:
    request = world.submit(TEXT)
    world.extend(request)
    world.decode(request, steps=3)


def twins_decode(world: World) -> None:
    batch = [world.submit(TEXT) for _ in range(2)]
    world.extend(*batch)
    world.decode(*batch, steps=4)


def one_branches(world: World) -> None:
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    second = world.submit(TEXT[:400] + stream(3, 300))
    world.extend(second)
    world.decode(first, second)


def one_finds_its_window_clustered(world: World) -> None:
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    world.finish(first)
    second = world.submit(TEXT[:630] + [7])
    world.extend(second)
    world.decode(second)
    assert world.segments(second)[-1] == (528, 624)


def forget_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClusterIndex, "invalidate", lambda self, pages: None)


def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "_prompt_limit", lambda self, record: record.prompt_len // PAGE)


def no_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "rewritten", lambda self, row, begin, end: False)


def own_viewers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "_see", lambda self, record, segments: setattr(record, "segments", segments))


def wrong_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = ClusterIndex.mark

    def mark_and_spoil(self: ClusterIndex, segment_id: int, pages: torch.Tensor) -> None:
        mark(self, segment_id, pages)
        self.arrays["members"][:, int(pages[-1]) * PAGE + 3] += 1

    monkeypatch.setattr(ClusterIndex, "mark", mark_and_spoil)


def no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    recallable = RowTables.recallable
    monkeypatch.setattr(RowTables, "recallable", lambda self, rows, lens: recallable(self, rows, lens + WINDOW))


@pytest.mark.parametrize(
    ("breaks", "scenario", "message"),
    [
        (forget_nothing, pages_come_back, "rule 1: pages"),
        (no_limit, one_decodes, "rule 2: r1 made"),
        (no_rewrites, twins_decode, "rule 3: r2 sees"),
        (own_viewers_only, one_branches, "rule 3: r1 sees"),
        (wrong_tables, one_decodes, "rules 4, 5: r1 sees"),
        (no_window, one_finds_its_window_clustered, "rule 6: "),
    ],
)
def test_a_broken_engine_is_noticed(
    breaks: Callable, scenario: Callable, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario(World())
    breaks(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        scenario(World())


# ---- rule 1 and 4: pages that are handed out again


def test_handing_out_changes_nothing_before_the_next_forward() -> None:
    """A decode step clusters aged tokens; while it runs its request is retracted and its pages are handed out."""
    world = World()
    first = world.submit(TEXT[:300])
    world.extend(first)
    world.decode(first, steps=417 - 300)
    (made,) = world.made
    assert (made.begin, made.end) == (224, 352), "this step clusters aged tokens"
    pages = world.pages(first, 304, 352)
    during = world.index.page_state.clone()
    world.retract(first)

    second = world.submit(stream(2, 300))
    begin_extend, before = world.engine.begin_extend, []
    world.engine.begin_extend = lambda extends: (before.append(world.index.page_state.clone()), begin_extend(extends))
    world.extend(second)
    assert torch.isin(pages, world.pages(second)).all(), "the scene: the new request has these pages"
    assert torch.equal(before[0], during), "only the forward stream writes page states"
    assert (world.index.page_state[world.pages(second), 0] < 0).all()
    world.decode(second)
    assert world.segments(second) == [(16, 224)]


def test_a_plan_for_a_row_that_ended_since_its_snapshot_is_dropped() -> None:
    world = World()
    first = world.submit(TEXT[:300])
    world.extend(first)
    world.decode(first, steps=416 - 300)  # the last of them looked at the row: its tokens are old enough
    world.retract(first)
    second = world.submit(stream(2, 300))
    world.extend(second)
    assert not world.made
    third = world.submit(stream(3, 300))
    world.extend(third)
    world.decode(second, third)
    assert world.segments(second) == world.segments(third) == [(16, 224)]


def test_a_row_of_another_request_is_not_taken_for_the_one_before() -> None:
    world = World()
    first, second = world.submit(TEXT), world.submit(stream(2, 400))
    world.extend(first)
    row = first.row
    world.abort(first)
    world.extend(second)
    assert second.row == row and not world.made
    world.decode(second)
    assert world.segments(second) == [(16, 272), (272, 336)]


# ---- rule 3: rows that change


def test_a_row_that_is_rewritten_between_snapshot_and_plan_stays_dense() -> None:
    world = World()
    first, second = world.submit(TEXT), world.submit(TEXT + stream(2, 100))
    world.extend(first, (second, 512))
    world.extend(second)
    assert world.is_dirty(first), "its row took the other's pages after this launch"
    step = world.decode(first, second)
    assert step.dense_at.tolist() == [0]
    # The second's checkpoint came after that launch and took the first's pages where its own had been.
    assert world.decode(first, second).dense_at.tolist() == [1]
    assert world.decode(first, second).dense is None and world.engine.counters.dense_steps == Counter(dirty=2)


def test_a_paused_request_keeps_what_it_saw() -> None:
    world = World()
    paused, other = world.submit(stream(1, 900)), world.submit(stream(2, 300))
    world.extend((paused, 400), other)
    world.decode(other)
    assert world.segments(paused) == [(16, 272)]
    branch = world.submit(stream(1, 200) + stream(3, 200))
    world.extend(branch)
    world.decode(other, branch)
    assert world.segments(paused) == [(16, 128), (128, 192), (192, 272)]
    assert world.ids(paused)[:2] == world.ids(branch)[:2]
    world.extend(paused)
    world.decode(other, branch, paused)
    assert world.segments(paused)[3:] == [(272, 528), (528, 784)]


# ---- rule 5: the same tokens, the same clusters


def test_clusters_do_not_depend_on_the_batch() -> None:
    sizes = {"layers": 2, "kv_heads": 2}
    alone = World(**sizes)
    request = alone.submit(TEXT)
    alone.extend(request)
    alone.decode(request)

    busy = World(pages=200, **sizes)
    busy.extend(busy.submit(stream(5, 333)))
    batch = [busy.submit(stream(6, 450)), busy.submit(TEXT), busy.submit(stream(7, 300))]
    busy.extend(batch[0], (batch[1], 64), batch[2])
    busy.extend((batch[1], 512))
    busy.extend(batch[1])
    busy.decode(*batch)
    busy.decode(*batch)
    assert alone.segments(request) == busy.segments(batch[1])
    for begin, end in alone.segments(request):
        others = busy.tables(batch[1], begin, end)
        for name, table in alone.tables(request, begin, end).items():
            assert torch.equal(table, others[name]), f"{name} of [{begin}, {end})"


def test_a_segment_that_is_rebuilt_is_what_it_was() -> None:
    world = World()
    first = world.submit(TEXT)
    world.extend(first)
    world.decode(first)
    before = {border: world.tables(first, *border) for border in world.segments(first)}
    world.finish(first)
    world.evict(100)
    second = world.submit(TEXT)
    world.extend(second)
    world.decode(second)
    assert world.segments(second) == list(before)
    for border, tables in before.items():
        assert all(torch.equal(table, tables[name]) for name, table in world.tables(second, *border).items())


# ---- all rules, whatever happens


class Walk:
    """Random users, and a scheduler that does at random what it may do.

    Args:
        seed: of everything random.
        world: to walk in.
    """

    def __init__(self, seed: int, world: World) -> None:
        self.random, self.world = random.Random(seed), world
        self.texts = [stream(k, 900) for k in range(3)]
        self.waiting: list[Request] = []
        self.done: Counter[str] = Counter()

    def step(self) -> None:
        """One event."""
        names = {"extend": 40, "decode": 50, "finish": 15, "retract": 5, "abort": 8, "evict": 10, "flush": 1}
        name = self.random.choices(list(names), list(names.values()))[0]
        self.done[name] += getattr(self, "_" + name)()

    def _fresh(self, tokens: int) -> list[int]:
        return stream(self.random.randrange(10**6, 10**7), tokens)

    def _prompt(self) -> list[int]:
        """A text seen before, with a new end; or one cut somewhere, with a new end; or a new one."""
        text, end = self.random.choice(self.texts[-8:]), self._fresh(self.random.choice([1, 5, 20, 70, 150, 300]))
        kind = self.random.choices(["again", "longer", "branch", "new"], [25, 25, 40, 10])[0]
        begin = {"again": len(text), "longer": len(text), "branch": self.random.randrange(len(text)), "new": 0}[kind]
        return (text[:begin] + ([] if kind == "again" else end + self._fresh(400 if kind == "new" else 0)))[:900]

    def _decoding(self) -> list[Request]:
        return [request for request in self.world.running if not request.prefilling]

    def _paused(self) -> list[Request]:
        return [request for request in self.world.running if request.prefilling]

    def _extend(self) -> bool:
        chunks = [request for request in self._paused() if self.random.random() < 0.9]
        # Running requests hold their pages; all must fit with what they will decode.
        pages = sum(_most_pages(request) for request in self.world.running)
        room = self.world.index.geometry.pages - 1 - pages
        while len(self.world.running) + len(chunks) < 6 and self.random.random() < 0.6:
            if not self.waiting or self.random.random() < 0.4:
                request = self.world.submit(self._prompt())
                copies = self.random.choice([0, 0, 0, 1, 2])
                self.waiting[:0] = [request, *(self.world.submit(request.tokens) for _ in range(copies))]
            room -= _most_pages(self.waiting[0])
            if room < 0:
                break
            chunks.append(self.waiting.pop(0))
        sizes = [None if self.random.random() < 0.5 else self.random.choice([64, 128, 256, 272]) for _ in chunks]
        if chunks:
            self.world.extend(*((r, r.left if size is None else size) for r, size in zip(chunks, sizes, strict=True)))
        return bool(chunks)

    def _decode(self) -> bool:
        batch = [request for request in self._decoding() if len(request.tokens) < 1000]
        for _ in range(self.random.choice([1, 1, 2, 5, 20]) if batch else 0):
            self.world.decode(*batch)
            batch = [request for request in batch if len(request.tokens) < 1000]
            if not batch:
                break
        return bool(batch)

    def _finish(self) -> bool:
        batch = self._decoding()
        if batch:
            request = self.random.choice(batch)
            self.texts.append(list(request.tokens))
            self.world.finish(request, in_flight=0 if request.length == request.prompt_len else 1)
        return bool(batch)

    def _retract(self) -> bool:
        batch = self._decoding()
        if batch:
            request = self.random.choice(batch)
            self.world.retract(request)
            self.waiting.append(request)
        return bool(batch)

    def _abort(self) -> bool:
        batch = self._paused() or self.world.running
        if batch:
            self.world.abort(self.random.choice(batch))
        return bool(batch)

    def _evict(self) -> bool:
        self.world.evict(self.random.randrange(1, 60))
        return True

    def _flush(self) -> bool:
        if not self.world.running:
            self.world.flush()
        return not self.world.running


def _most_pages(request: Request) -> int:
    return -(-(len(request.tokens) + 110) // PAGE)


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {}),
        (2, {"window_tokens": 32}),
        (3, {"refine": False, "segment_tokens": 512}),
        (4, {"sink_tokens": 48, "recluster_every": 160}),
        (5, {"segment_tokens": 128}),
    ],
)
def test_the_rules_hold_whatever_happens(seed: int, changes: dict[str, int]) -> None:
    world = World(msgspec.structs.replace(SMALL, **changes), pages=(250, 330, 500)[seed % 3], overlap=seed != 1)
    walk = Walk(seed, world)
    while world.launches < 200:
        walk.step()
    counters = world.engine.counters
    assert min(walk.done[name] for name in ("extend", "decode", "finish", "retract", "abort", "evict")) > 0, walk.done
    assert counters.sparse_steps > 200 and counters.splits > 0 and counters.tokens_reused > 0, counters
