"""The estimate of evicted tokens: the paper's formula, where it is exact, and what it must not depend on."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
from corrections import correction
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import AttentionState, Moments, attend, correct, estimate
from momentkv.testing import oracle
from momentkv.testing.rounding import (
    StateError,
    assert_same,
    assert_within,
    attention_error,
    default_scale,
    estimate_error,
    moments_error,
    unit,
)
from momentkv.testing.strategies import MASKS, Case, cases, some_tokens

orders = st.sampled_from([0, 1])


class Estimated(NamedTuple):
    """What the library made of a case, what is exact, and how far rounding may take the one from the other."""

    state: AttentionState
    exact: oracle.State
    error: StateError


def estimated(backend: Library, case: Case, *, order: int = 1, w: np.ndarray | None = None) -> Estimated:
    q, k, v = case.arrays()
    u, scale = unit(case.dtype), case.factor()
    moments = Moments.from_tokens(*(backend.asarray(x) for x in (k, v)), weights=backend.asarray(w))
    sums = oracle.moments(k, v, w)
    exact = oracle.estimate(q, sums, order, scale)
    error = estimate_error(q, sums, moments_error(k, v, u, w), exact.lse, u, scale)
    return Estimated(estimate(backend.asarray(q), moments, order=order, scale=scale), exact, error)


def assert_is(backend: Library, state: AttentionState, exact: oracle.State, error: StateError) -> None:
    assert_within(backend.numpy(state.out), exact.out, error.out)
    assert_within(backend.numpy(state.lse), exact.lse, error.lse)


@given(case=cases(masks=MASKS), order=orders)
def test_estimate_equals_the_formula(backend: Library, case: Case, order: int):
    w = case.token_mask()
    w = case.weights() if w is None else case.weights() * w
    assert_is(backend, *estimated(backend, case, order=order, w=w))


@given(case=cases(n=st.just(1)), order=orders)
def test_estimate_of_one_token_is_exact(backend: Library, case: Case, order: int):
    state, _, error = estimated(backend, case, order=order)
    exact = oracle.attend(*case.arrays(), case.factor())
    assert_is(backend, state, exact, error)


@given(case=cases(n=some_tokens), order=orders)
def test_estimate_of_equal_keys_is_exact(backend: Library, case: Case, order: int):
    q, k, v = case.arrays()
    k = np.repeat(k[..., :1, :], case.n, axis=-2)
    u, scale = unit(case.dtype), case.factor()
    moments = Moments.from_tokens(backend.asarray(k), backend.asarray(v))
    exact = oracle.attend(q, k, v, scale)
    error = estimate_error(q, oracle.moments(k, v), moments_error(k, v, u), exact.lse, u, scale)
    assert_is(backend, estimate(backend.asarray(q), moments, order=order, scale=scale), exact, error)


@given(case=cases(n=some_tokens))
def test_estimated_lse_never_exceeds_the_true_one(backend: Library, case: Case):
    """Jensen's inequality."""
    q, k, v = case.arrays()
    state, _, error = estimated(backend, case)
    true = oracle.attend(q, k, v, case.factor()).lse
    slack = error.lse + attention_error(q, k, v, true, unit(), case.factor()).lse
    assert (backend.numpy(state.lse) <= true + slack).all()


@given(case=cases(n=some_tokens, dtypes=("float64",)), shrink=st.sampled_from([0, 3, 6, 9, 12]))
def test_order_one_is_exact_to_first_order(backend: Library, case: Case, shrink: int):
    """Error O(t^2) as q -> t q.

    With X = s q.(k - mu_k) in [a, b], g = s C_vk q and kappa = log E e^X, the exact output is
    mu_v + e^-kappa g + (1 - e^-kappa) times a point of the hull of v - mu_v, and kappa <= (b - a)^2 / 8 (Hoeffding):
    the error is at most (max ||v - mu_v|| + ||g||) (1 - e^-kappa), which vanishes like t^2.
    """
    q, k, v = case.arrays()
    q, scale = q * 2.0**-shrink, case.factor()
    moments = Moments.from_tokens(backend.asarray(k), backend.asarray(v))
    out = backend.numpy(estimate(backend.asarray(q), moments, order=1, scale=scale).out)
    exact, sums = oracle.attend(q, k, v, scale), oracle.moments(k, v)
    logits = oracle.logits(q, k, scale)
    kappa = (logits.max(axis=-1) - logits.min(axis=-1)) ** 2 / 8
    radius = np.linalg.norm(v - sums.value_mean[..., None, :], axis=-1).max(axis=-1)
    radius = oracle.to_query_heads(radius, case.q_heads, -1)[..., None]
    mean = oracle.to_query_heads(sums.value_mean, case.q_heads, -2)[..., None, :]
    slope = np.linalg.norm(oracle.estimate(q, sums, 1, scale).out - mean, axis=-1)
    bound = -np.expm1(-kappa) * (radius + slope)
    rounding = estimate_error(q, sums, moments_error(k, v, unit()), exact.lse, unit(), scale).out
    rounding = (rounding + attention_error(q, k, v, exact.lse, unit(), scale).out).sum(axis=-1)
    assert (np.linalg.norm(out - exact.out, axis=-1) <= bound + rounding).all()


def test_halving_the_query_quarters_the_error_of_order_one(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((4, 1, 8)), rng.standard_normal((2, 50, 8)), rng.standard_normal((2, 50, 6))
    moments = Moments.from_tokens(backend.asarray(k), backend.asarray(v))

    def error(t: float, order: int) -> np.ndarray:
        out = backend.numpy(estimate(backend.asarray(t * q), moments, order=order).out)
        return np.linalg.norm(out - oracle.attend(t * q, k, v).out, axis=-1)

    # The next term of the expansion changes the ratio by O(t) = O(1e-3), rounding by 1e-16 / t^2 = 1e-10.
    for order, ratio in ((1, 1 / 4), (0, 1 / 2)):
        np.testing.assert_allclose(error(5e-4, order) / error(1e-3, order), ratio, rtol=1e-2)


@given(case=cases(masks=MASKS), order=orders)
def test_nothing_evicted_leaves_attention_as_it_is_to_the_last_bit(backend: Library, case: Case, order: int):
    q, k, v = (backend.asarray(x) for x in case.arrays())
    retained = attend(q, k, v, mask=backend.asarray(case.mask()))
    corrected = correct(retained, q, Moments.empty(k, v), order=order)
    for one, other in zip(corrected, retained, strict=True):
        assert_same(backend.numpy(one), backend.numpy(other))
        assert one.dtype == other.dtype


@given(case=cases(), cut=st.integers(0, 12), order=orders)
def test_correct_merges_the_estimate_with_attention(backend: Library, case: Case, cut: int, order: int):
    kept, gone, exact, error = correction(case, cut, order)
    q, scale = backend.asarray(case.arrays()[0]), case.factor()
    state = correct(
        attend(q, *(backend.asarray(x) for x in kept), scale=scale),
        q,
        Moments.from_tokens(*(backend.asarray(x) for x in gone)),
        order=order,
        scale=scale,
    )
    assert_is(backend, state, exact, error)


@given(case=cases(n=some_tokens), order=orders)
def test_rotating_keys_and_queries_leaves_the_estimate(backend: Library, case: Case, order: int):
    q, k, v = case.arrays()
    d, u, scale = case.d, unit(case.dtype), case.factor()
    turn = case.rounded(np.linalg.qr(case.rng(7).standard_normal((d, d)))[0])
    moments = Moments.from_tokens(backend.asarray(k), backend.asarray(v)).rotate(backend.asarray(turn))
    rotated = case.rounded(q @ turn.T)
    state = estimate(backend.asarray(rotated), moments, order=order, scale=scale)
    sums = oracle.moments(k, v)
    exact = oracle.estimate(q, sums, order, scale)
    # A row of an orthogonal matrix sums to at most sqrt(d) in magnitude: so much an error grows, and a product with it
    # adds r times the largest magnitude. r counts the rounding of the matrix itself (it is orthogonal to that) too.
    r = 2 * u * (d + 4) * math.sqrt(d)
    errors = moments_error(k, v, u)
    of_mean = math.sqrt(d) * errors.key_mean + r * np.abs(sums.key_mean).max(axis=-1, keepdims=True)
    of_matrix = math.sqrt(d) * errors.value_key + r * np.abs(sums.value_key).max(axis=(-2, -1), keepdims=True)
    turned = oracle.Sums(sums.weight, sums.key_mean @ turn.T, sums.value_mean, sums.value_key @ turn.T)
    error = estimate_error(
        rotated, turned, oracle.Sums(errors.weight, of_mean, errors.value_mean, of_matrix), exact.lse, u, scale
    )
    # The rotated query errs by r max |q| itself.
    of_query = default_scale(q, scale) * r * np.abs(q.astype(np.float64)).max(axis=-1)
    size = oracle.to_query_heads(np.abs(turned.key_mean).sum(axis=-1), case.q_heads, -1)[..., None]
    slope = oracle.to_query_heads(np.abs(turned.value_key).sum(axis=-1), case.q_heads, -2) / case.n
    error = StateError(error.out + of_query[..., None] * slope[..., None, :], error.lse + of_query * size)
    assert_is(backend, state, exact, error)


@given(case=cases(), order=orders)
def test_scale_on_estimates_equals_scale_on_queries_or_keys(backend: Library, case: Case, order: int):
    q, k, v = case.arrays()
    state, exact, error = estimated(backend, case, order=order)
    scale = case.factor()
    for queries, keys, s in ((2 * q, k, scale / 2), (q, 2 * k, scale / 2), (q / 4, 2 * k, 2 * scale)):
        moments = Moments.from_tokens(backend.asarray(keys), backend.asarray(v))
        assert_is(backend, estimate(backend.asarray(queries), moments, order=order, scale=s), exact, error)
    assert_is(backend, state, exact, error)


@given(case=cases())
def test_estimate_is_linear_in_values(backend: Library, case: Case):
    q, k, v = (backend.asarray(x) for x in case.arrays())
    single, scaled = (estimate(q, Moments.from_tokens(k, x)) for x in (v, -4.0 * v))
    # Powers of two: the same roundings happen in both.
    assert_same(backend.numpy(scaled.out), -4 * backend.numpy(single.out))
    assert_same(backend.numpy(scaled.lse), backend.numpy(single.lse))


@given(case=cases(n=some_tokens), order=orders)
def test_decay_lowers_lse_and_leaves_out(backend: Library, case: Case, order: int):
    q, k, v = (backend.asarray(x) for x in case.arrays())
    moments = Moments.from_tokens(k, v)
    whole, half = (estimate(q, m, order=order, scale=case.factor()) for m in (moments, moments.decay(0.5)))
    assert_same(backend.numpy(half.out), backend.numpy(whole.out))
    _, exact, error = estimated(backend, case, order=order)
    assert_within(backend.numpy(half.lse), exact.lse - math.log(2), 2 * error.lse)


@given(case=cases(n=some_tokens), order=orders)
def test_moments_decayed_to_nothing_estimate_the_empty_set(backend: Library, case: Case, order: int):
    q, k, v = (backend.asarray(x) for x in case.arrays())
    state = estimate(q, Moments.from_tokens(k, v).decay(0.0), order=order)
    assert (backend.numpy(state.out) == 0).all()
    assert (backend.numpy(state.lse) == -math.inf).all()


@given(case=cases(n=some_tokens))
def test_moments_of_order_zero_serve_order_zero(backend: Library, case: Case):
    q, k, v = (backend.asarray(x) for x in case.arrays())
    means, full = Moments.from_tokens(k, v, order=0), Moments.from_tokens(k, v)
    for one, other in zip(estimate(q, means, order=0), estimate(q, full, order=0), strict=True):
        assert_same(backend.numpy(one), backend.numpy(other))


def test_default_scale_is_that_of_attention(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((2, 1, 9))) for _ in range(3))
    one = estimate(q, Moments.from_tokens(k, v))
    for other in (attend(q, k, v), estimate(q, Moments.from_tokens(k, v), scale=1 / 3)):
        # One token: attention and estimate are the same number, here of magnitude below 10 after 9 products.
        assert np.abs(backend.numpy(one.lse) - backend.numpy(other.lse)).max() <= unit() * 13 * 10


@pytest.mark.parametrize("halves", ["bfloat16", "float16"])
def test_half_precision_queries_are_estimated_in_float32(halves: str):
    torch = LIBRARIES["torch"]
    rng = np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.standard_normal((2, 5, 4)), halves) for _ in range(3))
    state = correct(attend(q, k, v), q, Moments.from_tokens(k, v))
    upcast = [x.float() for x in (q, k, v)]
    expected = correct(attend(*upcast), upcast[0], Moments.from_tokens(*upcast[1:]))
    for one, other in zip(state, expected, strict=True):
        assert torch.dtype(one) == "float32"
        assert_same(torch.numpy(one), torch.numpy(other))


@given(case=cases(n=some_tokens, laws=("gaussian",), dtypes=("float64",)))
def test_tolerances_are_rounding_errors(case: Case):
    """A law that is checked to 1e-12 is checked: no tolerance here hides a wrong formula."""
    q, k, v = case.arrays()
    lse = oracle.attend(q, k, v).lse
    of_estimate = estimate_error(q, oracle.moments(k, v), moments_error(k, v, unit()), lse, unit())
    of_attention = attention_error(q, k, v, lse, unit())
    assert max(x.max() for x in (*of_estimate, *of_attention)) < 1e-12
