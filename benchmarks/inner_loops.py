"""Instructions of the CPU kernels' products with rows, counted in their machine code, and their time where rows are in a cache.

    python -m benchmarks.inner_loops [--head-dim 64] [--group 3]

A value is a channel of a row, which all query heads of the kv head meet. The count is of the loop over rows, loads ahead
of time included; nanoseconds are CPU time of one thread for a row, the least of several.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sglang_clusterkv.kernels import codes_cpu, levels_cpu
from sglang_clusterkv.kernels.cpu_math import FAST, njit
from sglang_clusterkv.kernels.levels_cpu import BLOCK, DIGITS, scales_of, unpack_levels
from sglang_clusterkv.kernels.vectors_cpu import CODES_2, FLOAT32, INT4, add_rows, dot_rows, row_bytes
from sglang_clusterkv.memory.codec import SLICES

ROWS, HEADS, REPEATS = 256, 1, 50


class Product(NamedTuple):
    """One of a step's products with rows.

    Attributes:
        name: what of which operation.
        call: compiled; takes the arrays below.
        arrays: of it.
    """

    name: str
    call: Callable[..., None]
    arrays: tuple[Any, ...]


def products(channels: int, group: int) -> list[Product]:
    """Those that this machine's target runs for a model with rows in 4 bits and a pool in float32."""
    random = np.random.default_rng(0)
    rows = np.concatenate([np.arange(ROWS), np.zeros(2 * BLOCK, np.int64)])
    q = random.standard_normal((group, channels)).astype(np.float32)
    out, total = np.zeros((group, ROWS + 2 * BLOCK), np.float32), np.zeros((group, channels), np.float32)
    floats = random.standard_normal((ROWS, HEADS, channels)).astype(np.float32)
    scales = np.full((ROWS, HEADS, scales_of(channels)), 0x3F80, np.uint16)
    digits, start = np.zeros((group, DIGITS, channels), np.int8), np.zeros((group, SLICES), np.int32)
    unit = np.ones(group, np.float32)
    levels, factors = np.zeros((ROWS + BLOCK) * channels, np.uint8), np.zeros((ROWS + BLOCK) * SLICES, np.float32)

    def packed(row_format: int) -> np.ndarray:
        return random.integers(0, 256, (ROWS, HEADS, row_bytes(row_format, channels)), np.uint8)

    def dots_in_floats(name: str, row_format: int, stored: np.ndarray) -> Product:
        @njit(fastmath=FAST)
        def dots(stored, scales, rows, q, out):  # type: ignore[no-untyped-def]
            dot_rows(row_format, channels, group, stored, scales, rows, 0, ROWS, 0, q, out)

        return Product(name, dots, (stored, scales, rows, q, out))

    def sums(name: str, row_format: int, stored: np.ndarray) -> Product:
        @njit(fastmath=FAST)
        def add(stored, scales, rows, weights, total):  # type: ignore[no-untyped-def]
            add_rows(row_format, channels, group, stored, scales, rows, 0, ROWS, 0, weights, total)

        return Product(name, add, (stored, scales, rows, out, total))

    @njit(fastmath=FAST)
    def unpack(stored, scales, rows, levels, factors):  # type: ignore[no-untyped-def]
        unpack_levels(channels, stored, scales, rows, 0, ROWS, 0, levels, factors)

    @njit(fastmath=FAST)
    def of_levels(levels, factors, digits, start, unit, out):  # type: ignore[no-untyped-def]
        levels_cpu.dot_levels(channels, group, levels, factors, ROWS, digits, start, unit, out)

    @njit(fastmath=FAST)
    def of_codes(stored, rows, digits, start, unit, out):  # type: ignore[no-untyped-def]
        codes_cpu.dot_codes(channels, group, stored, rows, 0, ROWS, 0, digits, start, unit, out)

    found = []
    if levels_cpu.serves(INT4, channels):
        found.append(Product("score: rows unpacked", unpack, (packed(INT4), scales, rows, levels, factors)))
        found.append(Product("score: their products", of_levels, (levels, factors, digits, start, unit, out)))
    else:
        found.append(dots_in_floats("score", INT4, packed(INT4)))
    if codes_cpu.serves(2, channels):
        found.append(Product("refine: codes", of_codes, (packed(CODES_2), rows, digits, start, unit, out)))
    else:
        found.append(dots_in_floats("refine: codes", CODES_2, packed(CODES_2)))
    found.append(dots_in_floats("attend: keys", FLOAT32, floats))
    found.append(sums("attend: values", FLOAT32, floats))
    found.append(sums("estimate: mean values", INT4, packed(INT4)))
    return found


def instructions_a_row(assembly: str, scales: int) -> float:
    """Of the loop over rows in a compiled function's machine code, by how many rows a turn takes.

    Args:
        assembly: what comes behind the function's end, its wrapper for Python, is left out.
        scales: of a row; a loop inside has so many turns.
    """
    lines = [line.split("#")[0].strip() for line in assembly.split(".Lfunc_end0:")[0].splitlines()]
    at = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for number, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\S+)$", line)
        if jump and at.get(jump[1], number) < number:
            body = [x for x in lines[at[jump[1]] : number + 1] if x and x[-1] != ":" and x[0] != "."]
            loops.append((at[jump[1]], number, body))
    begin, end, body = max(loops, key=lambda loop: len(loop[2]))
    inside = [len(other) for first, last, other in loops if begin < first and last < end]
    return (len(body) + (scales - 1) * sum(inside)) / _rows_a_turn(body)


def _rows_a_turn(body: list[str]) -> int:
    """By how much the counter is raised that the loop's end is compared with."""
    counter = re.search(r"(%r\w+)$", [line for line in body if line.startswith("cmpq\t$")][-1])
    assert counter
    steps = [
        1 if line.startswith("incq") else int(line.split("$")[-1].split("leaq\t")[-1].split(",")[0].split("(")[0])
        for line in body
        if re.match(rf"(incq\t|addq\t\$\d+, ){counter[1]}$|leaq\t\d+\({counter[1]}\),", line)
    ]
    return max(steps)


def nanoseconds_a_row(product: Product) -> float:
    """CPU time, where all arrays are in a cache."""
    found = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(20):
            product.call(*product.arrays)
        found.append((time.thread_time() - begin) / 20 / ROWS)
    return 1e9 * min(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--group", type=int, default=3)
    args = parser.parse_args()
    print("| product with a row | instructions | a value | ns |\n|---|---|---|---|")
    for product in tqdm(products(args.head_dim, args.group), leave=False):
        product.call(*product.arrays)
        (assembly,) = product.call.inspect_asm().values()
        count = instructions_a_row(assembly, scales_of(args.head_dim))
        print(f"| {product.name} | {count:.1f} | {count / args.head_dim:.2f} | {nanoseconds_a_row(product):.1f} |")


if __name__ == "__main__":
    main()
