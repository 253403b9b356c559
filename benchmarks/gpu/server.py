"""Steps of a whole server at Llama-3.1-8B's shape with made-up weights: time per step at a long context, by arm.

    python -m benchmarks.gpu.server ARM [--dry]        ARM: sparse, eager, dense-triton, dense-flashinfer

The server is SGLang's engine without a tokenizer; a step's time is what more tokens of an answer take more. A dry run resolves
the arguments, plugin included, and starts nothing.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.figures import Figure, main
from benchmarks.gpu.operations import H200
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import (
    BANDWIDTHS_TBS,
    Launch,
    StepShape,
    dense_launches,
    sparse_launches,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
WEIGHT_BYTES = 15.0e9  # read in a step, the table of embeddings left out
BATCH, CONTEXT, FEW, MANY = 8, 32768, 16, 80  # FEW and MANY: tokens of the two answers that are compared


class Arm(NamedTuple):
    """One kind of server."""

    backend: str
    is_sparse: bool
    arguments: dict[str, Any]


ARMS = {
    "sparse": Arm("clusterkv", True, {}),
    "eager": Arm("clusterkv", True, {"disable_decode_cuda_graph": True}),
    "dense-triton": Arm("triton", False, {}),
    "dense-flashinfer": Arm("flashinfer", False, {}),
}


def arguments_of(arm: Arm, folder: Path) -> dict[str, Any]:
    """SGLang's, for a server of that arm over a model in `folder`."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {
        "model_path": str(folder), "load_format": "dummy", "skip_tokenizer_init": True, "attention_backend": arm.backend,
        "sampling_backend": "pytorch", "grammar_backend": "none", "context_length": CONTEXT + 1024,
        "cuda_graph_max_bs_decode": BATCH, "max_running_requests": BATCH, "chunked_prefill_size": 8192,
        "mem_fraction_static": 0.85, "log_level": "warning", **arm.arguments,
    }  # fmt: skip


def predicted_ms(arm: Arm) -> float:
    """Of a step: the weights and the attention's launches, at an H200's bandwidth."""
    shape = StepShape(32, 32, 8, 128, BATCH, CONTEXT)
    launches: list[Launch] = sparse_launches(shape, ClusterKVConfig()) if arm.is_sparse else dense_launches(shape)
    tbs = BANDWIDTHS_TBS[H200]
    return WEIGHT_BYTES / tbs / 1e9 + shape.layers * sum(launch.microseconds(tbs) for launch in launches) / 1e3


def timed(arm: Arm, arguments: dict[str, Any]) -> list[Figure]:
    """Start, prefill, and decode a few and many tokens."""
    import sglang

    begin = time.perf_counter()
    engine = sglang.Engine(**arguments)
    figures = [Figure("start", time.perf_counter() - begin, "s")]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(10, 120000, (CONTEXT,), generator=generator).tolist() for _ in range(BATCH)]
    took = {}
    # The first time nothing is cached; then every prompt is found, and clustered, but for its last page.
    for tokens in (1, FEW, MANY):
        begin = time.perf_counter()
        engine.generate(
            input_ids=prompts, sampling_params={"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        )
        took[tokens] = time.perf_counter() - begin
    figures.append(Figure(f"prefill, {BATCH} x {CONTEXT:,}", took[1], "s"))
    step_ms = 1000 * (took[MANY] - took[FEW]) / (MANY - FEW)
    figures.append(Figure(f"step, {BATCH} x {CONTEXT:,}", step_ms, "ms", predicted_ms(arm)))
    if arm.is_sparse:
        counts = engine.get_server_info()["internal_states"][0]["clusterkv"]
        assert counts["sparse_steps"] >= BATCH * MANY // 2, f"steps were not sparse: {counts}"
        assert not counts["faults"], counts["faults"]
        figures.append(Figure("requests of steps that were sparse", counts["sparse_steps"], ""))
    engine.shutdown()
    return figures


def measure(name: str, dry: bool) -> list[Figure]:
    """Of one arm."""
    arm = ARMS[name]
    with tempfile.TemporaryDirectory() as folder:
        arguments = arguments_of(arm, Path(folder))
        if not dry:
            return timed(arm, arguments)
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import ServerArgs

        load_plugins()
        ServerArgs(**arguments | {"device": "cpu"}).resolve_once()
        return [Figure(f"step, {BATCH} x {CONTEXT:,}", math.nan, "ms", predicted_ms(arm))]


if __name__ == "__main__":
    main(__doc__ or "", measure, of=tuple(ARMS))
