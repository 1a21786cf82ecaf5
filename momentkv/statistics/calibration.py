"""The strength of summaries, fitted to queries while the tokens that they stand for are still at hand."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from momentkv._array import Array, array_namespace, check_arrays
from momentkv.attention import group_queries, log_sum_exp, logits, scale_of
from momentkv.statistics.expansion import estimate_expansion
from momentkv.statistics.weights import positive
from momentkv.statistics.window import QueryWindow

if TYPE_CHECKING:
    from momentkv.statistics.summaries import Summaries

__all__ = ["CAP", "fitted_strength", "gain_cap", "refitted_cap"]

# No query is credited with more than so many times the mean variance gain of the window. A quadratic has no bound.
CAP = 3.0
# Units of rounding in a gap, an estimate: of the sums of two logits over some hundred channels, and of two lse.
ROUNDINGS = 8


def gain_cap(strength: Array, key_variance: Array, query_variance: Array) -> Array:
    """Largest gain that is credited, shape (...): so many times its mean over queries of that variance."""
    return CAP * 0.5 * strength * array_namespace(strength).sum(key_variance * query_variance, axis=-1)


def rounding_of(scaled: Array, k: Array, mask: Array | None) -> Array:
    """About what rounding may change in a gap of two ``lse``, shape (..., query): a few units of the largest logit."""
    xp = array_namespace(scaled, k)
    length = xp.linalg.vector_norm(xp.astype(k, scaled.dtype, copy=False), axis=-1)
    length = length if mask is None else xp.where(mask, length, xp.zeros_like(length))
    largest = xp.linalg.vector_norm(scaled, axis=-1) * xp.max(length, axis=-1)[..., None]
    return ROUNDINGS * xp.finfo(scaled.dtype).eps * (1 + largest)


def refitted_cap(summaries: Summaries, strength: Array, q: Array, *, scale: float | None) -> Array:
    """The cap in proportion to a new strength; where the old one was 0, that of the queries which it was fitted to."""
    xp, before = array_namespace(strength), summaries.strength
    variance = QueryWindow.from_queries(q, summaries.anchor.shape[-2], scale=scale).variance
    anew = gain_cap(strength, summaries.key_variance, xp.astype(variance, strength.dtype, copy=False))
    return xp.where(before > 0, summaries.cap * (strength / positive(xp, before)), anew)


def fitted_strength(summaries: Summaries, q: Array, k: Array, *, scale: float | None, mask: Array | None) -> Array:
    """The strength that `Summaries.calibrate` finds; arguments as there."""
    anchor = summaries.anchor
    xp = check_arrays(q=q, k=k, summaries=anchor)
    seen = None if mask is None else mask[..., None, None, :]
    true = log_sum_exp(logits(q, k, scale=scale, mask=seen))
    flat = dataclasses.replace(summaries, strength=xp.zeros_like(summaries.strength))
    rough = estimate_expansion(q, flat.expansion(), scale=scale).lse
    rough = xp.where(xp.isfinite(rough), rough, xp.full_like(rough, math.nan))  # no tokens: nothing to fit
    gap = group_queries((xp.reshape(true, rough.shape) - rough)[..., None], k.shape[-3])[..., 0]
    gap = xp.astype(gap, anchor.dtype, copy=False)  # queries may have more bits
    scaled = group_queries(xp.astype(q, anchor.dtype, copy=False), anchor.shape[-2]) * scale_of(scale, q.shape[-1])
    off = scaled - anchor[..., None, :]
    half = 0.5 * xp.matmul(off * off, summaries.key_variance[..., None])[..., 0]
    some = xp.isfinite(gap) & (half > 0)
    zero = xp.zeros_like(half)
    half, gap = xp.where(some, half, zero), xp.where(some, gap, zero)
    square = xp.sum(half * half, axis=-1)
    # What gaps may have lost counts as prior: a fit to rounding would be any number.
    lost = xp.where(some, rounding_of(scaled, k, mask), zero)
    prior = square + xp.sum(lost * lost, axis=-1)
    fitted = (xp.sum(half * gap, axis=-1) + summaries.strength * prior) / positive(xp, square + prior)
    fitted = xp.minimum(xp.maximum(fitted, xp.zeros_like(fitted)), xp.ones_like(fitted))
    return xp.where(square > 0, fitted, summaries.strength)
