"""Asking for memory that an operation knows a later one will read.

What a step reads of the pool and of codes lies apart, so that no hardware foresees it, and a thread that asks a few rows ahead
waits for most of them: a core has room for some twenty lines on their way into its first cache, and for twice as many into the
second. So whole lists are asked for at once, into the second.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import address_of, part

_LINE = 64  # bytes


@intrinsic
def _ask_line(typing_context: Any, address: Any) -> Any:
    """Start loading the line at an address into the second-level cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        octet, flag = ir.IntType(8), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [octet.as_pointer(), flag, flag, flag])
        found = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(found, [builder.inttoptr(args[0], octet.as_pointer()), flag(0), flag(2), flag(1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@part
def lines_of(array: Any, row: Any, head: Any, size: Any) -> tuple[int, int]:
    """(address of the first line, end) of `size` bytes from array[row, head] on."""
    address = address_of(array, row, head)
    return address & -_LINE, address + size


@part
def ask(array: Any, row: Any, head: Any, size: Any) -> None:
    """Ask for `size` bytes from array[row, head] on."""
    first, end = lines_of(array, row, head, size)
    for line in range(first, end, _LINE):
        _ask_line(line)


@part
def ask_rows(array: Any, rows: Any, count: Any, head: Any, size: Any) -> None:
    """Ask for the first `count` of `rows`, each `size` bytes of a kv head."""
    for i in range(count):
        ask(array, rows[i], head, size)
