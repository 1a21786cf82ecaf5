"""Attention of few queries on a CPU by one compiled kernel, where Numba is installed: all tiers and the correction."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from momentkv.attention import AttentionState
from momentkv.backends.available import has_numba
from momentkv.backends.flash import differentiated
from momentkv.backends.layout import Layout, Tiers
from momentkv.backends.placed import kept
from momentkv.backends.plain import Prepared
from momentkv.backends.records import dtype_of
from momentkv.backends.strides import side_by_side
from momentkv.codes import Coding

__all__ = ["attend_compiled", "compiles"]

# Numbers in a vector of the kernel. Where registers are narrower, the compiler takes two or four for one.
LANES = 16
# Head dimensions that kernels are compiled for: multiples of that, from the first to the second. One takes seconds to
# compile, once on a machine, and for the dimensions of models alone that is worth it.
NARROWEST, WIDEST = 32, 256
# More queries at once than these are better served by products of matrices, of codes or of vectors.
MOST_OF_CODES, MOST_OF_VECTORS = 32, 4
# Numbers read, times queries, above which threads share the heads.
ALONE = 2**20


def compiles(q: torch.Tensor, tiers: Tiers, expansion: Prepared | None = None) -> bool:
    """Whether `attend_compiled` may be called, and is fastest."""
    coding = tiers.coding
    return (
        q.ndim == 4
        and q.device.type == tiers.keys.device.type == "cpu"
        and q.shape[-2] <= (MOST_OF_VECTORS if coding is None else MOST_OF_CODES)
        and has_width(q)
        and has_width(tiers.recent_values)
        and torch.float64 not in (q.dtype, tiers.recent_keys.dtype, tiers.recent_values.dtype)
        and (reads_vectors(tiers) if coding is None else reads_records(q, coding))
        and (expansion is None or reads_groups(expansion))
        and not differentiated(q, tiers.recent_keys, tiers.recent_values, tiers.keys, tiers.values)
        and may_compile()
    )


def has_width(x: torch.Tensor) -> bool:
    """Whether kernels are compiled for vectors or channels of as many numbers as the last axis has."""
    return x.shape[-1] % LANES == 0 and NARROWEST <= x.shape[-1] <= WIDEST


def may_compile() -> bool:
    """Whether a kernel may stand for operators: there is Numba, and nobody traces, counts or transforms these."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and has_numba()
    )


def reads_vectors(tiers: Tiers) -> bool:
    """Whether retained tokens are vectors of a dtype that the kernel reads, or there are none."""
    return tiers.layout.width == 0 or tiers.keys.dtype == tiers.values.dtype in (torch.float32, torch.bfloat16)


def reads_records(q: torch.Tensor, coding: Coding) -> bool:
    """Whether records are those that the kernel knows: keys around a mean, values around zero."""
    keys, values = coding.key_standard, coding.value_standard
    return (
        keys.mean is not None
        and values.mean is None
        and dtype_of(q, keys) == dtype_of(q, values) == torch.float32
        and coding.key_step.dtype == coding.value_step.dtype == torch.float16
        and not differentiated(keys.deviation, values.deviation)
    )


def reads_groups(expansion: Prepared) -> bool:
    """Whether the expansion has no full matrix, for which products of matrices are better."""
    half, dtype = expansion.half, expansion.into.dtype
    return expansion.slope is None and (half is None or half.shape[-1] == 1) and dtype == torch.float32


def attend_compiled(
    q: torch.Tensor, tiers: Tiers, expansion: Prepared | None = None, *, scale: float
) -> AttentionState:
    """Attention state over all tiers, and over the evicted tokens where an expansion stands for them; in 32 bits."""
    from momentkv.backends.numba.compiled import BFLOAT
    from momentkv.backends.numba.decode_kernel import kernel

    layout, coding, heads = tiers.layout, tiers.coding, q.shape[:-1]
    batch, kv_heads, _, dv = tiers.recent_values.shape
    asked = numbers(q).reshape(batch, kv_heads, -1, q.shape[-1])
    out, lse = np.empty((*asked.shape[:-1], dv), np.float32), np.empty(asked.shape[:-1], np.float32)
    bits, graded, of_coding = (0, 0), False, (HALVES, HALVES, NUMBERS[0], NUMBERS[0], BYTES, NUMBERS[0])
    if coding is not None and layout.width:
        bits, keys, values = coding.bits, coding.key_standard, coding.value_standard
        graded = keys.order is not None
        of_coding = (
            *(numbers(x.view(torch.uint16)) for x in (coding.key_step, coding.value_step)),
            numbers(keys.mean),
            numbers(keys.deviation),
            numbers(keys.order.to(torch.uint8)) if keys.order is not None else BYTES,
            numbers(values.deviation),
        )
    arguments = (
        asked,
        np.float32(scale),
        *((array_of(x) for x in (tiers.keys, tiers.values)) if layout.width else NOTHING),
        FLAGS if tiers.valid is None else numbers(tiers.valid.expand(batch, kv_heads, -1)),
        slots_of(layout),
        *of_coding,
        *(array_of(x.float()) for x in (tiers.recent_keys, tiers.recent_values)),
        FLAGS if tiers.recent_valid is None else numbers(tiers.recent_valid.expand(batch, kv_heads, -1)),
        *(EMPTY if expansion is None else of_groups(expansion)),
        out,
        lse,
    )
    if coding is None and layout.width and tiers.keys.dtype == torch.bfloat16:
        bits = (BFLOAT, BFLOAT)
    run = kernel(*bits, asked.shape[-1], dv, int(graded))
    read = (sum(layout.widths) + kv_heads * tiers.recent_keys.shape[-2]) * batch * (asked.shape[-1] + dv)
    run_shared(run, arguments, batch * kv_heads, read * asked.shape[-2])
    return AttentionState(torch.from_numpy(out).reshape(*heads, dv), torch.from_numpy(lse).reshape(heads))


def run_shared(run: Callable[..., None], arguments: tuple[Any, ...], pairs: int, work: int) -> None:
    """Run a kernel on all pairs of row and head, in several threads if so many numbers are worth it."""
    parts = min(pairs, torch.get_num_threads()) if work > ALONE else 1
    own, *rest = pairwise(pairs * part // parts for part in range(parts + 1))
    others, own_parts = [], [own]
    for part in rest:
        try:
            others.append(pool(parts - 1).submit(run, *arguments, *part))
        except RuntimeError as error:
            if "cannot schedule" not in str(error):
                raise
            own_parts.append(part)  # the main thread has ended, after which no pool takes work
    for part in own_parts:
        run(*arguments, *part)
    for other in others:
        other.result()


def of_groups(expansion: Prepared) -> tuple[Any, ...]:
    """What the kernel reads of an expansion."""
    anchor, half, cap = expansion.less_anchor, expansion.half, expansion.cap
    return (
        numbers(expansion.against),
        numbers(expansion.into),
        numbers(expansion.log_weight)[..., 0, :],
        NUMBERS[0] if anchor is None else numbers(anchor)[..., 0, :],
        NUMBERS[0] if half is None else numbers(half)[..., 0],
        NUMBERS[1] if cap is None else numbers(cap)[..., 0, 0],
    )


def numbers(x: Any) -> Any:
    """A tensor as an array without gaps, of 32 bits where it is of floating-point numbers."""
    return (x.detach().float() if x.is_floating_point() else x.detach()).contiguous().numpy()


def array_of(x: torch.Tensor) -> Any:
    """A tensor of vectors or records as an array, each without gaps; bfloat16, which NumPy has not, as its bits."""
    return side_by_side(x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).detach().numpy()


def slots_of(layout: Layout) -> Any:
    """First slot and number of slots of each head."""
    return kept(layout, "slots", lambda: np.array([layout.starts, layout.widths], dtype=np.int64).T.copy())


@cache
def pool(workers: int) -> ThreadPoolExecutor:
    """Threads that wait for work; a kernel holds no lock of Python's."""
    return ThreadPoolExecutor(workers, thread_name_prefix="momentkv")


# A child process has its parent's list of threads, and none of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)

# What there is none of.
NUMBERS = {0: np.empty((0, 0, 0), np.float32), 1: np.empty((0, 0), np.float32)}
NOTHING = (NUMBERS[0], NUMBERS[0])
HALVES, BYTES, FLAGS = np.empty((0, 0), np.uint16), np.empty((0, 0, 0), np.uint8), np.empty((0, 0, 0), np.bool_)
EMPTY = (np.empty((0, 0, 0, 0), np.float32), np.empty((0, 0, 0, 0), np.float32), *([NUMBERS[0]] * 3), NUMBERS[1])
