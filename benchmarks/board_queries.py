"""The queries of docs/grafana.json, evaluated over scraped samples: as much of PromQL as the board uses.

    aggregation by (labels) (rate(series{matchers}[$__rate_interval])), or of the series itself, or of its increase;
    histogram_quantile(q, ...), one / another, ... > number

The board's variables are all models and instances, and rank 0. A query of another form is an error, so that a picture never
shows less than the board.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]  # sorted by name
Vector = dict[Labels, float]

VARIABLES = {"$model": ".*", "$instance": ".*", "$rank": "0"}
AGGREGATIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "avg": lambda values: sum(values) / len(values),
    "min": min,
    "max": max,
}
TOKEN = re.compile(r"\s*([A-Za-z_][\w:]*|\d+(?:\.\d+)?|\{[^}]*\}|\[[^\]]*\]|[()/>,])")
MATCHER = re.compile(r'(\w+)=~"([^"]*)"')


class Scrape(NamedTuple):
    """What one reading of /metrics had."""

    at_s: float
    values: dict[str, Vector]  # by series


def read_scrape(text: str, at_s: float) -> Scrape:
    """A reading of /metrics in Prometheus' text format, with its time."""
    values: dict[str, Vector] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = float(sample.value)
    return Scrape(at_s, values)


class Query:
    """A query over scrapes.

    Args:
        text: of the board.
        scrapes: ascending in time.
        interval_s: that rates and increases are over.

    Raises:
        ValueError: the query has a form that the board did not use yet.
    """

    def __init__(self, text: str, scrapes: list[Scrape], interval_s: float) -> None:
        self._text, self._scrapes, self._interval_s = text, scrapes, interval_s
        self._tokens: list[str] = []
        at = 0
        while at < len(text.rstrip()):
            if (match := TOKEN.match(text, at)) is None:
                raise ValueError(f"{text[at:]!r} of the query {text!r} is of no form that is known here")
            self._tokens.append(match[1])
            at = match.end()

    def at(self, number: int) -> Vector:
        """Its value at the time of a scrape."""
        rest = iter([*self._tokens, ""])
        self._now, self._next = number, next(rest)
        self._rest = rest
        value = self._term()
        if self._next == "/":
            self._take()
            divisor = self._term()
            value = {labels: v / divisor[labels] for labels, v in value.items() if divisor.get(labels)}
        if self._next == ">":
            self._take()
            least = float(self._take())
            value = {labels: v for labels, v in value.items() if v > least}
        self._expect("")
        return value

    def over_time(self) -> dict[Labels, list[tuple[float, float]]]:
        """Its lines: (seconds since the first scrape, value), where it has one."""
        lines: dict[Labels, list[tuple[float, float]]] = {}
        for number, scrape in enumerate(self._scrapes):
            for labels, value in self.at(number).items():
                if math.isfinite(value):
                    lines.setdefault(labels, []).append((scrape.at_s - self._scrapes[0].at_s, value))
        return lines

    def _take(self) -> str:
        taken, self._next = self._next, next(self._rest, "")
        return taken

    def _expect(self, token: str) -> None:
        if self._take() != token:
            raise ValueError(f"the query {self._text!r} is of no form that is known here: {token!r} was expected")

    def _term(self) -> Vector:
        name = self._take()
        if name == "histogram_quantile":
            self._expect("(")
            share = float(self._take())
            self._expect(",")
            buckets = self._term()
            self._expect(")")
            return quantile(share, buckets)
        if name not in AGGREGATIONS:
            raise ValueError(f"the query {self._text!r} begins with {name!r}, which is not known here")
        by: list[str] = []
        if self._next == "by":
            self._take()
            self._expect("(")
            by = [label for label in iter(self._take, ")") if label != ","]
        self._expect("(")
        inner = self._inner()
        self._expect(")")
        groups: dict[Labels, list[float]] = {}
        for labels, value in inner.items():
            groups.setdefault(tuple(pair for pair in labels if pair[0] in by), []).append(value)
        return {labels: AGGREGATIONS[name](values) for labels, values in groups.items()}

    def _inner(self) -> Vector:
        name = self._take()
        if name not in ("rate", "increase"):
            return self._selected(name, self._take(), self._now)
        self._expect("(")
        series, matchers = self._take(), self._take()
        self._expect("[$__rate_interval]")
        self._expect(")")
        first = next(n for n in range(self._now + 1) if self._seconds(n) <= self._interval_s + 1e-6)
        now, before = self._selected(series, matchers, self._now), self._selected(series, matchers, first)
        seconds = self._seconds(first)
        over = seconds if name == "rate" else 1.0
        return {
            labels: (value - before[labels]) / over for labels, value in now.items() if labels in before and seconds
        }

    def _seconds(self, number: int) -> float:
        """Since a scrape, until now."""
        return self._scrapes[self._now].at_s - self._scrapes[number].at_s

    def _selected(self, series: str, matchers: str, number: int) -> Vector:
        wanted = [(label, VARIABLES[pattern]) for label, pattern in MATCHER.findall(matchers)]
        return {
            labels: value
            for labels, value in self._scrapes[number].values.get(series, {}).items()
            if all(re.fullmatch(pattern, dict(labels).get(label, "")) for label, pattern in wanted)
        }


def quantile(share: float, buckets: Vector) -> Vector:
    """Of a histogram whose buckets have a label `le`, linear within a bucket; without one where nothing was counted."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in buckets.items():
        others = tuple(pair for pair in labels if pair[0] != "le")
        groups.setdefault(others, []).append((float(dict(labels)["le"]), value))
    return {labels: found for labels, group in groups.items() for found in _quantile(share, sorted(group))}


def _quantile(share: float, buckets: list[tuple[float, float]]) -> Iterator[float]:
    total = buckets[-1][1]
    if total <= 0:
        return
    low, below = 0.0, 0.0
    for high, count in buckets:
        if count >= share * total:
            yield low if math.isinf(high) else low + (high - low) * (share * total - below) / max(count - below, 1e-12)
            return
        low, below = high, count


def lines_of(panel: dict[str, Any], scrapes: list[Scrape], interval_s: float) -> dict[str, list[tuple[float, float]]]:
    """A panel's lines by the names of its legend."""
    found = {}
    for target in panel["targets"]:
        for labels, line in Query(target["expr"], scrapes, interval_s).over_time().items():
            name = target["legendFormat"]
            for label, value in labels:
                name = name.replace(f"{{{{{label}}}}}", value)
            found[name] = line
    return found
