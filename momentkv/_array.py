"""What every module asks of an array library: its namespace, and the dtype to add things up in.

Shapes used everywhere (``...`` are any leading axes, usually the batch):

========  =========================================  ==============================
name      shape                                      meaning
========  =========================================  ==============================
``q``     ``(..., q_head, q_len, d)``                queries, post-RoPE, unscaled
``k``     ``(..., kv_head, n, d)``                   keys, post-RoPE
``v``     ``(..., kv_head, n, dv)``                  values
``lse``   ``(..., q_head, q_len)``                   natural log of a softmax sum
========  =========================================  ==============================

With grouped queries ``q_head = kv_head * group``, and query head ``h`` reads KV head ``h // group``.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace, device, size

__all__ = ["Array", "accumulate", "accumulation_dtype", "array_namespace", "check_broadcast", "device", "nbytes"]

# Arrays of any library: the array API has no common base class to name here.
Array = Any


def accumulation_dtype(xp: Any, *dtypes: Any) -> Any:
    """Dtype for sums over tokens: float64 if any input is float64, otherwise float32.

    A running mean in bfloat16 or float16 stagnates after a few hundred tokens, so nothing is added up in them.
    """
    return xp.float64 if any(dtype == xp.float64 for dtype in dtypes) else xp.float32


def accumulate(xp: Any, *arrays: Array) -> tuple[Array, ...]:
    """Cast all arrays to their common accumulation dtype (no copy where they have it)."""
    dtype = accumulation_dtype(xp, *(x.dtype for x in arrays))
    return tuple(xp.astype(x, dtype, copy=False) for x in arrays)


def nbytes(x: Array) -> int:
    """Bytes that the elements of an array occupy.

    Examples
    --------
    >>> import numpy as np
    >>> nbytes(np.zeros((2, 3), dtype=np.float32))
    24
    """
    xp = array_namespace(x)
    if xp.isdtype(x.dtype, "bool"):
        bits = 8
    elif xp.isdtype(x.dtype, "integral"):
        bits = xp.iinfo(x.dtype).bits
    else:
        bits = xp.finfo(x.dtype).bits
    return (size(x) or 0) * bits // 8


def check_broadcast(name: str, x: Array, shape: tuple[int, ...]) -> None:
    """Raise unless ``x`` broadcasts to ``shape``."""
    trailing = shape[len(shape) - x.ndim :] if x.ndim <= len(shape) else None
    if trailing is None or any(mine not in (1, whole) for mine, whole in zip(x.shape, trailing, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, which does not broadcast to {tuple(shape)}")
