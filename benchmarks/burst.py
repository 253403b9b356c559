"""How often is one document prefilled and clustered that several requests ask for at the same time? By policy and by client.

    python -m benchmarks.burst [--copies 4] [--tokens 1500] [--runs 3] [--model DIR]

SGLang matches a request with the radix cache when it admits it, and a prompt is in the cache once its prefill's result was
processed. So requests that are admitted together share nothing. One server per setting of SGLang's scheduler (`SERVERS`), and
in each, over an empty cache, every way of asking (`WAYS`): `--copies` requests, each one a document and a question. For each:
tokens that were prefilled, as multiples of one prompt, tokens clustered, as multiples of what one prompt has, seconds until
the last answer, and what one more copy finds afterwards. Of several runs the least and the most. Prints a table and writes
it to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import requests
import sglang as sgl
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import FACTS, log_book, make_document

SERVERS = {
    "as SGLang starts (fcfs)": [],
    "lpm": ["--schedule-policy", "lpm"],
    "fcfs, prefills of 2,048 tokens": ["--chunked-prefill-size", "2048"],
    "lpm, prefills of 2,048 tokens": ["--chunked-prefill-size", "2048", "--schedule-policy", "lpm"],
    "one prefill at a time, no overlap": ["--prefill-max-requests", "1", "--disable-overlap-schedule"],
}
OTHERS = 8  # prompts that share nothing
ANSWER_TOKENS = 8


class Burst(NamedTuple):
    """What one burst of requests cost."""

    prefilled: int  # tokens of prompts that the radix cache did not have
    clustered: int
    seconds: float
    later_cached: int  # of one more copy
    later_clustered: int


def counts(server: Server) -> dict[str, Any]:
    """The server's counts once two readings agree: the last step's come a moment after its tokens."""
    found = None
    while (newer := server.counts()) != found:
        found = newer
        time.sleep(0.3)
    return newer


def generate(server: Server, prompts: list[str], others: list[str] | None = None) -> int:
    """Ask for all in one list, others behind them; tokens that were prefilled of the prompts."""
    sampling = {"temperature": 0, "max_new_tokens": ANSWER_TOKENS, "ignore_eos": True}
    texts = prompts + (others or [])
    reply = requests.post(f"{server.url}/generate", json={"text": texts, "sampling_params": sampling}, timeout=1800)
    assert reply.status_code == 200, reply.text
    found = [answer["meta_info"] for answer in reply.json()][: len(prompts)]
    return sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in found)


def in_one_list(server: Server, document: str, questions: list[str]) -> int:
    """All at once."""
    return generate(server, [document + question for question in questions])


def equal_prompts(server: Server, document: str, questions: list[str]) -> int:
    """All at once, with the same question."""
    return generate(server, [document + questions[0]] * len(questions))


def other_prompts(document: str) -> list[str]:
    """As long as the document, and alike from no token on."""
    return ["".join(log_book(len(document), seed=100 + i, first_day=1000 * (i + 1))) for i in range(OTHERS)]


def equal_before_others(server: Server, document: str, questions: list[str]) -> int:
    """All at once, with the same question, and other prompts behind them in the list."""
    return generate(server, [document + questions[0]] * len(questions), other_prompts(document))


def first_alone(server: Server, document: str, questions: list[str]) -> int:
    """One, then the others."""
    prompts = [document + question for question in questions]
    return generate(server, prompts[:1]) + generate(server, prompts[1:])


@sgl.function
def _program(s: Any, document: str, questions: list[str], sync: bool) -> None:
    s += document
    if sync:
        s.sync()
    branches = s.fork(len(questions))
    for branch, question in zip(branches, questions, strict=True):
        branch += question + sgl.gen("answer", max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    branches.join()
    found = [branch.get_meta_info("answer") for branch in branches]
    # What all of them had cached was prefilled by the request that fork sends, over an empty cache.
    before = min(meta["cached_tokens"] for meta in found)
    s.set_var("prefilled", before + sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in found))


def _forked(server: Server, document: str, questions: list[str], sync: bool) -> int:
    state = _program.run(document, questions, sync, backend=sgl.RuntimeEndpoint(server.url))
    return int(state["prefilled"])


def forked(server: Server, document: str, questions: list[str]) -> int:
    """A frontend program that forks behind the document."""
    return _forked(server, document, questions, sync=False)


def forked_after_sync(server: Server, document: str, questions: list[str]) -> int:
    """The same with a sync before the fork."""
    return _forked(server, document, questions, sync=True)


WAYS: dict[str, Callable[[Server, str, list[str]], int]] = {
    "equal prompts, one list": equal_prompts,
    "equal prompts before others": equal_before_others,
    "one list": in_one_list,
    "first alone, then a list": first_alone,
    "fork": forked,
    "sync, then fork": forked_after_sync,
}


def burst(server: Server, ask: Callable[[Server, str, list[str]], int], document: str, questions: list[str]) -> Burst:
    """One burst over an empty cache, then one more copy."""
    elsewhere = 0
    if ask is equal_before_others:
        server.flush()
        before = counts(server)
        generate(server, [], other_prompts(document))
        elsewhere = counts(server)["tokens_clustered"] - before["tokens_clustered"]
    server.flush()
    before = counts(server)
    begin_s = time.perf_counter()
    prefilled = ask(server, document, questions)
    seconds = time.perf_counter() - begin_s
    middle = counts(server)
    later = server.generate(document + questions[0], ANSWER_TOKENS)["meta_info"]
    after = counts(server)
    return Burst(
        prefilled,
        middle["tokens_clustered"] - before["tokens_clustered"] - elsewhere,
        seconds,
        later["cached_tokens"],
        after["tokens_clustered"] - middle["tokens_clustered"],
    )


def spread(values: list[float], digits: int) -> str:
    """The least and the most of some values, or the one that they are."""
    texts = list(dict.fromkeys(f"{value:,.{digits}f}" for value in (min(values), max(values))))
    return " to ".join(texts)


def table(found: dict[str, dict[str, list[Burst]]], prompt: int, once: int) -> str:
    """Markdown: a row per server and way.

    Args:
        found: bursts by server and way.
        prompt: tokens of one.
        once: tokens that are clustered of one alone.
    """
    lines = [
        f"One prompt has {prompt:,} tokens, of which {once:,} are clustered when it comes alone.",
        "",
        "| server | requests | prompts prefilled | clustered | seconds | one more: cached | clustered |",
        "|---|---|---|---|---|---|---|",
    ]
    for server, ways in found.items():
        for way, bursts in ways.items():
            cells = [
                f"{spread([b.prefilled / prompt for b in bursts], 1)} times",
                f"{spread([b.clustered / once for b in bursts], 1)} times",
                spread([b.seconds for b in bursts], 1),
                spread([b.later_cached for b in bursts], 0),
                spread([b.later_clustered for b in bursts], 0),
            ]
            lines.append(f"| {server} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=4, help=f"requests at once, at most {len(FACTS)}")
    parser.add_argument("--tokens", type=int, default=1500, help="about how long the document is")
    parser.add_argument("--runs", type=int, default=3, help="of every way in every server")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--server-args", nargs=argparse.REMAINDER, default=[], help="more flags, of every server")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args(argv)
    if not 2 <= args.copies <= len(FACTS) or args.runs < 1:
        parser.error(f"--copies must be 2 to {len(FACTS)}, --runs at least 1")
    return args


def main() -> None:
    """Start every server in turn, ask in every way, print and write."""
    args = parse_args()
    document = make_document(args.tokens, FACTS) + "\n\n"
    questions = [fact.question for fact in FACTS[: args.copies]]
    prompt = len(AutoTokenizer.from_pretrained(args.model)(document + questions[0]).input_ids)
    found: dict[str, dict[str, list[Burst]]] = {}
    once = 0
    pool = str((args.copies + OTHERS) * (prompt + 512) + 4096)
    bar = tqdm(total=len(args.servers) * len(args.ways) * args.runs, unit="burst")
    for name in args.servers:
        log = Path(tempfile.mkdtemp(prefix="burst-")) / "server.log"
        bar.write(f"{name}: starting a server, its log: {log}")
        flags = ["--max-total-tokens", pool, "--sleep-on-idle", *SERVERS[name], *args.server_args]
        with serve(args.model, log, *flags, config={"budget_tokens": args.budget}) as server:
            before = counts(server)
            server.flush()
            generate(server, [document + questions[0]])
            once = counts(server)["tokens_clustered"] - before["tokens_clustered"]
            found[name] = {way: [] for way in args.ways}
            for way in args.ways:
                bar.set_description(f"{name}: {way}")
                for _ in range(args.runs):
                    found[name][way].append(burst(server, WAYS[way], document, questions))
                    bar.update()
    bar.close()
    body = table(found, prompt, once)
    print(f"\n{body}\n")
    write_results(
        "burst",
        title="One document, asked for by several requests at once",
        setting=f"{args.model.name}, float32, {args.copies} requests, {prompt:,} tokens each, budget {args.budget}",
        command=command_of("benchmarks.burst"),
        body=body,
        data={
            "prompt_tokens": prompt,
            "clustered_alone": once,
            "bursts": {
                name: {way: [b._asdict() for b in bursts] for way, bursts in ways.items()}
                for name, ways in found.items()
            },
        },
    )


if __name__ == "__main__":
    main()
