"""While the ring of a host tier is short, prefill waits; a server's part of it is in test_host_tier_server.py.

Red when: a pass takes device pages that are not there, or waits for ever; decode waits too; a rank admits what another one
does not, or asks for the others' opinion in some passes only; a refill between two forwards runs on the scheduler's stream;
the scheduler takes a pass that had to wait for a full batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_clusterkv.clusters import stream as streams
from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.serving import active, admission, scheduler_hooks
from sglang_clusterkv.serving.admission import WaitingBudget
from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool

PAGE = 16
CACHE = SimpleNamespace(supports_mamba=lambda: False, evictable_size=lambda: 0, supports_prefix_sharing=lambda: False)
ASKED: dict[str, Any] = {"extend_input_len": 16, "max_new_tokens": 1, "chunk_limit": 64}


class Engine:
    """Stands for an engine whose refills fail so many times; the ring is full afterwards."""

    def __init__(self, pool: ClusterKVPool, failures: int) -> None:
        self.pool, self.failures, self.tries = pool, failures, 0
        self.residency, self.stream = self, ForwardStream("cpu")

    def refill(self) -> bool:
        self.tries += 1
        if self.tries <= self.failures:
            return False
        directory = self.pool.tier.directory  # type: ignore[union-attr]
        directory.filled(directory.ring_pages - directory.ring_level)
        return True


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> ClusterKVAllocator:
    """Of a pool with a tier, whose ring is full, on one rank."""
    monkeypatch.setattr(active, "active_config", lambda: ClusterKVConfig(host_ratio=3))
    monkeypatch.setattr(admission, "get_parallel", lambda: SimpleNamespace(tp_size=1))
    pool = ClusterKVPool(
        size=100 * PAGE,
        page_size=PAGE,
        dtype=torch.float32,
        head_num=1,
        head_dim=32,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    pool.make_tier(chunk_tokens=64, rows=2)
    return ClusterKVAllocator(pool.size, PAGE, torch.float32, "cpu", pool, need_sort=False)


def engine_of(allocator: ClusterKVAllocator, failures: int) -> Engine:
    pool = allocator.get_kvcache()
    pool.engine = Engine(pool, failures)
    return pool.engine


def make_short(allocator: ClusterKVAllocator) -> None:
    allocator.get_kvcache().tier.directory.take(3)


def test_prefill_waits_while_device_pages_are_short_and_never_for_ever(allocator: ClusterKVAllocator) -> None:
    engine = engine_of(allocator, failures=3)
    full = allocator.create_prefill_budget(CACHE)
    assert type(full) is PrefillBudget and engine.tries == 0
    make_short(allocator)
    passes = 0
    while type(waits := allocator.create_prefill_budget(CACHE)) is not PrefillBudget:
        passes += 1
        assert waits.check_prefill(total_tokens=20, input_tokens=20, swa_host_hit_length=0, **ASKED) == (False, None)
        assert not waits.can_allocate_prefill(paged_input=16, **ASKED)
        assert waits.available_chunk_tokens(64) is None, "a chunk under way is left as it is"
        assert allocator.check_decode_capacity(num_tokens=64, tree_cache=CACHE), "decode goes on, nothing is retracted"
        assert passes < 100
    assert engine.tries == 4 and passes == 2 + 4 + 8, "each failure in a row waits twice as long"
    assert full.check_prefill(total_tokens=20, input_tokens=20, swa_host_hit_length=0, **ASKED) == (True, 64)


def test_a_pass_that_had_to_wait_is_no_full_batch(allocator: ClusterKVAllocator) -> None:
    engine_of(allocator, failures=1)
    scheduler = SimpleNamespace(token_to_kv_pool_allocator=allocator, running_batch=SimpleNamespace(batch_is_full=True))
    allocator.create_prefill_budget(CACHE)
    scheduler_hooks._before_requests(scheduler, [])  # a round of its loop, in which nobody asks for anything
    assert scheduler.running_batch.batch_is_full, "for reasons of SGLang's own"
    make_short(allocator)
    for _ in range(2):  # until a pass has found the ring full again
        assert type(allocator.create_prefill_budget(CACHE)) is WaitingBudget
        scheduler_hooks._before_requests(scheduler, [])
        assert not scheduler.running_batch.batch_is_full
        scheduler.running_batch.batch_is_full = True
    assert type(allocator.create_prefill_budget(CACHE)) is PrefillBudget
    scheduler_hooks._before_requests(scheduler, [])
    assert scheduler.running_batch.batch_is_full


@pytest.mark.parametrize("short", [False, True])
def test_a_rank_admits_what_all_ranks_do(
    allocator: ClusterKVAllocator, monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    votes = iter([1, 0, 0, 1])  # of the other rank
    group = object()
    parallel = SimpleNamespace(tp_size=2, tp_group=SimpleNamespace(cpu_group=group))
    monkeypatch.setattr(admission, "get_parallel", lambda: parallel)

    def all_reduce(votes_of_all: torch.Tensor, operation: object, *, group: object) -> None:
        assert operation == torch.distributed.ReduceOp.MIN and group is parallel.tp_group.cpu_group
        votes_of_all.clamp_(max=next(votes))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    engine = engine_of(allocator, failures=100)
    if short:
        make_short(allocator)
    admitted = [type(allocator.create_prefill_budget(CACHE)) is PrefillBudget for _ in range(4)]
    assert admitted == ([False] * 4 if short else [True, False, False, True])
    assert next(votes, None) is None, "one pass, one vote"
    assert bool(engine.tries) == short


def test_a_refill_between_two_forwards_runs_behind_both_streams(
    allocator: ClusterKVAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams of a GPU, as a list of what is done to them."""
    did: list[str] = []

    class Queue:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Queue) -> None:
            did.append(f"{self.name} waits for {other.name}")

    current = Queue("forward")

    @contextlib.contextmanager
    def use(queue: Queue) -> Iterator[None]:
        did.append(f"on {queue.name}")
        yield
        did.append("back")

    monkeypatch.setattr(streams.torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(streams.torch.cuda, "stream", use)
    engine = engine_of(allocator, failures=0)
    engine.stream = ForwardStream("cuda")
    engine.stream.launched()
    current = Queue("scheduler")
    refill = engine.refill

    def noted() -> bool:
        did.append("refill")
        return refill()

    monkeypatch.setattr(engine, "refill", noted)
    make_short(allocator)
    assert type(allocator.create_prefill_budget(CACHE)) is PrefillBudget
    assert did == ["forward waits for scheduler", "on forward", "refill", "back"]
