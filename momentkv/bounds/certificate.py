"""Certified intervals and errors of whole states: the least of what the theorems give, rounding included."""

from __future__ import annotations

import math
from typing import Any

from momentkv._array import Array, array_namespace, check_arrays
from momentkv._numbers import check_kind
from momentkv.attention import AttentionState, broadcastable, group_queries, ungroup_queries
from momentkv.bounds import theorems
from momentkv.bounds.checks import unchecked
from momentkv.bounds.functions import safe_ratio
from momentkv.bounds.reading import CompactSlope, Reading, read, read_grouped, scaled_queries
from momentkv.bounds.rounding import unit
from momentkv.bounds.theorems import Interval, norm
from momentkv.statistics.moments import Moments

__all__ = ["lse_interval", "output_error", "output_error_of_parts", "value_error"]

DINKELBACH_STEPS = 8
# What a reading gives fits.
output_from_representation = unchecked(theorems.output_from_representation)
output_from_value = unchecked(theorems.output_from_value)
share_from_mass = unchecked(theorems.share_from_mass)
value_from_range = unchecked(theorems.value_from_range)
value_from_representation = unchecked(theorems.value_from_representation)
value_from_residual = unchecked(theorems.value_from_residual)


def lse_interval(q: Array, moments: Moments, *, scale: float | None = None) -> Interval:
    r"""Interval of the lse of the tokens that the moments stand for (Theorems B1 to B4).

    Parameters
    ----------
    q, moments, scale
        As in `momentkv.correction.estimate`; the moments must have an extent. Order 2 makes the interval narrower.

    Returns
    -------
    Interval
        Arrays of shape (..., q_head, q_len); both ends ``-inf`` for the empty set.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv import Moments, attend
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.normal(size=(1, 1, 8)), 0.3 * rng.normal(size=(1, 64, 8)), rng.normal(size=(1, 64, 8))
    >>> low, high = lse_interval(q, Moments.from_tokens(k, v, order=2, extent=True))
    >>> bool((low <= attend(q, k, v).lse).all() and (attend(q, k, v).lse <= high).all())
    True
    """
    reading = read(q, moments, scale=scale)
    ends = (reading.base + reading.mass.low - reading.base_error, reading.base + reading.mass.high + reading.base_error)
    low, high = (ungroup_queries(x[..., None], q.shape[-3], q.shape[-2])[..., 0] for x in ends)
    return Interval(low, high)


def value_error(
    q: Array,
    moments: Moments,
    estimate: Array,
    *,
    scale: float | None = None,
    slope: CompactSlope | None = None,
) -> Array:
    r"""Bound of $\lVert o_E - \hat o_E \rVert$ for any estimate of the evicted tokens' output (B5, B6, B7).

    Parameters
    ----------
    q, moments, scale
        As in `lse_interval`.
    estimate : array, shape (..., kv_head * group, q_len, dv)
    slope : CompactSlope, optional
        As in `momentkv.bounds.read`.

    Returns
    -------
    array, shape (..., q_head, q_len)
        For the empty set the norm of the estimate, which should be zero.

    Raises
    ------
    ValueError
        If shapes do not fit, the moments have no extent, or ``scale`` is no positive, finite number.
    TypeError
        If an argument is of another kind, or the arrays are of several libraries.
    """
    check_kind(Moments, moments=moments)
    check_arrays(moments=moments.weight, estimate=estimate)
    reading = read(q, moments, scale=scale, slope=slope)
    check_outputs(q, moments, estimate=estimate)
    bound = value_bound(reading, grouped(estimate, moments))
    return ungroup_queries(bound[..., None], q.shape[-3], q.shape[-2])[..., 0]


def output_error(
    retained: AttentionState,
    q: Array,
    moments: Moments,
    output: Array,
    *,
    scale: float | None = None,
    slope: CompactSlope | None = None,
) -> Array:
    r"""Bound of $\lVert o - \hat o \rVert$ for any estimate of attention over retained and evicted tokens (B8).

    Parameters
    ----------
    retained : AttentionState
        Exact attention of ``q`` over the retained tokens.
    q, moments, scale, slope
        As in `value_error`.
    output : array, shape (..., kv_head * group, q_len, dv)
        The estimate, however it was made; ``retained.out`` is that of plain eviction.

    Returns
    -------
    array, shape (..., q_head, q_len)
        Never NaN where inputs and their squares are finite. Rounding of the moments and of the bound is included; that
        of ``retained`` is not, since what it was computed from is not seen here: see
        `momentkv.bounds.rounding.attention_error`.

    Raises
    ------
    ValueError
        If shapes do not fit, the moments have no extent, or ``scale`` is no positive, finite number.
    TypeError
        If an argument is of another kind, or the arrays are of several libraries.

    Notes
    -----
    The bound is sound, and nearly sharp for what the state holds. It says something while the logits of the evicted
    tokens vary little (a standard deviation up to about 0.3). See docs/certificates.md.
    """
    check_kind(AttentionState, retained=retained)
    check_kind(Moments, moments=moments)
    check_arrays(moments=moments.weight, **arrays_of(retained), output=output)
    reading = read(q, moments, scale=scale, slope=slope)
    check_outputs(q, moments, **arrays_of(retained), output=output)
    out, lse = grouped(retained.out, moments), grouped(retained.lse[..., None], moments)[..., 0]
    bound = output_bound(reading, out, lse, grouped(output, moments))
    return ungroup_queries(bound[..., None], q.shape[-3], q.shape[-2])[..., 0]


def output_error_of_parts(
    retained: AttentionState,
    q: Array,
    parts: Moments,
    output: Array,
    *,
    scale: float | None = None,
) -> Array:
    r"""Theorem B10: `output_error` where the evicted tokens are several sets, each with moments of its own.

    Parameters
    ----------
    parts : Moments
        With leading axes (..., kv_head, parts).
    retained, q, output, scale
        As in `output_error`.

    Returns
    -------
    array, shape (..., q_head, q_len)

    Raises
    ------
    ValueError
        If shapes do not fit, the moments have no extent, or ``scale`` is no positive, finite number.
    TypeError
        If an argument is of another kind, or the arrays are of several libraries.

    Notes
    -----
    In the maximum, every part is at one end of its mass. Dinkelbach's iteration (1967, *Management Science* 13) finds
    which. What the last step leaves open is added, so that the bound holds after any number of steps.
    """
    check_kind(AttentionState, retained=retained)
    check_kind(Moments, parts=parts)
    xp = check_arrays(q=q, parts=parts.weight, **arrays_of(retained), output=output)
    # Moments without an axis of parts would have their batch taken for heads.
    if parts.weight.ndim != q.ndim - 1:
        raise ValueError(
            f"parts has weights of shape {tuple(parts.weight.shape)} but q has shape {tuple(q.shape)}; moments of "
            "parts have the axes (..., kv_head, parts): stack the sets along a last axis, or of one use output_error"
        )
    kv_heads = parts.weight.shape[-2]
    r = read_grouped(scaled_queries(q, parts, kv_heads, scale)[..., None, :, :], parts)
    check_outputs(q, parts, **arrays_of(retained), output=output)

    def fold(x: Array) -> Array:
        return group_queries(xp.astype(x, parts.key_mean.dtype, copy=False), kv_heads)

    out, lse, estimate = fold(retained.out), fold(retained.lse[..., None])[..., 0], fold(output)
    error = parts_bound(r, out, lse, estimate)
    return ungroup_queries(error[..., None], q.shape[-3], q.shape[-2])[..., 0]


def arrays_of(retained: AttentionState) -> dict[str, Array]:
    """The arrays of a state by the names that a message has for them."""
    return {"retained.out": retained.out, "retained.lse": retained.lse}


def check_outputs(q: Array, moments: Moments, **arrays: Array) -> None:
    """Raise unless outputs and an lse are of these queries and of the moments' values: others might broadcast."""
    for name, x in arrays.items():
        full = tuple(q.shape[:-1]) if name.endswith("lse") else (*q.shape[:-1], moments.value_mean.shape[-1])
        axes = len(full) - len(q.shape[:-3])
        if tuple(x.shape[-axes:]) != full[-axes:] or not broadcastable(x.shape, full):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but for q of shape {tuple(q.shape)} and values of dimension "
                f"{moments.value_mean.shape[-1]} it must be {full}"
            )


def grouped(x: Array, moments: Moments) -> Array:
    """Queries' arrays by KV head, in the dtype of the moments."""
    xp = array_namespace(x, moments.weight)
    return group_queries(xp.astype(x, moments.weight.dtype, copy=False), moments.weight.shape[-1])


def value_bound(r: Reading, estimate: Array) -> Array:
    """The least of B5, B6 and B7, with rounding; arrays by KV head."""
    xp = array_namespace(estimate)
    offset = estimate - r.value_mean
    u, size = unit(r.base), norm(estimate) + norm(r.value_mean) + r.radius
    steps = u * (64 + estimate.shape[-1])
    by_range = value_from_range(offset, r.logits, r.radius) + steps * size
    linear = xp.minimum(
        value_from_representation(r.slope, offset, r.mass, r.radius, r.tail),
        value_from_residual(r.slope, offset, r.logits, r.mass, r.deviation, r.trace, r.tail),
    )
    linear = linear + steps * (size + 2 * norm(r.slope) + r.tail)
    return r.value_error + xp.minimum(by_range, linear)


def output_bound(r: Reading, out: Array, lse: Array, output: Array) -> Array:
    """The least of B8 and B8' around two centres, with rounding; arrays by KV head."""
    xp = array_namespace(out)
    bounds = [
        output_from_representation(out, lse, r.base, r.value_mean, r.slope, output, r.mass, r.radius, r.tail)
        + unit(r.base) * (64 + out.shape[-1]) * (2 * norm(r.slope) + r.tail)
    ]
    share = share_interval(r, lse)
    fade = 0.5 * (xp.exp(-r.mass.low) + xp.exp(-r.mass.high))
    for centre in (r.value_mean, r.value_mean + fade[..., None] * r.slope):
        bounds.append(output_from_value(out, output, centre, value_bound(r, centre), share))
    least = bounds[0]
    for bound in bounds[1:]:
        least = xp.minimum(least, bound)
    return least + rounding_of_output(r, out, output, share.high)


def share_interval(r: Reading, lse: Array) -> Interval:
    """Interval of the evicted share of the softmax sum; 0 where nothing was evicted."""

    def share(mass: Array) -> Array:
        xp = array_namespace(lse)
        top = xp.maximum(lse, r.base + mass)
        shift = xp.where(top > -math.inf, top, xp.zeros_like(top))
        kept, gone = xp.exp(lse - shift), xp.exp(r.base + mass - shift)
        return safe_ratio(gone, kept + gone)

    return Interval(share(r.mass.low), share(r.mass.high))


def rounding_of_output(r: Reading, out: Array, output: Array, share: Array) -> Array:
    """What errors of the base, of the value and of the bound's own arithmetic add to a bound on the output."""
    u = unit(r.base)
    apart = norm(out - r.value_mean) + r.radius
    size = norm(out) + norm(output) + norm(r.value_mean) + r.radius
    xp = array_namespace(share)
    spread = u * (64 + out.shape[-1]) * size
    # An empty set adds nothing whose share could be off; another does, also where its share has underflowed.
    moved = xp.where(r.base > -math.inf, share_from_mass(r.base_error) * apart, xp.zeros_like(apart))
    return moved + xp.minimum(share + share_from_mass(r.base_error), xp.ones_like(share)) * r.value_error + spread


def parts_bound(r: Reading, out: Array, lse: Array, output: Array) -> Array:
    """Theorem B10 on arrays (..., part, m, ...) and (..., m, ...)."""
    xp: Any = array_namespace(out)
    ends = [r.base + kappa for kappa in r.mass]
    top = xp.maximum(lse, xp.max(ends[1], axis=-2))
    shift = xp.where(top > -math.inf, top, xp.zeros_like(top))
    kept = xp.exp(lse - shift)
    first = xp.exp(r.base - shift[..., None, :])
    low, high = (xp.exp(x - shift[..., None, :]) for x in ends)  # A e^kappa, in units of exp(shift)
    middle = 0.5 * (low + high)
    towards = r.value_mean - output[..., None, :, :]
    vector = kept[..., None] * (out - output) + xp.sum(
        first[..., None] * r.slope + middle[..., None] * towards, axis=-3
    )
    fixed = norm(vector) + xp.sum(0.5 * (high - low) * norm(towards) + first * r.tail, axis=-2)

    def at(theta: Array) -> tuple[Array, Array]:
        """Numerator and denominator of the best choice of ends for a ratio ``theta``."""
        chosen = xp.where(r.radius >= theta[..., None, :], high, low)
        return fixed + xp.sum((chosen - first) * r.radius, axis=-2), kept + xp.sum(chosen, axis=-2)

    # No output leaves the hull of the retained output and the balls around the parts' means.
    hull = xp.maximum(norm(out - output), xp.max(norm(towards) + r.radius, axis=-2))

    def within(a: Array, b: Array) -> Array:
        """``a / b``, at most the hull, without leaving the range of the dtype."""
        fits = a < b * hull
        return xp.where(fits, a / xp.where(fits, b, xp.ones_like(b)), hull)

    least = kept + xp.sum(low, axis=-2)
    theta = xp.zeros_like(kept)
    for _ in range(DINKELBACH_STEPS):
        theta = xp.maximum(theta, within(*at(theta)))
    numerator, denominator = at(theta)
    missed = xp.maximum(numerator - theta * denominator, xp.zeros_like(theta))
    theta = xp.minimum(theta + xp.where(missed > 0, within(missed, least), xp.zeros_like(missed)), hull)
    empty = top == -math.inf
    bound = xp.where(empty, norm(output), theta)
    u = unit(r.base)
    apart = norm(r.value_mean - out[..., None, :, :]) + r.radius
    size = xp.max(norm(r.value_mean) + r.radius + 2 * norm(r.slope) + r.tail, axis=-2) + norm(out) + norm(output)
    moved = xp.where(r.base > -math.inf, share_from_mass(r.base_error) * apart, xp.zeros_like(apart))
    worst = xp.max(r.value_error, axis=-2) + 2 * xp.sum(moved, axis=-2)
    return bound + xp.where(empty, xp.zeros_like(bound), worst) + u * (64 + out.shape[-1] + r.base.shape[-2]) * size
