"""Weights of tokens: given ones checked, those of attention to an anchor, and divisions by sums of them."""

from __future__ import annotations

import math
from typing import Any

from momentkv._array import Array, array_namespace, check_broadcast

__all__ = ["attended", "check_spread", "outer", "positive", "weighted"]


def weighted(xp: Any, weights: Array, k: Array) -> Array:
    """Weights in the accumulation dtype of ``k``, one for every token of every head."""
    check_broadcast("weights", weights, k.shape[:-1])
    wrong = ~(xp.isfinite(weights) & (weights >= 0))
    if bool(xp.any(wrong)):
        first = float(xp.reshape(weights, (-1,))[int(xp.argmax(xp.astype(xp.reshape(wrong, (-1,)), xp.int32)))])
        raise ValueError(f"weights has an entry {first:g}; every weight must be finite and at least 0")
    return xp.astype(weights, k.dtype) * xp.ones_like(k[..., 0])


def attended(k: Array, weight: Array, anchor: Array) -> tuple[Array, Array]:
    """Weights times ``exp(anchor . k)``, by their scale.

    Parameters
    ----------
    k : array, shape (..., n, d)
        Finite, also where the weight is zero.
    weight : array, shape (..., n)
    anchor : array, shape (..., d)

    Returns
    -------
    log_scale : array, shape (...)
        Largest ``anchor . k`` among tokens of positive weight; ``-inf`` where there is none.
    weight : array, shape (..., n)
        To be multiplied by ``exp(log_scale)`` yet.
    """
    xp = array_namespace(k, weight, anchor)
    some = weight > 0
    logits = xp.matmul(k, anchor[..., None])[..., 0]
    top = xp.full_like(anchor[..., 0], -math.inf)
    if k.shape[-2]:
        top = xp.max(xp.where(some, logits, xp.full_like(logits, -math.inf)), axis=-1)
    zero = xp.zeros_like(logits)
    shift = xp.where(top > -math.inf, top, xp.zeros_like(top))
    below = xp.where(some, logits - shift[..., None], zero)
    check_spread(below + xp.log(positive(xp, weight)))
    return top, xp.where(some, weight * xp.exp(below), zero)


def check_spread(below: Array) -> None:
    """Raise where a weight ``exp(below)``, relative to the largest, would leave the normal numbers of its dtype."""
    if 0 in below.shape:
        return
    xp = array_namespace(below)
    least, limit = float(xp.min(below)), 0.95 * math.log(float(xp.finfo(below.dtype).smallest_normal))
    if least < limit:
        raise ValueError(
            f"log-weights at the anchor spread by {-least:.0f} nats, and {below.dtype} resolves {-limit:.0f}; use "
            "float64, or an anchor nearer to zero"
        )


def positive(xp: Any, x: Array) -> Array:
    """``x`` where it is positive and 1 elsewhere, to divide by."""
    return xp.where(x > 0, x, xp.ones_like(x))


def outer(a: Array, b: Array) -> Array:
    """Outer product of the last axes."""
    return a[..., :, None] * b[..., None, :]
