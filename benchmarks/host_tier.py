"""Sessions that come back, with the host tier and without it, at equal bytes: what does the tier buy, and from how many on?

    python -m benchmarks.host_tier [--tokens 7000] [--fits 2] [--multiples 1 2 3 4] [--host-ratio 4] [--host-kv-dtype int8]
    python -m benchmarks.host_tier --check-kl [--tokens 7000]

Two servers with the same flags: `without` has a KV cache in which `--fits` sessions fit; `tier` has `host_ratio`, and as many
tokens as take the same bytes (keys and values, clusters, host rows). Bytes are those of the tensors: a process's memory has the
weights and numba's code in it, and not yet what was never written; it is printed beside them. On a CPU both tiers are the same
memory, so this is about how many tokens a byte holds and what it costs to read them, not about a bus.

A session is a document of its own and three turns, each a question and an answer that the next turn's prompt has in it. N
sessions take their turns in an order that is drawn anew for each turn, `--concurrency` at a time; N goes from one to four times
what fits without the tier. Of the second and third turns: time to first token, requests per second, tokens that were
prefilled although an earlier turn had done so, milliseconds per token, bytes read from the host tier. Both arms get the same
prompts' documents and questions; the answers are their own.

`--check-kl` decodes a document's continuation and questions (as benchmarks.quality.model_level does) on one server with
everything on the device and on one for each of `--formats` whose device tier holds a quarter of it, and compares
log-probabilities. Writes JSON and Markdown to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil  # type: ignore[import-untyped]
import requests
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from benchmarks.forced import FLAGS, decoded, forced_decode, kl_divergence
from benchmarks.policies.control import use
from benchmarks.quality.documents import Document, make_documents, read_text
from benchmarks.quality.model_level import options_of
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import ANSWER_TIMEOUT_S, MOST_READ, Server, model_folder, serve
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.memory.device import metadata_bytes_per_token
from sglang_clusterkv.memory.host import HOST_DTYPES, host_row_bytes
from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import CHARS_PER_TOKEN, FACTS, log_book

PAGE = 16
TURNS = 3
QUESTION_TOKENS = 32  # of a turn, with what stands around it, at most
SLACK_TOKENS = 512  # of the KV cache, beside the sessions that fit: SGLang admits no request into its last tokens
WITHOUT, TIER = ARMS = ("without", "tier")
QUESTIONS = [*(fact.question for fact in FACTS), "Who painted the railing, and where?", "When was supper on day three?"]
EQUAL = 0.02  # arms' bytes differ by less


# -- sizes ------------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What a token's keys and values are."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    @property
    def kv_bytes(self) -> int:
        """Of a token, all layers and heads."""
        return self.layers * self.kv_heads * 2 * self.head_dim * self.dtype.itemsize


def shape_of(model: Path) -> Shape:
    """Of a model as these servers load it."""
    found = AutoConfig.from_pretrained(model)
    head_dim = getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads
    return Shape(found.num_hidden_layers, found.num_key_value_heads, head_dim)


def token_bytes(shape: Shape, config: ClusterKVConfig) -> float:
    """Bytes per token of a KV cache: on the device, clusters, host rows."""
    index = metadata_bytes_per_token(
        config, page_size=PAGE, head_dim=shape.head_dim, kv_heads=shape.kv_heads, layers=shape.layers
    )
    if config.host_ratio <= 1:
        return shape.kv_bytes + index
    host = shape.layers * shape.kv_heads * host_row_bytes(shape.head_dim, shape.dtype, config.host_kv_dtype)
    return shape.kv_bytes / config.host_ratio + index + host


def session_tokens(tokens: int, answer: int) -> int:
    """Tokens of a session at its end, in whole pages."""
    return PAGE * math.ceil((tokens + TURNS * (QUESTION_TOKENS + answer)) / PAGE)


class Plan(NamedTuple):
    """The two servers' KV caches, in tokens, and how many sessions each cell has."""

    tokens: dict[str, int]
    sessions: list[int]


def plan_of(shape: Shape, configs: dict[str, ClusterKVConfig], args: argparse.Namespace) -> Plan:
    """A cache in which so many sessions fit, and one of as many bytes with the tier."""
    plain = args.fits * session_tokens(args.tokens, args.answer) + SLACK_TOKENS
    ratio = token_bytes(shape, configs[WITHOUT]) / token_bytes(shape, configs[TIER])
    tokens = {WITHOUT: plain, TIER: int(plain * ratio) // PAGE * PAGE}
    return Plan(tokens, [args.fits * multiple for multiple in args.multiples])


def bytes_of(shape: Shape, config: ClusterKVConfig, tokens: int, counts: dict[str, Any]) -> dict[str, int]:
    """Bytes of a running server's tensors: keys and values on the device from their sizes, the others as it counts them."""
    pages = tokens // PAGE if config.host_ratio <= 1 else math.ceil(tokens // PAGE / config.host_ratio)
    host = counts.get("host_tier", {}).get("bytes", 0)
    return {"device": (pages + 1) * PAGE * shape.kv_bytes, "clusters": counts["bytes"], "host": host}


def resident_bytes(server: Server) -> int:
    """Of the server's largest process, its scheduler."""
    first = psutil.Process(server.process.pid)
    return max(process.memory_info().rss for process in (first, *first.children(recursive=True)))


# -- sessions ---------------------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """One turn, as the client saw it."""

    first_s: float  # until its first token
    gaps_s: list[float]  # between tokens
    prompt: int
    cached: int
    answer: list[int]


def stream(server: Server, prompt: list[int], tokens: int) -> Reply:
    """Greedy answer, token by token."""
    body: dict[str, Any] = {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "stream": True,
    }
    begin = time.perf_counter()
    times: list[float] = []
    last: dict[str, Any] = {}
    with requests.post(f"{server.url}/generate", json=body, stream=True, timeout=ANSWER_TIMEOUT_S) as answer:
        assert answer.status_code == 200, answer.text
        for line in answer.iter_lines(chunk_size=MOST_READ):
            if line.startswith(b"data:") and b"[DONE]" not in line:
                times.append(time.perf_counter())
                last = json.loads(line[len(b"data:") :])
    assert "meta_info" in last and len(last["output_ids"]) == tokens, f"the server ended an answer early: {last}"
    meta = last["meta_info"]
    gaps = np.diff(times).tolist()
    return Reply(times[0] - begin, gaps, meta["prompt_tokens"], meta["cached_tokens"], last["output_ids"])


class Session:
    """A document and what was said about it."""

    def __init__(self, document: list[int], questions: Sequence[list[int]], answer: int) -> None:
        self._said, self._questions, self._tokens = list(document), questions, answer
        self.replies: list[Reply] = []
        self.new: list[int] = []  # tokens of each turn's prompt that no earlier turn had computed

    def turn(self, server: Server) -> None:
        """Ask the next question."""
        number = len(self.replies)
        question = self._questions[number]
        # The last token of an answer was never read by a step.
        self.new.append(len(self._said) + len(question) if number == 0 else len(question) + 1)
        prompt = self._said + question
        reply = stream(server, prompt, self._tokens)
        self.replies.append(reply)
        self._said = prompt + reply.answer


def again(reply: Reply, new: int) -> int:
    """Tokens of a turn that an earlier one had computed and that were computed again.

    A page that was not full when its turn ended is not kept: up to a page of every turn is counted here whatever the arm.
    """
    return max(0, reply.prompt - reply.cached - new)


def run_turns(server: Server, sessions: Sequence[Session], concurrency: int, seed: int) -> list[float]:
    """All turns of all sessions, in an order drawn for each turn; seconds that each turn took."""
    seconds = []
    for turn in range(TURNS):
        order = list(sessions)
        random.Random(f"{seed}/{turn}").shuffle(order)
        begin = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            list(pool.map(lambda session: session.turn(server), order))
        seconds.append(time.perf_counter() - begin)
    return seconds


def cell_of(
    sessions: Sequence[Session], seconds: Sequence[float], before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    """What is kept of one number of sessions; `before` and `after` are the server's counts."""
    later = [
        (reply, new) for session in sessions for reply, new in zip(session.replies[1:], session.new[1:], strict=True)
    ]
    first = sorted(reply.first_s for reply, _ in later)
    tiers = [counts.get("host_tier", {}) for counts in (before, after)]

    def read(name: str) -> int:
        return tiers[1].get(name, 0) - tiers[0].get(name, 0)

    return {
        "sessions": len(sessions),
        "first_turn_s": statistics.median(session.replies[0].first_s for session in sessions),
        "later_first_s": statistics.median(first),
        "later_first_s_p99": float(np.quantile(first, 0.99)),
        "requests_per_s": len(later) / sum(seconds[1:]),
        "again": sum(again(reply, new) for reply, new in later),
        "again_share": sum(again(reply, new) for reply, new in later) / sum(reply.prompt for reply, _ in later),
        "token_ms": 1000 * statistics.median(gap for reply, _ in later for gap in reply.gaps_s),
        "host_read_decode": read("read_bytes_decode"),
        "host_read_prefill": read("read_bytes_prefill"),
        "host_read_build": read("read_bytes_build"),
        "host_written": read("written_bytes"),
        "recalled_host": read("recalled_rows_host"),
        "recalled_device": read("recalled_rows_device"),
        "seconds": list(seconds),
        "faults": {name: count for name, count in after["faults"].items() if count},
    }


def make_sessions(tokenizer: Any, count: int, tokens: int, answer: int) -> list[Session]:
    """Sessions that share nothing: each has a log book of its own days."""
    encode = tokenizer.encode
    questions = [encode(f"\n\nQuestion: {text}\nAnswer:", add_special_tokens=False) for text in QUESTIONS]
    assert max(map(len, questions)) <= QUESTION_TOKENS
    found = []
    for i in range(count):
        text = "".join(log_book(2 * tokens * CHARS_PER_TOKEN, seed=100 + i, first_day=1000 * (i + 1)))
        document = encode(text, add_special_tokens=False)[:tokens]
        assert len(document) == tokens
        asked = [questions[(i + turn) % len(questions)] for turn in range(TURNS)]
        found.append(Session(document, asked, answer))
    return found


def measure(arm: str, config: dict[str, Any], plan: Plan, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """One server, every number of sessions."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    log = Path(tempfile.mkdtemp(prefix="host-tier-")) / "server.log"
    print(f"{arm}: starting a server, its log: {log}", flush=True)
    flags = [*common_flags(args), "--max-total-tokens", str(plan.tokens[arm])]
    flags += ["--max-running-requests", str(args.concurrency)]
    cells = []
    with serve(args.model, log, *flags, config=config) as server:
        server.generate(list(range(100, 300)), 8)  # loads and compiles what the first request would wait for
        for count in tqdm(plan.sessions, desc=arm, unit="cell"):
            server.flush()
            sessions = make_sessions(tokenizer, count, args.tokens, args.answer)
            before = server.counts()
            seconds = run_turns(server, sessions, args.concurrency, args.seed)
            cells.append(cell_of(sessions, seconds, before, server.counts()))
            print(json.dumps({arm: cells[-1]}), flush=True)
        sizes = bytes_of(shape, ClusterKVConfig(**config), plan.tokens[arm], server.counts())
        return {"cells": cells, "tokens": plan.tokens[arm], "bytes": sizes, "resident": resident_bytes(server)}


def common_flags(args: argparse.Namespace) -> list[str]:
    """Of every server here."""
    flags = ["--page-size", str(PAGE), "--chunked-prefill-size", str(args.chunk), "--sleep-on-idle"]
    return [*flags, "--watchdog-timeout", "3600"]


def wins_from(found: dict[str, Any]) -> int | None:
    """The least number of sessions from which on the tier answers more requests per second; None: it does not at the most."""
    pairs = list(zip(found[WITHOUT]["cells"], found[TIER]["cells"], strict=True))
    least = None
    for without, tier in reversed(pairs):
        if tier["requests_per_s"] <= without["requests_per_s"]:
            break
        least = int(tier["sessions"])
    return least


def table(found: dict[str, Any], fits: int) -> str:
    """Both arms, cell by cell."""
    lines = []
    for arm in ARMS:
        of_arm = found[arm]
        sizes = of_arm["bytes"]
        parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in sizes.items() if size)
        lines.append(
            f"- {arm}: {of_arm['tokens']:,} tokens in {sum(sizes.values()) / 1e6:,.0f} MB ({parts}); its scheduler has "
            f"{of_arm['resident'] / 1e6:,.0f} MB resident at the end"
        )
    lines += [
        "",
        "| sessions | of what fits | arm | first token of later turns s | 99 % s | requests/s | prefilled again | ms per token "
        "| host MB read: decode, prefill | recalled from the host | first turn's first token s |",
        "|" + "---|" * 11,
    ]
    for pair in zip(*(found[arm]["cells"] for arm in ARMS), strict=True):
        for arm, cell in zip(ARMS, pair, strict=True):
            recalled = cell["recalled_host"] + cell["recalled_device"]
            share = f"{100 * cell['recalled_host'] / recalled:.0f} %" if recalled else "-"
            read = f"{cell['host_read_decode'] / 1e6:,.0f}, {cell['host_read_prefill'] / 1e6:,.0f}"
            lines.append(
                f"| {cell['sessions']} | {cell['sessions'] / fits:g} | {arm} | {cell['later_first_s']:.2f} "
                f"| {cell['later_first_s_p99']:.2f} | {cell['requests_per_s']:.3f} | {cell['again']:,} tokens "
                f"({100 * cell['again_share']:.0f} %) | {cell['token_ms']:.0f} "
                f"| {read if arm == TIER else '-'} | {share} "
                f"| {cell['first_turn_s']:.2f} |"
            )
    least = wins_from(found)
    lines += [
        "",
        f"The tier answers more requests per second from {least} sessions on." if least else "The tier never wins.",
    ]
    return "\n".join(lines)


def compare_arms(args: argparse.Namespace) -> None:
    """Run both arms, print and write."""
    shape = shape_of(args.model)
    options = {"budget_tokens": args.budget, "candidate_tokens": 4 * args.budget}
    tier = options | {"host_ratio": args.host_ratio, "host_kv_dtype": args.host_kv_dtype}
    configs = {WITHOUT: options, TIER: tier}
    plan = plan_of(shape, {arm: ClusterKVConfig(**config) for arm, config in configs.items()}, args)
    found = {arm: measure(arm, configs[arm], plan, shape, args) for arm in ARMS}
    total = {arm: sum(found[arm]["bytes"].values()) for arm in ARMS}
    assert abs(total[TIER] / total[WITHOUT] - 1) < EQUAL, f"the arms differ in their bytes: {total}"
    body = table(found, args.fits)
    print(f"\n{body}\n")
    write_results(
        "host-tier",
        title="Sessions that come back, with the host tier and without, at equal bytes",
        setting=(
            f"{args.model.name}, float32, sessions of {args.tokens:,} tokens, {TURNS} turns of {args.answer} tokens, "
            f"{args.concurrency} at a time, budget {args.budget}, host_ratio {args.host_ratio:g}, {args.host_kv_dtype}, "
            f"chunks of {args.chunk}"
        ),
        command=command_of("benchmarks.host_tier"),
        body=body,
        data=found,
    )


# -- what rounding costs ----------------------------------------------------------------------------------------------

DEVICE = "device"  # where every row is; the other servers are named by the format of their host rows


def log_probabilities(name: str, document: Document, args: argparse.Namespace) -> dict[str, Any]:
    """Of one server's steps over the document's decoded text; `device` has dense ones too."""
    config: dict[str, Any] = {"host_ratio": args.host_ratio, "host_kv_dtype": name} if name != DEVICE else {}
    tokens = len(document.prompt) + len(document.decoded) + SLACK_TOKENS
    log = Path(tempfile.mkdtemp(prefix="host-tier-kl-")) / "server.log"
    print(f"{name}: starting a server, its log: {log}", flush=True)
    flags = [*common_flags(args), *FLAGS, "--max-total-tokens", str(tokens), "--max-running-requests", "1"]
    with serve(args.model, log, *flags, config=config) as server:
        use(server, "ours", **options_of(args.budget))
        for _ in range(2):
            server.generate(document.prompt, 2)  # a decode step, at whose head it is clustered
        found = {"ours": decoded(forced_decode(server, document.prompt, document.decoded))}
        counts = server.counts().get("host_tier", {})
        if name == DEVICE:
            use(server, "dense")
            found["dense"] = decoded(forced_decode(server, document.prompt, document.decoded))
    rows = counts.get("recalled_rows_host", 0), counts.get("recalled_rows_device", 0)
    return {"rows": found, "recalled_host": rows[0] / max(1, sum(rows))}


def kl_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each pair's mean and largest KL, and how often the first choice is the same."""
    dense, device = found[DEVICE]["rows"]["dense"], found[DEVICE]["rows"]["ours"]
    pairs = {"dense, device": (dense, device)}
    formats = [name for name in found if name != DEVICE]
    for name in formats:
        pairs |= {f"dense, {name}": (dense, found[name]["rows"]["ours"])}
        pairs |= {f"device, {name}": (device, found[name]["rows"]["ours"])}
    results = {}
    for name, (p, q) in pairs.items():
        kl = kl_divergence(p, q)
        same = float((p.argmax(1) == q.argmax(1)).mean())
        results[name] = {"kl": float(kl.mean()), "most": float(kl.max()), "same": same, "steps": len(kl)}
    return {"pairs": results, "recalled_host": {name: found[name]["recalled_host"] for name in formats}}


def kl_table(found: dict[str, Any]) -> str:
    """As Markdown."""
    lines = ["| KL of | to | mean | most | top-1 same |", "|---|---|---|---|---|"]
    for name, pair in found["pairs"].items():
        reference, other = name.split(", ")
        lines.append(f"| {other} | {reference} | {pair['kl']:.2e} | {pair['most']:.2e} | {100 * pair['same']:.1f} % |")
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in found["recalled_host"].items())
    return "\n".join([*lines, "", f"Recalled rows that were read from the host: {shares}."])


def check_kl(args: argparse.Namespace) -> None:
    """Decode on three servers, print and write."""
    source, text = read_text(args.text)
    document = make_documents(AutoTokenizer.from_pretrained(args.model), text, 1, args.tokens, args.natural)[0]
    found = kl_of({name: log_probabilities(name, document, args) for name in (DEVICE, *args.formats)})
    body = kl_table(found)
    print(f"\n{body}\n")
    write_results(
        "host-tier-kl",
        title="KL of host rows to everything on the device",
        setting=(
            f"{args.model.name}, float32, {source}, {args.tokens:,} tokens, {len(document.decoded) - 1} steps, budget "
            f"{args.budget}, host_ratio {args.host_ratio:g}, chunks of {args.chunk}"
        ),
        command=command_of("benchmarks.host_tier"),
        body=body,
        data=found,
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7000, help="of each session's document")
    parser.add_argument("--fits", type=int, default=2, help="sessions that fit without the tier")
    parser.add_argument("--multiples", type=int, nargs="+", default=[1, 2, 3, 4], help="of --fits: numbers of sessions")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=2, help="requests at a time")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--host-ratio", type=float, default=4.0)
    parser.add_argument("--host-kv-dtype", choices=HOST_DTYPES, default="int8")
    parser.add_argument("--chunk", type=int, default=512, help="--chunked-prefill-size of both servers")
    parser.add_argument("--check-kl", action="store_true", help="compare log-probabilities instead")
    parser.add_argument("--formats", nargs="+", choices=HOST_DTYPES, default=list(HOST_DTYPES), help="for --check-kl")
    parser.add_argument("--natural", type=int, default=128, help="tokens of the continuation, for --check-kl")
    parser.add_argument("--text", help="another text for --check-kl, a file")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--model", type=model_folder, default=default_out(), help="a folder, default: the demo model")
    args = parser.parse_args(argv)
    if args.host_ratio <= 1:
        parser.error("--host-ratio must be more than 1: 1 is no tier")
    return args


def main() -> None:
    """Parse the command line and run."""
    args = parse_args()
    if args.check_kl:
        check_kl(args)
    else:
        compare_arms(args)


if __name__ == "__main__":
    main()
