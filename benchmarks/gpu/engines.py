"""Exact attention over recalled tokens, by our kernel and by FlashInfer: is it the same, and which is faster at which size?

    python -m benchmarks.gpu.engines [--dry]

From this table `attend_engine: auto` is to be decided. FlashInfer runs as in decode graphs: its own merge of parts is in its
time, and our launch that lists what it reads; ours is merged with the estimate in any case. It reads the always-attended keys
a second time.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from benchmarks import kernels_cuda
from benchmarks.gpu.dry import DryClock, stop_before_launches
from benchmarks.gpu.figures import Figure, main
from benchmarks.gpu.operations import DRY_SHAPE, H200
from benchmarks.kernel_scene import PAGE_SIZE, SHAPES, Clock, CudaClock, Scene, make_scene
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.flashinfer import FlashInferAttend
from sglang_clusterkv.kernels.decode.triton import decoder_of
from sglang_clusterkv.kernels.step_model import BANDWIDTHS_TBS, StepShape, flashinfer_launches
from sglang_clusterkv.memory.step import ListShape

CONTEXT = 4096
BATCHES = (1, 2, 4, 8, 16, 28, 64)  # of 8 kv heads: 8 to 512 lists
BUDGETS = (512, 1024)
REPEATS = 50
MOST_DIFFERENCE = 0.02  # of outputs of about 1 in bf16


def flashinfer_of(scene: Scene) -> FlashInferAttend:
    """FlashInfer, planned for the scene's step, as a captured one."""
    shape, index, step, budget = scene.shape, scene.engine.index, scene.step, scene.config.budget_tokens
    engine = FlashInferAttend(shape.kv_heads, shape.group, shape.head_dim, scene.dtype, index.device)
    assert step.lengths is not None
    listed = int(step.lengths[:, 0].sum())
    engine.reserve(ListShape(step.batch, 0, 0, 0, 0, listed), budget)
    captured = step._replace(lengths=None)
    engine.capture(captured, PAGE_SIZE)
    engine.prepare(step, budget, PAGE_SIZE)
    engine.prepare(captured, budget, PAGE_SIZE)
    return engine


def difference(scene: Scene, engine: FlashInferAttend) -> float:
    """Largest, between the outputs of both; log-sum-exps that differ by more than rounding are an error."""
    decoder, batch = decoder_of(scene.engine.index, scene.shape.group), scene.step.batch
    output, lse = decoder.workspace.exact(batch, decoder.splits)
    whole = lse.logsumexp(2)
    ours = (output * (lse - whole.unsqueeze(2)).exp().unsqueeze(-1)).nan_to_num().sum(2)
    theirs = engine.lse[:batch, :, 0] * math.log(2)
    assert float((theirs - whole).abs().max()) < MOST_DIFFERENCE, "log-sum-exps differ"
    return float((engine.output[:batch, :, 0].float() - ours).abs().max())


def measure(dry: bool) -> list[Figure]:
    """Microseconds of one layer by each engine, and how far apart their outputs are."""
    torch.set_grad_enabled(False)
    clock: Clock = CudaClock() if not dry else DryClock()
    if isinstance(clock, DryClock):
        stop_before_launches(clock)
    figures = []
    for budget in BUDGETS[:1] if dry else BUDGETS:
        config = ClusterKVConfig(budget_tokens=budget, dense_below="never")
        for batch in (2,) if dry else BATCHES:
            shape, device = (DRY_SHAPE, "cpu") if dry else (SHAPES["llama-3.1-8b"], "cuda")
            scene = make_scene(config, shape, 1, batch, 1200 if dry else CONTEXT, torch.bfloat16, device)
            operations = {operation.name: operation for operation in kernels_cuda.operations(scene)}
            for operation in operations.values():
                operation.call(0)
            where = f"{batch * shape.kv_heads} lists of {budget} and base"
            predicted = 1000 / shape.layers * kernels_cuda.model_ms(scene)["attend"][H200]
            ours = 1000 * clock.ms(partial(operations["attend"].call, 0), REPEATS)
            figures.append(Figure(f"our kernel, {where}", ours, "us", predicted))
            if dry:
                continue
            try:
                engine = flashinfer_of(scene)
            except Exception as error:
                print(f"FlashInfer is left out: {type(error).__name__}: {error}", flush=True)
                continue
            q = scene.queries().unflatten(1, (shape.kv_heads, -1)).contiguous()
            keys, values, scale = scene.engine.key_buffers[0], scene.engine.value_buffers[0], scene.scale
            w = decoder_of(scene.engine.index, shape.group).workspace
            attend = partial(engine.attend, q, keys, values, scale, w)
            theirs = 1000 * clock.ms(attend, REPEATS)
            shaped = StepShape(*shape, batch, scene.context + 1, scene.dtype.itemsize, PAGE_SIZE)
            launches = flashinfer_launches(shaped, config)
            predicted = sum(launch.microseconds(BANDWIDTHS_TBS[H200]) for launch in launches)
            figures.append(Figure(f"FlashInfer, {where}", theirs, "us", predicted))
            apart = difference(scene, engine)
            assert apart <= MOST_DIFFERENCE, f"{where}: outputs differ by {apart}"
            figures.append(Figure(f"largest difference, {where}", apart, ""))
    return figures


if __name__ == "__main__":
    main(__doc__ or "", measure)
