"""How the documents print figures."""

from __future__ import annotations

from collections.abc import Sequence


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
