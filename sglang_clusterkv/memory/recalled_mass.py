"""Recalled mass by groups of layers: the accumulators of `ClusterIndex.mass`, as means.

The recalled mass is defined in `kernels/merge/reference.py`. Layers differ a lot in it (the first ones attend evenly, most
later ones to a few tokens), so one number for all of them would hide what matters; a number for each layer is too much to
look at.
"""

from __future__ import annotations

import numpy as np

MOST_GROUPS = 4


def layer_groups(layers: int, first_layer: int = 0) -> dict[str, slice]:
    """Up to four groups of consecutive layers, of one size but for the last, which may be smaller.

    Args:
        layers: of this rank.
        first_layer: the model's number of this rank's first layer.

    Returns:
        Label ("0-7", or "4" for a single layer), in the model's numbers -> the group's layers, counted from this rank's
        first.
    """
    size = max(1, -(-layers // MOST_GROUPS))
    groups = {}
    for begin in range(0, layers, size):
        end = min(begin + size, layers)
        first, last = first_layer + begin, first_layer + end - 1
        groups[str(first) if first == last else f"{first}-{last}"] = slice(begin, end)
    return groups


def mean_by_group(mass: np.ndarray, first_layer: int = 0) -> dict[str, float]:
    """Mean recalled mass of each group of layers.

    Args:
        mass: float64 [layers, 2], sums and counts as in `ClusterIndex.mass`, or a difference of two of them.
        first_layer: the model's number of this rank's first layer.

    Returns:
        Label -> mean in [0, 1]; without the groups none of whose layers decoded sparsely.
    """
    totals = {label: mass[group].sum(0) for label, group in layer_groups(len(mass), first_layer).items()}
    return {label: float(total / count) for label, (total, count) in totals.items() if count > 0}
