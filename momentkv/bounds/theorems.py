r"""The bounds, one theorem a function, on plain arrays of one number a query.

Notation, as on the page of proofs: $X_j = s\, q \cdot (k_j - \mu_k)$, expectations over the weights,
$\sigma^2 = E X^2$, $a \le X \le b$, $\kappa = \log E e^X$, $V = v - \mu_v$,
$g = E[X V]$, $R \ge \max \lVert V_j \rVert$. All are exact statements about real numbers; what rounding
adds is in `momentkv.bounds.rounding`. Derivation: docs/derivations/bounds.md.

Each raises a TypeError where an argument is no array, or no `Interval`, or the arrays are of several libraries, and a
ValueError where shapes do not fit, or a number cannot be what it stands for: lengths, radii and deviations are not
negative, ends of an interval are in order, and logits have 0 between them. Of NaN no bound is a number, or it is
infinite.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from momentkv._array import Array, array_namespace
from momentkv._numbers import check_kind
from momentkv.bounds.checks import LOGITS, MASS, NUMBER, POSITIVE, SHARE, VECTOR, Rule, checked
from momentkv.bounds.functions import LARGE, eta, excess, safe_ratio, two_point
from momentkv.statistics.weights import positive

__all__ = [
    "Interval",
    "logit_from_step",
    "mass_from_range",
    "mass_from_variance",
    "output_from_codes",
    "output_from_representation",
    "output_from_value",
    "range_from_anchor",
    "range_from_deviation",
    "share_from_mass",
    "slope_from_tail",
    "value_from_range",
    "value_from_representation",
    "value_from_residual",
]


class Interval(NamedTuple):
    """Ends of an interval, arrays of one shape."""

    low: Array
    high: Array

    def intersect(self, other: Interval) -> Interval:
        """The common part; both must be true, so that it is not empty."""
        check_kind(Interval, other=other)
        xp = array_namespace(self.low, other.low)
        return Interval(xp.maximum(self.low, other.low), xp.minimum(self.high, other.high))


@checked(Interval, centre=NUMBER, length=POSITIVE, radius=POSITIVE)
def range_from_anchor(centre: Array, length: Array, radius: Array) -> Interval:
    r"""Theorem B1: range of the logits from a ball that holds all keys.

    $$ |X_j - s\,q \cdot (c - \mu_k)| \le s \lVert q \rVert \rho \quad\text{if } \lVert k_j - c \rVert \le \rho $$

    Parameters
    ----------
    centre : array
        $s\, q \cdot (c - \mu_k)$.
    length, radius : array
        $s \lVert q \rVert$ and $\rho$.

    Returns
    -------
    Interval
        That holds all $X_j$, and 0, which is their mean.
    """
    xp = array_namespace(centre)
    zero, reach = xp.zeros_like(centre), length * radius
    return Interval(xp.minimum(centre - reach, zero), xp.maximum(centre + reach, zero))


@checked(Interval, deviation=POSITIVE, ratio=Rule(low=1))
def range_from_deviation(deviation: Array, ratio: Array) -> Interval:
    r"""Theorem B2 (Samuelson): $|X_j| \le \sigma \sqrt{W / w_{\min} - 1}$.

    Parameters
    ----------
    deviation : array
        $\sigma$, or more.
    ratio : array
        $W / w_{\min}$, or more; ``n`` for unit weights.
    """
    xp = array_namespace(deviation, ratio)
    surplus = xp.maximum(ratio - 1, xp.zeros_like(ratio))
    # Where all are at the mean nothing is known of the ratio, which may be infinite.
    reach = xp.where(deviation <= 0, xp.zeros_like(deviation), deviation * xp.sqrt(surplus))
    return Interval(-reach, reach)


@checked(Interval, logits=LOGITS)
def mass_from_range(logits: Interval) -> Interval:
    r"""Theorem B3: $0 \le \kappa \le \log \frac{b e^a - a e^b}{b - a}$, given mean 0 and $a \le X \le b$.

    Sharp: the upper end is attained by the two-point law on $\{a, b\}$.
    """
    xp = array_namespace(logits.low)
    low, high = logits
    width = positive(xp, high - low)
    p, rest = -low / width, high / width
    large = high > LARGE
    near = xp.where(large, xp.zeros_like(high), high)
    small = xp.log1p(p * excess(near) + rest * excess(low))
    floor = xp.finfo(high.dtype).smallest_normal * xp.ones_like(high)
    far = xp.logaddexp(xp.log(xp.maximum(p, floor)) + high, xp.log(xp.maximum(rest, floor)) + low)
    return Interval(xp.zeros_like(high), xp.where(large, far, small))


@checked(Interval, logits=LOGITS, deviation=MASS)
def mass_from_variance(logits: Interval, deviation: Interval) -> Interval:
    r"""Theorem B4: $T(a) \le \kappa \le T(b)$, given mean 0, variance $\sigma^2$ and $a \le X \le b$.

    Parameters
    ----------
    logits : Interval
        $a \le 0 \le b$.
    deviation : Interval
        Of $\sigma$; the lower end makes the lower bound, the upper end the upper one.

    Notes
    -----
    Sharp: each end is attained by a two-point law. Both ends grow with $\sigma$, the upper with ``b``, the lower
    falls with $|a|$, so that outward rounding of the inputs is safe.
    """
    xp = array_namespace(logits.low)
    # A variance above -a b contradicts the range (Bhatia and Davis, 2000, Amer. Math. Monthly 107).
    most = xp.sqrt(-logits.low) * xp.sqrt(logits.high)
    upper = two_point(logits.high, xp.minimum(deviation.high, most))
    lower = two_point(logits.low, xp.minimum(deviation.low, most))
    return Interval(xp.minimum(lower, upper), upper)


def norm(x: Array) -> Array:
    """Euclidean length along the last axis."""
    return array_namespace(x).linalg.vector_norm(x, axis=-1)


def times(share: Array, bound: Array) -> Array:
    """A share of a bound; an infinite one stays so, also where the share is too small for its dtype, and 0."""
    xp = array_namespace(share, bound)
    infinite = xp.isinf(bound)
    return xp.where(infinite, bound, share * xp.where(infinite, xp.zeros_like(bound), bound))


@checked(Interval, slope=VECTOR, offset=VECTOR, mass=MASS, radius=POSITIVE, tail=POSITIVE)
def value_from_representation(slope: Array, offset: Array, mass: Interval, radius: Array, tail: Array) -> Array:
    r"""Theorem B5: bound of the value from an exact representation.

    $$ o_E = \mu_v + e^{-\kappa} g + (1 - e^{-\kappa}) \bar V, \qquad \bar V \text{ in the hull of the } V_j $$

    Hence $\lVert o_E - \mu_v - u \rVert \le \max_\kappa \lVert e^{-\kappa} g - u \rVert + (1 - e^{-\kappa}) R$
    over the two ends of $\kappa$.

    Parameters
    ----------
    slope, offset : array, shape (..., dv)
        $g$ and $u$.
    mass : Interval
        Of $\kappa$.
    radius, tail : array, shape (...)
        $R$, and how far ``slope`` may be from the true $g$ (Theorem B11).
    """
    xp = array_namespace(slope, offset)

    def end(kappa: Array) -> Array:
        fade = xp.exp(-kappa)
        return norm(fade[..., None] * slope - offset) + times(fade, tail) + times(-xp.expm1(-kappa), radius)

    return xp.maximum(end(mass.low), end(mass.high))


@checked(Interval, offset=VECTOR, logits=LOGITS, radius=POSITIVE)
def value_from_range(offset: Array, logits: Interval, radius: Array) -> Array:
    r"""Theorem B6: $\lVert o_E - \mu_v - u \rVert \le \lVert u \rVert + R \tanh \frac{b - a}{2}$.

    Needs no second moment. Sharp for $u = 0$.
    """
    xp = array_namespace(offset)
    return norm(offset) + times(xp.tanh((logits.high - logits.low) / 2), radius)


@checked(Interval, slope=VECTOR, offset=VECTOR, logits=LOGITS, mass=MASS, deviation=MASS, trace=POSITIVE, tail=POSITIVE)
def value_from_residual(
    slope: Array, offset: Array, logits: Interval, mass: Interval, deviation: Interval, trace: Array, tail: Array
) -> Array:
    r"""Theorem B7: bound of the value from what values leave unexplained.

    With $\tau^2 = \operatorname{tr} C_{vv} - \lVert g \rVert^2 / \sigma^2$,

    $$ \lVert o_E - \mu_v - u \rVert \le \max_{\rho} \lVert \rho g - u \rVert + \tau\, \delta $$

    over the ends of $\max(\eta(a) e^{-\kappa_{hi}}, \kappa_{lo} / \sigma^2) \le \rho \le
    \min(\eta(b) e^{-\kappa_{lo}}, b / \sigma^2)$, where $\delta$ is the lesser of
    $\frac{\sigma}{2} (\eta(b) - \eta(a)) e^{-\kappa_{lo}}$ and
    $\sqrt{(e^{b - \kappa_{lo}} - 1)(1 - e^{a - \kappa_{hi}})}$.

    Better than B5 where values follow keys closely. ``inf`` where $b > 30$.

    Parameters
    ----------
    trace : array, shape (...)
        $\operatorname{tr} C_{vv}$, or more.
    slope, offset, logits, mass, deviation, tail
        As in B4 and B5.
    """
    xp = array_namespace(slope, offset)
    useful = logits.high <= LARGE
    zero = xp.zeros_like(logits.high)
    high = xp.where(useful, logits.high, zero)
    at_low, at_high = eta(logits.low), eta(high)
    length = xp.maximum(norm(slope) - tail, zero)
    explained = safe_ratio(length, deviation.high)
    residual = xp.sqrt(xp.maximum(trace - explained * explained, zero))
    inverse_low, inverse_high = (safe_ratio(xp.ones_like(zero), x) for x in deviation)
    rho_low = xp.maximum(at_low * xp.exp(-mass.high), mass.low * inverse_high * inverse_high)
    rho_high = at_high * xp.exp(-mass.low)
    other = high * inverse_low * inverse_low
    rho_high = xp.maximum(xp.where(deviation.low > 0, xp.minimum(rho_high, other), rho_high), rho_low)
    drift = [norm(rho[..., None] * slope - offset) + times(rho, tail) for rho in (rho_low, rho_high)]
    slack = [mass.low, mass.high]
    above = xp.expm1(xp.maximum(high - slack[0], zero))
    below = -xp.expm1(xp.minimum(logits.low - slack[1], zero))
    spread = xp.minimum(0.5 * deviation.high * (at_high - at_low) * xp.exp(-mass.low), xp.sqrt(above * below))
    bound = xp.maximum(*drift) + times(spread, residual)
    return xp.where(useful, bound, xp.full_like(bound, math.inf))


@checked(Interval, difference=NUMBER)
def share_from_mass(difference: Array) -> Array:
    r"""Theorem B9: how far the share of a set moves with its log-mass.

    Shares $1 / (1 + e^{-x})$ at log-masses that differ by $\delta$ differ by at most
    $\tanh(|\delta| / 4)$.
    """
    xp = array_namespace(difference)
    return xp.tanh(xp.abs(difference) / 4)


@checked(
    Interval,
    retained=VECTOR,
    retained_lse=NUMBER,
    base=NUMBER,
    value_mean=VECTOR,
    slope=VECTOR,
    output=VECTOR,
    mass=MASS,
    radius=POSITIVE,
    tail=POSITIVE,
)
def output_from_representation(
    retained: Array,
    retained_lse: Array,
    base: Array,
    value_mean: Array,
    slope: Array,
    output: Array,
    mass: Interval,
    radius: Array,
    tail: Array,
) -> Array:
    r"""Theorem B8: bound of the merged output from the exact representation.

    For any estimate $\hat o$ of the merged output,

    $$ \lVert o - \hat o \rVert \le \max_\kappa
       \frac{\lVert (o_R - \hat o) + A (\mu_v + g - \hat o) + A (e^\kappa - 1)(\mu_v - \hat o) \rVert
       + A (e^\kappa - 1) R}{1 + A e^\kappa} $$

    over the two ends of $\kappa$, with $A = e^{\text{base} - \mathrm{lse}_R}$.

    Parameters
    ----------
    retained, value_mean, slope, output : array, shape (..., dv)
        $o_R, \mu_v, g, \hat o$.
    retained_lse, base : array, shape (...)
        $\mathrm{lse}_R$ and $\log W + s\, q \cdot \mu_k$; ``-inf`` for empty sets.
    mass, radius, tail
        As in B5.
    """
    xp = array_namespace(retained, output)
    zero = xp.zeros_like(radius)

    def end(kappa: Array) -> Array:
        top = xp.maximum(retained_lse, base + kappa)
        shift = xp.where(top > -math.inf, top, zero)
        of_retained, of_evicted = xp.exp(retained_lse - shift), xp.exp(base + kappa - shift)
        total = positive(xp, of_retained + of_evicted)
        kept, linear = of_retained / total, xp.exp(-kappa) * of_evicted / total
        curved = -xp.expm1(-kappa) * of_evicted / total
        error = (
            kept[..., None] * (retained - output)
            + linear[..., None] * (value_mean + slope - output)
            + curved[..., None] * (value_mean - output)
        )
        empty = (kept == 0) & (linear == 0) & (curved == 0)
        return xp.where(empty, norm(output), norm(error) + times(linear, tail) + times(curved, radius))

    return xp.maximum(end(mass.low), end(mass.high))


@checked(Interval, retained=VECTOR, output=VECTOR, centre=VECTOR, error=POSITIVE, share=SHARE)
def output_from_value(retained: Array, output: Array, centre: Array, error: Array, share: Interval) -> Array:
    r"""Theorem B8': bound of the output from any bound of the value.

    If $\lVert o_E - m \rVert \le \varepsilon$ and the evicted share is in an interval,

    $$ \lVert o - \hat o \rVert \le \max_{w} \lVert (1 - w)(o_R - \hat o) + w (m - \hat o) \rVert + w \varepsilon $$

    over the two ends of $w$. Lets any bound on the value, B6 and B7 too, bound the output.
    """
    xp = array_namespace(retained, output)

    def end(w: Array) -> Array:
        return norm((1 - w)[..., None] * (retained - output) + w[..., None] * (centre - output)) + times(w, error)

    return xp.maximum(end(share.low), end(share.high))


@checked(Interval, length=POSITIVE, tail=POSITIVE)
def slope_from_tail(length: Array, tail: Array) -> Array:
    r"""Theorem B11: how far a compact slope may be off.

    With $C_{vk} = B + T$, $\lVert g - s B q \rVert \le s \lVert q \rVert \lVert T \rVert$.

    Parameters
    ----------
    length : array
        $s \lVert q \rVert$.
    tail : array
        A bound of the spectral norm of what a compact (low-rank) matrix leaves out; its Frobenius norm is one.
    """
    return length * tail


@checked(Interval, length=POSITIVE, step=POSITIVE)
def logit_from_step(length: Array, step: Array) -> Array:
    r"""Theorem B12: how far codes move a logit.

    $$ |s\, q \cdot (\hat k - k)| \le \frac\delta2\, s \sum_c |q_c|\, \sigma_c $$

    Parameters
    ----------
    length : array
        $s \sum_c |q_c| \sigma_c$, by the deviations that the key was coded by (`momentkv.codes`).
    step : array
        $\delta$, of the token.
    """
    return length * step / 2


@checked(Interval, logit=POSITIVE, radius=POSITIVE, value=POSITIVE)
def output_from_codes(logit: Array, radius: Array, value: Array) -> Array:
    r"""Theorem B13: how far codes move the output.

    If no logit is off by more than $\varepsilon$ and no value by more than $\varepsilon_v$,

    $$ \lVert \hat o - o \rVert \le 2 R \tanh(\varepsilon / 2) + \varepsilon_v $$

    Parameters
    ----------
    logit, value : array
        $\varepsilon$ (B12) and $\varepsilon_v \ge \lVert \hat v_t - v_t \rVert$, say half a step times the
        length of the values' deviations.
    radius : array
        $R \ge \lVert v_t - c \rVert$ for some $c$, of the values or of the decoded ones.
    """
    return 2 * radius * array_namespace(logit).tanh(logit / 2) + value
