"""Needles, variables and common words through one real server: every policy beside dense, on identical prompts.

    python -m benchmarks.quality.tasks [--samples 10] [--lengths 4096 7800] [--budgets 256 512] [--question prefilled]
    python -m benchmarks.quality.tasks --together [--samples 20] ...

Prompts are RULER's in kind (benchmarks/quality/prompts.py), each with a document of its own. Each is prefilled once, dense
and exact, then asked for under every policy, a few prompts at once. Unless `--question prefilled` says otherwise, the
question too goes through the policy's decode steps. Scores are shares of the expected strings; a policy is compared with
dense over all cells together, paired by sample, with 95 % intervals by bootstrap. Cells where dense scores below 20 % are
listed, not judged: they say something of the model, nothing of a policy. With `--together` a sample is a document that has the
needles of several tasks, fields to be put into JSON and strings to be copied among them, and all questions about it: so many
questions cost few prefills. Those of one document are drawn together in the bootstrap. Writes JSON, Markdown and SVG to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.policies import POLICIES
from benchmarks.policies.control import use
from benchmarks.quality.asking import SERVER_FLAGS, TOGETHER, Steps, arms_of, ask, prefill
from benchmarks.quality.documents import read_text
from benchmarks.quality.model_level import Arm
from benchmarks.quality.prompts import TASKS, Prompts, Sample
from benchmarks.quality.scores import Answer, report, string_match
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out

POOL_SLACK_TOKENS = 4096


def make_samples(
    prompts: Prompts, tasks: Sequence[str], lengths: Sequence[int], count: int, first: int = 0
) -> list[Sample]:
    """`count` samples of every task at every length, from number `first` on; a number stands for the same depth in all."""
    numbers = range(first, first + count)
    return [prompts.make(task, length, number) for length in lengths for task in tasks for number in numbers]


def answer_of(arm: Arm, sample: Sample, ids: list[int], text: str) -> Answer:
    """Score what an arm said."""
    return Answer(
        arm=arm.name,
        task=sample.task,
        length=sample.length,
        number=sample.number,
        column=f"question {sample.part}" if sample.part else "-" if sample.depth is None else f"{sample.depth} %",
        document=f"{'together' if sample.part else sample.task}/{sample.length}/{sample.number}",
        score=string_match(text, sample.expected),
        tokens=len(ids),
        text=text,
        expected=sample.expected,
        prompt_tokens=len(sample.document) + len(sample.question),
    )


def groups_of(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that are asked for at once: all of one document, or `TOGETHER` that have documents of their own."""
    together = groupby((s for s in samples if s.part), lambda s: (s.length, s.number))
    alone = [s for s in samples if not s.part]
    return [list(some) for _, some in together] + [
        alone[first : first + TOGETHER] for first in range(0, len(alone), TOGETHER)
    ]


def run(
    server: Server, tokenizer: Any, samples: Sequence[Sample], arms: Sequence[Arm], decoded: bool
) -> tuple[list[Answer], Steps]:
    """Ask for every sample under every arm, a group at a time."""
    answers, steps = [], Steps()

    def say(sample: Sample) -> list[int]:
        return ask(server, sample.document, sample.question, sample.answer_tokens, tokenizer.eos_token_id, decoded)

    bar = tqdm(total=len(samples), unit="sample")
    for asked in groups_of(samples):
        bar.set_description(f"{asked[0].task}, {asked[0].length:,}")
        documents = (s.document if decoded else s.document + s.question for s in asked)
        prefill(server, *map(list, dict.fromkeys(map(tuple, documents))))
        for arm in arms:
            use(server, arm.policy, **arm.options)
            with steps.count(server, arm), ThreadPoolExecutor(len(asked)) as threads:
                found = list(threads.map(say, asked))
            answers += [answer_of(arm, s, ids, tokenizer.decode(ids)) for s, ids in zip(asked, found, strict=True)]
        bar.update(len(asked))
    bar.close()
    return answers, steps


def heat_map(answers: Sequence[Answer]) -> Any:
    """Mean scores as a matplotlib figure: a row per task and depth, a column per length and arm."""
    from matplotlib.figure import Figure

    rows = sorted({(answer.task, answer.column) for answer in answers})
    columns = list(dict.fromkeys((answer.length, answer.arm) for answer in answers))
    values = np.full((len(rows), len(columns)), np.nan)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            scores = [a.score for a in answers if (a.task, a.column) == row and (a.length, a.arm) == column]
            values[i, j] = np.mean(scores) if scores else np.nan
    figure = Figure(figsize=(3.5 + 0.8 * len(columns), 2 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            # The colour map is dark below.
            axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="white" if value <= 0.6 else "black")
    axes.set_xticks(range(len(columns)), [f"{length:,}\n{arm}" for length, arm in columns], fontsize="small")
    axes.set_yticks(
        range(len(rows)), [task if column == "-" else f"{task}, {column}" for task, column in rows], fontsize="small"
    )
    axes.set_title("scores by task and depth of the needle, in percent", fontsize="medium")
    figure.colorbar(image, label="score")
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10, help="per task and length; 10 is quick, 50 for the night")
    parser.add_argument(
        "--together",
        action="store_true",
        help="questions of several tasks about each document; --samples are documents",
    )
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="number of the first sample: another run's are joined by benchmarks.quality.scores",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 7800], help="tokens of document and question")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument(
        "--policies", nargs="+", choices=[name for name in POLICIES if name != "dense"], default=["ours"]
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512])
    parser.add_argument(
        "--candidates", type=int, help="tokens ranked by their codes, default: as benchmarks.quality.model_level"
    )
    parser.add_argument("--question", choices=["decoded", "prefilled"], default="decoded")
    parser.add_argument(
        "--format", choices=["chat", "plain"], default="chat", help="by the chat template, or a text to go on"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--text", help="another text for the documents, a file")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args(argv)
    if args.samples < 1 or args.first < 0:
        parser.error("--samples must be at least 1, and --first at least 0")
    if args.together and args.tasks != TASKS:
        parser.error("--together has tasks of its own: leave out --tasks")
    return args


def main() -> None:
    """Parse the command line, ask, print and write."""
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source, text = read_text(args.text)
    prompts = Prompts(tokenizer, text, args.seed, args.format == "chat")
    if args.together:
        numbers = range(args.first, args.first + args.samples)
        samples = [s for length in args.lengths for number in numbers for s in prompts.make_together(length, number)]
    else:
        samples = make_samples(prompts, args.tasks, args.lengths, args.samples, args.first)
    arms = arms_of(args.policies, args.budgets, args.candidates)
    log = Path(tempfile.mkdtemp(prefix="tasks-")) / "server.log"
    print(f"{len(samples)} samples, {len(arms)} arms; starting a server, its log: {log}", flush=True)
    pool = TOGETHER * max(args.lengths) + POOL_SLACK_TOKENS
    with serve(args.model, log, *SERVER_FLAGS, "--max-total-tokens", str(pool), config={}) as server:
        answers, steps = run(server, tokenizer, samples, arms, args.question == "decoded")
    report(
        "tasks",
        answers,
        steps.shares(),
        title="Tasks: needles, variables, " + ("JSON, copies" if args.together else "common words"),
        setting=f"{args.model.name}, float32, {source}, {args.format} format, question {args.question}",
        figure=heat_map(answers),
        arms=[arm._asdict() for arm in arms],
    )


if __name__ == "__main__":
    main()
