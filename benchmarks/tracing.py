"""What traces cost a decode step: attention of a step without them, with them where nobody asks, and where one request does.

    python -m benchmarks.tracing [--shape smollm2-135m] [--cells 1x7700 8x7700] [--layers 6] [--repeats 30]
    python -m benchmarks.tracing --server [--model FOLDER] [--tokens 7700] [--others 7] [--rounds 5] [--new-tokens 64]

On a CPU, on random keys of a model's shape, lists of the step included; a cell is requests x tokens of each. Times are CPU
times of all threads, scaled to the model's layers, and what a step costs once with them, unless `--layers` is all of the
model's. The three take turns: what else runs on the machine is in all of them.

With `--server` a real server, what its other requests notice: `--others` requests over one document decode beside one more,
which is traced in every second round and ends first, so that the making of its trace is in their time. Wall times, so run it
alone. Prints a table; no file is written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.kernel_scene import SHAPES, Scene, make_scene
from benchmarks.servers import Server, model_folder, serve
from examples.agent import FACTS, make_document
from sglang_clusterkv.clusters.trace import Trace
from sglang_clusterkv.clusters.tracing import Tracing
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.decode import sparse_decode
from sglang_clusterkv.tools.demo_model import default_out

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
            begin = time.process_time()
            run()
            found[name].append(1000 * (time.process_time() - begin) * scene.to_model)
    return {name: statistics.median(times[2:]) for name, times in found.items()}


ENDS_EARLIER = 16  # tokens before the others


def token_ms(streams: Sequence[Sequence[float]], from_then: float) -> float:
    """Milliseconds per token of requests, from a moment until the first of them ends; each by the times of its tokens."""
    until = min(times[-1] for times in streams)
    each = [[moment for moment in times if from_then <= moment <= until] for times in streams]
    return 1000 * statistics.mean((times[-1] - times[0]) / (len(times) - 1) for times in each)


def beside(server: Server, document: list[int], others: int, tokens: int, *, traced: bool) -> float:
    """Milliseconds per token of `others` requests beside one more that may be traced, from when all decode."""
    prompts = [document[:-1] + [100 + number] for number in range(others + 1)]
    streams: list[list[float]] = [[] for _ in prompts]
    ask = {"custom_params": {"clusterkv_trace": True}} if traced else {}

    def one(number: int) -> None:
        if number < others:
            streams[number] = server.stream(prompts[number], tokens)
        else:
            streams[number] = server.stream(prompts[number], tokens - ENDS_EARLIER, **ask)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(others + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return token_ms([times[1:] for times in streams[:others]], max(times[1] for times in streams))


def of_server(arguments: argparse.Namespace) -> None:
    """Measure a real server and print."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    document = tokenizer(make_document(arguments.tokens + 1500, FACTS)).input_ids[: arguments.tokens]
    pool = ["--page-size", "16", "--max-total-tokens", str(2 * arguments.tokens + 4096)]
    found: dict[bool, list[float]] = {False: [], True: []}
    log = Path(tempfile.mkdtemp()) / "server.log"
    with serve(arguments.model, log, *pool, config={"trace": True}) as server:
        server.generate(document, 4)
        for traced in (False, True):  # each once, for what is compiled or taken for the first time
            beside(server, document, arguments.others, arguments.new_tokens, traced=traced)
        for _ in tqdm(range(arguments.rounds), disable=None):
            for traced, times in found.items():
                times.append(beside(server, document, arguments.others, arguments.new_tokens, traced=traced))
    off, on = (statistics.median(found[traced]) for traced in (False, True))
    print(f"{arguments.model.name}, {arguments.others} requests beside one more, {arguments.tokens} tokens each")
    print("| ms per token of the others, nobody traced | one traced | more |\n|---|---|---|")
    print(f"| {off:.1f} | {on:.1f} | {100 * (on / off - 1):+.1f} % |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--cells", nargs="+", metavar="REQUESTSxTOKENS", default=["1x7700", "8x7700"])
    parser.add_argument("--layers", type=int, metavar="N", default=6, help="that are measured, default %(default)s")
    parser.add_argument("--repeats", type=int, metavar="N", default=30)
    parser.add_argument("--server", action="store_true", help="a real one, and what its other requests notice")
    parser.add_argument("--model", type=model_folder, default=default_out(), help="served, default %(default)s")
    parser.add_argument("--tokens", type=int, metavar="N", default=7700, help="of the document that it is asked about")
    parser.add_argument("--others", type=int, metavar="N", default=7)
    parser.add_argument("--rounds", type=int, metavar="N", default=5)
    parser.add_argument("--new-tokens", type=int, metavar="N", default=64)
    arguments = parser.parse_args()
    if arguments.server:
        of_server(arguments)
        return
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
