"""Where does the error come from? Output error and recalled mass of every layer and head, against the budget.

    python -m benchmarks.quality.attention_level [--budgets 64 128 256 512 1024] [--policies ours oracle] [--tokens 7000]

A document is prefilled, then each policy decodes its continuation and four questions (as in model_level.py). In every layer the
server compares the policy's output with dense attention for the very same query: |output - dense| / |dense| by query head, and
the exact share of attention on the tokens that were read. Both are means over the steps. The first arm also counts how large
the clusters' spread terms g are. Writes JSON, Markdown, SVG.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from benchmarks.forced import forced_decode
from benchmarks.policies import POLICIES
from benchmarks.policies.control import use
from benchmarks.policies.recorder import BONUS_EDGES
from benchmarks.quality.documents import make_documents, read_text
from benchmarks.quality.figures import error_maps
from benchmarks.quality.model_level import SERVER_FLAGS, options_of
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out

LAYER_GROUPS = 5
BONUS_SHARES = (0.5, 0.99, 0.999, 1.0)


def table(found: dict[str, dict[str, Any]]) -> str:
    """By policy and budget: mean error and mass, by group of layers, and the heads that have most of the error."""
    layers = len(next(iter(found.values()))["error"])
    edges = np.linspace(0, layers, LAYER_GROUPS + 1).astype(int)
    groups = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    names = " | ".join(f"layers {group.start} to {group.stop - 1}" for group in groups)
    out = []
    for quantity, title in (("error", "Output error"), ("mass", "Share of attention read exactly")):
        out += [f"{title}:", "", f"| policy | budget | mean | {names} |", "|" + "---|" * (LAYER_GROUPS + 3)]
        for arm in found.values():
            values = np.array(arm[quantity])
            parts = " | ".join(f"{values[group].mean():.4f}" for group in groups)
            out.append(f"| {POLICIES[arm['policy']].title} | {arm['budget']} | {values.mean():.4f} | {parts} |")
        out.append("")
    bonus = np.array(next(iter(found.values()))["bonus"])
    out += ["Spread term g of (cluster, query head): half, 99 %, 99.9 % and all are below", ""]
    out += ["| layers | 50 % | 99 % | 99.9 % | 100 % |", "|" + "---|" * 5]
    highest = [bonus_below(layer)[-1] for layer in bonus]
    named = {"all": bonus.sum(0)} | {
        str(layer): bonus[layer] for layer in np.argsort(highest)[: -LAYER_GROUPS - 1 : -1]
    }
    for name, counts in named.items():
        out.append(f"| {name} | " + " | ".join(f"{edge:.2f}" for edge in bonus_below(counts)) + " |")
    out += ["", "Largest errors, as layer.head (error, share read):"]
    out.append("")
    for name, arm in found.items():
        error, mass = np.array(arm["error"]), np.array(arm["mass"])
        worst = np.dstack(np.unravel_index(np.argsort(-error, axis=None)[:6], error.shape))[0]
        out.append(
            f"- {name}: " + ", ".join(f"{l}.{h} ({error[l, h]:.2f}, {mass[l, h]:.2f})" for l, h in worst.tolist())
        )
    return "\n".join(out)


def bonus_below(counts: np.ndarray) -> list[float]:
    """Below which edge of `BONUS_EDGES` each of `BONUS_SHARES` of the counted spread terms lies."""
    passed = np.cumsum(counts) / max(counts.sum(), 1)
    return [float(BONUS_EDGES[1 + np.searchsorted(passed, share - 1e-12)]) for share in BONUS_SHARES]


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--natural", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["ours", "ours-no-estimate", "oracle"])
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args()
    model = args.model
    source, text = read_text(args.text)
    document = make_documents(AutoTokenizer.from_pretrained(model), text, 1, args.tokens, args.natural)[0]
    heads = AutoConfig.from_pretrained(model).num_attention_heads
    folder = Path(tempfile.mkdtemp(prefix="attention-"))
    arms = [(policy, budget) for policy in args.policies for budget in args.budgets]
    print(f"starting a server; its log: {folder / 'server.log'}", flush=True)
    found = {}
    with serve(model, folder / "server.log", *SERVER_FLAGS, config={}) as server:
        for _ in range(2):
            server.generate(document.prompt, 2)  # a decode step, at whose head it is clustered
        for policy, budget in tqdm(arms, unit="arm"):
            file = folder / f"{policy}-{budget}.npz"
            use(server, policy, record={"file": str(file), "heads": heads}, **options_of(budget))
            forced_decode(server, document.prompt, document.decoded)
            use(server, "ours")
            with np.load(file) as values:
                arm = {name: values[name].tolist() for name in ("error", "mass", "bonus")}
            found[f"{policy}, {budget}"] = {"policy": policy, "budget": budget, **arm}
    body = table(found)
    print(f"\n{body}\n")
    write_results(
        "quality-attention",
        title="Output error and recalled mass by layer and head",
        setting=f"{model.name}, float32, {source}, {args.tokens} tokens, {len(document.decoded)} steps",
        command=command_of("benchmarks.quality.attention_level"),
        body=body,
        data=found,
        figure=error_maps(found),
    )


if __name__ == "__main__":
    main()
