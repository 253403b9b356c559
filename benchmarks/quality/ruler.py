"""lm-eval's offline RULER tasks, unmodified, through its `local-completions` against one real server: policies beside dense.

    python -m benchmarks.quality.ruler [--samples 10] [--lengths 4096 7800] [--budgets 256 512] [--decoded 64]

lm-eval makes the prompts, sends them, and scores the answers. Each prompt is made once and asked for under dense and every
policy, a few prompts at a time, so that later arms find them in the radix cache. `--decoded` takes that many tokens off the
prompt's end, the question, and lets them go through decode steps; 0 prefills everything. A policy is compared with dense over
all tasks together, paired by sample; tasks where dense scores below 20 % are listed, not judged. A prompt is shorter than the
length that is asked for, some by half, so the table begins with the tokens that were sent. Writes JSON, Markdown and SVG to
benchmarks/results/.

    python -m benchmarks.quality.ruler --recount RESULT.json [RESULT.json]

counts the prompts of results that do not say how long they were: lm-eval makes them again, without a server. Their expected
answers must be those of the results. `benchmarks.quality.scores` takes the file that this writes beside the results.

lm-eval is no dependency of this package: pip install 'lm-eval[api,ruler]'. Nothing is fetched from the network: these six tasks
make their own text. The other RULER tasks read Paul Graham's essays, SQuAD or HotpotQA from a hub, so they are not here.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.policies import POLICIES
from benchmarks.policies.control import use
from benchmarks.quality.asking import SERVER_FLAGS, TOGETHER, ForcedQuestion, Steps, arms_of
from benchmarks.quality.model_level import Arm
from benchmarks.quality.scores import DENSE, Answer, cells_in, prompts_text, read_answers, report
from benchmarks.quality.tasks import heat_map
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out

TASKS = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
PROMPTS = 500  # of a task, as lm-eval makes them
POOL_SLACK_TOKENS = 4096
TIMEOUT_S = 4 * 3600  # of one request; several prefills take that of a large model on a CPU
SEEDS = (0, 1234)  # lm-eval's own, of `random` and numpy


def optional(module: str) -> Any:
    """A module of lm-eval or of what its RULER tasks need; SystemExit with how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise SystemExit(f"{error}: this command needs lm-eval, pip install 'lm-eval[api,ruler]'") from error


def load_tasks(names: Sequence[str], length: int, tokenizer: str) -> dict[str, dict[str, Any]]:
    """lm-eval's tasks by name, each as `evaluate` takes it, with `PROMPTS` prompts of at most `length` tokens, answer included.

    Raises SystemExit where lm-eval or what its RULER tasks need is not installed.
    """
    for module in ("wonderwords", "nltk", "scipy"):
        optional(module)
    # The module of all needle tasks fetches a sentence splitter that only the essays need; a folder of its name stops that.
    folder = Path(tempfile.mkdtemp(prefix="nltk-"))
    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    optional("nltk").data.path.insert(0, str(folder))
    manager = optional("lm_eval.tasks").TaskManager(metadata={"tokenizer": tokenizer, "max_seq_lengths": [length]})
    loaded = {}
    for name in names:
        random.seed(SEEDS[0])
        np.random.seed(SEEDS[1])
        loaded[name] = manager.load([name])
    return loaded


def make_client(server: Server, model: Path, context: int, decoded: int) -> Any:
    """lm-eval's `local-completions` for a server; the last `decoded` tokens of each prompt go through decode steps.

    Args:
        server: started with `SERVER_FLAGS`.
        model: its folder.
        context: tokens that the model takes at most; lm-eval would cut a longer prompt.
        decoded: 0 sends prompts as they are.
    """
    completions: Any = optional("lm_eval.models.openai_completions").LocalCompletionsAPI

    class DecodedQuestion(completions):
        """Sends a prompt without its end, and has the server decode that before the answer."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self._ends: set[str] = set()  # that were to be decoded

        def _create_payload(self, messages: Any, generate: bool = False, **options: Any) -> dict[str, Any]:
            payload = super()._create_payload(messages, generate=generate, **options)
            (prompt,) = payload["prompt"]
            payload["prompt"] = [prompt[:-decoded]]
            payload["max_tokens"] += decoded
            payload["custom_params"] = {"question": prompt[-decoded:]}
            payload["custom_logit_processor"] = ForcedQuestion.to_str()
            self._ends.add(self.tokenizer.decode(prompt[-decoded:]))
            return payload

        def parse_generations(self, outputs: Any, **options: Any) -> list[str]:
            (text,) = super().parse_generations(outputs, **options)
            ends = [end for end in self._ends if text.startswith(end)]
            assert ends, f"{text!r} begins with none of the decoded questions {self._ends!r}"
            return [text[len(max(ends, key=len)) :]]

    kind = DecodedQuestion if decoded else completions
    return kind(
        model=str(model),
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend="huggingface",
        max_length=context,
        max_gen_toks=128,
        timeout=TIMEOUT_S,
        max_retries=1,
        num_concurrent=TOGETHER,
    )


def ask_arm(
    client: Any, task: dict[str, Any], name: str, length: int, numbers: Sequence[int], arm: Arm
) -> list[Answer]:
    """One arm's answers to some of a task's prompts, as lm-eval scores them."""
    found = optional("lm_eval.evaluator").evaluate(
        client, task, samples={name: list(numbers)}, log_samples=True, bootstrap_iters=0
    )
    answers = []
    for sample in found["samples"][name]:
        text = sample["filtered_resps"][0]
        answers.append(
            Answer(
                arm=arm.name,
                task=name,
                length=length,
                number=sample["doc_id"],
                column="-",
                document=f"{name}/{length}/{sample['doc_id']}",
                score=float(sample[str(length)]),
                tokens=len(client.tokenizer(text, add_special_tokens=False).input_ids),
                text=text,
                expected=list(sample["doc"]["outputs"]),
                prompt_tokens=tokens_of(client.tokenizer, sample["arguments"][0][0]),
            )
        )
    return answers


def tokens_of(tokenizer: Any, text: str) -> int:
    """Of a prompt, as lm-eval's client encodes it."""
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def recount(
    answers: Sequence[Answer], tokenizer: Any, make: Callable[[list[str], int], dict[str, Any]]
) -> list[Answer]:
    """The same answers with the tokens of their prompts.

    Args:
        answers: of any arms.
        tokenizer: of the model that was asked.
        make: `load_tasks` for names and a length.

    Raises SystemExit where lm-eval makes other prompts than the answers are to.
    """
    found: dict[tuple[str, int, int], int] = {}
    for length in sorted({answer.length for answer in answers}):
        loaded = make(sorted({answer.task for answer in answers if answer.length == length}), length)
        for name, by_kind in loaded.items():
            expected = {answer.number: answer.expected for answer in answers if answer.cell == (name, length)}
            numbers = sorted(expected)
            task = by_kind["tasks"][name]
            task.build_all_requests(samples=numbers, rank=0, world_size=1)
            for instance in task.instances:
                number = numbers[instance.doc_id]
                if list(instance.doc["outputs"]) != expected[number]:
                    raise SystemExit(
                        f"{name} at {length}, number {number}: the prompt that is made here has another answer than the "
                        f"result; install the lm-eval that the result names"
                    )
                found[name, length, number] = tokens_of(tokenizer, instance.args[0])
    return [a._replace(prompt_tokens=found[a.task, a.length, a.number]) for a in answers]


def report_recount(files: Sequence[Path], model: Path) -> None:
    """Count the prompts of results, print a table and write it."""
    from transformers import AutoTokenizer

    def make(names: list[str], length: int) -> dict[str, Any]:
        return load_tasks(names, length, str(model))

    answers = [answer for answer in read_answers(files)[0] if answer.arm == DENSE]
    answers = recount(answers, AutoTokenizer.from_pretrained(model), make)
    lines = ["| task | prompt tokens | asked for | n |", "|---|---|---|---|"]
    for task, length in cells_in(answers):
        tokens, count = prompts_text(answers, (task, length)), sum(a.cell == (task, length) for a in answers)
        lines.append(f"| {task} | {tokens} | {length:,} | {count} |")
    body = "\n".join(lines)
    print(f"\n{body}\n")
    prompts = [{"task": a.task, "length": a.length, "number": a.number, "tokens": a.prompt_tokens} for a in answers]
    write_results(
        "quality-ruler-prompts",
        title="Tokens of RULER's prompts",
        setting=f"{model.name}'s tokenizer, lm-eval {version('lm-eval')}, prompts of {', '.join(f.stem for f in files)}",
        command=command_of("benchmarks.quality.ruler"),
        body=body,
        data={"model": model.name, "prompts": prompts},
    )


def run(
    server: Server, client: Any, tasks: dict[int, dict[str, dict[str, Any]]], samples: range, arms: Sequence[Arm]
) -> tuple[list[Answer], Steps]:
    """Ask for these prompts of `tasks` (by length and name) under every arm, `TOGETHER` prompts at a time."""
    answers, steps = [], Steps()
    bar = tqdm(total=len(samples) * sum(map(len, tasks.values())), unit="prompt")
    for length, by_name in tasks.items():
        for name, task in by_name.items():
            bar.set_description(f"{name}, {length:,}")
            for first in range(0, len(samples), TOGETHER):
                numbers = samples[first : first + TOGETHER]
                server.flush()
                for arm in arms:
                    use(server, arm.policy, **arm.options)
                    with steps.count(server, arm):
                        answers += ask_arm(client, task, name, length, numbers, arm)
                bar.update(len(numbers))
    bar.close()
    return answers, steps


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10, help=f"per task and length, at most {PROMPTS}")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="number of the first sample: another run's are joined by benchmarks.quality.scores",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[4096, 7800], help="tokens of prompt and answer, at most"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--policies", nargs="+", choices=[name for name in POLICIES if name != DENSE], default=["ours"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512])
    parser.add_argument(
        "--candidates", type=int, help="tokens ranked by their codes, default: as benchmarks.quality.model_level"
    )
    parser.add_argument("--decoded", type=int, default=64, help="tokens at a prompt's end that are decoded; 0: none")
    parser.add_argument("--context", type=int, default=8192, help="tokens that the model takes")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    parser.add_argument("--recount", nargs="+", type=Path, help="results whose prompts to count; asks no server")
    args = parser.parse_args(argv)
    if args.samples < 1 or args.first < 0 or args.first + args.samples > PROMPTS or args.decoded < 0:
        parser.error(
            f"--samples must be at least 1, --first and --decoded at least 0, and a task has {PROMPTS} samples"
        )
    return args


def main() -> None:
    """Parse the command line, ask, print and write."""
    args = parse_args()
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns at each prompt of a length that its tasks do not list
    if args.recount:
        report_recount(args.recount, args.model)
        return
    tasks = {length: load_tasks(args.tasks, length, str(args.model)) for length in args.lengths}
    arms = arms_of(args.policies, args.budgets, args.candidates)
    pool = TOGETHER * max(args.lengths) + POOL_SLACK_TOKENS
    log = Path(tempfile.mkdtemp(prefix="ruler-")) / "server.log"
    print(f"{len(arms)} arms; starting a server, its log: {log}", flush=True)
    with serve(args.model, log, *SERVER_FLAGS, "--max-total-tokens", str(pool), config={}) as server:
        client = make_client(server, args.model, args.context, args.decoded)
        answers, steps = run(server, client, tasks, range(args.first, args.first + args.samples), arms)
    report(
        "ruler",
        answers,
        steps.shares(),
        title="RULER, offline tasks of lm-eval",
        setting=f"{args.model.name}, float32, lm-eval {version('lm-eval')}, {args.decoded} tokens of each prompt decoded",
        figure=heat_map(answers),
        arms=[arm._asdict() for arm in arms],
    )


if __name__ == "__main__":
    main()
