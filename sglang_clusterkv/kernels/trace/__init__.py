"""What the layers of a step read of its traced requests, by share of the mass and by position: chosen by device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_clusterkv.kernels.trace import reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_clusterkv.memory.index import ClusterIndex
    from sglang_clusterkv.memory.step import SparseStep


def looks(index: ClusterIndex, step: SparseStep, requests: Sequence[reference.Traced]) -> reference.Looks:
    """A step with traced requests begins; see `reference.Looks`."""
    if step.pages.device.type == "cpu":
        from sglang_clusterkv.kernels.trace import cpu

        return cpu.CpuLooks(index, step, requests)
    return reference.Looks(index, step, requests)
