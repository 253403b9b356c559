"""What traces cost a decode step: attention of a step without them, with them where nobody asks, and where one request does.

    python -m benchmarks.tracing [--shape smollm2-135m] [--cells 1x7700 8x7700] [--layers 6] [--repeats 30]

On a CPU, on random keys of a model's shape, lists of the step included; a cell is requests x tokens of each. Times are CPU
times of this thread, scaled to the model's layers. The three take turns: what else runs on the machine is in all of them.
Prints a table; no file is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from benchmarks.kernel_scene import SHAPES, Scene, make_scene
from sglang_clusterkv.clusters.trace import Trace
from sglang_clusterkv.clusters.tracing import Tracing
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import sparse_decode

Run = Callable[[], None]


def runs(scene: Scene) -> dict[str, Run]:
    """What is timed, by name: a step's lists and layers, all in one pool."""
    engine, queries = scene.engine, scene.queries()
    kept, around = engine.tracing, engine.sparse_decode
    trace, row = Trace(scene.config.trace_tokens), int(scene.rows[0])

    def step() -> None:
        step = engine.begin_decode(scene.rows, scene.seq_lens)
        for layer in range(scene.layers):
            keys, values = engine.key_buffers[layer], engine.value_buffers[layer]
            assert engine.sparse_layer(queries, keys, values, layer, step, scene.scale) is not None
        engine.tracing.end_step()

    def off() -> None:
        engine.tracing, engine.sparse_decode = Tracing(), sparse_decode
        step()
        engine.tracing, engine.sparse_decode = kept, around

    def asked() -> None:
        kept.start(row, trace)
        step()
        kept.row_freed(row)

    return {"off": off, "on, nobody asks": step, "on, one asks": asked}


def measure(shape: str, batch: int, context: int, layers: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step of the whole model's layers."""
    config = ClusterKVConfig(trace=True, trace_tokens=8)
    scene = make_scene(config, SHAPES[shape], layers, batch, context, torch.float32, "cpu")
    timed = runs(scene)
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in tqdm(range(repeats + 2), desc=f"{batch}x{context}", disable=None):
        for name, run in timed.items():
            begin = time.thread_time()
            run()
            found[name].append(1000 * (time.thread_time() - begin) * scene.to_model)
    return {name: statistics.median(times[2:]) for name, times in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--cells", nargs="+", metavar="REQUESTSxTOKENS", default=["1x7700", "8x7700"])
    parser.add_argument("--layers", type=int, metavar="N", default=6, help="that are measured, default %(default)s")
    parser.add_argument("--repeats", type=int, metavar="N", default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.shape}, float32, ms of CPU time per step, attention alone")
    print("| requests x tokens | off | on, nobody asks | on, one asks |\n|---|---|---|---|")
    for cell in arguments.cells:
        batch, context = map(int, cell.split("x"))
        found = measure(arguments.shape, batch, context, arguments.layers, arguments.repeats)
        off = found["off"]
        cells = [f"{off:.1f}", *(f"{ms:.1f} ({100 * (ms / off - 1):+.1f} %)" for ms in list(found.values())[1:])]
        print(f"| {cell} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
