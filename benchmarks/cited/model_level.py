"""The tables of README and docs/quality.md that benchmarks.quality.model_level measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.cited.numbers import between, loss, over, percent, small
from benchmarks.cited.tables import QUALITY, README, Rows, figures, sentence

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


THREE_DOCUMENTS = "quality-model-20261129-132212"
WITHOUT_CAP = "quality-model-20261128-211030"  # the same documents before the estimate's spread had a cap
DEFAULT_NOW = "quality-model-20261130-090402"
ALL_POLICIES = "quality-model-20261129-141451"
SOURCE_CODE, DIGITS = "quality-model-20261129-142131", "quality-model-20261129-143011"
QWEN, QWEN_NOW = "quality-model-20261128-211655", "quality-model-20261130-110603"
OTHER_MASSES = "quality-model-20261128-165418"
TWO_LEVELS = "quality-model-20261128-133903"
VALUES_INSIDE = "quality-model-20261128-162545"


@figures("readme-quality", README, DEFAULT_NOW, THREE_DOCUMENTS)
def _(now: Any, before: Any) -> Rows:
    ours, others = Arms(now), Arms(before)
    return [
        [None, *(f"{arms.kl(name.format(b), digits)}, {arms.share(name.format(b))}" for b in (128, 256, 512))]
        for arms, name, digits in (
            (ours, "ours-{}", 5),
            (others, "published-equal-bytes-{}", 3),
            (others, "oracle-{}", 4),
        )
    ]


@figures("readme-qwen", README, QWEN_NOW, QWEN)
def _(now: Any, others: Any) -> Rows:
    return [
        [None, *(f"{arms.kl(name, digits)}, {_found(arms.lines[name])}" for name in names)]
        for arms, digits, names in (
            (Arms(now), 4, [f"ours-{budget}" for budget in (128, 256, 512)]),
            (Arms(others), 3, [f"published-equal-bytes-{budget}" for budget in (128, 256, 512)]),
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
    return [[None, *policy_row(arms, name)] for name in [*others[:first], *names, *others[first:]]]


def policy_row(arms: Arms, name: str) -> list[str]:
    """All that is told of an arm beside its policy."""
    line = arms.lines[name]
    kl = "{:.5f} ({:.5f} to {:.5f})".format(line["kl"], *line["kl_interval"])
    ratio = over(line["over_ours"]) or "-"
    same, answers, right, perplexity = arms.tail(name)
    answers = f"{line['answer_kl']:.4f}"
    return [str(line["budget"]), arms.kib(name), arms.share(name), kl, ratio, same, answers, right, perplexity]


@figures("qwen", QUALITY, QWEN_NOW, QWEN)
def _(now: Any, others: Any) -> Rows:
    ours, rest = Arms(now), Arms(others)
    rows: Rows = []
    for arms, policy in ((ours, "ours"), (rest, "oracle"), (rest, "published-equal-bytes")):
        for budget in (128, 256, 512):
            name = f"{policy}-{budget}"
            ratio = "" if arms is ours else rest.over(name, f"ours-{budget}", ours)
            line = [str(arms.lines[name]["budget"]), arms.kib(name), arms.share(name), arms.kl_interval(name), ratio]
            rows.append([None, *line, *arms.tail(name)])
    return rows


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


@figures("outliers", QUALITY, "quality-model-20261128-213926", WITHOUT_CAP)
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


def _caps(found: Any, *names: str) -> Rows:
    lines = Arms(found).lines
    rows: Rows = []
    for name in names:
        line = lines[name]
        ratio = "" if name == "ours-256" else over(line["over_ours"])
        rows.append([None, between(line["kl"], line["kl_interval"], 5), ratio, small(line["answer_kl"])])
    return rows


@figures("sharp-heads", QUALITY, "quality-model-20261129-104201")
def _(found: Any) -> Rows:
    return _caps(found, "ours-cap-1-256", "ours-256", "ours-cap-4-256", "ours-no-cap-256", "ours-choice-cap-256")


@figures("sharp-heads-qwen", QUALITY, "quality-model-20261129-150920")
def _(found: Any) -> Rows:
    return _caps(found, "ours-256", "ours-cap-4-256", "ours-no-cap-256")


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


@figures("own-mean-values", QUALITY, WITHOUT_CAP, OTHER_MASSES, TWO_LEVELS)
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


@sentence(QUALITY, "quality-model-20261128-174705", WITHOUT_CAP)
def _(moving: Any, now: Any) -> str:
    arms, ours, name = Arms(moving), Arms(now, document=0), "ours-moving-values-rank-8-256"
    return (
        f"On document 1 rank 8 has {arms.kl(name, 5)} for {ours.kl('ours-256', 5)}, {arms.over(name, 'ours-256', ours)}, "
        f"and Q {arms.answers(name)} for {ours.answers('ours-256')}"
    )


@figures("moving-values", QUALITY, "quality-model-20261130-033301")
def _(found: Any) -> Rows:
    arms = Arms(found)
    rows: Rows = []
    for budget in ("256", "512"):
        still, moving = f"ours-{budget}-moving_values never", f"ours-{budget}"
        sides = [[arms.kib(name), arms.kl_interval(name), arms.answers(name)] for name in (still, moving)]
        sides[1].insert(2, arms.over(moving, still))
        rows.append([budget, *sides[0], *sides[1]])
    return rows


@figures("default-now", QUALITY, DEFAULT_NOW, THREE_DOCUMENTS)
def _(now: Any, before: Any) -> Rows:
    arms, then = Arms(now), Arms(before)
    rows: Rows = []
    for budget in (128, 256, 512):
        name = f"ours-{budget}"
        sides = [[each.kib(name), each.kl_interval(name), each.answers(name)] for each in (then, arms)]
        sides[1].insert(2, arms.over(name, name, then))
        rows.append([f"{budget:,}", *sides[0], *sides[1]])
    return rows


@figures("values-and-codes", QUALITY, "quality-model-20261130-034413")
def _(found: Any) -> Rows:
    arms = Arms(found)
    neither, codes = "-moving_values never, estimate_codes False", "-moving_values never"
    rows: Rows = []
    for change in (neither, "-estimate_codes False", codes, ""):
        cells: list[str | None] = [None, arms.kib(f"ours-256{change}")]
        for budget in (256, 512):
            name = f"ours-{budget}{change}"
            ratio = arms.over(name, f"ours-{budget}{neither}") if change != neither else ""
            cells += [arms.kl_interval(name), ratio, arms.answers(name)]
        rows.append(cells)
    return rows


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
