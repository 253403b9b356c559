"""Does an answer depend on what was served before? 200 histories before one prompt, against the same prompt after a flush.

    python -m benchmarks.quality.histories [--model tiny] [--histories 200] [--arms before default reproducible]
    python -m benchmarks.quality.histories --model smollm2 --tokens 7000

A history is one to four of: a prompt's beginning, the prompt and more, a branch from it, a chat over it, each with an eviction
behind it or not, all drawn. Then comes the prompt, alone: one of eight lengths. The answer is 12 tokens, chosen after a flush
and forced after the histories (equal: each of them would have been chosen there too); its log-probabilities are compared.
`before` has borders as they were without absolute ones: own pieces begin where a match ended, merges double the largest.

No server: `tests/support/world.py` is the scheduler, the engine and its kernels are the real ones. `tiny` is the tests' model,
which looks sharply at a few tokens; it computes everything, the KV of decoded tokens included. For `smollm2` only the prompt
is computed, once, and its segments are built as each history left them (each set of borders once): what sparse steps wrote
into a chat's KV is left out there. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from benchmarks.quality.documents import make_documents, read_text
from benchmarks.quality.llama import Llama
from benchmarks.results_file import command_of, write_results
from sglang_clusterkv.clusters import build
from sglang_clusterkv.clusters.decoding import DecodeStep
from sglang_clusterkv.clusters.planning import merging
from sglang_clusterkv.clusters.planning.borders import Borders
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import UNCLUSTERED, ClusterIndex
from sglang_clusterkv.memory.step import DenseStep, RowBorders, SparseStep, dense_step
from sglang_clusterkv.tools.demo_model import default_out
from tests.support.tiny_model import tiny_model
from tests.support.world import PAGE, Pieces, Request, World

ANSWER = 12
LENGTHS = 8
BUDGET = 256
ARMS = {"before": {}, "default": {}, "reproducible": {"reproducible": True}}
TITLES = {"before": "before absolute borders", "default": "default", "reproducible": "`reproducible: true`"}


# -- histories --------------------------------------------------------------------------------------------------------


class Served(NamedTuple):
    """One request: its prompt, and what it decodes."""

    prompt: list[int]
    decoded: list[int]


class History(NamedTuple):
    """What is served before the prompt (a number of pages is an eviction), and the prompt's length."""

    events: list[Served | int]
    length: int
    kinds: list[str]


def make_histories(text: list[int], other: list[int], count: int, seed: int = 0) -> list[History]:
    """Draw histories over the beginnings of a text; branches go on with another one."""
    rng = random.Random(seed)
    lengths = [int(len(text) * share) // PAGE * PAGE + 9 for share in np.linspace(0.72, 0.95, LENGTHS)]
    lengths[LENGTHS // 2] -= 9  # whole pages: such a row takes the tree's last page after its prefill
    return [_history(rng, text, other, lengths[i % LENGTHS]) for i in range(count)]


def _history(rng: random.Random, text: list[int], other: list[int], length: int) -> History:
    events: list[Served | int] = []
    kinds = []
    for _ in range(rng.randrange(1, 5)):
        kind = rng.choice(["beginning", "longer", "branch", "chat"])
        kinds.append(kind)
        begin = rng.randrange(length // 8, length)
        if kind == "beginning":
            events.append(Served(text[:begin], text[begin : begin + 8]))
        elif kind == "longer":
            more = rng.randrange(length, len(text) - 8)
            events.append(Served(text[:more], text[more : more + 8]))
        elif kind == "branch":
            skip = rng.randrange(len(other) // 2)
            branch = other[skip : skip + rng.choice([20, 200, 700])]
            events.append(Served(text[:begin] + branch[:-8], branch[-8:]))
        else:
            at = rng.randrange(length // 3, length)
            for _ in range(rng.randrange(2, 4)):
                answer, message = rng.choice([8, 30]), rng.choice([10, 60])
                if at + answer + message >= length:
                    break
                events.append(Served(text[:at], text[at : at + answer]))
                at += answer + message
        if rng.random() < 0.3:
            events.append(rng.randrange(1, 80))
    return History(events, length, kinds)


@contextlib.contextmanager
def arm(name: str) -> Iterator[None]:
    """Planning as an arm has it."""
    if name != "before":
        yield
        return

    def from_begin(self: Borders, begin: int, end: int) -> Pieces:
        starts = range(begin, end, self.segment_pages)
        return [(start, min(start + self.segment_pages, end)) for start in starts]

    def last_border(self: Borders, begin: int, end: int) -> int:
        return begin + max(0, end - begin) // self.segment_pages * self.segment_pages

    with (
        patch.object(Borders, "cut", from_begin),
        patch.object(Borders, "last_border", last_border),
        patch.object(Borders, "decoded_run", lambda self, begin: (begin, begin + self.recluster_pages)),
        patch.object(Borders, "block", lambda self, page: self.sink_pages),
        patch.object(merging, "_aligned_ones", lambda *_: []),
    ):
        yield


def config_of(name: str) -> ClusterKVConfig:
    return msgspec.structs.replace(ClusterKVConfig(budget_tokens=BUDGET), **ARMS[name])


# -- one request after another ----------------------------------------------------------------------------------------


class Sequential(World):
    """A world in which requests follow each other; `model` computes what they write, None: nothing is written."""

    def __init__(self, config: ClusterKVConfig, context: int, model: Llama | None) -> None:
        sizes = {"layers": model.layers, "kv_heads": model.kv_heads, "head_dim": model.head_dim} if model else {}
        super().__init__(config, pages=3 * context // PAGE, context=context, rows=4, checks=False, **sizes)
        self.model = model
        self.hidden = torch.empty(0)

    def _poison(self, slots: slice) -> None:
        """Nobody compares pages here."""

    def _write_kv(self, request: Request, begin: int) -> None:
        if self.model is not None:
            row = self.scene.req_to_token[request.row, : request.length].long()
            ids = request.tokens[begin : request.length]
            self.hidden = self.model.extend(ids, row, self.scene.keys, self.scene.values)

    def start(self, prompt: list[int]) -> Request:
        """Prefill a prompt."""
        request = self.submit(prompt)
        self.extend(request)
        return request

    def feed(self, request: Request, token: int) -> DecodeStep:
        """One decode step that reads this token."""
        self._stash()
        request.tokens.append(token)
        request.extend_path()
        request.length += 1
        self._allocate(request, request.length - 1, request.length)
        rows, lengths = np.array([request.row]), np.array([request.length])
        step = self._begin(lambda: self.engine.begin_decode(rows, lengths))
        assert step is not None
        if self.model is not None:
            slot = self.scene.req_to_token[request.row, request.length - 1].long()
            pool = self.scene.keys, self.scene.values
            self.hidden = self.model.decode(token, request.length - 1, slot, *pool, self.index, step.sparse, step.dense)
        self._results([])
        return step

    def serve(self, events: Sequence[Served | int]) -> None:
        """Serve what came before."""
        for event in events:
            if isinstance(event, int):
                self.evict(event)
                continue
            request = self.start(event.prompt)
            for token in event.decoded:
                self.feed(request, token)
            self.finish(request)


class Outcome(NamedTuple):
    """What came of a prompt after a history."""

    tokens: list[int]  # that would have been chosen, behind those of the empty cache
    logprobs: list[float]  # of the empty cache's tokens
    clustered: int  # tokens, for the history and the prompt
    computed: int  # tokens of the prompt that were prefilled
    second_token_s: float  # CPU seconds of the prefill, the clustering and one step


def answer(world: Sequential, prompt: list[int], forced: list[int] | None) -> Outcome:
    """Decode a prompt's answer: its own, or a forced one."""
    begin = time.process_time()
    found = world.found(world.submit(prompt))
    request = world.start(prompt)
    tokens, logprobs = [], []
    second_token_s = 0.0
    for i in range(ANSWER):
        assert world.model is not None
        logits = world.model.logits(world.hidden)
        tokens.append(int(logits.argmax()))
        token = tokens[i] if forced is None else forced[i]
        logprobs.append(float(torch.log_softmax(logits.double(), 0)[token]))
        world.feed(request, token)
        if i == 0:
            second_token_s = time.process_time() - begin
    world.abort(request)
    clustered = world.engine.counters.tokens_clustered
    return Outcome(tokens, logprobs, clustered, len(prompt) - found, second_token_s)


def run_tiny(text: list[int], histories: list[History], name: str) -> list[tuple[Outcome, Outcome]]:
    """(after a flush, after the history) of each."""
    model, config, context = Llama(tiny_model()), config_of(name), len(text) + 1024
    cold: dict[int, Outcome] = {}
    pairs = []
    with arm(name):
        for history in tqdm(histories, unit="history", desc=name):
            prompt = text[: history.length]
            if history.length not in cold:
                cold[history.length] = answer(Sequential(config, context, model), prompt, None)
            world = Sequential(config, context, model)
            world.serve(history.events)
            pairs.append((cold[history.length], answer(world, prompt, cold[history.length].tokens)))
    return pairs


# -- borders alone, then one real model over each set of them -----------------------------------------------------------


class Left(NamedTuple):
    """What a history left a prompt to decode by."""

    length: int
    borders: tuple[tuple[int, int], ...]
    dense: tuple[int, ...]  # steps that attended to everything


def left_by(text: list[int], history: History, config: ClusterKVConfig) -> tuple[Left, Outcome]:
    """Serve a history without computing anything."""
    world = Sequential(config, len(text) + 1024, None)
    world.serve(history.events)
    prompt = text[: history.length]
    found = world.found(world.submit(prompt))
    request = world.start(prompt)
    dense, borders = [], []
    for i in range(ANSWER):
        step = world.feed(request, 0)
        if step.sparse is None:
            dense.append(i)
        else:
            borders = world.segments(request)
    clustered = world.engine.counters.tokens_clustered
    return Left(history.length, tuple(borders), tuple(dense)), Outcome([], [], clustered, len(prompt) - found, 0.0)


class Prefilled:
    """A text's KV in one row, and its segments as they are asked for."""

    def __init__(self, model: Llama, text: list[int]) -> None:
        self.model, self.text = model, text
        pages = len(text) // PAGE + 4
        geometry = Geometry(model.layers, model.kv_heads, model.head_dim, PAGE, pages)
        self.config = config_of("default")
        self.index = ClusterIndex(self.config, geometry, "cpu")
        shape = (geometry.slots, model.kv_heads, model.head_dim)
        self.keys = [torch.zeros(shape) for _ in range(model.layers)]
        self.values = [torch.zeros(shape) for _ in range(model.layers)]
        self.row = torch.arange(PAGE, PAGE + (pages - 1) * PAGE)
        self.spare = self.row[len(text) // PAGE * PAGE :]  # for the answer
        self.first: dict[int, torch.Tensor] = {}  # hidden state behind each length
        self._built: dict[tuple[int, int], int] = {}
        self._ids = 0

    def prefill(self, lengths: Sequence[int]) -> None:
        """Compute the text once, and keep the hidden states behind these lengths."""
        begin = 0
        for end in sorted({*lengths, *range(512, max(lengths), 512)}):
            self.first[end] = self.model.extend(self.text[begin:end], self.row[:end], self.keys, self.values)
            begin = end

    def answer(self, left: Left, forced: list[int] | None) -> Outcome:
        """Decode by what a history left."""
        self._build(left.borders)
        hidden, tokens, logprobs = self.first[left.length], [], []
        row = self.row[: left.length]
        for i in range(ANSWER):
            logits = self.model.logits(hidden)
            tokens.append(int(logits.argmax()))
            token = tokens[i] if forced is None else forced[i]
            logprobs.append(float(torch.log_softmax(logits.double(), 0)[token]))
            row = torch.cat((row, self.spare[i : i + 1]))
            sparse, dense = self._lists(left, row, i in left.dense)
            pool = self.keys, self.values
            hidden = self.model.decode(token, len(row) - 1, row[-1], *pool, self.index, sparse, dense)
        return Outcome(tokens, logprobs, 0, 0, 0.0)

    def _lists(self, left: Left, row: torch.Tensor, is_dense: bool) -> tuple[SparseStep | None, DenseStep | None]:
        table, rows, lengths = row.int().unsqueeze(0), np.array([0]), np.array([len(row)])
        if is_dense:
            return None, dense_step(rows, lengths, table)
        begin, end = (np.array([side], np.int32) for side in zip(*left.borders, strict=True))
        covered = np.concatenate(([0], np.cumsum(end - begin)))[None].astype(np.int32)
        count = (end <= len(row) - self.config.window_tokens).sum(1)
        return sparse_step(RowBorders(rows, lengths, count, begin, end, covered), table, PAGE), None

    def _build(self, borders: Sequence[tuple[int, int]]) -> None:
        for old in [b for b in self._built if b not in borders and any(b[0] < e and s < b[1] for s, e in borders)]:
            self.index.forget([self._built.pop(old)])
        for begin, end in borders:
            if (begin, end) not in self._built:
                self._ids += 1
                slots = self.row[begin:end]
                assert bool((self.index.page_state[slots[::PAGE] // PAGE, 0] == UNCLUSTERED).all())
                build.build_segments(self.index, [self._ids], [slots], self.keys, self.values)
                self._built[begin, end] = self._ids


def run_borders(
    model: Path, text: list[int], histories: list[History], names: Sequence[str]
) -> dict[str, list[tuple[Outcome, Outcome]]]:
    """(after a flush, after the history) of each history, by arm: each set of borders is decoded by once."""
    lefts: dict[str, list[tuple[Left, Outcome, Left, Outcome]]] = {}
    for name in names:
        cold: dict[int, tuple[Left, Outcome]] = {}
        config = config_of(name)
        with arm(name):
            for history in tqdm(histories, unit="history", desc=f"{name}, borders"):
                if history.length not in cold:
                    cold[history.length] = left_by(text, History([], history.length, []), config)
                lefts.setdefault(name, []).append((*cold[history.length], *left_by(text, history, config)))
    wanted = {left for arms in lefts.values() for pair in arms for left in (pair[0], pair[2])}
    prefilled = Prefilled(Llama(model), text)
    prefilled.prefill([history.length for history in histories])
    starts = {pair[0].length: pair[0] for pair in next(iter(lefts.values()))}
    chosen = {length: prefilled.answer(left, None) for length, left in sorted(starts.items())}
    order = sorted(wanted, key=lambda left: (left.borders, left.length))
    answers = {left: prefilled.answer(left, chosen[left.length].tokens) for left in tqdm(order, unit="set of borders")}

    def of(left: Left, costs: Outcome) -> Outcome:
        return costs._replace(tokens=answers[left].tokens, logprobs=answers[left].logprobs)

    return {name: [(of(*pair[:2]), of(*pair[2:])) for pair in arms] for name, arms in lefts.items()}


# -- what is told -----------------------------------------------------------------------------------------------------


def summary(pairs: Sequence[tuple[Outcome, Outcome]]) -> dict[str, Any]:
    """Figures of one arm."""
    off = np.array([np.abs(np.subtract(warm.logprobs, cold.logprobs))[1:] for cold, warm in pairs])
    return {
        "histories": len(pairs),
        "equal": float(np.mean([warm.tokens == cold.tokens for cold, warm in pairs])),
        "within_1e-4": float(np.mean(off.max(1) <= 1e-4)),
        "p50": float(np.quantile(off, 0.5)),
        "p99": float(np.quantile(off, 0.99)),
        "most": float(off.max()),
        "clustered": float(np.mean([warm.clustered for _, warm in pairs])),
        "computed": float(np.mean([warm.computed for _, warm in pairs])),
        "second_token_ms": 1000 * float(np.median([warm.second_token_s for _, warm in pairs])),
        "by_history": [
            {"off": float(row.max()), "equal": warm.tokens == cold.tokens, "clustered": warm.clustered}
            for row, (cold, warm) in zip(off, pairs, strict=True)
        ],
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row per arm."""
    timed = any(arm["second_token_ms"] for arm in found.values())
    head = (
        "| | same tokens | within 1e-4 | difference 50 % | 99 % | most | tokens clustered | prompt tokens prefilled |"
    )
    rows = [head + (" to the second token, CPU ms |" if timed else ""), "|" + "---|" * (8 + timed)]
    for name, arm in found.items():
        cells = [TITLES[name], f"{arm['equal']:.1%}", f"{arm['within_1e-4']:.1%}"]
        cells += [f"{arm[key]:.2g}" for key in ("p50", "p99", "most")]
        cells += [f"{arm[key]:,.0f}" for key in ("clustered", "computed")]
        cells += [f"{arm['second_token_ms']:.0f}"] if timed else []
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Parse the command line, run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny")
    parser.add_argument("--histories", type=int, default=200)
    parser.add_argument("--tokens", type=int, help="of the text, default: 2,600, 7,300 for smollm2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.model == "tiny":
        tokens = args.tokens or 2600
        rng = random.Random(1)
        text, other = ([rng.randrange(3, 49152) for _ in range(n)] for n in (tokens, 1500))
        histories = make_histories(text, other, args.histories)
        pairs = {name: run_tiny(text, histories, name) for name in args.arms}
        source = "random tokens"
    else:
        from transformers import AutoTokenizer

        tokens = args.tokens or 7300
        source, words = read_text()
        document = make_documents(AutoTokenizer.from_pretrained(default_out()), words, 1, tokens, 64)[0]
        text, other = document.prompt[:tokens], list(reversed(document.prompt[:1500]))
        histories = make_histories(text, other, args.histories)
        pairs = run_borders(default_out(), text, histories, args.arms)
    found = {name: summary(arm_pairs) for name, arm_pairs in pairs.items()}
    kinds = Counter(kind for history in histories for kind in history.kinds)
    drawn = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    longest = max(history.length for history in histories)
    evictions = sum(isinstance(event, int) for history in histories for event in history.events)
    body = f"{table(found)}\n\n{len(histories)} histories: {drawn}, {evictions} evictions; prompts of "
    body += f"{min(history.length for history in histories):,} to {longest:,} tokens.\n"
    print(f"\n{body}")
    write_results(
        f"quality-histories-{args.model}",
        title="Answers after other requests, against those after a flush",
        setting=f"{'the tests model' if args.model == 'tiny' else default_out().name}, float32, {source}, budget {BUDGET}",
        command=command_of("benchmarks.quality.histories"),
        body=body,
        data={
            "arms": found,
            "histories": [history._asdict() | {"events": len(history.events)} for history in histories],
        },
    )


if __name__ == "__main__":
    main()
