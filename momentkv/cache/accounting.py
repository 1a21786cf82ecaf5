"""What a state costs in bytes, and in retained tokens that would cost the same."""

from __future__ import annotations

import numpy as np

from momentkv._numbers import whole_number
from momentkv.statistics.corrections import Correction, get_correction
from momentkv.statistics.moments import Moments

__all__ = ["state_bytes", "token_equivalents"]


def state_bytes(
    correction: str | Correction,
    *,
    order: int | None = 1,
    d: int,
    dv: int | None = None,
    certify: int | None = None,
    statistics_bits: int | None = None,
) -> int:
    """Bytes of a correction's state per KV head, the query statistics that it is anchored by included.

    Parameters
    ----------
    correction : str or Correction
    order : {1, 0, None}
        As a cache takes it.
    d, dv : int
        Dimension of keys and of values (``d`` by default).
    certify : {0, 1, 2, None}
        Order of the evidence that a cache keeps beside it.
    statistics_bits : {None, 16}
        As a cache takes it.

    Raises
    ------
    ValueError
        If a dimension is less than 1, or another argument none that a cache takes.

    Notes
    -----
    What is not in 16 bits is float32 whatever the cache stores (float64 beside a float64 cache). Derivation:
    docs/derivations/cost.md.

    Examples
    --------
    >>> state_bytes("moments", d=64) == 4 * (1 + 64 + 64 + 64 * 64)
    True
    >>> state_bytes("none", d=64)
    0
    >>> state_bytes("none", d=64, certify=0) == 4 * (1 + 64 + 64 + 64 + 64 + 7)
    True
    """
    d, dv = whole_number("d", d), whole_number("dv", d if dv is None else dv)
    for name, size in (("d", d), ("dv", dv)):
        if size < 1:
            raise ValueError(f"{name} is {size}; a key and a value have at least one number")
    k, v = (np.zeros((0, size), dtype=np.float32) for size in (d, dv))
    evidence = 0 if certify is None else Moments.empty(k, v, order=certify, extent=True).nbytes
    kind = get_correction(correction, order=order, bits=statistics_bits)
    queries = 2 * d * k.itemsize if kind.anchored else 0
    return int(kind.empty(k, v).nbytes) + queries + evidence


def token_equivalents(
    correction: str | Correction,
    *,
    order: int | None = 1,
    d: int,
    dv: int | None = None,
    itemsize: int = 4,
    statistics_bits: int | None = None,
) -> float:
    """Retained tokens whose keys and values cost as many bytes as a correction's state, per KV head.

    Parameters
    ----------
    correction, order, d, dv, statistics_bits
        As in `state_bytes`.
    itemsize : int
        Bytes of one number of the cached keys and values.

    Notes
    -----
    Derivation: docs/derivations/cost.md.

    Examples
    --------
    >>> round(token_equivalents("moments", d=64), 1), round(token_equivalents("summaries", d=64), 1)
    (33.0, 16.1)
    >>> round(token_equivalents("summaries", d=64, itemsize=2, statistics_bits=16), 1)
    17.7
    """
    if whole_number("itemsize", itemsize) < 1:
        raise ValueError(f"itemsize is {itemsize}; a number takes at least one byte")
    total = state_bytes(correction, order=order, d=d, dv=dv, statistics_bits=statistics_bits)
    return total / ((d + (dv or d)) * itemsize)
