"""Where a sparse step on a GPU pays, by the model of its time, and what the rule of `dense_below: auto` makes of it.

    python -m benchmarks.break_even

For numbers of (request, kv head): the context from which a sparse layer is likely faster than a dense one, as the bytes that
the dense one reads of keys and values, beside those that `sglang_clusterkv/kernels/break_even.py` asks for. Below: how much
slower than dense the slowest step is that the rule lets be sparse, and how much faster the fastest that it lets be dense would
be, the weights of Llama-3.1-8B included.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.break_even import MODELLED, BreakEven
from sglang_clusterkv.kernels.step_model import StepShape
from sglang_clusterkv.kernels.step_time import dense_us, layer_time, speedup

HEADS = (8, 4, 2)  # kv heads of a rank of Llama-3.1-8B: alone, and in tensor parallelism
BATCHES = (1, 2, 4, 8, 16, 28, 64)
CONTEXTS = range(2048, 131073, 2048)


class Step(NamedTuple):
    """One batch of equally long requests."""

    pairs: int
    covered_bytes: int  # of keys and values of a layer
    ratio: float  # a dense layer's time over a likely sparse one's
    speedup: float  # the same of whole steps


def steps(heads: int, batch: int, config: ClusterKVConfig) -> Iterator[Step]:
    """Steps of growing contexts."""
    for context in CONTEXTS:
        shape = StepShape(32, 4 * heads, heads, 128, batch, context)
        likely = layer_time(shape, config).likely
        covered = batch * context * heads * 2 * shape.row_bytes
        yield Step(shape.pairs, covered, dense_us(shape) / likely, speedup(shape, likely))


def least_bytes(found: list[Step]) -> int | None:
    """Bytes of the first step that pays; None: none does."""
    return next((step.covered_bytes for step in found if step.ratio >= 1), None)


def worst(found: list[Step], rule: BreakEven) -> tuple[float, float]:
    """Of steps that the rule lets be sparse the least speed-up, and of those that it makes dense the largest."""
    sparse = [step.speedup for step in found if rule.pays(step.pairs, step.covered_bytes)]
    dense = [step.speedup for step in found if not rule.pays(step.pairs, step.covered_bytes)]
    return min(sparse, default=1.0), max(dense, default=1.0)


def main() -> None:
    """Print the table and the two ratios."""
    config = ClusterKVConfig()
    everything: list[Step] = []
    print(f"{'kv heads':>8} {'batch':>6} {'pairs':>6} {'pays from, MB':>14} {'the rule, MB':>13}")
    for heads in HEADS:
        for batch in BATCHES:
            found = list(steps(heads, batch, config))
            pairs, least = found[0].pairs, least_bytes(found)
            rule = max(MODELLED.least_bytes, MODELLED.bytes_per_pair * pairs) / 1e6
            said = "-" if least is None else f"{least / 1e6:.0f}"
            print(f"{heads:>8} {batch:>6} {pairs:>6} {said:>14} {rule:>13.0f}")
            everything += found
    slowest, fastest = worst(everything, MODELLED)
    print(f"slowest sparse step: {slowest:.3f} of dense's speed; fastest that is left dense: {fastest:.3f} by sparse")


if __name__ == "__main__":
    main()
