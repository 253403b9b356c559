"""Bytes per second of rows that a GPU reads from pinned host memory, as a host tier's recall does, beside one long copy.

    python -m benchmarks.gpu.pinned [--dry]

A row is a key and a value of one token and kv head. `docs/memory.md` sizes a host tier by these.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from benchmarks.gpu.dry import DryClock, stop_before_launches
from benchmarks.gpu.figures import Figure, main
from benchmarks.kernel_scene import Clock, CudaClock
from sglang_clusterkv.kernels.step_model import BUSES_GBS

ROWS = 1 << 20  # in host memory
READ = 64 * 512  # in one launch: 64 (request, kv head) with a budget of 512
BLOCK = 16  # rows per program
ROW_BYTES = (256, 512, 1024)  # a key alone at head_dim 128 in bf16; with its value; both at 256


@triton.jit
def gather_rows(rows, index, out, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles of `BLOCK` rows): rows of `WORDS` 32-bit words, by index, one after the other."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.arange(0, WORDS)
    at = tl.load(index + n)
    tl.store(out + n[:, None] * WORDS + word, tl.load(rows + at[:, None] * WORDS + word))


def measure(dry: bool) -> list[Figure]:
    """GB/s of scattered rows by their size, and of a copy."""
    clock: Clock = CudaClock(graphs=False) if not dry else DryClock()
    if isinstance(clock, DryClock):
        stop_before_launches(clock)
    device, rows, read = ("cpu", 1024, 64) if dry else ("cuda", ROWS, READ)
    figures = []
    for row_bytes in ROW_BYTES:
        words = row_bytes // 4
        host = torch.zeros((rows, words), dtype=torch.int32, pin_memory=not dry)
        index = torch.randint(rows, (read,), device=device)
        out = torch.empty((read, words), dtype=torch.int32, device=device)

        def scattered(host: torch.Tensor = host, index: torch.Tensor = index, out: torch.Tensor = out) -> None:
            gather_rows[(len(index) // BLOCK,)](host, index, out, WORDS=out.shape[1], BLOCK=BLOCK)

        def copied(host: torch.Tensor = host, out: torch.Tensor = out) -> None:
            out.copy_(host[: len(out)], non_blocking=True)

        for name, call, predicted in (("scattered", scattered, BUSES_GBS[1]), ("in one piece", copied, BUSES_GBS[0])):
            gbps = read * row_bytes / clock.ms(call, 20) / 1e6
            figures.append(Figure(f"rows of {row_bytes} bytes, {name}", gbps, "GB/s", predicted))
    return figures


if __name__ == "__main__":
    main(__doc__ or "", measure)
