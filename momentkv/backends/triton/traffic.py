"""Bytes that a launch moves, counted load by load in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["Traffic", "counting"]


# Bytes that memory is read in, whatever is asked for.
SECTOR = 32


class Traffic:
    """Bytes loaded and stored, every program's own: what several read is counted as often.

    Attributes
    ----------
    loaded, stored : int
    touched : int
        Bytes of the sectors that each load touches, once for each load.
    """

    def __init__(self) -> None:
        self.loaded = self.stored = self.touched = 0


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Count what kernels that run inside the block load and store, without what masks leave out.

    Raises
    ------
    RuntimeError
        If kernels are not interpreted.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("loads are counted in the interpreter; set TRITON_INTERPRET=1 before Triton is imported")
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    traffic = Traffic()
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += int(mask.data.sum()) * size(pointers)
        traffic.touched += SECTOR * len(np.unique(pointers.data[mask.data] // SECTOR))
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += int(mask.data.sum()) * size(pointers)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    try:
        yield traffic
    finally:
        del builder.create_masked_load, builder.create_masked_store  # the methods of its class are left


def size(pointers: Any) -> int:
    """Bytes of what they point to."""
    return int(pointers.get_element_ty().primitive_bitwidth) // 8
