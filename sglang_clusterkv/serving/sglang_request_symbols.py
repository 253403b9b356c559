"""Every SGLang symbol that checks of requests rely on, besides those of `sglang_symbols`."""

from sglang_clusterkv.serving.symbol import Symbol

REQUESTS = (
    Symbol(
        "managers.scheduler.Scheduler.process_input_requests", "every request enters a scheduler here", "self recv_reqs"
    ),
    Symbol(
        "managers.scheduler.Scheduler.ingest_requests",
        "what was received goes there",
        mentions=("self.process_input_requests(recv_reqs)",),
    ),
    Symbol(
        "managers.scheduler.Scheduler.send_abort_output",
        "answers a refused request",
        "self abort_req req",
        since="0.5.23",
    ),
    Symbol(
        "managers.scheduler.Scheduler.send_control_output",
        "answers a request for memory on a CPU",
        "self output recv_req",
        since="0.5.23",
    ),
    Symbol(
        "managers.scheduler_components.output_sender.SenderWrapper.send_output",
        "answers a refused request",
        "self output recv_obj",
        before="0.5.23",
    ),
    Symbol(
        "managers.scheduler.Scheduler",
        "the model's facts",
        attributes="model_config tp_worker process_input_requests session_controller",
    ),
    Symbol("managers.io_struct.AbortReq", "answers a refused request", attributes="rid finished_reason"),
    Symbol(
        "managers.io_struct.TokenizedGenerateReqInput",
        "what is checked",
        attributes="rid http_worker_ipc input_ids input_embeds positional_embed_overrides token_indices_to_pool mm_inputs "
        "session_id session_params sampling_params top_logprobs_num return_logprob logprob_start_len",
    ),
    Symbol(
        "managers.io_struct.TokenizedEmbeddingReqInput",
        "what is checked",
        attributes="rid http_worker_ipc input_ids positional_embed_overrides token_indices_to_pool mm_inputs",
    ),
    *[
        Symbol(
            f"managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.{name.lower()}_memory_occupation",
            "asked for memory on a CPU",
            "self recv_req",
            mentions=(f"return {name}MemoryOccupationReqOutput()",),
        )
        for name in ("Release", "Resume")
    ],
    Symbol("managers.io_struct.BatchTokenizedGenerateReqInput", "several requests in one", attributes="batch"),
    Symbol("managers.io_struct.BatchTokenizedEmbeddingReqInput", "several requests in one", attributes="batch"),
    Symbol("managers.io_struct.SessionParams", "what comes first, what is replaced", attributes="id rid replace"),
    Symbol("session.session_controller.SessionController", "sessions by their ids", attributes="get"),
    Symbol("session.session_controller.Session", "requests of a session by their ids", attributes="req_nodes"),
    Symbol("session.session_controller.SessionReqNode", "requests behind another", attributes="req children"),
    Symbol("sampling.sampling_params.SamplingParams", "what is checked", attributes="min_new_tokens stop_token_ids"),
    Symbol("configs.model_config.ModelConfig", "its tokens", attributes="vocab_size hf_text_config is_multimodal"),
    Symbol("lora.lora_manager.LoRAManager", "tokens of adapters", attributes="lora_added_tokens_size"),
    Symbol("model_executor.model_runner.ModelRunner", "its adapters", attributes="lora_manager"),
    Symbol("managers.schedule_batch.MultimodalProcessorOutput", "gives back what was lent", attributes="mm_items"),
    Symbol(
        "managers.schedule_batch.MultimodalDataItem.release_transport_proxies",
        "gives back what was lent",
        "self consumer_count",
    ),
    Symbol("managers.embed_types.PositionalEmbeds.reconstruct", "gives back what was lent", "self target_device"),
)
