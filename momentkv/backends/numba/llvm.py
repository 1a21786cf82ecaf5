"""Words of LLVM's language that the decode kernel says often."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llvmlite import ir

from momentkv.backends.numba.decode import LANES

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


def summed(builder: Any, x: Any, y: Any, d: int, term: Callable[[Any, Any, Any], Any]) -> Any:
    """The sum over two vectors of ``d`` numbers of what ``term`` adds for a part of each to a total, lane by lane."""
    vector = ir.VectorType(FLOAT, LANES)
    total = ir.Constant(vector, [ir.Constant(FLOAT, 0.0)] * LANES)
    for start in range(0, d, LANES):
        one, other = (builder.load(at(builder, each, 4 * start, vector), align=4) for each in (x, y))
        total = term(one, other, total)
    half = LANES
    while half > 1:  # halves are added to each other, down to one number
        half //= 2
        nothing = ir.Constant(total.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(total, nothing, integers(part)) for part in (range(half), range(half, 2 * half))
        )
        total = builder.fadd(low, high)
    return builder.extract_element(total, ir.Constant(INT, 0))
