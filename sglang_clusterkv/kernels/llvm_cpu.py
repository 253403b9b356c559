"""What the vectors of the CPU kernels are built with, in LLVM: loads, shuffles, loops, and what numba's target can."""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from sglang_clusterkv.kernels.cpu_math import element_pointer

BYTE, HALF, WORD, REAL = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()
AHEAD = 8  # rows that are being loaded while one is computed
_REGISTERS = 24  # vectors that a loop may keep, of 32 with AVX-512 and 16 without
_LINE = 64


def target_features(context: Any = None) -> frozenset[str]:
    """What numba's target can, by LLVM's names; it is not always this machine."""
    names = (context or cpu_target.target_context).codegen().magic_tuple()[2].split(",")
    return frozenset(name[1:] for name in names if name.startswith("+"))


class Build(NamedTuple):
    """What building one intrinsic needs."""

    context: Any
    builder: Any
    features: frozenset[str]

    @classmethod
    def of(cls, context: Any, builder: Any) -> Build:
        """For code of this context."""
        return cls(context, builder, target_features(context))

    @property
    def lanes(self) -> int:
        """Floats in a vector."""
        return 16 if "avx512f" in self.features else 8

    @property
    def registers(self) -> int:
        """Vectors that a loop may keep."""
        return _REGISTERS if "avx512f" in self.features else _REGISTERS // 2

    def place(self, number: int) -> Any:
        """An index."""
        return self.context.get_constant(types.intp, number)

    def address(self, kind: Any, array: Any, *at: Any) -> Any:
        """Of an array's element; missing indices are zero."""
        return element_pointer(self.context, self.builder, kind, array, list(at))

    def load(self, pointer: Any, kind: Any, lanes: int) -> Any:
        """So many values of a kind from a pointer."""
        return self.builder.load(self.builder.bitcast(pointer, ir.VectorType(kind, lanes).as_pointer()), align=1)

    def store(self, vector: Any, pointer: Any) -> None:
        """A vector to a pointer."""
        self.builder.store(vector, self.builder.bitcast(pointer, vector.type.as_pointer()), align=4)

    def pick(self, vector: Any, lanes: list[int], other: Any = None) -> Any:
        """These lanes of a vector, or of it and another behind it."""
        other = ir.Constant(vector.type, ir.Undefined) if other is None else other
        return self.builder.shuffle_vector(vector, other, constants(WORD, lanes))

    def spread(self, scalar: Any, lanes: int) -> Any:
        """So many times the same value."""
        empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
        return self.pick(self.builder.insert_element(empty, scalar, WORD(0)), [0] * lanes)

    def call(self, name: str, result: Any, *args: Any) -> Any:
        """An intrinsic of LLVM."""
        kind = ir.FunctionType(result, [arg.type for arg in args])
        found = self.builder.module.globals.get(name) or ir.Function(self.builder.module, kind, name)
        return self.builder.call(found, args)

    def multiply_add(self, a: Any, b: Any, total: Any) -> Any:
        """total + a * b, in one rounding where there is an instruction for it."""
        return self.builder.fadd(total, self.builder.fmul(a, b, flags=("contract",)), flags=("contract",))

    def prefetch(self, pointer: Any, count: int) -> None:
        """Start loading so many bytes."""
        octets = self.builder.bitcast(pointer, BYTE.as_pointer())
        for offset in range(0, count, _LINE):
            at = self.builder.gep(octets, [WORD(offset)])
            self.call("llvm.prefetch.p0", ir.VoidType(), at, WORD(0), WORD(3), WORD(1))

    def floats_of_bf16(self, bits: Any) -> Any:
        """Floats of a vector of bf16's bits."""
        wide = ir.VectorType(WORD, bits.type.count)
        moved = self.builder.shl(self.builder.zext(bits, wide), constants(WORD, [16] * bits.type.count))
        return self.builder.bitcast(moved, ir.VectorType(REAL, bits.type.count))


def constants(kind: Any, values: list[Any]) -> Any:
    """A vector of constants."""
    return ir.Constant(ir.VectorType(kind, len(values)), values)


def levels_type(lanes: int) -> Any:
    """A vector of floats."""
    return ir.VectorType(REAL, lanes)


class Loop:
    """for i in range(0, count, step): between `begin` and `end`, with vectors that are carried from one turn to the next."""

    def __init__(self, b: Build, count: Any, step: int, carried: list[Any]) -> None:
        self._b, self._step = b, step
        builder, before = b.builder, b.builder.block
        self._check = builder.append_basic_block("rows")
        body = builder.append_basic_block("row")
        self._after = builder.append_basic_block("rows.end")
        builder.branch(self._check)
        builder.position_at_end(self._check)
        self.i = builder.phi(count.type)
        self.i.add_incoming(ir.Constant(count.type, 0), before)
        self.carried = [builder.phi(value.type) for value in carried]
        for phi, value in zip(self.carried, carried, strict=True):
            phi.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", self.i, count), body, self._after)
        builder.position_at_end(body)

    def end(self, carried: list[Any]) -> None:
        """Close the loop; what `carried` holds is its last turn's afterwards."""
        builder = self._b.builder
        self.i.add_incoming(builder.add(self.i, ir.Constant(self.i.type, self._step)), builder.block)
        for phi, value in zip(self.carried, carried, strict=True):
            phi.add_incoming(value, builder.block)
        builder.branch(self._check)
        builder.position_at_end(self._after)
