"""Exact correction of a case whose first tokens are retained and whose others are evicted, and its rounding error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from momentkv.testing import oracle
from momentkv.testing.rounding import StateError, attention_error, estimate_error, merge_error, moments_error, unit
from momentkv.testing.strategies import Case


class Correction(NamedTuple):
    kept: tuple[np.ndarray, np.ndarray]
    gone: tuple[np.ndarray, np.ndarray]
    exact: oracle.State
    error: StateError


def correction(case: Case, cut: int, order: int) -> Correction:
    q, k, v = case.arrays()
    cut, u, scale = min(cut, case.n), unit(case.dtype), case.factor()
    kept, gone = (k[..., :cut, :], v[..., :cut, :]), (k[..., cut:, :], v[..., cut:, :])
    retained, sums = oracle.attend(q, *kept, scale), oracle.moments(*gone)
    evicted = oracle.estimate(q, sums, order, scale)
    size = max(np.linalg.norm(x, axis=-1).max(initial=0.0) for x in (v, evicted.out))
    of_retained = attention_error(q, *kept, retained.lse, u, scale)
    of_evicted = estimate_error(q, sums, moments_error(*gone, u), evicted.lse, u, scale)
    # The merge happens at the larger of the two lse.
    lse = np.maximum(np.nan_to_num(np.abs(retained.lse), posinf=0), np.nan_to_num(np.abs(evicted.lse), posinf=0))
    return Correction(kept, gone, oracle.merge(retained, evicted), merge_error(of_retained, of_evicted, size, lse, u))
