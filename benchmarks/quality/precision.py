"""What bf16 costs: the server's own, and that of the tables we store, against the same server in float32;
or what a KV cache in fewer bits costs.

    python -m benchmarks.quality.precision [--tokens 3000] [--natural 128] [--budget 256] [--kv]

One document, as in model_level, is decoded by a server in float32 and by one in bf16 (weights, KV cache, products), each dense
and sparse; and sparse in float32 with `centroid_dtype` "bf16". KL of each to dense in float32, and of sparse to dense in bf16:
what is lost on top of what bf16 loses by itself. With `--kv` all servers are in float32 but for their KV
caches: float32, bf16, fp8_e4m3 and fp8_e5m2. Writes JSON and Markdown to benchmarks/results/. A CPU without bf16 instructions
takes minutes for a bf16 prefill of 3,000 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer

from benchmarks.forced import forced_decode, interval, kl_divergence, parts_of
from benchmarks.policies.control import use
from benchmarks.quality.documents import Document, make_documents, read_text
from benchmarks.quality.model_level import PART, SERVER_FLAGS, options_of
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import serve
from sglang_clusterkv.tools.demo_model import default_out


class Run(NamedTuple):
    """One server and what it decodes with."""

    dtype: str
    config: dict[str, Any]
    policies: tuple[str, ...]
    kv: str = "auto"  # --kv-cache-dtype


Comparison = tuple[
    str, tuple[int, str], tuple[int, str]
]  # (what is told, reference, compared): places in runs, and policies

RUNS = [
    Run("float32", {}, ("dense", "ours")),
    Run("float32", {"centroid_dtype": "bf16"}, ("ours",)),
    Run("bfloat16", {}, ("dense", "ours")),
]
FLOAT32, ROWS_BF16, BFLOAT16 = range(3)
COMPARISONS: list[Comparison] = [
    ("ours, float32 server", (FLOAT32, "dense"), (FLOAT32, "ours")),
    ("ours with bf16 centroids and mean values, float32 server", (FLOAT32, "dense"), (ROWS_BF16, "ours")),
    ("dense, bf16 server", (FLOAT32, "dense"), (BFLOAT16, "dense")),
    ("ours, bf16 server", (FLOAT32, "dense"), (BFLOAT16, "ours")),
    ("ours, bf16 server, against dense in bf16", (BFLOAT16, "dense"), (BFLOAT16, "ours")),
]
KV_DTYPES = ("auto", "bf16", "fp8_e4m3", "fp8_e5m2")
KV_RUNS = [Run("float32", {}, ("dense", "ours"), kv) for kv in KV_DTYPES]
KV_COMPARISONS: list[Comparison] = [("ours", (0, "dense"), (0, "ours"))]
for _at, _kv in enumerate(KV_DTYPES[1:], 1):
    KV_COMPARISONS += [
        (f"dense, KV in {_kv}", (0, "dense"), (_at, "dense")),
        (f"ours, KV in {_kv}", (0, "dense"), (_at, "ours")),
        (f"ours, KV in {_kv}, against dense with KV in {_kv}", (_at, "dense"), (_at, "ours")),
    ]


def decode(run: Run, document: Document, budget: int) -> dict[str, np.ndarray]:
    """Log-probabilities of the continuation under each policy of a run, without the row of the prefill."""
    log = Path(tempfile.mkdtemp(prefix="precision-")) / "server.log"
    print(f"starting a {run.dtype} server, KV in {run.kv}, with {run.config}; its log: {log}", flush=True)
    flags = ("--device", "cpu", "--dtype", run.dtype, "--kv-cache-dtype", run.kv)
    found = {}
    with serve(default_out(), log, *SERVER_FLAGS, config=run.config, device_flags=flags) as server:
        use(server, "dense")
        server.generate(document.prompt, 1)
        for policy in run.policies:
            use(server, policy, **options_of(budget))
            found[policy] = forced_decode(server, document.prompt, document.decoded[document.natural])[1:]
    return found


def lines(rows: list[dict[str, np.ndarray]], comparisons: list[Comparison] = COMPARISONS) -> list[dict[str, Any]]:
    """KL and agreement of each comparison."""
    found = []
    for title, (reference, reference_policy), (compared, compared_policy) in comparisons:
        p, q = rows[reference][reference_policy], rows[compared][compared_policy]
        kl = kl_divergence(p, q)
        found.append(
            {
                "title": title,
                "kl": float(kl.mean()),
                "kl_interval": interval(parts_of([kl], PART)),
                "same": float(np.mean(p.argmax(1) == q.argmax(1))),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The comparisons as Markdown."""
    out = ["| compared with dense in float32, unless it says otherwise | KL (95 %) | top-1 same |", "|---|---|---|"]
    for line in found:
        low, high = line["kl_interval"]
        out.append(f"| {line['title']} | {line['kl']:.5f} ({low:.5f} to {high:.5f}) | {100 * line['same']:.1f} % |")
    return "\n".join(out)


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000, help="of the document")
    parser.add_argument("--natural", type=int, default=128, help="tokens of the continuation")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument("--kv", action="store_true", help="KV caches of other types in a float32 server")
    args = parser.parse_args()
    source, text = read_text(args.text)
    tokenizer = AutoTokenizer.from_pretrained(default_out())
    (document,) = make_documents(tokenizer, text, 1, args.tokens, args.natural)
    runs, comparisons = (KV_RUNS, KV_COMPARISONS) if args.kv else (RUNS, COMPARISONS)
    found = lines([decode(run, document, args.budget) for run in runs], comparisons)
    body = table(found)
    print(f"\n{body}\n")
    write_results(
        "quality-kv" if args.kv else "quality-precision",
        title="What a KV cache in fewer bits costs" if args.kv else "What bf16 costs",
        setting=f"SmolLM2-135M-Instruct, {source}, {args.tokens} tokens, budget {args.budget}",
        command=command_of("benchmarks.quality.precision"),
        body=body,
        data={"lines": found},
    )


if __name__ == "__main__":
    main()
