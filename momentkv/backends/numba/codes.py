"""Attention to records by the compiled kernel, where Numba is installed and the kernel has been made for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from momentkv.attention import AttentionState
from momentkv.backends.available import has_numba
from momentkv.backends.flash import differentiated
from momentkv.backends.layout import Layout, Tiers
from momentkv.backends.placed import kept
from momentkv.backends.records import dtype_of
from momentkv.codes import Coding

__all__ = ["attend_compiled", "compiles"]

# Head dimensions that kernels are compiled for: multiples of the first number, up to the last.
LANES, WIDEST = 16, 256
# A kernel takes seconds to compile, once on a machine. Below, nothing is won.
NARROWEST = 32


def compiles(q: torch.Tensor, tiers: Tiers, coding: Coding) -> bool:
    """Whether `attend_compiled` may be called."""
    keys, values = coding.key_standard, coding.value_standard
    return (
        q.ndim == 4
        and q.device.type == tiers.keys.device.type == "cpu"
        and all(x.shape[-1] % LANES == 0 and NARROWEST <= x.shape[-1] <= WIDEST for x in (q, values.deviation))
        and keys.mean is not None
        and values.mean is None
        and dtype_of(q, keys) == dtype_of(q, values) == torch.float32
        and coding.key_step.dtype == coding.value_step.dtype == torch.float16
        and not differentiated(q, keys.deviation, values.deviation)
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # what is traced or counted are operators
        and has_numba()
    )


def attend_compiled(q: torch.Tensor, tiers: Tiers, coding: Coding, *, scale: float) -> AttentionState:
    """Attention state over retained tokens in few bits."""
    from momentkv.backends.numba.codes_kernel import kernel

    layout, of_keys, of_values, heads = tiers.layout, coding.key_standard, coding.value_standard, q.shape[:-1]
    batch, kv_heads, d = of_keys.deviation.shape
    dv, mean, order = of_values.deviation.shape[-1], of_keys.mean, of_keys.order
    asked = q.detach().float().reshape(batch, kv_heads, -1, d).contiguous()
    out, lse = asked.new_empty((*asked.shape[:-1], dv)), asked.new_empty(asked.shape[:-1])
    if order is None:
        order = tiers.keys.new_empty((0, 0, 0))
    valid = asked.new_empty((0, 0, 0), dtype=torch.bool) if tiers.valid is None else tiers.valid
    kernel(*coding.bits, d, dv, int(of_keys.order is not None))(
        asked.numpy(),
        np.float32(scale),
        *((x if x.stride(-1) == 1 else x.contiguous()).numpy() for x in (tiers.keys, tiers.values)),
        *(numbers(x.detach().contiguous().view(torch.uint16)) for x in (coding.key_step, coding.value_step)),
        *(numbers(x) for x in (mean, of_keys.deviation, order, of_values.deviation, valid)),
        slots_of(layout),
        out.numpy(),
        lse.numpy(),
    )
    return AttentionState(out.reshape(*heads, dv), lse.reshape(heads))


def numbers(x: Any) -> Any:
    """A tensor as an array without gaps, of 32 bits where it is of floating-point numbers."""
    return (x.detach().float() if x.is_floating_point() else x).contiguous().numpy()


def slots_of(layout: Layout) -> Any:
    """First slot and number of slots of each head."""
    return kept(layout, "slots", lambda: np.array([layout.starts, layout.widths], dtype=np.int64).T.copy())
