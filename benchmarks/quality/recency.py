"""Where do recalled tokens lie: among the newest of a context, where the last step's lay, or anywhere?

    python -m benchmarks.quality.recency [--documents 2] [--tokens 7000] [--budgets 256 512]
                                         [--kinds continuation needles chat agent]

A real server decodes four kinds of text (benchmarks/quality/decoding_kinds.py) with sparse steps, and the positions of what
each step recalled are kept, by layer and kv head. From the ninth step of an answer on, when a cache has been filled, as shares
of all recalled tokens:

- newest 1/2, 1/4, 1/8: in so many of the context's pages, counted from its end. That is what a device tier serves which keeps
  the newest pages of each request.
- used 1/4: in the quarter of the pages that the answer's earlier steps recalled most from, any layer and head, a step back
  counting nine tenths of the next one. That is what it would serve if it kept pages by use.
- last step: in the choice of the last step for the same layer and head.
- LRU 1, LRU 2: in a cache of one or two budgets of rows per layer and kv head, which is empty when the answer begins.
- newest 1/4 or LRU 2 (and 1/8): in these pages, or in such a cache of what is not in them.
- pages: not of the tokens; how many of the clustered pages a step recalls from, by one head and by any head of any layer.

`--places FOLDER...` counts the positions again that runs have kept, which each says at its start; it starts no server.

"numbers" and "worst tenth" are the same shares over the steps that predict tokens which only the old text tells, and over the
tenth of (layer, kv head) with the least. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.forced import FLAGS, forced_decode
from benchmarks.policies.control import use
from benchmarks.policies.places import NONE
from benchmarks.quality.attention_level import LAYER_GROUPS
from benchmarks.quality.decoding_kinds import (
    AGENT,
    CHAT,
    CONTINUATION,
    KINDS,
    NEEDLES,
    Reply,
    agent_replies,
    chat_opening,
    chat_questions,
    needle_replies,
    numbered_document,
)
from benchmarks.quality.documents import read_text
from benchmarks.quality.model_level import options_of
from benchmarks.quality.prompts import Prompts
from benchmarks.results_file import MEASURED, command_of, commit_text, write_results
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.tools.demo_model import default_out

PAGE = 16
SETTING = "setting.txt"  # in a folder of positions: what run they are of
MOSTLY = 0.9  # of an answer's steps are sparse; a step is dense where its pages were just rewritten
WARM = 8  # steps of an answer that only fill the caches
RATIOS = (2, 4, 8)  # context pages over those that are kept
USED_RATIO = 4
AGES = 0.9  # weight of a step's uses in the next one
BUDGETS_KEPT = (1, 2)  # of rows in a cache
CACHED = 2  # budgets of rows beside the newest pages
CHAT_ANSWER = 60
CHAT_TURN = 100  # tokens of a question, its template and its answer
POOL_SLACK = 3000
SHARES = (
    *(f"newest_{ratio}" for ratio in RATIOS),
    f"used_{USED_RATIO}",
    "last",
    *(f"lru_{budgets}" for budgets in BUDGETS_KEPT),
    *(f"newest_{ratio}_or_lru_{CACHED}" for ratio in RATIOS[1:]),
)
TITLES = {
    **{f"newest_{ratio}": f"newest 1/{ratio}" for ratio in RATIOS},
    f"used_{USED_RATIO}": f"used 1/{USED_RATIO}",
    "last": "last step",
    **{f"lru_{budgets}": f"LRU {budgets}" for budgets in BUDGETS_KEPT},
    **{f"newest_{ratio}_or_lru_{CACHED}": f"newest 1/{ratio} or LRU {CACHED}" for ratio in RATIOS[1:]},
}


# -- what the positions say -------------------------------------------------------------------------------------------


class Recalled(NamedTuple):
    """What the steps of one answer recalled."""

    places: np.ndarray  # int [steps, layers, kv heads, tokens], positions in the context; padding `NONE`
    lengths: np.ndarray  # int [steps], tokens of the context with the step's own
    first_clustered: int = 0  # tokens before the first that may be recalled


def oldest_kept(lengths: np.ndarray, ratio: int) -> np.ndarray:
    """The first position in the newest 1/ratio of each context's pages, rounded up; int [steps]."""
    pages = -(-lengths // PAGE)
    return (pages - -(-pages // ratio)) * PAGE


def newest(found: Recalled, ratio: int) -> np.ndarray:
    """Which recalled tokens lie in the newest 1/ratio of the pages; bool like `places`."""
    return found.places >= oldest_kept(found.lengths, ratio)[:, None, None, None]


def in_cache(places: np.ndarray, rows: int) -> np.ndarray:
    """Which tokens an LRU cache of so many rows has when a step asks; bool like `places` [steps, tokens], padding False.

    A step takes all its tokens in, of which the last listed are the newest; then the oldest leave. One step must fit.
    """
    hits = np.zeros(places.shape, bool)
    cached = np.empty(0, places.dtype)  # newest first
    for step, listed in enumerate(places):
        asked = listed[listed != NONE]
        assert len(asked) <= rows, f"a step recalls {len(asked)} tokens, the cache has {rows} rows"
        hits[step] = np.isin(listed, cached) & (listed != NONE)
        cached = np.concatenate((asked[::-1], cached[~np.isin(cached, asked)]))[:rows]
    return hits


def in_last(places: np.ndarray) -> np.ndarray:
    """Which tokens the step before recalled too; bool like `places` [steps, tokens], False at the first step and padding."""
    hits = np.zeros(places.shape, bool)
    for step in range(1, len(places)):
        hits[step] = np.isin(places[step], places[step - 1]) & (places[step] != NONE)
    return hits


def by_head(rule: Callable[..., np.ndarray], places: np.ndarray, *arguments: int) -> np.ndarray:
    """`rule` over each layer's and head's [steps, tokens]; bool like `places`."""
    hits = np.empty(places.shape, bool)
    for layer in range(places.shape[1]):
        for head in range(places.shape[2]):
            hits[:, layer, head] = rule(places[:, layer, head], *arguments)
    return hits


def page_uses(found: Recalled) -> np.ndarray:
    """Tokens that each step recalled from each page, by all layers and heads; int [steps, pages]."""
    pages = -(-int(found.lengths.max()) // PAGE)
    return np.array([np.bincount(step[step != NONE] // PAGE, minlength=pages) for step in found.places])


def used(found: Recalled, ratio: int) -> np.ndarray:
    """Which recalled tokens lie in the 1/ratio of the pages that earlier steps used most (equally used: the newer page)."""
    hits = np.zeros(found.places.shape, bool)
    uses = page_uses(found)
    score = np.zeros(uses.shape[1])
    for step, length in enumerate(found.lengths):
        pages = -(-int(length) // PAGE)
        kept = np.argsort(score[:pages], kind="stable")[pages - -(-pages // ratio) :]
        places = found.places[step]
        hits[step] = np.isin(places // PAGE, kept) & (places != NONE)
        score = AGES * score + uses[step]
    return hits


def hits_of(found: Recalled, budget: int) -> dict[str, np.ndarray]:
    """Of each of `SHARES`, which recalled tokens are hits; bool like `places`."""
    hits = {f"newest_{ratio}": newest(found, ratio) for ratio in RATIOS}
    hits[f"used_{USED_RATIO}"] = used(found, USED_RATIO)
    hits["last"] = by_head(in_last, found.places)
    for budgets in BUDGETS_KEPT:
        hits[f"lru_{budgets}"] = by_head(in_cache, found.places, budgets * budget)
    for ratio in RATIOS[1:]:
        near = hits[f"newest_{ratio}"]
        far = np.where(near, NONE, found.places)
        hits[f"newest_{ratio}_or_lru_{CACHED}"] = near | by_head(in_cache, far, CACHED * budget)
    return hits


def touched(found: Recalled) -> tuple[float, float]:
    """Share of the clustered pages that a step after `WARM` recalls from: by one head, mean, and by any head of any layer."""
    per_head, any_head = [], []
    for places, length in zip(found.places[WARM:], found.lengths[WARM:], strict=True):
        pages = (int(length) - found.first_clustered) / PAGE
        rows = np.where(places == NONE, NONE, places // PAGE).reshape(-1, places.shape[-1])
        per_head.append(np.mean([len(np.unique(row[row != NONE])) for row in rows]) / pages)
        any_head.append(len(np.unique(rows[rows != NONE])) / pages)
    return float(np.mean(per_head)), float(np.mean(any_head))


class Sums:
    """Hits and recalled tokens of many answers, by layer and kv head."""

    def __init__(self) -> None:
        self.hits: dict[str, Any] = dict.fromkeys(SHARES, 0)
        self.recalled: Any = 0
        self.steps = 0

    def add(self, found: Recalled, hits: dict[str, np.ndarray], steps: Sequence[int] | np.ndarray) -> None:
        """Some steps of an answer."""
        real = found.places[steps] != NONE
        self.recalled = self.recalled + real.sum((0, 3))
        for name, hit in hits.items():
            self.hits[name] = self.hits[name] + (hit[steps] & real).sum((0, 3))
        self.steps += len(steps)

    def shares(self) -> dict[str, Any]:
        """Of each of `SHARES`: over all, by layer, and over the tenth of (layer, head) with the least."""
        found: dict[str, Any] = {"steps": self.steps, "recalled": int(np.sum(self.recalled))}
        for name, hits in self.hits.items():
            by_pair = np.sort((hits / np.maximum(self.recalled, 1)).ravel())
            found[name] = {
                "all": float(hits.sum() / self.recalled.sum()),
                "layers": (hits.sum(1) / np.maximum(self.recalled.sum(1), 1)).tolist(),
                "worst_tenth": float(by_pair[: max(1, len(by_pair) // 10)].mean()),
            }
        return found


# -- decoding ---------------------------------------------------------------------------------------------------------


def record(server: Server, reply: Reply, budget: int, file: Path) -> tuple[Recalled, int]:
    """Decode an answer with sparse steps; what they recalled, kept in `file`, and how many of `exact` were the first choice."""
    use(server, "ours", record={"file": str(file)}, **options_of(budget))
    rows = forced_decode(server, reply.prompt, reply.answer)
    use(server, "ours")  # which makes the recorder write
    with np.load(file) as values:
        places, lengths = values["places"], values["lengths"]
    # With overlap scheduling a step more than the answer has may have run.
    kept = lengths < len(reply.prompt) + len(reply.answer)
    assert kept.sum() >= MOSTLY * (len(reply.answer) - 1), f"{kept.sum()} sparse steps for {len(reply.answer)} tokens"
    right = sum(int(rows[i].argmax() == reply.answer[i]) for i in reply.exact)
    return Recalled(places[kept], lengths[kept], ClusterKVConfig().sink_tokens), right


def prefill(server: Server, prompt: list[int]) -> None:
    """From an empty cache, clustered at the first request, cut where a match ends at the second."""
    server.flush()
    for _ in range(2):
        server.generate(prompt, 2)  # a decode step, at whose head it is clustered


def hold_chat(server: Server, opening: list[int], questions: list[list[int]], end: int) -> list[Reply]:
    """A chat whose answers are the dense server's own, with a frequency penalty, without which a small model repeats itself."""
    use(server, "dense")
    said, replies = opening, []
    for question in questions:
        prompt = said + question
        sampling = {"temperature": 0, "frequency_penalty": 0.5, "max_new_tokens": CHAT_ANSWER}
        answer = server.generate(prompt, CHAT_ANSWER, sampling_params=sampling)["output_ids"]
        answer = answer[:-1] if answer[-1] == end else answer
        replies.append(Reply(prompt, answer, []))
        said = prompt + answer
    return replies


def replies_of(
    kinds: Sequence[str], server: Server, tokenizer: Any, prompts: Prompts, args: argparse.Namespace, seed: int
) -> Iterator[tuple[str, list[Reply]]]:
    """(kind, its replies), each once its context is in the radix cache."""
    if CONTINUATION in kinds or NEEDLES in kinds:
        document = numbered_document(prompts, args.tokens, args.natural, seed)
        prefill(server, document.prompt)
        if CONTINUATION in kinds:
            yield CONTINUATION, [Reply(document.prompt, document.following, [])]
        if NEEDLES in kinds:
            yield NEEDLES, needle_replies(prompts, document, args.questions, seed)
    if CHAT in kinds:
        opening = chat_opening(prompts, args.tokens - args.turns * CHAT_TURN // 2, seed)
        prefill(server, opening)
        yield CHAT, hold_chat(server, opening, chat_questions(prompts, args.turns), tokenizer.eos_token_id)
    if AGENT in kinds:
        replies = agent_replies(prompts, args.tokens, args.questions, seed)
        prefill(server, replies[0].prompt)
        cut = [reply.answer[: args.steps] for reply in replies]
        yield (
            AGENT,
            [Reply(reply.prompt, answer, list(range(len(answer)))) for reply, answer in zip(replies, cut, strict=True)],
        )


def run(server: Server, tokenizer: Any, prompts: Prompts, args: argparse.Namespace) -> dict[str, Any]:
    """Every kind of every document; by kind and budget its shares. Of what is done, where it or the server is ended."""
    folder = Path(tempfile.mkdtemp(prefix="recency-places-"))
    print(f"the positions: {folder}", flush=True)
    (folder / SETTING).write_text(f"{setting_of(args)}, {commit_text(MEASURED)}")
    groups: dict[str, Group] = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number in range(args.documents):
            for kind, replies in replies_of(args.kinds, server, tokenizer, prompts, args, args.seed + number):
                work = [(budget, reply) for budget in args.budgets for reply in replies if len(reply.answer) > 2 * WARM]
                for budget, reply in tqdm(work, desc=f"document {number + 1}, {kind}", unit="answer"):
                    group = groups.setdefault(f"{kind}, {budget}", Group(kind, budget))
                    file = folder / f"{number}-{kind}-{budget}-{len(group.contexts)}.npz"
                    found, right = record(server, reply, budget, file)
                    about = {"kind": kind, "budget": budget, "right": right, "exact": reply.exact}
                    file.with_suffix(".json").write_text(
                        json.dumps(about | {"prompt": len(reply.prompt), "answer": len(reply.answer)})
                    )
                    group.add(found, len(reply.prompt), reply.exact, right)
    except (KeyboardInterrupt, requests.ConnectionError):
        if not groups:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end the server's stop, and the results
        print("\ninterrupted: the results are of what is done", flush=True)
    return {name: group.result() for name, group in groups.items()}


def counted_again(folders: Sequence[Path]) -> dict[str, Any]:
    """By kind and budget the shares of the positions that earlier runs kept, as `run` gives them."""
    groups: dict[str, Group] = {}
    files = sorted(file for folder in folders for file in folder.glob("*.npz"))
    kept = [(file, json.loads(file.with_suffix(".json").read_text())) for file in files]
    for file, about in tqdm(sorted(kept, key=lambda pair: KINDS.index(pair[1]["kind"])), unit="answer"):
        with np.load(file) as values:
            own = values["lengths"] < about["prompt"] + about["answer"]
            found = Recalled(values["places"][own], values["lengths"][own], ClusterKVConfig().sink_tokens)
        group = groups.setdefault(f"{about['kind']}, {about['budget']}", Group(about["kind"], about["budget"]))
        group.add(found, about["prompt"], about["exact"], about["right"])
    return {name: group.result() for name, group in groups.items()}


class Group:
    """All answers of one kind at one budget."""

    def __init__(self, kind: str, budget: int) -> None:
        self.kind, self.budget = kind, budget
        self.contexts: list[int] = []
        self._sums, self._exact = Sums(), Sums()
        self._pages: list[tuple[float, float]] = []
        self._right: int | None = 0
        self._asked = 0

    def add(self, found: Recalled, prompt: int, exact: Sequence[int], right: int | None) -> None:
        """One answer behind so many tokens; see `Reply.exact`, of which so many were the first choice (None: nobody looked)."""
        hits = hits_of(found, self.budget)
        self._sums.add(found, hits, range(WARM, len(found.lengths)))
        predicted = found.lengths[WARM:] - prompt  # the place in the answer of the token that a step predicts
        self._exact.add(found, hits, WARM + np.flatnonzero(np.isin(predicted, exact)))
        self._pages.append(touched(found))
        self.contexts.append(int(found.lengths[0]))
        self._right = None if right is None or self._right is None else self._right + right
        self._asked += len(exact)

    def result(self) -> dict[str, Any]:
        """For the JSON and the tables."""
        per_head, any_head = np.mean(self._pages, axis=0)
        found = {
            "kind": self.kind,
            "budget": self.budget,
            "context": self.contexts,
            "shares": self._sums.shares(),
            "pages": {"head": float(per_head), "any": float(any_head)},
        }
        if self._asked:
            found["exact"] = self._exact.shares() | {"right": self._right, "asked": self._asked}
        return found


# -- the tables -------------------------------------------------------------------------------------------------------


def rows_of(found: dict[str, dict[str, Any]]) -> list[tuple[str, int, dict[str, Any]]]:
    """(title, budget, shares) of each line: a kind, then its steps at numbers."""
    rows = []
    for entry in found.values():
        rows.append((entry["kind"], entry["budget"], entry["shares"]))
        if entry["kind"] == NEEDLES and "exact" in entry:
            rows.append((f"{NEEDLES}: numbers", entry["budget"], entry["exact"]))
    return sorted(rows, key=lambda row: row[1])


def groups_of(layers: Sequence[float]) -> list[float]:
    """Means of `LAYER_GROUPS` groups of layers, or of as many as there are layers."""
    groups = np.array_split(np.array(layers), min(LAYER_GROUPS, len(layers)))
    return [float(np.mean(group)) for group in groups]


def table(found: dict[str, dict[str, Any]]) -> str:
    """By kind and budget: every share; by group of layers; the worst heads; pages."""
    titles = " | ".join(TITLES[name] for name in SHARES)
    out = [f"| decoding | budget | steps | {titles} |", "|" + "---|" * (len(SHARES) + 3)]
    for title, budget, shares in rows_of(found):
        cells = " | ".join(f"{shares[name]['all']:.2f}" for name in SHARES)
        out.append(f"| {title} | {budget} | {shares['steps']:,} | {cells} |")
    out += ["", "The tenth of (layer, kv head) with the least of each:", ""]
    out += [f"| decoding | budget | {titles} |", "|" + "---|" * (len(SHARES) + 2)]
    for title, budget, shares in rows_of(found):
        cells = " | ".join(f"{shares[name]['worst_tenth']:.2f}" for name in SHARES)
        out.append(f"| {title} | {budget} | {cells} |")
    layers = len(next(iter(found.values()))["shares"]["last"]["layers"])
    parts = np.array_split(np.arange(layers), min(LAYER_GROUPS, layers))
    names = " | ".join(f"layers {part[0]} to {part[-1]}" for part in parts)
    for name in ("newest_4", "lru_2"):
        out += ["", f"{TITLES[name]}:", "", f"| decoding | budget | {names} |", "|" + "---|" * (len(parts) + 2)]
        for title, budget, shares in rows_of(found):
            cells = " | ".join(f"{share:.2f}" for share in groups_of(shares[name]["layers"]))
            out.append(f"| {title} | {budget} | {cells} |")
    out += [
        "",
        "Share of the pages that a step recalls from, and right first choices where only the old text tells:",
        "",
    ]
    out += ["| decoding | budget | contexts | by one head | by any | right |", "|---|---|---|---|---|---|"]
    for entry in sorted(found.values(), key=lambda entry: entry["budget"]):
        pages, exact = entry["pages"], entry.get("exact")
        right = f"{exact['right']} of {exact['asked']}" if exact and exact["right"] is not None else "-"
        context = f"{min(entry['context']):,} to {max(entry['context']):,}"
        out.append(
            f"| {entry['kind']} | {entry['budget']} | {context} | {pages['head']:.2f} | {pages['any']:.2f} | {right} |"
        )
    return "\n".join(out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=2, help="of each kind")
    parser.add_argument("--tokens", type=int, default=7000, help="of each context")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--natural", type=int, default=128, help="tokens of the continuation")
    parser.add_argument("--questions", type=int, default=3, help="about a document's facts, and of the agent")
    parser.add_argument("--turns", type=int, default=8, help="of the chat")
    parser.add_argument("--steps", type=int, default=96, help="of an agent's answer, at most")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--places", type=Path, nargs="+", help="folders of positions that runs have kept")
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args(argv)
    if min(args.natural, args.steps) <= 2 * WARM:
        parser.error(f"--natural and --steps must be more than {2 * WARM}: the first {WARM} steps are not counted")
    return args


def setting_of(args: argparse.Namespace) -> str:
    """Of a run with a server."""
    source = read_text(args.text)[0]
    kinds = ", ".join(args.kinds)
    return f"{args.model.name}, float32, {source}, {args.documents} document(s) of {args.tokens} tokens for {kinds}"


def serve_and_run(args: argparse.Namespace) -> dict[str, Any]:
    """`run` with a server."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = Prompts(tokenizer, read_text(args.text)[1], args.seed)
    log = Path(tempfile.mkdtemp(prefix="recency-")) / "server.log"
    print(f"starting a server; its log: {log}", flush=True)
    flags = [*FLAGS, "--max-total-tokens", str(args.tokens + POOL_SLACK), "--page-size", str(PAGE)]
    flags += ["--sleep-on-idle", "--watchdog-timeout", "3600"]
    with serve(args.model, log, *flags, config={}) as server:
        return run(server, tokenizer, prompts, args)


def main() -> None:
    """Parse the command line, run, print and write."""
    args = parse_args()
    if args.places:
        found = counted_again(args.places)
        setting = "positions that were kept by: " + "; ".join((folder / SETTING).read_text() for folder in args.places)
    else:
        found, setting = serve_and_run(args), setting_of(args)
    body = table(found)
    print(f"\n{body}\n")
    write_results(
        "quality-recency",
        title="Where recalled tokens lie",
        setting=setting,
        command=command_of("benchmarks.quality.recency"),
        body=body,
        data=found,
    )


if __name__ == "__main__":
    main()
