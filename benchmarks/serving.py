"""Whole servers under load, driven by SGLang's own bench_serving: first token, time per token, throughput, cache hits.

    python -m benchmarks.serving [--quick] [--arms torch_native dense clusterkv] [--contexts 1000 4000 7700]
                                 [--concurrency 1 4 8] [--device cuda --model FOLDER --arms flashinfer clusterkv]

Starts one server per arm, one after the other with the same flags, and sends each the same requests. Arms: `clusterkv`;
`dense`, our backend with a budget that covers everything; any other name is an attention backend of SGLang. The first arm is
what the ratios refer to. Workloads:

- shared (generated-shared-prefix): all requests share a prefix of the context's length that is in the radix cache, and each
  reads all of it at every step. Every context at every concurrency.
- random (random-ids): nothing is shared or cached, so its first token is a prefill. Every context at `--random-concurrency`.
- chat (agentic-trace, several turns, the server's own answers in the history): conversations over one document, which nobody
  has read before. The middle context and the middle concurrency.

The default run takes about half an hour on two cores, most of it torch_native, whose prefill of 7,700 tokens takes a minute,
and whose first token after a full cache hit half of one; `--quick` (1,000 tokens, two arms) three minutes. Run it alone.
Prints a table and writes it with a picture to benchmarks/results/; bench_serving's own output is in the log that is named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

from tqdm import tqdm

from benchmarks.results_file import command_of, write_results
from benchmarks.servers import CPU_FLAGS, Server, model_folder, serve
from sglang_clusterkv.tools.demo_model import default_out
from sglang_clusterkv.tools.haystack import FACTS, make_document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = ("clusterkv", "dense")
ARMS = {"cpu": ["torch_native", "dense", "clusterkv"], "cuda": ["flashinfer", "triton", "dense", "clusterkv"]}
WORKLOADS = ("shared", "random", "chat")
QUESTION_TOKENS = 16
CHAT_QUESTIONS = [
    *(fact.question for fact in FACTS),
    "What was the weather like on the first days?",
    "Who painted the railing, and where?",
    "When was supper on day three?",
]


class BenchmarkError(RuntimeError):
    """bench_serving did not measure what it was asked to; the message names its log."""


class Cell(NamedTuple):
    """One run of bench_serving."""

    workload: str
    context: int  # tokens
    concurrency: int
    fills_cache: bool = False  # brings a shared prefix into the radix cache: is not listed

    def __str__(self) -> str:
        name = "prefix" if self.fills_cache else self.workload
        return f"{name} {self.context:,} x {self.concurrency}"


class Load(NamedTuple):
    """How much each cell asks for."""

    rounds: int  # requests of a cell over its concurrency
    output_tokens: int
    turns: int  # of a chat

    def requests(self, cell: Cell) -> int:
        """Requests that bench_serving sends; those of a chat are its turns."""
        if cell.fills_cache:
            return 1
        return cell.concurrency * (self.turns if cell.workload == "chat" else self.rounds)

    def pool_tokens(self, cell: Cell) -> int:
        """KV slots with which no request of a cell waits for another or evicts the prefix."""
        answer = QUESTION_TOKENS + self.output_tokens
        if cell.workload == "shared":
            return cell.context + cell.concurrency * answer
        if cell.workload == "random":
            return cell.concurrency * (cell.context + answer)
        return cell.context + cell.concurrency * self.turns * 2 * answer


def make_cells(
    workloads: Sequence[str], contexts: Sequence[int], concurrency: Sequence[int], random_concurrency: Sequence[int]
) -> list[Cell]:
    """The cells in their order: a context's shared prefix is read once, then by every concurrency, before it is flushed."""
    cells = []
    for context in contexts:
        if "shared" in workloads:
            cells.append(Cell("shared", context, 1, fills_cache=True))
            cells += [Cell("shared", context, count) for count in concurrency]
        if "random" in workloads:
            cells += [Cell("random", context, count) for count in random_concurrency]
    if "chat" in workloads:
        cells.append(Cell("chat", contexts[len(contexts) // 2], concurrency[len(concurrency) // 2]))
    return cells


def seed_of(model: Path) -> int:
    """One per model: bench_serving keeps the ids of its prompts by seed and sizes, and not every model has every id."""
    return zlib.crc32(str(model).encode()) % 100_000


def arguments_of(cell: Cell, load: Load, server: Server, model: Path, conversations: Path) -> list[str]:
    """bench_serving's command line for one cell, without its output file.

    Args:
        cell: what to send.
        load: how much of it.
        server: to whom.
        model: folder with the tokenizer.
        conversations: file of `write_conversations`, for a chat.
    """
    arguments = [
        "--base-url",
        server.url,
        "--model",
        str(model),
        "--tokenizer",
        str(model),
        "--seed",
        str(seed_of(model)),
    ]
    arguments += [
        "--max-concurrency",
        str(cell.concurrency),
        "--warmup-requests",
        "0",
        "--cache-report",
        "--disable-tqdm",
    ]
    if cell.workload == "chat":
        return [
            *arguments, "--flush-cache", "--backend", "sglang-oai-chat", "--dataset-name", "agentic-trace",
            "--dataset-path", str(conversations), "--num-prompts", str(cell.concurrency),
            "--agentic-max-turns", str(load.turns), "--sharegpt-output-len", str(load.output_tokens),
        ]  # fmt: skip
    arguments += ["--backend", "sglang", "--tokenize-prompt"]
    if cell.workload == "random":
        return [
            *arguments, "--flush-cache", "--dataset-name", "random-ids", "--num-prompts", str(load.requests(cell)),
            "--random-input-len", str(cell.context), "--random-output-len", str(load.output_tokens),
            "--random-range-ratio", "1",
        ]  # fmt: skip
    return [
        *arguments, "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "1", "--gsp-ordered",
        "--gsp-prompts-per-group", str(load.requests(cell)), "--gsp-question-len", str(QUESTION_TOKENS),
        "--gsp-system-prompt-len", str(cell.context - QUESTION_TOKENS), "--gsp-output-len", str(load.output_tokens),
        *(["--flush-cache"] if cell.fills_cache else []),
    ]  # fmt: skip


def write_conversations(file: Path, cell: Cell, turns: int) -> None:
    """A trace as bench_serving's agentic-trace reads it: conversations about one document, one user message per turn."""
    document = make_document(cell.context, FACTS)
    conversations = []
    for number in range(cell.concurrency):
        asked = [CHAT_QUESTIONS[(number + turn) % len(CHAT_QUESTIONS)] for turn in range(turns)]
        conversation: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": text}]} for text in asked]
        conversation[0]["messages"].insert(0, {"role": "system", "content": document})
        conversations.append(conversation)
    file.write_text(json.dumps({"conversations": conversations}))


def drive(arguments: list[str], log: Path) -> None:
    """Run bench_serving in this process: importing it takes longer than most cells. What it prints goes to `log`."""
    from sglang.benchmark.serving import cli_main

    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print(f"\npython -m sglang.benchmark.serving {shlex.join(arguments)}", flush=True)
        with patch.object(sys, "argv", ["sglang.benchmark.serving", *arguments]):
            try:
                cli_main()
            except (Exception, SystemExit) as error:
                raise BenchmarkError(f"bench_serving failed ({error}), see {log}") from error


def read_result(output: Path, expected: int) -> dict[str, Any]:
    """The last line of bench_serving's output file.

    Args:
        output: its --output-file, a JSON object per line.
        expected: requests that must have been answered.

    Raises:
        BenchmarkError: there is none, or requests failed.
    """
    lines = output.read_text().splitlines() if output.exists() else []
    if not lines:
        raise BenchmarkError(f"bench_serving wrote no result to {output}")
    found = json.loads(lines[-1])
    if found["completed"] != expected:
        raise BenchmarkError(f"{found['completed']} of {expected} requests were answered")
    return found


def row_of(arm: str, cell: Cell, found: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """What the table and the JSON keep of one cell.

    Args:
        arm: the server.
        cell: what was sent.
        found: of `read_result`; it holds the server's counters after the run.
        before: our counters before it; None for a server without.
    """
    row = cell._asdict() | {
        "arm": arm,
        "ttft_ms": found["median_ttft_ms"],
        "tpot_ms": found["median_tpot_ms"],
        "itl_ms": found["median_itl_ms"],
        "tokens_per_s": found["output_throughput"],
        "hit_rate": found["cache_report"]["cache_hit_rate_pct"] / 100,
        "duration_s": found["duration"],
        "input_tokens": found["cache_report"]["total_prompt_tokens"],
        "output_tokens": found["total_output_tokens"],
    }
    if before is not None:
        after = found["server_info"]["internal_states"][0]["clusterkv"]
        if after["build_ms"]:  # known on a CPU only
            row["clustering_share"] = (after["build_ms"] - before["build_ms"]) / 1000 / found["duration"]
        row["sparse_steps"] = after["sparse_steps"] - before["sparse_steps"]
        row["dense_steps"] = sum(after["dense_steps"].values()) - sum(before["dense_steps"].values())
    return row


def ratio_table(rows: list[dict[str, Any]], base: str) -> str:
    """The rows as Markdown, cell by cell; ratios are to the arm `base` in the same cell."""
    lines = [
        "| workload | context | concurrency | server | TTFT s | ratio | TPOT ms | ratio | ITL ms | tokens/s | ratio "
        "| cache hits | clustering | sparse steps |",
        "|" + "---|" * 14,
    ]
    cells = dict.fromkeys((row["workload"], row["context"], row["concurrency"]) for row in rows)
    for cell in cells:
        alike = [row for row in rows if (row["workload"], row["context"], row["concurrency"]) == cell]
        of_base = next((row for row in alike if row["arm"] == base), None)
        for row in alike:
            lines.append(
                f"| {cell[0]} | {cell[1]:,} | {cell[2]} | {row['arm']} "
                f"| {row['ttft_ms'] / 1000:.2f} | {_ratio(row, of_base, 'ttft_ms')} "
                f"| {row['tpot_ms']:.1f} | {_ratio(row, of_base, 'tpot_ms')} | {row['itl_ms']:.1f} "
                f"| {row['tokens_per_s']:.2f} | {_ratio(row, of_base, 'tokens_per_s')} "
                f"| {100 * row['hit_rate']:.1f} % | {_share(row)} | {_sparse(row)} |"
            )
    return "\n".join(lines)


def _ratio(row: dict[str, Any], base: dict[str, Any] | None, field: str) -> str:
    return "-" if base is None or not base[field] else f"{row[field] / base[field]:.2f}"


def _share(row: dict[str, Any]) -> str:
    """Clustering's share of the cell's duration."""
    return f"{100 * row['clustering_share']:.1f} %" if "clustering_share" in row else "-"


def _sparse(row: dict[str, Any]) -> str:
    """Share of the requests' decode steps that attended sparsely."""
    steps = row.get("sparse_steps", 0) + row.get("dense_steps", 0)
    return f"{100 * row['sparse_steps'] / steps:.0f} %" if steps else "-"


def picture(rows: list[dict[str, Any]]) -> Figure | None:
    """Time per token over the context, one panel per concurrency, one line per server; None without shared cells."""
    from matplotlib.figure import Figure

    shared = [row for row in rows if row["workload"] == "shared"]
    counts = sorted({row["concurrency"] for row in shared})
    if not counts:
        return None
    figure = Figure(figsize=(3.6 * len(counts), 3.2), layout="constrained")
    for axes, count in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        for arm in dict.fromkeys(row["arm"] for row in shared):
            points = sorted(
                (row["context"], row["itl_ms"]) for row in shared if (row["arm"], row["concurrency"]) == (arm, count)
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=arm)
        axes.set_title(f"concurrency {count}", fontsize="medium")
        axes.set_xlabel("context, tokens")
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("time between tokens, ms (median)")
    figure.axes[0].legend()
    return figure


def config_of(arm: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Options of the plugin for an arm; None where it is not the plugin's."""
    if arm not in OURS:
        return None
    if arm == "dense":
        everything = 2 * max(args.contexts)
        return {"budget_tokens": everything, "candidate_tokens": everything}
    return {"budget_tokens": args.budget, "candidate_tokens": args.candidates}


def measure(
    arm: str, cells: list[Cell], load: Load, args: argparse.Namespace, folder: Path, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """Start one server and send it every cell; a row for each that is listed, as soon as it is there."""
    config = config_of(arm, args)
    flags = ["--page-size", "16", "--enable-cache-report", *shlex.split(args.server_args)]
    if args.device == "cpu":
        flags += ["--max-total-tokens", str(1024 + max(load.pool_tokens(cell) for cell in cells))]
    device_flags = CPU_FLAGS if args.device == "cpu" else ("--device", args.device)
    backend, log = arm if config is None else "clusterkv", folder / f"{arm}-server.log"
    bar.set_description_str(f"{arm}: starting")
    with serve(args.model, log, *flags, config=config, backend=backend, device_flags=device_flags) as server:
        server.generate(list(range(100, 300)), 8)  # loads and compiles what the first request would wait for
        bar.update()
        for cell in cells:
            bar.set_description_str(f"{arm}: {cell}")
            before = None if config is None else server.counts()
            conversations, output = folder / "conversations.json", folder / f"{arm}.jsonl"
            if cell.workload == "chat":
                write_conversations(conversations, cell, load.turns)
            arguments = arguments_of(cell, load, server, args.model, conversations)
            drive([*arguments, "--output-file", str(output)], folder / f"{arm}-bench_serving.log")
            row = row_of(arm, cell, read_result(output, load.requests(cell)), before)
            bar.update()
            if not cell.fills_cache:
                bar.write(f"{arm:12} {cell!s:18} TTFT {row['ttft_ms'] / 1000:7.2f} s, TPOT {row['tpot_ms']:8.1f} ms")
                yield row


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", help="default on a CPU: torch_native dense clusterkv")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 4000, 7700])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--random-concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=1, help="requests of a cell over its concurrency")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3, help="turns of a chat")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", type=model_folder, default=default_out())
    parser.add_argument("--server-args", default="", help="more flags for every server, as one text")
    parser.add_argument("--quick", action="store_true", help="two arms, one context, short answers: does it run")
    args = parser.parse_args()
    args.arms = args.arms or ARMS[args.device.partition(":")[0]]
    if args.quick:
        args.arms = list(dict.fromkeys((args.arms[0], args.arms[-1])))
        args.contexts, args.concurrency, args.output_tokens, args.turns = [1000], [1, 4], 12, 2
    return args


def main() -> None:
    """Measure every arm in turn; exits with 1 where one could not be measured to its end."""
    args = parse()
    cells = make_cells(args.workloads, args.contexts, args.concurrency, args.random_concurrency)
    load = Load(args.rounds, args.output_tokens, args.turns)
    folder = Path(tempfile.mkdtemp(prefix="serving-"))
    print(f"{len(args.arms)} servers, {len(cells)} runs of bench_serving each; logs: {folder}", flush=True)
    rows: list[dict[str, Any]] = []
    stopped: dict[str, str] = {}
    with tqdm(total=len(args.arms) * (len(cells) + 1), unit="run") as bar:
        for arm in args.arms:
            try:
                for row in measure(arm, cells, load, args, folder, bar):
                    rows.append(row)
            except (AssertionError, BenchmarkError) as error:
                stopped[arm] = str(error)
                bar.write(f"{arm}: {error}")
    body = ratio_table(rows, args.arms[0])
    body += "".join(f"\n\n{arm} was not measured to its end: {reason}" for arm, reason in stopped.items())
    print(f"\n{body}\n")
    if rows:
        write_results(
            "serving-quick" if args.quick else "serving",
            title="Servers under load",
            setting=(
                f"{args.model.name}, {'float32' if args.device == 'cpu' else args.device}, budget {args.budget}, candidates "
                f"{args.candidates}, {args.output_tokens} tokens per answer; medians over a cell's requests"
            ),
            command=command_of("benchmarks.serving"),
            body=body,
            data={"base": args.arms[0], "rows": rows, "stopped": stopped},
            figure=picture(rows),
            device=args.device,
        )
    sys.exit(1 if stopped else 0)


if __name__ == "__main__":
    main()
