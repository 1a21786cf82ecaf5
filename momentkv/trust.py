"""How far a cache can be trusted on given queries: a certified error, and beside it an estimate of the error.

The certificate is a theorem (`momentkv.bounds`), and often far above the truth. The estimate follows the truth more
closely and proves nothing. A cache that certifies keeps *evidence*: exact moments of all that it evicted, with their
extent, beside whatever correction it uses.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace
from momentkv._typing import ArrayObject
from momentkv.attention import AttentionState, group_queries, ungroup_queries
from momentkv.bounds import output_error, read
from momentkv.bounds.certificate import grouped, share_interval
from momentkv.bounds.rounding import attention_error, state_error, unit
from momentkv.bounds.theorems import Interval
from momentkv.statistics.moments import Moments

__all__ = ["Trust", "estimated_error", "trust"]

# So few tokens cannot look like Gaussian logits of more than this variance: the largest logit limits the mass first.
MOST_GAIN = 4.0


class Trust(NamedTuple):
    """Error of a cache's output on each query, relative to the norm of that output; shapes (..., q_head, q_len).

    Attributes
    ----------
    certified : array
        A bound: no error is above it, the rounding of attention included.
    estimated : array
        An estimate, not a bound; see `estimated_error`.
    """

    certified: Array
    estimated: Array


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
    xp = array_namespace(q, moments.weight)
    r = read(q, moments, scale=scale)
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
        If the cache keeps no evidence.

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
    state = cache.state
    if state is None or state.evidence is None:
        raise ValueError("the cache keeps no evidence of what it evicted; make it with certify=0, 1 or 2 and fill it")
    view = cache.view()
    return trust_of(
        cache.config, q, view.keys, view.values, view.positions, state.evicted, state.evidence,
        scale=cache.attention_scale,
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
) -> Trust:
    """Trust in retained tokens (those of positions >= 0) with a correction, given evidence of all evicted ones."""
    xp = array_namespace(q, k)
    backend = config.backend_of(q)
    present = positions >= 0
    state, _ = backend.attend(q, k, v, scale=scale, mask=present[..., None, None, :])
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
    reach = size + state_error(evidence.extent).value_size[..., None] if evidence.extent is not None else size
    rounding = of_out + 2 * reach * xp.tanh(of_lse / 4)
    bound = bound + ungroup_queries(rounding[..., None], q.shape[-3], q.shape[-2])[..., 0]
    factor = config.correction.calibration
    estimate = estimated_error(state, q, evidence, scale=scale, calibration=factor)
    total = norm(xp.astype(out, evidence.weight.dtype))
    safe = xp.where(total > 0, total, xp.ones_like(total))
    infinite = xp.full_like(total, float("inf"))

    def relative(x: ArrayObject) -> Array:
        return xp.where(total > 0, x / safe, xp.where(x > 0, infinite, xp.zeros_like(x)))

    return Trust(relative(bound), relative(estimate))
