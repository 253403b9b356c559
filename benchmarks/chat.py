"""What merging segments buys in a chat of short turns and in a long answer: KL to the dense path, through real servers.

    python -m benchmarks.chat [--scenario chat|document|long] [--turns 20] [--budgets 64 128 256] [--quick]

Short turns and decoded runs leave segments of a few pages each, and small segments cluster worse; `merge_segments` clusters
neighbours again as one. Every arm, a server of its own with one budget and merging on or off, decodes the same text
(benchmarks/forced.py) and is compared with a dense server, token by token:

- chat: a short system prompt and 20 short questions; the answers are the dense server's own, greedy with a frequency penalty,
  without which so small a model repeats itself and every server agrees.
- document: the same after a document of `--document-tokens`.
- long: one answer of `--answer-tokens` tokens of prose, `recluster_every` 64 and 256; "turns" are 20 equal parts of it.

The first token of an answer is left out: prefill is dense. Intervals are 95 %, by bootstrap over turns, which takes turns as
independent although a turn reads what earlier ones left. SmolLM2-135M-Instruct, float32, one request at a time; about two
minutes per arm on one core. Prints a table and writes it to benchmarks/results/, never over an older one.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.forced import FLAGS, decoded, forced_decode, interval, kl_divergence, mean
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, serve
from sglang_clusterkv.tools.demo_model import default_out

DENSE = {"budget_tokens": 8192, "candidate_tokens": 8192}
# The borders of a finished request are a debug line; SGLang's own debug level would slow the server down.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(message)s"}},
    "handlers": {"stream": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "root": {"level": "INFO", "handlers": ["stream"]},
    "loggers": {"sglang_clusterkv": {"level": "DEBUG"}, "numba": {"level": "WARNING"}},
}
SYSTEM = (
    "You are the assistant of a small research station on the island of Fornes. The station has eleven people. Its head is "
    "Greta Holm, a geologist; the cook is Bruno Paz, who came from Lisbon in 2014. The mail boat comes on Tuesdays and Fridays "
    "at nine in the morning. The vault's passcode is 48213. The generator was replaced in March; the old one is in the east "
    "shed. The cat is called Biscuit and sleeps in the lamp room. Radio checks are at six in the morning and at eight in the "
    "evening. The weather mast is 24 metres high. Answer briefly, in two or three sentences."
)
QUESTIONS = [
    "Good morning. Who is the head of the station, and what is her profession?",
    "When does the mail boat come, and at what time should I be at the pier?",
    "Please describe in two sentences what a geologist does all day.",
    "I forgot the passcode of the vault. Can you tell me what it is?",
    "Where does the cook come from, and since when has he been with us?",
    "What could he cook tonight with potatoes, onions and some dried fish?",
    "How high is the weather mast, and why would a station need one?",
    "Where do I find the cat, and what is it called?",
    "Explain to a child in two sentences why the wind blows.",
    "At what times are the radio checks? I want to write them on the wall.",
    "What happened to the old generator, and when was it replaced?",
    "Give me two reasons why a diesel generator might not start in winter.",
    "How many people live here, and how much bread would they eat in a week?",
    "Write a short postcard to my mother about life on the island.",
    "Which animals could I see from the cliffs in spring?",
    "Remind me: on which days does the mail boat come?",
    "What is the difference between granite and basalt, in simple words?",
    "Suggest a name for our new rowing boat and say why it fits.",
    "What should I check before I walk to the weather mast in fog?",
    "Last one: tell me the passcode, the cat's name and the head of the station again.",
]


class Turn(NamedTuple):
    prompt: list[int]
    answer: list[int]


class Arm(NamedTuple):
    budget: int
    recluster_every: int
    merge: bool

    def config(self) -> dict[str, Any]:
        return {
            "budget_tokens": self.budget,
            "candidate_tokens": 4 * self.budget,
            "recluster_every": self.recluster_every,
            "merge_segments": self.merge,
        }


def chat(server: Server, args: argparse.Namespace) -> list[Turn]:
    """Ask the questions; the answers are this server's, of at most `args.answer_limit` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(default_out())
    system = SYSTEM
    if args.scenario == "document":
        ids = tokenizer(topics["types"]).input_ids[: args.document_tokens]
        system += f"\n\nThis is in the station's library:\n\n{tokenizer.decode(ids)}"
    said = tokenizer(f"<|im_start|>system\n{system}<|im_end|>\n").input_ids
    turns = []
    for question in tqdm(QUESTIONS[: args.turns], desc="answers", leave=False, unit="turn"):
        said = said + tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        sampling = {"temperature": 0, "frequency_penalty": 0.5, "max_new_tokens": args.answer_limit}
        answer = server.generate(said, args.answer_limit, sampling_params=sampling)["output_ids"]
        turns.append(Turn(said, answer))
        ended = answer[-1] == tokenizer.eos_token_id
        said = said + answer + tokenizer("\n" if ended else "<|im_end|>\n").input_ids
    return turns


def long_answer(args: argparse.Namespace) -> list[Turn]:
    """One turn: prose that the repository does not change, Python's own reference."""
    ids = AutoTokenizer.from_pretrained(default_out())(topics["execmodel"]).input_ids
    assert len(ids) > 96 + args.answer_tokens, f"the text has {len(ids)} tokens"
    return [Turn(ids[:96], ids[96 : 96 + args.answer_tokens])]


def read(server: Server, turns: list[Turn], name: str) -> list[np.ndarray]:
    """Decode all turns in their order from an empty cache; log-probabilities of each turn's decode steps."""
    server.flush()
    return [decoded(forced_decode(server, *turn)) for turn in tqdm(turns, desc=name, leave=False, unit="turn")]


def compare(reference: list[np.ndarray], found: list[np.ndarray], parts: int) -> dict[str, Any]:
    """KL and top-1 agreement of each token, by turn; a single turn is cut into `parts`."""
    kl = [kl_divergence(p, q) for p, q in zip(reference, found, strict=True)]
    same = [p.argmax(1) == q.argmax(1) for p, q in zip(reference, found, strict=True)]
    if len(kl) == 1:
        kl, same = np.array_split(kl[0], parts), np.array_split(same[0], parts)
    return {"kl": [turn.tolist() for turn in kl], "same": [turn.astype(int).tolist() for turn in same]}


def borders(log: Path) -> int:
    """Segments that the last request of the log saw at its end."""
    lines = re.findall(r"\d+ tokens, segments \[(.*)\]", log.read_text())
    return lines[-1].count("(") if lines else 0


def run(args: argparse.Namespace, arms: list[Arm]) -> dict[str, Any]:
    """Read the dense server twice, then every arm."""
    folder = Path(tempfile.mkdtemp(prefix="chat-"))
    (folder / "logging.json").write_text(json.dumps(LOGGING))
    logging = {"SGLANG_LOGGING_CONFIG_PATH": str(folder / "logging.json")}
    flags = [*FLAGS, "--max-total-tokens", "12000"]
    print("dense: starting a server", flush=True)
    with serve(default_out(), folder / "dense.log", *flags, config=DENSE, environment=logging) as server:
        turns = long_answer(args) if args.scenario == "long" else chat(server, args)
        reference = read(server, turns, "dense")
        again = read(server, turns, "dense again")
        steps = server.counts()["sparse_steps"]
    assert steps == 0, f"{steps} steps of the reference were sparse"
    texts = [np.array(turn.answer[1:]) for turn in turns]
    checks = {
        "dense_again_kl_max": max(float(kl_divergence(p, q).max()) for p, q in zip(reference, again, strict=True)),
        "dense_top1_is_text": mean([p.argmax(1) == text for p, text in zip(reference, texts, strict=True)]),
    }
    del again
    print(f"dense again: KL at most {checks['dense_again_kl_max']:.1e}", flush=True)
    results = []
    for arm in arms:
        print(f"{arm}: starting a server", flush=True)
        log = folder / f"{arm.budget}-{arm.recluster_every}-{arm.merge}.log"
        with serve(default_out(), log, *flags, config=arm.config(), environment=logging) as server:
            found = read(server, turns, "arm")
            counts = server.counts()
        result = {**compare(reference, found, args.turns), **arm._asdict(), "counts": counts, "seen": borders(log)}
        print(f"KL {mean(result['kl']):.5f}, sparse steps {counts['sparse_steps']}", flush=True)
        results.append(result)
    tokens = {
        "prompt": len(turns[0].prompt),
        "end": len(turns[-1].prompt) + len(turns[-1].answer),
        "answers": [len(turn.answer) for turn in turns],
    }
    return {"checks": checks, "tokens": tokens, "arms": results, "turns": [turn._asdict() for turn in turns]}


def table(results: list[dict[str, Any]]) -> str:
    """The arms as Markdown, then what merging changes, paired by token."""
    lines = [
        "| budget | recluster_every | merging | KL, all (95 %) | 1st quarter | 2nd | 3rd | 4th | top-1 same | sparse steps "
        "| segments at the end | made | merges | tokens clustered |",
        "|" + "---|" * 14,
    ]
    for row in results:
        low, high = interval(row["kl"])
        quarters = [f"{mean([row['kl'][i] for i in part]):.5f}" if len(part) else "-" for part in _quarters(row["kl"])]
        counts = row["counts"]
        lines.append(
            f"| {row['budget']} | {row['recluster_every']} | {'on' if row['merge'] else 'off'} "
            f"| {mean(row['kl']):.5f} ({low:.5f} to {high:.5f}) | {' | '.join(quarters)} | {100 * mean(row['same']):.1f} % "
            f"| {counts['sparse_steps']} | {row['seen']} | {counts['segments']} | {counts['merges']} "
            f"| {counts['tokens_clustered']} |"
        )
    pairs = []
    for on in (row for row in results if row["merge"]):
        for off in results:
            if not off["merge"] and (off["budget"], off["recluster_every"]) == (on["budget"], on["recluster_every"]):
                change = [np.subtract(a, b) for a, b in zip(on["kl"], off["kl"], strict=True)]
                low, high = interval(change)
                pairs.append(
                    f"| {on['budget']} | {on['recluster_every']} | {mean(change):+.5f} ({low:+.5f} to {high:+.5f}) "
                    f"| {mean(on['kl']) / max(mean(off['kl']), 1e-12):.2f} |"
                )
    if pairs:
        lines += [
            "",
            "| budget | recluster_every | KL on minus off, paired (95 %) | on / off |",
            "|---|---|---|---|",
            *pairs,
        ]
    return "\n".join(lines)


def _quarters(turns: list[list[float]]) -> list[np.ndarray]:
    return np.array_split(np.arange(len(turns)), 4)


def main() -> None:
    """Run the scenario and write its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", choices=["chat", "document", "long"], default="chat")
    parser.add_argument("--turns", type=int, default=len(QUESTIONS))
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--recluster-every", type=int, nargs="+", help="default: 256, for `long` 64 and 256")
    parser.add_argument("--merging", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--answer-limit", type=int, default=60, help="most tokens of a chat's answer")
    parser.add_argument("--answer-tokens", type=int, default=1500, help="tokens of the long answer")
    parser.add_argument("--document-tokens", type=int, default=3000)
    parser.add_argument("--quick", action="store_true", help="a few turns at one budget: does it run")
    args = parser.parse_args()
    if args.quick:
        args.turns, args.budgets, args.answer_limit, args.answer_tokens = min(args.turns, 5), [64], 20, 200
    reclusters = args.recluster_every or ([64, 256] if args.scenario == "long" else [256])
    arms = [Arm(b, every, m == "on") for b in args.budgets for every in reclusters for m in args.merging]
    found = run(args, arms)
    tokens, checks = found["tokens"], found["checks"]
    setting = (
        f"SmolLM2-135M-Instruct, float32, {args.scenario}: first prompt {tokens['prompt']} tokens, {tokens['end']} at the end, "
        f"{len(tokens['answers'])} answer(s), {min(tokens['answers'])} to {max(tokens['answers'])} tokens; candidates "
        "4 x budget"
    )
    text = (
        f"Dense server read twice: KL at most {checks['dense_again_kl_max']:.1e}. Its first choice is the text's token at "
        f"{100 * checks['dense_top1_is_text']:.1f} % of the steps.\n\n{table(found['arms'])}"
    )
    print(f"\n{text}")
    write_results(
        "chat" if args.scenario == "chat" else f"chat-{args.scenario}",
        title="What merging segments buys",
        setting=setting,
        command=command_of("benchmarks.chat"),
        body=text,
        data=found,
    )


if __name__ == "__main__":
    main()
