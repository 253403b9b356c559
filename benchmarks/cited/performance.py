"""The tables of docs/performance.md."""

from __future__ import annotations

from typing import Any

from benchmarks.cited.numbers import between, milliseconds, percent, small
from benchmarks.cited.tables import PERFORMANCE, README, Rows, cells_of, figures, sentence

LATENCY = "latency-7700-b8-20261130-122534"


@figures("latency", (README, PERFORMANCE), LATENCY)
def _(found: Any) -> Rows:
    base = found["torch_native"]
    return [
        [
            None,
            f"{row['short_ms']:,.0f}",
            f"{row['long_ms']:,.0f}",
            f"{row['long_ms'] / base['long_ms']:.2f}",
            f"{row['batch_ms']:,.0f}",
            f"{row['batch_ms'] / base['batch_ms']:.2f}",
            f"{row['prefill_s']:.1f}",
            percent(row["clustering_share"], 1) if "clustering_share" in row else "-",
            f"{row['hit_s']:.2f}",
        ]
        for row in (found["clusterkv"], found["dense"], base)
    ]


@sentence(PERFORMANCE, LATENCY)
def _(found: Any) -> str:
    own = found["clusterkv"]
    return f"Time per token at 7,700 over that at 1,000: {own['long_ms'] / own['short_ms']:.2f}."


@sentence(README, LATENCY)
def _(found: Any) -> str:
    own, dense = found["clusterkv"], found["dense"]
    return (
        f"from {dense['long_ms']:.0f} to {own['long_ms']:.0f} ms at batch 1 and from {dense['batch_ms']:.0f} to "
        f"{own['batch_ms']:.0f} at batch 8"
    )


@sentence(PERFORMANCE, "latency-1000-b8-20261130-122702")
def _(found: Any) -> str:
    own = found["clusterkv"]
    return f"it takes {own['long_ms']:.0f} at batch 1 and {own['batch_ms']:.0f} at 8"


@figures("step-profile", PERFORMANCE, "step-profile-1000-b1-20261130-121535")
def _(found: Any) -> Rows:
    from benchmarks.step_profile import table

    return [list(cells_of(line)) for line in table(found).splitlines()[2:]]


@figures("llama-cpp", PERFORMANCE, "llama-cpp-20261130-095549", "latency-7700-b8-20261130-094512")
def _(peer: Any, own: Any) -> Rows:
    row = own["clusterkv"]
    rows: Rows = []
    for batch, ours in ((1, row["long_ms"]), (8, row["batch_ms"])):
        for weights in ("F32", "BF16"):
            short, long = (peer[f"{weights} f16"][f"{tokens} x {batch}"] for tokens in (100, 7700))
            rows.append([str(batch), weights, f"{short:.1f}", f"{long:.1f}", f"{ours:.1f}", f"{ours / long:.2f}"])
    return rows


@figures("larger", PERFORMANCE, "latency-7700-b8-20261130-191815", "llama-cpp-20261130-192322")
def _(found: Any, peer: Any) -> Rows:
    rows: Rows = [
        [
            None,
            *(f"{row[name]:.0f}" for name in ("short_ms", "long_ms", "batch_ms", "prefill_s")),
            percent(row["clustering_share"], 1) if "clustering_share" in row else "-",
            f"{row['hit_s']:.2f}",
        ]
        for row in (found["clusterkv"], found["dense"])
    ]
    theirs = peer["BF16 f16"]
    cells = [f"{theirs[name]:.0f}" for name in ("100 x 1", "7700 x 1", "7700 x 8", "prefill 7700")]
    return [*rows, [None, *cells, "-", "-"]]


@figures("operations", PERFORMANCE, "kernels-cpu-smollm2-135m-20261130-095602")
def _(found: Any) -> Rows:
    rows: Rows = []
    for names in (["score"], ["select"], ["refine"], ["recall"], ["attend"], ["estimate"], ["rotate", "merge"]):
        cells: list[str | None] = [None]
        for cell in found["cells"]:
            operations = [operation for operation in cell["operations"] if operation["name"] in names]
            rate = operations[0]["gbps"]
            cells += [
                milliseconds(sum(operation["ms"] for operation in operations)),
                percent(sum(operation["share"] for operation in operations)),
                "" if rate is None else f"{rate:.1f}",
            ]
        rows.append(cells)
    whole: list[str | None] = [None]
    dense: list[str | None] = [None]
    for cell in found["cells"]:
        whole += [milliseconds(cell["whole"]["ms"]), "", ""]
        dense += [milliseconds(cell["dense"][0]["ms"]), "", f"{cell['dense'][0]['gbps']:.1f}"]
    return [*rows, whole, dense]


@sentence(PERFORMANCE, "kernels-cpu-smollm2-135m-20261130-094237")
def _(found: Any) -> str:
    one, eight, shared = (cell["whole"]["ms"] for cell in found["cells"])
    return f"{one:.1f} ms at batch 1, {eight:.1f} at 8 and {shared:.1f} at 8 with 7,000 shared tokens"


@figures(
    "shapes",
    PERFORMANCE,
    "kernels-cpu-llama-3.1-8b-20261130-042700",
    "kernels-cpu-qwen2.5-7b-20261130-042728",
    "kernels-cpu-qwen2.5-7b-20261130-042740",
)
def _(*runs: Any) -> Rows:
    return [
        [
            None,
            f"{cell['context']:,}",
            None,
            None,
            f"{cell['whole']['ms']:,.0f}",
            f"{cell['dense'][0]['ms']:,.0f}",
            f"{cell['dense'][0]['ms'] / cell['whole']['ms']:.1f}",
            f"{cell['prefixes_ms'] / 1000:.0f}",
        ]
        for run in runs
        for cell in run["cells"]
    ]


def _under_load(run: Any, workload: str, context: int, at_once: int) -> tuple[list[str], list[float]]:
    """clusterkv over the first arm: first token, time per token, tokens per second; and their times per token."""
    key = ["workload", "context", "concurrency"]
    rows = {row["arm"]: row for row in run["rows"] if [row[name] for name in key] == [workload, context, at_once]}
    own, base = rows["clusterkv"], rows[run["base"]]
    ratios = [f"{own[name] / base[name]:.2f}" for name in ("ttft_ms", "tpot_ms", "tokens_per_s")]
    return ratios, [base["tpot_ms"], own["tpot_ms"]]


@figures("under-load", PERFORMANCE, "serving-20261130-142926")
def _(run: Any) -> Rows:
    rows: Rows = []
    cells = [("shared", context, at_once) for context in (1000, 4000, 7700) for at_once in (1, 4, 8)]
    cells += [("random", context, 1) for context in (1000, 4000, 7700)] + [("chat", 4000, 4)]
    for cell in cells:
        (first, step, rate), times = _under_load(run, *cell)
        if cell == ("shared", 7700, 8):
            step += " ({:.0f} to {:.0f} ms)".format(*times)
        rows.append([None, f"{cell[1]:,}", str(cell[2]), first, step, rate])
    return rows


@figures("short-prefixes", PERFORMANCE, "serving-20261130-144112")
def _(run: Any) -> Rows:
    rows: Rows = []
    for context, at_once in ((1000, 4), (1000, 8), (2000, 4), (2000, 8)):
        cell = [row for row in run["rows"] if (row["context"], row["concurrency"]) == (context, at_once)]
        times = {arm: [row["tpot_ms"] for row in cell if row["arm"] == arm] for arm in ("dense", "clusterkv")}
        rows.append([f"{context:,}", str(at_once), *(", ".join(f"{ms:.1f}" for ms in times[arm]) for arm in times)])
    return rows


@figures("quick-load", PERFORMANCE, "serving-quick-20261130-143300", "serving-quick-20261130-143525")
def _(*runs: Any) -> Rows:
    rows: Rows = []
    for workload, at_once in (("shared", 1), ("shared", 4), ("random", 1), ("chat", 4)):
        pairs = zip(*(_under_load(run, workload, 1000, at_once)[0] for run in runs), strict=True)
        rows.append([None, str(at_once), *(", ".join(pair) for pair in pairs)])
    return rows


@figures("needle", PERFORMANCE, "needle-7700-budget256-20261125-053010")
def _(found: Any) -> Rows:
    rows: Rows = []
    for arm in ("dense", "clusterkv"):
        right = [number in text for number, text in zip(found["numbers"], found["answers"][arm], strict=True)]
        rows.append([None, *("found" if one else "-" for one in right), str(sum(right))])
    return rows


@figures("merging", PERFORMANCE, "chat-20261125-083412")
def _(found: Any) -> Rows:
    from benchmarks.chat import _quarters
    from benchmarks.forced import interval, mean

    return [
        [
            str(arm["budget"]),
            "on" if arm["merge"] else "off",
            between(mean(arm["kl"]), interval(arm["kl"]), 5),
            small(mean([arm["kl"][turn] for turn in _quarters(arm["kl"])[-1]]), 5),
            str(arm["seen"]),
            f"{arm['counts']['tokens_clustered']:,}",
        ]
        for arm in found["arms"]
    ]


def _kl_of(arms: list[Any], budget: int, recluster_every: int, merge: bool) -> float:
    from benchmarks.forced import mean

    key = (budget, recluster_every, merge)
    return next(mean(a["kl"]) for a in arms if (a["budget"], a["recluster_every"], a["merge"]) == key)


@sentence(PERFORMANCE, "chat-20261125-083412")
def _(found: Any) -> str:
    ratios = [_kl_of(found["arms"], b, 256, True) / _kl_of(found["arms"], b, 256, False) for b in (64, 128, 256)]
    return "On over off, paired: {:.2f}, {:.2f} and {:.2f} of the KL".format(*ratios)


@sentence(PERFORMANCE, "chat-long-20261125-082928")
def _(found: Any) -> str:
    off, on, long_off, long_on = (
        small(_kl_of(found["arms"], 128, runs, merge), 5) for runs in (64, 256) for merge in (False, True)
    )
    return (
        f"runs of 64 gain the same ({off} to {on}), runs of 256, the default, gain nothing measurable "
        f"({long_off} and {long_on})"
    )


@figures("burst", PERFORMANCE, "burst-20261129-151155")
def _(found: Any) -> Rows:
    servers = list(found["bursts"].values())
    rows: Rows = []
    for way in (
        "equal prompts, one list",
        "equal prompts before others",
        "one list",
        "first alone, then a list",
        "fork",
        "sync, then fork",
    ):
        cells: list[str | None] = [None]
        for server in servers:
            times = sorted({f"{run['prefilled'] / found['prompt_tokens']:.0f}" for run in server[way]})
            later = sorted({f"{run['later_clustered']:,}" for run in server[way]})
            cells.append(f"{' and '.join(times)} ({' and '.join(later)})")
        rows.append(cells)
    return rows
