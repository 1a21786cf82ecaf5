"""Correctness of the decode kernels on the device against float64, to what rounding explains."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from triton.errors import TritonError

from momentkv.backends.triton.decode import decode_triton
from momentkv.backends.triton.tuned import Choices
from momentkv.codes import SPLIT
from momentkv.testing.decoding import Decode, decode_cases, expected, f64, logits_error, make
from momentkv.testing.gpu.parts import Row, Skip

__all__ = ["errors"]

FEW = 6  # of the cases, in a rehearsal


def errors(rehearse: bool, dtype: str) -> Iterator[Row]:
    """One row a case: the largest error as a share of what rounding explains, and relative to the exact output."""
    kind = getattr(torch, dtype)
    if rehearse and dtype == "bfloat16":
        raise Skip("Triton's interpreter cannot multiply matrices of bfloat16")
    cases = rehearsed(kind) if rehearse else all_cases(kind)
    if rehearse:
        yield from map(tried, cases)
        return
    # Most of the time is spent compiling and in float64, on a core each.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    cases.sort(key=lambda case: -case.batch * case.kv_heads * case.capacity)
    with get_context("spawn").Pool(max(1, (os.cpu_count() or 1) - 2)) as pool:
        yield from pool.imap(tried, cases)


def tried(case: Decode) -> Row:
    """One case, where there is a GPU on it; what a kernel raises costs this case alone."""
    # Whatever is allocated and not written is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        return {"case": str(case)} | error_of(case, "cuda" if torch.cuda.is_available() else "cpu")
    except (RuntimeError, TritonError) as error:
        return {"case": str(case), "right": False, "share": 1e300, "relative": 1e300, "why": str(error)[-500:]}


def rehearsed(dtype: torch.dtype) -> list[Decode]:
    """A few of the small cases."""
    small = [case for case in decode_cases(dtype, dtype) if case.d <= 40 and case.capacity > 1]
    plain, coded = ([case for case in small if (case.bits is None) == without] for without in (True, False))
    return plain[: FEW - 2] + coded[:2]


def all_cases(dtype: torch.dtype) -> list[Decode]:
    """Those of the interpreter, and more: larger ones, and as many splits as the device wants."""
    kinds = ("none", "order 0", "order 1", "order 2", "summaries x 1", "summaries x 12", "summaries x 40")
    cases = decode_cases(dtype, dtype)
    cases += [Decode(d=d, dtype=dtype, estimate=kind, splits=0) for d in (64, 80, 96, 128, 192, 256) for kind in kinds]
    few = Decode(dtype=dtype, packed=True, kv_heads=3, recent=40, splits=0, capacity=150)
    cases += [
        dataclasses.replace(few, d=d, bits=SPLIT[bits], estimate=kind)
        for d in (64, 96, 128, 256)
        for bits in (3, 4, 8)
        for kind in ("none", "summaries x 12")[: 2 if d == 128 else 1]
        if d <= 128 or dtype != torch.float32
    ]
    for d, kind, scored in ((128, "summaries x 12", False), (128, "order 1", True), (64, "none", True)):
        large = Decode(d=d, dtype=dtype, estimate=kind, scored=scored, splits=0, group=4, kv_heads=8, capacity=1500)
        cases += [
            large,
            dataclasses.replace(large, counted=True),
            dataclasses.replace(large, masked=True),
            dataclasses.replace(large, packed=True),
            dataclasses.replace(large, packed=True, recent=65),
            dataclasses.replace(large, packed=True, recent=65, recent_masked=True, batch=20, capacity=600),
            dataclasses.replace(large, packed=True, masked=True, group=24),
            *(dataclasses.replace(large, packed=True, counted=True, recent=65, bits=SPLIT[bits]) for bits in (3, 4, 8)),
            dataclasses.replace(large, packed=True, recent=65, bits=SPLIT[4], batch=20, capacity=600),
            dataclasses.replace(large, packed=True, bits=SPLIT[8], group=24),
        ]
    return list(dict.fromkeys(cases))


def error_of(case: Decode, device: str, *, choices: Choices | None = None) -> Row:
    """Run a case, with the sizes that are chosen, by default those of this device."""
    x = make(case, device)
    out, lse, logits = decode_triton(
        x.q,
        x.k,
        x.v,
        x.positions,
        x.counts,
        x.starts,
        case.capacity,
        x.recent,
        x.expansion,
        case.scale,
        case.scored,
        case.splits or None,
        x.coding,
        choices,
    )
    exact, exact_logits, allowed = expected(case, x)
    shares = [share(f64(out), exact.out, allowed.out), share(f64(lse), exact.lse, allowed.lse)]
    if logits is not None:
        shares.append(share(f64(logits).reshape(exact_logits.shape), exact_logits, logits_error(case, x)))
    norm = float(np.linalg.norm(exact.out))
    relative = float(np.linalg.norm(f64(out) - exact.out)) / norm if norm else 0.0
    return {"right": max(shares) <= 1.0, "share": max(shares), "relative": relative}


def share(actual: NDArray[Any], exact: NDArray[Any], allowed: NDArray[Any] | float) -> float:
    """Largest error as a share of what is allowed; infinite for NaN, or an infinity in the wrong place."""
    same = actual == exact
    off = np.abs(np.where(same, 0.0, actual) - np.where(same, 0.0, exact))
    ratio = off / np.maximum(np.broadcast_to(allowed, off.shape), 1e-300)
    found = float(np.max(np.where(same, 0.0, ratio), initial=0.0))
    return found if np.isfinite(found) else 1e300
