"""How far rounding alone may take a result from the exact one.

``u`` is the unit roundoff, half the machine epsilon. A sum of n terms errs by at most n u sum |terms| in any order of
addition; ``exp`` and ``log`` of vectorised libraries err by at most 4 ulp, 8 u. Second-order terms in u are covered
by counting every first-order one up. The float64 oracle rounds too, so `unit` adds its own u.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from momentkv.testing.oracle import Sums, f64, to_query_heads

FUNCTION = 8  # exp or log, in units of u
# Merge of two states: two exponentials of a rounded difference, sum, quotient, product and sum; the log of the total.
MERGE = 3 * FUNCTION + 8


def unit(dtype: str = "float64") -> float:
    """Unit roundoff of the arithmetic that inputs of a dtype get, the oracle's own included."""
    return {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-24, "bfloat16": 2.0**-24}[dtype] + 2.0**-53


UNIT_BFLOAT16 = 2.0**-8  # of storage; arithmetic is float32


def assert_within(actual: NDArray[Any], exact: NDArray[Any], error: NDArray[Any] | float) -> None:
    """Assert ``|actual - exact| <= error`` elementwise; infinities must be equal, NaN never passes."""
    actual, exact = f64(actual), f64(exact)
    assert actual.shape == exact.shape
    same = actual == exact
    off = np.abs(np.where(same, 0.0, actual) - np.where(same, 0.0, exact))
    error = np.broadcast_to(error, off.shape)
    assert (off <= error).all(), f"error {np.max(off)} where rounding explains {error[off > error][:1]}"


def assert_same(actual: NDArray[Any], exact: NDArray[Any]) -> None:
    """Assert equality to the last bit (0 and -0 are equal)."""
    assert actual.shape == exact.shape
    assert actual.dtype == exact.dtype
    assert (actual == exact).all()


def default_scale(q: NDArray[Any], scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else abs(scale)


def largest(x: NDArray[Any]) -> NDArray[Any]:
    """Largest magnitude over tokens and components, one number a head."""
    return np.max(np.abs(f64(x)), axis=(-2, -1), initial=0.0)


def longest(v: NDArray[Any]) -> NDArray[Any]:
    """Largest norm over tokens, one number a head."""
    return np.max(np.linalg.norm(f64(v), axis=-1), axis=-1, initial=0.0)


class StateError(NamedTuple):
    out: NDArray[Any]
    lse: NDArray[Any]


def attention_error(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], lse: NDArray[Any], u: float, scale: float | None = None
) -> StateError:
    """Error of ``out`` (per component) and ``lse``.

    A logit errs by eta = u (d + 4) s max_j sum_i |q_i k_ji|; n of them are added up after exp, so the lse errs by
    eta + u (n + 8 + 8 log n + |lse|), and the output by 2 max ||v|| (tanh eta + u (2 n + 20)).
    """
    q, k, v = f64(q), f64(k), f64(v)
    q_heads, n, d = q.shape[-3], k.shape[-2], k.shape[-1]
    products = np.einsum("...hid,...hjd->...hij", np.abs(q), to_query_heads(np.abs(k), q_heads, -3))
    eta = u * (d + 4) * default_scale(q, scale) * np.max(products, axis=-1, initial=0.0)
    size = to_query_heads(longest(v), q_heads, -1)[..., None, None]
    finite = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    sums = n + 2 * FUNCTION + FUNCTION * math.log(max(n, 1))
    return StateError(2 * size * (np.tanh(eta)[..., None] + u * (2 * n + 2 * FUNCTION + 4)), eta + u * (sums + finite))


def merge_error(a: StateError, b: StateError, size: NDArray[Any] | float, lse: NDArray[Any], u: float) -> StateError:
    """Error of a merge: those of its parts, shares moved by the errors of their lse, and `MERGE` roundings."""
    magnitude = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    of_lse = a.lse + b.lse + u * (MERGE + magnitude)
    return StateError(a.out + b.out + 2 * size * (np.tanh(of_lse)[..., None] + u * MERGE), of_lse)


def moments_error(k: NDArray[Any], v: NDArray[Any], u: float, w: NDArray[Any] | None = None, merges: int = 0) -> Sums:
    """Errors of weight, means and co-moment of tokens that arrive in up to ``merges + 1`` parts, one number a head.

    A mean errs by e = u (2 n + 6 + 6 merges) max |k|. Shifting both means of a *centred* sum changes it by W e_k e_v
    only; its own terms err by u (n + 8) W D_k D_v, where D is the largest deviation from the mean. A merge adds
    (W_A W_B / W) delta_v delta_k, with errors 2 e and |delta| <= 2 D, and W_A W_B / W <= W / 4.
    """
    k, v = f64(k), f64(v)
    w = np.ones(k.shape[:-1]) if w is None else np.broadcast_to(f64(w), k.shape[:-1])
    used = (w > 0)[..., None]
    k, v = np.where(used, k, 0.0), np.where(used, v, 0.0)
    n, total = k.shape[-2], w.sum(axis=-1)
    shares = w / np.where(total > 0, total, 1.0)[..., None]
    spread = [largest(np.where(used, x - (shares[..., None] * x).sum(axis=-2, keepdims=True), 0.0)) for x in (k, v)]
    ek, ev = (u * (2 * n + 6 + 6 * merges) * largest(x) for x in (k, v))
    dk, dv = spread[0] + ek, spread[1] + ev
    between = total / 4 * (2 * dv * 2 * ek + 2 * dk * 2 * ev + 4 * ek * ev + 8 * u * 4 * dk * dv)
    terms = total * (ek * ev + u * (n + 8 + 2 * merges) * dk * dv)
    return Sums(u * (n + merges) * total, ek[..., None], ev[..., None], (terms + merges * between)[..., None, None])


def estimate_error(
    q: NDArray[Any], sums: Sums, errors: Sums, lse: NDArray[Any], u: float, scale: float | None = None
) -> StateError:
    """Error of an estimate: of its two products, u (d + 4) each, and of the moments it is made from."""
    q = np.abs(f64(q))
    heads, d, s = q.shape[-3], q.shape[-1], default_scale(q, scale)
    weight, key_mean, value_mean, value_key = (
        to_query_heads(np.abs(x), heads, axis) for x, axis in zip(sums, (-1, -2, -2, -3), strict=True)
    )
    of_weight, ek, ev, es = (to_query_heads(x, heads, axis) for x, axis in zip(errors, (-1, -2, -2, -3), strict=True))
    safe = np.where(weight > 0, weight, 1.0)
    relative = of_weight / safe
    length = s * q.sum(axis=-1)
    magnitude = np.where(np.isfinite(lse), np.abs(lse), 0.0)
    of_lse = u * (d + 4) * s * np.einsum("...hid,...hd->...hi", q, key_mean) + length * ek
    of_lse = of_lse + (relative + u * (FUNCTION * np.abs(np.log(safe)) + 4))[..., None] + u * magnitude
    slope = value_key / safe[..., None, None]
    linear = s * np.einsum("...hvd,...hid->...hiv", slope, q)
    out = ev[..., None, :] + length[..., None] * es / safe[..., None, None]
    out = out + (u * (d + 6) + relative[..., None, None]) * linear + 2 * u * value_mean[..., None, :]
    return StateError(out, of_lse)


def corrected_error(
    q: NDArray[Any], k: NDArray[Any], v: NDArray[Any], u: float, scale: float | None = None, merges: int = 0
) -> NDArray[Any]:
    """Error of a corrected output, whichever of the tokens are retained and whichever are folded.

    A part of the tokens has means within those of single tokens, deviations at most twice those of all, and an lse of
    at most the largest logit plus log n.
    """
    k, v = f64(k), f64(v)
    q_heads, n = q.shape[-3], k.shape[-2]
    whole = moments_error(k, v, u, merges=merges)
    errors = Sums(np.full(k.shape[:-2], u * (n + merges)), whole.key_mean, whole.value_mean, 4 * whole.value_key / n)
    dk, dv = (np.abs(x - x.mean(axis=-2, keepdims=True)).max(axis=-2) for x in (k, v))
    mean_k, mean_v = (np.abs(x).max(axis=-2) for x in (k, v))
    sums = Sums(np.ones(k.shape[:-2]), mean_k, mean_v, 4 * dv[..., :, None] * dk[..., None, :])
    s = default_scale(q, scale)
    products = np.einsum("...hid,...hjd->...hij", np.abs(f64(q)), to_query_heads(np.abs(k), q_heads, -3))
    reach = s * products.max(axis=-1) + math.log(n)
    retained = attention_error(q, k, v, reach, u, scale)
    evicted = estimate_error(q, sums, errors, reach, u, scale)
    evicted = evicted._replace(lse=evicted.lse + u * FUNCTION * math.log(n))
    slope = s * np.einsum("...hvd,...hid->...hiv", to_query_heads(sums.value_key, q_heads, -3), np.abs(f64(q)))
    size = np.linalg.norm(to_query_heads(sums.value_mean, q_heads, -2)[..., None, :] + slope, axis=-1, keepdims=True)
    return merge_error(retained, evicted, size, reach, u).out
