"""A backend of SGLang's over a pool in two tiers reads of a prefix what it would read of a pool with everything on the device.

On a CPU, with a stand-in that asks the translator and the pool as FlashInfer's and Triton's backends do. Red when: an index
names another token's place; a row comes from the wrong tier; what is written goes into the workspace, or what is read of
another layer comes from it; pages count as resident that may have left; a batch's prefixes are more than a workspace holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

from sglang_clusterkv.clusters.counters import Faults
from sglang_clusterkv.clusters.residency import residency_of
from sglang_clusterkv.clusters.rows import Extend
from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.memory.tier import Reads
from sglang_clusterkv.serving import active, admission, tier_prefill
from sglang_clusterkv.serving.admission import PrefixBudget
from sglang_clusterkv.serving.backend import ClusterKVAttnBackend
from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool
from sglang_clusterkv.serving.tier_prefill import AllResident, TierPrefill
from sglang_clusterkv.serving.translator import TierTranslator

PAGE, PAGES, HEADS, DIM, LAYERS = 16, 120, 2, 32, 2
PREFIXES, NEW = [200, 0, 37, 112], [20, 33, 1, 16]  # tokens of each request
SCALE = 0.3
Rows = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values by layer, [tokens, H, D]


class StandIn:
    """Attention as SGLang's backends take it: prefixes from the pool by indices, new tokens from the model.

    Args:
        writes_first: as Triton's does; FlashInfer's writes behind its kernels.
    """

    def __init__(self, pool: ClusterKVPool, translator: Any, writes_first: bool) -> None:
        self.pool, self.kv_index_translator, self.writes_first = pool, translator, writes_first
        self.indices: list[torch.Tensor] = []

    def init_forward_metadata(self, batch: Any) -> None:
        prefixes = batch.extend_prefix_lens
        indptr = torch.zeros(len(prefixes) + 1, dtype=torch.int32)
        indptr[1:] = torch.cumsum(prefixes, 0)
        out = torch.full((sum(batch.extend_prefix_lens_cpu) + 256,), -1, dtype=torch.int32)
        translated = self.kv_index_translator.pack_read_stream(
            batch.kv_loc_plan, req_pool_indices=batch.req_pool_indices, seq_lens=prefixes, indptr=indptr, out=out
        )
        assert translated, "there is nothing left to translate"
        self.indices = [out[a:b].long() for a, b in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)]

    def forward_extend(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool) -> torch.Tensor:
        if self.writes_first:
            self.pool.set_kv_buffer(layer, KVWriteLoc.for_layer(batch, layer), k, v)
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        output, begin = [], 0
        for indices, new in zip(self.indices, batch.extend_seq_lens_cpu, strict=True):
            own = slice(begin, begin + new)
            output.append(attention(q[own], torch.cat((keys[indices], k[own])), torch.cat((values[indices], v[own]))))
            begin += new
        if not self.writes_first:
            self.pool.set_kv_buffer(layer, KVWriteLoc.for_layer(batch, layer), k, v)
        return torch.cat(output)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of the last tokens of a request over all of it, causal."""
    logits = SCALE * torch.einsum("qhd,khd->hqk", q, keys)
    hidden = torch.ones(len(q), len(keys), dtype=torch.bool).triu(len(keys) - len(q) + 1)
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), values)


class World:
    """A pool in two tiers with the prefixes of a batch, some of which have left the device, and the batch."""

    def __init__(self, config: ClusterKVConfig) -> None:
        self.pool = ClusterKVPool(
            size=PAGES * PAGE,
            page_size=PAGE,
            dtype=torch.float32,
            head_num=HEADS,
            head_dim=DIM,
            layer_num=LAYERS,
            device="cpu",
            enable_memory_saver=False,
            start_layer=3,
        )
        self.tier = self.pool.make_tier(chunk_tokens=sum(NEW), rows=len(NEW))
        self.allocator = ClusterKVAllocator(self.pool.size, PAGE, torch.float32, "cpu", self.pool, need_sort=False)
        self.req_to_token = torch.zeros((8, 320), dtype=torch.int32)
        self.translator = TierTranslator(
            self.tier.directory,
            req_to_token=self.req_to_token,
            token_to_kv_pool_allocator=self.allocator,
            token_to_kv_pool=self.pool,
            page_size=PAGE,
            device="cpu",
        )
        self.resident = AllResident(self.tier, self.allocator)
        self.residency = residency_of(
            self.tier, config, self.req_to_token, self.pool.handed_out, ForwardStream("cpu"), Faults(Counter())
        )
        self.draw = torch.Generator().manual_seed(0)
        self.rows = [5, 1, 7, 2]
        self.prefix_rows = self.rows_of(sum(PREFIXES))
        self.new_rows = self.rows_of(sum(NEW))
        self.fill()

    def rows_of(self, tokens: int) -> Rows:
        shape = (tokens, HEADS, DIM)
        return [(self.random(shape), self.random(shape)) for _ in range(LAYERS)]

    def random(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw)

    def layer(self, local: int) -> Any:
        return SimpleNamespace(layer_id=self.pool.start_layer + local, is_cross_attention=False)

    def head(self, *extends: tuple[int, int, int]) -> None:
        """A forward's: of a prefill of rows, each from a position to another one, or of nothing."""
        if extends:
            self.residency.extend([Extend(row, str(row), begin, end, end, True) for row, begin, end in extends])
        else:
            self.residency.decode(np.empty(0, np.int64), np.empty(0, np.int64))
        self.residency.fill()

    def give(self, row: int, begin: int, tokens: int) -> torch.Tensor:
        """Slots for more tokens of a row; the logical ones."""
        before, after = torch.tensor([begin]), torch.tensor([begin + tokens])
        last = self.req_to_token[row, begin - 1 : begin].long() if begin else torch.tensor([-1])
        slots = self.allocator.alloc_extend(before, before, after, after, last, tokens)
        assert slots is not None
        self.req_to_token[row, begin : begin + tokens] = slots.int()
        return slots

    def write(self, slots: torch.Tensor, rows: Rows) -> None:
        where = self.tier.directory.translate(slots)
        for local, (keys, values) in enumerate(rows):
            self.pool.k_buffer[local][where], self.pool.v_buffer[local][where] = keys, values

    def fill(self) -> None:
        """The prefixes are there. Of each row the last page stays on the device."""
        begin = 0
        for row, tokens in zip(self.rows, PREFIXES, strict=True):
            if tokens:
                slots = self.give(row, 0, tokens)
                self.head((row, 0, tokens))
                self.write(slots, [(k[begin : begin + tokens], v[begin : begin + tokens]) for k, v in self.prefix_rows])
                begin += tokens

    def leave(self, pages: int) -> None:
        """A text passes through, so that pages of the prefixes leave the device."""
        while pages:
            some = min(pages, self.tier.directory.ring_level)
            assert self.allocator.alloc(some * PAGE) is not None
            self.head()
            pages -= some

    def batch(self) -> Any:
        """What SGLang makes of the batch, its slots translated."""
        slots = [self.give(*extend) for extend in zip(self.rows, PREFIXES, NEW, strict=True)]
        self.head(*((row, prefix, prefix + new) for row, prefix, new in zip(self.rows, PREFIXES, NEW, strict=True)))
        prefixes, new = torch.tensor(PREFIXES), torch.tensor(NEW)
        mode = SimpleNamespace(is_decode_or_idle=lambda: False, is_extend=lambda: True)
        made = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=torch.tensor(self.rows),
            seq_lens=prefixes + new,
            seq_lens_cpu=prefixes + new,
            extend_prefix_lens=prefixes,
            extend_prefix_lens_cpu=PREFIXES,
            extend_seq_lens_cpu=NEW,
            out_cache_loc=torch.cat(slots),
        )
        self.slots = torch.cat(slots)
        self.translator.bind_own_plan(made)
        return made

    def backend(self, writes_first: bool) -> ClusterKVAttnBackend:
        backend = object.__new__(ClusterKVAttnBackend)
        backend.prefill = StandIn(self.pool, self.translator, writes_first)  # type: ignore[assignment]
        backend.token_to_kv_pool = self.pool
        backend._tier_prefill = TierPrefill(self.pool, self.translator, self.req_to_token, self.resident)
        return backend

    def away(self) -> torch.Tensor:
        """Whether each token of the prefixes has left the device."""
        slots = [self.req_to_token[row, :n].long() for row, n in zip(self.rows, PREFIXES, strict=True)]
        return self.tier.directory.device_page[torch.cat(slots) // PAGE] == 0


@pytest.fixture
def make_world(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], World]:
    def make(host_dtype: str) -> World:
        config = ClusterKVConfig(host_ratio=2, host_kv_dtype=host_dtype)  # type: ignore[arg-type]
        monkeypatch.setattr(active, "active_config", lambda: config)
        monkeypatch.setattr(admission, "get_parallel", lambda: SimpleNamespace(tp_size=1))
        return World(config)

    return make


def expected(world: World, q: torch.Tensor, local: int, prefix_rows: Rows) -> torch.Tensor:
    """Attention over everything, as it was written."""
    (keys, values), (new_keys, new_values) = prefix_rows[local], world.new_rows[local]
    output, prefix, begin = [], 0, 0
    for tokens, new in zip(PREFIXES, NEW, strict=True):
        own, earlier = slice(begin, begin + new), slice(prefix, prefix + tokens)
        all_keys = torch.cat((keys[earlier], new_keys[own]))
        output.append(attention(q[own], all_keys, torch.cat((values[earlier], new_values[own]))))
        prefix, begin = prefix + tokens, begin + new
    return torch.cat(output)


@pytest.mark.parametrize("writes_first", [False, True], ids=["FlashInfer", "Triton"])
@pytest.mark.parametrize("pressed", [0, 45])
def test_the_output_is_that_of_everything_on_the_device(
    make_world: Callable[[str], World], writes_first: bool, pressed: int
) -> None:
    world = make_world("auto")
    world.leave(pressed)
    backend = world.backend(writes_first)
    batch = world.batch()
    away = world.away()
    assert bool(away.any()) == bool(pressed) and not away.all()
    backend.init_forward_metadata(batch)
    assert bool(world.resident) == (not pressed)
    for local, (keys, values) in enumerate(world.new_rows):
        q = world.random((sum(NEW), HEADS, DIM))
        output = backend.forward_extend(q, keys, values, world.layer(local), batch)
        assert torch.equal(output, expected(world, q, local, world.prefix_rows))
    where = world.tier.directory.translate(world.slots)
    for local, (keys, values) in enumerate(world.new_rows):
        assert torch.equal(world.pool.k_buffer[local][where], keys), "what is written goes to the pool"
        assert torch.equal(world.pool.v_buffer[local][where], values)
    assert torch.equal(world.pool.get_key_buffer(3), world.pool.k_buffer[0]), "the pool answers for itself again"
    read = Reads(*world.tier.reads.tolist()).prefill_host
    assert read == LAYERS * HEADS * int(away.sum())


def test_rounded_rows_are_read_as_they_are_stored(make_world: Callable[[str], World]) -> None:
    world = make_world("int8")
    world.leave(45)
    backend = world.backend(False)
    batch = world.batch()
    away = world.away()
    backend.init_forward_metadata(batch)
    (keys, values), q = world.new_rows[1], world.random((sum(NEW), HEADS, DIM))
    output = backend.forward_extend(q, keys, values, world.layer(1), batch)
    rounded = []
    for of_layer in world.prefix_rows:
        step = [rows.abs().amax(-1, keepdim=True) / 127 for rows in of_layer]
        stored = [
            torch.where(away[:, None, None], (rows / s).round() * s, rows)
            for rows, s in zip(of_layer, step, strict=True)
        ]
        rounded.append((stored[0], stored[1]))
    torch.testing.assert_close(output, expected(world, q, 1, rounded), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output, expected(world, q, 1, world.prefix_rows), rtol=1e-5, atol=1e-5)


def test_a_window_reads_the_end_of_each_prefix(make_world: Callable[[str], World]) -> None:
    """As sliding layers do: with their own lengths, and where in its row each begins."""
    translator = make_world("auto").translator
    prefixes = torch.tensor([200, 0, 37])
    window = prefixes.clamp(max=64)
    indptr = torch.cat((torch.zeros(1, dtype=torch.int64), torch.cumsum(window, 0)))
    out = torch.empty(int(indptr[-1]), dtype=torch.int64)
    with translator.reads_of_workspace(torch.cumsum(prefixes, 0) - prefixes):
        assert translator.pack_read_stream(
            object(),  # type: ignore[arg-type]
            req_pool_indices=torch.tensor([1, 2, 3]),
            seq_lens=window,
            indptr=indptr,
            out=out,
            kv_start_idx=prefixes - window,
        )
    assert out.tolist() == [*range(136, 200), *range(200, 237)]


def test_pages_count_as_resident_until_one_may_have_left(make_world: Callable[[str], World]) -> None:
    world = make_world("auto")
    device, ring = world.tier.directory.device_pages, world.tier.directory.ring_pages
    used = sum(-(-n // PAGE) for n in PREFIXES)
    slots = world.allocator.alloc((device - ring - used) * PAGE)
    assert slots is not None
    world.resident.forward()
    assert world.resident, "a whole ring fits beside them"
    more = world.allocator.alloc(PAGE)
    assert more is not None
    world.resident.forward()
    assert not world.resident
    world.allocator.free(torch.cat((slots, more)))
    world.resident.forward()
    assert not world.resident, "what left does not come back by itself"
    world.allocator.clear()
    assert world.allocator.alloc((device - ring) * PAGE) is not None
    world.resident.forward()
    assert world.resident, "a pool that was cleared has all of its pages on the device"


def test_a_batch_has_as_many_prefix_tokens_as_one_workspace_holds(make_world: Callable[[str], World]) -> None:
    world = make_world("auto")
    control = world.allocator.admission
    assert control is not None
    cache = SimpleNamespace(
        supports_mamba=lambda: False, evictable_size=lambda: 0, supports_prefix_sharing=lambda: False
    )
    assert type(world.allocator.create_prefill_budget(cache)) is PrefillBudget, "on a CPU prefixes are read in place"
    control.most_prefix_tokens = 100

    def admitted(*requests: tuple[int, int]) -> list[bool]:
        """Of requests with so many tokens in all and to prefill, in one pass."""
        budget = world.allocator.create_prefill_budget(cache)
        assert type(budget) is PrefixBudget
        answers = []
        for tokens, new in requests:
            fits, _ = budget.check_prefill(
                extend_input_len=new,
                total_tokens=new + 1,
                max_new_tokens=1,
                input_tokens=tokens,
                swa_host_hit_length=0,
                chunk_limit=64,
            )
            answers.append(fits)
            if fits:
                budget.reserve(new, 1)
        return answers

    assert admitted((70, 10), (60, 20), (20, 20)) == [True, True, True] and not control.waits
    assert admitted((70, 10), (61, 20)) == [True, False] and control.waits, "it is asked again in the next round"
    assert admitted((300, 10), (20, 20)) == [True, True], "one request fits in any case"
    assert admitted((20, 20), (120, 20)) == [True, True]
    budget = world.allocator.create_prefill_budget(cache)
    budget.reserve(16, 1, is_chunked_continuation=True)
    assert not budget.check_prefill(
        extend_input_len=1,
        total_tokens=2,
        max_new_tokens=1,
        input_tokens=2,
        swa_host_hit_length=0,
        chunk_limit=9,
    )[0], "what a chunk that goes on has before it may be all that fits"


@pytest.mark.parametrize(
    ("inner", "refused"),
    [
        ({"prefill_wrapper_ragged": None, "is_multimodal": False, "use_paged": False}, None),
        ({}, None),
        ({"prefill_wrapper_ragged": None, "is_multimodal": True, "use_paged": False}, "multimodal"),
        ({"prefill_wrapper_ragged": None, "is_multimodal": False, "use_paged": True}, "SGLANG_FLASHINFER_USE_PAGED"),
    ],
)
def test_a_backend_that_reads_new_tokens_from_the_pool_is_refused(
    make_world: Callable[[str], World], inner: dict[str, Any], refused: str | None
) -> None:
    world = make_world("auto")
    runner: Any = SimpleNamespace(
        token_to_kv_pool=world.pool,
        token_to_kv_pool_allocator=world.allocator,
        kv_index_translator=world.translator,
        req_to_token_pool=SimpleNamespace(req_to_token=world.req_to_token),
    )
    if refused is None:
        assert isinstance(tier_prefill.of(runner, SimpleNamespace(**inner)), TierPrefill)
    else:
        with pytest.raises(ConfigError, match=refused):
            tier_prefill.of(runner, SimpleNamespace(**inner))
    runner.token_to_kv_pool = SimpleNamespace(tier=None)
    assert tier_prefill.of(runner, SimpleNamespace(**inner)) is None
