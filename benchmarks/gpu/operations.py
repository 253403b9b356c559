"""Each operation of a decode step alone, the whole step, and dense attention, at Llama-3.1-8B's shape.

python -m benchmarks.gpu.operations [--dry]
"""

from __future__ import annotations

import torch

from benchmarks import kernels, kernels_cuda
from benchmarks.gpu.dry import DryClock, stop_before_launches
from benchmarks.gpu.figures import Figure, main
from benchmarks.kernel_scene import SHAPES, STEP, Clock, CudaClock, Shape, copy_gbps, make_scene
from benchmarks.kernels import Cell
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import BANDWIDTHS_TBS

H200 = len(BANDWIDTHS_TBS) - 1  # its place among the model's bandwidths
CELLS = [Cell(b, n) for n in (32768, 8192) for b in (1, 8, 28)] + [Cell(1, 131072), Cell(6, 131072)]
REPEATS = 20
DRY_SHAPE = Shape(layers=2, heads=8, kv_heads=2, head_dim=128)


def measure(dry: bool) -> list[Figure]:
    """Milliseconds per step, all layers, of each cell; the cells most wanted first, should time run out."""
    torch.set_grad_enabled(False)
    config = ClusterKVConfig(dense_below="never")
    clock: Clock = CudaClock() if not dry else DryClock()
    if isinstance(clock, DryClock):
        stop_before_launches(clock)
    device, shape = ("cpu", DRY_SHAPE) if dry else ("cuda", SHAPES["llama-3.1-8b"])
    bandwidth = copy_gbps(clock, device)
    figures = [Figure("copy, read and written", bandwidth, "GB/s", 1000 * BANDWIDTHS_TBS[H200])]
    for cell in [Cell(2, 1200)] if dry else CELLS:
        scene = make_scene(config, shape, 2 if dry else 1, cell.batch, cell.context, torch.bfloat16, device)
        where = f"{cell.batch} x {cell.context:,}"
        model = kernels_cuda.model_ms(scene)
        operations, step = kernels_cuda.operations(scene), kernels_cuda.whole_step(scene)
        dense = {} if dry else kernels_cuda.dense_steps(scene)

        def ms(call: kernels_cuda.Attention, scene: kernels.Scene = scene) -> float:
            return shape.layers * kernels.per_layer_ms(call, scene, clock, REPEATS)

        for i, operation in enumerate(operations):
            for earlier in operations[:i]:
                earlier.call(0)
            predicted = model.get(operation.name, [None] * len(BANDWIDTHS_TBS))[H200]
            took = ms(operation.call)
            figures.append(Figure(f"{operation.name}, {where}", took, "ms", predicted))
            if operation.moved_bytes and took > 0:
                gbps = shape.layers * operation.moved_bytes / took / 1e6
                figures.append(Figure(f"{operation.name}, {where}", gbps, "GB/s"))
        figures.append(Figure(f"{STEP}, {where}", ms(step), "ms", model[STEP][H200]))
        for name, attention in dense.items():
            predicted = model.get(name, [None] * len(BANDWIDTHS_TBS))[H200]
            figures.append(Figure(f"{name}, {where}", ms(attention), "ms", predicted))
        del scene, operations, step, dense
    if isinstance(clock, DryClock):
        figures.append(Figure("launches that would have been made", clock.launches, ""))
    return figures


if __name__ == "__main__":
    main(__doc__ or "", measure)
