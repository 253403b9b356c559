"""Users and a scheduler that do at random whatever they may, as a hypothesis state machine over `world.py`.

Every launch passes the rules' assertions (rules.py): at once where the forward's stream has caught up, else as soon as it
does. `COUNTS` tells what a run went through, so that a test can ask whether it went through everything.

The machine has one rule that draws the event: hypothesis would leave out whole rules in most worlds, and launches are what
everything happens at.
"""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from sglang_clusterkv.config import ClusterKVConfig
from tests.support import rules
from tests.support.scenes import PAGE, Tiers
from tests.support.world import SMALL, Request, World, stream

COUNTS: Counter[str] = Counter()

CONFIGS = [
    msgspec.structs.replace(SMALL, **changes)
    for changes in (
        {},
        {"merge_segments": True, "moving_values": "always"},
        {"merge_segments": True, "recluster_every": 64},
        {"merge_segments": True, "window_tokens": 32, "segment_tokens": 512, "moving_values": "always"},
        {"refine": False, "sink_tokens": 48, "recluster_every": 160},
        {"segment_tokens": 128, "merge_segments": True, "recluster_every": 64},
        {"merge_segments": True, "recall_extend_tokens": 70},
        {"reproducible": True, "merge_segments": True},
        {"reproducible": True, "recluster_every": 80},
    )
]
WEIGHTS = {
    "arrive": 5,
    "chunk": 6,
    "decode": 7,
    "finish": 4,
    "retract": 1,
    "abort": 1,
    "make_room": 1,
    "settle": 1,
    "chat": 1,
    "rest": 1,
    "press": 1,
}
EVENTS = [name for name, weight in WEIGHTS.items() for _ in range(weight)]
MOST_TOKENS = 1000
MOST_RUNNING = 6
CHUNK_TOKENS = 256  # most that a prefill takes where the pool is in two tiers: its pages come from the ring
ENDS = st.sampled_from([1, 5, 20, 70, 150, 300])
PICK = st.integers(0, 1 << 10)


def most_pages(request: Request) -> int:
    """Pages that a request may come to hold."""
    return -(-(len(request.tokens) + 110) // PAGE)


class SchedulerMachine(RuleBasedStateMachine):
    """One world, from its first request to its last."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.texts: list[list[int]] = []
        self.waiting: list[Request] = []
        self.idle: list[Request] = []  # that hold a row and have nothing to do for a while
        self.midway = False  # in an event, or a rule broke in one
        self._fresh = 10**6
        self._latest = stream(9, 300)

    @initialize(
        config=st.sampled_from(CONFIGS),
        pages=st.sampled_from([250, 330, 500]),
        overlap=st.booleans(),
        lags=st.booleans(),
        host=st.sampled_from(["no", "no", "HiCache", 1, 2, 4]),
        pages_per_call=st.sampled_from([0, 40]),
        graphs=st.sampled_from([0, 2, 6]),
    )
    def begin(
        self,
        config: ClusterKVConfig,
        pages: int,
        overlap: bool,
        lags: bool,
        host: str | int,
        pages_per_call: int,
        graphs: int,
    ) -> None:
        """A world of its own."""
        COUNTS["worlds"] += 1
        if config.recall_extend_tokens:  # on a CPU alone, where there are no graphs and no HiCache
            host, graphs = "no" if host == "HiCache" else host, 0
        tiers = Tiers.of(pages, host, CHUNK_TOKENS, MOST_RUNNING) if isinstance(host, int) else None
        self.world = World(
            config, pages=pages, overlap=overlap or graphs == 6, lags=lags, tiers=tiers,
            hicache=host == "HiCache", pages_per_call=pages_per_call, graphs=0 if tiers else graphs,
        )  # fmt: skip
        self.texts = [stream(0, 900), stream(1, 900), stream(2, 150)]

    @rule(event=st.sampled_from(EVENTS), data=st.data())
    def event(self, event: str, data: st.DataObject) -> None:
        """Something happens."""
        COUNTS["steps"] += 1
        self.midway = True
        getattr(self, event)(data.draw)
        self.midway = False

    # -- users

    def _new(self, tokens: int) -> list[int]:
        self._fresh += 1
        return stream(self._fresh, tokens)

    def arrive(self, draw) -> None:
        """Requests come in: a new text, a branch from one seen before, a chat's next turn, or the last one again."""
        for kind in draw(
            st.lists(st.sampled_from(["admit", "branch", "turn", "turn", "duplicate"]), min_size=1, max_size=3)
        ):
            COUNTS[kind] += 1
            text = self.texts[-1 - draw(PICK) % min(5, len(self.texts))]
            if kind == "admit":
                prompt = self._new(draw(st.sampled_from([40, 130, 333, 500, 700, 900])))
            elif kind == "branch":
                prompt = text[: draw(PICK) % len(text)] + self._new(draw(ENDS))
            elif kind == "turn":
                message = draw(ENDS)
                prompt = text[: 900 - message] + self._new(message)
            else:
                prompt = self._latest
            self._latest = prompt
            self.waiting.insert(0, self.world.submit(prompt[:900]))

    def chat(self, draw) -> None:
        """Two short turns, one after the other, beside all that waits: their segments are neighbours that merge."""
        tokens = self._new(150)
        for _ in range(2):
            request = self.world.submit(tokens)
            room = self.world.index.geometry.pages - 1 - sum(map(most_pages, self.world.running))
            if len(self.world.running) >= MOST_RUNNING or most_pages(request) > room or not self._may_prefill():
                return
            COUNTS["chat"] += 1
            self.world.catches_up = draw(st.booleans())
            self.world.extend(request)
            self._launched("chunk")
            self.world.decode(request)
            self._launched("decode")
            self.world.finish(request)
            tokens = request.tokens + self._new(100)
        self.texts.append(tokens)

    # -- the scheduler

    def _decoding(self) -> list[Request]:
        return [request for request in self.world.running if not request.prefilling]

    def _may_prefill(self) -> bool:
        """Whether the ring is full: else prefills wait, as SGLang's do, and it is tried once more."""
        return self.world.engine.residency.refill()

    def _of_a_chunk(self, chunks: list[Request]) -> list[Request | tuple[Request, int]]:
        """So many tokens of these requests as a prefill takes where the pool is in two tiers; others wait."""
        if self.world.tier is None:
            return list(chunks)
        taken: list[Request | tuple[Request, int]] = []
        room = CHUNK_TOKENS
        for request in chunks:
            tokens = request.left if request.running else len(request.tokens) - self.world.found(request)
            new = tokens if tokens <= room else room // PAGE * PAGE
            if new:
                taken.append((request, new))
                room -= new
            elif not request.running:
                self.waiting.insert(0, request)
        return taken

    def _paused(self) -> list[Request]:
        return [request for request in self.world.running if request.prefilling]

    def chunk(self, draw) -> None:
        """Launch a prefill: paused requests go on, waiting ones begin, the last with so many tokens if it has more."""
        if not self._may_prefill():
            return
        chunks = self._paused() if draw(st.booleans()) else []
        most, size = draw(st.integers(1, 4)), draw(st.sampled_from([None, None, 64, 128, 256, 272]))
        room = self.world.index.geometry.pages - 1 - sum(map(most_pages, self.world.running))
        while self.waiting and len(chunks) < most and len(self.world.running) + len(chunks) < MOST_RUNNING:
            room -= most_pages(self.waiting[0])
            if room < 0:
                break
            chunks.append(self.waiting.pop(0))
        if chunks:
            self.world.catches_up = draw(st.booleans())
            *others, last = self._of_a_chunk(chunks)
            request, new = last if isinstance(last, tuple) else (last, None)
            sizes = [tokens for tokens in (new, size) if tokens is not None]
            self.world.extend(*others, (request, min(sizes)) if sizes else request)
            self._launched("chunk")

    def decode(self, draw) -> None:
        """Launch decode steps of all that decode."""
        steps, self.world.catches_up = draw(st.sampled_from([1, 1, 2, 5, 20])), draw(st.booleans())
        for _ in range(steps):
            batch = [
                request
                for request in self._decoding()
                if len(request.tokens) < MOST_TOKENS and request not in self.idle
            ]
            if not batch:
                return
            self.world.decode(*batch)
            self._launched("decode")

    def rest(self, draw) -> None:
        """Requests have nothing to do for a while, or go on: one that rests holds its row, as a session between its turns."""
        decoding = self._decoding()
        self.idle = [request for request in decoding if draw(st.booleans())]
        COUNTS["rest"] += len(self.idle)

    def press(self, draw) -> None:
        """A text that nobody asks for again passes through, so that others' pages leave the device."""
        request = self.world.submit(self._new(draw(st.sampled_from([250, 500]))))
        room = self.world.index.geometry.pages - 1 - sum(map(most_pages, self.world.running))
        if len(self.world.running) >= MOST_RUNNING or most_pages(request) > room:
            return
        while request.left and self._may_prefill():
            COUNTS["press"] += 1
            self.world.extend((request, min(CHUNK_TOKENS - PAGE, request.left)))
            self._launched("chunk")
        if request.running:
            self.world.abort(request)

    def _launched(self, name: str) -> None:
        rules.assert_partition(self.world)
        COUNTS[name] += 1
        COUNTS["rewrite"] += sum(request.news_at == self.world.launches for request in self.world.running)
        COUNTS["merge"] += sum(made.merged for made in self.world.made)
        COUNTS["lagging"] += not self.world.settled

    def settle(self, draw) -> None:
        """The forward's stream catches up, and what rows see is compared with it."""
        COUNTS["settle"] += 1
        self.world.settle()
        rules.assert_records(self.world)

    def finish(self, draw) -> None:
        """A request ends."""
        if batch := self._decoding():
            COUNTS["finish"] += 1
            request = batch[draw(PICK) % len(batch)]
            self.texts.append(list(request.tokens))
            self.world.finish(request, in_flight=0 if request.length == request.prompt_len else 1)

    def retract(self, draw) -> None:
        """A request gives its row back for a while."""
        if batch := self._decoding():
            COUNTS["retract"] += 1
            request = batch[draw(PICK) % len(batch)]
            self.world.retract(request)
            self.waiting.append(request)

    def abort(self, draw) -> None:
        """A request is given up, between its chunks if there is one."""
        if batch := self._paused() or self.world.running:
            COUNTS["abort"] += 1
            self.world.abort(batch[draw(PICK) % len(batch)])

    def make_room(self, draw) -> None:
        """Pages of the tree are freed; all of it where nothing runs."""
        if self.world.running or draw(st.booleans()):
            COUNTS["evict"] += 1
            self.world.evict(draw(st.integers(1, 60)))
        else:
            COUNTS["flush"] += 1
            self.world.flush()

    def teardown(self) -> None:
        """All requests end: nothing of them is left."""
        for request in list(self.world.running):
            self.world.abort(request)
        self.world.settle()
        rules.assert_partition(self.world)
        records, tables = self.world.engine.records, self.world.engine.tables
        assert not records.rows and not tables.known.any(), "records of rows that ended"
        assert not records._seen_by, f"segments that nobody sees any more: {records._seen_by}"
        if self.world.tier is not None and not self.midway:
            COUNTS["stored"] += int(self.world.tier.stored_pages)
            rules.assert_tiers(self.world)
            rules.assert_plans_do_not_depend_on_the_tier(self.world)
        COUNTS["loaded"] += self.world.loaded
        if self.world.replays is not None:
            COUNTS.update(self.world.replays.counts)
        counters = self.world.engine.counters
        COUNTS.update(splits=counters.splits, reused=counters.tokens_reused, sparse=counters.sparse_steps)
        assert counters.faults == self.world.injected, f"rule 7: {counters.faults} for {self.world.injected}"
        COUNTS.update({f"{operation}_fault": times for operation, times in self.world.injected.items()})


class FaultyMachine(SchedulerMachine):
    """The same, with faults of our own code in decode steps."""

    @rule(event=st.sampled_from([*EVENTS, "lists_fault", "layer_fault", "offload_fault"]), data=st.data())
    def event(self, event: str, data: st.DataObject) -> None:
        """Something happens."""
        COUNTS["steps"] += 1
        self.midway = True
        getattr(self, event)(data.draw)
        self.midway = False

    def lists_fault(self, draw) -> None:
        """The next decode step's lists fail."""
        self.world.raises = "lists"

    def layer_fault(self, draw) -> None:
        """A layer of the next sparse step fails."""
        self.world.raises = "layer"

    def offload_fault(self, draw) -> None:
        """The refill of the ring at the next head fails, where there is one."""
        self.world.raises = "offload"
