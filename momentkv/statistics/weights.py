"""Weights of tokens: given ones checked, those of attention to an anchor, and divisions by sums of them."""

from __future__ import annotations

import math
from typing import Any

from momentkv._array import Array, array_namespace, check_broadcast, concrete, library, mixed

__all__ = [
    "attended",
    "check_spread",
    "check_sum",
    "common_scale",
    "outer",
    "positive",
    "remainder",
    "weighted",
    "weighted_mean",
]

# Tokens from which on a mean is summed twice: NumPy adds along this axis one after the other.
LONG = 2**14


def weighted(xp: Any, weights: Array, k: Array) -> Array:
    """Weights in the accumulation dtype of ``k``, one for every token of every head."""
    if library(weights) != library(k):
        raise TypeError(mixed({"weights": weights, "k": k}))
    if not xp.isdtype(weights.dtype, ("integral", "real floating")):
        raise ValueError(
            f"weights is {weights.dtype} of shape {tuple(weights.shape)}; pass real numbers, or a mask as mask="
        )
    check_broadcast("weights", weights, k.shape[:-1])
    weights = xp.astype(weights, k.dtype, copy=False)
    wrong = ~(xp.isfinite(weights) & (weights >= 0))
    if concrete(wrong) and bool(xp.any(wrong)):
        first = float(xp.reshape(weights, (-1,))[int(xp.argmax(xp.astype(xp.reshape(wrong, (-1,)), xp.int32)))])
        raise ValueError(f"weights has an entry {first:g}; every weight must be finite and at least 0")
    weights, count = weights * xp.ones_like(k[..., 0]), max(k.shape[-2], 1)
    if concrete(weights) and bool(xp.any(xp.sum(weights / count, axis=-1) > xp.finfo(weights.dtype).max / count)):
        raise ValueError(f"weights has a sum that is no number of {weights.dtype}; divide all of them by their largest")
    return weights


def weighted_mean(w: Array, x: Array, total: Array) -> Array:
    """Mean of vectors (..., n, d) by weights (..., n), whose sums (..., 1) are given."""
    xp = array_namespace(x)
    mean = xp.sum(w[..., None] * x, axis=-2) / total
    if x.shape[-2] > LONG:
        mean = mean + xp.sum(w[..., None] * (x - mean[..., None, :]), axis=-2) / total
    return mean


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
    if concrete(anchor) and not bool(xp.all(xp.isfinite(anchor))):
        raise ValueError("anchor has an entry that is not finite; use the scaled query of one, or the mean of several")
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


def common_scale(
    weight: Array, log_scale: Array, other_weight: Array, other_scale: Array
) -> tuple[Array, Array | None, Array | None]:
    """The larger log-scale of two sets, of those with weight; and the factors that bring the weights of each to it.

    A factor is None where all are known to be one: nothing is rounded, and the empty set stays the identity of a merge.
    """
    xp = array_namespace(weight, other_weight)
    nothing, zero = xp.full_like(weight, -math.inf), xp.zeros_like(weight)
    sets = ((weight, log_scale), (other_weight, other_scale))
    top = xp.maximum(*(xp.where(w > 0, scale, nothing) for w, scale in sets))
    factors: list[Array | None] = []
    for w, scale in sets:
        below = xp.where(w > 0, scale, zero) - xp.where(w > 0, top, zero)
        check_spread(below)
        check_kept(w, below)
        factors.append(xp.exp(below) if not concrete(below) or bool(xp.any(below != 0)) else None)
    return top, factors[0], factors[1]


def check_spread(below: Array) -> None:
    """Raise where a weight ``exp(below)``, relative to the largest, would leave the normal numbers of its dtype."""
    if 0 in below.shape or not concrete(below):
        return
    xp = array_namespace(below)
    least, limit = float(xp.min(below)), 0.95 * math.log(float(xp.finfo(below.dtype).smallest_normal))
    if least < limit:
        raise ValueError(
            f"log-weights at the anchor spread by {-least:.0f} nats, and {below.dtype} resolves {-limit:.0f}; use "
            "float64, or an anchor nearer to zero"
        )


def check_kept(weight: Array, below: Array) -> None:
    """Raise where a set's weight times ``exp(below)`` would have too few digits to be kept, and be taken for none."""
    if 0 in below.shape or not concrete(weight, below):
        return
    xp = array_namespace(below)
    limits, zero = xp.finfo(below.dtype), xp.zeros_like(below)
    least = float(xp.min(xp.where((weight > 0) & (below < 0), below + xp.log(positive(xp, weight)), zero)))
    limit = math.log(float(limits.smallest_normal) / float(limits.eps))
    if least < limit:
        raise ValueError(
            f"log-weights at the anchor of one set are {-least:.0f} nats below the other's largest, and {below.dtype} "
            f"resolves {-limit:.0f}; use float64, or an anchor nearer to zero"
        )


def positive(xp: Any, x: Array) -> Array:
    """``x`` where it is positive and 1 elsewhere, to divide by."""
    return xp.where(x > 0, x, 1.0)


def outer(a: Array, b: Array) -> Array:
    """Outer product of the last axes."""
    return a[..., :, None] * b[..., None, :]


def check_sum(given: Array | None, weight: Array, added: Array) -> None:
    """Raise where a weight and what given weights add to it have a sum that is no number of their dtype."""
    xp = array_namespace(weight, added)
    if given is None or not concrete(weight, added):
        return
    if bool(xp.any(weight > xp.finfo(weight.dtype).max - added)):
        raise ValueError(
            f"weights has a sum that, with the weight that is there, is no number of {weight.dtype}; divide all "
            "weights by their largest"
        )


def remainder(whole: Array, part: Array, *, bounded: bool, counts: bool) -> Array:
    """What is left of a weight less a part: none where it is within rounding.

    Raises where that is less than nothing and, if bounds are to cover what is left, where rounding may hide tokens;
    it hides none where tokens count as one each.
    """
    xp = array_namespace(whole, part)
    left, rounding = whole - part, remainder_error(whole, part)
    if concrete(left) and bool(xp.any(left < -rounding)):
        raise ValueError(
            f"cannot downdate: the least weight that would be left is {float(xp.min(left)):g}; "
            "remove only tokens (k, v, mask, weights) that were added before"
        )
    lost = rounding if counts else 8 * xp.finfo(whole.dtype).eps * whole  # a sum of others may be a whole number, too
    hidden = (part > 0) & (lost > 0) & (left <= lost)
    if bounded and concrete(hidden) and bool(xp.any(hidden)):
        raise ValueError(
            f"cannot downdate moments with an extent to a weight of {float(xp.max(lost)):g} or less, where "
            "rounding may hide tokens that bounds must count; gather the moments of the remaining tokens anew, or take "
            "Moments.empty where none remain"
        )
    return xp.where(left > rounding, left, xp.zeros_like(left))


def remainder_error(whole: Array, part: Array) -> Array:
    """How far what is left of a weight less a part may be from the truth: a remainder within it is an empty set.

    Weights added in another order agree only to rounding; whole numbers up to 2 / eps have none.
    """
    xp = array_namespace(whole, part)
    eps = xp.finfo(whole.dtype).eps
    counts = (whole == xp.floor(whole)) & (part == xp.floor(part)) & (whole <= 2 / eps)
    return xp.where(counts, xp.zeros_like(whole), 8 * eps * whole)
