"""When the decode kernel is compiled, for which arrays, and where the result is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types

__all__ = ["BFLOAT", "compiled", "signature_of"]

# In place of a number of bits: vectors of bfloat16.
BFLOAT = -16
# What vectors are stored as; codes are bytes.
STORED = {0: types.float32, BFLOAT: types.uint16}


def compiled(signature: Any) -> Callable[[Any], Any]:
    """A decorator that compiles at once, and keeps the result on disk where there is a place for it."""

    def decorator(function: Any) -> Any:
        try:
            return njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except RuntimeError:  # neither beside this file nor in the user's home
            return njit(signature, nogil=True, error_model="numpy")(function)

    return decorator


def signature_of(key_bits: int, value_bits: int) -> Any:
    """Of the arguments of a kernel; without it there would be one for tokens side by side, one for those far apart."""

    def array(dtype: Any, axes: int, layout: str = "C") -> Any:
        return types.Array(dtype, axes, layout)

    number, apart = types.float32, "A"
    return types.void(
        array(number, 4),
        number,
        *(array(STORED.get(bits, types.uint8), 3, apart) for bits in (key_bits, value_bits)),
        array(types.bool_, 3),
        array(types.int64, 2),
        *[array(types.uint16, 2)] * 2,
        *[array(number, 3)] * 2,
        array(types.uint8, 3),
        array(number, 3),
        *[array(number, 4, apart)] * 2,
        array(types.bool_, 3),
        *[array(number, 4)] * 2,
        *[array(number, 3, apart)] * 3,
        array(number, 2, apart),
        array(number, 4),
        array(number, 3),
        *[types.int64] * 2,
    )
