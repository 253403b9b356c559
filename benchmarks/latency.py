"""Time per token, first token and clustering share on the CPU: torch_native, our dense path and clusterkv, in one run.

    python -m benchmarks.latency [--tokens 7700] [--batch 8] [--budget 256] [--candidates 1024]
    python -m benchmarks.latency --only clusterkv tier-auto tier-int8

Starts one server after the other with the same flags (float32; `--model FOLDER`, else SmolLM2-135M-Instruct), so run it alone:
about 25 minutes, most of it torch_native's prefill. Prints a table and writes it to benchmarks/results/, never over an older
one.

One document of `--tokens` tokens is asked for at batch 1 and, with a different last token each, at batch `--batch`: the
requests share the prefix in the radix cache, and each reads all of it at every step. Times per token at a batch are medians
between the moment when all requests decode and the end of the first.

The arms `tier-auto` and `tier-int8` are clusterkv with a host tier (docs/memory.md), whose device tier holds a quarter of the
document, or the least with which `--batch` requests run at once. With one of them all servers run at most that many, in chunks
of 256, and those with clusters build decoded runs of 64 tokens: both keep that least small.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from examples.agent import FACTS, make_document
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.tier import least_device_pages, ring_target
from sglang_clusterkv.tools.demo_model import default_out

SHORT_TOKENS = 1000
ARMS = ["clusterkv", "dense", "torch_native"]
TIERS = {"tier-auto": "auto", "tier-int8": "int8"}  # and the format of their host rows
TIER_RATIO, TIER_CHUNK, TIER_RUN = 8, 256, 64
PAGE = 16


def decode_ms(streams: list[list[float]]) -> float:
    """Median milliseconds between tokens while every stream decodes."""
    begin, end = max(times[1] for times in streams), min(times[-1] for times in streams)
    gaps = [b - a for times in streams for a, b in zip(times[1:], times[2:], strict=False) if a >= begin and b <= end]
    return 1000 * statistics.median(gaps)


def together(server: Server, prompts: list[list[int]], tokens: int) -> list[list[float]]:
    """Stream all prompts at once."""
    streams: list[list[float]] = [[] for _ in prompts]

    def one(i: int) -> None:
        streams[i] = server.stream(prompts[i], tokens)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return streams


def measure(server: Server, document: list[int], args: argparse.Namespace, clusters: bool) -> dict[str, Any]:
    """All figures of one server."""
    found: dict[str, Any] = {}
    with tqdm(total=5, leave=False, unit="part") as bar:
        server.generate(document[-200:], 8)  # loads and compiles what the first request would wait for
        bar.update()
        found["short_ms"] = decode_ms([server.stream(document[:SHORT_TOKENS], args.new_tokens)])
        bar.update()
        before = server.counts()["build_ms"] if clusters else 0
        cold = server.stream(document[1:], args.new_tokens)
        found["prefill_s"] = cold[1] - cold[0]
        found["long_ms"] = decode_ms([cold])
        if clusters:
            found["clustering_share"] = (server.counts()["build_ms"] - before) / 1000 / found["prefill_s"]
        bar.update()
        hit = server.stream(document[1:], 4)
        found["hit_s"] = hit[1] - hit[0]
        bar.update()
        tier = server.counts().get("host_tier") if clusters else None
        streams = together(server, [document[1:-1] + [100 + i] for i in range(args.batch)], 2 * args.new_tokens)
        found["batch_ms"] = decode_ms(streams)
        if tier is not None:
            found["from_host"] = share_from_host(tier, server.counts()["host_tier"])
        bar.update()
    return found


def share_from_host(before: dict[str, int], after: dict[str, int]) -> float:
    """Of the rows that were recalled between two looks at a tier's counts, those that lay on the host."""
    host, device = (after[f"recalled_rows_{where}"] - before[f"recalled_rows_{where}"] for where in ("host", "device"))
    return host / max(1, host + device)


def tier_pool(tokens: int, batch: int, options: dict[str, Any]) -> int:
    """Tokens of the KV cache, of which one in `TIER_RATIO` has room on the device: a quarter of a document, or the least."""
    config = ClusterKVConfig(**options)
    least = least_device_pages(config, chunk_tokens=TIER_CHUNK, max_rows=batch, page_size=PAGE)
    quarter = math.ceil(tokens / 4 / PAGE) + ring_target(TIER_CHUNK, batch, PAGE)
    return TIER_RATIO * PAGE * max(least, quarter)


def table(rows: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    """The results as Markdown."""
    base = rows["torch_native"] if "torch_native" in rows else next(iter(rows.values()))
    lines = [
        f"| | ms/token at {SHORT_TOKENS} | at {args.tokens}, batch 1 | ratio | batch {args.batch} | ratio | prefill s "
        "| clustering | first token after a full hit s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        share = f"{100 * row['clustering_share']:.1f} %" if "clustering_share" in row else "-"
        lines.append(
            f"| {name} | {row['short_ms']:.0f} | {row['long_ms']:.0f} | {row['long_ms'] / base['long_ms']:.2f} "
            f"| {row['batch_ms']:.0f} | {row['batch_ms'] / base['batch_ms']:.2f} | {row['prefill_s']:.1f} | {share} "
            f"| {row['hit_s']:.2f} |"
        )
    shares = [f"{name} {100 * row['from_host']:.0f} %" for name, row in rows.items() if "from_host" in row]
    if shares:
        lines += ["", f"Recalled from the host at batch {args.batch}: {', '.join(shares)}."]
    return "\n".join(lines)


def main() -> None:
    """Measure every server in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7700)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--only", nargs="+", choices=[*ARMS, *TIERS], default=ARMS)
    parser.add_argument("--model", type=model_folder, default=default_out())
    args = parser.parse_args()
    tiered = any(name in TIERS for name in args.only)
    model = args.model
    tokenizer = AutoTokenizer.from_pretrained(model)
    document = tokenizer(make_document(args.tokens + 1500, FACTS)).input_ids[: args.tokens + 1]
    assert len(document) == args.tokens + 1, "the document came out too short"
    ours = {"budget_tokens": args.budget, "candidate_tokens": args.candidates}
    if tiered:
        ours |= {"recluster_every": TIER_RUN}
    covering = max(8192, 1 << args.tokens.bit_length())  # with what is decoded behind them
    configs: dict[str, dict[str, Any] | None] = {
        "clusterkv": ours,
        "dense": dict.fromkeys(("budget_tokens", "candidate_tokens"), covering),
        "torch_native": None,
    }
    configs |= {name: ours | {"host_ratio": TIER_RATIO, "host_kv_dtype": rows} for name, rows in TIERS.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name in args.only:
        config = configs[name]
        print(f"{name}: starting a server", flush=True)
        log = Path(tempfile.mkdtemp()) / "server.log"
        backend = "torch_native" if config is None else "clusterkv"
        tokens = (
            tier_pool(args.tokens, args.batch, ours)
            if tiered
            else max(20000, 2 * args.tokens + 2 * PAGE * args.batch * args.new_tokens)
        )
        pool = ["--page-size", str(PAGE), "--max-total-tokens", str(tokens)]
        if tiered:
            pool += ["--chunked-prefill-size", str(TIER_CHUNK), "--max-running-requests", str(args.batch)]
        with serve(model, log, *pool, config=config, backend=backend) as server:
            rows[name] = measure(server, document, args, clusters=name in ("clusterkv", *TIERS))
            if config is not None:
                rows[name]["counts"] = server.counts()
        print(json.dumps({name: rows[name]}), flush=True)
    text = table(rows, args)
    print(f"\n{text}")
    write_results(
        f"latency-{args.tokens}-b{args.batch}",
        title="Time per token, first token and clustering",
        setting=(f"{model.name}, float32, {args.tokens} tokens, budget {args.budget}, candidates {args.candidates}"),
        command=command_of("benchmarks.latency"),
        body=text,
        data=rows,
    )


if __name__ == "__main__":
    main()
