"""What ClusterKV cannot serve, as one table: each row a condition, the reason and the alternative.

The plugin asks at start, while SGLang resolves its arguments; docs and tests list the same rows. No sglang import here:
a predicate reads SGLang's resolved arguments (any object with their names) and ModelFacts.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang_clusterkv.config import MAX_PAGE_SIZE
from sglang_clusterkv.serving.model_facts import ModelFacts

BACKEND = "clusterkv"


class Refusal(NamedTuple):
    """One row: `applies(arguments, model)`, and the sentence that ends the start when it does."""

    name: str
    applies: Callable[[Any, ModelFacts], bool]
    sentence: str


def _on(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in ("1", "true", "yes", "y")


def _is_rocm() -> bool:
    import torch  # there a device is called "cuda" as well

    return torch.version.hip is not None


def _split_backends(arguments: Any) -> bool:
    base = arguments.attention_backend
    return any(
        backend not in (None, BACKEND)
        for backend in (arguments.prefill_attention_backend or base, arguments.decode_attention_backend or base)
    )


def _graph_backends(arguments: Any, phase: str) -> tuple[str | None, ...]:
    """What captures a phase's graphs, wherever it is asked for."""
    # A config from JSON is a dict until SGLang has parsed it.
    config = arguments.cuda_graph_config
    if isinstance(config, dict):
        backend = (config.get(phase) or {}).get("backend")
    else:
        backend = getattr(getattr(config, phase, None), "backend", None)
    return backend, getattr(arguments, f"cuda_graph_backend_{phase}")


def _captures_decode(arguments: Any) -> bool:
    off = arguments.disable_cuda_graph or arguments.disable_decode_cuda_graph
    return (arguments.device or "cpu") != "cpu" and not off and "disabled" not in _graph_backends(arguments, "decode")


_OTHER = "use another --attention-backend"

# Rows that SGLang's arguments decide alone; they are asked first, before SGLang reads the model's configuration.
ARGUMENT_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "device",
        lambda a, m: (
            (a.device or "cpu").split(":")[0] not in ("cpu", "cuda") or (a.device or "cpu") != "cpu" and _is_rocm()
        ),
        f"it runs on NVIDIA GPUs and on the CPU only: {_OTHER} on this device",
    ),
    Refusal(
        "page size 1",
        lambda a, m: a.page_size == 1,
        "--page-size 1 has no pages to keep clusters with: leave --page-size out (16) or use a larger one",
    ),
    Refusal(
        "chunks of part pages",
        # What is said of too large a page does not hang on the chunks.
        lambda a, m: (
            (a.page_size or 1) <= MAX_PAGE_SIZE
            and (a.chunked_prefill_size or 0) > 0
            and a.chunked_prefill_size % (a.page_size or 1) != 0
        ),
        "--chunked-prefill-size is not a multiple of --page-size: change one of them",
    ),
    Refusal(
        "split backends",
        lambda a, m: _split_backends(a),
        "prefill and decode must both use it, or nothing is clustered: leave out --prefill-attention-backend and "
        "--decode-attention-backend",
    ),
    Refusal(
        "speculative decoding",
        lambda a, m: a.speculative_algorithm is not None,
        f"speculative decoding verifies several tokens per step, which it does not do: leave out "
        f"--speculative-algorithm or {_OTHER}",
    ),
    Refusal(
        "mixed chunk",
        lambda a, m: a.enable_mixed_chunk,
        "--enable-mixed-chunk sends decode steps through the prefill path, where they would be dense: leave it out",
    ),
    Refusal(
        "PD disaggregation",
        lambda a, m: a.disaggregation_mode != "null" or a.encoder_only,
        f"a disaggregated decode server gets KV that was never clustered: leave out --disaggregation-mode or {_OTHER}",
    ),
    Refusal(
        "PD multiplexing",
        lambda a, m: a.enable_pdmux,
        "--enable-pdmux runs prefill and decode at once, against the order its clusters need: leave it out",
    ),
    Refusal(
        "two-batch overlap",
        lambda a, m: a.enable_two_batch_overlap,
        "--enable-two-batch-overlap splits the batch that its plan is made for: leave it out",
    ),
    Refusal(
        "pipeline parallelism",
        lambda a, m: a.pp_size > 1,
        f"pipeline parallelism has several batches under way, against the order its clusters need: leave out --pp-size "
        f"(--tp-size is served) or {_OTHER}",
    ),
    Refusal(
        "padded batches",
        lambda a, m: (
            a.enable_dp_attention
            or a.attn_dp_size > 1
            or a.moe_a2a_backend != "none"
            or a.moe_dense_tp_size is not None
        ),
        f"data-parallel attention and MoE all-to-all pad decode batches, which it does not do: leave out "
        f"--enable-dp-attention, --moe-a2a-backend and --moe-dense-tp-size or {_OTHER}",
    ),
    Refusal(
        "KV canary",
        lambda a, m: a.kv_canary != "none",
        "--kv-canary knows SGLang's own KV pools only: leave it out",
    ),
    Refusal(
        "quantized KV",
        lambda a, m: a.kv_cache_dtype not in ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2"),
        "it clusters keys in bf16, fp16, fp32 and fp8: leave out --kv-cache-dtype or use bf16, fp8_e4m3 or fp8_e5m2",
    ),
    Refusal(
        "decode context parallelism",
        lambda a, m: a.dcp_size > 1,
        f"--dcp-size above 1 spreads a sequence's KV over ranks: leave it out or {_OTHER}",
    ),
    Refusal(
        "prefill context parallelism",
        lambda a, m: a.enable_prefill_cp or a.attn_cp_size > 1,
        f"context-parallel prefill spreads a sequence over ranks: leave out --enable-prefill-cp and "
        f"--attention-context-parallel-size or {_OTHER}",
    ),
    Refusal(
        "full prefill graph",
        lambda a, m: "full" in _graph_backends(a, "prefill"),
        "a full prefill CUDA graph leaves no place for clustering: use --cuda-graph-backend-prefill breakable",
    ),
    Refusal(
        "broken decode graphs",
        lambda a, m: _captures_decode(a) and (a.debug_cuda_graph or "breakable" in _graph_backends(a, "decode")),
        "its decode steps are captured whole or not at all: use --cuda-graph-backend-decode full or disabled",
    ),
    Refusal(
        "torch.compile",
        lambda a, m: _captures_decode(a) and a.enable_torch_compile,
        "--enable-torch-compile would trace its kernels' launches: leave it out, or pass --disable-cuda-graph",
    ),
    Refusal(
        "metadata glue graph",
        lambda a, m: _captures_decode(a) and _on("SGLANG_ENABLE_METADATA_GLUE_GRAPH"),
        "a captured preparation of a step would repeat the first one's: unset SGLANG_ENABLE_METADATA_GLUE_GRAPH",
    ),
    Refusal(
        "HiCache on a CPU",
        lambda a, m: a.enable_hierarchical_cache and (a.device or "cpu") == "cpu",
        "SGLang pins host memory for --enable-hierarchical-cache by CUDA's driver: leave it out on a CPU",
    ),
    Refusal(
        "HiCache with storage",
        lambda a, m: (
            a.enable_hierarchical_cache
            and (a.device or "cpu") != "cpu"
            and (a.hicache_storage_backend is not None or a.hicache_host_memory_mode != "cache")
        ),
        "HiCache is served with host memory alone: leave out --hicache-storage-backend and --hicache-host-memory-mode",
    ),
    Refusal(
        "other KV stores",
        lambda a, m: a.enable_lmcache or a.enable_flexkv or a.enable_unified_cache_external_linker,
        "KV from LMCache, FlexKV or an external store arrives unclustered: leave these flags out",
    ),
    Refusal(
        "other radix cache",
        lambda a, m: a.radix_cache_backend is not None,
        "its clusters follow SGLang's own radix cache: leave out --radix-cache-backend",
    ),
    Refusal(
        "HiSparse",
        lambda a, m: a.enable_hisparse,
        f"--enable-hisparse is a sparse attention of its own: leave it out or {_OTHER}",
    ),
    Refusal(
        "megakernel",
        lambda a, m: getattr(a, "enable_nvidia_megakernel", False),  # none in SGLang 0.5.22
        "--enable-nvidia-megakernel decodes by one kernel with an attention of its own, so nothing would be recalled: "
        f"leave it out or {_OTHER}",
    ),
    Refusal(
        "multi-item scoring",
        lambda a, m: a.enable_mis,
        "--enable-mis needs --attention-backend flashinfer: leave it out or use that",
    ),
    Refusal(
        "deterministic inference",
        lambda a, m: a.enable_deterministic_inference or a.rl_on_policy_target is not None,
        f"deterministic inference needs kernels that it does not use: leave out --enable-deterministic-inference and "
        f"--rl-on-policy-target or {_OTHER}",
    ),
    Refusal(
        "KV sharding",
        lambda a, m: a.enable_kv_cache_sharding,
        "--enable-kv-cache-sharding needs SGLang's own KV pool: leave it out",
    ),
    Refusal(
        "other KV layouts",
        lambda a, m: a.enable_page_major_kv_layout or a.enable_unified_memory or _on("SGLANG_USE_HND_KVCACHE"),
        "it reads SGLang's default KV layout: leave out --enable-page-major-kv-layout, --enable-unified-memory and "
        "SGLANG_USE_HND_KVCACHE",
    ),
    Refusal(
        "post-capture KV sizing",
        lambda a, m: _on("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        "its arrays are made with the KV pool, whose size must be final by then: unset "
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
    ),
    Refusal(
        "diffusion models",
        lambda a, m: a.dllm_algorithm is not None,
        f"a diffusion model has no decode step: {_OTHER}",
    ),
    Refusal(
        "LoRA on a CPU",
        lambda a, m: a.device == "cpu" and bool(a.enable_lora or a.lora_paths),
        "SGLang's LoRA layers need an accelerator: leave out --enable-lora and --lora-paths on a CPU",
    ),
    Refusal(
        "memory saver on a CPU",
        lambda a, m: a.device == "cpu" and a.enable_memory_saver,
        "SGLang's memory saver needs an accelerator: leave out --enable-memory-saver on a CPU",
    ),
    Refusal(
        "forward-pass metrics on a CPU",
        lambda a, m: a.device == "cpu" and (a.enable_forward_pass_metrics or _on("SGLANG_ENABLE_METRICS_DEVICE_TIMER")),
        "SGLang times forwards by events of an accelerator: leave out --enable-forward-pass-metrics and "
        "SGLANG_ENABLE_METRICS_DEVICE_TIMER on a CPU",
    ),
    Refusal(
        "Ray",
        lambda a, m: a.use_ray,
        "SGLang's Ray actors load no plugins: leave out --use-ray",
    ),
)

# Rows that need the model's configuration as well.
MODEL_REFUSALS: tuple[Refusal, ...] = (
    Refusal("MLA", lambda a, m: m.mla, f"this model's MLA attention has no keys to cluster: {_OTHER}"),
    Refusal(
        "encoder-decoder",
        lambda a, m: m.encoder_decoder,
        f"this model's cross-attention is not supported: {_OTHER}",
    ),
    Refusal(
        "own sparse attention",
        lambda a, m: m.own_sparse,
        f"this model brings a sparse attention of its own: {_OTHER}",
    ),
    Refusal(
        "hybrid linear",
        lambda a, m: m.hybrid_linear,
        f"this model mixes in Mamba or linear attention, which is not supported: {_OTHER}",
    ),
    Refusal(
        "chunked attention",
        lambda a, m: m.chunked_attention,
        f"this model's chunked attention is not supported: {_OTHER}",
    ),
    Refusal(
        "models with backends of their own",
        lambda a, m: m.own_backends,
        f"SGLang serves this model (Gemma 4, EXAONE 4) with a few of its own backends only: {_OTHER}",
    ),
    Refusal(
        "logit cap",
        lambda a, m: m.logit_cap > 0,
        f"every layer of this model caps its attention logits (Gemma 2, Grok), so every step would be dense: {_OTHER}",
    ),
    Refusal(
        "hybrid SWA",
        lambda a, m: m.hybrid_swa,
        "this model's sliding-window layers have a KV pool of their own: pass --disable-hybrid-swa-memory",
    ),
    Refusal(
        "no generation",
        lambda a, m: a.is_embedding or not m.generates,
        f"an embedding or scoring model has no decode step to make faster: {_OTHER}",
    ),
    Refusal(
        "different value size",
        lambda a, m: m.v_head_dim != m.head_dim,
        f"this model's values and keys differ in size: {_OTHER}",
    ),
    Refusal(
        "large head size",
        lambda a, m: m.head_dim > 256 and (a.device or "cpu").startswith("cuda"),
        f"its kernels for a GPU hold heads of up to 256: {_OTHER}",
    ),
    Refusal(
        "odd head size",
        lambda a, m: m.head_dim < 16 or m.head_dim % 16 != 0,
        f"this model's head size is not a multiple of 16: {_OTHER}",
    ),
)

REFUSALS = ARGUMENT_REFUSALS + MODEL_REFUSALS

# Rows that hold with a host tier alone, asked with the model.
HOST_TIER_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "host tier and HiCache",
        lambda a, m: a.enable_hierarchical_cache,
        "host_ratio and --enable-hierarchical-cache would both keep pages on the host: leave one of them out",
    ),
    Refusal(
        "host tier without chunks",
        lambda a, m: a.chunked_prefill_size is not None and a.chunked_prefill_size <= 0,
        "a host tier takes prompts in chunks that fit the device: leave out --chunked-prefill-size or use 512 or more",
    ),
    Refusal(
        "host tier and shared KV",
        lambda a, m: m.shared_kv,
        "layers of this model read another layer's KV densely, which a host tier would make them do from host memory in "
        "every step: leave out host_ratio",
    ),
)

# Rows that hold with `trace` alone, asked with the model.
TRACE_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "traces and tensor parallelism",
        lambda a, m: a.tp_size > 1,
        "a trace would have the kv heads of one rank alone: leave out --tp-size or trace",
    ),
    Refusal(
        "traces and SGLang's Rust server",
        lambda a, m: _on("SGLANG_RUST_SERVER"),
        "SGLang's Rust server hands no traces on: unset SGLANG_RUST_SERVER or leave out trace",
    ),
)

# Rows that hold with `recall_extend_tokens` alone, asked with the model.
RECALL_EXTEND_REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "recalled extends on a GPU",
        lambda a, m: (a.device or "cpu") != "cpu",
        "on a GPU SGLang's own backends prefill, which attend to everything: leave out recall_extend_tokens",
    ),
)


def refusal(
    arguments: Any,
    model: ModelFacts | None = None,
    *,
    host_tier: bool = False,
    trace: bool = False,
    recall_extends: bool = False,
) -> str | None:
    """The sentence of the first row that applies, or None. Without a model only the arguments' rows are asked.

    host_tier: the configuration's `host_ratio` is above 1. trace: its `trace` is on. recall_extends: its
    `recall_extend_tokens` is above 0.
    """
    facts = model or ModelFacts(head_dim=64, v_head_dim=64)
    rows = REFUSALS if model else ARGUMENT_REFUSALS
    if model:
        rows += (HOST_TIER_REFUSALS if host_tier else ()) + (TRACE_REFUSALS if trace else ())
        rows += RECALL_EXTEND_REFUSALS if recall_extends else ()
    for row in rows:
        if row.applies(arguments, facts):
            return f"--attention-backend {BACKEND} cannot serve this: {row.sentence}"
    return None
