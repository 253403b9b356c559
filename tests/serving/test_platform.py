"""The CPU platform answers only where there is no accelerator, and gives each rank cores of its own.

Red when it takes over a machine with an accelerator, when a rank gets no core, or when the user's binding is changed.
"""

import os
import pkgutil
from types import SimpleNamespace

import pytest
import sglang.srt.platforms  # before cpu_platform, which SGLang may ask for while it is imported
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.serving import active
from sglang_clusterkv.serving.cpu_platform import ClusterKVCpuPlatform
from sglang_clusterkv.serving.platform import (
    OMP_BINDING,
    OVERLAP,
    SLEEP,
    accelerator_found,
    activate,
    apply_thread_count,
    default_omp_binding,
    thread_count,
)
from sglang_clusterkv.serving.pool import ClusterKVAllocator, ClusterKVPool


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)


def test_it_answers_where_no_accelerator_is_found(no_accelerator):
    assert pkgutil.resolve_name(activate()) is ClusterKVCpuPlatform


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps", "npu", "hpu", "musa"])
def test_it_is_silent_where_one_is_found(no_accelerator, monkeypatch, name):
    monkeypatch.setattr(torch, name, SimpleNamespace(is_available=lambda: True), raising=False)
    assert accelerator_found() and activate() is None


def test_it_leaves_sglangs_own_cpu_platform_to_those_who_ask_for_it(no_accelerator, monkeypatch):
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert activate() is None


def test_the_device_is_a_string():
    assert ClusterKVCpuPlatform().get_device() == "cpu"
    assert ClusterKVCpuPlatform().is_out_of_tree()


def test_a_profile_of_a_server_records_the_cpu_as_torch_names_it():
    """POST /start_profile ended the server's scheduler where a platform from outside had no answer."""
    platform = ClusterKVCpuPlatform()
    activity = platform.get_torch_profiler_activity()
    assert getattr(torch.profiler.ProfilerActivity, platform.get_torch_profiler_activity_str()) is activity


def test_sglang_takes_it_while_it_is_being_imported():
    # Whichever module comes first, SGLang must not meet a half-imported platform and fall back to another one.
    assert isinstance(sglang.srt.platforms.current_platform, ClusterKVCpuPlatform) or accelerator_found()


def arguments_of(attention="clusterkv", prefill=None, decode=None, tp_size=1):
    """What the platform reads of SGLang's arguments."""
    backends = {
        "attention_backend": attention,
        "prefill_attention_backend": prefill,
        "decode_attention_backend": decode,
    }
    sizes = {"dp_size": 1, "tp_size": tp_size, "pp_size": 1}
    names = ("disable_overlap_schedule", "enable_hierarchical_cache", "enable_prefill_delayer", "sleep_on_idle")
    return SimpleNamespace(**sizes, **dict.fromkeys(names, False), **backends)


@pytest.mark.parametrize(
    "backends", [("clusterkv", None, None), ("torch_native", None, "clusterkv"), ("torch_native",) * 3]
)
@pytest.mark.parametrize("wanted", [None, "1", "0"])
def test_a_result_does_not_wait_for_the_next_forward_unless_that_is_asked_for(monkeypatch, wanted, backends):
    """An overlapped forward is one that runs elsewhere; here its result would come a whole step late."""
    monkeypatch.setenv(OMP_BINDING, "0")
    monkeypatch.delenv(OVERLAP, raising=False)
    if wanted is not None:
        monkeypatch.setenv(OVERLAP, wanted)
    arguments = arguments_of(*backends)
    ClusterKVCpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.disable_overlap_schedule is (wanted != "1" and "clusterkv" in backends)


def test_the_prefill_delayer_has_the_overlap_that_it_wants_and_a_scheduler_that_is_awake(monkeypatch):
    for name in (OVERLAP, SLEEP):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(OMP_BINDING, "0")
    arguments = arguments_of("clusterkv", None, None)
    arguments.enable_prefill_delayer = True
    ClusterKVCpuPlatform().apply_server_args_defaults(arguments)
    assert not arguments.disable_overlap_schedule and not arguments.sleep_on_idle


@pytest.mark.parametrize(
    ("attention", "hicache", "wanted", "sleeps"),
    [
        ("clusterkv", False, None, True),
        ("clusterkv", False, "1", True),
        ("clusterkv", False, "0", False),
        ("clusterkv", True, None, False),
        ("torch_native", False, None, False),
    ],
)
def test_a_scheduler_that_has_nothing_to_do_takes_no_core(monkeypatch, attention, hicache, wanted, sleeps):
    """HiCache's copies end without a message that would wake it."""
    monkeypatch.setenv(OMP_BINDING, "0")
    monkeypatch.delenv(SLEEP, raising=False)
    if wanted is not None:
        monkeypatch.setenv(SLEEP, wanted)
    arguments = arguments_of(attention)
    arguments.enable_hierarchical_cache = hicache
    ClusterKVCpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.sleep_on_idle is sleeps


def test_who_asks_for_sleep_gets_it(monkeypatch):
    monkeypatch.setenv(OMP_BINDING, "0")
    monkeypatch.setenv(SLEEP, "0")
    arguments = arguments_of()
    arguments.sleep_on_idle = True
    ClusterKVCpuPlatform().apply_server_args_defaults(arguments)
    assert arguments.sleep_on_idle


@pytest.mark.parametrize(
    ("cores", "tp_size", "binding"),
    [([0, 1], 1, "0"), ([0, 1], 2, "0|1"), ([4, 5, 6, 7], 2, "4|5"), ([3], 2, "3|3"), ([0, 1], 3, "0|1|0")],
)
def test_each_rank_has_a_core(cores, tp_size, binding):
    assert default_omp_binding(cores, tp_size) == binding


@pytest.mark.parametrize(
    ("binding", "rank", "threads"),
    [("0", 0, 1), ("0|1", 1, 1), ("0-3|4-7", 1, 4), ("0,2,4-5", 0, 4), ("0", 1, None), ("all", 0, None), ("", 0, None)],
)
def test_a_binding_says_how_many_threads_a_rank_has(binding, rank, threads):
    assert thread_count(binding, rank) == threads


def test_threads_are_set_from_the_binding_unless_openmp_is_told(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(OMP_BINDING, "0-1|2")
    apply_thread_count(0)
    apply_thread_count(1)
    apply_thread_count(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    apply_thread_count(0)
    assert chosen == [2, 1]


def test_a_later_engine_gets_a_binding_of_its_own_but_never_instead_of_the_users(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(ClusterKVCpuPlatform, "_written_binding", None)
    monkeypatch.setenv(OMP_BINDING, "")
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is put back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    platform = ClusterKVCpuPlatform()
    for tp_size, binding in ((1, "0"), (2, "0|1")):
        platform.apply_server_args_defaults(arguments_of(tp_size=tp_size))
        assert os.environ[OMP_BINDING] == binding
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv(OMP_BINDING, "0-1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    platform.apply_server_args_defaults(arguments_of())
    assert os.environ[OMP_BINDING] == "0-1" and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_pool_and_allocator_are_sglangs_unless_clusterkv_is_active(monkeypatch):
    platform = ClusterKVCpuPlatform()
    monkeypatch.setattr(active, "active_config", lambda: None)
    assert platform.get_kv_pool_cls(kind="mha") is None and platform.get_paged_allocator_cls() is None
    monkeypatch.setattr(active, "active_config", ClusterKVConfig)
    assert platform.get_kv_pool_cls(kind="mha") is ClusterKVPool
    assert platform.get_paged_allocator_cls() is ClusterKVAllocator
    assert platform.get_kv_pool_cls(kind="mla") is None
