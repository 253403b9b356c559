"""What recalled extends cost over the turns of a chat: KL to dense, beside extends that attend to everything, and the time.

    python -m benchmarks.quality.extends [--prompt 6000] [--turns 10] [--question 48] [--answer 24] [--budget 256]
                                         [--recall 96] [--skip 30000 60000]

A document is prefilled, exactly. Then turns follow, whose text is the document's continuation: a question of `--question`
tokens, prefilled behind what the cache has, and an answer of `--answer` tokens, decoded one by one (benchmarks/forced.py).
Three arms read the same text: dense; ours with exact extends; ours with `recall_extend_tokens` at `--recall`. What an arm
wrote to the KV cache stays, so a later turn has the drift of all before it. An answer's first row comes from the extend.

Several documents (`--skip`) are pooled. At the end each arm is asked for one token behind further questions, one at a time and
the arms in turn: the time to the first token. `--config '{"host_ratio": 4}'` has the same over a host tier, and the table then
says how many bytes of it the prefills and the decode steps read. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.forced import forced_decode, interval, kl_divergence, mean, paired_ratio
from benchmarks.policies.control import use
from benchmarks.quality.documents import read_text
from benchmarks.quality.model_level import SERVER_FLAGS, options_of
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out

DENSE, EXACT, RECALLED = "dense", "exact extends", "recalled extends"
ARMS = (DENSE, EXACT, RECALLED)
TIMED = 5  # questions whose first token is timed


def use_arm(server: Server, arm: str, budget: int, recall: int) -> None:
    """Switch the server to an arm."""
    policy = DENSE if arm == DENSE else "ours"
    use(server, policy, **options_of(budget), recall_extend_tokens=recall if arm == RECALLED else 0)


def tier_bytes(server: Server) -> np.ndarray:
    """Bytes read from the host by prefills and by decode steps so far, int64 [2]; zeros without a host tier."""
    tier = server.counts().get("host_tier", {})
    return np.array([tier.get(f"read_bytes_{who}", 0) for who in ("prefill", "decode")])


def hold(
    server: Server,
    arm: str,
    document: list[int],
    turns: Sequence[tuple[list[int], list[int]]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All turns under one arm, from an exact prefill: log-probabilities by turn, what was counted, bytes read from the host."""
    server.flush()
    use_arm(server, DENSE, args.budget, 0)
    server.generate(document, 2)  # a decode step, at whose head it is clustered
    use_arm(server, arm, args.budget, args.recall)
    before, read = server.counts(), tier_bytes(server)
    history, rows = document, []
    for question, answer in turns:
        rows.append(forced_decode(server, history + question, answer))
        history = history + question + answer
    after = server.counts()
    counted = {
        name: after[name] - before[name] for name in ("sparse_steps", "recalled_extends", "recalled_extend_tokens")
    }
    assert counted["recalled_extends"] == (len(turns) if arm == RECALLED else 0), f"{arm}: {counted}"
    return {"rows": rows, "counted": counted, "read": (tier_bytes(server) - read).tolist()}


def measure(server: Server, ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """KL of both arms by turn, and what they agree with."""
    ends = args.prompt + np.cumsum([0] + [args.question, args.answer] * args.turns)
    pieces = [ids[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
    turns = list(zip(pieces[::2], pieces[1::2], strict=True))
    held = {arm: hold(server, arm, ids[: args.prompt], turns, args) for arm in ARMS}
    dense = held[DENSE]["rows"]
    found: dict[str, Any] = {}
    for arm in ARMS[1:]:
        pairs = list(zip(dense, held[arm]["rows"], strict=True))
        found[arm] = {
            "kl": [kl_divergence(reference, rows).tolist() for reference, rows in pairs],
            "same": [(reference.argmax(1) == rows.argmax(1)).tolist() for reference, rows in pairs],
        }
    return found | {
        "counted": {arm: held[arm]["counted"] for arm in ARMS},
        "read": {arm: held[arm]["read"] for arm in ARMS},
    }


def first_tokens(server: Server, ids: list[int], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds to the first token behind questions that differ, over a document that is cached."""
    document = ids[: args.prompt]
    use_arm(server, DENSE, args.budget, 0)
    server.generate(document, 2)  # a decode step, at whose head it is clustered
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for i in range(TIMED):
        for arm in ARMS:
            use_arm(server, arm, args.budget, args.recall)
            # A first token of its own, so that no question is found.
            begin = args.prompt + (3 * i + ARMS.index(arm)) * args.question
            times = server.stream(document + ids[begin : begin + args.question], 1)
            seconds[arm].append(times[1] - times[0])
    return seconds


def table(documents: Sequence[dict[str, Any]], seconds: dict[str, list[float]]) -> str:
    """The results as Markdown."""

    def of(arm: str, name: str, part: slice, turns: slice = slice(None)) -> list[list[float]]:
        return [turn[part] for document in documents for turn in document[arm][name][turns]]

    lines = [
        "| turns | "
        + " | ".join(f"{arm}: KL of the first token | of the others | same choice" for arm in ARMS[1:])
        + " |",
        "|---|" + "---|---|---|" * 2,
    ]
    count = len(documents[0][EXACT]["kl"])
    first, rest, every = slice(0, 1), slice(1, None), slice(None)
    halves = [(0, count // 2), (count // 2, count), (0, count)]
    for begin, end in dict.fromkeys((b, e) for b, e in halves if b < e):
        cells = [f"{begin + 1} to {end}"]
        for arm in ARMS[1:]:
            turns = slice(begin, end)
            low, high = interval(of(arm, "kl", rest, turns))
            cells += [
                f"{mean(of(arm, 'kl', first, turns)):.5f}",
                f"{mean(of(arm, 'kl', rest, turns)):.5f} ({low:.5f} to {high:.5f})",
                f"{100 * mean(of(arm, 'same', every, turns)):.1f} %",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    pooled = {arm: [np.concatenate(document[arm]["kl"]) for document in documents] for arm in ARMS[1:]}
    length = len(documents[0][EXACT]["kl"][0])
    lines += [
        "",
        f"All rows, recalled over exact extends, 95 % by turns: {paired_ratio(pooled[RECALLED], pooled[EXACT], length)}.",
        "",
        "| | first token s, least | median | MB read from the host: prefills | decode steps |",
        "|---|---|---|---|---|",
    ]
    for arm in ARMS:
        read = np.sum([document["read"][arm] for document in documents], axis=0) / 1e6
        lines.append(
            f"| {arm} | {min(seconds[arm]):.3f} | {np.median(seconds[arm]):.3f} | {read[0]:.1f} | {read[1]:.1f} |"
        )
    tokens = sum(document["counted"][RECALLED]["recalled_extend_tokens"] for document in documents)
    return "\n".join([*lines, "", f"{tokens} new tokens recalled."])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=6000, help="tokens of the document")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--question", type=int, default=48, help="tokens, prefilled in each turn")
    parser.add_argument("--answer", type=int, default=24, help="tokens, decoded in each turn")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--recall", type=int, default=96, help="recall_extend_tokens of the last arm")
    parser.add_argument(
        "--skip", type=int, nargs="+", default=[30000], help="tokens of the text to leave out before each document"
    )
    parser.add_argument("--text", help="another text, a file")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON, the server's configuration")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args(argv)
    if min(args.turns, args.question) < 1 or args.answer < 2:
        parser.error("--turns and --question must be at least 1, --answer 2")
    if args.recall < args.question + 17:
        parser.error(
            f"--recall must be at least {args.question + 17}: a question, and what its page lacks in the cache"
        )
    return args


def main() -> None:
    """Parse the command line, run, print and write."""
    args = parse_args()
    source, text = read_text(args.text)
    ids = AutoTokenizer.from_pretrained(args.model)(text, add_special_tokens=False).input_ids
    needed = args.prompt + max(args.turns * (args.question + args.answer), 3 * TIMED * args.question)
    if len(ids) < max(args.skip) + needed:
        raise SystemExit(f"the text has {len(ids)} tokens, too few: lower --skip, --prompt or --turns")
    log = Path(tempfile.mkdtemp(prefix="extends-")) / "server.log"
    print(f"starting a server; its log: {log}", flush=True)
    with serve(args.model, log, *SERVER_FLAGS, config=args.config) as server:
        found = [measure(server, ids[skip : skip + needed], args) for skip in tqdm(args.skip, unit="document")]
        seconds = first_tokens(server, ids[args.skip[0] : args.skip[0] + needed], args)
    body = table(found, seconds)
    print(f"\n{body}\n")
    write_results(
        "quality-extends",
        title=f"Recalled extends over {args.turns} turns",
        setting=(
            f"{args.model.name}, float32, {source}, a document of {args.prompt} tokens, questions of {args.question}, "
            f"answers of {args.answer}, budget {args.budget}, recall_extend_tokens {args.recall}"
        ),
        command=command_of("benchmarks.quality.extends"),
        body=body,
        data={"documents": found, "first_token_s": seconds},
    )


if __name__ == "__main__":
    main()
