"""Time each operation of a decode step on the CPU, and clustering, on random keys of a model's shape.

    python -m benchmarks.operations --context 7700 --batch 1 8

Prints milliseconds per step (all layers), the share of the attention step, and the bytes an operation reads beside the
machine's measured copy bandwidth. The dense line is our own dense decode over the same pool.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from sglang_clusterkv.clusters.engine import ClusterEngine, Extend
from sglang_clusterkv.clusters.handed_out import HandedOut
from sglang_clusterkv.clusters.index import ClusterIndex
from sglang_clusterkv.clusters.rotation import rotation_matrix
from sglang_clusterkv.clusters.step import dense_step
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.attend.cpu import dense_decode
from sglang_clusterkv.kernels.cpu_math import bits
from sglang_clusterkv.kernels.decode import cpu
from sglang_clusterkv.memory.device import Geometry

SHAPES = {"smollm2-135m": (30, 9, 3, 64), "qwen2.5-7b": (28, 28, 4, 128), "llama-3.1-8b": (32, 32, 8, 128)}
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}


def best_ms(call: Callable[[], object], repeats: int) -> float:
    """Least milliseconds of a call."""
    call()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1000 * min(times)


def copy_gbps() -> float:
    """Measured copy bandwidth, bytes read plus bytes written, GB/s."""
    source = torch.empty(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * source.numel() / best_ms(lambda: target.copy_(source), 5) / 1e6


def scene(
    config: ClusterKVConfig, shape: tuple[int, int, int, int], layers: int, batch: int, context: int, dtype: torch.dtype
) -> ClusterEngine:
    """An engine with `batch` prefilled requests of `context` tokens whose keys form clusters."""
    _, _, kv_heads, head_dim = shape
    pages_each = -(-(context + 1) // 16)
    geometry = Geometry(layers, kv_heads, head_dim, 16, 1 + batch * pages_each)
    generator = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        centres = torch.randn(256, kv_heads, head_dim, generator=generator)
        which = torch.randint(256, (geometry.slots,), generator=generator)
        noise = torch.randn(geometry.slots, kv_heads, head_dim, generator=generator)
        return (centres[which] + 0.5 * noise).to(dtype)

    keys, values = [rows() for _ in range(layers)], [rows() for _ in range(layers)]
    table = torch.zeros((batch + 1, pages_each * 16), dtype=torch.int32)
    for row in range(1, batch + 1):
        pages = torch.arange(1 + (row - 1) * pages_each, 1 + row * pages_each)
        table[row] = (pages.unsqueeze(1) * 16 + torch.arange(16)).flatten().int()
    engine = ClusterEngine(ClusterIndex(config, geometry, "cpu"), keys, values, table, HandedOut())
    engine.begin_extend([Extend(row, str(row), 0, context, context, True) for row in range(1, batch + 1)])
    return engine


def measure(args: argparse.Namespace, batch: int, bandwidth: float) -> None:
    """Time one batch size and print its table."""
    config = ClusterKVConfig(
        budget_tokens=args.budget, candidate_tokens=args.candidates, centroid_dtype=args.centroid_dtype
    )
    shape = SHAPES[args.shape]
    all_layers, heads, kv_heads, head_dim = shape
    layers = min(args.layers, all_layers)
    group, scale = heads // kv_heads, head_dim**-0.5
    engine = scene(config, shape, layers, batch, args.context, DTYPES[args.dtype])
    begin = time.perf_counter()
    rows, lengths = np.arange(1, batch + 1), np.full(batch, args.context + 1)
    step = engine.begin_decode(rows, lengths).sparse
    assert step is not None
    build_ms = 1000 * (time.perf_counter() - begin)

    q = torch.randn(batch, heads, head_dim)
    grouped = q.unflatten(1, (kv_heads, -1)).contiguous()
    rotated = (grouped @ rotation_matrix(head_dim).T).numpy()
    is_bf16 = DTYPES[args.dtype] is torch.bfloat16
    decoder = cpu.decoder_of(engine.index, group, is_bf16)
    decoder.prepare(step, kv_heads, group, head_dim)
    out = torch.empty_like(grouped).numpy()
    keys, values = [bits(k) for k in engine.key_buffers], [bits(v) for v in engine.value_buffers]
    every = range(layers)
    row_bytes, code_bytes = engine.index.row_codec.row_bytes, engine.index.token_codec.code_bytes + 4
    kv_bytes = head_dim * engine.key_buffers[0].element_size()
    clusters = int(step.page_count.sum()) * engine.index.clusters_per_page * kv_heads
    base = int(step.base_count.sum()) * kv_heads
    recalled, candidates = batch * kv_heads * args.budget, batch * kv_heads * args.candidates

    def select(layer: int) -> None:
        decoder.select()

    def refine(layer: int) -> None:
        decoder.select()  # recall overwrites what select left
        decoder.refine(rotated, layer, scale)

    def recall(layer: int) -> None:
        refine(layer)
        decoder.recall()

    operations: dict[str, tuple[Callable[[int], object], float]] = {
        "rotate": (lambda layer: grouped @ rotation_matrix(head_dim).T, 0),
        "score": (
            lambda layer: decoder.score(grouped.numpy(), keys[layer], layer, scale),
            clusters * (row_bytes + 4) + base * kv_bytes,
        ),
        "select": (select, clusters * 8),
        "refine": (refine, candidates * code_bytes),
        "recall": (recall, 0),
        "attend": (
            lambda layer: decoder.attend(grouped.numpy(), keys[layer], values[layer], scale, out),
            recalled * 2 * kv_bytes + base * kv_bytes,
        ),
        "estimate": (lambda layer: decoder.estimate(layer), min(clusters, 512 * batch * kv_heads) * row_bytes),
        "merge": (lambda layer: decoder.merge(out), 0),
    }

    def on_every_layer(call: Callable[[int], object]) -> float:
        def layers_in_turn() -> None:
            for layer in every:
                call(layer)

        return best_ms(layers_in_turn, args.repeats) * all_layers / layers

    times: dict[str, float] = {}
    for name, (call, _) in tqdm(operations.items(), leave=False):
        times[name] = on_every_layer(call)
    times["recall"] -= times["refine"]
    times["refine"] -= times["select"]
    whole = best_ms(
        lambda: [
            cpu.sparse_decode(q, engine.key_buffers[n], engine.value_buffers[n], engine.index, n, step, scale)
            for n in every
        ],
        args.repeats,
    )
    lists = best_ms(lambda: engine.begin_decode(rows, lengths), args.repeats)
    dense = dense_step(rows, lengths, engine.req_to_token)
    dense_ms = best_ms(
        lambda: [
            dense_decode(q, engine.key_buffers[n], engine.value_buffers[n], dense.slots, dense.seq_lens, scale)
            for n in every
        ],
        max(2, args.repeats // 3),
    )
    whole, dense_ms = whole * all_layers / layers, dense_ms * all_layers / layers
    print(
        f"\n{args.shape}, batch {batch}, context {args.context}, budget {args.budget}, candidates {args.candidates}, "
        f"{args.centroid_dtype} rows, {args.dtype} KV, {torch.get_num_threads()} thread(s), copy {bandwidth:.1f} GB/s"
    )
    for name, (_, read) in operations.items():
        rate = f"{read * all_layers / times[name] / 1e6:6.2f} GB/s" if read else ""
        print(f"  {name:9} {times[name]:8.2f} ms {100 * times[name] / whole:5.1f} %  {rate}")
    print(f"  {'lists':9} {lists:8.2f} ms once per step")
    print(f"  {'all':9} {whole + lists:8.2f} ms;  dense {dense_ms:.2f} ms;  ratio {(whole + lists) / dense_ms:.3f}")
    segments = engine.counters.segments
    print(f"  clustering {build_ms * all_layers / layers / segments:.1f} ms per segment of up to 1,024 tokens")


def main() -> None:
    """Parse the command line and print one table per batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--context", type=int, default=7700)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=1024)
    parser.add_argument("--centroid-dtype", choices=["int4", "int8", "bf16"], default="int4")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layers", type=int, default=6, help="layers measured; times are scaled to the model's")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    bandwidth = copy_gbps()
    for batch in args.batch:
        measure(args, batch, bandwidth)


if __name__ == "__main__":
    main()
