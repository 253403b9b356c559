"""Are the figures of README and docs those of the results that they name?

    python -m benchmarks.cited [--write]

A table that was measured has `<!-- figures: NAME -->` above it and a paragraph `Figures: ...` below it, which names its result
files. This compares each cell with what those files say, and each `SENTENCES`; exit status 1 where one differs. `--write` puts
the files' figures into the tables. It also finds results that no document cites, citations without a file, and results that
were measured with other code than this tree's, or with code that they do not name, where the paragraph has no "Since then:".
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.results_file import CODE, RESULTS, ROOT

MARK = re.compile(r"^<!-- (?:figures: (?P<name>[\w-]+)|no figures) -->$")
NAME = re.compile(r"\b[a-z][a-z0-9.-]*?-\d{8}-\d{6}(?:-\d+)?\b")
PICTURE = re.compile(r"!\[[^]]*\]\(\S*?([\w.-]+\.svg)\)")
CITES = "Figures: "
SINCE = "Since then:"
SHORT_COMMIT = 7
README, PERFORMANCE, QUALITY = "README.md", "docs/performance.md", "docs/quality.md"
MEMORY = "docs/memory-measured.md"
MEASURED = (README, PERFORMANCE, QUALITY, MEMORY)  # in which every table says whether it is measured

Rows = list[list[str | None]]  # None: a cell that is no figure


class Figures(NamedTuple):
    """Tables of one name, the results that they are made of, and what they must hold."""

    documents: tuple[str, ...]
    files: tuple[str, ...]
    rows: Callable[..., Rows]


class Sentence(NamedTuple):
    """Text of a document that follows from results."""

    document: str
    files: tuple[str, ...]
    text: Callable[..., str]


TABLES: dict[str, Figures] = {}
SENTENCES: list[Sentence] = []


def figures(name: str, document: str | tuple[str, ...], *files: str) -> Callable[[Callable[..., Rows]], None]:
    """Register a table; the function gets what each file has measured."""

    def register(rows: Callable[..., Rows]) -> None:
        documents = (document,) if isinstance(document, str) else document
        TABLES[name] = Figures(documents, files, rows)

    return register


def sentence(document: str, *files: str) -> Callable[[Callable[..., str]], None]:
    """Register a sentence, likewise."""

    def register(text: Callable[..., str]) -> None:
        SENTENCES.append(Sentence(document, files, text))

    return register


# -- how figures are printed ------------------------------------------------------------------------------------------


def small(value: float, digits: int = 4) -> str:
    """A KL: without the zero before its point; three figures are enough where it is large."""
    if value >= 1:
        return f"{value:.2f}"
    return f"{value:.{digits}f}".removeprefix("0")


def loss(value: float) -> str:
    """A KL of answers, which ranges over four decades."""
    return small(value, 3 if value >= 0.1 else 4)


def between(value: float, limits: Sequence[float], digits: int) -> str:
    """With its interval."""
    low, high = limits
    return f"{small(value, digits)} ({small(low, digits)} to {small(high, digits)})"


def over(ratio: Sequence[float] | None) -> str:
    """A ratio with its interval."""
    if ratio is None:
        return ""
    digits = 2 if ratio[0] < 2 else 1 if ratio[0] < 20 else 0
    return "{} ({} to {})".format(*(f"{number:,.{digits}f}" for number in ratio))


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


# -- docs/performance.md ----------------------------------------------------------------------------------------------


@figures("latency", (README, PERFORMANCE), "latency-7700-b8-20261128-192837")
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


@sentence(PERFORMANCE, "latency-7700-b8-20261125-052525")
def _(old: Any) -> str:
    long, batch = ([old[arm][key] for arm in ("clusterkv", "dense", "torch_native")] for key in ("long_ms", "batch_ms"))
    return (
        f"has {long[0]:.0f}, {long[1]:.0f} and {long[2]:.0f} ms at batch 1 and {batch[0]:.0f}, {batch[1]:.0f} and "
        f"{batch[2]:,.0f} at batch 8: {long[0] / long[2]:.2f} and {batch[0] / batch[2]:.2f} of torch_native's, "
        f"{long[0] / long[1]:.2f} and {batch[0] / batch[1]:.2f} of dense's"
    )


@sentence(PERFORMANCE, "latency-7700-b8-20261128-192837")
def _(found: Any) -> str:
    own, dense = found["clusterkv"], found["dense"]
    return f"this one has {own['long_ms'] / dense['long_ms']:.2f} and {own['batch_ms'] / dense['batch_ms']:.2f}"


@sentence(PERFORMANCE, "latency-7700-b8-20261128-192837")
def _(found: Any) -> str:
    own = found["clusterkv"]
    return f"Time per token at 7,700 over that at 1,000: {own['long_ms'] / own['short_ms']:.2f}."


@figures("operations", PERFORMANCE, "kernels-cpu-smollm2-135m-20261128-063021")
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


@sentence(PERFORMANCE, "kernels-cpu-smollm2-135m-20261128-025410", "kernels-cpu-smollm2-135m-20261128-063021")
def _(*runs: Any) -> str:
    first, second = (run["cells"][1]["whole"]["ms"] for run in runs)
    return f"have {first:.0f} and {second:.0f} ms at batch 8"


@figures(
    "shapes",
    PERFORMANCE,
    "kernels-cpu-llama-3.1-8b-20261128-214652",
    "kernels-cpu-qwen2.5-7b-20261128-214617",
    "kernels-cpu-qwen2.5-7b-20261128-215001",
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


@figures("under-load", PERFORMANCE, "serving-20261128-103730")
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


@figures("quick-load", PERFORMANCE, "serving-quick-20261128-063529", "serving-quick-20261128-160710")
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


# -- docs/quality.md: benchmarks.quality.model_level ------------------------------------------------------------------

PART = 8  # tokens that model_level's bootstrap takes together


class Arms:
    """The arms of one result of model_level."""

    def __init__(self, found: Any, *, document: int | None = None) -> None:
        """All documents together, or one of them."""
        from benchmarks.quality.model_level import summary

        documents = found["documents"] if document is None else [found["documents"][document]]
        self.documents = documents
        # Anew, for some results have intervals of an older summary.
        self.lines: dict[str, Any] = {line["name"]: line for line in summary(documents)}
        sizes = documents[0]["sizes"]
        self.everything = 4 * sizes["head_dim"] * (sizes["clustered"] + sizes["base"])

    def over(self, name: str, ours: str, other: Arms | None = None) -> str:
        """KL of one arm over that of ours, of this result or another one over the same documents."""
        from benchmarks.forced import paired_ratio

        own, base = (
            [document["arms"][arm]["kl"] for document in arms.documents]
            for arms, arm in ((self, name), (other or self, ours))
        )
        return over(paired_ratio(own, base, PART))

    def share(self, name: str) -> str:
        """Of dense's bytes."""
        return f"1/{self.everything / self.lines[name]['bytes']:.1f}"

    def kib(self, name: str) -> str:
        return f"{self.lines[name]['bytes'] / 1024:.0f}"

    def kl(self, name: str, digits: int = 4) -> str:
        return small(self.lines[name]["kl"], digits)

    def kl_interval(self, name: str, digits: int = 5) -> str:
        return between(self.lines[name]["kl"], self.lines[name]["kl_interval"], digits)

    def kl_each(self, name: str, digits: int) -> str:
        """By document."""
        from benchmarks.forced import mean

        return ", ".join(small(mean([document["arms"][name]["kl"]]), digits) for document in self.documents)

    def answers(self, name: str) -> str:
        return loss(self.lines[name]["answer_kl"])

    def tail(self, name: str) -> list[str]:
        """First choices that are dense's, the answers' KL, right answers, perplexity."""
        line = self.lines[name]
        return [
            percent(line["same"], 1),
            small(line["answer_kl"]) if line["answer_kl"] < 1 else f"{line['answer_kl']:.4f}",
            f"{line['right']} of {line['answers']}",
            f"{line['perplexity']:.2f}",
        ]


THREE_DOCUMENTS = "quality-model-20261128-211030"
ALL_POLICIES = "quality-model-20261128-212012"
SOURCE_CODE, DIGITS = "quality-model-20261129-113144", "quality-model-20261129-122846"
QWEN = "quality-model-20261128-211655"
OTHER_MASSES = "quality-model-20261128-165418"
TWO_LEVELS = "quality-model-20261128-133903"
VALUES_INSIDE = "quality-model-20261128-162545"


@figures("readme-quality", README, THREE_DOCUMENTS)
def _(found: Any) -> Rows:
    arms = Arms(found)
    names = ("ours-{}", "published-equal-bytes-{}", "oracle-{}")
    return [
        [
            None,
            *(f"{arms.kl(n.format(b), 4 if n[0] == 'o' else 3)}, {arms.share(n.format(b))}" for b in (128, 256, 512)),
        ]
        for n in names
    ]


@figures("readme-qwen", README, QWEN)
def _(found: Any) -> Rows:
    arms = Arms(found)
    return [
        [None, *(f"{arms.kl(name, digits)}, {_found(arms.lines[name])}" for name in names)]
        for digits, names in (
            (4, [f"ours-{budget}" for budget in (128, 256, 512)]),
            (3, [f"published-equal-bytes-{budget}" for budget in (128, 256, 512)]),
        )
    ]


def _found(line: Any) -> str:
    return f"{line['right']} of {line['answers']}" if line["right"] else "none"


@figures("three-documents", QUALITY, THREE_DOCUMENTS)
def _(found: Any) -> Rows:
    arms = Arms(found)
    rows: Rows = []
    for budget in (128, 256, 512, 1024):
        ours, oracle, published = f"ours-{budget}", f"oracle-{budget}", f"published-equal-bytes-{budget}"
        rows.append(
            [
                f"{budget:,}",
                arms.share(ours),
                f"{arms.kl(ours)} ({arms.kl_each(ours, 4)})",
                arms.kl(oracle),
                arms.over(oracle, ours),
                arms.share(oracle),
                f"{arms.kl(published)} ({arms.kl_each(published, 3)})",
                arms.over(published, ours),
                *(arms.answers(name) for name in (ours, oracle, published)),
            ]
        )
    return rows


@figures("all-policies", QUALITY, ALL_POLICIES)
def _(found: Any) -> Rows:
    arms = Arms(found)
    names = [f"ours-{budget}" for budget in (128, 256, 512, 1024)]
    others = [name for name in arms.lines if name not in names]
    first = others.index("ours-no-estimate-128")
    return [[None, *_policy_row(arms, name)] for name in [*others[:first], *names, *others[first:]]]


def _policy_row(arms: Arms, name: str) -> list[str]:
    line = arms.lines[name]
    kl = "{:.5f} ({:.5f} to {:.5f})".format(line["kl"], *line["kl_interval"])
    ratio = over(line["over_ours"]) or "-"
    same, answers, right, perplexity = arms.tail(name)
    answers = f"{line['answer_kl']:.4f}"
    return [str(line["budget"]), arms.kib(name), arms.share(name), kl, ratio, same, answers, right, perplexity]


@figures("qwen", QUALITY, QWEN)
def _(found: Any) -> Rows:
    arms = Arms(found)
    return [
        [
            None,
            f"{arms.lines[name]['budget']:,}",
            arms.kib(name),
            arms.share(name),
            arms.kl_interval(name),
            over(arms.lines[name]["over_ours"]),
            *arms.tail(name),
        ]
        for policy in ("ours", "oracle", "published-equal-bytes")
        for name in (f"{policy}-{budget}" for budget in (128, 256, 512, 1024))
    ]


@figures("kinds", QUALITY, THREE_DOCUMENTS, SOURCE_CODE, DIGITS)
def _(*found: Any) -> Rows:
    rows: Rows = []
    for one in found:
        arms = Arms(one)
        dense = [document["dense"] for document in arms.documents]
        perplexity = f"{np.exp(np.mean(np.concatenate([d['surprise'] for d in dense]))):.2f}"
        right = sum(sum(d["right"]) for d in dense)
        for budget in (128, 256, 512):
            line = arms.lines[f"ours-{budget}"]
            answers = f"{line['right']} and {right} of {line['answers']}"
            kl, most = arms.kl_interval(line["name"]), small(line["kl_most"], 3)
            rows.append([None, perplexity, str(budget), kl, most, arms.answers(line["name"]), answers])
    return rows


@figures("unsure", QUALITY, SOURCE_CODE, DIGITS)
def _(*found: Any) -> Rows:
    rows: Rows = []
    for one in found:
        for line in Arms(one).lines.values():
            rows.append([None, str(line["budget"])])
            for part in line["by_entropy"]:
                some = part["tokens"]
                rows[-1].append(f"{small(part['kl'], 5)}, {small(part['most'], 3)} ({some})" if some else "-")
    return rows


@figures("candidates-without-outliers", QUALITY, "quality-model-20261128-214906")
def _(found: Any) -> Rows:
    arms = Arms(found)
    return [
        [None, None, arms.kl(name, 5), arms.answers(name)] for name in (f"ours-512-{n}" for n in (2048, 4096, 6900))
    ]


@figures("outliers", QUALITY, "quality-model-20261128-213926", THREE_DOCUMENTS)
def _(*found: Any) -> Rows:
    rows: Rows = []
    for arms in (Arms(one, document=0) for one in found):
        names = [f"ours-{budget}" for budget in (128, 256, 512)]
        rows.append([None, " / ".join(map(arms.kl, names)), " / ".join(map(arms.answers, names))])
    return rows


@sentence(QUALITY, "quality-model-20261128-213926")
def _(found: Any) -> str:
    arms, names = Arms(found, document=1), [f"ours-{budget}" for budget in (128, 256, 512)]
    return f'KL {" / ".join(map(arms.kl, names))} and Q {" / ".join(map(arms.answers, names))} with `{{"outlier_share": 0}}`'


@figures("sharp-heads", QUALITY, "quality-model-20261129-104201")
def _(found: Any) -> Rows:
    lines = Arms(found).lines
    rows: Rows = []
    for name in ("ours-cap-1-256", "ours-256", "ours-cap-4-256", "ours-no-cap-256", "ours-choice-cap-256"):
        line = lines[name]
        ratio = "" if name == "ours-256" else over(line["over_ours"])
        rows.append([None, between(line["kl"], line["kl_interval"], 5), ratio, small(line["answer_kl"])])
    return rows


@figures("options", QUALITY, "quality-model-20261128-054158")
def _(found: Any) -> Rows:
    arms = Arms(found)
    names = [name for name in arms.lines if name.startswith("ours-256")]
    names += ["ours-reused-2-256", "ours-reused-4-256", "ours-reused-4-alike-256"]
    return [
        [
            None,
            arms.kib(name),
            arms.kl(name, 5),
            arms.over(name, "ours-256") if name != "ours-256" else "",
            arms.answers(name),
        ]
        for name in names
    ]


@figures("own-mean-values", QUALITY, THREE_DOCUMENTS, OTHER_MASSES, TWO_LEVELS)
def _(now: Any, first: Any, second: Any) -> Rows:
    rows: Rows = []
    for documents in ((Arms(now, document=0), Arms(now, document=1)), (Arms(first), Arms(second))):
        rows.append([None, *(arms.kl(f"ours-{budget}") for arms in documents for budget in (128, 256, 512))])
    return rows


STORED = [f"quality-model-20261128-{time}" for time in ("093603", "094246", "182048", "094129", "094737")]


@figures("stored", QUALITY, "quality-model-20261128-054158", *STORED)
def _(defaults: Any, four: Any, sixteen: Any, passes: Any, one_bit: Any, long: Any) -> Rows:
    lines = [(defaults, "ours-256"), (four, "ours-256"), (four, "ours-256-estimate_clusters 1024")]
    lines += [(found, "ours-256") for found in (sixteen, passes, one_bit, long)]
    return [
        [None, arms.kib(name), arms.kl_interval(name), arms.answers(name)]
        for arms, name in ((Arms(found), name) for found, name in lines)
    ]


@figures("two-levels", QUALITY, TWO_LEVELS)
def _(found: Any) -> Rows:
    arms = Arms(found)
    rows: Rows = []
    for policy in ("ours", "ours-two-bit-values", "ours-two-levels-1", "ours-two-levels-2"):
        cells: list[str | None] = [None]
        for budget in (128, 256, 512):
            name = f"{policy}-{budget}"
            ratio = arms.over(name, f"ours-{budget}") if policy != "ours" else ""
            cells += [arms.kib(name), arms.kl(name), ratio, arms.answers(name)]
        rows.append(cells)
    return rows


@figures("values-inside", QUALITY, VALUES_INSIDE, "quality-model-20261128-170935")
def _(whole: Any, ranks: Any) -> Rows:
    whole, ranks = Arms(whole), Arms(ranks)
    lines = [
        (whole, "ours-256"),
        (whole, "ours-exact-inside-256"),
        (whole, "ours-moving-values-256"),
        (ranks, "ours-moving-values-rank-8-256"),
        (ranks, "ours-moving-values-rank-2-256"),
        (ranks, "ours-moving-values-shared-256"),
        (whole, "ours-moving-values-1-256"),
    ]
    return [
        [
            None,
            "" if name == "ours-exact-inside-256" else arms.kib(name),
            arms.kl(name, 5),
            arms.over(name, "ours-256", whole) if name != "ours-256" else "",
            arms.answers(name),
        ]
        for arms, name in lines
    ]


@sentence(QUALITY, "quality-model-20261128-174705", THREE_DOCUMENTS)
def _(moving: Any, now: Any) -> str:
    arms, ours, name = Arms(moving), Arms(now, document=0), "ours-moving-values-rank-8-256"
    return (
        f"On document 1 rank 8 has {arms.kl(name, 5)} for {ours.kl('ours-256', 5)}, {arms.over(name, 'ours-256', ours)}, "
        f"and Q {arms.answers(name)} for {ours.answers('ours-256')}"
    )


@figures("shared-budgets", QUALITY, "quality-model-20261128-092825")
def _(found: Any) -> Rows:
    arms = Arms(found)
    rows: Rows = []
    for policy in ("ours-{}", "ours-shared-budget-{}", "ours-layer-budgets-{}", "ours-{}-dense_layers 1"):
        cells: list[str | None] = [None]
        for budget in (128, 256):
            name = policy.format(budget)
            ratio = arms.over(name, f"ours-{budget}") if policy != "ours-{}" else ""
            cells += [arms.kib(name), arms.kl(name, 5), ratio, arms.answers(name)]
        rows.append(cells)
    return rows


@sentence(QUALITY, "quality-model-20261128-182111")
def _(found: Any) -> str:
    return "have KL {}, {} and {} at 64, 128 and 256".format(*(Arms(found).kl(f"ours-{b}") for b in (64, 128, 256)))


# -- docs/quality.md: the other evaluations ---------------------------------------------------------------------------

TASKS = [f"quality-tasks-20261128-{time}" for time in ("023700", "143426", "144125", "181247", "141145")]
RULER = [f"quality-ruler-20261128-{time}" for time in ("054637", "140435", "201047")]
RULER_QWEN = "quality-ruler-20261128-204831"
RULER_PROMPTS, RULER_QWEN_PROMPTS = "quality-ruler-prompts-20261129-100825", "quality-ruler-prompts-20261129-101438"


def _answers(*found: Any) -> list[Any]:
    from benchmarks.quality.scores import Answer

    return [Answer(**answer) for one in found for answer in one["answers"]]


def _scores(answers: list[Any]) -> dict[tuple[str, int], list[str]]:
    """Questions of each cell, then the score of dense and of each arm."""
    from benchmarks.quality.scores import DENSE, arms_in, cells_in, mean_score

    arms = [DENSE, *arms_in(answers)]
    return {
        cell: [
            str(sum(answer.arm == DENSE and answer.cell == cell for answer in answers)),
            *(percent(mean_score(answers, arm, cell)) for arm in arms),
        ]
        for cell in cells_in(answers)
    }


@figures("tasks", QUALITY, *TASKS)
def _(*found: Any) -> Rows:
    scores = _scores(_answers(*found))
    return [[task, f"{length:,}", *scores[task, length]] for task, length in sorted(scores, key=lambda cell: cell[1])]


@figures("ruler", QUALITY, *RULER, RULER_PROMPTS)
def _(*found: Any) -> Rows:
    from benchmarks.quality.scores import prompts_text, with_prompts

    answers = with_prompts(_answers(*found[:-1]), found[-1]["prompts"])
    scores = _scores(answers)
    cells = sorted(scores, key=lambda cell: cell[1])
    return [[cell[0], prompts_text(answers, cell), f"{cell[1]:,}", *scores[cell]] for cell in cells]


def _pooled(*found: Any) -> tuple[Any, Any]:
    from benchmarks.quality.scores import change, judged

    answers = _answers(*found)
    return tuple(change(answers, arm, judged(answers)) for arm in ("ours 256", "ours 512"))  # type: ignore[return-value]


@sentence(QUALITY, *TASKS, *RULER)
def _(*found: Any) -> str:
    small_budget, large = _pooled(*found)
    return (
        f"n = {large.samples}: {small_budget.points:+.1f} points against dense (95 % interval {small_budget.low:+.1f} to "
        f"{small_budget.high:+.1f}) at a budget of 256, {large.points:+.1f} ({large.low:+.1f} to {large.high:+.1f}) at 512"
    )


@sentence(README, *TASKS, *RULER)
def _(*found: Any) -> str:
    small_budget, large = _pooled(*found)
    return (
        f"(n = {large.samples}): {small_budget.points:+.1f} points against dense, 95 % interval {small_budget.low:+.1f} to "
        f"{small_budget.high:+.1f}, at a budget of 256, {large.points:+.1f} ({large.low:+.1f} to {large.high:+.1f}) at 512"
    )


@sentence(QUALITY, RULER_QWEN, RULER_QWEN_PROMPTS)
def _(found: Any, counted: Any) -> str:
    from benchmarks.quality.scores import prompts_text, with_prompts

    answers = with_prompts(_answers(found), counted["prompts"])
    right = [sum(answer.score for answer in answers if answer.arm == arm) for arm in ("dense", "ours 256")]
    tokens = prompts_text(answers, answers[0].cell)
    return "prompts of {} tokens: dense {:.0f} of 4, ours {:.0f} of 4 at a budget of 256".format(tokens, *right)


@figures("turns", QUALITY, "quality-turns-20261128-090357")
def _(found: Any) -> Rows:
    scores = list(_scores(_answers(found)).values())
    return [[None, *(line[1 + arm] for line in scores)] for arm in range(3)]


@figures("bf16", QUALITY, "quality-precision-20261128-024635")
def _(found: Any) -> Rows:
    return [[None, between(line["kl"], line["kl_interval"], 5), percent(line["same"], 1)] for line in found["lines"]]


def _drift_tables(found: Any) -> list[list[list[str]]]:
    """What the benchmark itself prints of a result."""
    from benchmarks.quality.drift import table

    blocks = [block.splitlines() for block in table(found).split("\n\n") if block.startswith("|")]
    return [[cells_of(line) for line in block[2:]] for block in blocks]


def _pointed(cell: str) -> str:
    """Without the zeros before points of numbers below one."""
    return re.sub(r"\b0(\.\d{5})", r"\1", cell)


@figures("drift", QUALITY, "quality-drift-20261128-093246")
def _(found: Any) -> Rows:
    return [
        [re.sub(r"\d{4}", lambda number: f"{int(number[0]):,}", cells[0]), *map(_pointed, cells[1:])]
        for cells in _drift_tables(found)[0]
    ]


@figures("drift-afresh", QUALITY, "quality-drift-20261128-093246")
def _(found: Any) -> Rows:
    return [[None, *map(_pointed, cells[1:])] for cells in _drift_tables(found)[1]]


@figures("layers", QUALITY, "quality-attention-20261128-084441")
def _(found: Any) -> Rows:
    import numpy as np

    rows: Rows = []
    for arm in found.values():
        error, mass = ([np.mean(part) for part in np.split(np.array(arm[key]), 5)] for key in ("error", "mass"))
        figures_of_arm = [np.mean(error), *error, np.mean(mass), mass[0], mass[-1]]
        rows.append([arm["policy"], str(arm["budget"]), *(small(float(value), 3) for value in figures_of_arm)])
    return rows


# -- docs/memory-measured.md ------------------------------------------------------------------------------------------

RECENCY = "quality-recency-20261129-140928"
NEAR = (
    "newest_2",
    "newest_4",
    "newest_8",
    "used_4",
    "last",
    "lru_1",
    "lru_2",
    "newest_4_or_lru_2",
    "newest_8_or_lru_2",
)


def _recency_lines(found: Any) -> list[tuple[str, int, Any]]:
    """(kind, budget, shares): of each kind, and of the steps of needles that predict a number, the small budget first."""
    lines = []
    for entry in found.values():
        lines.append((entry["kind"], entry["budget"], entry["shares"]))
        if entry["kind"] == "needles":
            lines.append(("needles: numbers", entry["budget"], entry["exact"]))
    return sorted(lines, key=lambda line: line[1])


@figures("recency", MEMORY, RECENCY)
def _(found: Any) -> Rows:
    return [
        [kind, str(budget), str(shares["steps"]), *(small(shares[name]["all"], 2) for name in NEAR)]
        for kind, budget, shares in _recency_lines(found)
    ]


@figures("recency-layers", MEMORY, RECENCY)
def _(found: Any) -> Rows:
    rows: Rows = []
    for kind, budget, shares in _recency_lines(found):
        for name, title in (("newest_4", "newest 1/4"), ("lru_2", "LRU 2"), ("newest_4_or_lru_2", "either")):
            parts = np.array_split(np.array(shares[name]["layers"]), 5)
            means = [small(float(part.mean()), 2) for part in parts]
            if budget == 512:
                rows.append([kind, title, *means, small(shares[name]["worst_tenth"], 2)])
    return rows


@figures("tier-model", MEMORY, RECENCY)
def _(found: Any) -> Rows:
    from benchmarks.tier_model import Model, hits_in, tier_table
    from sglang_clusterkv.config import ClusterKVConfig

    config = ClusterKVConfig()
    return [list(row) for row in tier_table(hits_in(found, config.budget_tokens), Model(), config)]


@figures("host-tier", MEMORY, "host-tier-20261129-141630")
def _(found: Any) -> Rows:
    rows: Rows = []
    for pair in zip(found["without"]["cells"], found["tier"]["cells"], strict=True):
        for arm, cell in zip(("without", "tier"), pair, strict=True):
            recalled = cell["recalled_host"] + cell["recalled_device"]
            read = (f"{cell[key] / 1e6:,.0f}" for key in ("host_read_decode", "host_read_prefill"))
            rows.append(
                [
                    str(cell["sessions"]),
                    arm,
                    f"{cell['later_first_s']:.2f}",
                    f"{cell['requests_per_s']:.3f}",
                    f"{cell['again']:,}",
                    percent(cell["again_share"]),
                    milliseconds(cell["token_ms"]),
                    ", ".join(read) if arm == "tier" else "-",
                    percent(cell["recalled_host"] / recalled) if recalled else "-",
                ]
            )
    return rows


@figures("host-tier-kl", MEMORY, "host-tier-kl-20261129-142828")
def _(found: Any) -> Rows:
    return [
        [*reversed(pair.split(", ")), f"{of_pair['kl']:.1e}", f"{of_pair['most']:.1e}", percent(of_pair["same"], 1)]
        for pair, of_pair in found["pairs"].items()
    ]


# -- the check --------------------------------------------------------------------------------------------------------


@cache
def _about(name: str, folder: Path) -> Any:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def measured(name: str, folder: Path) -> Any:
    """What a result has measured; the oldest files have nothing else."""
    about = _about(name, folder)
    return about.get("results", about)


@cache
def expected(name: str, folder: Path) -> Rows:
    """What a table must hold."""
    return TABLES[name].rows(*(measured(file, folder) for file in TABLES[name].files))


def cells_of(line: str) -> list[str]:
    """Of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.count("|") > 1 else []


class Table(NamedTuple):
    """A table of a document."""

    name: str | None  # None: no mark, "": not measured
    first: int  # line number of its first row below the head, from 0
    rows: list[list[str]]
    below: str  # the paragraph after it


def tables_of(text: str) -> Iterator[Table]:
    """All tables outside of code blocks."""
    lines = text.splitlines()
    code = False
    for i, line in enumerate(lines):
        code ^= line.startswith("```")
        if code or not re.fullmatch(r"\|(\s*:?-+:?\s*\|)+", line):
            continue
        end = next((j for j in range(i, len(lines)) if not lines[j].startswith("|")), len(lines))
        mark = MARK.match(lines[i - 2]) if i >= 2 else None
        below = "\n".join(lines[end:]).strip().split("\n\n")[0]
        yield Table(mark and (mark["name"] or ""), i + 1, [cells_of(row) for row in lines[i + 1 : end]], below)


def documents(root: Path) -> dict[str, str]:
    """README and docs by their name in the repository."""
    files = [root / README, *sorted((root / "docs").glob("*.md"))]
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for file in files}


def differing(table: Table, wanted: Rows) -> Iterator[tuple[int, int, str, str]]:
    """(row, column, printed, expected) of the cells that differ; row -1 where the shape does."""
    shape = [len(row) for row in table.rows]
    if shape != [len(row) for row in wanted]:
        yield -1, -1, f"rows of {shape} cells", f"rows of {[len(row) for row in wanted]}"
        return
    for i, (row, cells) in enumerate(zip(table.rows, wanted, strict=True)):
        for j, (printed, cell) in enumerate(zip(row, cells, strict=True)):
            if cell is not None and printed != cell:
                yield i, j, printed, cell


def check_figures(texts: dict[str, str], folder: Path = RESULTS) -> list[str]:
    """Cells and sentences that are not what their results say, and tables that do not say what they come from."""
    problems: list[str] = []
    missing = {(name, document) for name, figures_ in TABLES.items() for document in figures_.documents}
    for document in MEASURED:
        for table in tables_of(texts[document]):
            place = f"{document}:{table.first - 1}"
            if table.name is None:
                problems.append(f"{place}: a table without '<!-- figures: NAME -->' or '<!-- no figures -->' above it")
            elif table.name and (table.name, document) not in missing:
                problems.append(
                    f"{place}: benchmarks.cited has no figures '{table.name}' for this document, or it is there twice"
                )
            elif table.name:
                missing.remove((table.name, document))
                problems += _check_table(document, table, folder)
    problems += [f"{document}: no table '<!-- figures: {name} -->'" for name, document in sorted(missing)]
    for document, files, text in SENTENCES:
        wanted = text(*(measured(file, folder) for file in files))
        if wanted not in " ".join(texts[document].split()):
            problems.append(f"{document}: by {', '.join(files)} it must say: {wanted}")
    return problems


def _check_table(document: str, table: Table, folder: Path) -> Iterator[str]:
    assert table.name
    files = TABLES[table.name].files
    for i, j, printed, cell in differing(table, expected(table.name, folder)):
        place = f"{document}:{table.first + i + 1}" + (f", column {j + 1}" if j >= 0 else "")
        yield f"{place}: '{printed}' is printed, '{cell}' follows from {', '.join(files)}"
    if not table.below.startswith(CITES):
        yield f"{document}:{table.first - 1}: no paragraph '{CITES}...' below the table '{table.name}'"
    for file in files:
        if file not in NAME.findall(table.below):
            yield f"{document}:{table.first - 1}: the paragraph below the table '{table.name}' does not name {file}"


def check_citations(texts: dict[str, str], folder: Path = RESULTS) -> list[str]:
    """Citations without a file, and files without a citation."""
    cited = {(name, document) for document, text in texts.items() for name in NAME.findall(text)}
    pictures = {(name, document) for document, text in texts.items() for name in PICTURE.findall(text)}
    problems = [
        f"{document} cites {name}, of which {folder.name}/ has no {suffix}"
        for name, document in sorted(cited)
        for suffix in ("json", "md")
        if not (folder / f"{name}.{suffix}").exists()
    ]
    problems += [
        f"{document} shows {name}, which {folder.name}/ does not have"
        for name, document in sorted(pictures)
        if NAME.match(name) and not (folder / name).exists()
    ]
    names, shown = {name for name, _ in cited}, {name for name, _ in pictures}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".md") and file.stem in names:
            continue
        if file.name not in shown:
            problems.append(f"no document cites {file.name}")
    return problems


def check_age(texts: dict[str, str], folder: Path = RESULTS, code: str = CODE) -> list[str]:
    """Results of other code than this that are cited without a word of what changed since, or without their commit."""
    problems = []
    for document, text in texts.items():
        blocks = (" ".join(block.split()) for block in text.split("\n\n"))
        paragraphs = [block for block in blocks if block.startswith(CITES)]
        for name in sorted(set(NAME.findall(text))):
            if not (folder / f"{name}.json").exists():
                continue
            citing = [block for block in paragraphs if name in NAME.findall(block)]
            about = _about(name, folder)
            commit = about.get("commit")
            if not citing:
                problems.append(f"{document}: no paragraph '{CITES}...' names {name}")
            elif commit and not any(commit[:SHORT_COMMIT] in block for block in citing):
                problems.append(
                    f"{document}: the paragraph that names {name} does not name its commit, {commit[:SHORT_COMMIT]}"
                )
            elif about.get("code") != code and not any(SINCE in block for block in citing):
                problems.append(
                    f"{document}: {name} was not measured with this code, or names none: '{SINCE} ...' must say what changed"
                )
    return problems


def check(root: Path = ROOT) -> list[str]:
    """All of it."""
    texts, folder = documents(root), root / "benchmarks" / "results"
    return check_citations(texts, folder) + check_figures(texts, folder) + check_age(texts, folder)


def write(root: Path = ROOT) -> int:
    """Put the results' figures into the tables; how many cells changed."""
    changed = 0
    folder = root / "benchmarks" / "results"
    for document, text in documents(root).items():
        lines = text.splitlines()
        for table in tables_of(text):
            if not table.name or table.name not in TABLES:
                continue
            for i, j, _, cell in differing(table, expected(table.name, folder)):
                if i < 0:
                    continue
                row = cells_of(lines[table.first + i])
                row[j] = cell
                lines[table.first + i] = f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |")
                changed += 1
        (root / document).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return changed


def main() -> None:
    """Parse the command line, check or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the results' figures into the tables first")
    if parser.parse_args().write:
        print(f"{write()} cells written")
    problems = check()
    print("\n".join(problems) or f"{len(TABLES)} tables and {len(SENTENCES)} sentences are what their results say")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
