"""What a host tier of a pool on a GPU asks for and takes, with stand-ins: no GPU has run it.

Red when: host rows count as the device's memory, or what is on the device as the host's; a rank takes page-locked memory before
another one has asked, or ranks come to different answers; SGLang's prefill may gather more prefixes than its workspace is for.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context

from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.memory.device import metadata_bytes_per_token
from sglang_clusterkv.serving import active, admission, host_tier, scheduler_hooks, translator
from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool

PAGE, PAGES, HEADS, DIM, LAYERS = 16, 100, 2, 32, 2
CONFIG = ClusterKVConfig(host_ratio=3, host_kv_dtype="int8")


class Ranks:
    """The other tensor-parallel ranks: what they find free, and how often all of them have asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *others: int) -> None:
        self.others, self.asked = others, 0
        group = SimpleNamespace(cpu_group=self)
        parallel = SimpleNamespace(
            tp_size=1 + len(others), tp_group=group, attn_tp_size=1 + len(others), attn_dcp_size=1
        )
        monkeypatch.setattr(admission, "get_parallel", lambda: parallel)
        monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)

    def all_reduce(self, least: torch.Tensor, operation: object, *, group: object) -> None:
        assert operation == torch.distributed.ReduceOp.MIN and group is self
        self.asked += 1
        least.clamp_(max=min(self.others))


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> ClusterKVPool:
    """Its tensors are on the CPU; it says that they are on a GPU."""
    monkeypatch.setattr(active, "active_config", lambda: CONFIG)
    made = ClusterKVPool(
        size=PAGES * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    made.device = "cuda:0"
    return made


def free(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(host_tier.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_a_token_of_the_kv_cache_takes_of_the_device_what_lies_there(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(active, "active_config", lambda: CONFIG)
    Ranks(monkeypatch, 0)
    monkeypatch.setattr(runtime_context, "get_schedule", lambda: SimpleNamespace(page_size=PAGE))
    model = SimpleNamespace(head_dim=DIM, get_num_kv_heads=lambda tp_size, dcp_size: 2 * HEADS // tp_size)
    configurator: Any = SimpleNamespace(
        model=None,
        model_config=model,
        layer_info=SimpleNamespace(start_layer=0),
        kv_cache_dtype=torch.bfloat16,
        device=device,
    )
    index = metadata_bytes_per_token(CONFIG, page_size=PAGE, head_dim=DIM, kv_heads=HEADS, layers=LAYERS)
    of_all = LAYERS * HEADS * 2 * DIM * 2
    taken = scheduler_hooks._after_cell_size(of_all, object(), configurator, LAYERS)
    host = LAYERS * HEADS * (2 * DIM + 8)
    assert taken == index + -(-of_all // 3) + (host if device == "cpu" else 0)


def test_of_the_hosts_memory_rows_are_asked_for_alone(pool: ClusterKVPool, monkeypatch: pytest.MonkeyPatch) -> None:
    Ranks(monkeypatch, 10**12)
    host = pool.size * pool.host_bytes_per_token
    free(monkeypatch, 2 * host - 1)
    with pytest.raises(ConfigError, match=rf"takes {2 * host / 1e9:.1f} GB of memory") as error:
        pool.make_tier(chunk_tokens=64, rows=2, ranks=2)
    fits = int(re.findall(r"use --max-total-tokens (\d+) or less", str(error.value))[0])
    assert fits == pool.size - 1 and pool.tier is None
    free(monkeypatch, 2 * host)
    assert pool.make_tier(chunk_tokens=64, rows=2, ranks=2).host.bytes >= host


def test_all_ranks_have_asked_before_one_takes_and_come_to_the_same(
    pool: ClusterKVPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = pool.size * pool.host_bytes_per_token
    ranks = Ranks(monkeypatch, 10 * host, 3 * host - 1)
    free(monkeypatch, 10 * host)
    with pytest.raises(ConfigError, match="are free"):
        pool.make_tier(chunk_tokens=64, rows=2, ranks=3)
    assert ranks.asked == 1, "the rank with least memory decides for all"
    ranks.others = (3 * host,)
    made: list[int] = []
    monkeypatch.setattr("sglang_clusterkv.serving.pool.Tier", lambda *args, **kwargs: made.append(ranks.asked))
    pool.make_tier(chunk_tokens=64, rows=2, ranks=3)
    assert made == [2]


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 8), (2, 4)])
def test_a_server_on_a_gpu_gets_a_tier_and_a_bound_on_prefixes(
    pool: ClusterKVPool, monkeypatch: pytest.MonkeyPatch, nodes: int, ranks: int
) -> None:
    Ranks(monkeypatch, 10**12)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(host_tier, "check_memory", lambda config, **sizes: asked.update(sizes))
    monkeypatch.setattr(translator, "get_schedule", lambda: SimpleNamespace(chunked_prefill_size=64))
    allocator = ClusterKVAllocator(pool.size, PAGE, torch.bfloat16, "cpu", pool, need_sort=False)
    runner: Any = SimpleNamespace(
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=allocator,
        server_args=SimpleNamespace(tp_size=4, dp_size=2, nnodes=nodes),
        max_running_requests=2,
        model_config=SimpleNamespace(context_len=12345),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros((3, 64), dtype=torch.int32)),
        page_size=PAGE,
        device="cuda",
        is_draft_worker=False,
    )
    monkeypatch.setattr(translator, "TierTranslator", lambda directory, **arguments: arguments["device"])
    translator.install(runner)
    assert runner.kv_index_translator == "cuda" and pool.tier is not None
    assert asked["ranks"] == ranks and asked["others"] == 0
    assert allocator.admission is not None and allocator.admission.most_prefix_tokens == 12345
