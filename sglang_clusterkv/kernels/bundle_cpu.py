"""Many arrays as one argument of a compiled function.

A tuple of arrays is passed field by field: with some fifty of them LLVM takes longer over the calls than over what they do, and
every call from Python unpacks them all. A bundle is one pointer to the same fields, read where they are used.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.experimental import structref
from numba.experimental.jitclass.base import imp_dtor
from numba.extending import intrinsic

from sglang_clusterkv.kernels.cpu_math import njit


@structref.register
class BundleType(types.StructRef):
    """Of the fields of a named tuple."""


class Bundle(structref.StructRefProxy):
    """What Python holds of one; its fields are for compiled functions."""


structref.define_boxing(BundleType, Bundle)


@intrinsic
def _bundle_of(typing_context: Any, values: Any) -> Any:
    kind = BundleType(tuple(zip(values.fields, values.types, strict=True)))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        memory = context.data_model_manager[kind.get_data_type()].get_value_type()
        size = context.get_constant(types.uintp, context.get_abi_sizeof(memory))
        meminfo = context.nrt.meminfo_alloc_dtor(builder, size, imp_dtor(context, builder.module, kind))
        pointer = builder.bitcast(context.nrt.meminfo_data(builder, meminfo), memory.as_pointer())
        builder.store(cgutils.get_null_value(memory), pointer)
        made = context.make_helper(builder, kind)
        made.meminfo = meminfo
        data = structref._Utils(context, builder, kind).get_data_struct(made._getvalue())
        for place, (name, field) in enumerate(zip(values.fields, values.types, strict=True)):
            value = builder.extract_value(args[0], place)
            context.nrt.incref(builder, field, value)
            setattr(data, name, value)
        return made._getvalue()

    return kind(values), codegen


@njit(cache=True)
def bundle_of(values: Any) -> Any:
    """The fields of a named tuple of arrays as a `Bundle`, which keeps the arrays."""
    return _bundle_of(values)
