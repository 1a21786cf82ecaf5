"""Words of LLVM's language that the decode kernel says often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir

__all__ = ["BYTE", "FLOAT", "INT", "at", "fused", "integers", "summed"]

BYTE, INT, FLOAT = ir.IntType(8), ir.IntType(32), ir.FloatType()


def integers(values: Iterable[int]) -> Any:
    """A constant vector."""
    constants = [ir.Constant(INT, int(value)) for value in values]
    return ir.Constant(ir.VectorType(INT, len(constants)), constants)


def at(builder: Any, pointer: Any, offset: int, type_: Any) -> Any:
    """A pointer of a type, so many bytes behind another."""
    return builder.bitcast(builder.gep(pointer, [ir.Constant(INT, offset)]), type_.as_pointer())


def fused(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """``x * y + z``, rounded once where the processor can."""
    return builder.fadd(builder.fmul(x, y, flags=("contract",)), z, flags=("contract",))


def summed(builder: Any, total: Any) -> Any:
    """The sum of a vector's numbers: halves are added to each other, down to one."""
    half = total.type.count
    while half > 1:
        half //= 2
        nothing = ir.Constant(total.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(total, nothing, integers(part)) for part in (range(half), range(half, 2 * half))
        )
        total = builder.fadd(low, high)
    return builder.extract_element(total, ir.Constant(INT, 0))
