"""A picture of the page that shows what a request recalled, from its trace.

    sglang-clusterkv explain --base-url URL --document FILE --question "..." --json --out TRACE.json
    python -m benchmarks.explain_picture TRACE.json --answer 12 [--layers 16-23] [--prompt 900] [--above] [--dark] [--out FILE]

Opens the page in Chromium (`make browser`), chooses the answer's token of that number, counted from 1, a token of the prompt
for its cluster if asked for, and the first passage, and writes what a reader then sees in a window of 1280 x 1000.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from sglang_clusterkv.tools.explain.page import write_page
from tests.support.browser import Watched, browser, missing

ROOT = Path(__file__).parents[1]
SIZE = (1280, 1000)
DRAWN = "() => document.body.dataset.drawn === String(drawing)"


def picture(trace: dict[str, Any], out: Path, args: argparse.Namespace) -> None:
    """Write the picture; the choices are those of the command line."""
    prompt_tokens = trace["request"]["prompt_tokens"]
    with tempfile.TemporaryDirectory() as folder, browser() as chromium:
        scheme: Literal["dark", "light"] = "dark" if args.dark else "light"
        page = chromium.new_page(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme=scheme)
        watched = Watched(page)
        watched.open(write_page(trace, Path(folder) / "page.html"))
        if args.layers:
            page.select_option(
                "#layers", label=f"layers {args.layers}" if "-" in args.layers else f"layer {args.layers}"
            )
        if args.above:
            page.check("#above")
        if args.prompt:
            page.click(f"#token-{args.prompt - 1}")
            page.wait_for_selector("#members li")
        page.click(f"#token-{prompt_tokens + args.answer - 1}")
        page.wait_for_function(DRAWN)
        page.locator("#passages button").first.click()
        assert not watched.said, watched.said
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out)
    print(f"{out}: {out.stat().st_size:,} bytes")


def main() -> None:
    """Read the command line and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--answer", type=int, default=1, help="the answer's token, counted from 1")
    parser.add_argument("--prompt", type=int, help="the prompt's token, counted from 1")
    parser.add_argument("--layers", help="a group of layers as the page labels it, or one layer")
    parser.add_argument("--above", action="store_true", help="only what exceeds the answer's mean")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "explain.png")
    args = parser.parse_args()
    if missing():
        sys.exit(missing())
    picture(json.loads(args.trace.read_text()), args.out, args)


if __name__ == "__main__":
    main()
