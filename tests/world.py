"""A model of SGLang around the engine: allocator, radix tree, rows and requests, in the order of events of its scheduler.

One launch, as under overlap (SGLANG.md 4.2, 4.5):

    middle chunks of the last launch are checkpointed | admissions match the tree, slots are handed out
    head: the engine's begin_extend or begin_decode   | the forward writes its KV
    last chunks of the *previous* launch are checkpointed: their rows may be rewritten (without overlap: of this launch)

What a token's KV is depends on the tokens up to it alone, as in a model. Pages that nobody owns hold NaN, so clusters built
from a page too early or too late never equal the right ones. After every launch `assert_rules` checks DESIGN.md's rules.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from scenes import PAGE, Scene

from sglang_clusterkv.clusters import build
from sglang_clusterkv.clusters.engine import DecodeStep, Extend
from sglang_clusterkv.clusters.plan import Make, Plan, Snapshot
from sglang_clusterkv.clusters.rows import Row
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import SEGMENT_VECTOR_PAGES

SMALL = ClusterKVConfig(
    budget_tokens=32,
    candidate_tokens=64,
    segment_tokens=256,
    window_tokens=64,
    recluster_every=128,
    estimate_clusters=8,
)
CONTENTS = 1 << 14  # different tokens' keys and values
Pieces = list[tuple[int, int]]  # token positions [begin, end)


def stream(name: int, length: int) -> list[int]:
    """The first tokens of an endless text."""
    return [name * 100_003 + i for i in range(length)]


@dataclass(eq=False)
class Request:
    """One request: its tokens, and its row while it runs."""

    rid: str
    tokens: list[int]  # those to prefill, then what was decoded
    prompt_len: int = 0
    row: int = 0  # 0: waits
    length: int = 0  # tokens whose KV is written or under way
    protected: int = 0  # pages that are the tree's, locked
    path: list[int] = field(default_factory=list)  # per token, what tells all tokens up to it
    news_at: int = 0  # number of the launch before which its row was given or rewritten
    dense_since_news: int = 0  # decode steps that it was dirty in since

    @property
    def running(self) -> bool:
        """Holds a row."""
        return self.row > 0

    @property
    def prefilling(self) -> bool:
        """Has chunks to come."""
        return self.length < self.prompt_len

    def extend_path(self) -> None:
        """Follow `tokens`."""
        for token in self.tokens[len(self.path) :]:
            self.path.append(hash((self.path[-1] if self.path else 0, token)))

    def page_keys(self, pages: int) -> list[int]:
        """What the tree knows the first pages by."""
        return [self.path[(page + 1) * PAGE - 1] for page in range(pages)]


@dataclass(eq=False)
class _Node:
    """One page of the radix tree."""

    page: int
    parent: int | None
    children: int = 0
    locks: int = 0


class Made(NamedTuple):
    """A segment of a plan, with its maker as it was when planned."""

    make: Make
    maker: Row
    rebuilt: bool  # from pages that were clustered

    @property
    def begin(self) -> int:
        return self.make.first_page * PAGE

    @property
    def end(self) -> int:
        return self.begin + self.make.pages * PAGE


class World:
    """Requests of one engine.

    Args:
        config: of the engine.
        pages: of the pool.
        overlap: whether last chunks are checkpointed after the next launch.
        sizes: layers, kv_heads, head_dim, rows, context of the scene.
    """

    def __init__(
        self, config: ClusterKVConfig = SMALL, *, pages: int = 400, overlap: bool = True, **sizes: int
    ) -> None:
        sizes = {"layers": 1, "kv_heads": 1, "head_dim": 16, "rows": 12, "context": 2048} | sizes
        self.config, self.overlap = config, overlap
        self.scene = Scene(config, pages=pages, **sizes)
        self.engine, self.index = self.scene.engine, self.scene.index
        self.contents = Contents(config, sizes["layers"], sizes["kv_heads"], sizes["head_dim"])
        self.free_pages = list(range(pages - 1, 0, -1))  # the page freed last is handed out next
        self.free_rows = list(range(sizes["rows"] - 1, 0, -1))
        self.tree: dict[int, _Node] = {}
        self.running: list[Request] = []
        self.launches = 0
        self.handed_out: list[torch.Tensor] = []  # slots, since the last launch
        self.plan, self.made = Plan(), []  # of the last launch
        self.walked: list[Request] = []  # rows that were dirty before the last launch and are not any more
        self.checked: set[tuple[int, int]] = set()  # since the last launch: segment id, what tells its tokens
        self._middle: list[Request] = []  # to checkpoint before the next launch
        self._last: list[Request] = []  # to checkpoint after the next launch
        self._planned = self.engine.planner.plan
        self.engine.planner.plan = self._watch_plan  # type: ignore[method-assign]
        self._rids = 0
        for page in range(1, pages):
            self._poison(page)

    # -- what users and the scheduler do --------------------------------------------------------------------------

    def submit(self, tokens: Sequence[int]) -> Request:
        """A request arrives; it runs from its first extend on."""
        self._rids += 1
        return Request(f"r{self._rids}", list(tokens))

    def extend(self, *chunks: Request | tuple[Request, int]) -> None:
        """Launch a prefill batch: each request with what is left of its tokens, or with so many new ones."""
        self._stash()
        extends = []
        for chunk in chunks:
            request, new = chunk if isinstance(chunk, tuple) else (chunk, None)
            if not request.running:
                self._admit(request)
            begin = request.length
            request.length = request.prompt_len if new is None else min(begin + new, request.prompt_len)
            assert request.length > begin and (request.length % PAGE == 0 or not request.prefilling)
            self._allocate(request, begin, request.length)
            last = not request.prefilling
            extends.append(Extend(request.row, request.rid, begin, request.length, request.prompt_len, last))
        self._begin(lambda: self.engine.begin_extend(extends))
        assert_rules(self)
        requests = [chunk[0] if isinstance(chunk, tuple) else chunk for chunk in chunks]
        for request, extend in zip(requests, extends, strict=True):
            self._write_kv(request, extend.prefix_tokens)
        self._middle = [request for request in requests if request.prefilling]
        self._results([request for request in requests if not request.prefilling])

    def decode(self, *requests: Request, steps: int = 1, tokens: Sequence[int] = ()) -> DecodeStep:
        """Launch decode steps of a batch; equal texts go on equally, or with the given tokens."""
        for step_number in range(len(tokens) or steps):
            self._stash()
            for request in requests:
                assert request.running and not request.prefilling
                new = tokens[step_number] if len(tokens) else hash((request.path[-1], 1))
                request.tokens.append(new)
                request.extend_path()
                request.length += 1
                self._allocate(request, request.length - 1, request.length)
            rows, lengths = np.array([r.row for r in requests]), np.array([r.length for r in requests])
            step = self._begin(lambda rows=rows, lengths=lengths: self.engine.begin_decode(rows, lengths))
            assert_rules(self)
            assert_lists(self, requests, step)
            for request in requests:
                self._write_kv(request, request.length - 1)
            self._results([])
        return step

    def finish(self, request: Request, *, in_flight: int = 1) -> None:
        """A request ends; the tree keeps its whole pages. The last `in_flight` tokens are of a launch that was in vain."""
        self._forget_results(request)
        self._checkpoint(request, request.length - in_flight)
        self._release(request)

    def retract(self, request: Request) -> None:
        """A request gives its row and pages back, but the tree's. Extended again, what it decoded is of its prompt."""
        self._forget_results(request)
        self._release(request)

    abort = retract  # in the middle of its chunks or later; it never comes back

    def evict(self, pages: int) -> None:
        """Free up to so many pages of the tree, leaves that no request holds, the oldest first."""
        while pages > 0:
            leaves = [key for key, node in self.tree.items() if not node.children and not node.locks][:pages]
            if not leaves:
                return
            for key in leaves:
                node = self.tree.pop(key)
                self._free(node.page)
                if node.parent is not None:
                    self.tree[node.parent].children -= 1
            pages -= len(leaves)

    def flush(self) -> None:
        """Empty the cache; no request may run."""
        assert not self.running
        self._middle, self._last = [], []
        self.tree.clear()
        self.engine.rows_cleared()
        self.scene.handed_out.clear()
        self.handed_out = []
        pages = self.index.geometry.pages
        self.free_pages = list(range(pages - 1, 0, -1))
        for page in range(1, pages):
            self._poison(page)

    # -- what tests ask -------------------------------------------------------------------------------------------

    def segments(self, request: Request) -> Pieces:
        """What the last walk of a request's row saw."""
        return [(s.begin, s.end) for s in self.engine.planner.rows[request.row].segments]

    def ids(self, request: Request) -> list[int]:
        """Ids of what the last walk of a request's row saw."""
        return [s.id for s in self.engine.planner.rows[request.row].segments]

    def is_dirty(self, request: Request) -> bool:
        """Decodes densely for now."""
        return self.engine.planner.rows[request.row].dirty

    def found(self, request: Request) -> int:
        """Tokens that the tree has of a request now."""
        request.extend_path()
        keys = request.page_keys((len(request.tokens) - 1) // PAGE)
        return PAGE * next((i for i, key in enumerate(keys) if key not in self.tree), len(keys))

    def pages(self, request: Request, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Pages of token positions [begin, end) of a row, whole ones, int64 [n]."""
        end = request.length if end is None else end
        return self.scene.req_to_token[request.row, begin : end // PAGE * PAGE : PAGE].long() // PAGE

    def tables(self, request: Request, begin: int, end: int) -> dict[str, torch.Tensor]:
        """The index's rows of tokens [begin, end)."""
        slots = self.scene.req_to_token[request.row, begin:end].long()
        return stored_tables(self.index, self.pages(request, begin, end), slots)

    # -- allocator and tree ---------------------------------------------------------------------------------------

    def _poison(self, page: int) -> None:
        for buffer in (*self.scene.keys, *self.scene.values):
            buffer[page * PAGE : (page + 1) * PAGE] = torch.nan

    def _free(self, page: int) -> None:
        self._poison(page)
        self.free_pages.append(page)

    def _allocate(self, request: Request, begin: int, end: int) -> None:
        """Slots for token positions [begin, end) of a row; the first may continue its page."""
        table = self.scene.req_to_token[request.row]
        new = len(range(-(-begin // PAGE) * PAGE, end, PAGE))
        if new > len(self.free_pages):
            self.evict(new - len(self.free_pages))
        assert new <= len(self.free_pages), "the pool is too small for this test"
        for position in range(begin, end):
            first = int(self.free_pages.pop()) * PAGE if position % PAGE == 0 else int(table[position - 1]) + 1
            table[position] = first
        slots = table[begin:end].long()
        self.scene.handed_out.add(slots)
        self.handed_out.append(slots)

    def _lock(self, request: Request, pages: int) -> None:
        for key in request.page_keys(pages)[request.protected :]:
            self.tree[key].locks += 1
        request.protected = pages

    def _admit(self, request: Request) -> None:
        found = self.found(request)
        request.prompt_len, request.length = len(request.tokens), found
        request.row, request.news_at, request.dense_since_news = self.free_rows.pop(), self.launches, 0
        table = self.scene.req_to_token[request.row]
        for i, key in enumerate(request.page_keys(found // PAGE)):
            table[i * PAGE : (i + 1) * PAGE] = self.tree[key].page * PAGE + torch.arange(PAGE, dtype=torch.int32)
        self._lock(request, found // PAGE)
        self.running.append(request)

    def _checkpoint(self, request: Request, tokens: int) -> None:
        """Insert whole pages of a request; where the tree has them already, the row takes the tree's."""
        table, keys = self.scene.req_to_token[request.row], request.page_keys(tokens // PAGE)
        known = next((i for i, key in enumerate(keys) if key not in self.tree), len(keys))
        protected = request.protected
        for i in range(protected, known):
            self._free(int(table[i * PAGE]) // PAGE)
            table[i * PAGE : (i + 1) * PAGE] = self.tree[keys[i]].page * PAGE + torch.arange(PAGE, dtype=torch.int32)
        for i in range(max(known, protected), len(keys)):
            parent = keys[i - 1] if i else None
            self.tree[keys[i]] = _Node(int(table[i * PAGE]) // PAGE, parent)
            if parent is not None:
                self.tree[parent].children += 1
        self._lock(request, max(protected, len(keys)))
        self.engine.row_rewritten(request.row, protected * PAGE, known * PAGE)
        if known > protected:
            request.news_at, request.dense_since_news = self.launches, 0

    def _release(self, request: Request) -> None:
        """Free the row, and its pages but the tree's."""
        for page in self.pages(request, request.protected * PAGE, -(-request.length // PAGE) * PAGE).tolist():
            self._free(page)
        for key in request.page_keys(request.protected):
            self.tree[key].locks -= 1
        self.free_rows.append(request.row)
        self.engine.row_freed(request.row)
        self.running.remove(request)
        request.row = request.length = request.protected = 0

    # -- launches -------------------------------------------------------------------------------------------------

    def _stash(self) -> None:
        for request in self._middle:
            self._checkpoint(request, request.length)
        self._middle = []

    def _results(self, last_chunks: list[Request]) -> None:
        """Checkpoint the last chunks whose results are there."""
        ready, self._last = (self._last, last_chunks) if self.overlap else (last_chunks, [])
        for request in ready:
            self._checkpoint(request, request.prompt_len)

    def _forget_results(self, request: Request) -> None:
        self._middle = [r for r in self._middle if r is not request]
        self._last = [r for r in self._last if r is not request]

    def _begin(self, begin) -> DecodeStep | None:
        """The head of a forward."""
        self.launches += 1
        self.plan, self.made, self.walked = Plan(), [], []
        self.checked.clear()
        result = begin()
        new_pages = torch.cat(self.handed_out).div(PAGE, rounding_mode="floor").unique()
        self.handed_out = []
        assert_handed_out_pages_are_unclustered(self, new_pages)
        return result

    def _watch_plan(self, snapshots: list[Snapshot]) -> Plan:
        """Note what is planned, with the makers as they are now."""
        dirty = [request for request in self.running if self._record_is_dirty(request)]
        plan = self._planned(snapshots)
        self.plan = plan
        self.walked = [request for request in dirty if not self._record_is_dirty(request)]
        clustered = self.index.page_state[:, 0] >= 0
        for operation in plan.operations:
            if isinstance(operation, Make):
                begin = operation.first_page * PAGE
                slots = self.scene.req_to_token[operation.row, begin : begin + operation.pages * PAGE : PAGE]
                pages = slots.long() // PAGE
                maker = copy.copy(self.engine.planner.rows[operation.row])
                self.made.append(Made(operation, maker, bool(clustered[pages].any())))
                clustered[pages] = True
        return plan

    def _record_is_dirty(self, request: Request) -> bool:
        record = self.engine.planner.rows.get(request.row)  # None: its first launch is under way
        return record is not None and record.dirty

    def _write_kv(self, request: Request, begin: int) -> None:
        slots = self.scene.req_to_token[request.row, begin : request.length].long()
        keys, values = self.contents.of(request.path[begin : request.length])
        for layer, (key_buffer, value_buffer) in enumerate(zip(self.scene.keys, self.scene.values, strict=True)):
            key_buffer[slots], value_buffer[slots] = keys[layer], values[layer]


class Contents:
    """What tokens' keys and values are, and what the tables of a segment of them should be."""

    _known: dict[tuple, dict[str, torch.Tensor]] = {}  # shared by all worlds: the same tokens, the same tables

    def __init__(self, config: ClusterKVConfig, layers: int, kv_heads: int, head_dim: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (layers, CONTENTS, kv_heads, head_dim)
        centres = 2 * torch.randn(layers, 40, kv_heads, head_dim, generator=generator)
        which = torch.randint(40, (CONTENTS,), generator=generator)
        self.keys = centres[:, which] + 0.7 * torch.randn(shape, generator=generator)
        self.values = torch.randn(shape, generator=generator)
        self._config, self._sizes = config, {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}

    def of(self, path: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens, [layers, n, kv_heads, head_dim]."""
        which = torch.tensor([token % CONTENTS for token in path], dtype=torch.int64)
        return self.keys[:, which], self.values[:, which]

    def tables(self, path: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tables of one segment of these tokens, built alone in a pool of its own."""
        name = (repr(self._config), tuple(self._sizes.values()), len(path), path[-1])
        if name not in self._known:
            scene = Scene(self._config, pages=len(path) // PAGE + 1, rows=1, context=PAGE, **self._sizes)
            slots = torch.arange(PAGE, PAGE + len(path))
            for buffers, rows in zip((scene.keys, scene.values), self.of(path), strict=True):
                for buffer, layer_rows in zip(buffers, rows, strict=True):
                    buffer[slots] = layer_rows
            build.build_segment(scene.index, 1, slots, scene.keys, scene.values, 1)
            self._known[name] = stored_tables(scene.index, slots[::PAGE] // PAGE, slots)
        return self._known[name]


def stored_tables(index, pages: torch.Tensor, slots: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the index holds of a segment, by array."""
    rows = index.cluster_rows(pages).flatten()
    where = {"members": slots, "codes": slots, "code_scales": slots, "segment_vectors": pages[:SEGMENT_VECTOR_PAGES]}
    return {
        name: array[:, where.get(name, rows)].clone() for name, array in index.arrays.items() if name != "page_state"
    }


# -- the rules ----------------------------------------------------------------------------------------------------


def assert_handed_out_pages_are_unclustered(world: World, pages: torch.Tensor) -> None:
    """Rule 1, at the head of the forward that follows."""
    clustered = pages[world.index.page_state[pages, 0] >= 0]
    assert not len(clustered), f"rule 1: pages {clustered.tolist()} were handed out and are clustered"


def assert_rules(world: World) -> None:
    """Rules 1 to 6 as far as they speak of rows, records and tables; call after the head of a forward."""
    assert world.engine.counters.build_conflicts == 0, "a plan met another segment's pages"
    for made in world.made:
        assert_segment_may_be_made(world, made)
    for request in world.walked:
        assert_what_was_found_is_clustered(world, request)
    for request in world.running:
        record = world.engine.planner.rows[request.row]
        if not record.dirty:
            assert_record_is_true(world, request, record)


def assert_segment_may_be_made(world: World, made: Made) -> None:
    """Rule 2, for a segment of the last plan."""
    maker, begin, end = made.maker, made.begin, made.end
    said = f"rule 2: {maker.rid} made [{begin}, {end}) with {maker}"
    assert SEGMENT_VECTOR_PAGES * PAGE <= end - begin <= world.config.segment_tokens, said
    assert begin >= world.config.sink_tokens and end <= maker.length, said
    if made.rebuilt:
        return
    found_end = maker.found_end // PAGE * PAGE
    assert end <= found_end or begin >= found_end, f"{said}: found and own"
    limit = (maker.prompt_len - world.config.window_tokens) // PAGE * PAGE
    aged = (maker.length - world.config.window_tokens) // PAGE * PAGE
    assert end <= (limit if maker.prefilling else max(limit, aged)), f"{said}: reaches into the window"
    if not maker.prefilling and end > limit:
        assert begin >= limit or begin >= found_end or end <= found_end, f"{said}: decoded and prompt"
    if maker.prefilling and begin >= found_end and end - begin < world.config.segment_tokens:
        page = int(world.scene.req_to_token[maker.row, end]) // PAGE
        assert end < maker.length and world.index.page_state[page, 0] >= 0, f"{said}: did not wait"


def assert_what_was_found_is_clustered(world: World, request: Request) -> None:
    """Rule 2: what a row found is clustered once it was walked, but for what is too short or lies in the window."""
    record = world.engine.planner.rows[request.row]
    limit = max(0, min(record.found_end, record.prompt_len - world.config.window_tokens))
    ids = world.index.page_state[world.pages(request, 0, limit), 0].tolist()[world.config.sink_tokens // PAGE :]
    for segment_id, run in itertools.groupby(ids):
        pages = len(list(run))
        unseen = segment_id not in {s.id for s in record.segments}  # unclustered, or others see all of it
        assert not unseen or pages < SEGMENT_VECTOR_PAGES, f"rule 2: {request.rid} found {ids}, {record}"


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
    state = world.index.page_state[world.pages(request, begin, end)]
    expected_id = int(state[0, 0]) if segment_id is None else segment_id
    pages = (end - begin) // PAGE
    whole = torch.stack((torch.full((pages,), expected_id), torch.arange(pages), torch.full((pages,), pages)), 1)
    said = f"{request.rid} sees [{begin}, {end}) as segment {expected_id}"
    assert expected_id >= 0 and torch.equal(state.long(), whole), f"rule 3: {said}, the device has {state.tolist()}"
    if (expected_id, request.path[end - 1]) in world.checked:
        return
    world.checked.add((expected_id, request.path[end - 1]))
    slots = world.scene.req_to_token[request.row, begin:end].long()
    keys, _ = world.contents.of(request.path[begin:end])
    for layer, buffer in enumerate(world.scene.keys):
        assert torch.equal(buffer[slots], keys[layer]), f"the pool does not hold {request.rid}'s [{begin}, {end})"
    stored = world.tables(request, begin, end)
    for name, expected in world.contents.tables(request.path[begin:end]).items():
        assert torch.equal(stored[name], expected), f"rules 4, 5: {said}, its {name} are not those of its keys"


def assert_lists(world: World, requests: Sequence[Request], step: DecodeStep) -> None:
    """Rules 3 and 6: each request of a step attends each of its tokens once, as its row and the device's states say."""
    batch = list(range(len(requests)))
    sparse_at = ([] if step.sparse is None else batch) if step.sparse_at is None else step.sparse_at.tolist()
    dense_at = ([] if step.dense is None else batch) if step.dense_at is None else step.dense_at.tolist()
    assert sorted(sparse_at + dense_at) == batch, f"sparse {sparse_at}, dense {dense_at} of {len(batch)} requests"
    for i, place in enumerate(dense_at):
        request = requests[place]
        assert int(step.dense.seq_lens[i]) == request.length
        slots = world.scene.req_to_token[request.row, : request.length].long()
        assert torch.equal(step.dense.slots[i, : request.length], slots), f"{request.rid}'s dense list"
    for i, place in enumerate(sparse_at):
        assert_sparse_list(world, requests[place], step, i)
    for request in requests:
        dirty = world.is_dirty(request)
        request.dense_since_news += dirty
        assert request.dense_since_news < 2, f"{request.rid} decodes densely for a second time since its row was new"
        if not dirty:
            assert_tail_is_short(world, request)


def assert_sparse_list(world: World, request: Request, step: DecodeStep, i: int) -> None:
    """The i-th sparse request: recallable pages are whole segments of its row, everything else is attended."""
    lists, length, config = step.sparse, request.length, world.config
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
        assert_whole(world, request, begin, end)
        assert config.sink_tokens <= begin and end <= length - config.window_tokens, f"rule 6: [{begin}, {end})"
    recallable = torch.zeros(length, dtype=torch.bool)
    for begin in at:
        recallable[begin : begin + PAGE] = True
    base = lists.base_slots[i, : int(lists.base_count[i])]
    assert torch.equal(base, row_slots[~recallable]), f"rule 6: {request.rid}'s always-attended list"
    assert config.sink_tokens <= length - int(recallable.sum()) and lists.recallable_tokens >= int(recallable.sum())


def assert_tail_is_short(world: World, request: Request) -> None:
    """Decoded tokens become segments: own tokens at the end wait for `recluster_every` and one step at most."""
    record = world.engine.planner.rows[request.row]
    clustered = (world.index.page_state[world.pages(request), 0] >= 0).nonzero()
    begin = max(world.config.sink_tokens, record.found_end, PAGE * (int(clustered[-1]) + 1) if len(clustered) else 0)
    most = world.config.recluster_every + world.config.window_tokens + PAGE
    assert request.length - begin <= most, f"{request.rid}: tokens wait since {begin}, {most} may: {record}"
