"""Does quality drift while thousands of tokens are decoded? KL to dense by part of the answer, and against a fresh prefix.

    python -m benchmarks.quality.drift [--prompt 3000] [--tokens 4000] [--budget 256] [--tail 400]

A document's beginning is prefilled, its continuation of `--tokens` tokens is decoded one by one (benchmarks/forced.py), by the
dense path and by ours, re-clustering and merging on. What sparse steps wrote to the KV cache stays and is clustered in turn.
Then the prompt and all but the last `--tail` tokens are prefilled afresh, which is exact, clustered at once, and the last
`--tail` tokens are decoded again: what drift adds is the KL of the tail over that. Writes JSON, Markdown and SVG.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from benchmarks.forced import forced_decode, interval, kl_divergence, mean
from benchmarks.policies.control import use
from benchmarks.quality.documents import read_text
from benchmarks.quality.figures import kl_over_answer
from benchmarks.quality.model_level import PART, SERVER_FLAGS, options_of
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, serve
from sglang_clusterkv.demo_model import default_out

QUARTERS = 4


def decode(server: Server, policy: str, prompt: list[int], answer: list[int], budget: int) -> np.ndarray:
    """Log-probabilities of an answer under a policy, from an empty cache; without the row of the prefill."""
    server.flush()
    use(server, policy, **options_of(budget))
    return forced_decode(server, prompt, answer)[1:]


def measure(server: Server, prompt: list[int], answer: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """KL of the whole answer, of its tail afresh, and what the tokens cost each."""
    dense = decode(server, "dense", prompt, answer, args.budget)
    before = server.counts()
    ours = decode(server, "ours", prompt, answer, args.budget)
    after = server.counts()
    kl = kl_divergence(dense, ours)
    text = np.array(answer[1:])
    places = np.arange(len(text))
    surprise = {"dense": -dense[places, text], "ours": -ours[places, text]}
    same = dense.argmax(1) == ours.argmax(1)
    del ours
    cut = len(answer) - args.tail
    # The first row of the tail comes from the prefill: one token more, and its row is left out.
    afresh = decode(server, "ours", prompt + answer[: cut - 1], answer[cut - 1 :], args.budget)
    return {
        "kl": kl.tolist(),
        "same": same.astype(int).tolist(),
        "surprise": {name: values.tolist() for name, values in surprise.items()},
        "tail": kl[-args.tail :].tolist(),
        "afresh": kl_divergence(dense[-args.tail :], afresh).tolist(),
        "counts": {
            name: after[name] - before[name] for name in ("sparse_steps", "segments", "merges", "tokens_clustered")
        },
    }


def drift_ratio(tail: list[float], afresh: list[float]) -> tuple[float, float, float]:
    """KL of the tail over the same tokens afresh, and 95 % of it by bootstrap over parts, paired."""
    parts = len(tail) // PART
    drifted, fresh = (np.array([np.sum(part) for part in np.array_split(values, parts)]) for values in (tail, afresh))
    picks = np.random.default_rng(7).integers(parts, size=(10_000, parts))
    low, high = np.quantile(drifted[picks].sum(1) / fresh[picks].sum(1), [0.025, 0.975])
    return float(drifted.sum() / fresh.sum()), float(low), float(high)


def table(found: dict[str, Any]) -> str:
    """Quarters of the answer, then the tail."""
    out = [
        "| tokens of the answer | KL (95 %) | top-1 same | perplexity, dense | perplexity, ours |",
        "|---|---|---|---|---|",
    ]
    edges = np.linspace(0, len(found["kl"]), QUARTERS + 1).astype(int)
    for begin, end in zip(edges, edges[1:], strict=False):
        part = slice(begin, end)
        kl = found["kl"][part]
        low, high = interval(np.array_split(kl, max(1, len(kl) // PART)))
        dense, ours = (float(np.exp(np.mean(found["surprise"][name][part]))) for name in ("dense", "ours"))
        out.append(
            f"| {begin + 1} to {end} | {np.mean(kl):.5f} ({low:.5f} to {high:.5f}) | {100 * mean([found['same'][part]]):.1f} % "
            f"| {dense:.3f} | {ours:.3f} |"
        )
    ratio, low, high = drift_ratio(found["tail"], found["afresh"])
    counts = found["counts"]
    out += [
        "",
        f"Last {len(found['tail'])} tokens: KL {np.mean(found['tail']):.5f}; the same tokens over a prefix prefilled and "
        f"clustered afresh {np.mean(found['afresh']):.5f}; drifted over fresh {ratio:.2f} ({low:.2f} to {high:.2f}). "
        f"{counts['sparse_steps']} sparse steps, {counts['segments']} segments made, {counts['merges']} by merging, "
        f"{counts['tokens_clustered']} tokens clustered.",
    ]
    return "\n".join(out)


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=3000, help="tokens prefilled")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens decoded")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--tail", type=int, default=400, help="last tokens that are compared with a fresh prefix")
    parser.add_argument("--skip", type=int, default=30000, help="tokens of the text to leave out before the prompt")
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON, the server's configuration beside the budget"
    )
    args = parser.parse_args()
    source, text = read_text(args.text)
    ids = AutoTokenizer.from_pretrained(default_out())(text, add_special_tokens=False).input_ids[args.skip :]
    if len(ids) < args.prompt + args.tokens:
        raise SystemExit(
            f"the text has {len(ids)} tokens after --skip, too few for --prompt and --tokens: lower one of them"
        )
    log = Path(tempfile.mkdtemp(prefix="drift-")) / "server.log"
    print(f"starting a server; its log: {log}", flush=True)
    with serve(default_out(), log, *SERVER_FLAGS, config=args.config) as server:
        found = measure(server, ids[: args.prompt], ids[args.prompt : args.prompt + args.tokens], args)
    body = table(found)
    print(f"\n{body}\n")
    write_results(
        "quality-drift",
        title=f"Drift over {args.tokens} decoded tokens",
        setting=f"SmolLM2-135M-Instruct, float32, {source}, prompt of {args.prompt} tokens, budget {args.budget}",
        command=command_of("benchmarks.quality.drift"),
        body=body,
        data=found,
        figure=kl_over_answer(found["kl"], found["afresh"]),
    )


if __name__ == "__main__":
    main()
