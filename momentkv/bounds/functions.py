"""The few functions of one variable that the bounds are made of, accurate near zero and finite wherever they can be."""

from __future__ import annotations

import math

from momentkv._array import Array, array_namespace

__all__ = ["eta", "excess", "two_point"]

# Above this logit, exponentials are added in log space.
LARGE = 30.0
# Terms of the power series of `excess` for |x| <= 1: the next one, 2 / 21!, is below the roundoff of float64.
SERIES = 18


def excess(x: Array) -> Array:
    r"""$h(x) = e^x - 1 - x \ge 0$, to a few roundings of itself.

    Examples
    --------
    >>> import numpy as np
    >>> bool(abs(excess(np.asarray(1e-9)) / 5e-19 - 1) < 1e-8)
    True
    """
    xp = array_namespace(x)
    near = xp.abs(x) <= 1
    small = xp.where(near, x, xp.zeros_like(x))
    series = xp.full_like(x, 1.0 / math.factorial(SERIES + 2))
    for power in range(SERIES + 1, 1, -1):
        series = series * small + 1.0 / math.factorial(power)
    return xp.where(near, series * small * small, xp.expm1(x) - x)


def eta(x: Array) -> Array:
    r"""$\eta(x) = (e^x - 1) / x$, increasing, 1 at zero."""
    xp = array_namespace(x)
    zero = x == 0
    return xp.where(zero, xp.ones_like(x), xp.expm1(x) / xp.where(zero, xp.ones_like(x), x))


def two_point(end: Array, deviation: Array) -> Array:
    r"""$T(c)$: log of the mean of $e^X$ where ``X`` has mean 0, deviation $\sigma$, and two values.

    $$ T(c) = \log \frac{\sigma^2 e^c + c^2 e^{-\sigma^2 / c}}{\sigma^2 + c^2} $$

    Parameters
    ----------
    end : array
        $c$, one of the values; the other is $-\sigma^2 / c$.
    deviation : array
        $\sigma \ge 0$.

    Returns
    -------
    array
        Not negative; 0 where either is zero, NaN where one is.
    """
    xp = array_namespace(end, deviation)
    some, unknown = (end != 0) & (deviation > 0), xp.isnan(end) | xp.isnan(deviation)
    one = xp.ones_like(end)
    c = xp.where(some, end, one)
    ratio = xp.where(some, deviation, one) / c
    other = -ratio * xp.where(some, deviation, one)
    # p = sigma^2 / (sigma^2 + c^2), by ratios so that no square leaves the range of the dtype.
    big = xp.abs(ratio) > 1
    inverse = one / xp.where(big, ratio, one)
    small = xp.where(big, one, ratio)
    p = xp.where(big, one / (one + inverse * inverse), small * small / (one + small * small))
    rest = xp.where(big, inverse * inverse / (one + inverse * inverse), one / (one + small * small))
    large = xp.maximum(c, other) > LARGE
    near_c, near_other = (xp.where(large, xp.zeros_like(x), x) for x in (c, other))
    # Linear terms cancel: p c + (1 - p) other = 0.
    small_log = xp.log1p(p * excess(near_c) + rest * excess(near_other))
    # log p and log (1 - p) by the smaller ratio, which may underflow where its square does.
    least = xp.finfo(end.dtype).smallest_normal * one
    log_ratio = 2 * xp.log(xp.maximum(xp.abs(xp.where(big, inverse, small)), least))
    common = -xp.log1p(xp.where(big, inverse * inverse, small * small))
    logs = [xp.where(big, common, common + log_ratio), xp.where(big, common + log_ratio, common)]
    far = xp.where(large, xp.logaddexp(logs[0] + c, logs[1] + other), xp.zeros_like(c))
    value = xp.where(large, far, small_log)
    value = xp.where(some, xp.maximum(value, xp.zeros_like(value)), xp.zeros_like(value))
    return xp.where(unknown, xp.full_like(value, math.nan), value)


def safe_ratio(a: Array, b: Array) -> Array:
    """``a / b``, and 0 where ``b`` is 0 or less; what is no number stays none."""
    xp = array_namespace(a, b)
    nothing = b <= 0
    return xp.where(nothing, xp.zeros_like(a), a / xp.where(nothing, xp.ones_like(b), b))
