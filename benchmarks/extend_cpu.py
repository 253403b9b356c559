"""An extend's attention and products on a CPU, beside torch's: CPU time of one layer, and multiply-adds per second of it.

    python -m benchmarks.extend_cpu                          # SmolLM2's sizes, one thread
    python -m benchmarks.extend_cpu --cells 3000+30 7000+100 --repeats 15

A cell is tokens that are cached and tokens that are new. Attention is over a pool in pages of 16 that lie apart, torch's is by
`scaled_dot_product_attention` over gathered keys and values. Products are those of a layer's four matrices with the new tokens.
Ours and torch's in turn, the least of all repeats; above them this machine's rate of a large product by torch. Prints only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sglang_clusterkv.kernels.extend.cpu import extend
from sglang_clusterkv.kernels.threads_cpu import set_threads
from sglang_clusterkv.kernels.token_tiles_cpu import linear_by_tiles

CELLS = ("3000+30", "3000+100", "7000+30", "7000+100", "3000+300", "0+3000")
PAGE = 16
LARGE = 1536  # rows and columns of a large product


class Shape(NamedTuple):
    """Of a model's layer."""

    kv_heads: int
    group: int
    head_dim: int
    weights: tuple[tuple[int, int], ...]


SMOLLM2 = Shape(3, 3, 64, ((960, 576), (576, 576), (3072, 576), (576, 1536)))


def least_s(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """CPU time of each, the least of so many turns behind a first one."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + repeats):
        for call, times in zip(calls, found, strict=True):
            begin = time.process_time()
            call()
            times.append(time.process_time() - begin)
    return [min(times[1:]) for times in found]


def attention(shape: Shape, cached: int, new: int) -> tuple[list[Callable[[], torch.Tensor]], float]:
    """Ours and torch's, [new, heads, D], and how many multiply-adds it takes."""
    generator = torch.Generator().manual_seed(0)
    pages = -(-(cached + new) // PAGE) + 1
    size = (pages * PAGE, shape.kv_heads, shape.head_dim)
    keys, values = (torch.randn(size, generator=generator) for _ in range(2))
    slots = (PAGE * torch.randperm(pages, generator=generator).unsqueeze(1) + torch.arange(PAGE)).flatten()[
        : cached + new
    ]
    q = torch.randn(new, shape.kv_heads * shape.group, shape.head_dim, generator=generator)
    scale = shape.head_dim**-0.5
    seen = None if cached == 0 else torch.arange(cached + new) <= cached + torch.arange(new).unsqueeze(1)

    def by_torch() -> torch.Tensor:
        k, v = (buffer[slots].transpose(0, 1).repeat_interleave(shape.group, 0) for buffer in (keys, values))
        given = F.scaled_dot_product_attention(
            q.transpose(0, 1), k, v, attn_mask=seen, is_causal=seen is None, scale=scale
        )
        return given.transpose(0, 1)

    pairs = new * cached + new * (new + 1) / 2
    return [lambda: extend(q, keys, values, slots, scale), by_torch], 2 * pairs * q.shape[1] * shape.head_dim


def products(shape: Shape, new: int) -> tuple[list[Callable[[], list[torch.Tensor]]], float]:
    """Ours and torch's, of each matrix, and how many multiply-adds they take."""
    weights = [torch.randn(size) for size in shape.weights]
    x = {channels: torch.randn(new, channels) for _, channels in shape.weights}

    def by(multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        return lambda: [multiply(x[weight.shape[1]], weight) for weight in weights]

    return [by(linear_by_tiles), by(F.linear)], new * sum(weight.numel() for weight in weights)


def table(cells: list[tuple[int, int]], repeats: int, shape: Shape = SMOLLM2) -> str:
    """Markdown."""
    x = torch.randn(LARGE, LARGE)
    (large,) = least_s([lambda: x @ x], repeats)
    lines = [
        f"A product of {LARGE} x {LARGE} x {LARGE} by torch: {LARGE**3 / large / 1e9:.0f} G multiply-adds/s.",
        "",
        "| cached + new | attention, ms | G/s | torch's, ms | products, ms | G/s | torch's, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for cached, new in cells:
        row = f"| {cached:,} + {new:,} "
        sides: tuple[tuple[Sequence[Callable[[], object]], float], ...] = (
            attention(shape, cached, new),
            products(shape, new),
        )
        for calls, work in sides:
            ours, theirs = least_s(calls, repeats)
            row += f"| {1000 * ours:.2f} | {work / ours / 1e9:.0f} | {1000 * theirs:.2f} "
        lines.append(row + "|")
    return "\n".join(lines)


def cell(text: str) -> tuple[int, int]:
    """`3000+30` as numbers."""
    cached, new = map(int, text.split("+"))
    if cached < 0 or new < 1:
        raise argparse.ArgumentTypeError(f"{text}: no tokens are new")
    return cached, new


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", type=cell, default=[cell(text) for text in CELLS])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_threads(1)
    print(table(args.cells, args.repeats))


if __name__ == "__main__":
    main()
