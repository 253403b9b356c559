"""docs/design.md's rules 1 to 13 as assertions over a world (world.py), called after every launch.

They trust the device's page states, the pool and the world's rows; what the engine's records say is checked against those.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.rows import Row
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES
from sglang_clusterkv.memory.directory import FREE, IN_RING, PADDING, Directory
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.movement import rank_of
from sglang_clusterkv.memory.step import SparseStep
from tests.support.scenes import PAGE

if TYPE_CHECKING:
    from tests.support.world import Made, Request, World


def assert_handed_out_pages_are_unclustered(world: World, slots: torch.Tensor) -> None:
    """Rule 1, for slots handed out before a launch, after the head of its forward."""
    if world.may_fault and world.engine.counters.faults["invalidate"]:
        return  # the queue is kept, and nobody looks at page states until it was applied
    pages = slots // PAGE
    clustered = pages[world.index.page_state[pages, 0] >= 0]
    assert not len(clustered), f"rule 1: pages {clustered.unique().tolist()} were handed out and are clustered"


def assert_rules(world: World) -> None:
    """Rules 2 to 5 as far as they speak of rows, records and tables; call after the head of a forward."""
    assert world.engine.counters.build_conflicts == 0, "a plan met another segment's pages"
    assert not world.index.violations.any(), "pages were marked that are another segment's"
    for made in world.made:
        assert_segment_may_be_made(world, made)
    for request in world.walked if not world.may_fault else []:
        assert_what_was_found_is_clustered(world, request)
    for request in world.running if world.config.reproducible and not world.may_fault else []:
        assert_borders_follow_from_lengths(world, request)
    for request in world.running if world.config.merge_segments and not world.may_fault else []:
        assert_aligned_segments_are_whole(world, request)
    assert_records(world)


def assert_records(world: World) -> None:
    """Rules 3 to 5 for every record that is not dirty; call whenever the device has caught up."""
    for request in world.running:
        record = record_of(world, request) if not world.is_dirty(request) else None
        if record is not None:
            assert_record_is_true(world, request, record)


def assert_segment_may_be_made(world: World, made: Made) -> None:
    """Rule 2, for a segment of the last plan."""
    maker, begin, end = made.maker, made.begin, made.end
    said = f"rule 2: {maker.rid} made [{begin}, {end}) with {maker}"
    assert SEGMENT_VECTOR_PAGES * PAGE <= end - begin <= world.config.segment_tokens, said
    assert begin >= world.config.sink_tokens and end <= maker.length, said
    assert block_of(world, begin) == block_of(world, end - 1), f"{said}: across the border of an aligned segment"
    limit = (maker.prompt_len - world.config.window_tokens) // PAGE * PAGE
    aged = (maker.length - world.config.window_tokens) // PAGE * PAGE
    if not made.rebuilt or any(request.row == maker.row for request in world.walked):  # else for another's cut
        assert end <= (limit if maker.prefilling else max(limit, aged)), f"{said}: reaches into the window"
    if made.merged:
        assert not maker.prefilling, f"{said}: merged while its chunks come"
        for request in world.running:
            if request.row != maker.row and not world.is_dirty(request):
                ours = world.pages_of(maker.row, begin, end)
                # What its window held when it was walked it sees no segment of, and so few pages are none either.
                before_window = max(0, request.prompt_len - world.config.window_tokens)
                seen = world.pages(request, 0, min(request.length, before_window))
                shared = int(torch.isin(seen, ours).sum())
                assert shared < SEGMENT_VECTOR_PAGES, (
                    f"rule 2: {maker.rid} merged [{begin}, {end}), of which {request.rid} has pages"
                )
    if made.rebuilt or made.merged or world.config.reproducible:
        return
    found_end = maker.found_end // PAGE * PAGE
    assert end <= found_end or begin >= found_end, f"{said}: found and own"
    if maker.prefilling and begin >= found_end and block_of(world, begin) == block_of(world, end):
        page = int(world.scene.req_to_token[maker.row, end]) // PAGE
        assert end < maker.length and world.index.page_state[page, 0] >= 0, f"{said}: did not wait"


def block_of(world: World, position: int) -> int:
    """Which aligned segment a token position is in."""
    return (position - world.config.sink_tokens) // world.config.segment_tokens


def assert_what_was_found_is_clustered(world: World, request: Request) -> None:
    """Rule 2: what a row found is clustered once it was walked, but for what is too short or lies in the window."""
    record = record_of(world, request)
    if world.config.reproducible and request.length <= request.prompt_len:
        return  # it waits for the prompt's end
    limit = max(0, min(record.found_end, record.prompt_len - world.config.window_tokens))
    ids = world.index.page_state[world.pages(request, 0, limit), 0].tolist()[world.config.sink_tokens // PAGE :]
    blocks = [block_of(world, world.config.sink_tokens + PAGE * i) for i in range(len(ids))]
    for (segment_id, _), run in itertools.groupby(zip(ids, blocks, strict=True)):
        pages = len(list(run))
        seen = segment_id in {s.id for s in record.segments}
        # One that was made at the same time, of pages beyond those that both rows have, is seen in part.
        new = segment_id in {made.make.id for made in world.made}
        assert seen or new or pages < SEGMENT_VECTOR_PAGES, f"rule 2: {request.rid} found {ids}, {record}"


def assert_borders_follow_from_lengths(world: World, request: Request) -> None:
    """Rule 5 with `reproducible`: a row has the borders of an empty cache, unless another running one has had its pages."""
    if request.length <= request.prompt_len or world.is_dirty(request) or not request.alone:
        return
    allowed = [
        cold_borders(world.config, request.prompt_len, length) for length in (request.length, request.length - 1)
    ]
    seen = world.segments(request)
    assert seen in allowed, (
        f"rule 5: {request.rid} sees {seen}, alone it would see {allowed[0]}: {record_of(world, request)}"
    )


def assert_aligned_segments_are_whole(world: World, request: Request) -> None:
    """Rule 5: where nobody else had its pages, a prompt's aligned segments are whole, and the last one is where that makes its
    largest part a third longer."""
    if request.length <= request.prompt_len or world.is_dirty(request) or not request.alone:
        return
    limit = request.prompt_len // PAGE * PAGE - world.config.window_tokens
    seen = record_of(world, request).segments
    for begin in range(world.config.sink_tokens, limit, world.config.segment_tokens):
        end = min(begin + world.config.segment_tokens, limit)
        parts = [s for s in seen if begin <= s.begin < end]
        sides = [begin, *itertools.chain.from_iterable((s.begin, s.end) for s in parts), end]
        gaps = [e - b for b, e in zip(sides[::2], sides[1::2], strict=True) if b != e]
        if not parts or parts[-1].end > end or max(gaps, default=0) >= SEGMENT_VECTOR_PAGES * PAGE:
            continue  # merged with decoded tokens; or what was left of two segments that lost pages meets
        largest = max(s.tokens for s in parts)
        parted = any(s.id in world.engine.planner.branch_ends for s in parts[:-1])
        may_be_parts = end == limit and (parted or 3 * (end - begin) < 4 * largest)
        assert may_be_parts or not (gaps or parts[1:]), (
            f"rule 5: {request.rid} sees [{begin}, {end}) in parts: {record_of(world, request)}"
        )


def cold_borders(config: ClusterKVConfig, prompt_len: int, length: int) -> list[tuple[int, int]]:
    """Segments of a request that nobody shares anything with, once it has this length."""
    shortest, sinks, size = SEGMENT_VECTOR_PAGES * PAGE, config.sink_tokens, config.segment_tokens

    def cut(end: int) -> list[tuple[int, int]]:
        pieces = [(begin, min(begin + size, end)) for begin in range(sinks, max(sinks, end), size)]
        return [(begin, end) for begin, end in pieces if end - begin >= shortest]

    prompt = cut(prompt_len // PAGE * PAGE - config.window_tokens)
    until = prompt[-1][1] if prompt else sinks
    aged, borders = length // PAGE * PAGE - config.window_tokens, [until]
    while aged - until >= config.recluster_every:
        until += config.recluster_every
        borders.append(until)
    if config.merge_segments:
        return cut(until)
    aligned = [border for border in range(sinks, until, size) if border > borders[0]]
    decoded = itertools.pairwise(sorted({*borders, *aligned}))
    return prompt + [(begin, end) for begin, end in decoded if end - begin >= shortest]


def assert_record_is_true(world: World, request: Request, record: Row) -> None:
    """Rules 3 to 5, for what a row may decode by: ascending, whole in the row, and clustered from its own keys."""
    tables, row = world.engine.tables, request.row
    borders = [(s.begin, s.end) for s in record.segments]
    assert tables.known[row] and not tables.dirty[row], f"the tables do not know {record}"
    count = len(borders)
    published = list(zip(tables.begin[row, :count].tolist(), tables.end[row, :count].tolist(), strict=True))
    assert published == borders and (tables.begin[row, count:] > 2**30).all(), f"{published} published of {record}"
    assert tables.covered[row, : count + 1].tolist() == [sum(e - b for b, e in borders[:i]) for i in range(count + 1)]
    last = world.config.sink_tokens
    for segment in record.segments:
        assert segment.begin >= last and segment.end <= request.length, f"no partition: {record}"
        last = segment.end
        assert_whole(world, request, segment.begin, segment.end, segment.id)


def assert_whole(world: World, request: Request, begin: int, end: int, segment_id: int | None = None) -> None:
    """Rules 3, 4 and 5: tokens [begin, end) of a row are one whole segment, and its tables are those of its keys."""
    assert_seen(world, sighting(world, request, begin, end, segment_id))


class Sighting(NamedTuple):
    """What a request takes tokens [begin, end) of its row for, as of a launch."""

    rid: str
    begin: int
    end: int
    segment_id: int | None
    slots: torch.Tensor  # int64 [end - begin]
    path: list[int]
    launch: int


def sighting(world: World, request: Request, begin: int, end: int, segment_id: int | None = None) -> Sighting:
    """Note what a row holds, to compare it with the device when that has come as far."""
    slots = world.scene.req_to_token[request.row, begin:end].long()
    return Sighting(request.rid, begin, end, segment_id, slots, request.path[begin:end], world.launches)


def assert_seen(world: World, seen: Sighting) -> None:
    """The device has these tokens as one whole segment, with the tables of their keys."""
    at = seen.slots[::PAGE] // PAGE
    state, pages = world.index.page_state[at], len(at)
    expected_id = int(state[0, 0]) if seen.segment_id is None else seen.segment_id
    whole = torch.stack((torch.full((pages,), expected_id), torch.arange(pages), torch.full((pages,), pages)), 1)
    said = f"{seen.rid} sees [{seen.begin}, {seen.end}) as segment {expected_id}"
    assert expected_id >= 0 and torch.equal(state.long(), whole), f"rule 3: {said}, the device has {state.tolist()}"
    if (seen.launch, expected_id, seen.path[-1]) in world.checked:
        return
    if world.tier is not None and world.tier.host.host_dtype == "int8":
        return  # some keys were rounded before they were clustered, which ones depends on what left the device
    world.checked.add((seen.launch, expected_id, seen.path[-1]))
    keys, _ = world.contents.of(seen.path)
    for layer in range(len(world.scene.keys)):
        held = world.scene.rows_of(layer, 0, seen.slots)
        assert torch.equal(held, keys[layer]), f"the pool does not hold what {said}"
    stored = stored_tables(world.index, at, seen.slots)
    for name, expected in world.contents.tables(seen.path).items():
        assert torch.equal(stored[name], expected), f"rules 4, 5: {said}, its {name} are not those of its keys"


def stored_tables(index: ClusterIndex, pages: torch.Tensor, slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the index holds of a segment, by array."""
    rows = index.cluster_rows(pages).flatten()
    described = pages[: SEGMENT_VECTOR_PAGES + index.keeps_movement * rank_of(len(pages))]
    where = {"members": slots, "codes": slots, "code_scales": slots, "segment_vectors": described}
    # Bits: what holds a segment's movement may be no numbers.
    return {
        name: (array.view(torch.int16) if name == "segment_vectors" else array)[:, where.get(name, rows)].clone()
        for name, array in index.arrays.items()
        if name != "page_state"
    }


def record_of(world: World, request: Request) -> Row:
    """What the last walk of a request's row saw."""
    return world.engine.records.rows[request.row]


def assert_partition(world: World) -> None:
    """Every page is free, the tree's, or one request's own; a request's row names the tree's pages first, then its own."""
    free, tree = list(world.free_pages), [node.page for node in world.tree.values()]
    own = []
    for request in world.running:
        pages = world.pages(request, 0, -(-request.length // PAGE) * PAGE).tolist()
        found = [world.tree[key].page for key in request.page_keys(request.protected)]
        assert pages[: request.protected] == found, (
            f"{request.rid}'s row {pages} does not begin with the tree's {found}"
        )
        own += pages[request.protected :]
    everything = sorted(free + tree + own)
    assert everything == list(range(1, world.index.geometry.pages)), (
        f"{len(free)} free + {len(tree)} in the tree + {len(own)} own are not {world.index.geometry.pages - 1} pages"
    )


def assert_lists(world: World, requests: Sequence[Request], step: DecodeStep) -> None:
    """Rules 3 and 6: each request of a step attends each of its tokens once, as its row and the device's states say."""
    batch = list(range(len(requests)))
    sparse_at = ([] if step.sparse is None else batch) if step.sparse_at is None else step.sparse_at.tolist()
    dense_at = ([] if step.dense is None else batch) if step.dense_at is None else step.dense_at.tolist()
    assert sorted(sparse_at + dense_at) == batch, f"sparse {sparse_at}, dense {dense_at} of {len(batch)} requests"
    for i, place in enumerate(dense_at):
        request = requests[place]
        assert step.dense is not None and int(step.dense.seq_lens[i]) == request.length
        slots = world.scene.req_to_token[request.row, : request.length].long()
        assert torch.equal(step.dense.slots[i, : request.length], slots), f"{request.rid}'s dense list"
        if not world.is_dirty(request) and not world.may_fault and not step_may_be_dense(world):
            recallable = request.length - world.attended(request, request.length)
            base, config = request.length - recallable, world.config
            most = config.sink_tokens + 2 * config.recluster_every + config.window_tokens + PAGE + recallable // 4
            assert recallable <= config.budget_tokens or base > most, (
                f"{request.rid} decodes densely, {recallable} of {request.length} recallable: {record_of(world, request)}"
            )
    assert not sparse_at or world.launches >= world.dense_until, "rule 7: layers that failed are tried again at once"
    for i, place in enumerate(sparse_at):
        assert_sparse_list(world, requests[place], step, i)
    if step.sparse is not None:
        assert_sharing(step.sparse)
    for request in requests if not world.may_fault else []:
        dirty = world.is_dirty(request)
        request.dense_since_news += dirty
        assert request.dense_since_news < 2, f"{request.rid} decodes densely for a second time since its row was new"
        if not dirty and world.settled and not world.splits:  # a piece that a cut left is looked at in the next step
            assert_tail_is_short(world, request)


def assert_sharing(lists: SparseStep) -> None:
    """Rule 13: the segments that are listed as shared are those whose pages several requests recall from, with all of these."""
    seen: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for b in range(lists.batch):
        ordinals = lists.segment_of_page[b, : int(lists.page_count[b])]
        for segment in range(int(lists.segment_count[b])):
            pages = tuple(lists.pages[b, : len(ordinals)][ordinals == segment].tolist())
            seen.setdefault(pages, []).append((b, segment))
    shared = lists.shared
    assert shared is not None
    members = list(zip(shared.request.tolist(), shared.ordinal.tolist(), strict=True))
    listed = [members[begin:end] for begin, end in itertools.pairwise(shared.first.tolist())]
    expected = [requests for requests in seen.values() if len(requests) > 1]
    assert sorted(listed) == sorted(expected), f"rule 13: {listed} are listed as shared, {expected} are"
    assert sorted(map(tuple, np.argwhere(shared.of_request).tolist())) == sorted(members), "rule 13: who shares"


def step_may_be_dense(world: World) -> bool:
    """Whether a fault is the reason, in this step or before."""
    return world.launches < world.dense_until or world.faulted_at == world.launches


def assert_counts(world: World) -> None:
    """Rule 8: every request of a decode step is counted once, as what the step came to."""
    world.engine.count_step()
    counters, counted = world.engine.counters, world.counted
    dense = sum(counters.dense_steps.values())
    assert (counters.sparse_steps, dense) == (counted["sparse"], counted["dense"]), (
        f"rule 8: {counters.sparse_steps} sparse and {dense} dense steps are counted of {dict(counted)}"
    )
    assert counters.tokens_available == counted["available"] and counters.tokens_recalled <= counted["available"], (
        f"rule 8: {counters.tokens_recalled} of {counters.tokens_available} tokens are counted of {dict(counted)}"
    )


def assert_sparse_list(world: World, request: Request, step: DecodeStep, i: int) -> None:
    """The i-th sparse request: recallable pages are whole segments of its row, everything else is attended."""
    lists, length, config = step.sparse, request.length, world.config
    assert lists is not None
    row_slots = world.scene.req_to_token[request.row, :length].long()
    listed = lists.pages[i, : int(lists.page_count[i])]
    position = {page: PAGE * j for j, page in enumerate(world.pages(request).tolist())}
    assert set(listed.tolist()) <= set(position), f"rule 4: {request.rid} would recall pages that it does not own"
    at = [position[page] for page in listed.tolist()]
    assert at == sorted(set(at)), f"rule 6: {request.rid}'s pages {at}"
    assert not world.is_dirty(request), f"rule 3: {request.rid} is dirty and decodes sparsely"
    assert lists.segment_count[i] > 0
    ordinals = lists.segment_of_page[i, : len(listed)]
    for segment in range(int(lists.segment_count[i])):
        inside = (ordinals == segment).nonzero().flatten().tolist()
        assert inside and inside[0] == lists.segment_begin[i, segment]
        begin, end = at[inside[0]], at[inside[-1]] + PAGE
        assert [at[j] for j in inside] == list(range(begin, end, PAGE)), f"{request.rid}'s segment {segment}"
        world.stream.run(assert_seen, world, sighting(world, request, begin, end))
        assert config.sink_tokens <= begin and end <= length - config.window_tokens, f"rule 6: [{begin}, {end})"
    recallable = torch.zeros(length, dtype=torch.bool)
    for begin in at:
        recallable[begin : begin + PAGE] = True
    base = lists.base_slots[i, : int(lists.base_count[i])]
    assert torch.equal(base, row_slots[~recallable]), f"rule 6: {request.rid}'s always-attended list"
    assert config.sink_tokens <= length - int(recallable.sum()) and lists.recallable_tokens >= int(recallable.sum())


def assert_tail_is_short(world: World, request: Request) -> None:
    """Decoded tokens become segments: own tokens at the end wait for `recluster_every` and one step at most."""
    record = record_of(world, request)
    clustered = (world.index.page_state[world.pages(request), 0] >= 0).nonzero()
    begin = max(world.config.sink_tokens, record.found_end, PAGE * (int(clustered[-1]) + 1) if len(clustered) else 0)
    # Up to three pages are a gap beside the border of an aligned segment.
    most = world.config.recluster_every + world.config.window_tokens + SEGMENT_VECTOR_PAGES * PAGE
    assert request.length - begin <= most, f"{request.rid}: tokens wait since {begin}, {most} may: {record}"


def assert_directory(directory: Directory) -> None:
    """Rule 9: the tables are inverse, and every device page is padding, in the ring once, mapped or free."""
    mapped = (directory.device_page > 0).nonzero().flatten()
    said = f"rule 9: {directory.device_page.tolist()} and {directory.page_of.tolist()}"
    assert torch.equal(directory.page_of[directory.device_page[mapped]], mapped), f"{said} are not inverse"
    assert directory.page_of[0] == PADDING and directory.device_page[0] == 0 and not directory.stored[0], said
    states = directory.page_of[1:]
    places = (directory.head + torch.arange(directory.ring_level)) % directory.ring_pages
    ring = directory.ring[places].sort().values
    assert torch.equal(ring, (states == IN_RING).nonzero().flatten() + 1), f"{said}, the ring holds {ring.tolist()}"
    counts = [len(ring), int((states == FREE).sum()), len(mapped)]
    assert sum(counts) == directory.device_pages, (
        f"rule 9: ring, free and mapped {counts} are not {directory.device_pages} device pages"
    )


def assert_new_pages_are_on_the_device(world: World, pages: torch.Tensor) -> None:
    """Rules 10 and 11, for pages handed out before a launch, after the head of its forward."""
    assert world.tier is not None
    directory = world.tier.directory
    nowhere = pages[directory.device_page[pages] == 0]
    assert not len(nowhere), f"rule 10: pages {nowhere.tolist()} were handed out and have no device page"
    stale = pages[directory.stored[pages]]
    assert not len(stale), f"rule 11: pages {stale.tolist()} were handed out and count as stored"


def assert_tiers(world: World) -> None:
    """Rules 9 to 11, once the device has caught up with a launch and its writes."""
    assert world.tier is not None
    directory, host = world.tier.directory, world.tier.host
    assert_directory(directory)
    full = {node.page for node in world.tree.values()}
    for request in world.running:
        full |= set(world.pages(request).tolist())
        last = int(world.scene.req_to_token[request.row, request.length - 1]) // PAGE
        assert request.length % PAGE == 0 or directory.device_page[last] > 0, (
            f"rule 10: page {last}, the last one of {request.rid} with {request.length} tokens, left the device"
        )
    pages = torch.tensor(sorted(full), dtype=torch.int64)
    here, stored = directory.device_page[pages] > 0, directory.stored[pages]
    nowhere = pages[~here & ~stored]
    assert not len(nowhere), f"rule 10: pages {nowhere.tolist()} are allocated and in neither tier"
    slots = (pages.unsqueeze(1) * PAGE + torch.arange(PAGE)).flatten()
    told = torch.from_numpy(world.written)[slots]
    for layer in range(len(world.scene.keys)):
        keys, values = (all_rows[layer, told].unflatten(0, (-1, PAGE)) for all_rows in world.contents.rows())
        rows = host.encode(keys[stored], values[stored])
        wrong = pages[stored][(host.rows[layer][pages[stored]] != rows).flatten(1).any(1)]
        assert not len(wrong), f"rule 11: the host rows of pages {wrong.tolist()} are not what was written"
        for part, expected in enumerate((keys, values)):
            held = world.scene.rows_of(layer, part, slots).unflatten(0, (-1, PAGE))
            exact = here if host.host_dtype == "int8" else slice(None)
            assert torch.equal(held[exact], expected[exact]), "rule 11: a page is not what was written"


def assert_plans_do_not_depend_on_the_tier(world: World) -> None:
    """Rule 12: the same events, with everything on the device, give the same segments and the same lists."""
    other = world.replayed(None)
    plans = [[(made.make, made.merged, made.rebuilt) for made in w.history] for w in (world, other)]
    assert plans[0] == plans[1], f"rule 12: planned {plans[0]}, with everything on the device {plans[1]}"
    assert world.listed == other.listed, "rule 12: the lists of a step depend on the tier"
    assert world.free_pages == other.free_pages, "rule 12: what is allocated depends on the tier"
