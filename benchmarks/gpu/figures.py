"""What a part found, as JSON and as lines."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured figure.

    Attributes:
        name: of what was measured, with its condition.
        measured: the figure; NaN in a dry run.
        unit: of both.
        predicted: by the model; None: it says nothing of it.
    """

    name: str
    measured: float
    unit: str
    predicted: float | None = None


def lines(figures: Iterable[Figure]) -> list[str]:
    """A line for each, the prediction beside the figure."""

    def text(value: float | None) -> str:
        if value is None or math.isnan(value):
            return "-"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"

    rows = [(one.name, text(one.measured), text(one.predicted), one.unit) for one in figures]
    width = max((len(name) for name, *_ in rows), default=0)
    return [f"{name:{width}}  {got:>9} {said:>9} predicted  {unit}" for name, got, said, unit in rows]


def main(description: str, measure: Callable[..., list[Figure]], of: tuple[str, ...] = ()) -> None:
    """The command line of a part: run it, print its figures and write them.

    Args:
        description: of the part.
        measure: gives the figures, called with one of `of` where there are any and whether the run is dry. An exception of it
            fails the part.
        of: what may be measured; one of them is named on the command line.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if of:
        parser.add_argument("what", choices=of)
    parser.add_argument("--dry", action="store_true", help="without a GPU, up to the launches")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    figures = measure(options.what, options.dry) if of else measure(options.dry)
    print("\n".join(lines(figures)), flush=True)
    if options.out:
        written: list[dict[str, Any]] = [
            one._asdict() | {"measured": None if math.isnan(one.measured) else one.measured} for one in figures
        ]
        options.out.write_text(json.dumps(written, indent=1))
