"""What products of a decode step with weights take on a CPU: from float32, from copies in bf16, and by torch; prints only.

    python -m benchmarks.products [--channels 576 1536 4096] [--tokens 1 2 4 8] [--threads 1 2] [--megabytes 160]

Each cell is one product with weights of so many megabytes in float32, more than caches hold, the least of `--repeats` calls,
all kinds in turn. By one thread that is CPU time, so that other processes count only by what they take of memory's bandwidth;
by more it is elapsed time, and wants a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear as torch_linear

from sglang_clusterkv.kernels.products_cpu import halve, linear
from sglang_clusterkv.kernels.threads_cpu import set_threads
from sglang_clusterkv.memory.huge_pages import use_huge_pages


class Weights:
    """Random weights that bf16 holds, of so many channels and bytes in float32, with their copy in bf16."""

    def __init__(self, channels: int, nbytes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        rows = max(1, nbytes // (4 * channels))
        self.whole = torch.randn(rows, channels, generator=generator).bfloat16().float()
        self.halves = torch.empty(rows, channels // 2, dtype=torch.int32)
        use_huge_pages([self.halves])
        if not halve(self.whole, self.halves):
            raise ValueError(f"{channels} channels are no whole vectors: use a multiple of 32")

    def calls(self, tokens: int) -> dict[str, tuple[Callable[[], torch.Tensor], int]]:
        """By kind: a product with so many tokens, and the bytes of weights that it reads."""
        x = torch.randn(tokens, self.whole.shape[1])
        return {
            "torch": (lambda: torch_linear(x, self.whole), self.whole.nbytes),
            "float32": (lambda: linear(x, self.whole), self.whole.nbytes),
            "bf16": (lambda: linear(x, self.whole, None, self.halves), self.halves.nbytes),
        }


def least_s(weights: Weights, tokens: int, threads: int, repeats: int) -> dict[str, tuple[float, int]]:
    """By kind: seconds of a product, and the bytes that it reads."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    set_threads(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best: dict[str, tuple[float, int]] = {}
    for _ in range(repeats):
        for kind, (call, nbytes) in weights.calls(tokens).items():
            begin = clock()
            call()
            best[kind] = min(best.get(kind, (float("inf"), nbytes)), (clock() - begin, nbytes))
    set_threads(None)
    torch.set_num_threads(before)
    return best


def table(args: argparse.Namespace) -> str:
    """Markdown: milliseconds and GB/s of each kind."""
    lines = ["| channels | threads | tokens | torch, ms | float32 | bf16 | float32 over bf16 |", "|" + "---|" * 7]
    for channels in args.channels:
        weights = Weights(channels, args.megabytes * 10**6)
        for threads in args.threads:
            for tokens in args.tokens:
                found = least_s(weights, tokens, threads, args.repeats)
                cells = [f"{1e3 * took:.1f} ({nbytes / took / 1e9:.1f} GB/s)" for took, nbytes in found.values()]
                ratio = found["float32"][0] / found["bf16"][0]
                lines.append(f"| {channels:,} | {threads} | {tokens} | {' | '.join(cells)} | {ratio:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[576, 1536, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--megabytes", type=int, default=160, help="of weights in float32")
    parser.add_argument("--repeats", type=int, default=15)
    print(table(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
