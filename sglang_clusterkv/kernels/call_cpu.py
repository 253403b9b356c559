"""Compiled functions that others call where they are, by their address.

numba gives a compiled function copies of all that it calls, and LLVM optimises each copy once more: loops become others, and
their sums differ in the last bit. A function that is called by its address is the one that Python calls.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def stays_whole(typing_context: Any) -> Any:
    """Keep the function that says it out of its callers' code, where it is called by its name."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


def entry_of(function: Any, *kinds: Any) -> int:
    """Where a compiled function for arguments of these types of numba's is; it returns nothing, and says `stays_whole`."""
    function.compile(kinds)
    compiled = function.overloads[kinds]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name))


@intrinsic
def call_at(typing_context: Any, address: Any, arguments: Any) -> Any:
    """Call the function at an address with a tuple of int64 and float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.intp, arguments), codegen
