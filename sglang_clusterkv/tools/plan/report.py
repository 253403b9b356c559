"""The `plan` command: from its arguments to a table in Markdown, or the same numbers as JSON."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from sglang_clusterkv.config import ClusterKVConfig, fit_defaults, load_config, validate
from sglang_clusterkv.tools.plan.checkpoint import Checkpoint, PlanError, read_checkpoint
from sglang_clusterkv.tools.plan.devices import GPUS, MEMORY_SHARE, REACHED
from sglang_clusterkv.tools.plan.plan import Plan, Side, Times, Wish, make_plan, refusal

LIKELY = "what is likely has our kernels' instructions in it too, and may be wrong by half either way"
NOT_COUNTED = "what is likely is known for the H100 and H200 alone, and takes longer"


def run(args: argparse.Namespace) -> str:
    """The text to print.

    Raises PlanError or ConfigError, one sentence, where the model is refused or something is missing.
    """
    model = read_checkpoint(args.model)
    gpu = GPUS.get(args.gpu)
    if gpu is None and args.memory_gb is None:
        raise PlanError(
            "--gpu cpu needs --memory-gb: that of the machine which weights, KV cache and clusters may take"
        )
    if args.dtype != "auto":
        model = model._replace(dtype=args.dtype)
    config = fit_defaults(load_config(args.clusterkv_config, os.environ), args.page_size)
    if sentence := refusal(model, config, args.tp, on_cpu=gpu is None):
        raise PlanError(sentence)
    validate(config, args.page_size, model.head_dim, model.layers)
    if model.most_tokens is not None and args.context > model.most_tokens:
        raise PlanError(
            f"--context {args.context} is more than this model's {model.most_tokens} tokens: use that or less"
        )
    weights_gb = args.weights_gb or (model.weight_bytes or 0) / 1e9
    if not weights_gb:
        raise PlanError(f"{args.model} has no safetensors files: pass --weights-gb")
    wish = Wish(
        context=args.context,
        concurrency=args.concurrency,
        tp=args.tp,
        page_size=args.page_size,
        memory_gb=args.memory_gb or MEMORY_SHARE * gpu.memory_gb if gpu else args.memory_gb,
        tbs=gpu.tbs if gpu else None,
        counted=gpu.counted if gpu else False,
    )
    plan = make_plan(model, weights_gb, config, wish)
    if args.json:
        return json.dumps(_numbers(plan, wish, weights_gb), indent=2)
    return "\n".join(_lines(model, config, wish, plan, weights_gb, args.gpu))


def _numbers(plan: Plan, wish: Wish, weights_gb: float) -> dict[str, Any]:
    def side(one: Side) -> dict[str, Any]:
        times = {
            f"{name}_ms": times and times._asdict()
            for name, times in (("attention", one.attention), ("step", one.step))
        }
        sizes = {name: value for name, value in one._asdict().items() if name not in ("attention", "step")}
        return sizes | times | {"tokens_per_s": one.tokens_per_s, "likely_tokens_per_s": one.likely_tokens_per_s}

    return plan._asdict() | {
        "dense": side(plan.dense),
        "sparse": side(plan.sparse),
        "speedup": plan.speedup,
        "likely_speedup": plan.likely_speedup,
        "weights_gb": weights_gb,
        **wish._asdict(),
    }


def _lines(
    model: Checkpoint, config: ClusterKVConfig, wish: Wish, plan: Plan, weights_gb: float, gpu: str
) -> list[str]:
    sliding = f", {model.sliding_layers} of them sliding ({model.window} tokens)" if model.sliding_layers else ""
    ranks = f" on each of {wish.tp}" if wish.tp > 1 else ""
    lines = [
        f"{model.name}: {model.layers} layers{sliding}, {model.heads} query and {model.kv_heads} kv heads of "
        f"{model.head_dim}, KV cache in {model.dtype}, {weights_gb:.1f} GB of weights.",
        f"{gpu}{ranks}: {wish.memory_gb:.1f} GB for weights, KV cache and clusters. {wish.concurrency} requests of "
        f"{wish.context:,} tokens, budget {config.budget_tokens}, page size {wish.page_size}.",
        "",
    ]
    dense, sparse, columns = plan.dense, plan.sparse, ["dense", "clusterkv"]
    share = 100 * sparse.index_bytes / sparse.token_bytes
    rows: list[tuple[str, ...]] = [
        ("keys and values, bytes per token" + ranks, f"{dense.token_bytes:,}", f"{sparse.token_bytes:,}"),
        ("clusters, bytes per token" + ranks, "-", f"{sparse.index_bytes:,} ({share:.1f} %)"),
        ("tokens that fit", f"{dense.pool_tokens:,}", f"{sparse.pool_tokens:,}"),
        (f"requests of {wish.context:,} tokens that fit, sharing nothing", f"{dense.fits:,}", f"{sparse.fits:,}"),
        ("of the wished ones, decoding at once", f"{dense.running:,}", f"{sparse.running:,}"),
    ]
    if plan.weights_ms is not None:
        read = f"{plan.weights_ms:.2f}"
        likely = [
            read,
            _number(sparse.attention and sparse.attention.likely),
            _number(sparse.step and sparse.step.likely),
            _number(sparse.likely_tokens_per_s, 0),
            _number(plan.likely_speedup),
        ]
        rows += [
            ("a step, ms: the weights", read, read),
            ("a step, ms: attention", _least(dense.attention), _least(sparse.attention)),
            ("a step, ms", _least(dense.step), _least(sparse.step)),
            ("tokens/s, all requests", _number(dense.tokens_per_s, 0), _number(sparse.tokens_per_s, 0)),
            ("speed-up", "1", _number(plan.speedup)),
        ]
        if wish.counted:
            columns.append("clusterkv, likely")
            rows = [(*row, cell) for row, cell in zip(rows, [""] * (len(rows) - len(likely)) + likely, strict=True)]
    lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return [*lines, "", *_notes(plan, wish)]


def _notes(plan: Plan, wish: Wish) -> list[str]:
    notes = [f"Host tier: {plan.host_tier}. The table is without one."]
    if wish.tbs is None:
        return [*notes, "There is no model of a step on a CPU: docs/performance.md has measured ones."]
    if plan.pays_from is None:
        notes.append(
            f"{wish.concurrency} requests of up to {wish.context:,} tokens: a dense step is as fast or faster."
        )
    else:
        likely = "likely " if wish.counted else ""
        notes.append(
            f"A step of {wish.concurrency} requests is {likely}faster with clusterkv from {plan.pays_from:,} tokens on."
        )
    notes.append(
        f"Times are the least by bytes (at {REACHED * wish.tbs:.2f} TB/s) and launches; "
        f"{LIKELY if wish.counted else NOT_COUNTED}. No GPU has run our kernels yet. What else a layer computes, prefill, "
        "clustering and what the CPU does are left out."
    )
    return notes


def _least(times: Times | None) -> str:
    return _number(times and times.least)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
