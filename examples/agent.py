"""Two agents read one long document through a clusterkv server, and the server's counts show what was shared.

Agent A asks about the document over several turns. Agent B takes A's first turn over and goes its own way: document and
first turn are already clustered. Start a server with `make serve`, then run `make demo`.

    python examples/agent.py --base-url http://127.0.0.1:30000/v1 [--document FILE] [--tokens 6000] [--small] [--tier]

With --tier the document is larger than what the server holds on its device (docs/memory.md), and each turn says what it
read in host memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

from sglang_clusterkv.tools.haystack import CHARS_PER_TOKEN, FACTS, make_document

Message = dict[str, str]

OPEN_QUESTIONS = [
    "What is this document about? Answer in one sentence.",
    "Name one thing that happens in the first part of the document.",
    "Name one thing that happens in the middle of the document.",
    "Name one thing that happens near the end of the document.",
]


class Counts(NamedTuple):
    """The server's clusterkv counters, summed over its data-parallel ranks."""

    tokens_clustered: int
    tokens_reused: int
    tokens_recalled: int
    tokens_available: int
    splits: int
    clusters: int
    bytes: int
    dense_steps: dict[str, int]
    tier: dict[str, int]  # of the host tier; empty: the server has none


class Turn(NamedTuple):
    answer: str
    prompt_tokens: int
    cached_tokens: int | None  # None: the server runs without --enable-cache-report
    completion_tokens: int
    first_token_s: float
    tokens_per_s: float | None  # None: fewer than two tokens


class DemoError(RuntimeError):
    """Something that the user can change; the message is one sentence with the fix."""


def read_document(path: Path, tokens: int) -> str:
    """The head of a text file, about `tokens` tokens of it."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(f"cannot read {path} as text ({error}): pass another file with --document") from error
    return text[: int(tokens * CHARS_PER_TOKEN)]


def get_json(url: str, api_key: str, timeout_s: float = 30) -> Any:
    """One GET; DemoError when nobody answers."""
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"})
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:
            return json.load(reply)
    except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DemoError(
            f"no SGLang server answers at {url} ({reason}): start one with `make serve`, or pass its address "
            f"with --base-url and its key with --api-key"
        ) from error


def read_counts(server: str, api_key: str) -> Counts:
    """The counters as they stand; DemoError when the server is not a clusterkv server."""
    states = get_json(f"{server}/server_info", api_key).get("internal_states", [])
    ranks = [state["clusterkv"] for state in states if isinstance(state.get("clusterkv"), dict)]
    if not ranks:
        raise DemoError(
            f"the server at {server} runs without clusterkv: start it with --attention-backend clusterkv, as "
            f"`make serve` does"
        )
    dense_steps: dict[str, int] = {}
    for rank in ranks:
        for reason, steps in rank.get("dense_steps", {}).items():
            dense_steps[reason] = dense_steps.get(reason, 0) + steps
    names = [name for name in Counts._fields if name not in ("dense_steps", "tier")]
    numbers = {name: sum(int(rank.get(name, 0)) for rank in ranks) for name in names}
    tiers = [rank.get("host_tier", {}) for rank in ranks]
    tier = {name: sum(int(each[name]) for each in tiers) for name in tiers[0]}
    return Counts(**numbers, dense_steps=dense_steps, tier=tier)


def read_settled_counts(server: str, api_key: str) -> Counts:
    """The counters once two readings agree: a decode's counts are published a moment after its last token."""
    counts = read_counts(server, api_key)
    for _ in range(10):
        time.sleep(0.2)
        newer = read_counts(server, api_key)
        if newer == counts:
            break
        counts = newer
    return counts


def ask(client: Any, model: str, messages: list[Message], max_tokens: int) -> Turn:
    """One streamed, greedy answer, printed as it comes."""
    begin_s = time.perf_counter()
    first_s = last_s = None
    pieces: list[str] = []
    usage = None
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            last_s = time.perf_counter()
            first_s = first_s or last_s
            pieces.append(text)
            print(text, end="", flush=True)
    print()
    if usage is None:
        raise DemoError("the server sent no usage with its stream: this demo needs SGLang's OpenAI endpoint")
    end_s = time.perf_counter()
    first_s, last_s = first_s or end_s, last_s or end_s
    details = usage.prompt_tokens_details
    return Turn(
        answer="".join(pieces),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=details.cached_tokens if details is not None else None,
        completion_tokens=usage.completion_tokens,
        first_token_s=first_s - begin_s,
        tokens_per_s=(usage.completion_tokens - 1) / (last_s - first_s) if last_s > first_s else None,
    )


HEADER = ["agent", "turn", "prompt", "cached", "clustered", "reused", "recalled of available", "1st token", "tokens/s"]
TIER_HEADER = ["recalled on host", "prefill read", "on device"]
PAGE_TOKENS = 16  # unless the server was started with another --page-size


def larger_than_the_device(counts: Counts, tokens: int) -> int:
    """Tokens of a document that does not fit the server's device tier, at least `tokens`; DemoError where there is no tier."""
    if not counts.tier:
        raise DemoError(
            """the server has no host tier: start it with `SGLANG_CLUSTERKV_CONFIG='{"host_ratio": 10}' make serve """
            """SERVE_ARGS='--max-total-tokens 40960 --chunked-prefill-size 512 --max-running-requests 4'`, """
            """or leave out --tier"""
        )
    return max(tokens, counts.tier["device_pages"] * PAGE_TOKENS * 5 // 4)


def tier_cells(before: Counts, after: Counts) -> list[str]:
    """One turn as cells under TIER_HEADER."""
    more = {name: after.tier[name] - before.tier[name] for name in after.tier}
    recalled = more["recalled_rows_host"] + more["recalled_rows_device"]
    pages = after.tier["pages_on_device"] + after.tier["pages_on_host_only"]
    return [
        f"{more['recalled_rows_host'] / recalled:.0%}" if recalled else "-",
        f"{more['read_bytes_prefill'] / 1e6:.0f} MB",
        f"{after.tier['pages_on_device']:,} of {pages:,} pages",
    ]


def row_of(agent: str, number: int, turn: Turn, before: Counts, after: Counts) -> list[str]:
    """One turn as cells under HEADER; counts are what the turn added."""
    recalled = after.tokens_recalled - before.tokens_recalled
    available = after.tokens_available - before.tokens_available
    share = f"{recalled:,} of {available:,} ({recalled / available:.0%})" if available else "none: dense"
    return [
        agent,
        str(number),
        f"{turn.prompt_tokens:,}",
        "-" if turn.cached_tokens is None else f"{turn.cached_tokens:,}",
        f"{after.tokens_clustered - before.tokens_clustered:,}",
        f"{after.tokens_reused - before.tokens_reused:,}",
        share,
        f"{turn.first_token_s:.2f} s",
        "-" if turn.tokens_per_s is None else f"{turn.tokens_per_s:.1f}",
    ]


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Rows under a header, columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def run(args: argparse.Namespace) -> None:
    """The whole demo; prints the dialogue, then a table and what the clusters cost."""
    import openai

    server = args.base_url.rstrip("/").removesuffix("/v1")
    first_counts = read_counts(server, args.api_key)
    client = openai.OpenAI(base_url=f"{server}/v1", api_key=args.api_key, timeout=args.timeout, max_retries=0)

    tokens, max_tokens = (1500, 16) if args.small else (args.tokens, args.max_tokens)
    if args.tier:
        tokens = larger_than_the_device(first_counts, tokens)
    questions: list[tuple[str, str | None]]
    if args.document is None:
        document = make_document(tokens, FACTS)
        questions = [(fact.question, fact.answer) for fact in FACTS]
    else:
        document = read_document(args.document, tokens)
        questions = [(question, None) for question in OPEN_QUESTIONS]
    print(f"A document of {len(document):,} characters. The first answer waits for its prefill: minutes on a CPU.")
    turns: list[tuple[str, int, str, str | None]] = []
    agent_a, agent_b = questions[:-1], questions[-1:] + questions[1:2]
    turns += [("A", number, *question) for number, question in enumerate(agent_a, 1)]
    turns += [("B", number, *question) for number, question in enumerate(agent_b, 2)]

    rows: list[list[str]] = []
    histories: dict[str, list[Message]] = {"A": []}
    found = asked = 0
    before = first_counts
    try:
        model = args.model or client.models.list().data[0].id
        for agent, number, question, expected in turns:
            # B: the document and A's first turn, shared up to there.
            history = histories.setdefault(agent, histories["A"][:2])
            history.append({"role": "user", "content": question if history else f"{document}\n\n{question}"})
            print(f"\n[{agent}{number}] {question}\n  ", end="", flush=True)
            turn = ask(client, model, history, max_tokens)
            history.append({"role": "assistant", "content": turn.answer})
            if expected is not None:
                asked += 1
                found += expected in turn.answer
            after = read_settled_counts(server, args.api_key)
            rows.append(row_of(agent, number, turn, before, after) + (tier_cells(before, after) if args.tier else []))
            before = after
    except openai.APIStatusError as error:
        raise DemoError(
            f"the server refused a request ({error.message}): a shorter document (--tokens) or fewer tokens per answer "
            f"(--max-tokens) may fit the model"
        ) from error
    except openai.APIError as error:
        raise DemoError(f"the server stopped answering ({error}): see its log, or raise --timeout") from error

    print()
    print_table(HEADER + (TIER_HEADER if args.tier else []), rows)
    print("\nprompt, cached: tokens by the server's usage report. clustered, reused: tokens of the prompt and answer.")
    print("recalled of available: clustered tokens attended exactly, of those in view, summed over decode steps.")
    if args.tier:
        print(
            "recalled on host: of those. prefill read: keys and values of earlier tokens, from host memory. on device: of all."
        )
    if all(row[HEADER.index("cached")] == "-" for row in rows):
        print("cached is empty: start the server with --enable-cache-report, as `make serve` does.")
    if asked:
        print(f"facts found: {found} of {asked} (a 135M model also misses some with dense attention)")
    dense = {
        reason: steps - first_counts.dense_steps.get(reason, 0)
        for reason, steps in before.dense_steps.items()
        if steps > first_counts.dense_steps.get(reason, 0)
    }
    splits = before.splits - first_counts.splits
    print(f"clusters held: {before.clusters:,} in {before.bytes:,} bytes; segments split: {splits}")
    print("dense steps: " + (", ".join(f"{reason} {steps}" for reason, steps in sorted(dense.items())) or "none"))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1", help="of the server, default %(default)s")
    parser.add_argument("--api-key", default="EMPTY", help="only if the server was started with one")
    parser.add_argument("--model", help="name of the served model, default: the server's first")
    parser.add_argument("--document", type=Path, help="a text file to read instead of the made-up log book")
    parser.add_argument("--tokens", type=int, default=6000, help="about how long the document is, default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=48, help="per answer, default %(default)s")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per request, default %(default)s")
    parser.add_argument(
        "--tier", action="store_true", help="a document larger than the device tier of a server that has one"
    )
    parser.add_argument("--small", action="store_true", help="about 1,500 tokens and 16 per answer, for a quick check")
    args = parser.parse_args(argv)
    if args.tokens < 100 or args.max_tokens < 1:
        parser.error("--tokens must be at least 100 and --max-tokens at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when it went through, 1 with one sentence when it could not."""
    try:
        run(parse_args(argv))
    except DemoError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
