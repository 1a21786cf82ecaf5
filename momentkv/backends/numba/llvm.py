"""Words of LLVM's language that the decode kernel says often."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llvmlite import ir

__all__ = ["BYTE", "FLOAT", "INT", "at", "fused", "integers"]

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
