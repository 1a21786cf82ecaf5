"""Expansions: what every statistic gives, and what the groups of one are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library

from momentkv import Moments, attend, correct, estimate
from momentkv.attention import logits, merge, softmax_state
from momentkv.statistics.expansion import Expansion, estimate_expansion
from momentkv.statistics.summaries import QueryWindow, Summaries
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, unit
from momentkv.testing.strategies import Case, cases

MILD = ("gaussian", "ties")


def as_tokens(backend: Library, q, k, v, expansion: Expansion, scale: float):
    """One attention call over tokens and groups: the bias is on the logits of the groups."""
    xp = backend.xp
    keys = xp.concat([k, expansion.key_mean], axis=-2)
    values = xp.concat([v, expansion.value_mean], axis=-2)
    bias = xp.concat([xp.zeros_like(k[..., 0]), expansion.bias], axis=-1)
    return softmax_state(logits(q, keys, scale=scale) + bias[..., None, None, :], values)[0]


def summaries_of(backend: Library, case: Case, m: int) -> Summaries:
    q, k, v = (backend.asarray(x) for x in case.arrays())
    window = QueryWindow.from_queries(q, case.kv_heads, scale=case.factor())
    return Summaries.empty(k, v, summaries=m, rank=min(1, case.d, case.dv)).update(k, v, window)


@given(case=cases(laws=MILD, dtypes=("float64",)), m=st.integers(1, 4), own=st.integers(0, 3))
def test_groups_are_tokens_with_a_bias(backend: Library, case: Case, m: int, own: int):
    """Retained tokens and groups read in one call are retained tokens corrected by them; also if either is empty."""
    case = dataclasses.replace(case, q_len=max(case.q_len, 1))
    q, scale = backend.asarray(case.arrays()[0]), case.factor()
    rng = case.rng(41)
    k, v = (backend.asarray(rng.standard_normal((*case.lead, own, size))) for size in (case.d, case.dv))
    groups = summaries_of(backend, case, m).expansion()
    groups = groups._replace(slope_left=None, slope_right=None, variance=None, strength=None, cap=None)
    one = as_tokens(backend, q, k, v, groups, scale)
    other = correct(attend(q, k, v, scale=scale), q, groups, scale=scale)
    # Logits of anchor and query apart, then together: each errs by rounding of its terms.
    parts = [oracle.f64(backend.numpy(x)) for x in (groups.key_mean, groups.anchor)]
    size = 1 + (np.abs(scale * case.arrays()[0]).sum(-1).max(initial=0) + np.abs(parts[1]).sum(-1).max(initial=0)) * (
        1 + np.abs(parts[0]).max(initial=0)
    )
    error = 64 * unit() * (case.d + case.n + m + own + 8) * size
    largest = 1 + max(np.abs(backend.numpy(x)).max(initial=0) for x in (v, groups.value_mean))
    finite = np.isfinite(backend.numpy(other.lse))
    assert (np.isfinite(backend.numpy(one.lse)) == finite).all()
    off = np.abs(np.where(finite, backend.numpy(one.lse), 0) - np.where(finite, backend.numpy(other.lse), 0))
    assert (off <= error * (1 + np.abs(np.where(finite, backend.numpy(other.lse), 0)))).all()
    assert (np.abs(backend.numpy(one.out) - backend.numpy(other.out)) <= 4 * error * largest).all()


@given(case=cases(laws=MILD, dtypes=("float64",)), m=st.integers(1, 3))
def test_gain_and_slope_are_shared_by_all_groups(backend: Library, case: Case, m: int):
    """docs/derivations/summaries.md: the groups as tokens, their mass times e^g, their output plus B x."""
    q, scale = backend.asarray(case.arrays()[0]), case.factor()
    whole = summaries_of(backend, case, m).expansion()
    groups = whole._replace(slope_left=None, slope_right=None, variance=None, strength=None, cap=None)
    full, bare = (estimate_expansion(q, x, scale=scale) for x in (whole, groups))
    parts = {
        name: None if x is None else oracle.to_query_heads(oracle.f64(backend.numpy(x)), case.q_heads, len(case.batch))
        for name, x in whole._asdict().items()
    }
    x = scale * oracle.f64(case.arrays()[0]) - parts["anchor"][..., None, :]
    gain = 0.5 * parts["strength"][..., None] * np.einsum("...id,...d->...i", x**2, parts["variance"])
    gain = np.minimum(gain, parts["cap"][..., None])
    step = np.zeros((*x.shape[:-1], case.dv))
    if parts["slope_left"] is not None:
        step = np.einsum("...vr,...rd,...id->...iv", parts["slope_left"], parts["slope_right"], x)
    lse = backend.numpy(bare.lse)
    some = np.isfinite(lse)
    np.testing.assert_allclose(backend.numpy(full.lse)[some], (lse + gain)[some], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        backend.numpy(full.out)[some], (backend.numpy(bare.out) + step)[some], rtol=1e-9, atol=1e-9
    )
    assert (backend.numpy(full.out)[~some] == 0).all()


@given(case=cases(laws=MILD), order=st.sampled_from([0, 1, 2]), anchored=st.booleans())
def test_an_expansion_stands_where_its_statistics_can(backend: Library, case: Case, order: int, anchored: bool):
    """In `estimate` and `correct`, to the last bit."""
    q, k, v = (backend.asarray(x) for x in case.arrays())
    anchor = backend.asarray(case.rounded(case.rng(3).standard_normal((*case.lead, case.d)))) if anchored else None
    moments = Moments.from_tokens(k, v, order=2, anchor=anchor)
    expansion = moments.expansion(order=order)
    retained = attend(q, k, v)
    pairs = [
        (estimate(q, moments, order=order), estimate(q, expansion)),
        (correct(retained, q, moments, order=order), correct(retained, q, expansion)),
        (correct(retained, q, expansion), merge(retained, estimate_expansion(q, expansion))),
    ]
    for one, other in pairs:
        for x, y in zip(one, other, strict=True):
            assert_same(backend.numpy(x), backend.numpy(y))


def test_what_has_an_order_takes_no_other():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 5, 4)) for _ in range(3))
    expansion = Moments.from_tokens(k, v).expansion()
    summaries = Summaries.empty(k, v, summaries=2).update(k, v, QueryWindow.from_queries(q, 1))
    with pytest.raises(ValueError, match="order is 0 and strength None, but an Expansion has both"):
        estimate(q, expansion, order=0)
    with pytest.raises(ValueError, match="order is 2 and strength None, but summaries"):
        estimate(q, summaries, order=2)
    with pytest.raises(ValueError, match=r"order is None and strength 0\.5, but summaries"):
        estimate(q, summaries, strength=0.5)
    with pytest.raises(ValueError, match=r"Expansion given as moments have no extent"):
        correct(attend(q, k, v), q, expansion, certify=True)  # type: ignore[call-overload]
    flat = estimate(q, summaries, order=0)
    assert_same(flat.lse, estimate(q, summaries).lse)
    assert np.abs(flat.out - estimate(q, summaries).out).max() > 1e-3
