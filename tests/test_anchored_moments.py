"""Moments with an anchor: tokens weighted by the attention of one query, and the algebra of such states."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library

from momentkv import Moments, estimate
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, assert_within, unit
from momentkv.testing.strategies import Case, cases, some_tokens

MILD = ("gaussian", "ties")


def anchor_of(case: Case) -> np.ndarray:
    return case.rounded(case.rng(31).standard_normal((*case.lead, case.d)))


def tilt(case: Case, k: np.ndarray, anchor: np.ndarray) -> float:
    """Relative error of a weight: of its logit, of exp, and of the sums and merges that it goes through."""
    size = (np.abs(anchor)[..., None, :] * np.abs(k)).sum(axis=-1).max(initial=0.0)
    return float(unit(case.dtype) * ((2 * case.d + 8) * size + 64 + 4 * case.n))


def made(backend: Library, k: np.ndarray, v: np.ndarray, anchor: np.ndarray, **options) -> Moments:
    return Moments.from_tokens(*(backend.asarray(x) for x in (k, v)), anchor=backend.asarray(anchor), **options)


def assert_sums(backend: Library, state: Moments, exact: oracle.Sums, log_scale: np.ndarray, error: float) -> None:
    """The state against weighted sums, whose weights are in units of ``exp(log_scale)``."""
    lse = np.log(backend.numpy(state.weight)) + backend.numpy(state.log_scale)
    assert_within(lse, np.log(exact.weight) + log_scale, 2 * error + error * np.abs(log_scale))
    for name in ("key_mean", "value_mean"):
        off = np.abs(backend.numpy(getattr(state, name)) - getattr(exact, name)).max(initial=0.0)
        assert off <= 4 * error * (1 + np.abs(getattr(exact, name)).max() + spread(exact))
    weight = backend.numpy(state.weight)[..., None, None]
    covariance = backend.numpy(state.value_key) / weight
    off = np.abs(covariance - exact.value_key / exact.weight[..., None, None]).max(initial=0.0)
    assert off <= 16 * error * (1 + spread(exact)) ** 2


def spread(exact: oracle.Sums) -> float:
    """A bound of the coordinates of keys and values of these tests, which are gaussian."""
    return 16.0 + float(np.abs(exact.key_mean).max() + np.abs(exact.value_mean).max())


@given(case=cases(n=some_tokens, laws=MILD), weighted=st.booleans())
def test_an_anchor_weighs_tokens_by_its_attention(backend: Library, case: Case, weighted: bool):
    k, v = case.tokens()
    anchor, w = anchor_of(case), case.weights() if weighted else None
    if w is not None:
        w[..., 0] = np.maximum(w[..., 0], 0.5)  # some weight in every head
    logits = np.einsum("...d,...nd->...n", oracle.f64(anchor), oracle.f64(k))
    seen = np.ones(k.shape[:-1]) if w is None else oracle.f64(w)
    top = np.where(seen > 0, logits, -np.inf).max(axis=-1)
    exact = oracle.moments(k, v, seen * np.exp(np.where(seen > 0, logits - top[..., None], -np.inf)))
    state = made(backend, k, v, anchor, weights=backend.asarray(w))
    error = tilt(case, k, anchor)
    assert_within(backend.numpy(state.log_scale), top, np.full(top.shape, error))
    assert_sums(backend, state, exact, top, error)
    assert {backend.dtype(x) for x in state.arrays().values()} == {case.dtype}


@given(case=cases(n=st.integers(2, 12), laws=MILD), parts=st.integers(2, 4), backwards=st.booleans())
def test_tokens_may_arrive_in_parts(backend: Library, case: Case, parts: int, backwards: bool):
    """Whichever part sets the scale."""
    k, v = case.tokens()
    anchor = anchor_of(case)
    pieces = [x for x in np.array_split(np.arange(case.n), parts) if len(x)]
    states = [made(backend, k[..., piece, :], v[..., piece, :], anchor) for piece in pieces]
    state = states[-1] if backwards else states[0]
    for other in states[-2::-1] if backwards else states[1:]:
        state = state.merge(other)
    logits = np.einsum("...d,...nd->...n", oracle.f64(anchor), oracle.f64(k))
    top = logits.max(axis=-1)
    assert_sums(backend, state, oracle.moments(k, v, np.exp(logits - top[..., None])), top, tilt(case, k, anchor))


@given(case=cases(laws=MILD), order=st.sampled_from([0, 1, 2]), extent=st.booleans())
def test_empty_is_the_identity_to_the_last_bit(backend: Library, case: Case, order: int, extent: bool):
    k, v = case.tokens()
    state = made(backend, k, v, anchor_of(case), order=order, extent=extent)
    nothing = made(backend, k[..., :0, :], v[..., :0, :], anchor_of(case), order=order, extent=extent)
    for merged in (nothing.merge(state), state.merge(nothing)):
        assert merged.arrays().keys() == state.arrays().keys()
        for name, x in merged.arrays().items():
            assert_same(backend.numpy(x), backend.numpy(state.arrays()[name]))


@given(case=cases(n=some_tokens, laws=MILD, masks=("tokens",)))
def test_masked_tokens_count_nothing_whatever_they_hold(backend: Library, case: Case):
    k, v = case.tokens()
    mask, anchor = case.token_mask(), anchor_of(case)
    bad = [np.where(mask[..., None], x, np.asarray(fill, x.dtype)) for x, fill in ((k, np.nan), (v, np.inf))]
    good = [np.where(mask[..., None], x, np.asarray(0, x.dtype)) for x in (k, v)]
    one, other = (made(backend, *x, anchor, mask=backend.asarray(mask)) for x in (bad, good))
    for name, x in one.arrays().items():
        assert_same(backend.numpy(x), backend.numpy(other.arrays()[name]))
    none = np.broadcast_to(~mask.any(axis=-1), case.lead)
    assert (np.isneginf(backend.numpy(one.log_scale)) == none).all()


@given(case=cases(n=some_tokens, laws=MILD, dtypes=("float64",)), order=st.sampled_from([0, 1, 2]))
def test_rotating_keys_anchor_and_queries_leaves_the_estimate(backend: Library, case: Case, order: int):
    q, k, v = case.arrays()
    anchor = anchor_of(case)
    turn = np.linalg.qr(case.rng(7).standard_normal((case.d, case.d)))[0]
    state = made(backend, k, v, anchor, order=order)
    rotated = state.rotate(backend.asarray(turn))
    one = estimate(backend.asarray(q), state, order=order, scale=0.3)
    other = estimate(backend.asarray(q @ turn.T), rotated, order=order, scale=0.3)
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(backend.numpy(x), backend.numpy(y), rtol=1e-9, atol=1e-9)
    if case.d:
        with pytest.raises(ValueError, match=r"off orthogonal by .* logits at the anchor"):
            state.rotate(backend.asarray(2 * np.eye(case.d)))


@given(case=cases(n=some_tokens, laws=MILD))
def test_decay_lowers_lse_and_leaves_out(backend: Library, case: Case):
    q, k, v = case.arrays()
    state = made(backend, k, v, anchor_of(case))
    whole, half, none = (
        estimate(backend.asarray(q), x, scale=0.3) for x in (state, state.decay(0.5), state.decay(0.0))
    )
    assert_same(backend.numpy(half.out), backend.numpy(whole.out))
    lse = backend.numpy(whole.lse)
    assert_within(backend.numpy(half.lse), oracle.f64(lse) - math.log(2), 64 * unit(case.dtype) * (1 + np.abs(lse)))
    assert (backend.numpy(none.out) == 0).all()
    assert np.isneginf(backend.numpy(none.lse)).all()


def test_what_is_decayed_to_nothing_does_not_set_the_scale():
    """A head without weight is empty, whatever scale it had. Its mean of 1e5 costs the sum with it some digits."""
    rng = np.random.default_rng(0)
    k, v, anchor = rng.standard_normal((1, 5, 4)), rng.standard_normal((1, 5, 3)), rng.standard_normal((1, 4))
    far = Moments.from_tokens(k + 1e4 * anchor[:, None], v, anchor=anchor).decay(0.0)
    near = Moments.from_tokens(k, v, anchor=anchor)
    for merged in (far.merge(near), near.merge(far)):
        for name, x in merged.arrays().items():
            np.testing.assert_allclose(x, near.arrays()[name], rtol=1e-9)


def test_a_zero_anchor_gives_the_moments_without_one(backend: Library):
    rng = np.random.default_rng(0)
    k, v = (backend.asarray(rng.standard_normal((2, 7, 4))) for _ in range(2))
    plain = Moments.from_tokens(k, v, order=2)
    anchored = Moments.from_tokens(k, v, order=2, anchor=backend.asarray(np.zeros(4)))  # one for all heads
    assert anchored.anchor.shape == (2, 4)
    assert (backend.numpy(anchored.log_scale) == 0).all()
    for name, x in plain.arrays().items():
        assert_same(backend.numpy(x), backend.numpy(anchored.arrays()[name]))


def test_misuse_of_anchors_is_refused_by_name():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 3))
    one = Moments.from_tokens(k, v, anchor=np.ones(4))
    with pytest.raises(ValueError, match="cannot downdate moments with an anchor"):
        one.downdate(k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match="with and without anchor"):
        one.merge(Moments.from_tokens(k, v))
    with pytest.raises(ValueError, match="with other anchors"):
        one.merge(Moments.from_tokens(k, v, anchor=np.zeros(4)))
    with pytest.raises(ValueError, match=r"anchor has shape \(3,\)"):
        Moments.from_tokens(k, v, anchor=np.ones(3))
    with pytest.raises(ValueError, match="spread by"):
        Moments.from_tokens(k, v, anchor=np.full(4, 1e4))
    far = dataclasses.replace(one, log_scale=one.log_scale + 1e4)
    with pytest.raises(ValueError, match="spread by"):
        one.merge(far)
