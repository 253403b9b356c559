"""KL to dense attention of every policy, against the bytes that a step reads, through one real server.

    python -m benchmarks.quality.model_level [--documents 3] [--tokens 7000] [--budgets 128 256 512] [--policies ...]
                                             [--kind prose|code|digits] [--quick]

A document with six hidden numbers is prefilled once (dense and exact, under every policy). Then each policy decodes the same
text, token by token (benchmarks/forced.py): the document's continuation, then four questions with their answers. So the
questions, too, are read by sparse steps. Per policy and budget: KL(dense || policy) and agreement of the first choice over the
continuation, KL over the answers' digits (Q) and how many answers have every digit as the first choice; and bytes read per
decode step, layer and kv head as bf16 KV would have them: metadata, recalled tokens, sinks and window. A second table has the
KL by how unsure dense is of the next token (its entropy), continuation and answers together; `--kind` takes a text that is
easier (source code) or harder (random digits) than prose.

`equal-bytes` rows give the published policy, or those that `--equal-bytes` names, the budget at which it reads what ours reads.
Intervals are 95 %, by bootstrap over parts of 8 tokens. "Over ours" is a KL over that of ours at the same budget (or bytes),
paired by part. Writes JSON, Markdown and SVG to benchmarks/results/.

    python -m benchmarks.quality.model_level --join RESULT.json RESULT.json

puts the documents of several runs into one table, with the arms that all have. A document that is in several results has the
arms of all of them; of an arm that is in several, the last one named counts. `--documents 1` takes the first one alone.
`--beside RESULT.json` draws a result of earlier code in the same picture.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from benchmarks.forced import FLAGS, forced_decode, interval, kl_divergence, mean, paired_ratio, parts_of
from benchmarks.policies import POLICIES, Reading
from benchmarks.policies.control import use
from benchmarks.quality.documents import KINDS, PROSE, Document, make_documents, read_kind
from benchmarks.quality.figures import quality_against_bytes
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.tools.demo_model import default_out

PART = 8  # tokens that the bootstrap takes together
UNSURE_FROM = (0.1, 1.0, 2.0)  # nats of dense's entropy where the next column begins; ten digits alike have 2.3
MOST_CANDIDATES = 2048
SMALL_BUDGET = 128  # half of the candidates do up to here
# An idle server would take most of a core from what runs beside it.
SERVER_FLAGS = [*FLAGS, "--max-total-tokens", "20000", "--page-size", "16", "--sleep-on-idle"]
SERVER_FLAGS += ["--watchdog-timeout", "3600"]  # a chunk of a prefill may take long on a CPU
DOCUMENTS = 3
QUICK_POLICIES = ["ours", "oracle"]  # and the published one at our bytes
MINIMUM_EQUAL_BUDGET = 16
OURS = "ours"
SIZE_OPTIONS = ("budget_tokens", "candidate_tokens")  # columns of their own


class Arm(NamedTuple):
    """One policy at one budget; `name` tells arms of the same policy apart."""

    name: str
    policy: str
    options: dict[str, Any]


def options_of(budget: int, candidates: int | None = None) -> dict[str, Any]:
    """Step options at a budget; by default as many candidates as the defaults have, half of them at small budgets."""
    if candidates is None:
        candidates = MOST_CANDIDATES if budget > SMALL_BUDGET else MOST_CANDIDATES // 2
    return {"budget_tokens": budget, "candidate_tokens": max(budget, candidates)}


def arms_of(
    policies: list[str],
    budgets: list[int],
    candidates: list[int] | None = None,
    changes: Sequence[dict[str, Any]] = (),
) -> list[Arm]:
    """Every policy at every budget, and at every number of candidates where some are given; then ours with each change.

    Args:
        policies: of `POLICIES`.
        budgets: tokens.
        candidates: tokens; None: `options_of` chooses.
        changes: step options of ours, each to be compared at every budget.
    """
    arms = []
    counts: Sequence[int | None] = candidates or [None]
    for policy in policies:
        for budget in budgets:
            for count in counts:
                name = f"{policy}-{budget}" + (f"-{count}" if count else "")
                arms.append(Arm(name, policy, options_of(budget, count)))
    for budget, change in itertools.product(budgets, changes):
        arms.append(Arm(f"{OURS}-{budget}-{change_text(change)}", OURS, options_of(budget) | change))
    return arms


def changed(options: dict[str, Any]) -> dict[str, Any]:
    """Step options beside the budget and the candidates."""
    return {name: value for name, value in options.items() if name not in SIZE_OPTIONS}


def change_text(options: dict[str, Any]) -> str:
    """Options as `name value, name value`."""
    return ", ".join(f"{name} {value}" for name, value in options.items())


class Sizes(NamedTuple):
    """What a step had before it, the model's shape, and the server's configuration."""

    clustered: int
    base: int
    head_dim: int
    layers: int
    config: dict[str, Any]


def step_bytes(arm: Arm, sizes: Sizes, counts: dict[str, float] | None = None) -> float:
    """Bytes per decode step, layer and kv head; by what was counted, where it was."""
    options = sizes.config | arm.options | ({"candidate_tokens": round(counts["candidates"])} if counts else {})
    reading = Reading(
        sizes.clustered, sizes.base, sizes.head_dim, ClusterKVConfig(**options), counts["chosen"] if counts else None
    )
    return POLICIES[arm.policy].step_bytes(reading, sizes.layers)


def equal_bytes(policy: str, like: Arm, sizes: Sizes) -> Arm:
    """`policy` with the largest budget, in whole 16 tokens, at which it reads no more than `like`."""
    limit = step_bytes(like, sizes)
    budget = MINIMUM_EQUAL_BUDGET
    while budget + 16 < sizes.clustered:
        if step_bytes(Arm("", policy, options_of(budget + 16)), sizes) > limit:
            break
        budget += 16
    return Arm(f"{policy}-equal-bytes-{like.options['budget_tokens']}", policy, options_of(budget))


class Decoded(NamedTuple):
    """One policy's log-probabilities over a document's decoded text, without the row of the prefill."""

    rows: np.ndarray  # float32 [n - 1, vocabulary]; row i predicts decoded[i + 1]
    counts: dict[str, Any]  # the server's counters, this decode alone


def decode(server: Server, document: Document) -> Decoded:
    """Force the document's decoded text under the policy in use."""
    before = server.counts()
    rows = forced_decode(server, document.prompt, document.decoded)[1:]
    after = server.counts()
    return Decoded(rows, {name: after[name] - before[name] for name in ("sparse_steps", "tokens_available")})


def entropy(rows: np.ndarray) -> np.ndarray:
    """Of each row of log-probabilities [n, vocabulary], in nats: float64 [n]."""
    return np.array([-np.sum(np.exp(row) * row) for row in rows.astype(np.float64)])


def compare(document: Document, reference: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
    """KL by token of the continuation and of the answers' digits, agreement, and right answers."""
    kl = kl_divergence(reference, rows)
    text = np.array(document.decoded[1:])
    natural = slice(0, document.natural.stop - 1)
    answers = [slice(part.start - 1, part.stop - 1) for part in document.answers]
    return {
        "kl": kl[natural].tolist(),
        "same": (reference[natural].argmax(1) == rows[natural].argmax(1)).astype(int).tolist(),
        "answer_kl": [kl[part].tolist() for part in answers],
        "right": [bool((rows[part].argmax(1) == text[part]).all()) for part in answers],
        "surprise": (-rows[natural][np.arange(len(kl[natural])), text[natural]]).tolist(),
    }


def sizes_of(server_counts: dict[str, Any], document: Document, model: dict[str, Any]) -> Sizes:
    """Clustered and always-attended tokens of a mean sparse step of the document."""
    clustered = server_counts["tokens_available"] / server_counts["sparse_steps"]
    length = len(document.prompt) + len(document.decoded) / 2
    return Sizes(round(clustered), round(length - clustered), **model)


def run_document(
    server: Server, document: Document, arms: list[Arm], model: dict[str, Any], equal: Sequence[str], again: bool
) -> dict[str, Any]:
    """All arms over one document.

    Args:
        server: started with `SERVER_FLAGS`.
        document: with what is decoded.
        arms: policies at their budgets.
        model: what `Sizes` knows beside the tokens.
        equal: policies to add at the bytes of each of ours.
        again: decode densely twice, for the largest KL between the two.
    """
    server.flush()
    use(server, "dense")
    for _ in range(2):  # clustered at the first, cut where a match ends at the second: alike for every arm from then on
        server.generate(document.prompt, 1)
    reference = decode(server, document)
    assert reference.counts["sparse_steps"] == 0, "the reference was not dense"
    found: dict[str, Any] = {"arms": {}, "dense": compare(document, *[reference.rows] * 2)}
    unsure = entropy(reference.rows)
    found["entropy"] = unsure[: document.natural.stop - 1].tolist()
    found["answer_entropy"] = [unsure[part.start - 1 : part.stop - 1].tolist() for part in document.answers]
    if again:
        found["dense_again_kl_max"] = float(kl_divergence(reference.rows, decode(server, document).rows).max())
    queue, sizes = list(arms), None
    folder = tempfile.TemporaryDirectory(prefix="quality-")
    bar = tqdm(total=len(queue), leave=False, unit="arm")
    while queue:
        arm = queue.pop(0)
        bar.set_description(arm.name)
        counted = Path(folder.name, "counts.json") if POLICIES[arm.policy].counted else None
        use(server, arm.policy, record={"file": str(counted), "counts": True} if counted else None, **arm.options)
        decoded = decode(server, document)
        if counted:
            use(server, "dense")
        counts = json.loads(counted.read_text()) if counted else None
        assert decoded.counts["sparse_steps"] >= 0.9 * len(decoded.rows), f"{arm.name}: {decoded.counts}"
        sizes = sizes or sizes_of(decoded.counts, document, model)
        found["arms"][arm.name] = {
            **compare(document, reference.rows, decoded.rows),
            "policy": arm.policy,
            "options": arm.options,
            "bytes": step_bytes(arm, sizes, counts),
            "counts": counts,
        }
        if arm.policy == OURS and not changed(arm.options):
            more = [equal_bytes(policy, arm, sizes) for policy in equal]
            queue += more
            bar.total += len(more)
        bar.update()
    bar.close()
    folder.cleanup()
    found["sizes"] = sizes._asdict() if sizes else None
    return found


def like_ours(name: str, options: dict[str, Any]) -> str | None:
    """The arm of ours, with the defaults, that an arm is compared with: of the same budget or bytes; None for itself."""
    _, equal, budget = name.partition("-equal-bytes-")
    like = f"{OURS}-{budget if equal else options['budget_tokens']}"
    return None if like == name else like


def summary(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per arm over all documents."""
    lines = []
    for name in documents[0]["arms"]:
        parts = [document["arms"][name] for document in documents]
        kl = [part["kl"] for part in parts]
        ours = [document["arms"].get(like_ours(name, parts[0]["options"])) for document in documents]
        compared = [arm["kl"] for arm in ours if arm is not None]
        right = [answer for part in parts for answer in part["right"]]
        lines.append(
            {
                "name": name,
                "policy": parts[0]["policy"],
                "change": change_text(changed(parts[0]["options"])),
                "budget": parts[0]["options"]["budget_tokens"],
                "candidates": parts[0]["options"]["candidate_tokens"],
                "bytes": mean([[part["bytes"]] for part in parts]),
                "kl": mean(kl),
                "kl_interval": interval(parts_of(kl, PART)),
                "kl_most": max(map(max, kl)),
                "over_ours": paired_ratio(kl, compared, PART) if len(compared) == len(kl) else None,
                "same": mean([part["same"] for part in parts]),
                "answer_kl": mean([digits for part in parts for digits in part["answer_kl"]]),
                "right": sum(right),
                "answers": len(right),
                "perplexity": float(np.exp(mean([part["surprise"] for part in parts]))),
                "by_entropy": by_entropy(documents, name),
            }
        )
    return lines


def by_entropy(documents: list[dict[str, Any]], arm: str) -> list[dict[str, Any]] | None:
    """KL of an arm by dense's entropy at the same token, of continuation and answers; None for results without it."""
    if any("entropy" not in document for document in documents):
        return None
    unsure, kl = [], []
    for document in documents:
        unsure += [document["entropy"], *document["answer_entropy"]]
        kl += [document["arms"][arm]["kl"], *document["arms"][arm]["answer_kl"]]
    place = np.digitize(np.concatenate(unsure), UNSURE_FROM)
    values = np.concatenate(kl)
    columns = [values[place == column] for column in range(len(UNSURE_FROM) + 1)]
    return [
        {"tokens": part.size, "kl": float(part.mean()) if part.size else None, "most": float(part.max(initial=0))}
        for part in columns
    ]


def title_of(line: dict[str, Any]) -> str:
    """What a line of the summary is about, but for its budget."""
    title = POLICIES[line["policy"]].title + (" (equal bytes)" if "equal-bytes" in line["name"] else "")
    return title + (f", {line['change']}" if line["change"] else "")


def table(lines: list[dict[str, Any]], documents: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    sizes = documents[0]["sizes"]
    everything = 4 * sizes["head_dim"] * (sizes["clustered"] + sizes["base"])
    dense_right = [answer for document in documents for answer in document["dense"]["right"]]
    dense = float(np.exp(mean([document["dense"]["surprise"] for document in documents])))
    out = [
        f"Dense: perplexity {dense:.2f}, {sum(dense_right)} of {len(dense_right)} answers right, reads "
        f"{everything / 1024:.0f} KiB per step, layer and kv head. Mean over {len(documents)} document(s).",
        "",
        "| policy | budget | candidates | KiB per step | of dense | KL (95 %) | most | over ours (95 %) | top-1 same "
        "| Q: KL of answers | right | perplexity |",
        "|" + "---|" * 12,
    ]
    for line in lines:
        low, high = line["kl_interval"]
        candidates = line["candidates"] if line["policy"].startswith(OURS) else "-"
        out.append(
            f"| {title_of(line)} | {line['budget']} | {candidates} | {line['bytes'] / 1024:.0f} "
            f"| 1/{everything / line['bytes']:.1f} | {line['kl']:.5f} ({low:.5f} to {high:.5f}) | {line['kl_most']:.3f} "
            f"| {line['over_ours'] or '-'} | {100 * line['same']:.1f} % "
            f"| {line['answer_kl']:.4f} | {line['right']} of {line['answers']} | {line['perplexity']:.2f} |"
        )
    if all(line["by_entropy"] for line in lines):
        bounds = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(UNSURE_FROM)]
        columns = [f"below {UNSURE_FROM[0]:g}", *bounds, f"from {UNSURE_FROM[-1]:g} on"]
        tokens = [f"{part['tokens']} tokens" for part in lines[0]["by_entropy"]]
        out += ["", "KL by dense's entropy (nats), continuation and answers: mean, most", ""]
        out += ["| policy | budget | " + " | ".join(map(", ".join, zip(columns, tokens, strict=True))) + " |"]
        out += ["|" + "---|" * (2 + len(columns))]
        for line in lines:
            parts = [f"{p['kl']:.5f}, {p['most']:.3f}" if p["tokens"] else "-" for p in line["by_entropy"]]
            out.append(f"| {title_of(line)} | {line['budget']} | {' | '.join(parts)} |")
    return "\n".join(out)


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, help=f"default: {DOCUMENTS}, with --join all")
    parser.add_argument("--first", type=int, default=0, help="the first document; so several runs share the work")
    parser.add_argument("--tokens", type=int, default=7000, help="of each document")
    parser.add_argument("--natural", type=int, default=128, help="tokens of the continuation")
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument(
        "--candidates", type=int, nargs="+", help="candidate tokens to compare, instead of the defaults'"
    )
    parser.add_argument(
        "--changes", type=json.loads, nargs="+", default=[], help="step options of ours, JSON each, beside the defaults"
    )
    parser.add_argument(
        "--policies", nargs="+", choices=POLICIES, default=[name for name in POLICIES if name != "dense"]
    )
    parser.add_argument("--kind", choices=KINDS, default=PROSE, help="of text, default: %(default)s")
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    parser.add_argument(
        "--config", type=json.loads, default={}, help="JSON, the server's configuration beside the budget"
    )
    parser.add_argument(
        "--equal-bytes", nargs="+", choices=POLICIES, default=["published"], help="policies to run at our bytes too"
    )
    parser.add_argument("--no-equal-bytes", action="store_true", help="leave them out")
    parser.add_argument("--quick", action="store_true", help="one shorter document, one budget, few policies")
    parser.add_argument("--join", nargs="+", type=Path, help="results of runs to put together; runs nothing")
    parser.add_argument("--beside", type=Path, help="a result of earlier code, drawn in the picture")
    args = parser.parse_args()
    if args.text and args.kind != PROSE:
        parser.error(f"--text names a file to be read as {PROSE}: leave out --kind {args.kind}")
    if args.no_equal_bytes:
        args.equal_bytes = []
    if args.quick:
        args.documents, args.tokens, args.natural = 1, min(args.tokens, 2500), 32
        args.budgets, args.policies = [256], QUICK_POLICIES
    if args.join:
        documents, setting = join(args.join, args.documents, args.first)
    else:
        args.documents = args.documents or DOCUMENTS
        documents, source = run(args)
        setting = f"{args.model.name}, float32, {source}, {args.tokens} tokens"
        setting += f", {change_text(args.config)}" if args.config else ""
    lines = summary(documents)
    body = table(lines, documents)
    print(f"\n{body}\n")
    write_results(
        "quality-model",
        title="KL to dense against bytes per decode step",
        setting=setting,
        command=command_of("benchmarks.quality.model_level"),
        body=body,
        data={"documents": documents, "summary": lines},
        figure=quality_against_bytes(lines, summary(join([args.beside])[0]) if args.beside else []),
    )


def join(files: list[Path], count: int | None = None, first: int = 0) -> tuple[list[dict[str, Any]], str]:
    """The documents of several results, with the arms that all have, and their setting; SystemExit where that differs.

    The same document (dense decoded the same) from several results has the arms of all, the last named of each. `count` of the
    documents (None: all) are taken, from number `first` on as they are named.
    """
    documents: list[dict[str, Any]] = []
    settings = set()
    for file in files:
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            found = about["results"]["documents"]
        except (OSError, ValueError, KeyError) as error:
            raise SystemExit(f"{file} is not a result of this benchmark ({error!r}): name its JSON files") from None
        settings.add(about["setting"])
        for document in found:
            known = next((other for other in documents if other["dense"] == document["dense"]), None)
            if known is None:
                documents.append(document)
            else:
                known["arms"] |= document["arms"]
    if len(settings) > 1:
        raise SystemExit(f"these results differ in their setting ({'; '.join(sorted(settings))}): join like with like")
    documents = documents[first:][:count]
    common = set.intersection(*(set(document["arms"]) for document in documents)) if documents else set()
    if not common:
        raise SystemExit("these documents have no policy at the same budget in common: join like with like")
    for document in documents:
        document["arms"] = {name: arm for name, arm in document["arms"].items() if name in common}
    return documents, settings.pop()


def model_shape(model: Path) -> dict[str, Any]:
    """head_dim and layers of a model."""
    shape = AutoConfig.from_pretrained(model)
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    return {"head_dim": head_dim, "layers": shape.num_hidden_layers}


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Every document through one server; (results by document, the text's name).

    Interrupted (Ctrl-C, SIGTERM), it returns the documents that are done.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source, text = read_kind(args.kind, args.text)
    made = make_documents(tokenizer, text, args.first + args.documents, args.tokens, args.natural)[args.first :]
    arms = arms_of(args.policies, args.budgets, args.candidates, args.changes)
    log = Path(tempfile.mkdtemp(prefix="quality-")) / "server.log"
    print(f"starting a server; its log: {log}", flush=True)
    documents = []
    model = model_shape(args.model) | {"config": args.config}
    with serve(args.model, log, *SERVER_FLAGS, config=args.config) as server:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for i, document in enumerate(made):
                documents.append(run_document(server, document, arms, model, args.equal_bytes, not args.quick))
                print(f"document {args.first + i + 1}:\n{table(summary(documents[-1:]), documents[-1:])}", flush=True)
        except KeyboardInterrupt:
            if not documents:
                raise
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end the server's stop, and the results
            print(f"\ninterrupted: {len(documents)} of {len(made)} documents are done", flush=True)
    return documents, source


if __name__ == "__main__":
    main()
