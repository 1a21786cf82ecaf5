"""Tokens as records of few bits would give them, on a CPU by a compiled kernel, where Numba is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from momentkv.backends.flash import differentiated
from momentkv.backends.numba.decode import NUMBERS, has_width, may_compile, numbers, run_shared
from momentkv.codes import Standard, less_centre

__all__ = ["compiles_rounded", "rounded_compiled"]


def compiles_rounded(x: torch.Tensor, standard: Standard) -> bool:
    """Whether `rounded_compiled` may be called."""
    return (
        x.ndim == 4
        and x.device.type == "cpu"
        and has_width(x)
        and standard.deviation.shape == (*x.shape[:2], x.shape[-1])  # the kernel does not broadcast
        and torch.float64 not in (x.dtype, standard.deviation.dtype)
        and not differentiated(x, *(each for each in (standard.mean, standard.deviation) if each is not None))
        and may_compile()
    )


def rounded_compiled(x: torch.Tensor, standard: Standard, bits: int, exact: torch.Tensor) -> torch.Tensor:
    """`momentkv.backends.ArrayBackend.rounded`."""
    from momentkv.backends.numba.rounded_kernel import kernel

    mean, deviation = standard.mean, standard.deviation
    batch, heads, n, d = x.shape
    middle = less_centre(bits, standard, deviation.new_empty(0, dtype=torch.float32))
    middle = deviation.new_full((1, d), middle, dtype=torch.float32) if standard.order is None else middle.expand(1, d)
    middle = standard.disordered(middle.expand(batch, heads, 1, d))
    out: Any = np.empty((batch, heads, n, d), np.float32)
    arguments = (
        numbers(x),
        numbers(exact.expand(batch, heads, n)),
        NUMBERS[0] if mean is None else numbers(mean),
        numbers(deviation),
        numbers(middle)[..., 0, :],
        out,
    )
    run_shared(kernel(d), arguments, batch * heads, out.size)
    return torch.from_numpy(out).to(x.dtype)
