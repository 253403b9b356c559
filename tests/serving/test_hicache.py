"""The seams of SGLang's HiCache, which runs on a GPU alone, as far as they go on a CPU.

Red when: what HiCache loads is not noted as handed out, so that its pages keep the clusters of what was there before; a
forward's head builds clusters before the last forward's load has ended in all layers; the index counts in the host's size.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers import cache_controller
from sglang.srt.managers.cache_controller import LayerDoneCounter
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

from sglang_clusterkv.clusters.stream import ForwardStream
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.index import UNCLUSTERED
from sglang_clusterkv.serving import active, runtime
from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool

PAGE, PAGES, LAYERS = 16, 40, 3


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ClusterKVPool:
    monkeypatch.setattr(active, "active_config", ClusterKVConfig)
    return ClusterKVPool(
        size=PAGES * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=1,
        head_dim=32,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


class Events:
    """Stands for a load's events, one a layer, which are CUDA's: notes which of them a stream waits for."""

    waited: list[tuple[object, int]] = []

    def __init__(self, layers: int) -> None:
        self.finish_event = SimpleNamespace(query=lambda: True)

    def wait(self, layer: int) -> None:
        self.waited.append((self, layer))


@pytest.fixture
def counter(pool: ClusterKVPool, monkeypatch: pytest.MonkeyPatch) -> LayerDoneCounter:
    monkeypatch.setattr(cache_controller, "LayerLoadingEvent", Events)
    monkeypatch.setattr(Events, "waited", [])
    made = LayerDoneCounter(LAYERS)
    pool.register_layer_transfer_counter(made)
    return made


def test_loaded_pages_are_noted_as_handed_out(pool: ClusterKVPool) -> None:
    allocator = ClusterKVAllocator(pool.size, PAGE, torch.bfloat16, "cpu", pool, need_sort=False)
    index = pool.cluster_index
    assert index is not None
    pool.handed_out.apply(index, ForwardStream("cpu"))
    index.page_state[:, 0] = 5
    controller = SimpleNamespace(
        mem_pool_device_allocator=allocator, load_queue=[], _resolve_device_transfers=lambda *args, **kwargs: None
    )
    slots = HybridCacheController.load(controller, torch.arange(4 * PAGE))  # type: ignore[arg-type]
    assert slots is not None and len(controller.load_queue) == 1
    pool.handed_out.apply(index, ForwardStream("cpu"))
    unclustered = torch.nonzero(index.page_state[:, 0] == UNCLUSTERED).flatten()
    assert unclustered.tolist() == sorted(set((slots // PAGE).tolist())) and len(unclustered) == 4


def test_a_head_waits_for_all_layers_of_the_last_forwards_load(
    pool: ClusterKVPool, counter: LayerDoneCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[int] = []  # that were waited for when a head began

    def begin(*args: Any) -> None:
        loads.append(len(Events.waited))

    engine = SimpleNamespace(begin_decode=begin, stream=ForwardStream("cpu"), decoding=SimpleNamespace(room=None))
    monkeypatch.setattr(runtime, "_engine", engine)
    worker = SimpleNamespace(is_draft_worker=False, model_runner=SimpleNamespace(token_to_kv_pool=pool))
    mode = SimpleNamespace(is_decode=lambda: True)
    lengths = torch.tensor([40])
    batch: Any = SimpleNamespace(forward_mode=mode, req_pool_indices_cpu=lengths, seq_lens_cpu=lengths)
    runtime.before_forward(worker, batch)
    assert loads == [0], "nothing was loaded"
    counter.set_consumer(counter.update_producer())  # as forward_batch_generation does behind the hook
    runtime.before_forward(worker, batch)
    assert loads == [0, 1] and Events.waited == [(counter.events[0], LAYERS - 1)]
    counter.set_consumer(-1)
    runtime.before_forward(worker, batch)
    assert loads == [0, 1, 1]


def test_a_pool_without_hicache_waits_for_nothing(pool: ClusterKVPool) -> None:
    assert pool.layer_transfer_counter is None
    pool.wait_for_loads()


def test_what_is_copied_are_the_buffers_that_the_engine_reads(pool: ClusterKVPool) -> None:
    (described,) = pool.get_device_pool_infos()
    buffers = described.buffer_info.buffers
    assert all(told is own for told, own in zip(buffers.k + buffers.v, pool.k_buffer + pool.v_buffer, strict=True))
    (declared,) = pool.host_pool_decls()
    assert declared.device_pool is pool and declared.is_primary


def test_the_hosts_size_is_that_of_keys_and_values(pool: ClusterKVPool) -> None:
    assert pool.cluster_index is not None
    assert pool.host_capacity_bytes == 2 * LAYERS * (PAGES + 1) * PAGE * 32 * 2
    assert pool.host_capacity_bytes == sum(pool.get_kv_size_bytes()) - pool.cluster_index.bytes
