"""Which segments are made, cut and shared, in the situations that agents and chats bring about. Every launch also passes
the rules' assertions (rules.py); here stand the borders themselves.

Segments have up to 256 tokens, windows 64, decoded runs 128; the sinks are the first 16 tokens.

Red when: a border depends on chunks; a match re-clusters more than the segment it cuts, or an equal one anything; a cut
takes clusters from a request that goes on beyond it; a window is long after a match; a rewritten row is not looked at
again; decoded tokens wait longer than `recluster_every`.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from tests.support.rules import assert_whole
from tests.support.scenes import PAGE
from tests.support.world import SMALL, Pieces, Request, World, question, served, stream

WINDOW = SMALL.window_tokens
DOCUMENT = stream(1, 1000)  # (16, 272), (272, 528), (528, 784), (784, 928)


def clustered(world: World, request: Request) -> int:
    """Tokens in segments."""
    return sum(end - begin for begin, end in world.segments(request))


# ---- one request


def test_a_prompt_is_cut_from_the_sinks_on_and_ends_before_the_window() -> None:
    world = World()
    assert world.segments(served(world, stream(1, 700))) == [(16, 272), (272, 528), (528, 624)]
    assert world.segments(served(world, stream(2, 655))) == [(16, 272), (272, 528)]  # 48 tokens are left: too short
    assert world.segments(served(world, stream(3, 130))) == []


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("chunks", [(256,), (64,) * 10, (272, 512), (16, 640), (832, 48)])
def test_chunk_borders_do_not_show(chunks: tuple[int, ...], overlap: bool) -> None:
    world = World(overlap=overlap)
    request = world.submit(stream(1, 900))
    for chunk in chunks:
        world.extend((request, chunk))
    world.extend(request)
    world.decode(request)
    assert world.segments(request) == [(16, 272), (272, 528), (528, 784)]
    assert world.engine.counters.splits == 0 and not world.is_dirty(request)


def test_whole_segments_are_made_while_the_prefill_goes_on() -> None:
    world = World()
    request = world.submit(stream(1, 900))
    world.extend((request, 272))
    world.extend((request, 512))
    assert world.segments(request) == [(16, 272)]
    world.extend(request)
    assert world.segments(request) == [(16, 272), (272, 528), (528, 784)]


def test_decoded_tokens_become_segments_as_they_age() -> None:
    world = World()
    request = served(world, stream(1, 300))
    made_at = {}
    while request.length < 700:
        world.decode(request)
        for segment in world.segments(request):
            made_at.setdefault(segment, request.length)
    # (272, 400) has left the window when 464 tokens are there: looked at by that step, made by the next. The three pages
    # before the border of an aligned segment are too few for one.
    assert made_at == {(16, 224): 302} | {(e - 128, e): e + WINDOW + 1 for e in (400, 528)}


def test_what_a_prompt_leaves_is_clustered_with_what_follows() -> None:
    world = World()
    request = served(world, stream(1, 655), decoded=200)  # its prompt leaves [528, 576)
    assert world.segments(request) == [(16, 272), (272, 528), (528, 656), (656, 784)]


# ---- one after another


def test_what_a_chat_left_open_is_a_segment_of_its_own() -> None:
    world = World()
    first = served(world, stream(1, 300), decoded=61)
    assert world.segments(first) == [(16, 224)]
    world.finish(first)
    second = served(world, first.tokens + question(1, 200))
    # [224, 352) was found and unclustered, three of its pages before a border; what follows is its own, up to its window.
    assert world.segments(second) == [(16, 224), (272, 352), (352, 496)]


def test_a_long_run_that_was_found_is_one_segment() -> None:
    world = World()
    first = served(world, stream(1, 300), decoded=160)
    world.finish(first)
    second = served(world, first.tokens + question(1, 200))
    assert world.segments(second) == [(16, 224), (272, 448), (448, 528), (528, 592)]


@pytest.mark.parametrize(("own", "running"), [(5, True), (200, False)])
@pytest.mark.parametrize("match_pages", range(32, 49))
def test_a_match_re_clusters_at_most_the_segment_that_it_cuts(match_pages: int, own: int, running: bool) -> None:
    world = World()
    first = served(world, DOCUMENT)
    if not running:
        world.finish(first)
    before = len(world.history)
    prefix = DOCUMENT[: match_pages * PAGE]
    second = served(world, prefix + question(1, own))
    rebuilt = sum(made.end - made.begin for made in world.history[before:] if made.rebuilt)
    assert world.engine.counters.splits <= 1 and rebuilt <= SMALL.segment_tokens
    assert world.engine.records.rows[second.row].reused_tokens >= match_pages * PAGE - 2 * SMALL.segment_tokens

    before, splits = len(world.history), world.engine.counters.splits
    third = served(world, prefix + question(2, own))
    assert world.engine.counters.splits == splits, "an equal match cut again"
    assert all(made.maker.rid == third.rid and not made.rebuilt for made in world.history[before:])
    assert all(made.begin >= match_pages * PAGE for made in world.history[before:]), "found pages were clustered again"
    common = {s for s in world.ids(second) if s in world.ids(third)}
    assert len(common) == len([s for s in world.segments(third) if s[1] <= match_pages * PAGE])


@pytest.mark.parametrize("message", [1, 20, 200])
def test_the_next_turn_of_a_chat_re_clusters_nothing(message: int) -> None:
    world = World()
    tokens = stream(1, 500)
    seen: list[int] = []
    for turn, decoded in enumerate((40, 3, 130, 20, 70)):
        request = served(world, tokens, decoded=decoded)
        assert world.ids(request)[: len(seen)] == seen, "a turn lost what the one before had clustered"
        seen = world.ids(request)
        world.finish(request)
        tokens = request.tokens + question(turn, message)
    assert world.engine.counters.splits == 0 and not any(made.rebuilt for made in world.history)


@pytest.mark.parametrize(("cached", "own"), [("finished", 1), ("running", 40), ("cut before", 1)])
@pytest.mark.parametrize("match_pages", range(46, 55))
def test_the_window_is_short_after_a_match(match_pages: int, cached: str, own: int) -> None:
    world = World()
    if cached == "cut before":
        world.finish(served(world, DOCUMENT[: match_pages * PAGE] + question(99, 63)))
    first = served(world, DOCUMENT)
    if cached != "running":
        world.finish(first)
    request = served(world, DOCUMENT[: match_pages * PAGE] + question(1, own))
    # Own tokens, the window before the match's end, and up to three pages in which no segment could begin.
    assert world.attended(request, request.length) <= SMALL.sink_tokens + own + 1 + WINDOW + 3 * PAGE


@pytest.mark.parametrize(
    ("match_end", "own", "expected"),
    [
        (752, 100, [(528, 752)]),  # inside (528, 784): what is found of it
        (752, 20, [(528, 704)]),  # up to the window of such a prompt
        (784, 1, [(528, 720)]),  # it reaches into the window
        (784, 40, [(528, 752)]),
        (784, 70, [(528, 784)]),  # it ends where the window begins
        (864, 1, [(528, 784)]),  # of (784, 928) a page lies before the window
        (928, 1, [(528, 784), (784, 864)]),
    ],
)
def test_a_long_segment_ends_where_the_prompts_window_begins(match_end: int, own: int, expected: Pieces) -> None:
    world = World()
    world.finish(served(world, DOCUMENT))
    request = served(world, DOCUMENT[:match_end] + question(1, own))
    assert [s for s in world.segments(request)[2:] if s[0] < match_end] == expected


def test_questions_cut_a_documents_last_segment_a_few_times_in_all() -> None:
    world = World()
    world.finish(served(world, DOCUMENT[:784] + question(0, 200)))
    for number, own in enumerate([70, 50, 60, 40, 50, 30, 1, 20, 40, 1, 60]):
        world.finish(served(world, DOCUMENT[:784] + question(number + 1, own)))
    assert world.engine.counters.splits <= SMALL.window_tokens // PAGE, "each at a page before the last one's"


def test_what_lies_beyond_a_cut_is_clustered_when_it_is_found_again() -> None:
    world = World()
    world.finish(served(world, DOCUMENT))
    world.finish(served(world, DOCUMENT[:640] + question(1, 200)))  # cuts [528, 784)
    again = served(world, DOCUMENT + question(2, 200))
    assert (640, 784) in world.segments(again) and (784, 928) in world.segments(again)


# ---- at the same time


@pytest.mark.parametrize("own", [1, 30, 200])
@pytest.mark.parametrize("match_pages", [*range(34, 50, 2), 49])
def test_a_branch_leaves_clustered_what_a_running_request_goes_on_to(match_pages: int, own: int) -> None:
    world = World()
    first = served(world, DOCUMENT)
    before, ends = clustered(world, first), world.segments(first)[-1]
    second = world.submit(DOCUMENT[: match_pages * PAGE] + question(1, own))
    world.extend(second)
    for _ in range(3):
        step = world.decode(first, second)
        assert step.dense is None, "both decode sparsely all the while"
    # It sees head and tail of the cut segment; only pieces of less than four pages are attended from now on.
    assert clustered(world, first) >= before - 2 * 3 * PAGE and world.segments(first)[-1] == ends
    assert set(world.ids(second)) - {m.make.id for m in world.history if m.begin >= match_pages * PAGE} <= set(
        world.ids(first)
    )


def test_a_branch_from_the_middle_gives_both_sides_the_pieces() -> None:
    world = World()
    first = served(world, DOCUMENT)
    second = served(world, DOCUMENT[:640] + question(1, 200))
    world.decode(first, second)
    assert world.segments(first) == [(16, 272), (272, 528), (528, 640), (640, 784), (784, 928)]
    assert world.segments(second) == [(16, 272), (272, 528), (528, 640), (640, 768)]
    assert world.ids(first)[:3] == world.ids(second)[:3]
    world.finish(second)
    world.decode(first, steps=5)
    assert len(world.segments(first)) == 5


@pytest.mark.parametrize("together", [True, False])
def test_a_piece_that_one_request_cuts_is_reused_by_the_others(together: bool) -> None:
    world = World()
    world.finish(served(world, DOCUMENT))
    batch = [world.submit(DOCUMENT[:640] + question(number, 200)) for number in range(3)]
    for some in [batch] if together else [[request] for request in batch]:
        world.extend(*some)
        world.decode(*some)
    reused = [world.engine.records.rows[request.row].reused_tokens for request in batch]
    assert reused == [512, 624, 624], "however they are admitted"


def test_a_short_question_does_not_dissolve_what_others_see() -> None:
    world = World()
    first = served(world, DOCUMENT[:500])
    second = served(world, DOCUMENT[:384] + question(1, 1))
    # It sees (272, 384), of which 48 tokens lie before its window: too short for a segment of its own.
    world.decode(first, second)
    assert world.segments(first) == [(16, 272), (272, 432)] and world.segments(second) == [(16, 272)]


def test_what_waits_for_its_owner_is_closed_at_a_match() -> None:
    world = World()
    owner = world.submit(stream(1, 900))
    world.extend((owner, 400))  # (16, 272); [272, 400) waits for 256 tokens
    other = world.submit(stream(1, 400) + question(1, 300))
    world.extend((owner, 64), other)
    world.extend(owner)
    world.decode(owner, other)
    assert world.segments(owner)[:2] == [(16, 272), (272, 400)] == world.segments(other)[:2]
    assert world.ids(owner)[:2] == world.ids(other)[:2], "clustered once"
    assert world.segments(owner)[2:] == [(400, 528), (528, 784)]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_row_that_takes_the_trees_last_page_is_sparse_all_the_while(overlap: bool) -> None:
    """A match leaves a prompt's last token out, so whole pages that were served before are written once more."""
    world = World(overlap=overlap)
    first = served(world, DOCUMENT)
    page = world.pages(first, 752, 768)
    world.finish(first)
    request = world.submit(DOCUMENT[:768])
    assert world.found(request) == 752
    world.extend(request)
    for _ in range(3):
        assert world.decode(request).dense is None
    assert torch.equal(world.pages(request, 752, 768), page), "it took the tree's"
    assert world.segments(request) == [(16, 272), (272, 528), (528, 704)]


@pytest.mark.parametrize("overlap", [True, False])
def test_equal_prompts_in_one_batch_share_one_ones_clusters(overlap: bool) -> None:
    world = World(overlap=overlap)
    batch = [world.submit(stream(1, 600)) for _ in range(3)]
    world.extend(*batch)
    step = world.decode(*batch)  # with overlap, their rows are rewritten after this launch
    assert [world.is_dirty(request) for request in batch] == [False, True, True]
    assert overlap == (step.dense is None), "rows that were rewritten decode densely"
    world.decode(*batch)
    step = world.decode(*batch)
    assert step.dense is None and len({tuple(world.ids(request)) for request in batch}) == 1
    assert world.segments(batch[2]) == [(16, 272), (272, 528)]
    assert world.engine.counters.splits == 0 and not any(made.rebuilt for made in world.history)
    assert world.engine.counters.dense_steps["dirty"] == 2


def test_a_row_that_lost_a_segments_head_after_the_decodes_launch_is_walked_again() -> None:
    """SGLANG.md 4.5: A is complete and B has a chunk in the first forward; B's pages become the tree's, A's row takes them."""
    world = World()
    a, b = world.submit(stream(1, 750)), world.submit(stream(1, 750))
    world.extend(a, (b, 336))
    assert world.segments(a) == []
    world.extend(b)  # B's first chunk was inserted before, A is inserted after this launch
    assert world.is_dirty(a) and world.pages(a)[:21].tolist() == world.pages(b)[:21].tolist()
    step = world.decode(a, b)
    assert step.dense_at.tolist() == [0]
    step = world.decode(a, b)  # B was rewritten to A's pages behind its first chunk
    step = world.decode(a, b)
    assert step.dense is None and world.ids(a) == world.ids(b) and not world.is_dirty(b)
    assert world.segments(a)[-1] == (528, 672) and clustered(world, a) == 672 - 16


# ---- requests that stop


def test_a_retracted_request_finds_its_prompts_clusters_again() -> None:
    world = World()
    request = served(world, stream(1, 700), decoded=200)
    assert world.segments(request)[2:] == [(528, 624), (624, 752)]
    ids = world.ids(request)
    world.retract(request)  # the tree keeps the prompt: 43 pages, five of them of (624, 752)
    other = served(world, stream(2, 300))  # gets its pages
    world.extend(request)
    world.decode(request, other)
    assert request.prompt_len == 900 and world.ids(request)[:3] == ids[:3]
    assert world.segments(request)[2:] == [(528, 624), (624, 688), (688, 784)]
    world.decode(request, other, steps=20)


def test_a_request_retracted_before_its_checkpoint_leaves_nothing() -> None:
    world = World()
    request = world.submit(stream(1, 700))
    world.extend(request)
    world.retract(request)
    assert not world.tree
    world.extend(other := world.submit(stream(2, 500)))
    assert not world.made
    world.extend(request)
    world.decode(request, other)
    assert world.segments(request) == [(16, 272), (272, 528), (528, 624)]


@pytest.mark.parametrize("inserted", [True, False])
def test_an_abort_between_chunks_leaves_what_the_tree_has(inserted: bool) -> None:
    world = World()
    request = world.submit(stream(1, 1000))
    world.extend((request, 272))
    world.extend((request, 320))
    if inserted:
        served(world, stream(2, 300))  # before its launch the second chunk is inserted
    world.abort(request)
    again = world.submit(stream(1, 1000))
    assert world.found(again) == (592 if inserted else 272)
    world.extend(again)
    world.decode(again)
    cut = [(16, 272), (272, 528), (528, 592), (592, 784), (784, 928)]
    assert world.segments(again) == (cut if inserted else [(16, 272), (272, 528), (528, 784), (784, 928)])


# ---- pages that come back


def test_evicted_pages_come_back_unclustered_and_the_rest_is_cut() -> None:
    world = World(pages=100)
    world.finish(served(world, DOCUMENT))
    world.evict(20)  # the last 320 tokens: (784, 928) and three quarters of (528, 784)
    served(world, stream(2, 500))  # gets these pages
    again = world.submit(DOCUMENT)
    assert world.found(again) == 672
    world.extend(again)
    world.decode(again)
    assert world.segments(again) == [(16, 272), (272, 528), (528, 672), (672, 784), (784, 928)]


def test_a_flush_forgets_everything() -> None:
    world = World()
    world.finish(served(world, stream(1, 700)))
    world.flush()
    request = served(world, stream(2, 900))
    assert world.segments(request) == [(16, 272), (272, 528), (528, 784)]
    assert world.engine.counters.tokens_reused == 0
    assert int((world.index.page_state[:, 0] >= 0).sum()) * PAGE == clustered(world, request)


def test_a_window_of_less_than_a_segment_is_served_too() -> None:
    world = World(msgspec.structs.replace(SMALL, window_tokens=32))
    first = served(world, DOCUMENT)
    second = served(world, DOCUMENT[:640] + question(1, 10))
    world.decode(first, second)
    expected: Pieces = [(16, 272), (272, 528), (528, 608)]
    assert world.segments(second) == expected and world.segments(first)[:4] == [*expected, (608, 784)]
    assert_whole(world, first, 608, 784)
