"""The tables of docs/quality.md that benchmarks.quality.layerwise measured."""

from __future__ import annotations

from typing import Any

from benchmarks.cited.model_level import Arms, policy_row
from benchmarks.cited.numbers import percent
from benchmarks.cited.tables import QUALITY, Rows, figures

FORMATS = "quality-layerwise-20261130-000804"
ANCHORS = "quality-layerwise-20261130-160046"
ANCHORS_QWEN = "quality-layerwise-20261130-154455"
LONG, LONG_OPTIONS = "quality-layerwise-20261130-190048", "quality-layerwise-20261130-183558"
DEFAULT_QWEN, DEFAULT_QWEN_SMALL = "quality-layerwise-20261130-125109", "quality-layerwise-20261130-114917"

ORDER = (
    "ours-256",
    "ours-256-candidate_tokens 1024",
    "ours-margin-4-256",
    "ours-margin-2-256",
    "ours-recalled-2-256",
    "ours-recalled-2-alike-80-256",
    "ours-recalled-2-alike-90-256",
    "ours-candidates-2-256",
    "ours-1-bit-256",
    "ours-second-look-256",
    "ours-cluster-scales-256",
    "ours-16-tokens-256",
    "ours-3-bit-turned-centroids-256",
    "ours-shared-values-256",
    "ours-8-bit-vectors-256",
    "ours-shared-last-256",
    "ours-left-values-256",
    "ours-codes-in-estimate-256",
    "ours-rank-8-256",
    "ours-codes-rank-8-256",
    "ours-8-percent-256",
    "ours-8-percent-codes-256",
)


@figures("formats", QUALITY, FORMATS)
def _(found: Any) -> Rows:
    from benchmarks.quality.layerwise import index_share

    arms, base = Arms(found), "ours-256"
    rows: Rows = []
    for name in ORDER:
        line = arms.lines[name]
        counts = found["documents"][0]["arms"][name]["counts"]
        # Of this file: without values that move and codes, as the defaults were.
        policy = "ours-tables" if line["policy"] == "ours" else line["policy"]
        rows.append(
            [
                None,
                percent(index_share(policy, 128), 1),
                arms.kib(name),
                f"{counts['candidates']:,.0f}",
                f"{counts['chosen']:.2f}",
                arms.kl_interval(name),
                arms.over(name, base) if name != base else "",
                arms.answers(name),
            ]
        )
    return rows


def _anchors(found: Any) -> Rows:
    arms = Arms(found)
    policies = ("ours", "vattention-equal-bytes", "pq-hsa-equal-bytes", "double-p-equal-bytes")
    names = [f"{policy}-{budget}" for policy in policies for budget in (256, 512)]
    return [[None, *policy_row(arms, name)] for name in names]


@figures("anchors", QUALITY, ANCHORS)
def _(found: Any) -> Rows:
    return _anchors(found)


@figures("anchors-qwen", QUALITY, ANCHORS_QWEN)
def _(found: Any) -> Rows:
    return _anchors(found)


@figures("default-qwen", QUALITY, DEFAULT_QWEN, DEFAULT_QWEN_SMALL)
def _(found: Any, first: Any) -> Rows:
    rows: Rows = []
    for one, budget in ((first, 128), (found, 256), (found, 512)):
        arms, before, now = Arms(one), f"ours-before-{budget}", f"ours-{budget}"
        sides = [[arms.kib(name), arms.kl_interval(name), arms.answers(name)] for name in (before, now)]
        sides[1].insert(2, arms.over(now, before))
        rows.append([None, *sides[0], *sides[1]])
    return rows


@figures("long", QUALITY, LONG, LONG_OPTIONS)
def _(found: Any, options: Any) -> Rows:
    arms, others = Arms(found), Arms(options)
    policies = ("ours", "oracle", "vattention-equal-bytes", "published-equal-bytes")
    rows: Rows = [[None, *policy_row(arms, f"{policy}-{budget}")] for policy in policies for budget in (256, 512)]
    return rows + [[None, *policy_row(others, name)] for name in others.lines if name != "ours-256"]
