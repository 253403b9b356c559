"""The hooks that a scheduler process gets once it serves with clusterkv: thin wrappers around our other rooms.

A process may publish another configuration later (an engine after an engine), so each wrapper asks again.
"""

from collections.abc import Callable
from typing import Any

from sglang_clusterkv.serving import active
from sglang_clusterkv.serving.hooks import add_hooks
from sglang_clusterkv.serving.late_refusal import sentence_alone
from sglang_clusterkv.serving.platform import is_our_platform

_SRT = "sglang.srt."
_installed = False
_ours = False  # whether the platform is our CPU platform


def install(platform: Any) -> None:
    """Add the hooks, once per process. `platform` is SGLang's current platform. Raises ConfigError as `add_hooks`."""
    global _installed, _ours
    if _installed:
        return
    _ours = is_our_platform(platform)
    from sglang.srt.plugins.hook_registry import HookType

    reporter = _SRT + "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter."
    targets: list[tuple[str, Callable[..., Any], Any]] = [
        (_SRT + "managers.scheduler.Scheduler.process_input_requests", _before_requests, HookType.BEFORE),
        (_SRT + "managers.scheduler.Scheduler.init_chunked_prefill", _after_chunks, HookType.AFTER),
        (_SRT + "managers.tp_worker.TpModelWorker.forward_batch_generation", _before_forward, HookType.BEFORE),
        (_SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree", _checkpoint, HookType.AROUND),
        (_SRT + "mem_cache.unified_radix_cache.UnifiedRadixCache.insert", _after_insert, HookType.AFTER),
        (
            _SRT + "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
            _after_cell_size,
            HookType.AFTER,
        ),
        (
            _SRT + "mem_cache.kv_cache_configurator.KVCacheConfigurator.resolve_max_num_reqs",
            _after_rows,
            HookType.AFTER,
        ),
        (
            _SRT + "model_executor.model_runner.ModelRunner.init_kv_index_translator",
            _after_translator,
            HookType.AFTER,
        ),
        (
            _SRT + "managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
            _after_internal_state,
            HookType.AFTER,
        ),
        (
            _SRT + "observability.metrics_collector.SchedulerMetricsCollector.__init__",
            _after_collector,
            HookType.AFTER,
        ),
        (
            _SRT + "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
            _stream_output,
            HookType.AROUND,
        ),
        (reporter + "report_prefill_stats", _after_batch, HookType.AFTER),
        (reporter + "report_decode_stats", _after_batch, HookType.AFTER),
        (reporter + "_maybe_log_idle_metrics", _after_idle, HookType.AFTER),
    ]
    if not _ours:  # our own asks for pool and allocator by itself
        name = f"{type(platform).__module__}.{type(platform).__qualname__}"
        targets.append((f"{name}.get_kv_pool_cls", _after_kv_pool_cls, HookType.AFTER))
        targets.append((f"{name}.get_paged_allocator_cls", _after_allocator_cls, HookType.AFTER))
        variants = "layers.attention.graph_variants.create_attention_graph_variants"
        can_run = "model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner.can_run_graph"
        targets.append((_SRT + variants, _after_graph_variants, HookType.AFTER))
        targets.append((_SRT + can_run, _after_can_run_graph, HookType.AFTER))
    add_hooks(targets)
    _installed = True


def _before_requests(scheduler: Any, recv_reqs: list[Any]) -> tuple[tuple[Any, list[Any]], dict[str, Any]] | None:
    # Called in every round of the scheduler's loop, mostly with nothing.
    config = active.active_config()
    if config is None:
        return None
    from sglang_clusterkv.serving import admission, host_tier, request_checks

    if host_tier.is_on(config):
        admission.ask_again(scheduler)
    if not recv_reqs:
        return None
    if _ours:
        from sglang_clusterkv.serving import cpu_memory, cpu_weights

        cpu_weights.requests_came(recv_reqs)
        recv_reqs = [request for request in recv_reqs if not cpu_memory.is_answered(scheduler, request)]
    return (scheduler, request_checks.admit(scheduler, recv_reqs)), {}


def _before_forward(worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> None:
    if active.active_config() is not None:
        from sglang_clusterkv.serving import metrics, runtime

        runtime.before_forward(worker, batch)
        metrics.forward(worker)


def _checkpoint(original: Callable[..., Any], cache: Any, *args: Any, **kwargs: Any) -> Any:
    if active.active_config() is None:
        return original(cache, *args, **kwargs)
    from sglang_clusterkv.serving import runtime

    return runtime.around_checkpoint(original, cache, *args, **kwargs)


def _after_insert(result: Any, cache: Any, *args: Any, **kwargs: Any) -> None:
    if active.active_config() is not None:
        from sglang_clusterkv.serving import runtime

        runtime.after_insert(result, cache, *args, **kwargs)


def _stream_output(original: Callable[..., Any], streamer: Any, reqs: list[Any], *args: Any, **kwargs: Any) -> Any:
    config = active.active_config()
    if config is None or not config.trace:
        return original(streamer, reqs, *args, **kwargs)
    from sglang_clusterkv.serving import trace

    return trace.around_output(original, streamer, reqs, *args, **kwargs)


def _after_internal_state(result: Any, controller: Any, *args: Any, **kwargs: Any) -> None:
    if active.active_config() is not None:
        from sglang_clusterkv.serving import metrics, runtime

        info = runtime.server_info()
        if _ours:
            from sglang_clusterkv.serving import cpu_weights

            info = (info or {}) | {"unknown_requests": dict(cpu_weights.unknown)}
        result.internal_state["clusterkv"] = info
        metrics.refresh(controller.scheduler.metrics_reporter)


def _after_collector(result: None, collector: Any, *args: Any, **kwargs: Any) -> None:
    if active.active_config() is not None:
        from sglang_clusterkv.serving import metrics

        metrics.collector_made(collector)


def _after_batch(result: None, reporter: Any, *args: Any, **kwargs: Any) -> None:
    if active.active_config() is not None:
        from sglang_clusterkv.serving import metrics

        metrics.batch_done(reporter)


def _after_idle(result: None, reporter: Any) -> None:
    if active.active_config() is not None:
        from sglang_clusterkv.serving import metrics, runtime

        runtime.idle()
        metrics.idle(reporter)


def _after_cell_size(result: int, configurator: Any, kvc: Any, num_layers: int) -> int | None:
    """Bytes per token of SGLang's KV plus ours, for the kv heads of this rank and the layers that recall."""
    config = active.active_config()
    if config is None:
        return None
    import torch
    from sglang.srt.runtime_context import get_parallel, get_schedule

    from sglang_clusterkv.memory.device import metadata_bytes_per_token
    from sglang_clusterkv.serving import host_tier, layers

    parallel = get_parallel()
    kv_heads = kvc.model_config.get_num_kv_heads(parallel.attn_tp_size, parallel.attn_dcp_size)
    index = metadata_bytes_per_token(
        config,
        page_size=get_schedule().page_size,
        head_dim=kvc.model_config.head_dim,
        kv_heads=kv_heads,
        layers=layers.note_clustered(kvc.model, config, kvc.layer_info.start_layer, num_layers),
    )
    if not host_tier.is_on(config):
        return result + index
    return index + host_tier.bytes_per_token(
        config,
        device_type=torch.device(kvc.device).type,
        device=result,
        kv_heads=kv_heads,
        layers=num_layers,
        head_dim=kvc.model_config.head_dim,
        dtype=kvc.kv_cache_dtype,
    )


def _after_rows(result: int, kvc: Any, token_capacity: int) -> int | None:
    """Most running requests: as many as a host tier's device pages allow."""
    config = active.active_config()
    if config is None:
        return None
    from sglang_clusterkv.serving import host_tier

    if not host_tier.is_on(config):
        return None
    with sentence_alone():
        return host_tier.limit_rows(config, result, token_capacity)


def _after_translator(result: None, runner: Any) -> None:
    from sglang_clusterkv.serving import host_tier

    if host_tier.is_on(active.active_config()):
        from sglang_clusterkv.serving import translator

        with sentence_alone():
            translator.install(runner)


def _after_chunks(result: None, scheduler: Any) -> None:
    """SGLang has decided whether it takes prompts in chunks: some models make it change its mind."""
    from sglang_clusterkv.serving import host_tier

    if host_tier.is_on(active.active_config()):
        with sentence_alone():
            host_tier.check_chunks(scheduler.chunked_prefill_size)


def _after_kv_pool_cls(result: type | None, platform: Any, *, kind: str) -> type | None:
    if active.active_config() is None:
        return None
    from sglang_clusterkv.serving import pool

    return pool.kv_pool_cls(result, kind)


def _after_graph_variants(result: Any, hf_config: Any) -> Any:
    if active.active_config() is None:
        return None
    from sglang_clusterkv.serving import graphs

    return graphs.variants()


def _after_can_run_graph(result: bool, runner: Any, forward_batch: Any) -> bool | None:
    if active.active_config() is None:
        return None
    from sglang_clusterkv.serving import graphs

    return graphs.can_run(result)


def _after_allocator_cls(result: type | None, platform: Any) -> type | None:
    if active.active_config() is None:
        return None
    from sglang_clusterkv.serving import pool

    return pool.paged_allocator_cls(result)
