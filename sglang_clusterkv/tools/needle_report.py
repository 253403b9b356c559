"""What `sglang-clusterkv needle` asked and got, as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from sglang_clusterkv import __version__


class Settings(NamedTuple):
    base_url: str
    model: str | None  # None: the server's first
    lengths: list[int]  # tokens of a prompt, rising
    depths: list[int]  # percent of the document before the needle, rising
    needles: int  # questions per length and depth
    seed: int
    api_key: str
    timeout_s: float
    max_tokens: int  # per answer


class Answer(NamedTuple):
    length: int  # as asked for; prompt_tokens is what the server counted
    depth: int
    prompt_tokens: int
    question: str
    expected: str
    answer: str
    found: bool


class Result:
    """What was asked so far of one server."""

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings = settings
        self.model = model
        self.answers: list[Answer] = []
        self.skipped: dict[int, str] = {}  # lengths with the reason

    def cell(self, length: int, depth: int) -> list[Answer]:
        """The answers of one length and depth; empty where none was asked for."""
        return [answer for answer in self.answers if (answer.length, answer.depth) == (length, depth)]


def table(result: Result) -> str:
    """Markdown: a row per depth and a column per length, with needles found of those asked for."""
    lengths, depths = result.settings.lengths, result.settings.depths
    lines = [
        f"| depth | {' | '.join(f'{length:,}' for length in lengths)} |",
        "|---" * (len(lengths) + 1) + "|",
        f"| prompt tokens | {' | '.join(_tokens(result, length) for length in lengths)} |",
    ]
    for depth in depths:
        cells = [_share(result, [(length, depth)]) for length in lengths]
        lines.append(f"| {depth} % | {' | '.join(cells)} |")
    totals = [_share(result, [(length, depth) for depth in depths]) for length in lengths]
    lines.append(f"| all | {' | '.join(totals)} |")
    found = sum(answer.found for answer in result.answers)
    lines += ["", f"{result.model}: {found} of {len(result.answers)} needles found"]
    lines += [f"{length:,} left out: {reason}" for length, reason in result.skipped.items()]
    return "\n".join(lines)


def as_dict(result: Result) -> dict[str, Any]:
    """Everything that was asked and answered. The key is not in it."""
    settings = result.settings
    return {
        "sglang_clusterkv": __version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "base_url": settings.base_url,
        "model": result.model,
        "seed": settings.seed,
        "needles_per_cell": settings.needles,
        "max_tokens": settings.max_tokens,
        "lengths": settings.lengths,
        "depths": settings.depths,
        "found": sum(answer.found for answer in result.answers),
        "asked": len(result.answers),
        "skipped": [{"length": length, "reason": reason} for length, reason in result.skipped.items()],
        "answers": [answer._asdict() for answer in result.answers],
    }


def show(result: Result, as_json: bool) -> None:
    """Print the table, or the JSON, on stdout."""
    print(json.dumps(as_dict(result), indent=1) if as_json else table(result))


def write(result: Result, out: Path) -> None:
    """needle.md, needle.json and, with matplotlib, needle.png in a folder that has none of them; says so on stderr."""
    for name, text in {"needle.md": table(result), "needle.json": json.dumps(as_dict(result), indent=1)}.items():
        with (out / name).open("x") as file:
            file.write(text + "\n")
    names = ["needle.md", "needle.json"]
    try:
        draw(result, out / "needle.png")
        names.append("needle.png")
    except ImportError:
        print("no picture without matplotlib: pip install 'sglang-clusterkv[bench]'", file=sys.stderr)
    print(f"written: {', '.join(str(out / name) for name in names)}", file=sys.stderr)


def draw(result: Result, path: Path) -> None:
    """A heat map, a square per length and depth; grey where nothing was asked.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # Not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    lengths, depths = result.settings.lengths, result.settings.depths
    figure = Figure(figsize=(2.5 + 0.9 * len(lengths), 2 + 0.5 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    # A cell that is nan is not drawn, so the grey shows.
    shares = [[_number(result, length, depth) for length in lengths] for depth in depths]
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            # The colour map is dark below.
            color = "white" if shares[row][column] <= 0.6 else "black"
            axes.text(column, row, _share(result, [(length, depth)]), ha="center", va="center", color=color)
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
    axes.set_xlabel("prompt tokens")
    axes.set_ylabel("depth of the needle")
    axes.set_title(f"needles found: {Path(result.model).name}", fontsize="medium")
    figure.colorbar(image, label="share found")
    figure.savefig(path, dpi=120)


def _number(result: Result, length: int, depth: int) -> float:
    """Share found in one cell; nan, which is drawn as nothing, where none was asked for."""
    answers = result.cell(length, depth)
    return sum(answer.found for answer in answers) / len(answers) if answers else float("nan")


def _share(result: Result, cells: list[tuple[int, int]]) -> str:
    """`found/asked` over some cells, `-` where none was asked for."""
    answers = [answer for length, depth in cells for answer in result.cell(length, depth)]
    return f"{sum(answer.found for answer in answers)}/{len(answers)}" if answers else "-"


def _tokens(result: Result, length: int) -> str:
    """Range of the server's own count of a column's prompts."""
    counts = [answer.prompt_tokens for answer in result.answers if answer.length == length]
    if not counts:
        return "-"
    return f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
