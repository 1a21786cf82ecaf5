"""Records of a few bits as tokens, on a CPU by a compiled kernel, where Numba is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from momentkv.backends.flash import differentiated
from momentkv.backends.layout import Layout
from momentkv.backends.numba.decode import (
    BYTES,
    NUMBERS,
    array_of,
    has_width,
    may_compile,
    numbers,
    run_shared,
    slots_of,
)
from momentkv.codes import Standard

__all__ = ["compiles_tokens", "tokens_compiled"]


def compiles_tokens(codes: torch.Tensor, step: torch.Tensor, standard: Standard) -> bool:
    """Whether `tokens_compiled` may be called."""
    deviation = standard.deviation
    return (
        codes.ndim == 3
        and codes.device.type == "cpu"
        and has_width(deviation)
        and deviation.dtype != torch.float64
        and step.dtype == torch.float16
        and not differentiated(*(x for x in (standard.mean, deviation) if x is not None))
        and may_compile()
    )


def tokens_compiled(
    layout: Layout, codes: torch.Tensor, step: torch.Tensor, standard: Standard, bits: int
) -> torch.Tensor:
    """`momentkv.backends.ArrayBackend.tokens` in 32 bits."""
    from momentkv.backends.numba.tokens_kernel import kernel

    batch, heads, d = standard.deviation.shape
    mean, order = standard.mean, standard.order
    out: Any = np.empty((batch, heads, layout.width, d), np.float32)
    arguments = (
        array_of(codes),
        numbers(step.view(torch.uint16)),
        NUMBERS[0] if mean is None else numbers(mean),
        numbers(standard.deviation),
        BYTES if order is None else numbers(order.to(torch.uint8)),
        slots_of(layout),
        out,
    )
    run_shared(kernel(bits, d, int(order is not None)), arguments, batch * heads, out.size)
    return torch.from_numpy(out)
