"""On a GPU the backend that SGLang would take prefills, unless the configuration names one that runs there.

SGLang's facts about the machine are replaced by those of a GPU; its own rule decides. Red when the choice is another than
SGLang's without us, a backend is taken that cannot run, a refusal names no way out, or a fact of the inner backend that
SGLang's prefill asks for is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from sglang.srt.arg_groups import model_override_base
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import override_platform

from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.serving import prefill_backend
from sglang_clusterkv.serving.backend import ClusterKVAttnBackend
from sglang_clusterkv.serving.prefill_backend import TRTLLM_PAGE_SIZES, choose

DEFAULT = ClusterKVConfig()
A100 = {"is_hopper_with_cuda_12_3": False, "is_sm100": False, "device_capability": (8, 0)}
H100 = {"is_hopper_with_cuda_12_3": True, "is_sm100": False, "device_capability": (9, 0)}
H100_OLD_CUDA = H100 | {"is_hopper_with_cuda_12_3": False}
B200 = {"is_hopper_with_cuda_12_3": False, "is_sm100": True, "device_capability": (10, 0)}
RTX = {"is_hopper_with_cuda_12_3": False, "is_sm100": False, "device_capability": (12, 0)}
MODEL = SimpleNamespace(
    hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]), has_asymmetric_kv=False, has_attention_sinks=False
)


@contextmanager
def machine(facts: dict[str, Any], flashinfer: bool = True) -> Iterator[None]:
    with override_platform(is_hip=False, has_flashinfer=flashinfer, **facts):
        yield


def choice_of_sglang(monkeypatch: pytest.MonkeyPatch) -> str:
    """By SGLang's rule for a machine of its own platforms: here ours is in charge."""
    monkeypatch.setattr(model_override_base, "current_platform", SimpleNamespace(is_out_of_tree=lambda: False))
    arguments = SimpleNamespace(speculative_algorithm=None, speculative_eagle_topk=None, tp_size=1)
    return str(model_override_base.get_default_attn_backend(arguments, False, MODEL))


@pytest.mark.parametrize(
    ("facts", "flashinfer", "name"),
    [
        (A100, True, "flashinfer"),
        (A100, False, "triton"),
        (H100, True, "fa3"),
        (H100, False, "fa3"),
        (H100_OLD_CUDA, True, "flashinfer"),
        (B200, True, "trtllm_mha"),
        (RTX, True, "flashinfer"),
    ],
)
def test_auto_is_what_sglang_would_take(
    facts: dict[str, Any], flashinfer: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with machine(facts, flashinfer):
        own = choice_of_sglang(monkeypatch)
        assert own == name
        assert choose(DEFAULT, SimpleNamespace(page_size=16), own) == name


@pytest.mark.parametrize(
    ("facts", "own", "name"),
    [(H100, "fa3", "fa3"), (B200, "trtllm_mha", "triton"), (RTX, "flashinfer", "triton")],
)
def test_learned_sinks_go_to_a_backend_that_takes_them(facts: dict[str, Any], own: str, name: str) -> None:
    with machine(facts):
        assert choose(DEFAULT, SimpleNamespace(page_size=16), own, sinks=True) == name
        with pytest.raises(ConfigError, match="learned attention sinks: use fa3 or triton, or set it to auto"):
            choose(ClusterKVConfig(prefill_backend="flashinfer"), SimpleNamespace(page_size=16), own, sinks=True)


@pytest.mark.parametrize(("page_size", "name"), [(16, "trtllm_mha"), (128, "trtllm_mha"), (24, "flashinfer")])
def test_pages_that_trtllm_does_not_read_go_to_another(page_size: int, name: str) -> None:
    with machine(B200):
        assert choose(DEFAULT, SimpleNamespace(page_size=page_size), "trtllm_mha") == name
    with machine(B200, flashinfer=False):
        assert choose(DEFAULT, SimpleNamespace(page_size=24), "trtllm_mha") == "triton"


@pytest.mark.parametrize("own", ["fa3", "trtllm_mha", "fa4", "aiter", "torch_native", "a later one"])
def test_what_does_not_read_a_host_tier_or_is_unknown_gives_way(own: str) -> None:
    tier = msgspec.structs.replace(DEFAULT, host_ratio=4.0)
    with machine(H100):
        assert choose(tier, SimpleNamespace(page_size=16), own) == "flashinfer"
        if own not in ("fa3", "trtllm_mha"):
            assert choose(DEFAULT, SimpleNamespace(page_size=16), own) == "flashinfer"
    with machine(H100, flashinfer=False):
        assert choose(tier, SimpleNamespace(page_size=16), own) == "triton"


@pytest.mark.parametrize(
    ("asked", "facts", "flashinfer", "changes", "why"),
    [
        ("fa3", B200, True, {}, "compute capability 8 or 9 and this one has 10.0: use trtllm_mha or flashinfer"),
        ("trtllm_mha", H100, True, {}, "10.0 or 10.3 and this one has 9.0: use fa3 or flashinfer"),
        ("trtllm_mha", B200, True, {"page_size": 24}, "pages of 16, 32, 64 or 128 tokens: use such a --page-size"),
        ("flashinfer", A100, False, {}, "is not installed: use triton"),
        ("fa3", H100, True, {"host_ratio": 2.0}, "some of which are on the host: use flashinfer or triton"),
    ],
)
def test_a_backend_that_does_not_run_is_refused(
    asked: Any, facts: dict[str, Any], flashinfer: bool, changes: dict[str, Any], why: str
) -> None:
    config = ClusterKVConfig(prefill_backend=asked, host_ratio=changes.get("host_ratio", 1.0))
    with machine(facts, flashinfer), pytest.raises(ConfigError) as refused:
        choose(config, SimpleNamespace(page_size=changes.get("page_size", 16)), "flashinfer")
    assert f"prefill_backend={asked} " in str(refused.value) and f"{why}, or set it to auto" in str(refused.value)


@pytest.mark.parametrize("asked", ["fa3", "trtllm_mha", "flashinfer", "triton"])
def test_a_backend_that_runs_is_taken_whatever_sglang_would_take(asked: Any) -> None:
    with machine(B200 if asked == "trtllm_mha" else A100):
        assert choose(ClusterKVConfig(prefill_backend=asked), SimpleNamespace(page_size=16), "flashinfer") == asked


def test_the_sizes_of_trtllm_are_those_of_sglang() -> None:
    import inspect

    from sglang.srt.arg_groups import overrides

    assert f"page_size not in {list(TRTLLM_PAGE_SIZES)}" in inspect.getsource(overrides)


def test_the_choice_is_kept_in_the_resolved_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hook's own function, for the arguments of a server on a GPU."""
    from sglang.srt.arg_groups import overrides

    monkeypatch.setattr(overrides, "model_config_of", lambda record: MODEL)
    monkeypatch.setattr(overrides, "use_mla_backend", lambda view: False)
    monkeypatch.setattr(model_override_base, "current_platform", SimpleNamespace(is_out_of_tree=lambda: False))
    arguments = {"speculative_algorithm": None, "speculative_eagle_topk": None, "tp_size": 1, "page_size": 16}
    with machine(H100):
        resolved = prefill_backend.resolve(DEFAULT, None, SimpleNamespace(device="cuda", **arguments))
        assert resolved == ClusterKVConfig(prefill_backend="fa3")
        on_cpu = SimpleNamespace(device="cpu", **arguments)
        assert prefill_backend.resolve(DEFAULT, None, on_cpu) is DEFAULT
        with pytest.raises(ConfigError, match="prefill_backend=fa3 is for a GPU: leave it out on a CPU"):
            prefill_backend.resolve(resolved, None, on_cpu)


@pytest.mark.parametrize("name", ["fa3", "trtllm_mha", "flashinfer", "triton"])
def test_the_backend_of_that_name_is_made(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in ATTENTION_BACKENDS
    monkeypatch.setitem(ATTENTION_BACKENDS, name, lambda runner: (name, runner))
    assert prefill_backend.create("runner", ClusterKVConfig(prefill_backend=name)) == (name, "runner")  # type: ignore[arg-type, comparison-overlap]


FACTS = {
    "extend_dummy_seqs_capped_by_req_pool": True,
    "supports_prefill_cuda_graph_max_context_size": True,
    "prefill_cuda_graph_default_max_seq_len": 8192,
    "prefill_cuda_graph_max_batch_size": 7,
}


def test_sglang_sees_the_facts_of_the_backend_that_prefills() -> None:
    backend = object.__new__(ClusterKVAttnBackend)
    backend.prefill = None
    assert {name: getattr(backend, name) for name in FACTS} == {name: getattr(AttentionBackend, name) for name in FACTS}
    inner: Any = SimpleNamespace(**FACTS, get_fused_kv_write_buffers=lambda layer, batch: (layer, batch))
    backend.prefill = inner
    assert {name: getattr(backend, name) for name in FACTS} == FACTS


def test_keys_are_written_by_the_model_itself_in_prefill_alone() -> None:
    backend = object.__new__(ClusterKVAttnBackend)
    prefill, decode = (SimpleNamespace(forward_mode=mode) for mode in (ForwardMode.EXTEND, ForwardMode.DECODE))
    backend.prefill = None
    assert backend.get_fused_kv_write_buffers("layer", prefill) is None
    inner: Any = SimpleNamespace(get_fused_kv_write_buffers=lambda layer, batch: (layer, batch))
    backend.prefill = inner
    assert backend.get_fused_kv_write_buffers("layer", prefill) == ("layer", prefill)
    assert backend.get_fused_kv_write_buffers("layer", decode) is None
