"""A layer of a sparse step as a CUDA graph: what its replay gives is what the launches give, bit by bit, a thousand times.

    python -m benchmarks.gpu.graphs [--dry]

Kernels whose programs raced would differ now and then; the interpreter, which runs one program after another, cannot tell.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.dry import DryClock, stop_before_launches
from benchmarks.gpu.figures import Figure, main
from benchmarks.gpu.operations import DRY_SHAPE
from benchmarks.kernel_scene import SHAPES, make_scene
from benchmarks.kernels_cuda import whole_step
from sglang_clusterkv.config import ClusterKVConfig

REPLAYS = 1000
CELLS = ((1, 32768), (8, 8192))


def measure(dry: bool) -> list[Figure]:
    """How many of the replays differed from the launches, for each cell."""
    torch.set_grad_enabled(False)
    config = ClusterKVConfig(dense_below="never")
    if dry:
        clock = DryClock()
        stop_before_launches(clock)
        scene = make_scene(config, DRY_SHAPE, 1, 2, 1200, torch.bfloat16, "cpu")
        whole_step(scene)(0)
        return [Figure("launches that would have been made", clock.launches, "")]
    figures = []
    for batch, context in CELLS:
        scene = make_scene(config, SHAPES["llama-3.1-8b"], 1, batch, context, torch.bfloat16, "cuda")
        layer = whole_step(scene)
        expected = layer(0).clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(0)
        differed = torch.zeros((), dtype=torch.int64, device="cuda")
        for _ in range(REPLAYS):
            output.zero_()
            graph.replay()
            differed += (output != expected).any()
        name = f"replays that differ, of {REPLAYS}, {batch} x {context:,}"
        figures.append(Figure(name, float(differed.item()), "", 0.0))
    assert not any(one.measured for one in figures), figures
    return figures


if __name__ == "__main__":
    main(__doc__ or "", measure)
