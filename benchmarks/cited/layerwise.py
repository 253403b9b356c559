"""The tables of docs/quality.md that benchmarks.quality.layerwise measured."""

from __future__ import annotations

from typing import Any

from benchmarks.cited.model_level import Arms
from benchmarks.cited.numbers import percent
from benchmarks.cited.tables import QUALITY, Rows, figures

FORMATS = "quality-layerwise-20261130-000804"

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
        rows.append(
            [
                None,
                percent(index_share(line["policy"], 128), 1),
                arms.kib(name),
                f"{counts['candidates']:,.0f}",
                f"{counts['chosen']:.2f}",
                arms.kl_interval(name),
                arms.over(name, base) if name != base else "",
                arms.answers(name),
            ]
        )
    return rows
