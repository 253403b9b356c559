"""What cannot be served is refused at start with its reason and the alternative, and nothing else is.

The table is asked with made-up arguments, one row at a time; then SGLang itself resolves real ones. Red when a row does
not fire, fires for what is served, a refusal prints a traceback, or an argument changes that should not.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_clusterkv.clusters.rows import DenseReason
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory import movement
from sglang_clusterkv.serving import active, compat, plugin
from sglang_clusterkv.serving.compat import (
    HOST_TIER_REFUSALS,
    RECALL_EXTEND_REFUSALS,
    REFUSALS,
    TRACE_REFUSALS,
)
from sglang_clusterkv.serving.compat_page import compatibility_markdown
from sglang_clusterkv.serving.model_facts import ModelFacts
from sglang_clusterkv.serving.platform import accelerator_found

SERVED = {
    "device": "cpu",
    "page_size": 16,
    "chunked_prefill_size": 4096,
    "attention_backend": "clusterkv",
    "prefill_attention_backend": None,
    "decode_attention_backend": None,
    "speculative_algorithm": None,
    "enable_mixed_chunk": False,
    "disaggregation_mode": "null",
    "encoder_only": False,
    "enable_pdmux": False,
    "enable_two_batch_overlap": False,
    "pp_size": 1,
    "enable_dp_attention": False,
    "attn_dp_size": 1,
    "moe_a2a_backend": "none",
    "moe_dense_tp_size": None,
    "tp_size": 1,
    "kv_canary": "none",
    "kv_cache_dtype": "auto",
    "dcp_size": 1,
    "enable_prefill_cp": False,
    "attn_cp_size": 1,
    "cuda_graph_config": None,
    "cuda_graph_backend_prefill": None,
    "cuda_graph_backend_decode": None,
    "disable_cuda_graph": False,
    "disable_decode_cuda_graph": False,
    "debug_cuda_graph": False,
    "enable_torch_compile": False,
    "enable_hierarchical_cache": False,
    "hicache_storage_backend": None,
    "hicache_host_memory_mode": "cache",
    "enable_lmcache": False,
    "enable_flexkv": False,
    "enable_unified_cache_external_linker": False,
    "radix_cache_backend": None,
    "enable_hisparse": False,
    "enable_nvidia_megakernel": False,
    "enable_forward_pass_metrics": False,
    "enable_mis": False,
    "enable_deterministic_inference": False,
    "rl_on_policy_target": None,
    "enable_kv_cache_sharding": False,
    "enable_page_major_kv_layout": False,
    "enable_unified_memory": False,
    "dllm_algorithm": None,
    "enable_lora": None,
    "lora_paths": None,
    "enable_memory_saver": False,
    "use_ray": False,
    "is_embedding": False,
}
MODEL = ModelFacts(head_dim=64, v_head_dim=64)
HICACHE = {"enable_hierarchical_cache": True}
FULL = SimpleNamespace(prefill=SimpleNamespace(backend="full"))

# (row, changed arguments, changed model facts, environment)
CASES = [
    ("device", {"device": "xpu"}, {}, {}),
    ("page size 1", {"page_size": 1}, {}, {}),
    ("chunks of part pages", {"page_size": 24}, {}, {}),
    ("split backends", {"prefill_attention_backend": "flashinfer"}, {}, {}),
    ("split backends", {"decode_attention_backend": "triton"}, {}, {}),
    ("split backends", {"attention_backend": "triton", "decode_attention_backend": "clusterkv"}, {}, {}),
    ("speculative decoding", {"speculative_algorithm": "EAGLE"}, {}, {}),
    ("mixed chunk", {"enable_mixed_chunk": True}, {}, {}),
    ("PD disaggregation", {"disaggregation_mode": "decode"}, {}, {}),
    ("PD disaggregation", {"disaggregation_mode": "prefill"}, {}, {}),
    ("PD disaggregation", {"encoder_only": True}, {}, {}),
    ("PD multiplexing", {"enable_pdmux": True}, {}, {}),
    ("two-batch overlap", {"enable_two_batch_overlap": True}, {}, {}),
    ("pipeline parallelism", {"pp_size": 2}, {}, {}),
    ("padded batches", {"enable_dp_attention": True}, {}, {}),
    ("padded batches", {"attn_dp_size": 2}, {}, {}),
    ("padded batches", {"moe_a2a_backend": "deepep"}, {}, {}),
    ("padded batches", {"moe_dense_tp_size": 1}, {}, {}),
    ("KV canary", {"kv_canary": "log"}, {}, {}),
    ("quantized KV", {"kv_cache_dtype": "mxfp8"}, {}, {}),
    ("quantized KV", {"kv_cache_dtype": "nvfp4"}, {}, {}),
    ("decode context parallelism", {"dcp_size": 2}, {}, {}),
    ("prefill context parallelism", {"enable_prefill_cp": True}, {}, {}),
    ("prefill context parallelism", {"attn_cp_size": 2}, {}, {}),
    ("full prefill graph", {"cuda_graph_backend_prefill": "full"}, {}, {}),
    ("full prefill graph", {"cuda_graph_config": {"prefill": {"backend": "full"}}}, {}, {}),
    ("full prefill graph", {"cuda_graph_config": FULL}, {}, {}),
    ("broken decode graphs", {"device": "cuda", "cuda_graph_backend_decode": "breakable"}, {}, {}),
    ("broken decode graphs", {"device": "cuda", "cuda_graph_config": {"decode": {"backend": "breakable"}}}, {}, {}),
    ("broken decode graphs", {"device": "cuda", "debug_cuda_graph": True}, {}, {}),
    ("torch.compile", {"device": "cuda", "enable_torch_compile": True}, {}, {}),
    ("metadata glue graph", {"device": "cuda"}, {}, {"SGLANG_ENABLE_METADATA_GLUE_GRAPH": "1"}),
    ("HiCache on a CPU", HICACHE, {}, {}),
    ("HiCache on a CPU", HICACHE | {"hicache_storage_backend": "file"}, {}, {}),
    ("HiCache with storage", HICACHE | {"device": "cuda", "hicache_storage_backend": "file"}, {}, {}),
    ("HiCache with storage", HICACHE | {"device": "cuda", "hicache_host_memory_mode": "buffer_only"}, {}, {}),
    ("other KV stores", {"enable_lmcache": True}, {}, {}),
    ("other KV stores", {"enable_flexkv": True}, {}, {}),
    ("other KV stores", {"enable_unified_cache_external_linker": True}, {}, {}),
    ("other radix cache", {"radix_cache_backend": "mine"}, {}, {}),
    ("HiSparse", {"enable_hisparse": True}, {}, {}),
    ("megakernel", {"enable_nvidia_megakernel": True}, {}, {}),
    ("multi-item scoring", {"enable_mis": True}, {}, {}),
    ("deterministic inference", {"enable_deterministic_inference": True}, {}, {}),
    ("deterministic inference", {"rl_on_policy_target": "fsdp"}, {}, {}),
    ("KV sharding", {"enable_kv_cache_sharding": True}, {}, {}),
    ("other KV layouts", {"enable_page_major_kv_layout": True}, {}, {}),
    ("other KV layouts", {"enable_unified_memory": True}, {}, {}),
    ("other KV layouts", {}, {}, {"SGLANG_USE_HND_KVCACHE": "true"}),
    ("post-capture KV sizing", {}, {}, {"SGLANG_ENABLE_POST_CAPTURE_KV_SIZING": "1"}),
    ("diffusion models", {"dllm_algorithm": "LowConfidence"}, {}, {}),
    ("LoRA on a CPU", {"enable_lora": True}, {}, {}),
    ("LoRA on a CPU", {"lora_paths": ["a=/b"]}, {}, {}),
    ("memory saver on a CPU", {"enable_memory_saver": True}, {}, {}),
    ("forward-pass metrics on a CPU", {"enable_forward_pass_metrics": True}, {}, {}),
    ("forward-pass metrics on a CPU", {}, {}, {"SGLANG_ENABLE_METRICS_DEVICE_TIMER": "1"}),
    ("Ray", {"use_ray": True}, {}, {}),
    ("MLA", {}, {"mla": True}, {}),
    ("encoder-decoder", {}, {"encoder_decoder": True}, {}),
    ("own sparse attention", {}, {"own_sparse": True}, {}),
    ("hybrid linear", {}, {"hybrid_linear": True}, {}),
    ("hybrid SWA", {}, {"hybrid_swa": True}, {}),
    ("chunked attention", {}, {"chunked_attention": True}, {}),
    ("no generation", {"is_embedding": True}, {}, {}),
    ("no generation", {}, {"generates": False}, {}),
    ("models with backends of their own", {}, {"own_backends": True}, {}),
    ("logit cap", {}, {"logit_cap": 50.0}, {}),
    ("different value size", {}, {"v_head_dim": 128}, {}),
    ("large head size", {"device": "cuda"}, {"head_dim": 512, "v_head_dim": 512}, {}),
    ("odd head size", {}, {"head_dim": 72, "v_head_dim": 72}, {}),
]


@pytest.mark.parametrize(("name", "arguments", "facts", "environment"), CASES)
def test_each_row_refuses_its_case_and_no_other(monkeypatch, name, arguments, facts, environment):
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    changed, model = SimpleNamespace(**SERVED | arguments), replace(MODEL, **facts)
    rows = [row for row in REFUSALS if row.applies(changed, model)]
    assert [row.name for row in rows] == [name]
    assert compat.refusal(changed, model) == f"--attention-backend clusterkv cannot serve this: {rows[0].sentence}"


HOST_TIER_CASES = [
    ("host tier and HiCache", HICACHE | {"device": "cuda"}, {}),
    ("host tier without chunks", {"chunked_prefill_size": -1}, {}),
    ("host tier and shared KV", {}, {"shared_kv": True}),
]


@pytest.mark.parametrize(("name", "arguments", "facts"), HOST_TIER_CASES)
def test_a_host_tier_is_refused_where_all_on_the_device_is_served(name, arguments, facts):
    changed, model = SimpleNamespace(**SERVED | arguments), replace(MODEL, **facts)
    rows = [row for row in HOST_TIER_REFUSALS if row.applies(changed, model)]
    assert [row.name for row in rows] == [name]
    said = compat.refusal(changed, model, host_tier=True)
    assert said == f"--attention-backend clusterkv cannot serve this: {rows[0].sentence}"
    assert compat.refusal(changed, model) is None
    for served in ({}, {"tp_size": 2}, {"device": "cuda"}, {"device": "cuda:1", "tp_size": 4}):
        assert compat.refusal(SimpleNamespace(**SERVED | served), MODEL, host_tier=True) is None


def test_traces_are_refused_where_a_rank_has_some_of_the_kv_heads():
    changed = SimpleNamespace(**SERVED | {"tp_size": 2})
    said = compat.refusal(changed, MODEL, trace=True)
    assert said == f"--attention-backend clusterkv cannot serve this: {TRACE_REFUSALS[0].sentence}"
    assert compat.refusal(changed, MODEL) is None
    assert compat.refusal(SimpleNamespace(**SERVED), MODEL, trace=True) is None


def test_traces_are_refused_where_no_response_would_have_them(monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    served = SimpleNamespace(**SERVED)
    assert "hands no traces on: unset SGLANG_RUST_SERVER" in (compat.refusal(served, MODEL, trace=True) or "")
    assert compat.refusal(served, MODEL) is None


def test_recalled_extends_are_refused_on_a_gpu():
    changed = SimpleNamespace(**SERVED | {"device": "cuda"})
    said = compat.refusal(changed, MODEL, recall_extends=True)
    assert said == f"--attention-backend clusterkv cannot serve this: {RECALL_EXTEND_REFUSALS[0].sentence}"
    assert compat.refusal(changed, MODEL) is None
    assert compat.refusal(SimpleNamespace(**SERVED), MODEL, recall_extends=True) is None


def test_values_move_on_a_cpu_unless_set():
    for device, expected in (("cpu", "always"), ("cuda", "never")):
        assert movement.resolve(ClusterKVConfig(), device).moving_values == expected
        for said in ("always", "never"):
            named = ClusterKVConfig(moving_values=said)
            assert movement.resolve(named, device) == named


def test_every_row_has_a_case_and_says_what_to_do():
    assert {name for name, *_ in CASES} == {row.name for row in REFUSALS}
    assert {name for name, *_ in HOST_TIER_CASES} == {row.name for row in HOST_TIER_REFUSALS}
    assert [row.name for row in TRACE_REFUSALS] == ["traces and tensor parallelism", "traces and SGLang's Rust server"]
    for row in (*REFUSALS, *HOST_TIER_REFUSALS, *TRACE_REFUSALS, *RECALL_EXTEND_REFUSALS):
        assert any(word in row.sentence for word in ("leave", "use ", "unset", "pass ", "change ")), row.name


def test_amd_gpus_are_refused_though_torch_calls_them_cuda(monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA GPUs and on the CPU only" in (compat.refusal(SimpleNamespace(**SERVED | {"device": "cuda"})) or "")
    assert compat.refusal(SimpleNamespace(**SERVED)) is None


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"device": "cuda:0", "page_size": 64, "enable_lora": True, "enable_memory_saver": True},
        {"kv_cache_dtype": "bf16"},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"device": "cuda", "enable_hierarchical_cache": True, "enable_forward_pass_metrics": True},
        {"page_size": None, "device": None},
    ],
)
def test_what_is_served_is_not_refused(arguments):
    view = SimpleNamespace(**SERVED | arguments)
    assert compat.refusal(view, MODEL) is None and compat.refusal(view) is None


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The configuration of a small Llama, all that resolution reads of a model."""
    path = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "max_position_embeddings": 8192,
        "vocab_size": 512,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def resolve(model_path, monkeypatch):
    """Resolves the arguments of a command line as SGLang's launcher does; gives (record, resolved view)."""
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0")
    load_plugins()

    def run(*arguments, model=model_path):
        record = prepare_server_args(["--model-path", str(model), "--device", "cpu", *arguments])
        record.resolve_once()
        return record, resolved_view(record)

    return run


CLUSTERKV = ("--attention-backend", "clusterkv")
ON_A_CPU = ClusterKVConfig(moving_values="always")  # the defaults, as they are resolved


def test_the_page_size_is_16_unless_set(resolve):
    record, view = resolve(*CLUSTERKV)
    assert view.page_size == 16 and active.config_of(record) == ON_A_CPU
    record, view = resolve(*CLUSTERKV, "--page-size", "64")
    assert view.page_size == 64 and active.config_of(record) == ClusterKVConfig(
        sink_tokens=64, window_tokens=128, moving_values="always"
    )


def test_the_flag_reaches_every_process(resolve, monkeypatch):
    import pickle

    monkeypatch.setenv("SGLANG_CLUSTERKV_CONFIG", '{"budget_tokens": 100}')
    record, view = resolve(*CLUSTERKV, "--clusterkv-config", '{"budget_tokens": 200}')
    assert view.cuda_graph_config.decode.backend == "disabled"
    assert active.config_of(pickle.loads(pickle.dumps(record))).budget_tokens == 200
    record, _ = resolve(*CLUSTERKV)
    assert active.config_of(record).budget_tokens == 100


@pytest.mark.parametrize("ratio", [1, 4])
def test_with_a_host_tier_prefill_graphs_are_off(resolve, ratio):
    config = json.dumps({"host_ratio": ratio})
    tokens = ("--max-total-tokens", "65536", "--chunked-prefill-size", "512")
    _, view = resolve(*CLUSTERKV, *tokens, "--clusterkv-config", config, "--cuda-graph-backend-prefill", "breakable")
    assert view.cuda_graph_config.prefill.backend == ("breakable" if ratio == 1 else "disabled")


def test_arguments_that_were_resolved_without_the_plugin_end_the_start(resolve):
    """As in a program that makes ServerArgs before it loads SGLang's plugins: everything would be served densely."""
    record, _ = resolve(*CLUSTERKV)
    delattr(record, active._RESOLVED)
    for role in ("tokenizer", "scheduler"):
        with pytest.raises(plugin.ConfigError, match="load_plugins"):
            plugin._after_publish(None, record, role=role)


def test_without_the_backend_nothing_is_declared(resolve):
    record, view = resolve("--attention-backend", "torch_native")
    assert active.config_of(record) is None and view.page_size == 1
    assert "clusterkv" not in [source for source, _ in record._resolved_overrides]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--page-size", "1"), "--page-size 1 has no pages"),
        (("--page-size", "24"), "--chunked-prefill-size is not a multiple of --page-size"),
        (("--enable-mixed-chunk",), "--enable-mixed-chunk"),
        (("--enable-hierarchical-cache",), "for --enable-hierarchical-cache by CUDA's driver: leave it out on a CPU"),
        (("--kv-cache-dtype", "nvfp4"), "it clusters keys in bf16"),
        (("--speculative-algorithm", "NGRAM"), "leave out --speculative-algorithm"),
        (("--decode-attention-backend", "torch_native"), "prefill and decode must both use it"),
        (("--enable-deterministic-inference",), "deterministic inference"),
        (("--cuda-graph-backend-prefill", "full"), "use --cuda-graph-backend-prefill breakable"),
        (("--pp-size", "2"), "leave out --pp-size"),
        (("--attn-dp-size", "2", "--tp-size", "2"), "data-parallel attention"),
        (("--kv-canary", "log"), "--kv-canary knows SGLang's own KV pools only"),
        (("--clusterkv-config", '{"tokens_per_cluster": 12}'), "tokens_per_cluster=12: use 4, 8 or 16"),
        (("--clusterkv-config", '{"budget_token": 12}'), "did you mean budget_tokens?"),
        (("--chunked-prefill-size", "-1", "--clusterkv-config", '{"host_ratio": 4}'), "takes prompts in chunks"),
        (("--enable-memory-saver", "--clusterkv-config", '{"host_ratio": 4}'), "leave out --enable-memory-saver"),
        (("--enable-hierarchical-cache", "--clusterkv-config", '{"host_ratio": 4}'), "--enable-hierarchical-cache"),
        (
            ("--max-total-tokens", "4096", "--chunked-prefill-size", "512", "--clusterkv-config", '{"host_ratio": 8}'),
            "raise --max-total-tokens to 13456",
        ),
        (("--clusterkv-config", '{"host_ratio": 4, "dense_layers": 1}'), "set dense_layers to 0 or host_ratio to 1"),
        (("--clusterkv-config", '{"dense_layers": 2}'), "none of this model's 2 layers to recall in: use 1 or less"),
    ],
)
def test_a_refusal_ends_a_command_line_with_its_sentence(resolve, arguments, sentence):
    with pytest.raises(SystemExit) as end:
        resolve(*CLUSTERKV, *arguments)
    assert str(end.value.code).startswith("sglang-clusterkv: ") and sentence in str(end.value.code)


@pytest.mark.skipif(accelerator_found(), reason="on a machine without an accelerator")
def test_a_gpu_that_torch_does_not_find_is_named(resolve):
    with pytest.raises(SystemExit) as end:
        resolve(*CLUSTERKV, "--device", "cuda")
    assert str(end.value.code) == (
        "sglang-clusterkv: torch finds no GPU for --device cuda: let it see one, or use --device cpu"
    )


MLA_MODEL = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_dim": 72}, "this model's head size is not a multiple of 16"),
        ({"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}, "Mamba or linear attention"),
        ({"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}, "chunked attention is not"),
        (MLA_MODEL, "MLA attention has no keys"),
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 64}, "caps its attention logits"),
        ({"architectures": ["Grok1ForCausalLM"]}, "caps its attention logits"),
        ({"architectures": ["Gemma4ForCausalLM"]}, "a few of its own backends only"),
        ({"architectures": ["Exaone4ForCausalLM"], "sliding_window_pattern": "LLLG"}, "a few of its own backends only"),
    ],
)
def test_a_model_that_is_not_served_is_refused(resolve, model_path, tmp_path, changes, sentence):
    config = json.loads((model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(SystemExit) as end:
        resolve(*CLUSTERKV, model=tmp_path)
    assert sentence in str(end.value.code)


SHARED_KV = [
    {"num_kv_shared_layers": 1},
    {"use_cla": True, "cla_share_factor": 2},
]


@pytest.mark.parametrize("changes", SHARED_KV)
def test_layers_that_share_kv_are_refused_with_a_host_tier_alone(resolve, model_path, tmp_path, changes):
    config = json.loads((model_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    resolve(*CLUSTERKV, model=tmp_path)
    resolve(*CLUSTERKV, "--clusterkv-config", '{"host_ratio": 4}')
    with pytest.raises(SystemExit) as end:
        resolve(*CLUSTERKV, "--clusterkv-config", '{"host_ratio": 4}', model=tmp_path)
    assert "read another layer's KV densely" in str(end.value.code)


def test_learned_attention_sinks_are_served(resolve, model_path, tmp_path):
    """SGLang itself names the backends that serve gpt-oss, and ours is none of them."""
    config = json.loads((model_path / "config.json").read_text())
    gpt_oss = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "head_dim": 64, "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(config | gpt_oss))
    record, _ = resolve(*CLUSTERKV, "--disable-hybrid-swa-memory", model=tmp_path)
    assert active.config_of(record) == ON_A_CPU
    from sglang.srt.arg_groups import model_hook, overrides

    assert overrides.attention_backends_of(overrides.resolved_view(record)) == ("clusterkv", "clusterkv")
    assert model_hook.attention_backends_of is overrides.attention_backends_of


def test_models_with_sliding_layers_in_one_pool_are_served(resolve, model_path, tmp_path):
    config = json.loads((model_path / "config.json").read_text())
    gemma = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 512, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | gemma))
    record, _ = resolve(*CLUSTERKV, model=tmp_path)
    assert active.config_of(record) == ON_A_CPU


@pytest.mark.parametrize(
    ("layers", "reasons"),
    [
        ([{"sliding_window_size": 512}, {}], set()),
        ([{"sliding_window_size": 512}, {"logit_cap": 30.0}], {"sliding", "logit_cap"}),
        ([{}, {"sliding_window_size": 512}], {"first_layers", "sliding"}),
        ([], set()),
    ],
)
def test_a_model_in_which_no_layer_recalls_is_found_once_it_is_loaded(layers, reasons):
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_clusterkv.serving.backend import ClusterKVAttnBackend

    backend = object.__new__(ClusterKVAttnBackend)
    backend.engine = SimpleNamespace(config=ClusterKVConfig(dense_layers=1))
    made = [RadixAttention(2, 64, 0.1, num_kv_heads=1, layer_id=i, **kind) for i, kind in enumerate(layers)]
    assert backend.reasons_of_all(torch.nn.ModuleList(made)) == reasons


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ({"attn_type": "encoder_only"}, "attention of type encoder_only (layer 1)"),
        ({"attn_type": "decoder_bidirectional"}, "attention of type decoder_bidirectional (layer 1)"),
        ({"is_cross_attention": True}, "cross-attention (layer 1)"),
        ({"xai_temperature_len": 1024}, "attention with a temperature by length (layer 1)"),
        ({}, None),
    ],
)
def test_a_layer_that_asks_for_more_is_refused_once_the_model_is_loaded(kind, named):
    import torch
    from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

    from sglang_clusterkv.config import ConfigError
    from sglang_clusterkv.serving import backend, layers

    model = torch.nn.ModuleList(RadixAttention(2, 64, 0.1, num_kv_heads=1, layer_id=i) for i in range(2))
    for name, value in kind.items():
        setattr(model[1], name, AttentionType(value) if name == "attn_type" else value)
    assert layers.unserved(model) == named
    if named:
        pool = SimpleNamespace(dtype=torch.bfloat16)
        with pytest.raises(ConfigError, match="use another --attention-backend"):
            backend.create_backend(SimpleNamespace(token_to_kv_pool=pool, model=model))


def test_a_layer_that_caps_its_logits_is_refused_with_a_host_tier_alone(monkeypatch):
    import torch
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_clusterkv.config import ConfigError
    from sglang_clusterkv.serving import backend

    kinds: list[dict[str, float]] = [{}, {"logit_cap": 30.0}]
    made = [RadixAttention(2, 64, 0.1, num_kv_heads=1, layer_id=i, **kind) for i, kind in enumerate(kinds)]
    runner = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(dtype=torch.bfloat16), model=torch.nn.ModuleList(made), tier=None
    )

    def of(runner):
        return SimpleNamespace(engine=SimpleNamespace(tier=runner.tier), reasons_of_all=lambda model: set())

    monkeypatch.setattr(backend, "ClusterKVAttnBackend", of)
    assert backend.create_backend(runner).engine.tier is None
    runner.tier = object()
    with pytest.raises(ConfigError, match="layer 1 of this model caps its attention logits .*: set host_ratio to 1"):
        backend.create_backend(runner)


@pytest.mark.parametrize(
    ("dtype", "fields", "sentence"),
    [
        ("float8_e4m3fn", {"host_ratio": 2.0, "host_kv_dtype": "int8"}, "leave out host_kv_dtype"),
        ("float8_e5m2", {"host_kv_dtype": "int8"}, None),
        ("float8_e4m3fn", {"host_ratio": 2.0}, None),
        ("float8_e4m3fnuz", {}, "start with --kv-cache-dtype bf16"),
    ],
)
def test_rows_of_an_fp8_cache_are_not_made_longer(dtype, fields, sentence, monkeypatch):
    import torch

    from sglang_clusterkv.config import ClusterKVConfig, ConfigError
    from sglang_clusterkv.serving import backend

    monkeypatch.setattr(backend, "active_config", lambda: ClusterKVConfig(**fields))
    monkeypatch.setattr(backend, "ClusterKVAttnBackend", lambda runner: SimpleNamespace(engine=None))
    runner = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(dtype=getattr(torch, dtype)), model=torch.nn.ModuleList(), device="cpu"
    )
    if sentence is None:
        assert backend.create_backend(runner).engine is None
    else:
        with pytest.raises(ConfigError, match=sentence):
            backend.create_backend(runner)


@pytest.mark.parametrize("phase", ["forward_extend", "forward_decode"])
def test_what_a_model_hands_to_attention_beside_queries_keys_and_values_is_refused(phase, monkeypatch):
    from sglang_clusterkv.serving.backend import ClusterKVAttnBackend

    backend = object.__new__(ClusterKVAttnBackend)
    backend.prefill = None
    arguments = [object()] * 5
    with pytest.raises(NotImplementedError, match="hands rel_bias, unheard_of to its attention"):
        getattr(backend, phase)(*arguments, sinks=object(), rel_bias=object(), unheard_of=0, topk_indices=None)

    # Without them, and with None where a model has none, the arguments get as far as the pool.
    class Reached(Exception):
        pass

    def reached(*args):
        raise Reached

    monkeypatch.setattr(backend, "_write", reached)
    with pytest.raises(Reached):
        getattr(backend, phase)(*arguments, save_kv_cache=False, topk_indices=None)


def test_a_refusal_is_a_value_error_for_a_library_call(model_path):
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    record = ServerArgs(model_path=str(model_path), device="cpu", attention_backend="clusterkv", page_size=1)
    with pytest.raises(ValueError, match="--page-size 1 has no pages"):
        record.resolve_once()


def test_another_sglang_is_refused_with_what_differs(resolve, monkeypatch):
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    monkeypatch.setattr(UnifiedRadixCache, "insert", lambda self, key: None)
    with pytest.raises(SystemExit) as end:
        resolve(*CLUSTERKV)
    assert "UnifiedRadixCache.insert: expected (self params), found (self key)" in str(end.value.code)
    resolve("--attention-backend", "torch_native")


def test_a_sglang_that_cannot_be_registered_with_is_only_refused_when_asked_for(monkeypatch):
    from sglang_clusterkv.serving import sglang_differences

    difference = sglang_differences.Difference("sglang.srt.runtime_context.publish", "(a)", "(b)")
    monkeypatch.setattr(sglang_differences, "check", lambda symbols: [difference])
    monkeypatch.setattr(sys, "argv", ["launch_server", "--attention-backend", "triton"])
    plugin.register()
    monkeypatch.setattr(sys, "argv", ["launch_server", "--attention-backend", "clusterkv"])
    with pytest.raises(SystemExit, match="publish: expected \\(a\\), found \\(b\\)"):
        plugin.register()


def test_a_scheduler_process_gets_its_hooks_and_its_configuration(resolve, monkeypatch):
    import torch
    from sglang.srt.managers.tp_worker import TpModelWorker
    from sglang.srt.runtime_context import publish, restore_context, snapshot_context

    before, threads = snapshot_context(), torch.get_num_threads()
    try:
        record, _ = resolve("--attention-backend", "torch_native")
        publish(record, role="scheduler")
        assert active.active_config() is None
        record, _ = resolve(*CLUSTERKV)
        publish(record, role="scheduler")
        assert active.active_config() == ON_A_CPU
        assert hasattr(TpModelWorker.forward_batch_generation, "__wrapped__")
    finally:
        restore_context(before)
        torch.set_num_threads(threads)
    assert active.active_config() is None


@pytest.mark.slow
def test_the_server_exits_with_one_sentence_and_no_traceback(model_path):
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model_path), "--device", "cpu"]
    command += [*CLUSTERKV, "--enable-mixed-chunk"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip().splitlines()[-1].startswith("sglang-clusterkv: --attention-backend clusterkv cannot serve")
    )


def test_the_documentation_is_of_this_table() -> None:
    written = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    assert written == compatibility_markdown(), (
        "run python -m sglang_clusterkv.serving.compat_page > docs/compatibility.md"
    )


def test_the_documentation_names_every_reason_to_decode_densely() -> None:
    text = compatibility_markdown()
    assert all(f"| `{reason.name.lower()}` |" in text for reason in DenseReason)
