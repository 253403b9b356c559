"""The board of docs/grafana.json as a picture, from a server's /metrics: no Prometheus, no Grafana.

    python -m benchmarks.board [--minutes 5] [--model tiny|demo] [--threads 4]
    python -m benchmarks.board --base-url URL [--minutes 5]

Starts a server with a host tier and lets the soak's traffic run against it (new prompts, branches, chats, aborts); with
--base-url a running one is read, whatever it does. /metrics is read every two seconds, and each panel's own queries are
evaluated over what was read (board_queries.py). Writes picture, lines and their last values to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests
from tqdm import tqdm

from benchmarks.board_queries import Scrape, lines_of, read_scrape
from benchmarks.results_file import ROOT, command_of, write_results
from benchmarks.servers import serve
from benchmarks.soak import SIZES, Traffic
from sglang_clusterkv.tools.demo_model import default_out
from tests.support.tiny_model import tiny_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVERY_S = 2.0
INTERVAL_S = 10.0  # of rates: what Grafana's $__rate_interval is for, several scrapes
COLUMNS = 3

Lines = dict[str, list[tuple[float, float]]]


def board() -> list[dict[str, Any]]:
    """The board's panels and rows, from top to bottom."""
    panels = json.loads((ROOT / "docs" / "grafana.json").read_text())["panels"]
    return sorted(panels, key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))


def read_for(url: str, seconds: float) -> list[Scrape]:
    """Readings of a server's /metrics, one every `EVERY_S`."""
    begin, scrapes = time.monotonic(), []
    with tqdm(total=round(seconds), unit="s") as bar:
        while (now := time.monotonic() - begin) < seconds:
            answer = requests.get(f"{url}/metrics", timeout=60)
            answer.raise_for_status()
            scrapes.append(read_scrape(answer.text, now))
            time.sleep(max(0.0, EVERY_S * len(scrapes) - (time.monotonic() - begin)))
            bar.update(min(round(seconds), round(time.monotonic() - begin)) - bar.n)
    return scrapes


def lines_of_board(scrapes: list[Scrape]) -> dict[str, Lines]:
    """Each panel's lines, by its title."""
    return {panel["title"]: lines_of(panel, scrapes, INTERVAL_S) for panel in board() if panel["type"] != "row"}


def written(value: float, unit: str) -> str:
    """A value in its panel's unit."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s"
    prefixes = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
    prefix, size = next((pair for pair in prefixes if abs(value) >= pair[1]), ("", 1.0))
    if unit in ("bytes", "Bps"):
        return f"{value / size:.3g} {prefix}{'B' if unit == 'bytes' else 'B/s'}"
    return f"{value / size:.3g}{prefix} {'' if unit == 'short' else unit.removeprefix('suffix:').strip()}".strip()


def unit_of(panel: dict[str, Any]) -> str:
    """What a panel's values are in, as Grafana names it."""
    return panel["fieldConfig"]["defaults"].get("unit", "short")


def table(lines: dict[str, Lines]) -> str:
    """Markdown: each line's last value, and its largest."""
    rows = ["| panel | line | last | largest |", "|---|---|---|---|"]
    for panel in (panel for panel in board() if panel["type"] != "row"):
        shown = lines[panel["title"]]
        for name, points in shown.items():
            values = [value for _, value in points]
            last, largest = (written(value, unit_of(panel)) for value in (values[-1], max(values)))
            rows.append(f"| {panel['title']} | {name} | {last} | {largest} |")
        if not shown:
            rows.append(f"| {panel['title']} | no data | | |")
    return "\n".join(rows)


def picture(lines: dict[str, Lines], title: str) -> Figure:
    """The panels as the board has them: rows with their titles, three panels beside each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as letters: a fourth of the size
    rows: list[list[dict[str, Any]]] = []
    heads: dict[int, str] = {}
    for panel in board():
        if panel["type"] == "row":
            heads[len(rows)] = panel["title"]
        elif rows and len(rows) not in heads and panel["gridPos"]["y"] == rows[-1][0]["gridPos"]["y"]:
            rows[-1].append(panel)
        else:
            rows.append([panel])
    figure, grid = pyplot.subplots(
        len(rows), COLUMNS, figsize=(15, 2.6 * len(rows)), layout="constrained", squeeze=False
    )
    figure.suptitle(textwrap.fill(title, 120))
    last = max((points[-1][0] for panel in lines.values() for points in panel.values()), default=0.0)
    for number, (panels, axes) in enumerate(zip(rows, grid, strict=True)):
        for panel, place in zip(panels, axes, strict=False):
            draw_panel(place, panel, lines[panel["title"]], last)
        for place in axes[len(panels) :]:
            place.axis("off")
        if number in heads:
            axes[0].annotate(heads[number], (0, 1.22), xycoords="axes fraction", fontsize=12, fontweight="bold")
    return figure


def draw_panel(axes: Any, panel: dict[str, Any], lines: Lines, last_s: float) -> None:
    """One panel; `last_s` is where the time of all panels ends."""
    unit = unit_of(panel)
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) == 1 else None)
    axes.set_title(panel["title"], fontsize=10, loc="left")
    axes.set_xlim(0, last_s or 1.0)
    largest = max((value for points in lines.values() for _, value in points), default=1.0)
    axes.set_ylim(0, 1.08 * largest or 1.0)
    axes.yaxis.set_major_formatter(lambda value, _: written(value, unit))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=7, loc="best", framealpha=0.6)
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", color="gray")


def main() -> None:
    """Read a server for some minutes, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--model", choices=list(SIZES), default="demo")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--base-url", help="of a running server with --enable-metrics; its traffic is its own")
    args = parser.parse_args()
    if args.base_url:
        setting, scrapes = "a running server", read_for(args.base_url, 60 * args.minutes)
    else:
        setting, scrapes = soaked(args)
    lines = lines_of_board(scrapes)
    print(body := table(lines))
    data = {"scrapes": len(scrapes), "every_s": EVERY_S, "interval_s": INTERVAL_S, "panels": rounded(lines)}
    write_results(
        "board",
        title="The board",
        setting=setting,
        command=command_of("benchmarks.board"),
        body=body,
        data=data,
        figure=picture(lines, f"docs/grafana.json: {setting}"),
    )


def soaked(args: argparse.Namespace) -> tuple[str, list[Scrape]]:
    """A server of its own under the soak's traffic; in words, and what was read of it."""
    size = SIZES[args.model]
    model = tiny_model() if args.model == "tiny" else default_out()
    config = size.config | {"host_ratio": 2}
    arguments = ["--chunked-prefill-size", "1024", "--max-total-tokens", str(size.pool), "--max-running-requests", "8"]
    log = Path(tempfile.mkdtemp()) / "server.log"
    print(f"starting a server on {model}; its log: {log}", flush=True)
    with serve(model, log, *arguments, "--enable-metrics", "--enable-cache-report", config=config) as server:
        traffic = Traffic(server, size, args.threads)
        traffic.start()
        try:
            scrapes = read_for(server.url, 60 * args.minutes)
        finally:
            traffic.end()
        scrapes += [
            scrape._replace(at_s=60 * args.minutes + scrape.at_s) for scrape in read_for(server.url, 3 * EVERY_S)
        ]
    words = f"{'a tiny random Llama' if args.model == 'tiny' else model.name}, {traffic.requests} requests of the soak"
    return f"{words}, {args.threads} at a time, {', '.join(f'{key} {value}' for key, value in config.items())}", scrapes


def rounded(lines: dict[str, Lines]) -> dict[str, dict[str, list[list[float]]]]:
    """The lines as JSON, to five digits."""
    return {
        panel: {name: [[round(at, 1), float(f"{value:.5g}")] for at, value in points] for name, points in shown.items()}
        for panel, shown in lines.items()
    }


if __name__ == "__main__":
    main()
