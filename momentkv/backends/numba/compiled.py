"""When the decode kernel is compiled, for which arrays, and where the result is kept."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit, types

__all__ = ["BFLOAT", "compiled", "signature_of"]

# Files that kernels are made of: their own, and those whose constants and functions they are compiled with. Numba looks
# at the file that defines a kernel alone, and would go on with what it compiled before one of the others changed.
PACKAGE = Path(__file__).parents[2]
MADE_OF = ("backends/numba/*.py", "codes/*.py", "statistics/clustering.py")

# In place of a number of bits: vectors of bfloat16.
BFLOAT = -16
# What vectors are stored as; codes are bytes.
STORED = {0: types.float32, BFLOAT: types.uint16}


def compiled(signature: Any) -> Callable[[Any], Any]:
    """A decorator that compiles at once, and keeps the result on disk where there is a place for it."""

    def decorator(function: Any) -> Any:
        # What is kept goes by this name.
        function.__qualname__ = f"{function.__name__}_{fingerprint()}"
        try:
            return njit(signature, nogil=True, error_model="numpy", cache=True)(function)
        except RuntimeError:  # neither beside this file nor in the user's home
            pass
        except (OSError, EOFError, pickle.UnpicklingError) as error:  # a full disk, a file that was cut off
            say_unkept(f"{type(error).__name__}: {error}")
        return njit(signature, nogil=True, error_model="numpy")(function)

    return decorator


@cache
def fingerprint() -> str:
    """Of the source of the kernels, and of what they are compiled with."""
    digest = hashlib.sha256()
    for pattern in MADE_OF:
        for path in sorted(PACKAGE.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def say_unkept(error: str) -> None:
    """A warning, once a process, that kernels have to be compiled again in the next one."""
    warnings.warn(
        f"compiled kernels of momentkv cannot be kept on disk or read from it ({error}): each process compiles them "
        "anew, which takes seconds; make room, or delete the files of *.nbi and *.nbc in Numba's cache folder",
        RuntimeWarning,
        stacklevel=2,
    )


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
