"""What of the index is worth its bytes: ours in other formats and with other steps, without a server.

    python -m benchmarks.quality.layerwise [--documents 1] [--budgets 256 512] [--policies ours ours-1-bit ...]
                                           [--changes '{"candidate_tokens":1024}'] [--prefill FILE]
                                           [--equal-bytes pq-hsa double-p vattention published quest]

Documents, decoded text, KL and bytes are those of benchmarks.quality.model_level. That one asks a real server, a token at a
time; here the text goes through the model a layer at a time, all decode steps together, each with its own choice over the
clusters that the engine's k-means makes of the same prompt. So a policy costs seconds and not minutes. "ours" is there to be
compared with model_level's. What a step does is benchmarks/policies/steps.py, whose default is the kernels' definition.
`--equal-bytes` names methods of other papers, which get budgets at which they read what ours reads.

`--prefill FILE` keeps the prompts' keys and values (46 KB a token for the demo model) for the next run. Writes JSON, Markdown
and SVG to benchmarks/results/, of the policies that are done where it is interrupted.

    python -m benchmarks.quality.layerwise --join RESULT.json ... [--beside RESULT.json]

puts several of its results together, as model_level's `--join` does; the picture has the curves of model_level's result beside.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.policies import FORMATS, POLICIES, Reading
from benchmarks.policies.anchors import Others, StandIns, Tokens, VAttention, sample
from benchmarks.policies.formats import Bytes, Format
from benchmarks.policies.policy import TokenPolicy
from benchmarks.policies.reformed import Tables, clustered_anew, make
from benchmarks.policies.steps import Decoded, Step, dots, mix
from benchmarks.quality.documents import PROSE, Document, make_documents, read_kind
from benchmarks.quality.figures import frontier
from benchmarks.quality.llama_layers import LayeredModel
from benchmarks.quality.model_level import (
    OURS,
    Arm,
    Sizes,
    arms_of,
    changed,
    compare,
    entropy,
    equal_bytes,
    join,
    step_bytes,
    summary,
    title_of,
)
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import model_folder
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.merge.reference import Partial, merge
from sglang_clusterkv.memory.movement import RANK
from sglang_clusterkv.tools.demo_model import default_out

PAGE = 16
LEAST_PAGES = 4  # of a segment
STEPS = 16  # at once: what they need of a layer should fit a core's cache
ORACLE = "oracle"
OTHERS = ("pq-hsa", "double-p", "vattention", "published", "quest")  # papers' methods


def served(config: ClusterKVConfig) -> Format:
    """Ours."""
    return Format(codes_in_estimate=config.estimate_codes, rank=RANK if config.moving_values != "never" else 0)


FORMS = {OURS: served(ClusterKVConfig())} | {name: form for name, (_, form) in FORMATS.items()}


class Prefix:
    """A prompt's keys and values by layer, parted into what is clustered and what is always attended.

    Args:
        kept: by layer, float32 [P, H, D] each.
        config: whose sinks, window and segments there are.
    """

    def __init__(self, kept: list[tuple[torch.Tensor, torch.Tensor]], config: ClusterKVConfig) -> None:
        tokens = len(kept[0][0])
        end = (tokens - config.window_tokens) // PAGE * PAGE
        begins = list(range(config.sink_tokens, end - LEAST_PAGES * PAGE + 1, config.segment_tokens))
        end = min(end, begins[-1] + config.segment_tokens)
        self.places = torch.arange(config.sink_tokens, end)
        self.of_token = (self.places - config.sink_tokens) // config.segment_tokens
        self.base = torch.cat((torch.arange(config.sink_tokens), torch.arange(end, tokens)))
        self._kept, self._config = kept, config
        self._labels: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def base_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sinks and window, float32 [H, W, D]."""
        keys, values = (rows[self.base].transpose(0, 1) for rows in self._kept[layer])
        return keys, values

    def tables(self, layer: int, form: Format) -> Tables:
        """Of the clustered tokens, in a format."""
        keys, values = (rows[self.places].transpose(0, 1).contiguous() for rows in self._kept[layer])
        size = form.tokens_per_cluster or self._config.tokens_per_cluster
        if (layer, size) not in self._labels:
            segments = int(self.of_token[-1]) + 1
            self._labels[layer, size] = clustered_anew(keys, self.of_token, segments, size, self._config)
        return make(self.places, keys, values, self.of_token, *self._labels[layer, size], form)


class Attention:
    """What attends at the decoded tokens of one text; counts what it does.

    Args:
        prefix: before them.
        policy: of `FORMS` or `OTHERS`, or the oracle; None: dense.
        config: step options.
        scale: of the logits.
    """

    def __init__(self, prefix: Prefix, policy: str | None, config: ClusterKVConfig, scale: float) -> None:
        self._prefix, self._config, self._scale = prefix, config, scale
        self._form = served(config) if policy == OURS else FORMS.get(policy) if policy else None
        make = POLICIES[policy].make if policy in (ORACLE, *OTHERS) else None
        self._other = make(config.budget_tokens) if make else None
        if isinstance(self._other, VAttention):
            self._config = self._other.configured(config)
        self._random = torch.Generator().manual_seed(0)
        self._candidates = self._chosen = self._heads = 0.0

    def counts(self) -> dict[str, float]:
        """As `Reformed.counts`."""
        heads = max(1.0, self._heads)
        return {"candidates": self._candidates / heads, "chosen": self._chosen / heads}

    def __call__(self, layer: int, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `llama_layers.Attend`."""
        base_keys, base_values = self._prefix.base_of(layer)
        before, state = base_keys.shape[1], None
        base_keys = torch.cat((base_keys, keys.transpose(0, 1)), 1)
        base_values = torch.cat((base_values, values.transpose(0, 1)), 1)
        t = self._prefix.tables(layer, self._form or Format())
        step = Step(t, self._form or Format(), self._config, self._scale)
        found: list[torch.Tensor] = []
        for begin in range(0, len(q), STEPS):
            rows = q[begin : begin + STEPS].contiguous()
            later = torch.arange(base_keys.shape[1]) > before + torch.arange(begin, begin + len(rows)).unsqueeze(1)
            logits = (self._scale * dots(rows, base_keys)).masked_fill(later[:, None, None], -torch.inf)
            if isinstance(self._other, StandIns | TokenPolicy):
                for n, one in enumerate(rows):
                    end = before + begin + n + 1
                    tokens = Tokens(
                        one, t.keys, t.values, base_keys[:, :end].contiguous(), base_values[:, :end], self._scale
                    )
                    found.append(attended(self._other, tokens, layer).unsqueeze(0))
                continue
            if isinstance(self._other, VAttention):
                found += self._with_samples(step(rows, logits, base_values, None), rows, t)
                continue
            if self._form is None:
                logits = torch.cat((logits, self._scale * dots(rows, t.keys)), -1)
                found.append(mix(logits.softmax(-1), torch.cat((base_values, t.values), 1)))
                continue
            decoded = step(rows, logits, base_values, state)
            state = decoded.state
            found.append(decoded.whole.output)
            self._candidates += decoded.candidates
            self._chosen += decoded.chosen
            self._heads += len(rows) * keys.shape[1]
        return torch.cat(found)

    def _with_samples(self, best: Decoded, q: torch.Tensor, t: Tables) -> list[torch.Tensor]:
        """Output of each step, float32 [1, H, G, D], by what was read and by a sample of what was not."""
        found = []
        for n, one in enumerate(q):
            others = []
            for h, read in enumerate(best.read[n]):
                rest = (~read).nonzero().squeeze(-1)
                order = rest[torch.randperm(len(rest), generator=self._random)]
                others.append(Others(t.keys[h], t.values[h], order))
            exact = Partial(best.exact.output[n], best.exact.lse[n])
            part, _ = sample(one, others, exact.lse, self._config.budget_tokens, self._scale)
            found.append(merge(exact, part).output.unsqueeze(0))
        return found


def attended(policy: StandIns | TokenPolicy, tokens: Tokens, layer: int) -> torch.Tensor:
    """Output of one step in one layer, float32 [H, G, D], by what a policy reads."""
    if isinstance(policy, StandIns):
        found = policy.attend(tokens, layer, 0)[0]
        policy.next_step()
        return found
    places = policy.choose(tokens.q, tokens.keys, tokens.base_keys, layer, 0, tokens.scale).unsqueeze(-1)
    keys, values = (
        torch.cat((base, rows.take_along_dim(places, 1)), 1)
        for base, rows in ((tokens.base_keys, tokens.keys), (tokens.base_values, tokens.values))
    )
    return (tokens.scale * tokens.q @ keys.transpose(1, 2)).softmax(-1) @ values


def decode(model: LayeredModel, document: Document, attend: Attention) -> torch.Tensor:
    """Log-probabilities after each decoded token but the last, float32 [n - 1, vocabulary]."""
    return model.log_probabilities(model(document.decoded[:-1], len(document.prompt), attend))


def prefilled(model: LayeredModel, documents: list[Document], file: Path | None) -> list[Any]:
    """Keys and values of each prompt, from a file that a run over the same prompts left."""
    prompts = [document.prompt for document in documents]
    if file and file.exists():
        kept = torch.load(file)
        if kept["prompts"] == prompts:
            return list(kept["layers"])
    layers = [model.prefill(prompt) for prompt in tqdm(prompts, unit="prefill", leave=False)]
    if file:
        torch.save({"prompts": prompts, "layers": layers}, file)
    return layers


def run_document(
    model: LayeredModel,
    document: Document,
    kept: list[tuple[torch.Tensor, torch.Tensor]],
    arms: list[Arm],
    more: Any,
    equal: Sequence[str] = (),
) -> dict[str, Any]:
    """All arms over one document, or those that are done when interrupted; as `model_level.run_document`."""
    prefix = Prefix(kept, ClusterKVConfig())
    reference = decode(model, document, Attention(prefix, None, ClusterKVConfig(), model.scale)).numpy()
    unsure = entropy(reference)
    clustered = len(prefix.places)
    base = len(document.prompt) + len(document.decoded) // 2 - clustered
    sizes = Sizes(clustered, base, model.head_dim, model.layers, {})
    found: dict[str, Any] = {
        "arms": {},
        "dense": compare(document, reference, reference),
        "entropy": unsure[: document.natural.stop - 1].tolist(),
        "answer_entropy": [unsure[part.start - 1 : part.stop - 1].tolist() for part in document.answers],
        "sizes": sizes._asdict(),
    }
    likes = [arm for arm in arms if arm.policy == OURS and not changed(arm.options)]
    arms = [*arms, *(equal_bytes(policy, like, sizes) for like in likes for policy in equal)]
    for arm in tqdm(arms, unit="arm", leave=False):
        attend = Attention(prefix, arm.policy, ClusterKVConfig(**arm.options), model.scale)
        rows = decode(model, document, attend).numpy()
        counts = attend.counts() if arm.policy in FORMS else None
        found["arms"][arm.name] = {
            **compare(document, reference, rows),
            "policy": arm.policy,
            "options": arm.options,
            "counts": counts,
            "bytes": step_bytes(arm, sizes, counts),
        }
        more(found)
    return found


def index_share(policy: str, head_dim: int) -> float:
    """Of the index in the KV cache, in 16 bits; nan for a method of another paper."""
    if policy not in FORMS:
        return float("nan")
    return Bytes(FORMS[policy], Reading(0, 0, head_dim, ClusterKVConfig())).share()


def table(documents: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    head_dim = documents[0]["sizes"]["head_dim"]
    everything = 4 * head_dim * (documents[0]["sizes"]["clustered"] + documents[0]["sizes"]["base"])
    out = [
        f"| policy | budget | candidates | chosen | index at {head_dim} | at 128 | KiB per step | of dense | KL (95 %) "
        "| over ours (95 %) | Q | right |",
        "|" + "---|" * 12,
    ]
    for line in summary(documents):
        low, high = line["kl_interval"]
        counts = documents[0]["arms"][line["name"]]["counts"]
        of_ours = ["-"] * 4
        if counts:
            shares = [f"{100 * index_share(line['policy'], size):.1f} %" for size in (head_dim, 128)]
            of_ours = [f"{counts['candidates']:.0f}", f"{counts['chosen']:.2f}", *shares]
        out.append(
            f"| {title_of(line)} | {line['budget']} | {' | '.join(of_ours)} | {line['bytes'] / 1024:.0f} "
            f"| 1/{everything / line['bytes']:.1f} | {line['kl']:.5f} ({low:.5f} to {high:.5f}) "
            f"| {line['over_ours'] or '-'} | {line['answer_kl']:.4f} | {line['right']} of {line['answers']} |"
        )
    return "\n".join(out)


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the first document")
    parser.add_argument("--tokens", type=int, default=7000, help="of each document")
    parser.add_argument("--natural", type=int, default=128, help="tokens of the continuation")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    parser.add_argument("--policies", nargs="+", choices=[*FORMS, ORACLE], default=list(FORMS), metavar="POLICY")
    parser.add_argument("--changes", type=json.loads, nargs="+", default=[], help="step options of ours, JSON each")
    parser.add_argument("--equal-bytes", nargs="+", choices=OTHERS, default=[], help="methods to run at our bytes")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    parser.add_argument("--prefill", type=Path, help="a file for keys and values of the prompts")
    parser.add_argument("--join", nargs="+", type=Path, help="results of runs to put together; runs nothing")
    parser.add_argument("--beside", type=Path, help="a result of model_level, drawn in the picture")
    args = parser.parse_args()
    documents, setting = join(args.join) if args.join else run(args)
    beside, _ = join([args.beside]) if args.beside else ([], "")
    lines = summary(documents)
    body = table(documents)
    print(f"\n{body}\n")
    write_results(
        "quality-layerwise",
        title="Ours in other formats: KL to dense against bytes per decode step",
        setting=setting,
        command=command_of("benchmarks.quality.layerwise"),
        body=body,
        data={"documents": documents, "summary": lines},
        figure=frontier(lines, [index_share(line["policy"], 128) for line in lines], summary(beside) if beside else []),
    )


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Every document, and the setting in words; SystemExit where it was interrupted before anything was measured."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    source, text = read_kind(PROSE)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    made = make_documents(tokenizer, text, args.first + args.documents, args.tokens, args.natural)[args.first :]
    arms = arms_of(args.policies, args.budgets, changes=args.changes)
    documents: list[dict[str, Any]] = []
    under_way: list[dict[str, Any]] = []  # the document that is not done yet

    def more(found: dict[str, Any]) -> None:
        under_way[:] = [found]
        print(table([found]).splitlines()[-1], flush=True)

    try:
        with torch.inference_mode():
            model = LayeredModel(args.model)
            for document, kept in zip(made, prefilled(model, made, args.prefill), strict=True):
                under_way.clear()
                documents.append(run_document(model, document, kept, arms, more, args.equal_bytes))
    except KeyboardInterrupt:
        print(f"\ninterrupted: {len(documents)} of {len(made)} documents are done", flush=True)
        documents = documents or under_way
    if not documents:
        raise SystemExit("interrupted before anything was measured: let it run longer")
    return documents, f"{args.model.name}, float32, {source}, {args.tokens} tokens"


if __name__ == "__main__":
    main()
