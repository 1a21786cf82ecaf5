r"""What rounding adds to the bounds, from the state alone: derived, not guessed.

``u`` is the unit roundoff of the dtype that the moments are summed in. A sum of ``n`` terms errs by at most ``n u``
times the sum of their magnitudes, in any order of addition; exp and log of vectorised libraries err by 4 ulp, 8 ``u``.
Counts are rounded up, which covers the terms of second order in ``u``. Derivation: docs/derivations/bounds.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from momentkv._array import Array, accumulation_dtype, array_namespace
from momentkv.codes import MOST, Standard
from momentkv.statistics.extent import Extent

__all__ = ["StateError", "attention_error", "code_error", "state_error", "unit"]

FUNCTION = 8


class StateError(NamedTuple):
    """How far rounding may have moved moments, arrays of shape (...).

    Attributes
    ----------
    weight : array
        Relative.
    key_mean, value_mean : array
        Euclidean.
    value_key, key_key, value_trace : array
        Of the covariances (sums over weight), in spectral norm; of the trace.
    key_size, value_size : array
        Bounds of the norms of the tokens' keys and values.
    key_spread, value_spread : array
        Bounds of their distances from the means.
    """

    weight: Array
    key_mean: Array
    value_mean: Array
    value_key: Array
    key_key: Array
    value_trace: Array
    key_size: Array
    value_size: Array
    key_spread: Array
    value_spread: Array


def unit(x: Array) -> float:
    """Unit roundoff of an array's dtype, half its machine epsilon."""
    return float(array_namespace(x).finfo(x.dtype).eps) / 2


def state_error(extent: Extent) -> StateError:
    r"""Bound of what rounding did to moments that were gathered and merged as the extent counts.

    With ``n, m, t`` the extent's `terms`, `merges` and `mixing`, $M = \lVert c \rVert + \rho$ and
    $D = 2 \rho + 2 e$: weights err by $r = u (n + 2 m + 1)$ of themselves, means by
    $e = u M (2 n + 6 + 12 m) + 4 t r M$, and covariances by
    $(u (n + 10 + 2 m) + r) D D' + e e' + t\,[(2 r + 8 u) D D' + 2 e D' + 2 e' D + 4 e e']$.
    """
    xp = array_namespace(extent.key_radius)
    u = unit(extent.key_radius)
    n, m, t = extent.terms, extent.merges, extent.mixing
    r = u * (n + 2 * m + 1)

    def sizes(anchor: Array, radius: Array) -> tuple[Array, Array, Array]:
        width = anchor.shape[-1]
        size = (1 + (width + 8) * u) * (xp.linalg.vector_norm(anchor, axis=-1) + radius)
        error = size * (u * (2 * n + 6 + 12 * m) + 4 * t * r)
        spread = 2 * (1 + (width + 8) * u) * radius + 2 * error + 4 * u * size
        return size, error, spread

    key_size, ek, dk = sizes(extent.key_anchor, extent.key_radius)
    value_size, ev, dv = sizes(extent.value_anchor, extent.value_radius)

    def covariance(ea: Array, da: Array, eb: Array, db: Array) -> Array:
        own = (u * (n + 10 + 2 * m) + r) * da * db + ea * eb
        return own + t * ((2 * r + 8 * u) * da * db + 2 * ea * db + 2 * eb * da + 4 * ea * eb)

    width = extent.value_anchor.shape[-1]
    return StateError(
        weight=r,
        key_mean=ek,
        value_mean=ev,
        value_key=covariance(ev, dv, ek, dk),
        key_key=covariance(ek, dk, ek, dk),
        value_trace=covariance(ev, dv, ev, dv) + u * width * dv * dv,
        key_size=key_size,
        value_size=value_size,
        key_spread=dk,
        value_spread=dv,
    )


def attention_error(
    length: Array, key_size: Array, value_size: Array, lse: Array, *, n: int, d: int, u: float
) -> tuple[Array, Array]:
    r"""Rounding of exact attention over ``n`` tokens: of the output (Euclidean) and of the lse.

    A logit errs by $\eta = u (d + 4) s \lVert q \rVert \max \lVert k \rVert$, the lse by
    $\eta + u (n + 24 + 8 \log n + |\mathrm{lse}|)$, the output by
    $2 \max \lVert v \rVert (\tanh \eta + u (2 n + 20))$.

    Parameters
    ----------
    length, key_size, value_size : array
        $s \lVert q \rVert$ and the largest norms of keys and values.
    lse : array
    n, d : int
    u : float
        Unit roundoff of the arithmetic.
    """
    xp = array_namespace(length)
    logit = u * (d + 4) * length * key_size
    size = xp.where(xp.isfinite(lse), xp.abs(lse), xp.zeros_like(lse))
    of_lse = logit + u * (n + 3 * FUNCTION + FUNCTION * math.log(max(n, 1)) + size)
    return 2 * value_size * (xp.tanh(logit) + u * (2 * n + 20)), of_lse


def code_error(step: Array, standard: Standard, bits: int, *, stored: Any) -> Array:
    r"""Bound of $|\hat x_c - x_c|$ for a token that was coded with this step and read back; 0 where the step is 0.

    $$ \sigma_c \frac\delta2 (1 + 2^{b + 3} u) + (u' + 4 u)(|m_c| + 2^{b-1} \delta \sigma_c) $$

    and what underflows, with $u$ of the dtype that codes are made in and $u'$ of the one that tokens are kept in.

    Parameters
    ----------
    step : array, shape (...)
    standard : Standard
        Of shape (..., d).
    bits : int
        Of a channel; where channels are graded, on average.
    stored : dtype
        Of tokens as they came and as they are read back.

    Returns
    -------
    array, shape (..., d)
        Infinite where the step is the largest there is: such a token may have been clipped.
    """
    xp = array_namespace(step)
    dtype = accumulation_dtype(xp, standard.deviation.dtype)
    deviation, step = xp.astype(standard.deviation, dtype), xp.astype(step, dtype)[..., None]
    u, of_stored = (float(xp.finfo(kind).eps) / 2 for kind in (dtype, stored))
    bits += standard.order is not None  # the finer of graded channels
    clipped, step = step >= MOST, xp.where(step >= MOST, xp.zeros_like(step), step)
    size = 2.0 ** (bits - 1) * step * deviation
    if standard.mean is not None:
        size = size + xp.abs(xp.astype(standard.mean, dtype))
    error = step / 2 * deviation * (1 + 2.0 ** (bits + 3) * u) + (of_stored + 4 * u) * size
    error = error + (float(xp.finfo(dtype).smallest_normal) + of_stored * float(xp.finfo(stored).smallest_normal))
    error = xp.where(step == 0, xp.zeros_like(error), error)
    return xp.where(clipped, xp.full_like(error, math.inf), error)
