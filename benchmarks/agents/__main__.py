"""The load that agents make: requests per second, first token, time per token, prefix hits, memory, server by server.

    python -m benchmarks.agents [--arms torch_native dense clusterkv] [--sessions 1 4 8] [--tokens 3000] [--programs 4]
    python -m benchmarks.agents --arms clusterkv llama.cpp --llama-server FILE --gguf FILE
    python -m benchmarks.agents --base-url http://HOST:PORT/v1 [--name NAME] [--sessions 8]

A session is an agent of 13 turns: a first prompt of `--tokens` tokens, of its own, then tools' results of 1 % of that and
answers of .3 %; every second session has two sub-agents with its first prompt. All sessions of a run begin at once. The OpenAI
client drives them, with tools, the server's own answers in the history, and a tool's call and result after each: the model's
own call where it makes one, else a recorded one. `--programs` adds programs of SGLang's frontend (examples/frontend.py), for
servers of SGLang.

Starts one server per arm, one after the other with the same flags; `dense` is our backend with a budget that covers everything,
other names are attention backends of SGLang, `llama.cpp` is its server (`python -m benchmarks.peers.llama_cpp --build` makes
one), with flash attention and KV in f16. With `--base-url` a server that runs. Every run has first prompts of its own, so no
cache is emptied in between. Run it alone: some minutes for each of our arms on two cores with `--tokens 3000 --sessions 8`, and
half an hour or more for torch_native. Prints a table and writes it to benchmarks/results/, never over an older one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from tqdm import tqdm

from benchmarks.agents.drive import Driver
from benchmarks.agents.report import clustered_again, summary, table
from benchmarks.agents.sessions import TURNS, Session, answer_tokens, make_sessions, pool_tokens
from benchmarks.peers import llama_cpp
from benchmarks.results_file import command_of, write_results
from benchmarks.servers import Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import FACTS, make_document

ARMS = ["torch_native", "dense", "clusterkv"]
OURS = ("dense", "clusterkv")
LLAMA = "llama.cpp"


def memory_of(process: int) -> int:
    """Bytes of RAM of a process and those below it, what they share counted once."""
    parent = psutil.Process(process)
    return sum(one.memory_full_info().pss for one in [parent, *parent.children(recursive=True)])


def options_of(arm: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Options of the plugin for an arm; None where it is not the plugin's."""
    if arm == "clusterkv":
        return {"budget_tokens": args.budget, "candidate_tokens": args.candidates}
    everything = 4 * args.tokens
    return {"budget_tokens": everything, "candidate_tokens": everything} if arm == "dense" else None


@contextmanager
def started(arm: str, args: argparse.Namespace, pool: int) -> Iterator[Server]:
    """An arm's server until the block ends."""
    log = Path(tempfile.mkdtemp(prefix="agents-")) / "server.log"
    at_once = (1 + max(args.sessions)) * 2
    if arm == LLAMA:
        with llama_cpp.serve(args.llama_server, args.gguf, log, context=pool, slots=at_once) as server:
            yield server
        return
    config = options_of(arm, args)
    flags = ["--page-size", "16", "--enable-cache-report", "--max-total-tokens", str(pool)]
    flags += ["--max-running-requests", str(at_once)]
    with serve(args.model, log, *flags, config=config, backend="clusterkv" if config else arm) as server:
        yield server


def programs(url: str, args: argparse.Namespace) -> list[float]:
    """Programs of SGLang's frontend at once, each about a document of its own; the seconds that each took."""
    import sglang as sgl

    from examples.frontend import checked, study

    backend = sgl.RuntimeEndpoint(url, chat_template_name=args.chat_template)

    def one(number: int) -> float:
        begin = time.perf_counter()
        document = f"Book {number}\n" + make_document(args.tokens, FACTS)
        state = checked(study.run(document=document, max_tokens=answer_tokens(args.tokens), backend=backend))
        assert len(state["answers"]) == 3 and state["number"]
        return time.perf_counter() - begin

    with ThreadPoolExecutor(args.programs) as pool:
        return list(pool.map(one, range(args.programs)))


def measure(
    arm: str, url: str, server: Server | None, runs: dict[int, list[Session]], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each number of sessions, then one for the programs.

    Args:
        arm: its name.
        url: of the server, without /v1.
        server: where we started it, for its memory and our counters.
        runs: sessions by their number.
        args: the command line.
    """
    driver = Driver(
        f"{url}/v1", answer_tokens(args.tokens), model=args.served, api_key=args.api_key, exact=not args.no_ignore_eos
    )
    counted = server is not None and arm in OURS
    for count, sessions in runs.items():
        before = server.counts()["tokens_clustered"] if counted and server else 0
        total = sum(session.requests for session in sessions)
        with tqdm(total=total, desc=f"{arm}, {count} sessions", unit="request", disable=None) as bar:
            row = summary(driver.run(sessions, bar)) | {"arm": arm, "sessions": count}
        if counted and server is not None:
            row["clustered_again"] = clustered_again(row, server.counts()["tokens_clustered"] - before)
        if server is not None:
            row["memory_bytes"] = memory_of(server.process.pid)
        yield row
    if args.programs and arm != LLAMA:
        yield {"arm": arm, "programs_s": programs(url, args)}


def measured(args: argparse.Namespace, runs: dict[int, list[Session]]) -> Iterator[dict[str, Any]]:
    """The rows of all arms."""
    if args.base_url:
        yield from measure(args.name, args.base_url.rstrip("/").removesuffix("/v1"), None, runs, args)
        return
    pool = 2048 + max(pool_tokens(sessions, args.tokens) for sessions in runs.values())
    pool = max(pool, 2 * args.programs * args.tokens) // 16 * 16
    for arm in args.arms:
        print(f"{arm}: starting a server for {pool:,} tokens", flush=True)
        with started(arm, args, pool) as server:
            yield from measure(arm, server.url, server, runs, args)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.agents", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, LLAMA], default=ARMS)
    parser.add_argument("--base-url", help="of a server that runs, instead of --arms")
    parser.add_argument("--name", default="server", help="of that server in the table")
    parser.add_argument("--served", help="name of its model, default: the server's first")
    parser.add_argument("--api-key", default="EMPTY")
    parser.add_argument(
        "--no-ignore-eos", action="store_true", help="for servers that refuse what OpenAI does not know"
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 8], help="at once, a run each")
    parser.add_argument("--tokens", type=int, default=3000, help="of a first prompt; all lengths follow from it")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--programs", type=int, default=0, help="of SGLang's frontend at once, after the sessions")
    parser.add_argument("--chat-template", default="chatml", help="of the frontend's programs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--model", type=model_folder, default=default_out())
    parser.add_argument("--llama-server", type=Path, help=f"the program, for the arm {LLAMA}")
    parser.add_argument("--gguf", type=Path, help="its model")
    args = parser.parse_args(argv)
    if min(args.sessions) < 1 or args.turns < 1 or args.tokens < 200:
        parser.error("--sessions and --turns must be at least 1, --tokens at least 200")
    if LLAMA in args.arms and not args.base_url:
        args.llama_server = args.llama_server or llama_cpp.program("llama-server")
        if args.llama_server is None or not args.llama_server.exists():
            parser.error(
                f"the arm {LLAMA} needs its server: `python -m benchmarks.peers.llama_cpp --build`, or --llama-server"
            )
        args.gguf = args.gguf or llama_cpp.demo_gguf()
    return args


def main() -> None:
    """Measure and print."""
    args = parse()
    runs = {
        count: make_sessions(count, args.tokens, seed=1000 * args.seed + count, turns=args.turns)
        for count in args.sessions
    }
    rows = list(measured(args, runs))
    of_sessions = [row for row in rows if "sessions" in row]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    body = table(of_sessions, arms[0])
    for row in rows:
        if "programs_s" in row:
            times = ", ".join(f"{seconds:.1f}" for seconds in sorted(row["programs_s"]))
            body += f"\n\n{row['arm']}: programs of SGLang's frontend took {times} s."
    print(f"\n{body}")
    what = args.name if args.base_url else args.model.name
    write_results(
        "agents",
        title="The load that agents make",
        setting=(
            f"{what}, first prompts of {args.tokens:,} tokens, {args.turns} turns, answers of {answer_tokens(args.tokens)} "
            f"tokens, budget {args.budget}, candidates {args.candidates}; {len(os.sched_getaffinity(0))} cores"
        ),
        command=command_of("benchmarks.agents"),
        body=body,
        data={"base": arms[0], "rows": rows},
    )


if __name__ == "__main__":
    main()
