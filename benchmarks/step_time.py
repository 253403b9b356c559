"""Predicted times of decode steps of Llama-3.1-8B on an H200, as docs/gpu.md has them.

    python -m benchmarks.step_time                            # the table
    python -m benchmarks.step_time --launches                 # and each launch
    python -m benchmarks.step_time --set candidate_tokens 1024 # with another configuration

prints, per layer, a dense step's attention and a sparse one's by bytes alone (`step_model.py`), by the instructions' floor and
as is likely (`step_time.py`), and how many times faster the whole step is by each.
"""

from __future__ import annotations

import argparse
import json

from sglang_clusterkv.config import ClusterKVConfig, ConfigError, parse_config
from sglang_clusterkv.kernels.step_model import StepShape, sparse_launches
from sglang_clusterkv.kernels.step_time import dense_us, layer_time, sparse_times, speedup

CELLS = ((1, 8), (8, 8), (28, 8), (1, 32), (8, 32), (28, 32), (1, 128), (6, 128))  # requests, thousands of tokens
TBS = 4.8


def shape_of(batch: int, thousands: int) -> StepShape:
    """Llama-3.1-8B."""
    return StepShape(layers=32, heads=32, kv_heads=8, head_dim=128, batch=batch, context=1024 * thousands)


def table(config: ClusterKVConfig, *, launches: bool = False) -> str:
    """The table as Markdown; launches: with the likely time of each launch."""
    lines = [
        "| requests x tokens | dense, us | by bytes, us (x) | floor, us (x) | likely, us (x) |"
        + (" likely, by launch |" if launches else ""),
        "|---|---|---|---|---|" + ("---|" if launches else ""),
    ]
    for batch, thousands in CELLS:
        shape = shape_of(batch, thousands)
        time = layer_time(shape, config)
        by_bytes = sum(launch.microseconds(TBS) for launch in sparse_launches(shape, config))
        cells = " | ".join(f"{us:.0f} ({speedup(shape, us):.2f})" for us in (by_bytes, *time))
        by_launch = " ".join(f"{name.split()[-1]} {t.likely:.0f}" for name, t in sparse_times(shape, config).items())
        lines.append(
            f"| {batch} x {thousands}k | {dense_us(shape):.0f} | {cells} |" + (f" {by_launch} |" if launches else "")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", action="store_true", help="with each launch")
    parser.add_argument(
        "--set",
        nargs=2,
        action="append",
        default=[],
        metavar=("OPTION", "VALUE"),
        help="of the configuration, as in JSON",
    )
    options = parser.parse_args(arguments)
    try:
        config = parse_config("{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in options.set) + "}")
    except ConfigError as error:
        parser.error(str(error))
    print(table(config, launches=options.launches))


if __name__ == "__main__":
    main()
