"""The part of `sglang_symbols` that decode CUDA graphs rely on."""

from sglang_clusterkv.serving.symbol import Symbol

_RUNNER = "model_executor.runner.decode_cuda_graph_runner."

DECODE_GRAPHS = (
    Symbol(
        "layers.attention.graph_variants.create_attention_graph_variants", "hooked: graphs by batch size", "hf_config"
    ),
    Symbol(
        "layers.attention.graph_variants.AttentionGraphVariants", "what it gives", attributes="capture_labels select"
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner.__init__",
        "asks for them, then makes the backend's state",
        mentions=(
            "create_attention_graph_variants(model_runner.model_config.hf_config)",
            "self.attn_backend.init_cuda_graph_state(self.max_bs, self.max_num_token)",
        ),
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner.can_run_graph", "hooked: what graphs have no room for", "self forward_batch"
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner._capture_one_stream",
        "captures each of them",
        mentions=("variants.capture_labels", "_set_capture_attention_variant(attention_variant)"),
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner.capture_one_shape",
        "prepares a capture, and every replay's start",
        mentions=(
            "attn_backend.init_forward_metadata_out_graph(forward_batch, in_capture=True)",
            '"on_after_cuda_graph_warmup"',
        ),
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner.capture_one_shape",
        "records what a replay's start does",
        mentions=("self._run_in_graph_metadata_prep(attn_backend, forward_batch)",),
        since="0.5.23",
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner.capture_one_shape",
        "records what a replay's start does (0.5.22)",
        mentions=("attn_backend.init_forward_metadata_in_graph(forward_batch)",),
        before="0.5.23",
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner._resolve_attention_variant",
        "which graph a batch replays",
        mentions=("return variants.select(forward_batch)",),
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner._init_replay_attn_metadata_from_view",
        "prepares a replay",
        mentions=("attn_backend.init_forward_metadata_out_graph(fb_view)",),
        since="0.5.23",
    ),
    Symbol(
        _RUNNER + "DecodeCudaGraphRunner.load_batch",
        "prepares a replay (0.5.22)",
        mentions=("attn_backend.init_forward_metadata_out_graph(fb_view)",),
        before="0.5.23",
    ),
    Symbol(
        "model_executor.model_runner.ModelRunner._forward_raw",
        "asks once whether a graph runs a batch",
        mentions=("and self.decode_cuda_graph_runner.can_run_graph(forward_batch)",),
    ),
    Symbol("model_executor.runner_utils.capture_mode.get_capture_attention_variant", "what is captured", ""),
    Symbol(
        "layers.attention.base_attn_backend.SharedReadEnds",
        "the later of two",
        attributes="max_of IN_REPLAY POST_REPLAY",
    ),
    Symbol("layers.attention.base_attn_backend.AttentionBackend.on_after_cuda_graph_warmup", "overridden", "self"),
)
