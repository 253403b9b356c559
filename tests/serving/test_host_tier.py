"""With a host tier SGLang counts logical pages, and the pool's buffers hold fewer; nothing but writes is translated.

Without a server. Red when: a page that was handed out or freed is not noted, or noted twice; the buffers, the index or SGLang's
counts have another size; an id that is read is translated, or one that is written is not; a start is refused that fits, or
accepted that does not; a sentence names a number that does not fit either; anything of it is there with
host_ratio 1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_clusterkv.clusters.handed_out import PageEvent
from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.memory.tier import least_device_pages, ring_target
from sglang_clusterkv.serving import active, admission, host_tier, scheduler_hooks
from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool
from sglang_clusterkv.serving.translator import TierTranslator

PAGE, PAGES, HEADS, DIM, LAYERS = 16, 100, 2, 32, 2
TIERED = ClusterKVConfig(host_ratio=3, host_kv_dtype="int8")

MakePool = Callable[[ClusterKVConfig], ClusterKVPool]


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> MakePool:
    """A pool as SGLang makes it, of `PAGES` pages, in a process with a configuration."""
    alone(monkeypatch)

    def make(config: ClusterKVConfig) -> ClusterKVPool:
        monkeypatch.setattr(active, "active_config", lambda: config)
        return ClusterKVPool(
            size=PAGES * PAGE,
            page_size=PAGE,
            dtype=torch.float32,
            head_num=HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
        )

    return make


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no other rank."""
    monkeypatch.setattr(admission, "get_parallel", lambda: SimpleNamespace(tp_size=1))


def allocator_of(pool: ClusterKVPool) -> ClusterKVAllocator:
    return ClusterKVAllocator(pool.size, PAGE, torch.float32, "cpu", pool, need_sort=False)


# ---- the pool


def test_the_buffers_have_room_for_a_part_and_everything_else_for_all(make_pool: MakePool) -> None:
    pool = make_pool(TIERED)
    device = 34  # of 100 pages at a ratio of 3
    assert {tuple(buffer.shape) for buffer in pool.k_buffer + pool.v_buffer} == {((device + 1) * PAGE, HEADS, DIM)}
    assert pool.size == PAGES * PAGE and pool.cluster_index is not None
    assert pool.cluster_index.geometry.pages >= PAGES + 1
    index = pool.cluster_index.bytes
    assert sum(pool.get_kv_size_bytes()) == index + 2 * LAYERS * (device + 1) * PAGE * HEADS * DIM * 4
    assert allocator_of(pool).available_size() == pool.size

    tier = pool.make_tier(chunk_tokens=64, rows=2)
    assert tier.directory.logical_pages == PAGES and tier.directory.device_pages == device
    assert tier.directory.ring_pages == ring_target(64, 2, PAGE) == 8
    # A key and a value in 8 bits, with a float32 scale each.
    assert pool.host_bytes_per_token == LAYERS * HEADS * (2 * DIM + 8)
    assert tier.host.bytes == (PAGES + 1) * PAGE * pool.host_bytes_per_token


def test_without_a_tier_nothing_of_it_is_there(make_pool: MakePool) -> None:
    pool = make_pool(ClusterKVConfig())
    assert not pool.tiered and pool.tier is None
    assert pool.k_buffer[0].shape[0] == (PAGES + 1) * PAGE
    allocator = allocator_of(pool)
    slots = allocator.alloc(4 * PAGE)
    assert slots is not None
    allocator.free(slots)
    assert pool.handed_out.take_pages() in ([], [(PageEvent.CLEARED, [])]), "nobody takes notes of pages"
    assert type(allocator.create_prefill_budget(None)) is PrefillBudget


def test_free_pages_in_another_order_than_handed_out_are_refused(make_pool: MakePool) -> None:
    pool = make_pool(TIERED)
    with pytest.raises(AssertionError, match="order"):
        ClusterKVAllocator(pool.size, PAGE, torch.float32, "cpu", pool, need_sort=True)


# ---- what the allocator notes


class Mirror:
    """The free pages as the notes tell of them."""

    def __init__(self, pool: ClusterKVPool) -> None:
        self.pool = pool
        self.free: set[int] = set()

    def follow(self) -> None:
        for event, parts in self.pool.handed_out.take_pages():
            if event is PageEvent.CLEARED:
                self.free = set(range(1, PAGES + 1))
            for pages in parts:
                assert pages.dtype is torch.int64
                noted = pages.tolist()
                assert len(set(noted)) == len(noted) and 0 not in noted
                if event is PageEvent.NEW:
                    assert self.free >= set(noted), "a page was handed out that was not free"
                    self.free -= set(noted)
                else:
                    assert not self.free & set(noted), "a page was freed twice"
                    self.free |= set(noted)


class Sequence:
    """A request's slots, as SGLang asks for them."""

    def __init__(self, allocator: ClusterKVAllocator) -> None:
        self.allocator = allocator
        self.slots = torch.empty(0, dtype=torch.int64)

    def extend(self, tokens: int) -> None:
        before, after = (torch.tensor([n]) for n in (len(self.slots), len(self.slots) + tokens))
        last = self.slots[-1:] if len(self.slots) else torch.tensor([-1])
        new = self.allocator.alloc_extend(before, before, after, after, last, tokens)
        if new is not None:
            self.slots = torch.cat((self.slots, new))

    def decode(self) -> None:
        after = torch.tensor([len(self.slots) + 1])
        new = self.allocator.alloc_decode(after, after, self.slots[-1:])
        if new is not None:
            self.slots = torch.cat((self.slots, new))


@pytest.mark.parametrize("seed", range(8))
def test_every_page_that_leaves_or_comes_back_is_noted_once_and_in_order(make_pool: MakePool, seed: int) -> None:
    pool = make_pool(TIERED)
    allocator = allocator_of(pool)
    mirror, draw = Mirror(pool), random.Random(seed)
    sequences: list[Sequence] = []
    for step in range(300):
        kind = draw.choice(["new", "decode", "decode", "end", "segment", "ids", "group", "whole"])
        if kind == "new":
            sequences.append(Sequence(allocator))
            sequences[-1].extend(draw.randrange(1, 400))
        elif kind == "whole" and allocator.available_size() >= 3 * PAGE:
            slots = allocator.alloc(3 * PAGE)
            assert slots is not None
            allocator.free(slots)
        elif sequences:
            sequence = sequences.pop(draw.randrange(len(sequences)))
            if kind == "decode" and len(sequence.slots):
                for _ in range(draw.randrange(1, 40)):
                    sequence.decode()
                sequences.append(sequence)
            elif kind == "segment":
                allocator.free_segment(sequence.slots.int(), start_pos=0)  # as rows of req_to_token are
            elif kind == "ids":
                allocator.free_page_ids(torch.unique(sequence.slots // PAGE))
            elif kind == "group":
                allocator.free_group_begin()
                allocator.free(sequence.slots)
                if sequences:
                    other = sequences.pop()
                    allocator.free_page_ids(torch.unique(other.slots // PAGE))
                allocator.free_group_end()
            else:
                allocator.free(sequence.slots)
        if step == 150:
            allocator.clear()
            sequences.clear()
        if draw.random() < 0.5:
            mirror.follow()
    mirror.follow()
    assert mirror.free == set(allocator.get_all_free_pages().tolist())


# ---- the translator


@pytest.fixture
def translator(make_pool: MakePool) -> tuple[TierTranslator, ClusterKVPool]:
    pool = make_pool(TIERED)
    tier = pool.make_tier(chunk_tokens=64, rows=2)
    made = TierTranslator(
        tier.directory,
        req_to_token=torch.zeros((3, 64), dtype=torch.int32),
        token_to_kv_pool_allocator=allocator_of(pool),
        token_to_kv_pool=pool,
        page_size=PAGE,
        device="cpu",
    )
    return made, pool


def batch(**fields: Any) -> Any:
    lengths = torch.tensor([40, 5])
    known = {"req_pool_indices": torch.tensor([1, 2]), "seq_lens": lengths, "seq_lens_cpu": lengths}
    return SimpleNamespace(**known | fields)


def test_what_a_forward_writes_is_translated_and_what_it_reads_is_not(
    translator: tuple[TierTranslator, ClusterKVPool],
) -> None:
    made, pool = translator
    assert pool.tier is not None
    pool.tier.directory.map(torch.tensor([57, 9, 80]))
    places = {page: int(pool.tier.directory.device_page[page]) for page in (57, 9, 80)}
    assert set(places.values()) == {1, 2, 3}
    slots = torch.tensor([57 * PAGE, 57 * PAGE + 15, 9 * PAGE + 3, 0, 80 * PAGE + 1])
    written = batch(out_cache_loc=slots)
    made.bind_own_plan(written)
    expected = [places[57] * PAGE, places[57] * PAGE + 15, places[9] * PAGE + 3, 0, places[80] * PAGE + 1]
    assert written.out_cache_loc.tolist() == expected
    assert written.out_cache_loc_virtual.tolist() == slots.tolist(), "SGLang's own accounting keeps its ids"
    assert slots.tolist()[0] == 57 * PAGE

    source = made.read_source(written.kv_loc_plan, req_pool_indices=written.req_pool_indices, bs=2)
    assert source.ids is made.req_to_token and not source.is_translated and source.v2p is None
    assert made.capture_token_capacity(PAGES * PAGE) == (PAGES + 1) * PAGE


def test_a_warm_up_writes_where_it_says(translator: tuple[TierTranslator, ClusterKVPool]) -> None:
    made, _ = translator
    slots = torch.zeros(4, dtype=torch.int64)
    warm_up = batch(out_cache_loc=slots)
    made.bind_runner_slots(warm_up)
    assert warm_up.out_cache_loc is slots


def test_the_translator_is_sglangs_without_a_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active, "active_config", ClusterKVConfig)
    runner = SimpleNamespace(kv_index_translator=object.__new__(KVIndexTranslator))
    before = runner.kv_index_translator
    scheduler_hooks._after_translator(None, runner)
    assert runner.kv_index_translator is before


# ---- sizes


def rows_that_fit(config: ClusterKVConfig, tokens: int, chunk: int, rows: int) -> int:
    return host_tier.rows_that_fit(config, tokens=tokens, chunk_tokens=chunk, page_size=PAGE, rows=rows)


@pytest.mark.parametrize("ratio", [1.5, 3, 8])
@pytest.mark.parametrize("chunk", [64, 512, 4096])
def test_as_many_requests_run_as_the_device_tier_holds_windows_of(ratio: float, chunk: int) -> None:
    config = ClusterKVConfig(host_ratio=ratio)
    for tokens in (2**14, 2**16, 2**20):
        device = host_tier.device_pages(config, tokens // PAGE)
        fits = [
            rows
            for rows in range(1, 100)
            if least_device_pages(config, chunk_tokens=chunk, max_rows=rows, page_size=PAGE) <= device
        ]
        for asked in (1, 7, 99):
            if fits:
                assert rows_that_fit(config, tokens, chunk, asked) == min(asked, fits[-1])
            else:
                with pytest.raises(ConfigError):
                    rows_that_fit(config, tokens, chunk, asked)


@pytest.mark.parametrize("ratio", [1.01, 2, 3.7, 8, 64])
@pytest.mark.parametrize("tokens", [256, 4096, 10000 // PAGE * PAGE])
@pytest.mark.parametrize("chunk", [256, 2048])
def test_a_device_tier_that_is_too_small_is_refused_with_numbers_that_fit(
    ratio: float, tokens: int, chunk: int
) -> None:
    config = ClusterKVConfig(host_ratio=ratio)
    try:
        rows_that_fit(config, tokens, chunk, 1)
    except ConfigError as error:
        said = str(error)
    else:
        return
    enough = int(re.findall(r"raise --max-total-tokens to (\d+)", said)[0])
    assert rows_that_fit(config, enough, chunk, 8) >= 1
    with pytest.raises(ConfigError):
        rows_that_fit(config, enough - PAGE, chunk, 1)
    for smaller in re.findall(r"lower --chunked-prefill-size to (\d+)", said):
        assert int(smaller) % PAGE == 0 and rows_that_fit(config, tokens, int(smaller), 8) >= 1
    for lower in re.findall(r"lower host_ratio to ([\d.]+)", said):
        assert rows_that_fit(ClusterKVConfig(host_ratio=float(lower)), tokens, chunk, 8) >= 1
    assert "\n" not in said


@pytest.mark.parametrize("config", [TIERED, ClusterKVConfig()])
def test_a_model_whose_prompts_sglang_takes_in_one_piece_after_all_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: ClusterKVConfig
) -> None:
    """As Scheduler.init_chunked_prefill decides, behind all that arguments tell."""
    monkeypatch.setattr(active, "active_config", lambda: config)
    scheduler_hooks._after_chunks(None, SimpleNamespace(chunked_prefill_size=512))
    one_piece = SimpleNamespace(chunked_prefill_size=None)
    if config is TIERED:
        with pytest.raises(ConfigError, match="in one piece, .*: leave out host_ratio"):
            scheduler_hooks._after_chunks(None, one_piece)
    else:
        scheduler_hooks._after_chunks(None, one_piece)


@pytest.mark.parametrize(
    ("host_dtype", "kv_dtype", "row"),
    [("auto", torch.float32, 2 * 64 * 4), ("auto", torch.bfloat16, 2 * 64 * 2), ("int8", torch.float32, 2 * 64 + 8)],
)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_token_takes_its_share_of_the_device_and_on_a_cpu_a_host_row(
    device_type: str, host_dtype: Any, kv_dtype: torch.dtype, row: int
) -> None:
    config = ClusterKVConfig(host_ratio=4, host_kv_dtype=host_dtype)
    device = 10 * 3 * 2 * 64 * kv_dtype.itemsize
    taken = host_tier.bytes_per_token(
        config, device_type=device_type, device=device, kv_heads=3, layers=10, head_dim=64, dtype=kv_dtype
    )
    assert taken == device // 4 + (10 * 3 * row if device_type == "cpu" else 0)


def test_memory_that_is_short_is_refused_with_the_tokens_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tier.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**9))
    alone(monkeypatch)

    def check(tokens: int, ranks: int) -> None:
        host_tier.check_memory(TIERED, tokens=tokens, host=tokens * 900, others=tokens * 300, ranks=ranks)

    check(800_000, 1)
    for ranks in (1, 2):
        with pytest.raises(ConfigError, match="host_ratio=3 with 900000 tokens takes") as error:
            check(900_000, ranks)
        fits = int(re.findall(r"use --max-total-tokens (\d+) or less", str(error.value))[0])
        check(fits, ranks)
        assert fits > 800_000 / ranks


def test_the_pool_asks_before_it_takes(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(TIERED)
    monkeypatch.setattr(host_tier.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConfigError, match="use --max-total-tokens"):
        pool.make_tier(chunk_tokens=64, rows=2)
    assert pool.tier is None
