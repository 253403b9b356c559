"""One document, many questions, over turns and concurrent sessions: accuracy by turn (in SCBench's sense, arXiv 2412.10319).

    python -m benchmarks.quality.turns [--documents 5] [--sessions 3] [--turns 8] [--lengths 4096] [--merging on off]

Ten sentences with magic numbers lie in a document of prose. Sessions that share it ask for them, each in an order of its own,
all at once; a turn is one short question with its answer. The history of a session holds the right answers, so that every
policy is asked the same prompts (`--history own` keeps what was said). Unless `--question prefilled` says otherwise, questions
go through the policy's decode steps, and later turns read what these wrote to the KV cache; so the cache is emptied and the
document prefilled again for each policy. `--merging on off` starts a server for each; `--question prefilled
--recall-extend 128` has each policy once more, with questions that recall (`recall_extend_tokens`). Writes JSON, Markdown and
SVG to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.policies import POLICIES
from benchmarks.policies.control import use
from benchmarks.quality.asking import SERVER_FLAGS, Steps, arms_of, ask, prefill
from benchmarks.quality.documents import read_text
from benchmarks.quality.model_level import Arm
from benchmarks.quality.prompts import Prompts
from benchmarks.quality.scores import DENSE, Answer, arms_in, cells_in, mean_score, report, string_match
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import CITIES, magic_number

ANSWER_TOKENS = 16
TURN_TOKENS = 96  # a question, its template and an answer, at most
POOL_SLACK_TOKENS = 2048


class Turn(NamedTuple):
    """One question of a session."""

    question: list[int]  # from the end of the last answer to the beginning of this one, which is given
    right: list[int]  # ids of the right answer
    expected: list[str]


class Conversation(NamedTuple):
    """A document and the turns of each session over it."""

    length: int
    number: int
    document: list[int]
    sessions: list[list[Turn]]


def make_conversation(prompts: Prompts, length: int, number: int, sessions: int, turns: int, seed: int) -> Conversation:
    """A document of exactly `length` tokens, and sessions that ask for its numbers, each in its own order.

    Raises ValueError where there are more turns than sentences.
    """
    if turns > len(CITIES):
        raise ValueError(f"a document has {len(CITIES)} numbers to ask for: use at most as many turns")
    rng = random.Random(f"{seed}/turns/{length}/{number}")
    facts = [
        magic_number(city, value)
        for city, value in zip(CITIES, rng.sample(range(10000, 100000), len(CITIES)), strict=True)
    ]
    rng.shuffle(facts)
    template = prompts.template
    before = prompts.encode(template.before)
    document = before + prompts.prose(rng, length - len(before), [fact.sentence for fact in facts])
    asked = []
    for _ in range(sessions):
        session = []
        for i, fact in enumerate(rng.sample(facts, turns)):
            begin, answer = fact.sentence.split(f" {fact.answer}")
            question = f"{template.ask_again if i else template.ask}{fact.question}{template.answer}{begin}"
            right = f" {fact.answer}{answer}"
            session.append(Turn(prompts.encode(question), prompts.encode(right), [fact.answer]))
        asked.append(session)
    return Conversation(length, number, document, asked)


def hold_session(
    server: Server, conversation: Conversation, session: list[Turn], end: int, decoded: bool, own_history: bool
) -> list[list[int]]:
    """Ask a session's questions one after the other, under the policy in use; the answers' ids."""
    history = conversation.document
    found = []
    for turn in session:
        said = ask(server, history, turn.question, ANSWER_TOKENS, end, decoded)
        history = history + turn.question + (said if own_history else turn.right)
        found.append(said)
    return found


def run(
    server: Server,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    arms: Sequence[Arm],
    decoded: bool,
    own_history: bool,
) -> tuple[list[Answer], Steps]:
    """All sessions of a document at once, under one arm after the other, each from an empty cache."""
    answers, steps = [], Steps()
    bar = tqdm(total=len(conversations) * len(arms), unit="document")
    for conversation in conversations:
        for arm in arms:
            bar.set_description(f"{arm.name}, {conversation.length:,}")
            prefill(server, conversation.document)
            use(server, arm.policy, **arm.options)
            hold = partial(
                hold_session, server, conversation, end=tokenizer.eos_token_id, decoded=decoded, own_history=own_history
            )
            with steps.count(server, arm), ThreadPoolExecutor(len(conversation.sessions)) as pool:
                said = list(pool.map(hold, conversation.sessions))
            answers += answers_of(arm, conversation, said, tokenizer, own_history)
            bar.update()
    bar.close()
    return answers, steps


def answers_of(
    arm: Arm, conversation: Conversation, said: Sequence[Sequence[list[int]]], tokenizer: Any, own_history: bool
) -> list[Answer]:
    """Score what was said in each session and turn; `own_history` as `hold_session` had it."""
    found = []
    for session, (turns, replies) in enumerate(zip(conversation.sessions, said, strict=True)):
        prompt_tokens = len(conversation.document)
        for i, (turn, reply) in enumerate(zip(turns, replies, strict=True)):
            text = tokenizer.decode(reply)
            prompt_tokens += len(turn.question)
            found.append(
                Answer(
                    arm=arm.name,
                    task=f"turn {i + 1}",
                    length=conversation.length,
                    number=conversation.number,
                    column=f"session {session + 1}",
                    document=f"{conversation.length}/{conversation.number}",
                    score=string_match(text, turn.expected),
                    tokens=len(reply),
                    text=text,
                    expected=turn.expected,
                    prompt_tokens=prompt_tokens,
                )
            )
            prompt_tokens += len(reply if own_history else turn.right)
    return found


def picture(answers: Sequence[Answer]) -> Any:
    """Accuracy by turn as a matplotlib figure: a panel per length, a line per arm."""
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(answer.length for answer in answers))
    figure = Figure(figsize=(1 + 4.5 * len(lengths), 3.5), layout="constrained")
    for place, length in enumerate(lengths, 1):
        axes = figure.add_subplot(1, len(lengths), place)
        cells = [cell for cell in cells_in(answers) if cell[1] == length]
        for arm in [DENSE, *arms_in(answers)]:
            scores = [100 * mean_score(answers, arm, cell) for cell in cells]
            axes.plot(range(1, len(cells) + 1), scores, marker="o", label=arm, linewidth=2.5 if arm == DENSE else 1.2)
        axes.set(xlabel="turn", ylabel="right answers, percent", ylim=(-3, 103), title=f"document of {length:,} tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5, help="per length")
    parser.add_argument("--sessions", type=int, default=3, help="concurrent, over one document")
    parser.add_argument("--turns", type=int, default=8, help=f"per session, at most {len(CITIES)}")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="tokens of the document")
    parser.add_argument("--policies", nargs="+", choices=[name for name in POLICIES if name != DENSE], default=["ours"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512])
    parser.add_argument(
        "--candidates", type=int, help="tokens ranked by their codes, default: as in benchmarks.quality.model_level"
    )
    parser.add_argument(
        "--merging", nargs="+", choices=["on", "off"], default=["on"], help="of segments; a server for each"
    )
    parser.add_argument("--question", choices=["decoded", "prefilled"], default="decoded")
    parser.add_argument(
        "--recall-extend", type=int, help="tokens: each policy once more with recalled extends, of prefilled questions"
    )
    parser.add_argument("--history", choices=["right", "own"], default="right", help="answers that later turns read")
    parser.add_argument(
        "--format", choices=["chat", "plain"], default="chat", help="by the chat template, or a text to go on"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--text", help="another text for the documents, a file")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args(argv)
    if min(args.documents, args.sessions, args.turns) < 1 or args.turns > len(CITIES):
        parser.error(f"--documents, --sessions and --turns must be at least 1, --turns at most {len(CITIES)}")
    if args.recall_extend is not None and args.question != "prefilled":
        parser.error("--recall-extend needs --question prefilled: what is decoded recalls in any case")
    return args


def recalling(arms: Sequence[Arm], tokens: int) -> list[Arm]:
    """The arms, and those that are not dense once more with extends of up to so many tokens that recall."""
    more = [
        arm._replace(name=f"{arm.name}, recalled extends", options=arm.options | {"recall_extend_tokens": tokens})
        for arm in arms
        if arm.policy != DENSE
    ]
    return [*arms, *more]


def main() -> None:
    """Parse the command line, ask, print and write."""
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    source, text = read_text(args.text)
    prompts = Prompts(tokenizer, text, args.seed, args.format == "chat")
    conversations = [
        make_conversation(prompts, length, number, args.sessions, args.turns, args.seed)
        for length in args.lengths
        for number in range(args.documents)
    ]
    answers: list[Answer] = []
    sparse: dict[str, float] = {}
    pool = max(args.lengths) + args.sessions * args.turns * TURN_TOKENS + POOL_SLACK_TOKENS
    for place, merging in enumerate(args.merging):
        arms = arms_of(args.policies, args.budgets, args.candidates)[min(place, 1) :]  # dense once
        if args.recall_extend is not None:
            arms = recalling(arms, args.recall_extend)
        if len(args.merging) > 1:
            arms = [arm if arm.policy == DENSE else arm._replace(name=f"{arm.name}, merging {merging}") for arm in arms]
        log = Path(tempfile.mkdtemp(prefix="turns-")) / "server.log"
        print(f"merging {merging}: starting a server, its log: {log}", flush=True)
        flags = [*SERVER_FLAGS, "--max-total-tokens", str(pool)]
        with serve(args.model, log, *flags, config={"merge_segments": merging == "on"}) as server:
            found, steps = run(
                server, tokenizer, conversations, arms, args.question == "decoded", args.history == "own"
            )
        answers += found
        sparse |= steps.shares()
    report(
        "turns",
        answers,
        sparse,
        title="Many questions over one document, by turn",
        setting=(
            f"{args.model.name}, float32, {source}, {args.format} format, {args.documents} documents, {args.sessions} "
            f"concurrent sessions, question {args.question}, history {args.history}, merging {' and '.join(args.merging)}"
        ),
        figure=picture(answers),
    )


if __name__ == "__main__":
    main()
