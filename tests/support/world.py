"""A model of SGLang around the engine: allocator, radix tree, rows and requests, in the order of events of its scheduler.

One launch, as under overlap (SGLANG.md 4.2, 4.5):

    middle chunks of the last launch are checkpointed | admissions match the tree, slots are handed out
    head: the engine's begin_extend or begin_decode   | the forward attends and writes its KV
    last chunks of the *previous* launch are checkpointed: their rows may be rewritten (without overlap: of this launch)

With `lags`, the forward's stream works behind the scheduler's: what the engine and the forward gave it waits until the
test drains it, the host waits for a snapshot, or the scheduler writes a row (SGLang's barrier). What the scheduler does
without writing rows (a request ends, pages are freed and handed out) comes before.

What a token's KV is depends on the tokens up to it alone, as in a model. Pages that nobody owns hold NaN, so clusters built
from a page too early or too late never equal the right ones. After every launch `assert_rules` checks docs/design.md's rules.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import numpy as np
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.engine import Extend
from sglang_clusterkv.clusters.planning.plan import Make, Plan, Snapshot
from sglang_clusterkv.clusters.planning.planner import Planner
from sglang_clusterkv.clusters.rows import Row
from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.config import ClusterKVConfig
from tests.support import rules
from tests.support.late_graphs import LateReplays
from tests.support.scenes import PAGE, Scene, Tiers

SMALL = ClusterKVConfig(
    budget_tokens=32,
    candidate_tokens=64,
    segment_tokens=256,
    window_tokens=64,
    recluster_every=128,
    estimate_clusters=8,
    merge_segments=False,
)
CONTENTS = 1 << 14  # different tokens' keys and values
Pieces = list[tuple[int, int]]  # token positions [begin, end)
Begun = TypeVar("Begun")  # what the head of a forward gives


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
    alone: bool = True  # no other running request has had pages of it but sinks since its row was given

    @property
    def running(self) -> bool:
        """Holds a row."""
        return self.row > 0

    @property
    def left(self) -> int:
        """Tokens to prefill."""
        return (self.prompt_len if self.running else len(self.tokens)) - self.length

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
    merged: bool  # from neighbours

    @property
    def begin(self) -> int:
        return self.make.first_page * PAGE

    @property
    def end(self) -> int:
        return self.begin + self.make.pages * PAGE


class LaggingStream(ForwardStream):
    """Device work that waits until somebody waits for it."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self._waiting: list[Callable[[], object]] = []
        self.done = 0

    def run(self, work: Callable[..., object], *arguments: Any) -> None:
        """Queue work."""
        self._waiting.append(functools.partial(work, *arguments))

    def event(self) -> _Reached:
        """Its synchronize() works off what waits now."""
        return _Reached(self, self.queued)

    @property
    def queued(self) -> int:
        """Pieces of work that it was given since the beginning."""
        return self.done + len(self._waiting)

    def drain(self, upto: int | None = None) -> None:
        """Work off what waits, or the first of it until `upto` pieces of work were done since the beginning."""
        while self._waiting and (upto is None or self.done < upto):
            self.done += 1
            self._waiting.pop(0)()

    @property
    def settled(self) -> bool:
        """Nothing waits."""
        return not self._waiting


class _Reached(NamedTuple):
    """A point in a lagging stream."""

    stream: LaggingStream
    upto: int

    def synchronize(self) -> None:
        self.stream.drain(self.upto)

    def query(self) -> bool:
        return self.stream.done >= self.upto


class World:
    """Requests of one engine.

    Args:
        config: of the engine.
        pages: of the pool.
        overlap: whether last chunks are checkpointed after the next launch.
        lags: whether the forward's stream works behind the scheduler's.
        checks: whether every launch passes the rules' assertions.
        tiers: of the pool; None: everything is on the device.
        hicache: whether pages that the tree frees stay on the host, as with SGLang's HiCache; not with tiers.
        clustered: the layers that have clusters; None: all.
        pages_per_call: of segments that are made together, as on a GPU.
        graphs: requests that captured decode steps have room for, whose lists never move; 0: no steps are captured.
        sizes: layers, kv_heads, head_dim, rows, context of the scene.
    """

    def __init__(
        self,
        config: ClusterKVConfig = SMALL,
        *,
        pages: int = 400,
        overlap: bool = True,
        lags: bool = False,
        checks: bool = True,
        tiers: Tiers | None = None,
        hicache: bool = False,
        clustered: tuple[int, ...] | None = None,
        pages_per_call: int = 0,
        graphs: int = 0,
        **sizes: int,
    ) -> None:
        assert tiers is None or not hicache
        sizes = {"layers": 1, "kv_heads": 1, "head_dim": 16, "rows": 12, "context": 2048} | sizes
        self.config, self.overlap, self._checks = config, overlap, checks
        self.stream = LaggingStream() if lags else ForwardStream("cpu")
        self.scene = Scene(config, pages=pages, stream=self.stream, tiers=tiers, clustered=clustered, **sizes)
        self.tier = self.scene.tier
        self.scene.engine.builder.most_pages = pages_per_call
        # How to make this world again, and what happened in it (`replayed`).
        self._made_with: dict[str, Any] = {"config": config, "pages": pages, "overlap": overlap, "lags": lags, **sizes}
        self._events: list[tuple[str, tuple[Any, ...]]] = []
        self._requests: list[Request] = []
        self.listed: list[int] = []  # of every decode step, what tells its lists
        self.written = np.zeros(pages * PAGE, np.int64)  # by slot: what tells the token that was written there last
        self.engine, self.index = self.scene.engine, self.scene.index
        self.replays = LateReplays(self.engine, self.stream, graphs, sizes["context"]) if graphs else None
        self.contents = contents_of(config, sizes["layers"], sizes["kv_heads"], sizes["head_dim"], clustered)
        self.free_pages = list(range(pages - 1, 0, -1))  # the page freed last is handed out next
        self.free_rows = list(range(sizes["rows"] - 1, 0, -1))
        self.tree: dict[int, _Node] = {}
        self.hicache = hicache
        self.on_host: set[int] = set()  # with HiCache, the pages that the tree once freed, by what it knows them by
        # Pages that are loaded: the launch whose layers have waited for it, slots, what tells the tokens that they are to get.
        self._loading: list[tuple[int, torch.Tensor, list[int]]] = []
        self.late_loads = 0  # launches that they come too late
        self.loaded = 0  # pages
        self.running: list[Request] = []
        self.launches = 0
        self.may_fault = False  # whether the engine may go the dense way longer than it should
        self.raises: str | None = None  # "lists", "layer" or "offload": where the next launch has a fault
        self.injected: Counter[str] = Counter()  # such faults
        self.counted: Counter[str] = Counter()  # requests of decode steps, sparse and dense; tokens to choose from
        self.faulted_at = 0  # launch whose lists failed
        self.dense_until = 0  # launch from which layers may be sparse again
        self._failures = 0  # of layers, in a row
        # How far the stream has come once the last forward has read rows; None: all of it.
        self._rows_read: int | None = None
        self._ends: list[Any] = []  # of forwards whose results are not on the host
        self.catches_up = False  # with `lags`: a launch's head is done before the scheduler goes on
        self.handed_out: list[torch.Tensor] = []  # slots, since the last launch
        self.made: list[Made] = []  # of the last launch's plan
        self.splits = 0  # likewise
        self.new_pages: list[torch.Tensor] = []  # since the last launch
        self.history: list[Made] = []  # of all plans
        self.walked: list[Request] = []  # rows that were dirty before the last launch and are not any more
        self.checked: set[tuple[int, int, int]] = set()  # launch, segment id, what tells its tokens
        self._middle: list[Request] = []  # to checkpoint before the next launch
        self._last: list[Request] = []  # to checkpoint after the next launch
        self.engine.planner.plan = self._watch_plan  # type: ignore[method-assign]
        self._rids = 0
        if tiers is None:
            self._poison(slice(PAGE, None))

    # -- what users and the scheduler do --------------------------------------------------------------------------

    def submit(self, tokens: Sequence[int]) -> Request:
        """A request arrives; it runs from its first extend on."""
        self._rids += 1
        request = Request(f"r{self._rids}", list(tokens))
        self._requests.append(request)
        self._event("submit", list(tokens))
        return request

    def _event(self, name: str, *arguments: Any) -> None:
        """Note what users or the scheduler did."""
        self._events.append((name, (*arguments, self.catches_up, self.raises)))

    def replayed(self, tiers: Tiers | None) -> World:
        """Another world in which the same happened, with a pool in other tiers."""
        world = World(**self._made_with, tiers=tiers, checks=False)
        for name, (*arguments, world.catches_up, raises) in self._events:
            world.raises = None if raises == "offload" else raises
            known = {request.rid: request for request in world._requests}
            if name == "extend":
                world.extend(*((known[rid], new) if new is not None else known[rid] for rid, new in arguments))
            elif name == "decode":
                world.decode(*(known[rid] for rid in arguments))
            elif name in ("finish", "retract"):
                rid, *rest = arguments
                getattr(world, name)(known[rid], **({"in_flight": rest[0]} if rest else {}))
            else:
                getattr(world, name)(*arguments)
        return world

    def extend(self, *chunks: Request | tuple[Request, int]) -> None:
        """Launch a prefill batch: each request with what is left of its tokens, or with so many new ones."""
        pairs = [chunk if isinstance(chunk, tuple) else (chunk, None) for chunk in chunks]
        self._event("extend", *((request.rid, new) for request, new in pairs))
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
        self._rows_read = None
        requests = [chunk[0] if isinstance(chunk, tuple) else chunk for chunk in chunks]
        for request, extend in zip(requests, extends, strict=True):
            self._write_kv(request, extend.prefix_tokens)
        self._forward_ends()
        self._assert_tiers()
        self._middle = [request for request in requests if request.prefilling]
        self._results([request for request in requests if not request.prefilling])

    def decode(self, *requests: Request, steps: int = 1) -> DecodeStep:
        """Launch decode steps of a batch; equal texts go on equally. Returns the last one."""
        step = None
        for _ in range(steps):
            self._event("decode", *(request.rid for request in requests))
            self._stash()
            for request in requests:
                assert request.running and not request.prefilling
                request.tokens.append(hash((request.path[-1], 1)))
                request.extend_path()
                request.length += 1
                self._allocate(request, request.length - 1, request.length)
            rows, lengths = np.array([r.row for r in requests]), np.array([r.length for r in requests])
            self._rows_read = None
            captured = contextlib.nullcontext() if self.replays is None else self.replays.launching()
            with captured, self._lists_that_raise():
                step = self._begin(functools.partial(self.engine.begin_decode, rows, lengths))
            assert step is not None
            if self.replays is None:
                self._note_lists(step)
                rules.assert_lists(self, requests, step)
            else:
                if isinstance(self.stream, LaggingStream):
                    self._rows_read = self.stream.queued
                rules.assert_lists(self, requests, self.replays.replay(step))
            self._layers(step)
            rules.assert_counts(self)
            for request in requests:
                self._write_kv(request, request.length - 1)
            self._forward_ends()
            self._assert_tiers()
            self._results([])
        assert step is not None, "no step was asked for"
        return step

    @contextlib.contextmanager
    def _lists_that_raise(self) -> Iterator[None]:
        """If they are to: once they are made."""
        if self.raises != "lists":
            yield
            return
        made = self.engine.decoding.step

        def raises(*arguments: Any) -> DecodeStep:
            made(*arguments)
            raise RuntimeError("a fault of the test")

        self.raises = None
        self.injected["lists"] += 1
        self.faulted_at = self.launches + 1
        with patch.object(self.engine.decoding, "step", raises):
            yield

    def _layers(self, step: DecodeStep) -> None:
        """The layers of a step: none is computed, one may fail. Counts what the step came to."""
        sparse = 0 if step.sparse is None else step.sparse_requests
        if self.replays is not None:  # no code of ours runs in a replay
            assert step.counts is not None
            self.counted.update(sparse=sparse, dense=len(step.rows) - sparse, available=step.counts.tokens_available)
            self._failures = 0 if sparse else self._failures
            return
        if sparse and self.raises == "layer":
            self.raises = None
            self.injected["layer"] += 1
            self._failures = min(self._failures + 1, 8)
            self.dense_until = self.launches + 2**self._failures
            sparse = 0

            def raises(*_: Any, **__: Any) -> torch.Tensor:
                raise RuntimeError("a fault of the test")

            q = torch.zeros(len(step.rows), 1, self.index.geometry.head_dim)
            with patch.object(self.engine, "sparse_decode", raises):
                try:
                    output = self.engine.sparse_layer(q, self.scene.keys[0], self.scene.values[0], 0, step, 1.0)
                except RuntimeError:
                    raise AssertionError("a layer's fault reached the scheduler") from None
            assert output is None, "a layer that failed gave something"
        elif sparse:
            self._failures = 0
        self.counted.update(sparse=sparse, dense=len(step.rows) - sparse)
        if sparse and step.sparse is not None:
            self.counted["available"] += PAGE * int(step.sparse.page_count.sum())

    def finish(self, request: Request, *, in_flight: int = 1) -> None:
        """A request ends; the tree keeps its whole pages. The last `in_flight` tokens are of a launch that was in vain."""
        self._event("finish", request.rid, in_flight)
        self._forget_results(request)
        self._checkpoint(request, self.engine.tokens_to_keep(request.row, request.length - in_flight))
        self._release(request)

    def retract(self, request: Request) -> None:
        """A request gives its row and pages back, but the tree's. Extended again, what it decoded is of its prompt."""
        self._event("retract", request.rid)
        self._forget_results(request)
        self._release(request)

    abort = retract  # in the middle of its chunks or later; it never comes back

    def evict(self, pages: int) -> None:
        """Free up to so many pages of the tree, leaves that no request holds, the oldest first."""
        self._event("evict", pages)
        self._evict(pages)

    def _evict(self, pages: int) -> None:
        while pages > 0:
            leaves = [key for key, node in self.tree.items() if not node.children and not node.locks][:pages]
            if not leaves:
                return
            for key in leaves:
                node = self.tree.pop(key)
                self._free(node.page)
                if self.hicache:
                    self.on_host.add(key)
                if node.parent is not None:
                    self.tree[node.parent].children -= 1
            pages -= len(leaves)

    def flush(self) -> None:
        """Empty the cache; no request may run."""
        self._event("flush")
        assert not self.running
        self._middle, self._last = [], []
        self.tree.clear()
        self.on_host.clear()
        self.engine.rows_cleared()
        self.scene.handed_out.clear()
        self.handed_out, self.new_pages = [], []
        pages = self.index.geometry.pages
        self.free_pages = list(range(pages - 1, 0, -1))
        if self.tier is None:
            self.stream.run(self._poison, slice(PAGE, None))

    # -- what tests ask -------------------------------------------------------------------------------------------

    def segments(self, request: Request) -> Pieces:
        """What the last walk of a request's row saw."""
        return [(s.begin, s.end) for s in self.engine.records.rows[request.row].segments]

    def ids(self, request: Request) -> list[int]:
        """Ids of what the last walk of a request's row saw."""
        return [s.id for s in self.engine.records.rows[request.row].segments]

    def attended(self, request: Request, length: int) -> int:
        """Tokens that a decode step of this length attends besides what it recalls."""
        end = length - self.config.window_tokens
        return length - sum(e - b for b, e in self.segments(request) if e <= end)

    def is_dirty(self, request: Request) -> bool:
        """Decodes densely for now."""
        record = self.engine.records.rows.get(request.row)
        return record is None or record.dirty

    def found(self, request: Request) -> int:
        """Tokens that the tree has of a request now, those on the host included."""
        request.extend_path()
        keys = request.page_keys((len(request.tokens) - 1) // PAGE)
        return PAGE * self._known(keys, self.tree.keys() | self.on_host)

    @staticmethod
    def _known(keys: list[int], of: Container[int]) -> int:
        """How many pages from the first on are among those."""
        return next((i for i, key in enumerate(keys) if key not in of), len(keys))

    def pages(self, request: Request, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Pages of token positions [begin, end) of a row, whole ones, int64 [n]."""
        return self.pages_of(request.row, begin, request.length if end is None else end)

    def pages_of(self, row: int, begin: int, end: int) -> torch.Tensor:
        """The same, of a line of req_to_token."""
        return self.scene.req_to_token[row, begin : end // PAGE * PAGE : PAGE].long() // PAGE

    def tables(self, request: Request, begin: int, end: int) -> dict[str, torch.Tensor]:
        """The index's rows of tokens [begin, end)."""
        slots = self.scene.req_to_token[request.row, begin:end].long()
        return rules.stored_tables(self.index, self.pages(request, begin, end), slots)

    # -- allocator and tree ---------------------------------------------------------------------------------------

    def _poison(self, slots: slice) -> None:
        for buffer in (*self.scene.keys, *self.scene.values):
            buffer[slots] = torch.nan

    def _free(self, page: int) -> None:
        if self.tier is None:
            self.stream.run(self._poison, slice(page * PAGE, (page + 1) * PAGE))
        else:
            self.stream.run(self.scene.poison, page)
            self.scene.handed_out.freed(torch.tensor([page]))
        self.free_pages.append(page)

    def _allocate(self, request: Request, begin: int, end: int) -> None:
        """Slots for token positions [begin, end) of a row; the first may continue its page."""
        table = self.scene.req_to_token[request.row]
        new = len(range(-(-begin // PAGE) * PAGE, end, PAGE))
        if new > len(self.free_pages):
            self._evict(new - len(self.free_pages))
        assert new <= len(self.free_pages), "the pool is too small for this test"
        fresh = [self.free_pages.pop() for _ in range(new)]
        slots = [slot for page in fresh for slot in range(page * PAGE, (page + 1) * PAGE)]
        if begin % PAGE:
            slots = list(range(int(table[begin - 1]) + 1, int(table[begin - 1]) + 1 + -begin % PAGE)) + slots
        given = torch.tensor(slots[: end - begin], dtype=torch.int64)
        self.scene.handed_out.add(given, torch.tensor(fresh, dtype=torch.int64) if self.tier is not None else None)
        self.handed_out.append(given)
        self.new_pages.append(torch.tensor(fresh, dtype=torch.int64))
        self._rows_change()
        table[begin:end] = given.int()

    def _lock(self, request: Request, pages: int) -> None:
        for key in request.page_keys(pages)[request.protected :]:
            self.tree[key].locks += 1
        request.protected = pages

    def _admit(self, request: Request) -> None:
        found = self.found(request)
        request.prompt_len, request.length = len(request.tokens), found
        request.row, request.news_at, request.dense_since_news = self.free_rows.pop(), self.launches, 0
        request.alone = True
        if found:
            self._rows_change()
        table = self.scene.req_to_token[request.row]
        keys = request.page_keys(found // PAGE)
        on_device = self._known(keys, self.tree)
        for i, key in enumerate(keys[:on_device]):
            table[i * PAGE : (i + 1) * PAGE] = self.tree[key].page * PAGE + torch.arange(PAGE, dtype=torch.int32)
        self._lock(request, on_device)
        if on_device < len(keys):
            self._load(request, keys, on_device)
        self.running.append(request)

    def _load(self, request: Request, keys: list[int], on_device: int) -> None:
        """The tree's pages from there on are on the host: they get new ones, which are written while the forward runs."""
        self._allocate(request, on_device * PAGE, len(keys) * PAGE)
        slots = self.scene.req_to_token[request.row, on_device * PAGE : len(keys) * PAGE].long()
        for i in range(on_device, len(keys)):
            self._put_into_tree(keys, i, int(slots[(i - on_device) * PAGE]) // PAGE)
        self._lock(request, len(keys))
        path = request.path[on_device * PAGE : len(keys) * PAGE]
        self.written[slots.numpy()] = [token % CONTENTS for token in path]
        self._loading.append((self.launches + 1 + self.late_loads, slots, path))
        self.loaded += len(keys) - on_device

    def _put_into_tree(self, keys: list[int], i: int, page: int) -> None:
        parent = keys[i - 1] if i else None
        self.tree[keys[i]] = _Node(page, parent)
        if parent is not None:
            self.tree[parent].children += 1

    def _checkpoint(self, request: Request, tokens: int) -> None:
        """Insert whole pages of a request; where the tree has them already, the row takes the tree's."""
        table, keys = self.scene.req_to_token[request.row], request.page_keys(tokens // PAGE)
        known = self._known(keys, self.tree)
        # SGLang tells of what is on the host as of what it has, though the row keeps its own pages there.
        told = self._known(keys, self.tree.keys() | self.on_host)
        protected = request.protected
        if known > protected:
            self._rows_change()
        for i in range(protected, known):
            self._free(int(table[i * PAGE]) // PAGE)
            table[i * PAGE : (i + 1) * PAGE] = self.tree[keys[i]].page * PAGE + torch.arange(PAGE, dtype=torch.int32)
        for i in range(max(known, protected), len(keys)):
            self._put_into_tree(keys, i, int(table[i * PAGE]) // PAGE)
        self._lock(request, max(protected, len(keys)))
        self.engine.row_rewritten(request.row, protected * PAGE, told * PAGE)
        if told > protected:
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

    def _begin(self, begin: Callable[[], Begun]) -> Begun:
        """The head of a forward; what it gave."""
        self.launches += 1
        self.made, self.walked, self.splits = [], [], 0
        self.checked.clear()
        with self._refill_that_raises():
            try:
                result = begin()
            except RuntimeError as error:
                raise AssertionError(f"rule 7: an error reached the scheduler: {error}") from error
        for due, slots, path in self._loading:
            if due <= self.launches:
                self.stream.run(self._put, slots, path)
        self._loading = [load for load in self._loading if load[0] > self.launches]
        if self.tier is not None:
            self.stream.run(self.scene.poison_what_nobody_holds)
            if self._checks:
                self.stream.run(rules.assert_new_pages_are_on_the_device, self, torch.cat(self.new_pages))
        self.new_pages = []
        if self.catches_up:
            self.settle()
        handed_out, self.handed_out = torch.cat(self.handed_out), []
        if not self._checks:
            return result
        self._note_who_shares()
        self.stream.run(rules.assert_handed_out_pages_are_unclustered, self, handed_out)
        if self.settled:
            rules.assert_rules(self)
        return result

    @contextlib.contextmanager
    def _refill_that_raises(self) -> Iterator[None]:
        """If it is to: where it is queued, on a stream that lags, else after its stores."""
        if self.raises != "offload" or self.tier is None:
            yield
            return
        self.raises = None
        calls = Counter[str]()

        def raises(*_: Any, **__: Any) -> None:
            calls["offload"] += 1
            raise RuntimeError("a fault of the test")

        lags = isinstance(self.stream, LaggingStream)
        with (
            patch.object(self.engine.residency, "_fill", raises)
            if lags
            else patch.object(self.tier.directory, "drop", raises)
        ):
            if lags:
                run = self.stream.run
                at_once = lambda work, *rest: work(*rest) if work is raises else run(work, *rest)  # noqa: E731
                with patch.object(self.stream, "run", at_once):
                    yield
            else:
                yield
        self.injected.update(calls)

    def _note_lists(self, step: DecodeStep) -> None:
        """What tells which pages a step's requests may recall and which slots they always attend to."""
        lists = () if step.sparse is None else (step.sparse.pages, step.sparse.base_slots, step.sparse.base_count)
        dense = () if step.dense is None else (step.dense.slots, step.dense.seq_lens)
        self.listed.append(hash(tuple(tensor.numpy().tobytes() for tensor in (*lists, *dense))))

    def _assert_tiers(self) -> None:
        if self.tier is not None and self._checks and self.settled:
            rules.assert_tiers(self)

    def _note_who_shares(self) -> None:
        pages = [set(self.pages(request, self.config.sink_tokens).tolist()) for request in self.running]
        for i, j in itertools.combinations(range(len(pages)), 2):
            if not pages[i].isdisjoint(pages[j]):
                self.running[i].alone = self.running[j].alone = False

    @property
    def settled(self) -> bool:
        """The device has done all that it was given, so what the host believes can be compared with it."""
        return not isinstance(self.stream, LaggingStream) or self.stream.settled

    def _rows_change(self) -> None:
        """The scheduler writes a row: once the last forward has read rows, which a replayed step has before its layers."""
        if isinstance(self.stream, LaggingStream):
            self.stream.drain(self._rows_read)

    def _forward_ends(self) -> None:
        """A forward was launched. Its results are on the host before the next one is, or the one after that with overlap."""
        if self.replays is not None and isinstance(self.stream, LaggingStream):
            self._ends.append(self.stream.event())
            if len(self._ends) > self.overlap:
                self._ends.pop(0).synchronize()

    def settle(self) -> None:
        """Let the forward's stream catch up; what the scheduler writes to rows waits for this as well."""
        if isinstance(self.stream, LaggingStream):
            self.stream.drain()

    def _watch_plan(self, snapshots: list[Snapshot]) -> Plan:
        """Note what is planned, with the makers as they are now."""
        dirty = [request for request in self.running if self._record_is_dirty(request)]
        plan = Planner.plan(self.engine.planner, snapshots)
        self.walked = [request for request in dirty if not self._record_is_dirty(request)]
        clustered = self.index.page_state[:, 0] >= 0
        for operation in plan.operations:
            if isinstance(operation, Make):
                begin = operation.first_page * PAGE
                slots = self.scene.req_to_token[operation.row, begin : begin + operation.pages * PAGE : PAGE]
                pages = slots.long() // PAGE
                maker = copy.copy(self.engine.records.rows[operation.row])
                merged = operation.id in plan.merged
                self.made.append(Made(operation, maker, bool(clustered[pages].any()), merged))
                clustered[pages] = True
        self.history += self.made
        self.splits = len(plan.cut)
        return plan

    def _record_is_dirty(self, request: Request) -> bool:
        record = self.engine.records.rows.get(request.row)  # None: its first launch is under way
        return record is not None and record.dirty

    def _write_kv(self, request: Request, begin: int) -> None:
        slots = self.scene.req_to_token[request.row, begin : request.length].long()
        self.written[slots.numpy()] = [token % CONTENTS for token in request.path[begin : request.length]]
        self.stream.run(self._put, slots, request.path[begin : request.length])

    def _put(self, slots: torch.Tensor, path: Sequence[int]) -> None:
        keys, values = self.contents.of(path)
        if self.tier is not None:
            slots = self.tier.directory.translate(slots)
            assert (slots >= PAGE).all(), "rule 10: keys and values were written to a page without a device page"
        for layer, (key_buffer, value_buffer) in enumerate(zip(self.scene.keys, self.scene.values, strict=True)):
            key_buffer[slots], value_buffer[slots] = keys[layer], values[layer]


class Contents:
    """What tokens' keys and values are, and what the tables of a segment of them should be, in every world."""

    def __init__(
        self, config: ClusterKVConfig, layers: int, kv_heads: int, head_dim: int, clustered: tuple[int, ...] | None
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (layers, CONTENTS, kv_heads, head_dim)
        centres = 2 * torch.randn(layers, 40, kv_heads, head_dim, generator=generator)
        which = torch.randint(40, (CONTENTS,), generator=generator)
        self.keys = centres[:, which] + 0.7 * torch.randn(shape, generator=generator)
        self.values = torch.randn(shape, generator=generator)
        self._config, self._clustered = config, clustered
        self._sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim}
        self._known: dict[tuple[int, int], dict[str, torch.Tensor]] = {}

    def of(self, path: Iterable[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens, [layers, n, kv_heads, head_dim]."""
        which = torch.tensor([token % CONTENTS for token in path], dtype=torch.int64)
        return self.keys[:, which], self.values[:, which]

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens, [layers, CONTENTS, kv_heads, head_dim]."""
        return self.keys, self.values

    def tables(self, path: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tables of one segment of these tokens, built alone in a pool of its own."""
        name = (len(path), path[-1])
        if name not in self._known:
            scene = Scene(
                self._config,
                pages=len(path) // PAGE + 1,
                rows=1,
                context=PAGE,
                stream=None,
                tiers=None,
                clustered=self._clustered,
                **self._sizes,
            )
            slots = torch.arange(PAGE, PAGE + len(path))
            for buffers, rows in zip((scene.keys, scene.values), self.of(path), strict=True):
                for buffer, layer_rows in zip(buffers, rows, strict=True):
                    buffer[slots] = layer_rows
            build.build_segments(scene.index, [1], [slots], scene.keys, scene.values)
            self._known[name] = rules.stored_tables(scene.index, slots[::PAGE] // PAGE, slots)
        return self._known[name]


contents_of = functools.cache(Contents)


def question(number: int, tokens: int) -> list[int]:
    """A text that no other request has."""
    return stream(1000 + number, tokens)


def served(world: World, tokens: list[int], *, decoded: int = 1) -> Request:
    """A request whose prefill ran in one chunk and which decodes."""
    request = world.submit(tokens)
    world.extend(request)
    world.decode(request, steps=decoded)
    return request
