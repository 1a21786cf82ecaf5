"""Anchored summaries: totals that every operation keeps, where the estimate is exact, and what changes nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library
from totals import Points, assert_totals, formula, formula_error, window_of

from momentkv import Moments, attend, estimate
from momentkv.backends import get_backend
from momentkv.statistics.calibration import CAP
from momentkv.statistics.summaries import QueryWindow, Summaries, estimate_summaries
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, assert_within, attention_error, estimate_error, moments_error, unit
from momentkv.testing.strategies import MASKS, Case, cases, numbers, shape, some_tokens

# Queries and keys of size 1e4 make differences of logits that float64 cannot exponentiate: tokens without weight.
MILD = ("gaussian", "ties", "heavy", "huge keys")
sizes, few = shape(st.integers(1, 4), 3), shape(st.integers(1, 3), 3)


def gathered(library: Library, case: Case, summaries: int, *, still: bool = False, strength: float = 0.75) -> Summaries:
    k, v = (library.asarray(x) for x in case.tokens())
    empty = Summaries.empty(k, v, summaries=summaries, rank=min(case.d, case.dv), strength=strength)
    return empty.update(k, v, window_of(library, case, still=still)[0])


def unlimited(x: Summaries) -> Summaries:
    return dataclasses.replace(x, cap=x.cap + math.inf)


def more(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Further tokens of a case."""
    rng = case.rng(21)
    n = int(rng.integers(0, 6))
    return tuple(case.rounded(numbers(rng, (*case.lead, n, size), case.law)) for size in (case.d, case.dv))


@given(case=cases(n=some_tokens), summaries=sizes)
def test_nothing_evicted_is_the_empty_set_and_leaves_attention_to_the_last_bit(
    backend: Library, case: Case, summaries: int
):
    q, k, v = (backend.asarray(x) for x in case.arrays())
    empty = Summaries.empty(k, v, summaries=summaries, rank=min(case.d, case.dv))
    nothing = empty.update(k[..., :0, :], v[..., :0, :], window_of(backend, case)[0])
    masked = empty.update(k, v, window_of(backend, case)[0], mask=backend.asarray(np.zeros(case.n, dtype=bool)))
    retained = attend(q, k, v)
    backends = [get_backend("array-api"), *([get_backend("torch")] if backend.name == "torch" else [])]
    for state in (empty, nothing, masked, masked.reanchor(backend.asarray(np.ones((*case.lead, case.d))))):
        out, lse = (backend.numpy(x) for x in estimate_summaries(q, state))
        assert (out == 0).all()
        assert (lse == -math.inf).all()
        assert (backend.numpy(state.count) == 0).all()
        for each in backends:
            corrected = each.correct(retained, q, state.expansion(), scale=0.5)
            assert_same(backend.numpy(corrected), backend.numpy(retained.out))


@given(case=cases(n=some_tokens, laws=("gaussian", "ties", "huge keys")), extra=shape(st.integers(0, 2), 1))
def test_no_more_tokens_than_summaries_are_attended_exactly(backend: Library, case: Case, extra: int):
    q, k, v = case.arrays()
    u, scale = unit(case.dtype), case.factor()
    state = gathered(backend, case, case.n + extra)
    exact = oracle.attend(q, k, v, scale)
    own, true = formula_error(backend, q, state, scale, u), attention_error(q, k, v, exact.lse, u, scale)
    actual = estimate_summaries(backend.asarray(q), state, scale=scale)
    # A token's weight at the anchor, and the key that a group of equal ones has, err like one more product each; the
    # gain and slope of groups that hold equal tokens are of squared roundings.
    assert_within(backend.numpy(actual.lse), exact.lse, (2 * case.n + 8) * (own.lse + true.lse))
    size = (2 * case.n + 8) * (own.out + true.out)
    assert_within(
        backend.numpy(actual.out), exact.out, size + 2 * np.abs(v).max() * (2 * case.n + 8) * own.lse[..., None]
    )


@given(case=cases(), summaries=sizes, still=st.booleans())
def test_estimate_equals_the_formula(backend: Library, case: Case, summaries: int, still: bool):
    q, scale = case.query(), case.factor()
    state = gathered(backend, case, summaries, still=still)
    actual, exact = estimate_summaries(backend.asarray(q), state, scale=scale), formula(backend, q, state, scale)
    error = formula_error(backend, q, state, scale, unit(case.dtype))
    assert_within(backend.numpy(actual.lse), exact.lse, error.lse)
    assert_within(backend.numpy(actual.out), exact.out, error.out)
    assert {backend.dtype(x) for x in state.arrays().values()} == {case.dtype}


@given(case=cases(masks=MASKS, dtypes=("float64",)), summaries=sizes, still=st.booleans())
def test_totals_are_those_of_the_tokens(backend: Library, case: Case, summaries: int, still: bool):
    """Total weight, weighted means, covariance: also where tokens are equal, huge, left out, or queries all alike."""
    k, v = case.tokens()
    mask = case.token_mask()
    bad_k, bad_v = (k, v) if mask is None else (np.where(mask[..., None], x, np.nan) for x in (k, v))
    window, anchor = window_of(backend, case, still=still)
    empty = Summaries.empty(*(backend.asarray(x) for x in (k, v)), summaries=summaries, rank=min(case.d, case.dv))
    state = empty.update(*(backend.asarray(x) for x in (bad_k, bad_v)), window, mask=backend.asarray(mask))
    # Where dv > d, directions whose values are small beside the largest are not resolved to rounding (see low_rank).
    exact = Points.of_tokens(anchor, k, v, mask)
    assert_totals(backend, state, exact, unit(), covariance=case.dv <= case.d and not still)
    count = np.full(case.lead, float(case.n)) if mask is None else mask.sum(axis=-1).astype(float)
    assert_same(backend.numpy(state.count), np.broadcast_to(count, case.lead))
    assert_same(backend.numpy(state.weight), backend.numpy(state.count))
    some = count > 0
    assert_same(backend.numpy(state.anchor), np.where(np.broadcast_to(some, case.lead)[..., None], anchor, 0.0))


@given(case=cases(laws=MILD, dtypes=("float64",)), summaries=sizes, still=st.booleans())
def test_totals_after_a_second_update_are_those_of_summaries_and_tokens(
    backend: Library, case: Case, summaries: int, still: bool
):
    k, v = more(case)
    state = gathered(backend, case, summaries, still=still)
    window, anchor = window_of(backend, case, 22)
    moved = state.reanchor(window.mean)
    twice = state.update(*(backend.asarray(x) for x in (k, v)), window)
    exact = Points.of_summaries(backend, moved) + Points.of_tokens(anchor, k, v)
    if k.shape[-2]:
        assert_totals(backend, twice, exact, 2 * unit(), covariance=case.dv <= case.d)
    assert_same(backend.numpy(twice.count), np.full(case.lead, float(case.n + k.shape[-2])))


@given(case=cases(n=some_tokens), summaries=sizes)
def test_heads_that_get_no_tokens_stay_as_they_are(backend: Library, case: Case, summaries: int):
    """So that a row of a batch is what it is alone, whenever the other rows evict."""
    k, v = (backend.asarray(x) for x in case.tokens())
    state = gathered(backend, case, summaries)
    gets = case.rng(23).random(case.lead) < 0.5
    mask = np.broadcast_to(gets[..., None], (*case.lead, case.n))
    after = state.update(k, v, window_of(backend, case, 22)[0], mask=backend.asarray(np.array(mask)))
    for name, x in state.arrays().items():
        assert_same(backend.numpy(after.arrays()[name])[~gets], backend.numpy(x)[~gets])
    assert (backend.numpy(after.count)[gets] == 2 * case.n).all()


@given(case=cases(n=some_tokens, laws=MILD), summaries=sizes, strength=st.sampled_from([0.0, 0.75, 1.0]))
def test_another_anchor_leaves_the_estimate(backend: Library, case: Case, summaries: int, strength: float):
    """While the cap does not bind; and the way back restores the state."""
    q, scale, u = case.query(), case.factor(), unit(case.dtype)
    state = unlimited(gathered(backend, case, summaries, strength=strength))
    there = window_of(backend, case, 22)[1]
    moved = state.reanchor(backend.asarray(there.astype(case.dtype)))
    assert_same(backend.numpy(moved.anchor), there)
    back = moved.reanchor(state.anchor)
    own, others = backend.numpy(state.anchor), []
    for other in (moved, back):
        errors = [formula_error(backend, q, x, scale, u, there, own) for x in (state, moved)]
        error = [a + b for a, b in zip(*errors, strict=True)]
        actual, exact = (estimate_summaries(backend.asarray(q), x, scale=scale) for x in (other, state))
        assert_within(backend.numpy(actual.lse), backend.numpy(exact.lse), error[1])
        assert_within(backend.numpy(actual.out), backend.numpy(exact.out), error[0])
        others.append({name: backend.numpy(x) for name, x in other.arrays().items()})
    a, (moved, back) = {name: backend.numpy(x) for name, x in state.arrays().items()}, others
    step = np.abs(there - own)
    shift = (a["strength"][..., None] * a["key_variance"] * step)[..., None, :]
    r = 8 * (case.d + 8) * u
    assert_within(back["key_mean"], a["key_mean"], r * (np.abs(a["key_mean"]) + shift))
    drift = np.einsum("...vr,...rd,...d->...v", *(np.abs(a[x]) for x in ("slope_left", "slope_right")), step)
    assert_within(back["value_mean"], a["value_mean"], r * (np.abs(a["value_mean"]) + drift[..., None, :]))
    walked = ((np.abs(a["key_mean"]) + shift) * step[..., None, :]).sum(axis=-1)
    finite = np.where(np.isfinite(a["log_weight"]), np.abs(a["log_weight"]), 0.0)
    assert_within(back["log_weight"], a["log_weight"], r * (finite + walked))
    for name in ("count", "key_variance", "slope_left", "slope_right", "strength", "cap"):
        assert_same(moved[name], a[name])


@given(case=cases(n=some_tokens, dtypes=("float64",)))
def test_one_summary_without_gain_at_the_zero_query_is_the_paper_s(backend: Library, case: Case):
    case = dataclasses.replace(case, dv=min(case.d, case.dv))
    q, k, v = case.arrays()
    scale, u = case.factor(), unit(case.dtype)
    window = QueryWindow(*(backend.asarray(x * np.ones((*case.lead, case.d))) for x in (0.0, 1.0)))
    k_, v_ = backend.asarray(k), backend.asarray(v)
    state = Summaries.empty(k_, v_, summaries=1, rank=case.dv, strength=0.0).update(k_, v_, window)
    actual = estimate_summaries(backend.asarray(q), state, scale=scale)
    expected = estimate(backend.asarray(q), Moments.from_tokens(k_, v_), order=1, scale=scale)
    sums = oracle.moments(k, v)
    exact = oracle.estimate(q, sums, 1, scale)
    error = estimate_error(q, sums, moments_error(k, v, u), exact.lse, u, scale)
    own = formula_error(backend, q, state, scale, u)
    assert_within(backend.numpy(actual.lse), backend.numpy(expected.lse), 2 * error.lse + own.lse)
    # The slope goes through two factors of rank dv: d dv more roundings of its magnitude.
    linear = np.abs(sums.value_key / np.maximum(sums.weight, 1)[..., None, None]).sum(axis=(-2, -1))
    reach = scale * np.abs(q.astype(np.float64)).sum(axis=-1)
    factors = 8 * u * case.d * case.dv * oracle.to_query_heads(linear, case.q_heads, -1)[..., None] * reach
    assert_within(backend.numpy(actual.out), backend.numpy(expected.out), 2 * error.out + own.out + factors[..., None])


@given(case=cases(n=some_tokens, laws=("gaussian", "ties"), dtypes=("float64",)))
def test_full_strength_adds_half_the_variance_of_the_logits(backend: Library, case: Case):
    q, scale = case.query(), case.factor()
    state = unlimited(gathered(backend, case, 1, strength=1.0))
    anchor = window_of(backend, case)[1]
    sums = Points.of_tokens(anchor, *case.tokens()).totals()
    log_weight, mean, variance = (
        oracle.to_query_heads(x, case.q_heads, axis)
        for x, axis in zip((sums.log_weight, sums.key_mean, sums.key_variance), (-1, -2, -2), strict=True)
    )
    off = scale * q - oracle.to_query_heads(anchor, case.q_heads, -2)[..., None, :]
    exact = log_weight[..., None] + np.einsum("...id,...d->...i", off, mean)
    exact = exact + np.einsum("...id,...d->...i", off**2, variance) / 2
    actual = estimate_summaries(backend.asarray(q), state, scale=scale).lse
    error = formula_error(backend, q, state, scale, (case.n + 8) * unit())
    assert_within(backend.numpy(actual), exact, error.lse)


def test_halving_the_way_from_the_anchor_quarters_or_eighths_the_error(backend: Library):
    """One dimension, where the variance has no off-diagonal: lse to second order, the output to first."""
    rng = np.random.default_rng(0)
    k, v, anchor = rng.standard_normal((1, 30, 1)), rng.standard_normal((1, 30, 1)), np.array([[0.7]])
    window = QueryWindow(backend.asarray(anchor), backend.asarray(np.ones((1, 1))))
    k_, v_ = backend.asarray(k), backend.asarray(v)
    state = unlimited(Summaries.empty(k_, v_, summaries=1, rank=1, strength=1.0).update(k_, v_, window))

    def errors(t: float) -> np.ndarray:
        q = anchor[:, None, :] + t
        exact, actual = oracle.attend(q, k, v, 1.0), estimate_summaries(backend.asarray(q), state, scale=1.0)
        return np.array([np.abs(backend.numpy(a) - b).item() for a, b in zip(actual, exact, strict=True)])

    # The next term changes the ratio by O(t), rounding by 1e-16 / t^3.
    np.testing.assert_allclose(errors(1e-3) / errors(2e-3), [1 / 4, 1 / 8], rtol=1e-2)


@given(case=cases(n=some_tokens), summaries=sizes)
def test_no_query_is_credited_with_more_than_the_cap(backend: Library, case: Case, summaries: int):
    state = gathered(backend, case, summaries)
    variance = backend.numpy(window_of(backend, case)[0].variance)
    mean_gain = 0.75 / 2 * (backend.numpy(state.key_variance) * variance).sum(axis=-1)
    # sqrt and square of the variance, d products and their sum.
    assert_within(backend.numpy(state.cap), CAP * mean_gain, unit(case.dtype) * (case.d + 12) * CAP * mean_gain)
    far = backend.asarray(case.rounded(1e3 * case.query()))
    capped, flat = (
        backend.numpy(estimate_summaries(far, x).lse)
        for x in (state, dataclasses.replace(state, strength=0 * state.strength))
    )
    limit = oracle.to_query_heads(backend.numpy(state.cap), case.q_heads, -1)[..., None]
    assert (capped - flat <= limit + 4 * unit(case.dtype) * (np.abs(flat) + limit)).all()


@given(case=cases(laws=MILD, dtypes=("float64",)), summaries=few, other=few)
def test_merge_keeps_the_totals(backend: Library, case: Case, summaries: int, other: int):
    window, anchor = window_of(backend, case)
    k, v = (backend.asarray(x) for x in more(case))
    rank = min(case.d, case.dv)
    a = gathered(backend, case, summaries)
    b = Summaries.empty(k, v, summaries=other, rank=rank).update(k, v, window)
    a, b = (x.reanchor(window.mean) for x in (a, b))  # of the empty ones
    for mine, theirs in ((a, b), (b, a)):
        union = mine.merge(theirs, window)
        exact = Points.of_summaries(backend, mine) + Points.of_summaries(backend, theirs)
        assert_totals(backend, union, exact, 2 * unit(), covariance=case.dv <= case.d)
        assert_same(backend.numpy(union.count), backend.numpy(mine.count) + backend.numpy(theirs.count))
        assert_same(backend.numpy(union.anchor), anchor)


@pytest.mark.parametrize("far", [0.0, 2000.0])
def test_merge_weighs_variance_and_strength_by_weight(backend: Library, far: float):
    """Also where one side weighs nothing beside the other."""
    rng = np.random.default_rng(0)
    window = QueryWindow(*(backend.asarray(np.ones((1, 1))) for _ in range(2)))
    states = []
    for mean, strength in ((0.0, 1.0), (far, 0.5)):
        k, v = backend.asarray(mean + rng.standard_normal((1, 20, 1))), backend.asarray(rng.standard_normal((1, 20, 1)))
        states.append(Summaries.empty(k, v, summaries=1, rank=1, strength=strength).update(k, v, window))
    union = states[0].merge(states[1], window)
    weights = np.array([backend.numpy(x.log_weight).item() for x in states])
    share = 1 / (1 + np.exp(min(weights[0] - weights[1], 700.0)))
    exact = (1 - share) * 1.0 + share * 0.5
    assert_within(backend.numpy(union.strength), np.array([exact]), 64 * unit() * np.abs(weights).max())
    points = Points.of_summaries(backend, states[0]) + Points.of_summaries(backend, states[1])
    assert_totals(backend, union, points, 2 * unit(), covariance=True)


def test_merge_needs_one_anchor_and_equal_heads(backend: Library):
    k, v = (backend.asarray(np.ones((2, 5, 4))) for _ in range(2))
    window = QueryWindow(k[:, 0, :], v[:, 0, :])
    state = Summaries.empty(k, v).update(k, v, window)
    for other in (
        state.reanchor(2 * k[:, 0, :]),
        state.map(lambda x: x[:1, ...]),
        Summaries.empty(k[..., :3], v, rank=1),
        Summaries.empty(k, v[..., :3], rank=1),
    ):
        with pytest.raises(ValueError, match="different heads or anchors"):
            state.merge(other, window)
