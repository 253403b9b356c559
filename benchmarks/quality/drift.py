"""Does quality drift while thousands of tokens are decoded? KL to dense by part of the answer, and against a fresh prefix.

    python -m benchmarks.quality.drift [--prompt 3000] [--tokens 4000] [--budget 256] [--tail 400] [--skip 30000 60000]

A document's beginning is prefilled, its continuation of `--tokens` tokens is decoded one by one (benchmarks/forced.py), by the
dense path and by ours, re-clustering and merging on. What sparse steps wrote to the KV cache stays and is clustered in turn.
The last `--tail` tokens are then decoded twice more:

- clustered afresh: all clusters are forgotten, the KV of the sparse steps stays and is clustered at once, as a prompt is;
- prefilled afresh: the KV is computed again, exactly, and clustered at once.

The tail's KL over the first is the drift of clusters that came to be piece by piece; the second over the first is what the
KV itself has lost. Several documents (`--skip`) are pooled. Writes JSON, Markdown and SVG.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.forced import forced_decode, interval, kl_divergence, mean, paired_ratio, parts_of
from benchmarks.policies.control import forget_clusters, use
from benchmarks.quality.documents import read_text
from benchmarks.quality.figures import kl_over_answer
from benchmarks.quality.model_level import SERVER_FLAGS, options_of
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, serve
from sglang_clusterkv.tools.demo_model import default_out

PART = 32  # tokens that the bootstrap takes together
QUARTERS = 4
FRESH = {"clustered": "same KV, clustered afresh", "prefilled": "prefilled and clustered afresh"}


def decode(server: Server, policy: str, prompt: list[int], answer: list[int], budget: int) -> np.ndarray:
    """Log-probabilities of an answer under a policy, from an empty cache; without the row of the prefill."""
    server.flush()
    use(server, policy, **options_of(budget))
    return forced_decode(server, prompt, answer)[1:]


def measure(server: Server, prompt: list[int], answer: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """KL of the whole answer, of its tail over fresh prefixes, and what the tokens cost each."""
    dense = decode(server, "dense", prompt, answer, args.budget)
    before = server.counts()
    ours = decode(server, "ours", prompt, answer, args.budget)
    counts = {
        name: count - before[name]
        for name, count in server.counts().items()
        if name in ("sparse_steps", "segments", "merges", "tokens_clustered")
    }
    kl = kl_divergence(dense, ours)
    text = np.array(answer[1:])
    places = np.arange(len(text))
    surprise = {"dense": -dense[places, text], "ours": -ours[places, text]}
    same = dense.argmax(1) == ours.argmax(1)
    del ours
    cut = len(answer) - args.tail
    # The first row of a tail comes from the prefill: one token more, and its row is left out.
    tail = (prompt + answer[: cut - 1], answer[cut - 1 :])
    forget_clusters(server)
    before = server.counts()
    clustered = forced_decode(server, *tail)[1:]
    again = server.counts()["tokens_clustered"] - before["tokens_clustered"]
    assert again > 0.9 * len(prompt), f"{again} tokens were clustered afresh, the prompt has {len(prompt)}"
    prefilled = decode(server, "ours", *tail, args.budget)
    return {
        "kl": kl.tolist(),
        "same": same.astype(int).tolist(),
        "surprise": {name: values.tolist() for name, values in surprise.items()},
        "tail": kl[-args.tail :].tolist(),
        "clustered": kl_divergence(dense[-args.tail :], clustered).tolist(),
        "prefilled": kl_divergence(dense[-args.tail :], prefilled).tolist(),
        "counts": counts,
    }


def table(documents: list[dict[str, Any]]) -> str:
    """Quarters of the answers, all documents together, then the tails."""
    out = [
        "| tokens of the answer | KL (95 %) | top-1 same | perplexity, dense | perplexity, ours |",
        "|---|---|---|---|---|",
    ]
    edges = np.linspace(0, len(documents[0]["kl"]), QUARTERS + 1).astype(int)
    for begin, end in zip(edges, edges[1:], strict=False):
        part = slice(begin, end)
        kl = [document["kl"][part] for document in documents]
        low, high = interval(parts_of(kl, PART))
        dense, ours = (
            float(np.exp(mean([document["surprise"][name][part] for document in documents])))
            for name in ("dense", "ours")
        )
        same = 100 * mean([document["same"][part] for document in documents])
        out.append(
            f"| {begin + 1} to {end} | {mean(kl):.5f} ({low:.5f} to {high:.5f}) | {same:.1f} % | {dense:.3f} | {ours:.3f} |"
        )
    out += [
        "",
        f"The last {len(documents[0]['tail'])} tokens:",
        "",
        "| document | KL in one go | " + " | ".join(f"{title} | ratio (95 %)" for title in FRESH.values()) + " |",
        "|---|---|" + "---|---|" * len(FRESH),
    ]
    rows = [(str(i + 1), [document]) for i, document in enumerate(documents)]
    if len(rows) > 1:
        rows.append(("all", documents))
    for name, some in rows:
        tails = [document["tail"] for document in some]
        cells = [name, f"{mean(tails):.5f}"]
        for fresh in FRESH:
            values = [document[fresh] for document in some]
            cells += [f"{mean(values):.5f}", str(paired_ratio(tails, values, PART))]
        out.append("| " + " | ".join(cells) + " |")
    counts = {name: sum(document["counts"][name] for document in documents) for name in documents[0]["counts"]}
    out += [
        "",
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
    parser.add_argument(
        "--skip", type=int, nargs="+", default=[30000], help="tokens of the text to leave out before each document"
    )
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON, the server's configuration beside the budget"
    )
    args = parser.parse_args()
    source, text = read_text(args.text)
    ids = AutoTokenizer.from_pretrained(default_out())(text, add_special_tokens=False).input_ids
    if len(ids) < max(args.skip) + args.prompt + args.tokens:
        raise SystemExit(f"the text has {len(ids)} tokens, too few: lower --skip, --prompt or --tokens")
    log = Path(tempfile.mkdtemp(prefix="drift-")) / "server.log"
    print(f"starting a server; its log: {log}", flush=True)
    found: list[dict[str, Any]] = []
    with serve(default_out(), log, *SERVER_FLAGS, config=args.config) as server:
        for skip in tqdm(args.skip, unit="document"):
            ends = np.cumsum([skip, args.prompt, args.tokens]).tolist()
            found.append(measure(server, ids[ends[0] : ends[1]], ids[ends[1] : ends[2]], args))
    body = table(found)
    print(f"\n{body}\n")
    write_results(
        "quality-drift",
        title=f"Drift over {args.tokens} decoded tokens",
        setting=f"SmolLM2-135M-Instruct, float32, {source}, prompt of {args.prompt} tokens, budget {args.budget}",
        command=command_of("benchmarks.quality.drift"),
        body=body,
        data=found,
        figure=kl_over_answer(
            np.mean([document["kl"] for document in found], axis=0),
            {title: mean([document[fresh] for document in found]) for fresh, title in FRESH.items()},
            args.tail,
        ),
    )


if __name__ == "__main__":
    main()
