"""Ways to break the engine, each against a rule, and the state machine's verdict on each: `make mutants`.

A mutant patches one function of the engine. The state machine (machine.py) must turn red under it; the table says after how
many worlds and launches it did, and by which assertion. Exit code 1 when a mutant survives.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.clusters.backoff import BackOff
from sglang_clusterkv.clusters.building import Builder
from sglang_clusterkv.clusters.counters import Counters
from sglang_clusterkv.clusters.decoding import DecodeLists, DecodeStep
from sglang_clusterkv.clusters.engine import ClusterEngine
from sglang_clusterkv.clusters.handed_out import HandedOut, PageEvent, PageEvents
from sglang_clusterkv.clusters.planning import found, merging, reproducible
from sglang_clusterkv.clusters.planning.borders import Borders
from sglang_clusterkv.clusters.planning.plan import Make
from sglang_clusterkv.clusters.planning.planner import Planner
from sglang_clusterkv.clusters.planning.records import Records
from sglang_clusterkv.clusters.planning.view import Run
from sglang_clusterkv.clusters.residency import TieredResidency
from sglang_clusterkv.clusters.rows import Row, RowTables
from sglang_clusterkv.memory import step as step_lists
from sglang_clusterkv.memory.directory import FREE, PADDING, Directory
from sglang_clusterkv.memory.host import HostRows
from sglang_clusterkv.memory.index import ClusterIndex
from sglang_clusterkv.memory.sharing import SharedSegments, shared_segments
from tests.support.late_graphs import LateReplays, lists_by_numpy
from tests.support.scenes import PAGE, Scene


class Mutant(NamedTuple):
    """One broken engine."""

    rules: str  # of docs/design.md that it breaks
    broken: Callable[[], AbstractContextManager[Any]]
    faults: bool = False  # only a machine that injects faults can notice


def _replaced(owner: Any, name: str, by: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: patch.object(owner, name, by)


@contextmanager
def _invalidated_on_the_schedulers_stream() -> Iterator[None]:
    init = Scene.__init__

    def with_index(self: Scene, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.handed_out.index = self.index

    with (
        patch.object(Scene, "__init__", with_index),
        patch.object(HandedOut, "add", lambda self, slots, new_pages=None: self.index.invalidate(slots // PAGE)),
        patch.object(HandedOut, "clear", lambda self: self.index.invalidate_all()),
    ):
        yield


def _spoiled_mark() -> AbstractContextManager[Any]:
    mark = ClusterIndex.mark

    def mark_and_spoil(self: ClusterIndex, segment_ids: list[int], pages: list[torch.Tensor]) -> None:
        mark(self, segment_ids, pages)
        self.arrays["members"][:, int(pages[-1][-1]) * PAGE + 3] += 1

    return patch.object(ClusterIndex, "mark", mark_and_spoil)


def _built_differently_each_time() -> AbstractContextManager[Any]:
    cluster, calls = build.cluster_segment, [0]

    def with_noise(index: ClusterIndex, keys: torch.Tensor, values: torch.Tensor) -> build.SegmentTables:
        calls[0] += 1
        return cluster(index, keys * (1 + 0.01 * (calls[0] % 5 == 0)), values)

    return patch.object(build, "cluster_segment", with_noise)


def _void_snapshots_used() -> AbstractContextManager[Any]:
    planned = Planner.plan
    return patch.object(
        Planner, "plan", lambda self, snapshots: planned(self, [s._replace(changed=s.row.changed) for s in snapshots])
    )


def _window_forgotten() -> AbstractContextManager[Any]:
    recallable = RowTables.recallable
    return patch.object(
        RowTables, "recallable", lambda self, rows, lens: recallable(self, rows, lens + self.window_tokens)
    )


def _headless_is_whole() -> AbstractContextManager[Any]:
    return patch.object(Run, "whole", property(lambda run: run.end - run.begin + run.offset == run.pages))


def _built_from_the_row_of_the_launch_before() -> AbstractContextManager[Any]:
    make, rows = Builder.make, {}

    def late(self: Builder, makes: list[Make], merged: set[int]) -> None:
        true, self.req_to_token = self.req_to_token, rows.get(id(self), self.req_to_token)
        make(self, makes, merged)
        self.req_to_token = true
        rows[id(self)] = true.clone()

    return patch.object(Builder, "make", late)


def _no_net_below_the_layers(
    self: ClusterEngine, q: Any, keys: Any, values: Any, layer: int, step: DecodeStep, scale: float
) -> torch.Tensor:
    return self.sparse_decode(q, keys, values, self.index, layer, step.sparse, scale)


def _counted_before_its_layers() -> AbstractContextManager[Any]:
    begin = ClusterEngine.begin_decode

    def begin_and_count(self: ClusterEngine, rows: Any, seq_lens: Any) -> DecodeStep:
        step = begin(self, rows, seq_lens)
        self.count_step()
        return step

    return patch.object(ClusterEngine, "begin_decode", begin_and_count)


@contextmanager
def _counted_with_its_lists() -> Iterator[None]:
    begin, made = ClusterEngine.begin_decode, DecodeLists.step
    counters: dict[int, Counters] = {}

    def noted(self: ClusterEngine, rows: Any, seq_lens: Any) -> DecodeStep:
        counters[id(self.decoding)] = self.counters
        return begin(self, rows, seq_lens)

    def counted(self: DecodeLists, *arguments: Any) -> DecodeStep:
        step = made(self, *arguments)
        counters[id(self)].add(step.counts)
        return step._replace(counts=None)

    with patch.object(ClusterEngine, "begin_decode", noted), patch.object(DecodeLists, "step", counted):
        yield


@contextmanager
def _unmapped_on_the_schedulers_stream() -> Iterator[None]:
    init = Scene.__init__

    def with_tier(self: Scene, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.handed_out.tier = self.tier

    with (
        patch.object(Scene, "__init__", with_tier),
        patch.object(HandedOut, "freed", lambda self, pages: self.tier.directory.unmap(pages)),
    ):
        yield


def _handed_out_before_freed() -> AbstractContextManager[Any]:
    take = HandedOut.take_pages

    def sorted_by_kind(self: HandedOut) -> list[PageEvents]:
        return sorted(take(self), key=lambda events: events.event is PageEvent.FREED)

    return patch.object(HandedOut, "take_pages", sorted_by_kind)


def _release_without(name: str) -> AbstractContextManager[Any]:
    def release(self: Directory, pages: torch.Tensor) -> None:
        if name != "page_of":
            self.page_of.index_fill_(0, self.device_page[pages], FREE)
            self.page_of[0] = PADDING
        if name != "stored":
            self.stored.index_fill_(0, pages, False)

    return patch.object(Directory, "_release", release)


def _pins_forgotten() -> AbstractContextManager[Any]:
    victims = Directory.victims
    return patch.object(
        Directory, "victims", lambda self, count, pinned, *rest: victims(self, count, pinned[:0], *rest)
    )


@contextmanager
def _only_running_rows_are_pinned() -> Iterator[None]:
    def forgetting(launched: Callable[..., None]) -> Callable[..., None]:
        def forget_others(self: TieredResidency, *arguments: Any) -> None:
            self._lengths[:] = 0
            launched(self, *arguments)

        return forget_others

    with (
        patch.object(TieredResidency, "decode", forgetting(TieredResidency.decode)),
        patch.object(TieredResidency, "extend", forgetting(TieredResidency.extend)),
    ):
        yield


def _refill_faults_go_up() -> AbstractContextManager[Any]:
    def refill(self: TieredResidency) -> bool:
        directory, count = self._directory, self._wanted()
        if count:
            last = self._at(self._lengths.nonzero()[0], self._lengths[self._lengths > 0] - 1)
            self._stream.run(self._fill, count, directory.tail, last, list(self._new))
            directory.filled(count)
        return True

    return patch.object(TieredResidency, "refill", refill)


def _half_a_refill() -> AbstractContextManager[Any]:
    """A refill that failed is taken for done."""
    filled = Directory.filled
    refill = TieredResidency.refill

    def counted_whatever_happens(self: TieredResidency) -> bool:
        count, level = self._wanted(), self._directory.ring_level
        refill(self)
        if count and self._directory.ring_level == level:
            filled(self._directory, count)
        return True

    return patch.object(TieredResidency, "refill", counted_whatever_happens)


def _built_without_the_host() -> AbstractContextManager[Any]:
    heads_first = build._heads_first

    def of_the_device(buffers: Any, slots: Any, hosts: Any, part: int) -> torch.Tensor:
        return heads_first(buffers, slots % len(buffers[0]), [None] * len(hosts), part)

    return patch.object(build, "_heads_first", of_the_device)


def _only_resident_segments_are_made() -> AbstractContextManager[Any]:
    make = Builder.make

    def if_resident(self: Builder, makes: list[Make], merged: set[int]) -> None:
        for operation in makes:
            begin = operation.first_page * PAGE
            slots = self.req_to_token[operation.row, begin : begin + operation.pages * PAGE : PAGE].long()
            if self.tier is None or self.tier.directory.device_page[slots // PAGE].all():
                make(self, [operation], merged)
            else:
                self.lost([operation.id])

    return patch.object(Builder, "make", if_resident)


def _shared_by_place(ids: np.ndarray, count: np.ndarray) -> SharedSegments:
    return shared_segments(np.broadcast_to(np.arange(ids.shape[1]), ids.shape), count)


def _ids_of_the_row_before() -> AbstractContextManager[Any]:
    write = RowTables.write

    def but_its_ids(self: RowTables, row: Row) -> None:
        before = self.ids[row.row].copy()
        write(self, row)
        if before[0] >= 0:
            self.ids[row.row, : len(before)] = before

    return patch.object(RowTables, "write", but_its_ids)


@contextmanager
def _built_over_what_was_cut() -> Iterator[None]:
    """As on a GPU, where nobody looks before: the count where pages are marked has to show it."""
    with (
        patch.object(ClusterIndex, "forget", lambda self, ids: None),
        patch.object(Builder, "_unclustered", lambda *of: True),
    ):
        yield


def _lists_written_before_the_replay_has_read() -> AbstractContextManager[Any]:
    return patch.object(LateReplays, "launch", lambda self, *of: lists_by_numpy(*of))


@contextmanager
def _requests_beyond_the_batch_stay() -> Iterator[None]:
    from sglang_clusterkv.kernels.lists import triton as lists_triton

    make = lists_triton.make

    def of_the_batch(packed: Any, table: Any, page_size: int, lists: Any) -> Any:
        return make(packed, table, page_size, lists._replace(batch=packed.batch))

    with patch.object(lists_triton, "make", of_the_batch):
        yield


MUTANTS = {
    "handed-out pages keep their clusters": Mutant(
        "1", _replaced(ClusterIndex, "invalidate", lambda self, pages: None)
    ),
    "invalidated on the scheduler's stream": Mutant("1", _invalidated_on_the_schedulers_stream),
    "segments reach into the prompt's window": Mutant(
        "2", _replaced(Borders, "prompt_limit", lambda self, record: record.prompt_len // PAGE)
    ),
    "what was found is not clustered": Mutant("2", _replaced(found, "close_runs", lambda snapshot, draft: None)),
    "rewritten rows go on as they were": Mutant(
        "3", _replaced(Records, "rewritten", lambda self, row, begin, end: False)
    ),
    "rewritten rows wait for an extend": Mutant(
        "3", _replaced(ClusterEngine, "_look_at_decoding", lambda self, rows, lens: None)
    ),
    "a snapshot from before a rewrite is used": Mutant("3", _void_snapshots_used),
    "a segment that lost its head is whole": Mutant("3", _headless_is_whole),
    "only the one that cuts is told": Mutant(
        "3", _replaced(Records, "see", lambda self, record, segments: setattr(record, "segments", segments))
    ),
    "merged although others see it": Mutant("2, 3", _replaced(Records, "watchers", lambda self, segment_id: 1)),
    "a row that ended stays known": Mutant("3, 4", _replaced(Records, "free", lambda self, row: None)),
    "built from an older row": Mutant("4", _built_from_the_row_of_the_launch_before),
    "built over pages of another segment": Mutant("2, 3", _built_over_what_was_cut),
    "tables of other keys": Mutant("4, 5", _spoiled_mark),
    "built differently each time": Mutant("5", _built_differently_each_time),
    "what was found stays, although nobody else sees it": Mutant(
        "2, 5", _replaced(reproducible, "drop_others", lambda snapshot, draft: None)
    ),
    "aligned segments stay in parts": Mutant("5", _replaced(merging, "_aligned_ones", lambda *_: [])),
    "a prompt's last segment stays in parts": Mutant(
        "5", _replaced(merging, "_is_worth_it", lambda parts, begin, end: False)
    ),
    "clusters inside the window": Mutant("6", _window_forgotten),
    "layers' faults reach the scheduler": Mutant(
        "7", _replaced(ClusterEngine, "sparse_layer", _no_net_below_the_layers), faults=True
    ),
    "what failed is tried again at once": Mutant("7", _replaced(BackOff, "failed", lambda self: None), faults=True),
    "steps are counted before their layers": Mutant("8", _counted_before_its_layers, faults=True),
    "steps are counted with their lists": Mutant("8", _counted_with_its_lists, faults=True),
    "refills' faults reach the scheduler": Mutant("7", _refill_faults_go_up, faults=True),
    "a refill that failed counts": Mutant("9", _half_a_refill, faults=True),
    "a page keeps its device page when freed": Mutant("9", lambda: _release_without("page_of")),
    "pages stay mapped that left": Mutant("9, 10", _replaced(Directory, "drop", lambda self, device_pages: None)),
    "freed pages are unmapped too late": Mutant("10", _handed_out_before_freed),
    "nothing is pinned": Mutant("10", _pins_forgotten),
    "only rows of the batch are pinned": Mutant("10", _only_running_rows_are_pinned),
    "pages leave without a store": Mutant("11", _replaced(HostRows, "store", lambda self, *arguments: None)),
    "a page that is handed out stays stored": Mutant("11", lambda: _release_without("stored")),
    "unmapped on the scheduler's stream": Mutant("10", _unmapped_on_the_schedulers_stream),
    "a replay's lists are overwritten by the next head's": Mutant("3, 6", _lists_written_before_the_replay_has_read),
    "requests beyond a batch stay in captured lists": Mutant("6", _requests_beyond_the_batch_stay),
    "built from the device alone": Mutant("4, 5", _built_without_the_host),
    "segments are taken for shared by their places": Mutant(
        "13", _replaced(step_lists, "shared_segments", _shared_by_place)
    ),
    "ids of segments are those of the row before": Mutant("13", _ids_of_the_row_before),
    "only resident segments are made": Mutant("12", _only_resident_segments_are_made),
}


def verdict(mutant: Mutant, worlds: int) -> str | None:
    """The first line of the assertion under which the state machine turned red within so many worlds, or None."""
    from hypothesis import HealthCheck, Phase, seed, settings
    from hypothesis.stateful import run_state_machine_as_test

    from tests.support.machine import COUNTS, FaultyMachine, SchedulerMachine

    COUNTS.clear()
    quiet = settings(
        max_examples=worlds,
        stateful_step_count=50,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    logging.disable(logging.CRITICAL)  # of faults that the machine injects
    with mutant.broken(), contextlib.redirect_stdout(None):
        try:
            run_state_machine_as_test(seed(0)(FaultyMachine if mutant.faults else SchedulerMachine), settings=quiet)
        except (AssertionError, KeyError, ValueError) as error:
            return f"{type(error).__name__}: {error}".splitlines()[0].removeprefix("AssertionError: ")
        finally:
            logging.disable(logging.NOTSET)
    return None


def main(worlds: int = 1000) -> int:
    """Print the table."""
    from tests.support.machine import COUNTS

    survived = 0
    print(f"{'rule':5} {'mutant':42} {'worlds':>6} {'launches':>8} {'s':>4}  turned red by")
    for name, mutant in MUTANTS.items():
        begin = time.monotonic()
        red = verdict(mutant, worlds)
        survived += red is None
        launches = COUNTS["chunk"] + COUNTS["decode"]
        took_s = time.monotonic() - begin
        print(
            f"{mutant.rules:5} {name:42} {COUNTS['worlds']:6} {launches:8} {took_s:4.0f}  {red or 'SURVIVED'}"[:150],
            flush=True,
        )
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
