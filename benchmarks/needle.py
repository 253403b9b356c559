"""Needles in one long document: which of them the dense path finds, and which clusterkv finds at a small budget.

    python -m benchmarks.needle [--tokens 7700] [--budget 256] [--candidates 1024]

Ten sentences with magic numbers lie at ten depths of one document, and each is asked for by itself (SmolLM2-135M-Instruct,
float32, greedy). The document is prefilled once per server; whole answers go through the path that is measured. About four
minutes on two cores. Prints a table and writes it to benchmarks/results/, never over an older one.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, serve
from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import CITIES, Fact, magic_number, make_document


def prompts(tokens: int) -> list[tuple[str, Fact]]:
    """(prompt, needle) for each needle; the prompts share everything but the question."""
    tokenizer = AutoTokenizer.from_pretrained(default_out())
    numbers = random.Random(7).sample(range(10000, 99999), len(CITIES))
    needles = [magic_number(city, number) for city, number in zip(CITIES, numbers, strict=True)]
    # The needles and the template are part of the length.
    body = tokenizer(make_document(tokens + 1500, [])).input_ids[: tokens - 16 * len(needles) - 60]
    text = tokenizer.decode(body)
    pieces = []
    for i, needle in enumerate(needles):
        begin, end = len(text) * i // len(needles), len(text) * (i + 1) // len(needles)
        middle = text.index("\n", (begin + end) // 2) if "\n" in text[(begin + end) // 2 : end] else (begin + end) // 2
        pieces += [text[begin:middle], f" {needle.sentence}", text[middle:end]]
    document = "".join(pieces)
    return [
        (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{document}\n\n{needle.question}"}],
                tokenize=False,
                add_generation_prompt=True,
            ),
            needle,
        )
        for needle in needles
    ]


def answers(server: Server, asked: list[tuple[str, Fact]]) -> tuple[list[str], int]:
    """The server's answers, and the prompt's tokens."""
    found = [server.generate(prompt, 16) for prompt, _ in tqdm(asked, leave=False, unit="needle")]
    return [answer["text"] for answer in found], found[0]["meta_info"]["prompt_tokens"]


def main() -> None:
    """Ask both servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7700)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1024)
    args = parser.parse_args()
    asked = prompts(args.tokens)
    configs = {
        "dense": {"budget_tokens": 8192, "candidate_tokens": 8192},
        "clusterkv": {"budget_tokens": args.budget, "candidate_tokens": args.candidates},
    }
    texts: dict[str, list[str]] = {}
    length = 0
    for name, config in configs.items():
        print(f"{name}: starting a server", flush=True)
        log = Path(tempfile.mkdtemp()) / "server.log"
        with serve(default_out(), log, "--max-total-tokens", "12000", config=config) as server:
            texts[name], length = answers(server, asked)
    lines = ["| depth | needle | dense | clusterkv |", "|---|---|---|---|"]
    right = dict.fromkeys(texts, 0)
    for i, (_, needle) in enumerate(asked):
        marks = []
        for name in texts:
            right[name] += needle.answer in texts[name][i]
            marks.append(
                "found" if needle.answer in texts[name][i] else " ".join(texts[name][i].split())[:40].replace("|", " ")
            )
        lines.append(
            f"| {100 * (2 * i + 1) // (2 * len(asked))} % | {CITIES[i]} {needle.answer} | {' | '.join(marks)} |"
        )
    lines.append(f"| all | | {right['dense']} of {len(asked)} | {right['clusterkv']} of {len(asked)} |")
    text = "\n".join(lines)
    print(f"\n{text}")
    write_results(
        f"needle-{args.tokens}-budget{args.budget}",
        title="Needles in one document",
        setting=f"SmolLM2-135M-Instruct, float32, {length} tokens, budget {args.budget}, candidates {args.candidates}",
        command=command_of("benchmarks.needle"),
        body=text,
        data={"numbers": [needle.answer for _, needle in asked], "answers": texts},
    )


if __name__ == "__main__":
    main()
