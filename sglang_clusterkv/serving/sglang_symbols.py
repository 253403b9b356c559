"""Every SGLang symbol that the plugin relies on, with the signature it was written against, and why.

`sglang_differences.check` compares this table with the installed SGLang. Nothing of SGLang is imported here.
"""

from sglang_clusterkv.serving.sglang_decoder_symbols import DECODER
from sglang_clusterkv.serving.sglang_gpu_symbols import PREFILL
from sglang_clusterkv.serving.sglang_graph_symbols import DECODE_GRAPHS
from sglang_clusterkv.serving.sglang_request_symbols import REQUESTS
from sglang_clusterkv.serving.sglang_tier_symbols import HICACHE, HOST_TIER
from sglang_clusterkv.serving.symbol import Symbol

# What register() itself needs; cheap to import, asked in every process.
REGISTRATION = (
    Symbol("arg_groups.choices.add_attention_backend_choices", "makes the name a choice", "iterable"),
    Symbol("layers.attention.attention_registry.register_attention_backend", "registers the factory", "name"),
    Symbol("plugins.hook_registry.HookRegistry.register", "registers hooks", "target hook hook_type source"),
    Symbol("plugins.hook_registry.HookRegistry.apply_hooks", "applies the scheduler's hooks", ""),
    Symbol("plugins.hook_registry.HookSource", "names us in SGLang's log", "plugin_name dist_name"),
    Symbol("plugins.hook_registry.HookType", "kinds of hooks", attributes="BEFORE AFTER AROUND"),
    Symbol("arg_groups.resolution_hooks.register_resolution_hook", "checks and defaults", "name"),
    Symbol("arg_groups.overrides.resolved_view", "arguments as resolved so far", "server_args"),
    Symbol("server_args.ServerArgs.add_cli_args", "adds --clusterkv-config", "parser"),
    Symbol("server_args.ServerArgs.from_cli_args", "takes its value", "args"),
    Symbol(
        "runtime_context.publish", "where a scheduler process learns its config", "server_args role hf_config ranks"
    ),
)

RESOLUTION = (
    Symbol(
        "arg_groups.pipeline.run_resolution_pipeline",
        "order of the steps we wrap",
        mentions=(
            "run_hook(handle_pd_disaggregation,",
            "run_hook(handle_model_specific_adjustments,",
            "run_hook(handle_attention_backend_compatibility,",
            "run_post_process_pass(server_args, _page_size_default)",
            "run_hook(handle_model_capability_adjustments,",
        ),
    ),
    Symbol("arg_groups.overrides.attention_backends_of", "prefill and decode backend", "cfg"),
    Symbol("arg_groups.model_hook.attention_backends_of", "which backends a model may have", "cfg"),
    Symbol("arg_groups.overrides.model_config_of", "the model's configuration", "server_args"),
    Symbol("arg_groups.overrides.use_mla_backend", "is it MLA", "server_args"),
    Symbol("arg_groups.overrides.declare_resolution", "page size, no decode graphs", "server_args source fields"),
    Symbol("arg_groups.pd_disaggregation_hook.handle_pd_disaggregation", "first check", "server_args"),
    Symbol("arg_groups.model_hook.handle_model_specific_adjustments", "second check", "server_args"),
    Symbol("arg_groups.attention_hook.handle_attention_backend_compatibility", "defaults", "server_args"),
    Symbol("arg_groups.model_hook.handle_model_capability_adjustments", "last check", "server_args"),
    Symbol("model_executor.cuda_graph_config.with_phase", "no decode graphs", "config phase changes"),
    Symbol("configs.hybrid_arch.mambaish_config", "is it a hybrid", "model_config"),
    Symbol("configs.model_config.is_deepseek_dsa", "own sparse attention", "config"),
    Symbol("configs.model_config.is_deepseek_v4", "own sparse attention", "config"),
    Symbol("configs.model_config.is_minimax_sparse", "own sparse attention", "config"),
    Symbol("configs.model_config.is_qwen4_exp", "own sparse attention", "config"),
    Symbol(
        "configs.model_config.ModelConfig",
        "model facts",
        attributes="head_dim v_head_dim hf_config hf_text_config num_hidden_layers dtype "
        "is_encoder_decoder has_attention_sinks is_hybrid_swa attention_chunk_size is_generation get_num_kv_heads",
    ),
    Symbol(
        "configs.model_config.ModelConfig.get_num_kv_heads", "kv heads of a rank", "self tensor_parallel_size dcp_size"
    ),
    Symbol("runtime_context.get_server_args", "the config of this process", ""),
    Symbol("configs.model_config.ModelConfig.get_num_attention_heads", "of a rank", "self tensor_parallel_size"),
    Symbol("runtime_context.get_parallel", "ranks, head split", ""),
    Symbol("runtime_context.get_schedule", "page size", ""),
)

PLATFORM = (
    Symbol("platforms.interface.SRTPlatform.get_kv_pool_cls", "our KV pool", "self kind"),
    Symbol("platforms.interface.SRTPlatform.get_paged_allocator_cls", "our allocator", "self"),
    Symbol("platforms.interface.SRTPlatform.apply_server_args_defaults", "CPU threads", "self server_args"),
    Symbol("platforms.interface.SRTPlatform.get_dispatch_key_name", "our forwards of its layers", "self"),
    Symbol("platforms.interface.SRTPlatform.init_backend", "registers them", "self"),
    Symbol("platforms.interface.SRTPlatform.post_load_model", "products of a loaded model", "self model"),
    Symbol("layers.quantization.unquant.UnquantizedLinearMethod.apply", "likewise", "self layer x bias"),
    Symbol("layers.quantization.unquant.UnquantizedEmbeddingMethod.apply", "logits", "self layer x bias"),
    Symbol(
        "layers.quantization.base_config.QuantizeMethodBase.process_weights_after_loading",
        "copies of weights may be read again",
        "self layer",
    ),
    Symbol(
        "layers.quantization.base_config.QuantizeMethodBase.restore_weights_before_loading",
        "they may not",
        "self layer",
        since="0.5.23",
    ),
    Symbol("layers.logits_processor.should_apply_lm_head_quant_method", "whether it is asked", "lm_head quant_method"),
    Symbol("layers.layernorm.RMSNorm.register_oot_forward", "likewise", "op_cls fn platform_key"),
    Symbol(
        "layers.layernorm.RMSNorm",
        "what tells a plain norm",
        attributes="variance_size_override override_orig_dtype hidden_size variance_epsilon weight",
    ),
    Symbol(
        "layers.layernorm.RMSNorm.forward_native",
        "what ours stands for",
        "self x residual post_residual_addition quant_linear",
    ),
    Symbol("layers.activation.SiluAndMul.forward_native", "likewise", "self x"),
    Symbol(
        "layers.rotary_embedding.base.RotaryEmbedding",
        "tables of cosines and sines",
        attributes="cos_sin_cache head_size is_neox_style rotary_dim",
    ),
    Symbol(
        "layers.rotary_embedding.base.RotaryEmbedding.forward_native",
        "likewise",
        "self positions query key offsets fused_set_kv_buffer_arg",
    ),
    Symbol("platforms.cuda.CudaSRTPlatform.get_kv_pool_cls", "our KV pool on CUDA", "self kind"),
    Symbol("platforms.cuda.CudaSRTPlatform.get_paged_allocator_cls", "our allocator on CUDA", "self"),
    Symbol("platforms.cpu.CpuDeviceMixin.get_device", "overridden: SGLang splits it as text", "self device_id"),
    Symbol("utils.numa_utils.init_threads_binding", "reads SGLANG_CPU_OMP_THREADS_BIND", "numa_index world_size"),
)

MEMORY = (
    Symbol(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator",
        "asks the platform for both classes; the model",
        mentions=(
            "current_platform.get_kv_pool_cls(kind=kind)",
            "current_platform.get_paged_allocator_cls()",
            "model: Any",  # as loaded, when its pool is sized
            "layer_info: ModelLayerInfo",
        ),
    ),
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool.__init__",
        "subclassed",
        "self size page_size dtype head_num head_dim "
        "layer_num device enable_memory_saver v_head_dim swa_head_num swa_head_dim swa_v_head_dim start_layer "
        "end_layer enable_alt_stream enable_kv_cache_copy kv_cache_layout quant_method post_capture_active "
        "allocation_label",
    ),
    Symbol("mem_cache.memory_pool.MHATokenToKVPool._create_buffers", "makes our arrays", "self"),
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer",
        "writes K and V",
        "self layer loc_info cache_k cache_v k_scale v_scale layer_id_override dcp_kv_mask",
    ),
    Symbol("mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer", "reads keys", "self layer_id"),
    Symbol("mem_cache.memory_pool.MHATokenToKVPool.get_value_buffer", "reads values", "self layer_id"),
    Symbol("mem_cache.memory_pool.MHATokenToKVPool.get_kv_buffer", "reads both", "self layer_id"),
    Symbol("mem_cache.memory_pool.MHATokenToKVPool.get_kv_size_bytes", "byte accounting", "self"),
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool",
        "shapes",
        attributes="size page_size dtype head_num head_dim "
        "v_head_dim layer_num start_layer device k_buffer v_buffer kv_cache_layout memory_saver_adapter",
    ),
    Symbol("mem_cache.memory_pool.KVWriteLoc.for_layer", "where K and V go", "forward_batch layer swa_loc full_loc"),
    Symbol(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.__init__",
        "subclassed",
        "self size page_size dtype device kvcache need_sort",
    ),
    Symbol("mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc", "hands out pages", "self need_size"),
    Symbol(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend",
        "hands out pages",
        "self prefix_lens prefix_lens_cpu seq_lens seq_lens_cpu last_loc extend_num_tokens num_new_pages",
    ),
    Symbol(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_decode",
        "hands out pages",
        "self seq_lens seq_lens_cpu last_loc",
    ),
    Symbol(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.clear", "all pages at once; called by __init__", "self"
    ),
    Symbol(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator._release_page_ids",
        "every free ends here",
        "self page_ids",
    ),
    Symbol(
        "mem_cache.allocator.paged.PagedTokenToKVPoolAllocator",
        "pages",
        attributes="free_pages num_pages page_size size staged_pages available_size need_sort create_prefill_budget",
        # The pages that are handed out are the first free ones; with a host tier the rest tells how many.
        mentions=(
            "self.free_pages = self.free_pages[num_pages:]",
            "self.free_pages = self.free_pages[num_new_pages:]",
            "self._release_page_ids(torch.unique(free_index // self.page_size))",
            "self._release_page_ids(page_ids)",
            "self._release_page_ids(torch.cat(self.free_page_ids_group))",
        ),
    ),
    Symbol(
        "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "counts our bytes per token",
        "self kvc num_layers",
    ),
    Symbol(
        "mem_cache.memory_pool.ReqToTokenPool.attach_aux_cache", "ends of rows, lengths on the host", "self aux_cache"
    ),
    Symbol(
        "mem_cache.memory_pool.ReqToTokenPool",
        "the calls into the attached object",
        attributes="req_to_token req_generation",
        mentions=(
            "self._aux_cache.free(index)",
            "self._aux_cache.clear()",
            "self._aux_cache.reset_allocator()",
            "return self._aux_cache.dense_capacity",
            "self._aux_cache.alloc_to_lengths(\n",
            "req_pool_indices_cpu=req_pool_indices_cpu",
            "target_seq_lens_cpu=target_seq_lens_cpu",
        ),
    ),
    Symbol("mem_cache.allocation.alloc_for_extend", "lengths of extending rows", mentions=("alloc_aux_to_lengths(",)),
    Symbol(
        "mem_cache.allocation.alloc_for_decode_default", "lengths of decoding rows", mentions=("alloc_aux_to_lengths(",)
    ),
)

SCHEDULER = (
    Symbol(
        "managers.schedule_batch.ScheduleBatch",
        "read there",
        attributes="reqs forward_mode prefix_lens extend_lens "
        "out_cache_loc req_pool_indices req_pool_indices_cpu seq_lens seq_lens_cpu",
    ),
    Symbol(
        "managers.schedule_batch.Req",
        "read there",
        attributes="rid kv prefix_len extend_end extend_len origin_input_ids output_ids full_untruncated_fill_ids",
    ),
    Symbol(
        "managers.schedule_batch.ReqKvInfo",
        "row and protected length",
        attributes="req_pool_idx cache_protected_len kv_allocated_len kv_committed_len holds_kv",
    ),
    Symbol(
        "managers.tp_worker.TpModelWorker.forward_batch_generation",
        "head of a forward",
        "self batch forward_batch pp_proxy_tensors is_verify skip_attn_backend_init capture_hidden_mode "
        "return_kv_loc_plan",
    ),
    Symbol(
        "mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
        "may rewrite a row",
        "self req up_to kwargs",
        mentions=("self.insert(insert_params)", "self.req_to_token_pool.write("),
    ),
    Symbol("mem_cache.unified_radix_cache.UnifiedRadixCache.insert", "how far it rewrote", "self params"),
    Symbol("mem_cache.base_prefix_cache.InsertResult", "how far it rewrote", attributes="prefix_len"),
    Symbol(
        "managers.scheduler_components.internal_state.SchedulerInternalStateController.get_internal_state",
        "/server_info",
        "self recv_req",
    ),
    Symbol("managers.io_struct.GetInternalStateReqOutput", "/server_info", attributes="internal_state"),
)

TRACE = (
    Symbol(
        "managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        "where a trace is added to its request's response",
        "self reqs return_logprob skip_req",
    ),
    Symbol(
        "managers.scheduler_components.output_streamer._GenerationStreamAccumulator.accept",
        "sends what is set for each token of a request",
        mentions=("req.customized_info.items()", "req_values[send_token_offset : len(output_ids_)]"),
    ),
    Symbol(
        "managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        "puts it into meta_info",
        "self meta_info state customized_info index finish_reason",
    ),
    Symbol(
        "managers.schedule_batch.Req",
        "whose trace, and what is said of it",
        attributes="customized_info finished finished_reason finished_output output_ids_through_stop origin_input_ids "
        "cached_tokens sampling_params",
    ),
    Symbol("sampling.sampling_params.SamplingParams", "asks for a trace", attributes="custom_params"),
    Symbol("server_args.ServerArgs", "the model's name", attributes="served_model_name model_path"),
)

_REPORTER = "managers.scheduler_components.metrics_reporter.SchedulerMetricsReporter"
METRICS = (
    Symbol(
        "observability.metrics_collector.SchedulerMetricsCollector.__init__",
        "where our series are made",
        "self labels server_args enable_lora enable_hierarchical_cache enable_streaming_session",
    ),
    Symbol("observability.metrics_collector.SchedulerMetricsCollector", "our series' labels", attributes="labels"),
    Symbol(
        _REPORTER + ".report_prefill_stats",
        "when our series are updated",
        "self batch prefill_stats can_run_cuda_graph dp_cooperation_info",
    ),
    Symbol(
        _REPORTER + ".report_decode_stats",
        "when our series are updated",
        "self can_run_cuda_graph running_batch num_generated_tokens",
    ),
    Symbol(_REPORTER + "._maybe_log_idle_metrics", "the end of a burst", "self"),
    Symbol(_REPORTER, "which ranks have series", attributes="scheduler current_scheduler_metrics_enabled"),
    Symbol(
        "managers.scheduler.Scheduler.on_idle",
        "the end of a burst",
        mentions=("self.metrics_reporter._maybe_log_idle_metrics()",),
    ),
    Symbol(
        "managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor",
        "once per batch",
        mentions=("self.metrics_reporter.report_prefill_stats(", "self.metrics_reporter.report_decode_stats("),
    ),
    Symbol(
        "managers.scheduler_components.internal_state.SchedulerInternalStateController",
        "the reporter",
        attributes="scheduler",
    ),
)

_FORWARD = "self q k v layer forward_batch save_kv_cache kwargs"
BACKEND = (
    Symbol("layers.attention.base_attn_backend.AttentionBackend.forward", "dispatches the phases", _FORWARD),
    Symbol("layers.attention.base_attn_backend.AttentionBackend.forward_extend", "overridden", _FORWARD),
    Symbol("layers.attention.base_attn_backend.AttentionBackend.forward_decode", "overridden", _FORWARD),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata", "overridden", "self forward_batch"
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_out_graph",
        "for decode graphs",
        "self forward_batch in_capture",
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata_in_graph",
        "for decode graphs",
        "self forward_batch",
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend.init_cuda_graph_state",
        "for decode graphs",
        "self max_bs max_num_tokens",
    ),
    Symbol(
        "layers.attention.base_attn_backend.AttentionBackend.get_cuda_graph_seq_len_fill_value", "overridden", "self"
    ),
    Symbol("layers.attention.base_attn_backend.AttentionBackend.shared_read_ends", "when rows may change", "self fm"),
    Symbol("layers.attention.base_attn_backend.AttentionBackend.support_triton", "overridden", "self"),
    Symbol(
        "layers.radix_attention.RadixAttention",
        "a layer's geometry",
        attributes="tp_q_head_num tp_k_head_num "
        "head_dim v_head_dim scaling layer_id logit_cap sliding_window_size is_cross_attention attn_type "
        "xai_temperature_len k_scale_float v_scale_float",
    ),
    Symbol("layers.radix_attention.AttentionType", "only causal layers", attributes="DECODER"),
    Symbol("layers.attention.attention_registry.ATTENTION_BACKENDS", "prefill on an accelerator", attributes="get"),
    Symbol(
        "model_executor.forward_batch_info.ForwardMode",
        "phases",
        attributes="is_decode is_extend is_idle is_decode_or_idle",
    ),
    Symbol(
        "model_executor.model_runner.ModelRunner",
        "the pools, as the factory gets them",
        attributes="device req_to_token_pool token_to_kv_pool max_total_num_tokens",
    ),
    Symbol(
        "model_executor.forward_batch_info.ForwardBatch",
        "a step's batch",
        attributes="forward_mode batch_size "
        "req_pool_indices seq_lens seq_lens_cpu seq_lens_sum out_cache_loc positions extend_prefix_lens "
        "extend_prefix_lens_cpu extend_seq_lens extend_seq_lens_cpu extend_start_loc rids",
    ),
)

SYMBOLS = (
    REGISTRATION
    + RESOLUTION
    + PLATFORM
    + MEMORY
    + HOST_TIER
    + HICACHE
    + REQUESTS
    + SCHEDULER
    + TRACE
    + METRICS
    + BACKEND
    + PREFILL
    + DECODE_GRAPHS
    + DECODER
)
