"""How far a cache can be trusted on given queries: a certified error, and beside it an estimate of the error.

The certificate is a theorem (`momentkv.bounds`), and often far above the truth. The estimate follows the truth more
closely and proves nothing. A cache that certifies keeps *evidence*: exact moments of all that it evicted, with their
extent, beside whatever correction it uses.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace, device
from momentkv._numbers import check_kind
from momentkv._typing import ArrayObject
from momentkv.attention import AttentionState, check_keys, group_queries, ungroup_queries
from momentkv.bounds import output_error, read, theorems
from momentkv.bounds.certificate import arrays_of, check_outputs, grouped, share_interval
from momentkv.bounds.checks import unchecked
from momentkv.bounds.rounding import attention_error, state_error, unit
from momentkv.bounds.theorems import Interval
from momentkv.statistics.moments import Moments

__all__ = ["Losses", "Trust", "estimated_error", "trust"]

# So few tokens cannot look like Gaussian logits of more than this variance: the largest logit limits the mass first.
MOST_GAIN = 4.0
output_from_codes = unchecked(theorems.output_from_codes)


class Trust(NamedTuple):
    """Error of a cache's output on each query, relative to the norm of that output; shapes (..., q_head, q_len).

    Attributes
    ----------
    certified : array
        A bound: no error is above it, the rounding of attention included, and that of weights and output to the
        queries' dtype. Not counted is what the GPU kernel of codes rounds of a query.
    estimated : array
        An estimate, not a bound; see `estimated_error`.
    """

    certified: Array
    estimated: Array


class Losses(NamedTuple):
    """What codes may have lost of a layer's tokens, evicted ones included; see `momentkv.cache.losses`.

    Attributes
    ----------
    key, value : array, shape (..., kv_head, d) and (..., kv_head, dv)
        No token is farther from the one that came, in any channel.
    key_step, value_step : array, shape (..., kv_head, n)
        Of the tokens at hand; 0 for those that are as they came.
    key_deviation, value_deviation : array, shape (..., kv_head, d) and (..., kv_head, dv)
        What these steps are multiples of.
    """

    key: Array
    value: Array
    key_step: Array
    value_step: Array
    key_deviation: Array
    value_deviation: Array


def norm(x: ArrayObject) -> Array:
    """Euclidean length along the last axis."""
    return array_namespace(x).linalg.vector_norm(x, axis=-1)


def estimated_error(
    retained: AttentionState,
    q: ArrayObject,
    moments: Moments,
    *,
    scale: float | None = None,
    calibration: float = 1.0,
) -> Array:
    r"""Estimate of $\lVert o - \hat o \rVert$, an estimate and not a bound.

    $$ \hat\varepsilon / c = \hat w \sqrt{(1 - e^{-2 \hat\kappa}) \operatorname{tr} C_{vv}}
       + (\hat w - w_0) \lVert \mu_v - o_R \rVert, \qquad \hat\kappa = \min(\tfrac12 \sigma^2, 4) $$

    with the evicted share $\hat w$ at log-mass $\hat\kappa$ above that of order 0, which gives $w_0$.

    Parameters
    ----------
    retained, q, moments, scale
        As in `momentkv.bounds.output_error`; moments of order 2 know $\sigma$, others take half the largest that
        the extent allows.
    calibration : float
        $c$; corrections have one, `momentkv.statistics.corrections.Correction.calibration`.

    Returns
    -------
    array, shape (..., q_head, q_len)

    Notes
    -----
    The form is that of Gaussian logits. How well it ranks the true errors of a real model is measured by
    ``momentkv evaluate trust``; see docs/certificates.md.
    """
    check_kind(AttentionState, retained=retained)
    check_kind(Moments, moments=moments)
    xp = array_namespace(q, moments.weight)
    r = read(q, moments, scale=scale)
    check_outputs(q, moments, **arrays_of(retained))
    out, lse = grouped(retained.out, moments), grouped(retained.lse[..., None], moments)[..., 0]
    deviation = 0.5 * (r.deviation.low + r.deviation.high)
    kappa = xp.minimum(0.5 * deviation * deviation, MOST_GAIN * xp.ones_like(deviation))
    low, high = share_interval(r._replace(mass=Interval(xp.zeros_like(kappa), kappa)), lse)
    error = high * xp.sqrt(-xp.expm1(-2 * kappa) * r.trace) + (high - low) * norm(r.value_mean - out)
    return calibration * ungroup_queries(error[..., None], q.shape[-3], q.shape[-2])[..., 0]


def trust(cache: Any, q: ArrayObject) -> Trust:
    """How far a cache can be trusted on queries that see all that it stores.

    Parameters
    ----------
    cache : LayerCache
        Made with ``certify=``.
    q : array, shape (batch..., kv_head * group, q_len, d)
        For example recent queries. The result says nothing about others.

    Returns
    -------
    Trust
        Relative to exact attention over all tokens that the cache has ever been given.

    Raises
    ------
    ValueError
        If the cache keeps no evidence, or ``q`` does not fit it.
    TypeError
        If ``cache`` is none.

    Examples
    --------
    >>> import numpy as np
    >>> from momentkv import LayerCache
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = (rng.normal(size=(1, heads, 100, 8)) for heads in (4, 2, 2))
    >>> cache = LayerCache(40, window=16, certify=2)
    >>> out = cache.step(q, 0.1 * k, v)
    >>> report = trust(cache, q[:, :, -1:])
    >>> report.certified.shape, bool((report.certified < 0.1).all())
    ((1, 4, 1), True)
    """
    # No isinstance: the class of a cache is above this module, which it imports.
    if not hasattr(cache, "state"):
        raise TypeError(f"cache is a {type(cache).__name__}; use a LayerCache made with certify=")
    state = cache.state
    if state is None or state.evidence is None:
        raise ValueError("the cache keeps no evidence of what it evicted; make it with certify=0, 1 or 2 and fill it")
    if cache.is_empty:  # its tokens were dropped
        nothing = array_namespace(q).zeros(q.shape[:-1], dtype=state.evidence.weight.dtype, device=device(q))
        return Trust(nothing, nothing)
    view = cache.view()
    check_keys(q, view.keys)
    heads = view.keys.shape[-3]
    if q.shape[:-3] != view.keys.shape[:-3] or q.shape[-3] % heads or q.shape[-2] == 0:
        raise ValueError(
            f"q has shape {tuple(q.shape)}, but the cache stores keys of shape {tuple(view.keys.shape)}; give at least "
            "one query, the same batch axes, and a multiple of the KV heads"
        )
    return trust_of(
        cache.config, q, view.keys, view.values, view.positions, state.evicted, state.evidence,
        scale=cache.attention_scale, losses=cache.losses(view.positions),
    )  # fmt: skip


def trust_of(
    config: Any,
    q: ArrayObject,
    k: ArrayObject,
    v: ArrayObject,
    positions: ArrayObject,
    evicted: Any,
    evidence: Moments,
    *,
    scale: float,
    losses: Losses | None = None,
) -> Trust:
    """Trust in retained tokens (those of positions >= 0) with a correction, given evidence of all evicted ones.

    ``losses`` are those of tokens in few bits, by which the cache and its evidence may differ from what came.
    """
    xp = array_namespace(q, k)
    backend = config.backend_of(q)
    present = positions >= 0
    state, weights = backend.attend(q, k, v, scale=scale, mask=present[..., None, None, :])
    out = state.out
    expansion = config.correction.expansion(evicted)
    if expansion is not None:
        out = backend.correct(state, q, expansion, scale=scale)
    bound = output_error(state, q, evidence, out, scale=scale)
    u = unit(evidence.weight)

    def largest(x: ArrayObject) -> Array:
        x = xp.astype(x, evidence.weight.dtype)
        lengths = norm(xp.where(present[..., None], x, xp.zeros_like(x)))
        return xp.max(lengths, axis=-1)[..., None]

    queries = group_queries(xp.astype(q, evidence.weight.dtype), k.shape[-3])
    length, lse = abs(scale) * norm(queries), group_queries(state.lse[..., None], k.shape[-3])[..., 0]
    size = largest(v)
    of_out, of_lse = attention_error(length, largest(k), size, lse, n=k.shape[-2], d=k.shape[-1], u=u)
    # The output is at most as far from any other as twice the longest value, evicted ones included.
    gone = xp.zeros_like(size) if evidence.extent is None else state_error(evidence.extent).value_size[..., None]
    reach = size + gone
    rounding = of_out + 2 * reach * xp.tanh(of_lse / 4)
    # Where the queries' dtype is a short one, kernels round weights to it, and then the output.
    short = unit(q) if unit(q) > u else 0.0
    rounding = rounding + short * size
    if losses is not None:
        rounding = rounding + lost_by_codes(losses, abs(scale) * queries, xp.maximum(size, gone), u)
    bound = bound + ungroup_queries(rounding[..., None], q.shape[-3], q.shape[-2])[..., 0]
    factor = config.correction.calibration
    estimate = estimated_error(state, q, evidence, scale=scale, calibration=factor)
    if losses is not None:
        of_codes = estimated_loss(losses, weights, scale * queries, v, state.out)
        estimate = xp.sqrt(estimate**2 + ungroup_queries(of_codes[..., None], q.shape[-3], q.shape[-2])[..., 0] ** 2)
    total = norm(xp.astype(out, evidence.weight.dtype))
    if short:
        least = float(xp.finfo(q.dtype).smallest_normal) * short * math.sqrt(v.shape[-1])
        bound = bound + short * (total + bound) + least
    safe = xp.where(total == 0, xp.ones_like(total), total)
    infinite = xp.full_like(total, float("inf"))

    def relative(x: ArrayObject) -> Array:
        return xp.where(total == 0, xp.where(x > 0, infinite, xp.zeros_like(x)), x / safe)

    return Trust(relative(bound), relative(estimate))


def lost_by_codes(losses: Losses, queries: Array, radius: Array, u: float) -> Array:
    """Theorems B12 and B13 by what each channel may have lost, for scaled queries (..., kv_head, m, d)."""
    xp = array_namespace(queries)
    up = 1 + (queries.shape[-1] + losses.value.shape[-1] + 64) * u
    clipped = (xp.any(xp.isinf(losses.key), axis=-1) | xp.any(xp.isinf(losses.value), axis=-1))[..., None]
    key, value = (xp.where(xp.isinf(x), xp.zeros_like(x), x) for x in (losses.key, losses.value))
    logit = xp.matmul(xp.abs(queries), key[..., None])[..., 0]
    lost = up * output_from_codes(up * logit, radius, norm(value)[..., None])
    return xp.where(clipped, xp.full_like(lost, float("inf")), lost)


def estimated_loss(losses: Losses, weights: Array, queries: Array, values: Array, out: Array) -> Array:
    r"""Estimate of what codes of tokens at hand do to the output, as if they erred independently and evenly.

    $$ \tfrac1{12} \sum_t p_t^2 \left( \delta_t^2\, \lVert s\, q \odot \sigma \rVert^2 \lVert v_t - o \rVert^2
       + \delta_t'^2\, \lVert \sigma' \rVert^2 \right) $$

    is its square. Shapes: weights (..., kv_head, group, q_len, n), scaled queries (..., kv_head, group * q_len, d).
    """
    xp = array_namespace(queries)
    heads, dtype = queries.shape[-3], queries.dtype
    p = xp.reshape(xp.astype(weights, dtype), (*queries.shape[:-1], weights.shape[-1])) ** 2
    values, out = xp.astype(values, dtype), group_queries(xp.astype(out, dtype), heads)
    turned = xp.sum((queries * losses.key_deviation[..., None, :]) ** 2, axis=-1)
    key = p * losses.key_step[..., None, :] ** 2
    squares = xp.sum(values**2, axis=-1)[..., None, :] + xp.sum(out**2, axis=-1)[..., None]
    apart = squares - 2 * xp.matmul(out, xp.matrix_transpose(values))
    of_keys = turned * xp.sum(key * xp.maximum(apart, xp.zeros_like(apart)), axis=-1)
    spread = xp.sum(losses.value_deviation**2, axis=-1)[..., None]
    of_values = spread * xp.matmul(p, losses.value_step[..., None] ** 2)[..., 0]
    return xp.sqrt((of_keys + of_values) / 12)
