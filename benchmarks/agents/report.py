"""What was asked, as figures and as a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.agents.drive import Asked


def quantile(values: Sequence[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(round(share * len(ordered), 6)) - 1)]


def summary(asked: Sequence[Asked]) -> dict[str, Any]:
    """The figures of one run of sessions."""
    took = max(one.last for one in asked) - min(one.sent for one in asked)
    cached = [one.cached_tokens for one in asked]
    prompt = sum(one.prompt_tokens for one in asked)
    groups = {
        "first": [one for one in asked if one.turn == 0 and not one.sub_agent],
        "later": [one for one in asked if one.turn > 0],
        "sub_agents_first": [one for one in asked if one.turn == 0 and one.sub_agent],
    }
    turns = sorted({one.turn for one in asked if not one.sub_agent})
    return {
        "requests": len(asked),
        "duration_s": took,
        "requests_per_s": len(asked) / took,
        "answer_tokens": sum(one.tokens for one in asked),
        "prompt_tokens": prompt,
        "prefilled_tokens": None if None in cached else prompt - sum(count or 0 for count in cached),
        "first_token_s": {name: _spread([one.first_token_s for one in group]) for name, group in groups.items()},
        "first_token_s_by_turn": [
            _spread([one.first_token_s for one in asked if one.turn == turn and not one.sub_agent]) for turn in turns
        ],
        "token_ms": _spread([one.token_ms for one in asked if one.token_ms is not None]),
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": statistics.median(values), "p99": quantile(values, 0.99)}


def clustered_again(summed: dict[str, Any], clustered: int) -> int | None:
    """Tokens clustered beyond those that were computed, prompts' and answers': so many at least were clustered again."""
    if summed["prefilled_tokens"] is None:
        return None
    return max(0, clustered - summed["prefilled_tokens"] - summed["answer_tokens"])


def table(rows: Sequence[dict[str, Any]], base: str) -> str:
    """Markdown, sessions by sessions; ratios are to the arm `base` with as many."""
    lines = [
        "| sessions | server | requests/s | ratio | first token s: first turn, p50, p99 | later turns | sub-agents' first "
        "| ms/token p50, p99 | of prompts cached | clustered again | GB |",
        "|" + "---|" * 11,
    ]
    for count in dict.fromkeys(row["sessions"] for row in rows):
        alike = [row for row in rows if row["sessions"] == count]
        of_base = next((row for row in alike if row["arm"] == base), None)
        for row in alike:
            first = row["first_token_s"]
            ratio = f"{row['requests_per_s'] / of_base['requests_per_s']:.2f}" if of_base else "-"
            prefilled, again = row["prefilled_tokens"], row.get("clustered_again")
            cached = "-" if prefilled is None else f"{100 * (1 - prefilled / row['prompt_tokens']):.0f} %"
            lines.append(
                f"| {count} | {row['arm']} | {row['requests_per_s']:.3f} | {ratio} | {_pair(first['first'], 2)} "
                f"| {_pair(first['later'], 2)} | {_pair(first['sub_agents_first'], 2)} | {_pair(row['token_ms'], 0)} "
                f"| {cached} | {'-' if again is None else format(again, ',')} | {_memory(row)} |"
            )
    return "\n".join(lines)


def _pair(spread: dict[str, float] | None, digits: int) -> str:
    return "-" if spread is None else f"{spread['p50']:.{digits}f}, {spread['p99']:.{digits}f}"


def _memory(row: dict[str, Any]) -> str:
    return f"{row['memory_bytes'] / 1e9:.1f}" if row.get("memory_bytes") else "-"
