"""What moments with an extent say about given queries: every quantity of the theorems, widened by its rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

from momentkv._array import Array, array_namespace, check_arrays
from momentkv._numbers import check_kind, whole_number
from momentkv.attention import group_queries, scale_of
from momentkv.bounds import theorems
from momentkv.bounds.checks import unchecked
from momentkv.bounds.rounding import FUNCTION, state_error, unit
from momentkv.bounds.theorems import Interval, norm
from momentkv.statistics.moments import Moments
from momentkv.statistics.weights import positive

__all__ = ["CompactSlope", "Reading", "compact_slope", "read"]

# What moments are read as fits.
mass_from_variance = unchecked(theorems.mass_from_variance)
range_from_anchor = unchecked(theorems.range_from_anchor)
range_from_deviation = unchecked(theorems.range_from_deviation)
slope_from_tail = unchecked(theorems.slope_from_tail)


class CompactSlope(NamedTuple):
    """The value-key covariance as a product of low rank, and how much that leaves out.

    Attributes
    ----------
    left, right : array, shape (..., dv, r) and (..., r, d)
    tail : array, shape (...)
        Spectral norm of what the product lacks, rounding included.
    """

    left: Array
    right: Array
    tail: Array


def compact_slope(moments: Moments, rank: int) -> CompactSlope:
    """Best approximation of ``value_key / weight`` of a rank, and the spectral norm of its tail.

    Raises
    ------
    ValueError
        If the moments are of order 0, or the rank is out of range.
    TypeError
        If the rank is no whole number, or ``moments`` are none.
    """
    check_kind(Moments, moments=moments)
    if moments.value_key is None:
        raise ValueError("moments are of order 0 and have no value-key co-moment; build them with order=1")
    dv, d = moments.value_key.shape[-2:]
    if not 0 <= whole_number("rank", rank) <= min(dv, d):
        raise ValueError(f"rank is {rank}; use 0 to {min(dv, d)}, the smaller dimension of keys and values")
    xp = array_namespace(moments.value_key)
    matrix = moments.value_key / positive(xp, moments.weight)[..., None, None]
    u, values, vh = xp.linalg.svd(matrix, full_matrices=False)
    largest = values[..., 0]
    tail = values[..., rank] if rank < min(dv, d) else xp.zeros_like(largest)
    # The decomposition is backward stable: a small multiple of u times the norm; the product rounds, too.
    tail = tail + 64 * unit(matrix) * (dv + d) * largest
    return CompactSlope(u[..., :, :rank], values[..., :rank, None] * vh[..., :rank, :], tail)


class Reading(NamedTuple):
    r"""Quantities of the theorems for each query of each KV head, shape (..., group * q_len) unless said.

    Attributes
    ----------
    base, base_error : array
        $\log W + s\, q \cdot \mu_k$, ``-inf`` for the empty set, and its rounding.
    length : array
        Norm of the scaled query, from the anchor.
    logits : Interval
        Of the ``X``.
    deviation : Interval
        Of their standard deviation.
    mass : Interval
        Of $\kappa$.
    slope, value_mean : array, shape (..., group * q_len, dv)
        $g$ and $\mu_v$.
    tail : array
        How far the slope may be off.
    radius, trace : array
        $R$ and $\operatorname{tr} C_{vv}$, or more.
    value_error : array
        Rounding that moves the exact value itself, to be added to any bound on it.
    """

    base: Array
    base_error: Array
    length: Array
    logits: Interval
    deviation: Interval
    mass: Interval
    slope: Array
    value_mean: Array
    tail: Array
    radius: Array
    trace: Array
    value_error: Array


def read(q: Array, moments: Moments, *, scale: float | None = None, slope: CompactSlope | None = None) -> Reading:
    """Read moments along queries, shape (..., kv_head * group, q_len, d).

    Parameters
    ----------
    q, moments, scale
        As in `momentkv.correction.estimate`; the moments must have an extent.
    slope : CompactSlope, optional
        In place of the moments' own value-key co-moment.

    Raises
    ------
    ValueError
        If the moments have no extent, shapes do not fit, or ``scale`` is no positive, finite number.
    TypeError
        If ``moments`` or ``slope`` are something else, or the arrays are of several libraries.
    """
    check_kind(Moments, moments=moments)
    if slope is not None:
        check_kind(CompactSlope, slope=slope)
    return read_grouped(scaled_queries(q, moments, moments.weight.shape[-1], scale), moments, slope)


def scaled_queries(q: Array, moments: Moments, kv_heads: int, scale: float | None) -> Array:
    """Queries by KV head, times the scale, in the dtype of the moments; an error where they do not fit these."""
    xp = check_arrays(q=q, moments=moments.weight)
    d = moments.key_mean.shape[-1]
    if q.ndim < 3 or q.shape[-1] != d:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (..., q_head, q_len, {d}), as the moments' keys")
    return group_queries(xp.astype(q, moments.key_mean.dtype, copy=False), kv_heads) * scale_of(scale, d)


def read_grouped(queries: Array, moments: Moments, slope: CompactSlope | None = None) -> Reading:
    """`read` for scaled queries, shape (..., m, d), of moments with leading axes (...)."""
    extent = moments.extent
    if extent is None:
        raise ValueError(
            "the moments have no extent, without which nothing bounds the farthest token; build them with "
            "Moments.from_tokens(..., extent=True)"
        )
    xp = array_namespace(queries, moments.weight)
    u = unit(moments.weight)
    d = moments.key_mean.shape[-1]
    error = state_error(extent)
    weight = positive(xp, moments.weight)
    log_weight = xp.where(moments.weight > 0, xp.log(weight), xp.full_like(weight, -math.inf))
    magnitude = xp.abs(xp.log(weight))
    if moments.anchor is not None and moments.log_scale is not None:
        full = norm(queries)
        queries = queries - moments.anchor[..., None, :]
        log_weight = xp.where(moments.weight > 0, log_weight + moments.log_scale, log_weight)
        finite = xp.where(xp.isfinite(moments.log_scale), moments.log_scale, xp.zeros_like(weight))
        magnitude = magnitude + xp.abs(finite)
        # Weights err by those of their logits and of exp: a set whose weights are off by e^(+-tilt).
        reach = norm(moments.anchor) * error.key_size
        tilt = (u * (2 * d + 8) * reach + u * (2 * FUNCTION + 2 + 2 * extent.merges * FUNCTION))[..., None]
        subtraction = u * (full + norm(queries)) * error.key_size[..., None]
    else:
        tilt = subtraction = xp.zeros_like(queries[..., 0])
    length = (1 + (d + 8) * u) * norm(queries)

    def per_query(x: Array) -> Array:
        return x[..., None] + xp.zeros_like(length)

    def along(x: Array) -> Array:
        return xp.matmul(queries, x[..., None])[..., 0]

    base = per_query(log_weight) + along(moments.key_mean)
    base_error = length * (error.key_mean + u * (d + 6) * error.key_size)[..., None] + subtraction
    base_error = base_error + (error.weight + u * (FUNCTION + FUNCTION * magnitude))[..., None] + 2 * tilt
    base_error = base_error + u * xp.where(base > -math.inf, xp.abs(base), xp.zeros_like(base))
    off = length * (error.key_mean + u * (3 * d + 20) * error.key_size)[..., None] + subtraction
    ball = range_from_anchor(along(extent.key_anchor - moments.key_mean), length, per_query(extent.key_radius))
    logits = Interval(ball.low - off, ball.high + off)
    # Nothing is known of the variance but what the range says.
    deviation = Interval(xp.zeros_like(length), xp.sqrt(-logits.low) * xp.sqrt(logits.high))
    if moments.key_key is not None:
        spread = xp.matmul(queries, moments.key_key / weight[..., None, None])
        square = xp.sum(spread * queries, axis=-1)
        rest = (
            length
            * length
            * (error.key_key + (u * (2 * d + 8) + error.weight) * error.key_spread * error.key_spread)[..., None]
        )
        zero = xp.zeros_like(square)
        # Nor where products of keys have left the range of the dtype.
        known = xp.isfinite(square) & xp.isfinite(rest)
        square, rest = (xp.where(known, x, zero) for x in (square, rest))
        deviation = Interval(
            xp.sqrt(xp.maximum(square - rest, zero)),
            xp.where(known, xp.sqrt(xp.maximum(square + rest, zero)), deviation.high),
        )
        ratio = per_query(
            xp.where(extent.least_weight > 0, moments.weight / positive(xp, extent.least_weight), math.inf)
        )
        samuelson = range_from_deviation(
            deviation.high, ratio * (1 + error.weight + u * (8 + 2 * extent.merges))[..., None]
        )
        logits = logits.intersect(Interval(samuelson.low - off, samuelson.high + off))
    mass = mass_from_variance(logits, deviation)
    step = 64 * u * (mass.high + xp.where(logits.high > 29, logits.high, xp.zeros_like(logits.high)))
    mass = Interval(xp.maximum(mass.low - step, xp.zeros_like(step)), mass.high + step)

    trace = (1 + 8 * u) * extent.value_trace / weight + error.value_trace + error.weight * error.value_spread**2
    radius = extent.value_radius * (1 + (moments.value_mean.shape[-1] + 8) * u) + error.value_mean
    radius = radius + norm(moments.value_mean - extent.value_anchor) + 8 * u * error.value_size
    surplus = xp.where(extent.least_weight > 0, moments.weight / positive(xp, extent.least_weight), math.inf)
    surplus = surplus * (1 + error.weight + u * (8 + 2 * extent.merges))
    surplus = xp.maximum(surplus - 1, xp.zeros_like(surplus))
    several = xp.where(trace <= 0, xp.zeros_like(trace), xp.sqrt(trace) * xp.sqrt(surplus))
    radius = xp.minimum(radius, several + error.value_mean)
    occupied = moments.weight > 0
    radius = xp.where(occupied, radius, xp.zeros_like(radius))
    value_mean = moments.value_mean[..., None, :] + xp.zeros_like(length)[..., None]
    if slope is not None:
        g = xp.matmul(xp.matmul(queries, xp.matrix_transpose(slope.right)), xp.matrix_transpose(slope.left))
        missing = slope_from_tail(length, slope.tail[..., None])
    elif moments.value_key is not None:
        matrix = moments.value_key / weight[..., None, None]
        g = xp.matmul(queries, xp.matrix_transpose(matrix))
        missing = xp.zeros_like(length)
    else:
        # Cauchy and Schwarz: |E[X V]| <= sigma sqrt(E |V|^2).
        g = xp.zeros_like(value_mean)
        missing = deviation.high * xp.sqrt(trace)[..., None] * (1 + 16 * u)
    if slope is not None or moments.value_key is not None:
        per_spread = u * (2 * d + 16) + error.weight
        missing = missing + length * (error.value_key + per_spread * error.value_spread * error.key_spread)[..., None]
    value_error = per_query(error.value_mean) + 2 * per_query(radius) * xp.tanh(2 * tilt)
    empty = ~occupied[..., None]
    zero = xp.zeros_like(length)
    return Reading(
        base=base,
        base_error=xp.where(empty, zero, base_error),
        length=length,
        logits=logits,
        deviation=deviation,
        mass=Interval(xp.where(empty, zero, mass.low), xp.where(empty, zero, mass.high)),
        slope=xp.where(empty[..., None], xp.zeros_like(g), g),
        value_mean=xp.where(empty[..., None], xp.zeros_like(value_mean), value_mean),
        tail=xp.where(empty, zero, missing),
        radius=per_query(radius),
        trace=per_query(trace),
        value_error=xp.where(empty, zero, value_error),
    )
