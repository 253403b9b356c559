"""Offline inference with clusterkv, without a server: questions that share one long document.

The first question goes alone and leaves the document in the radix cache, clustered. The others follow as one batch and find it
there; sent all at once, each would prefill and cluster a copy of its own. Takes the demo model (`make demo-model`) unless told
otherwise.

    python examples/engine.py [--model-path DIR] [--budget 256] [--tokens 4000] [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import FACTS, make_document


def device_arguments() -> dict[str, Any]:
    """What `make serve` adds on a machine without an accelerator."""
    import torch

    if torch.cuda.is_available():
        return {}
    # SGLang would size its KV pool by the whole memory of the machine.
    arguments: dict[str, Any] = {"device": "cpu", "max_total_tokens": 16384}
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        # Without AMX, decode steps in float32 are several times faster than in bf16.
        arguments["dtype"] = "float32"
    return arguments


def read_counts(engine: Any) -> dict[str, Any]:
    """The plugin's counts, once two readings agree: the last step's come a moment after its tokens."""
    counts: dict[str, Any] | None = None
    while (newer := engine.get_server_info()["internal_states"][0]["clusterkv"]) != counts:
        counts = newer
        time.sleep(0.3)
    return newer


def main() -> None:
    """One batch; prints the answers and what was clustered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", type=Path, default=default_out(), help="default: the demo model")
    parser.add_argument(
        "--budget", type=int, default=256, help="clustered tokens attended per step, default %(default)s"
    )
    parser.add_argument("--tokens", type=int, default=4000, help="about how long the document is, default %(default)s")
    parser.add_argument("--small", action="store_true", help="about 1,500 tokens and 16 per answer, for a quick check")
    args = parser.parse_args()
    tokens, max_tokens = (1500, 16) if args.small else (args.tokens, 32)
    if not args.model_path.exists():
        sys.exit(f"{args.model_path} has no model: run `make demo-model`, or pass another folder with --model-path")

    import sglang as sgl

    # An engine has no flag for it. What the caller's environment says goes first.
    os.environ.setdefault("SGLANG_CLUSTERKV_CONFIG", json.dumps({"budget_tokens": args.budget}))
    engine = sgl.Engine(
        model_path=str(args.model_path),
        attention_backend="clusterkv",
        log_level="warning",
        **device_arguments(),
    )
    try:
        document = make_document(tokens, FACTS)
        tokenizer = engine.tokenizer_manager.tokenizer
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{document}\n\n{fact.question}"}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for fact in FACTS
        ]
        sampling = {"temperature": 0, "max_new_tokens": max_tokens}
        outputs = engine.generate(prompts[:1], sampling)
        first = read_counts(engine)
        outputs += engine.generate(prompts[1:], sampling)
        both = read_counts(engine)
    finally:
        engine.shutdown()

    for fact, output in zip(FACTS, outputs, strict=True):
        info = output["meta_info"]
        print(f"\n{fact.question}  ({info['prompt_tokens']:,} prompt tokens, {info['cached_tokens']:,} cached)")
        print(f"  {' '.join(output['text'].split())}")
    print()
    print(f"{'':<16}  {'alone':>9}  {'the batch':>9}")
    for name in ("tokens_clustered", "tokens_reused", "tokens_recalled", "tokens_available", "splits"):
        print(f"{name:<16}  {first[name]:>9,}  {both[name] - first[name]:>9,}")


# The engine's processes import this file again.
if __name__ == "__main__":
    main()
