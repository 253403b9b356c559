"""Every SGLang symbol that the host tier relies on, besides those of `sglang_symbols`."""

from sglang_clusterkv.serving.symbol import Symbol

HOST_TIER = (
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool._kv_buffer_shapes",
        "the buffers' length",
        "self",
        mentions=("rows = self.size + self.page_size",),
    ),
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool._build_kv_buffer_descs",
        "checks it while they are made",
        mentions=("num_slots = self.size + self.page_size",),
    ),
    Symbol(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator.resolve_max_num_reqs",
        "requests that fit the device pages",
        "self token_capacity",
    ),
    Symbol(
        "mem_cache.kv_cache_configurator.KVCacheConfigurator._resolve_memory_pool_config",
        "asks for them",
        mentions=("config.max_running_requests = self.resolve_max_num_reqs(",),
    ),
    Symbol("mem_cache.kv_cache_configurator.KVCacheConfigurator", "whose memory it sizes", attributes="device"),
    Symbol(
        "model_executor.model_runner.ModelRunner.init_kv_index_translator",
        "where the tier is made",
        "self",
        mentions=(
            "self.kv_index_translator = KVIndexTranslator(",
            "page_size=self.page_size or 1",
            "is_draft_worker=self.is_draft_worker",
        ),
    ),
    Symbol(
        "model_executor.model_runner.ModelRunner._init_post_memory_pool_components",
        "makes the translator, before any backend",
        mentions=("self.init_kv_index_translator()",),
    ),
    Symbol(
        "model_executor.model_runner.ModelRunner",
        "for the translator, and the most requests",
        attributes="kv_index_translator token_to_kv_pool_allocator max_running_requests page_size server_args is_draft_worker",
    ),
    Symbol(
        "mem_cache.kv_index_translator.KVIndexTranslator.__init__",
        "subclassed",
        "self req_to_token token_to_kv_pool_allocator token_to_kv_pool page_size device is_draft_worker",
        mentions=("self._spaces[IdSpaceKind.FULL] = IdSpace(key=(IdSpaceKind.FULL, None))",),
    ),
    Symbol("mem_cache.kv_index_translator.KVIndexTranslator.space", "asked at each forward", "self kind"),
    Symbol("mem_cache.kv_index_translator.KVIndexTranslator", "what it translates", attributes="_spaces"),
    Symbol("mem_cache.kv_loc_plan.IdSpace", "what it translates", "key write read_v2p"),
    Symbol("mem_cache.kv_loc_plan.IdSpaceKind", "what it translates", attributes="FULL"),
    Symbol(
        "mem_cache.kv_loc_plan.KVLocPlan._window_in",
        "calls our translation",
        mentions=("space.write(self.write_virtual)",),
    ),
    Symbol(
        "mem_cache.kv_loc_plan.KVLocPlan.bind",
        "gives a batch what was translated",
        "self batch reader cols",
        mentions=("batch.out_cache_loc = self.write_ids(reader, cols=cols)",),
    ),
    Symbol(
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        "translates once per forward, after its head",
        mentions=("kv_loc_plan = translator.own_plan(ret)", "kv_loc_plan.bind(ret, translator, cols=write_cols)"),
    ),
    Symbol(
        "mem_cache.prefill_budget.PrefillBudget.__init__",
        "subclassed",
        "self allocator tree_cache num_mixed_decode_tokens",
    ),
    Symbol("mem_cache.prefill_budget.PrefillBudget", "overridden", attributes="check_prefill can_allocate_prefill"),
    Symbol("mem_cache.prefill_budget.PrefillBudget.available_chunk_tokens", "overridden", "self chunk_limit"),
    Symbol(
        "managers.schedule_policy.PrefillAdder",
        "asks our budget",
        mentions=(
            "self.memory_budget = token_to_kv_pool_allocator.create_prefill_budget(",
            "self.memory_budget.check_prefill(",
            "self.memory_budget.available_chunk_tokens(\n",
            "self.memory_budget.can_allocate_prefill(",
        ),
    ),
    Symbol(
        "mem_cache.kv_index_translator.KVIndexTranslator.pack_read_stream",
        "tells SGLang's own backends where prefixes are",
        "self plan req_pool_indices seq_lens indptr out kv_start_idx kind token_mapping num_token_blocks kv_lens_sum",
        since="0.5.23",
    ),
    Symbol(
        "mem_cache.kv_index_translator.KVIndexTranslator.pack_read_stream",
        "tells SGLang's own backends where prefixes are (0.5.22)",
        "self plan req_pool_indices seq_lens indptr out kv_start_idx kind token_mapping",
        before="0.5.23",
    ),
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool._store_kv_layer",
        "writes to the buffers, not to what the getters answer",
        mentions=("self.k_buffer[layer_idx],", "self.v_buffer[layer_idx],"),
    ),
    Symbol("mem_cache.prefill_budget.PrefillBudget.reserve", "overridden, counts prefixes", mentions=("is_chunked",)),
    Symbol("runtime_context.get_schedule", "chunk size", ""),
    Symbol("managers.scheduler.Scheduler.init_chunked_prefill", "whether there are chunks", "self"),
    Symbol(
        "managers.scheduler.Scheduler",
        "chunks, and a batch that is full or not",
        attributes="chunked_prefill_size token_to_kv_pool_allocator running_batch",
    ),
    Symbol(
        "managers.scheduler.Scheduler._get_new_batch_prefill_raw",
        "takes a pass that waits for a full batch",
        mentions=("running_batch.batch_is_full = len(adder.can_run_list) > 0 or (",),
    ),
    Symbol("managers.schedule_batch.ScheduleBatch", "full or not", attributes="batch_is_full"),
)

# --enable-hierarchical-cache: what it loads comes from our allocator, and is there before the engine reads it.
HICACHE = (
    Symbol(
        "mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController.load",
        "our allocator notes the pages",
        mentions=("device_indices = full_allocator.alloc(len(host_indices))",),
    ),
    Symbol(
        "managers.cache_controller.HiCacheController.start_loading",
        "behind the forwards that were launched",
        mentions=(
            "self.l2_transfer_engine.host_to_device_stream.wait_stream(",
            "on_layer_done=producer_event.complete",
        ),
    ),
    Symbol(
        "managers.cache_controller.LayerDoneCounter",
        "waits on the stream",
        attributes="num_layers consumer_index wait_until",
        mentions=("self.events[self.consumer_index].wait(threshold)",),
    ),
    Symbol("managers.cache_controller.LayerDoneCounter.wait_until", "waits on the stream", "self threshold"),
    Symbol(
        "managers.tp_worker.TpModelWorker.forward_batch_generation",
        "names the load of a forward, behind our hook",
        mentions=("self.set_hicache_consumer(batch.hicache_consumer_index)",),
    ),
    Symbol(
        "mem_cache.memory_pool.MHATokenToKVPool",
        "the load under way, sizes of the host's pool",
        attributes="layer_transfer_counter host_capacity_bytes",
    ),
)
