"""Summaries as a state: masks, heads, dtypes, bytes, the fitted strength, and every backend's correction."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library
from test_summaries import gathered
from totals import Points, assert_totals, formula, formula_error, window_of

from momentkv import Moments, attend
from momentkv.backends import get_backend
from momentkv.statistics.summaries import QueryWindow, Summaries, estimate_summaries
from momentkv.testing import oracle
from momentkv.testing.oracle import f64
from momentkv.testing.rounding import assert_same, assert_within, attention_error, merge_error, unit
from momentkv.testing.strategies import Case, cases, shape, some_tokens

sizes = shape(st.integers(1, 4), 3)


@pytest.mark.many_shapes
@given(case=cases(n=st.integers(2, 12), laws=("gaussian",), masks=("random", "rows"), dtypes=("float64",)), m=sizes)
def test_leaving_tokens_out_equals_removing_them(backend: Library, case: Case, m: int):
    """Gaussian tokens, whose groups do not hang on rounding."""
    q, k, v = case.arrays()
    mask, window = case.token_mask(), window_of(backend, case)[0]
    rank = min(case.d, case.dv)
    bad = (backend.asarray(np.where(mask[..., None], x, np.inf)) for x in (k, v))
    empty = Summaries.empty(backend.asarray(k), backend.asarray(v), summaries=m, rank=rank)
    state = empty.update(*bad, window, mask=backend.asarray(mask))
    out, lse = (backend.numpy(x) for x in estimate_summaries(backend.asarray(q), state))
    for head in np.ndindex(case.lead):
        here = (*head[:-1], slice(head[-1], head[-1] + 1))
        kept = [backend.asarray(x[head][mask[head]][None]) for x in (k, v)]
        own = QueryWindow(*(x[(*here, ...)] for x in window))
        alone = Summaries.empty(*kept, summaries=m, rank=rank).update(*kept, own)
        queries = q[head[:-1]][head[-1] * case.group : (head[-1] + 1) * case.group]
        exact = estimate_summaries(backend.asarray(queries), alone)
        error = formula_error(backend, queries, alone, 1 / math.sqrt(case.d), 4 * case.n * unit())
        heads = slice(head[-1] * case.group, (head[-1] + 1) * case.group)
        assert_within(lse[head[:-1]][heads], backend.numpy(exact.lse), error.lse)
        assert_within(out[head[:-1]][heads], backend.numpy(exact.out), error.out + 1e3 * error.lse[..., None] * unit())
        assert backend.numpy(state.count)[head] == mask[head].sum()


@given(case=cases(n=some_tokens, laws=("gaussian",), dtypes=("float64",)), m=sizes)
def test_heads_go_their_own_ways(backend: Library, case: Case, m: int):
    """Permuting the heads of tokens and window permutes the state to the last bit."""
    order = case.rng(9).permutation(case.kv_heads).tolist()
    window = window_of(backend, case)[0]
    k, v = case.tokens()
    rank, axis = min(case.d, case.dv), len(case.batch)
    state = gathered(backend, case, m)
    k, v = (backend.asarray(np.take(x, order, axis)) for x in (k, v))
    turned = QueryWindow(*(backend.asarray(np.take(backend.numpy(x), order, axis)) for x in window))
    permuted = Summaries.empty(k, v, summaries=m, rank=rank).update(k, v, turned)
    error = 256 * (case.n + case.d) * unit()
    for name, x in state.arrays().items():
        expected = np.take(backend.numpy(x), order, axis)
        if name.startswith("slope"):
            continue  # signs of directions are arbitrary; their product is compared below
        finite = np.where(np.isfinite(expected), np.abs(expected), 0).max(initial=1.0)
        assert_within(backend.numpy(permuted.arrays()[name]), expected, error * finite)
    expected = np.take(backend.numpy(state.slope), order, axis)
    assert_within(backend.numpy(permuted.slope), expected, 64 * error * max(np.abs(expected).max(), 1.0))


@pytest.mark.parametrize("halves", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(halves: str):
    torch = LIBRARIES["torch"]
    rng = np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.standard_normal((2, 40, 4)), halves) for _ in range(3))
    states = []
    for arrays in ((q, k, v), (q.float(), k.float(), v.float())):
        window = QueryWindow.from_queries(arrays[0], 2)
        state = Summaries.empty(*arrays[1:], summaries=3).update(*arrays[1:], window).calibrate(*arrays[:2])
        states.append(state)
        assert {torch.dtype(x) for x in (*window, *state.arrays().values())} == {"float32"}
        assert torch.dtype(estimate_summaries(arrays[0], state).out) == "float32"
    for name, x in states[0].arrays().items():
        assert_same(torch.numpy(x), torch.numpy(states[1].arrays()[name]))


def test_tokens_folded_one_by_one_in_bfloat16_are_all_counted():
    torch, n = LIBRARIES["torch"], 600
    rng = np.random.default_rng(0)
    k, v = (torch.asarray(rng.standard_normal((1, n, 2)), "bfloat16") for _ in range(2))
    anchor = np.array([[0.5, -0.5]])
    window = QueryWindow(torch.asarray(anchor, "float32"), torch.asarray(np.ones((1, 2)), "float32"))
    state = Summaries.empty(k, v, summaries=4)
    for j in range(n):
        state = state.update(k[:, j : j + 1], v[:, j : j + 1], window)
    assert state.count.item() == n
    # Each update rounds once more.
    exact = Points.of_tokens(anchor, torch.numpy(k), torch.numpy(v))
    assert_totals(torch, state, exact, n * unit("bfloat16"), covariance=True)


@given(case=cases(n=some_tokens), m=sizes)
def test_state_is_immutable_selects_rows_and_counts_its_bytes(backend: Library, case: Case, m: int):
    state = gathered(backend, case, m)
    d, dv, r = case.d, case.dv, min(case.d, case.dv)
    numbers = 1 + d + m + m * d + m * dv + d + dv * r + r * d + 1 + 1
    assert state.nbytes == numbers * math.prod(case.lead) * np.dtype(case.dtype).itemsize
    assert state.rank == r
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.count = None
    before = {name: backend.numpy(x) for name, x in state.arrays().items()}
    window = window_of(backend, case, 22)[0]
    k, v = (backend.asarray(x) for x in case.tokens())
    state.update(k, v, window)
    state.reanchor(window.mean).merge(state.reanchor(window.mean), window)
    state.calibrate(backend.asarray(case.query()), k)
    for name, x in state.map(lambda x: x[:1, ...]).arrays().items():
        assert_same(backend.numpy(x), before[name][:1])
        assert_same(backend.numpy(state.arrays()[name]), before[name])


@given(case=cases(n=some_tokens, laws=("gaussian", "ties", "offset")), m=sizes)
def test_pooled_moments_are_the_totals(backend: Library, case: Case, m: int):
    state = gathered(backend, case, m)
    pooled = state.pooled()
    assert isinstance(pooled, Moments)
    assert pooled.order == 0
    points = Points.of_summaries(backend, state)
    exact, error = points.totals(), points.error(0 * backend.numpy(state.anchor), unit(case.dtype))
    assert_same(backend.numpy(pooled.weight), backend.numpy(state.count))
    assert_within(backend.numpy(pooled.key_mean), exact.key_mean, error.key_mean)
    assert_within(backend.numpy(pooled.value_mean), exact.value_mean, error.value_mean)


@given(case=cases(laws=("gaussian", "offset"), dtypes=("float64", "float32")))
def test_window_is_mean_and_variance_of_the_scaled_queries_of_a_group(backend: Library, case: Case):
    q, scale = case.query(), case.factor()
    window = QueryWindow.from_queries(backend.asarray(q), case.kv_heads, scale=scale)
    grouped = scale * f64(q).reshape(*case.lead, -1, case.d)
    error = unit(case.dtype) * (case.group * case.q_len + 8) * np.abs(grouped).max(axis=-2)
    assert_within(backend.numpy(window.mean), grouped.mean(axis=-2), error)
    spread = np.ptp(grouped, axis=-2)
    assert_within(
        backend.numpy(window.variance), grouped.var(axis=-2), 4 * error * spread + 2 * error**2 + error * spread**2
    )


def least_squares(library: Library, q: np.ndarray, k: np.ndarray, state: Summaries, scale: float) -> np.ndarray:
    """The fit of `calibrate`, one KV head at a time, by lstsq."""
    flat = dataclasses.replace(state, strength=0 * state.strength)
    kv_heads = k.shape[-3]
    gap = oracle.attend(q, k, k, scale).lse - formula(library, q, flat, scale).lse
    off = scale * f64(q) - oracle.to_query_heads(library.numpy(state.anchor), q.shape[-3], -2)[..., None, :]
    half = (off**2 * oracle.to_query_heads(library.numpy(state.key_variance), q.shape[-3], -2)[..., None, :]).sum(
        -1
    ) / 2
    gap, half = (x.reshape(*x.shape[:-2], kv_heads, -1) for x in (gap, half))
    prior, fit = library.numpy(state.strength), np.zeros(gap.shape[:-1])
    for head in np.ndindex(fit.shape):
        length = np.sqrt((half[head] ** 2).sum())
        rows = np.concatenate([half[head], [length]])
        sides = np.concatenate([gap[head], [prior[head] * length]])
        fit[head] = np.clip(np.linalg.lstsq(rows[:, None], sides)[0][0], 0, 1) if length else prior[head]
    return fit


@given(
    case=cases(n=st.integers(3, 12), laws=("gaussian",), dtypes=("float64",)),
    m=shape(st.integers(1, 2), 2),
    strength=st.sampled_from([0.25, 0.75, 1.0]),
)
def test_strength_is_the_least_squares_fit_with_its_prior(backend: Library, case: Case, m: int, strength: float):
    q, k, scale = case.query(), case.tokens()[0], case.factor()
    state = gathered(backend, case, m, strength=strength)
    fitted = state.calibrate(backend.asarray(q), backend.asarray(k), scale=scale)
    actual = backend.numpy(fitted.strength)
    assert ((actual >= 0) & (actual <= 1)).all()
    # Errors of the gap, 1e-14, count beside the gains that they are divided by.
    half = least_gain(backend, q, state, scale)
    some = half > 1e-6
    expected = least_squares(backend, q, k, state, scale)
    assert_within(actual[some], expected[some], 1e-14 * 100 / half[some])
    ratio = actual / strength
    assert_within(backend.numpy(fitted.cap), backend.numpy(state.cap) * ratio, 4 * unit() * backend.numpy(state.cap))


@pytest.mark.parametrize("tokens", [1, 7, 12])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_where_every_token_is_a_group_the_strength_is_not_fitted_to_rounding(
    backend: Library, tokens: int, dtype: str, size: float
):
    """Variances and gaps are rounding then, and their quotient was any number, clipped to 0 or 1."""
    rng = np.random.default_rng(tokens)
    q, k, v = (backend.asarray(size * rng.standard_normal((heads, n, 16)), dtype) for heads, n in
               ((4, 32), (2, tokens), (2, tokens)))  # fmt: skip
    state = Summaries.empty(k, v, summaries=12).update(k, v, QueryWindow.from_queries(q, 2))
    np.testing.assert_allclose(backend.numpy(state.calibrate(q, k).strength), 0.75, rtol=0.02)


def least_gain(library: Library, q: np.ndarray, state: Summaries, scale: float) -> np.ndarray:
    """Root of the sum of squares of the gains at full strength, a KV head."""
    off = scale * f64(q) - oracle.to_query_heads(library.numpy(state.anchor), q.shape[-3], -2)[..., None, :]
    half = (off**2 * oracle.to_query_heads(library.numpy(state.key_variance), q.shape[-3], -2)[..., None, :]).sum(
        -1
    ) / 2
    return np.sqrt((half.reshape(*state.count.shape, -1) ** 2).sum(axis=-1))


@given(
    case=cases(
        n=st.integers(3, 12),
        laws=("gaussian", "ties", "heavy", "huge keys"),
        masks=("none", "random", "all"),
        dtypes=("float64",),
    ),
    m=shape(st.integers(1, 2), 2),
)
def test_fitting_does_not_raise_the_squared_error_and_ignores_other_tokens(backend: Library, case: Case, m: int):
    """With the prior's share of it, and before the cap, which the fit does not know."""
    q, scale = case.query(), case.factor()
    k, v = case.tokens()
    mask = case.token_mask()
    bad = k if mask is None else np.where(mask[..., None], k, np.nan)
    empty = Summaries.empty(*(backend.asarray(x) for x in (k, v)), summaries=m, rank=1)
    tokens = (backend.asarray(x) for x in (bad, v))
    state = empty.update(*tokens, window_of(backend, case)[0], mask=backend.asarray(mask))
    fitted = state.calibrate(backend.asarray(q), backend.asarray(bad), scale=scale, mask=backend.asarray(mask))
    wide = np.ones(k.shape[:-1], dtype=bool) if mask is None else mask
    seen = np.broadcast_to(wide[..., None, None, :], (*case.lead, case.group, case.q_len, case.n))
    true = oracle.attend(q, k, k, scale, seen).lse
    none = backend.numpy(state.count) == 0
    assert_same(backend.numpy(fitted.strength)[none], backend.numpy(state.strength)[none])

    def loss(x: Summaries) -> np.ndarray:
        lse = formula(backend, q, dataclasses.replace(x, cap=x.cap + np.inf), scale).lse
        some = np.isfinite(true)
        gap = (np.where(some, lse, 0.0) - np.where(some, true, 0.0)).reshape(*case.lead, -1)
        prior = (backend.numpy(x.strength) - 0.75) * least_gain(backend, q, x, scale)
        return (gap**2).sum(axis=-1) + prior**2

    before, after = loss(state), loss(fitted)
    assert (after <= before * (1 + 1e-9) + 1e-9)[~none].all()
    strengths = backend.numpy(fitted.strength)
    assert ((strengths >= 0) & (strengths <= 1)).all()


@given(case=cases(n=some_tokens), m=sizes, cut=shape(st.integers(0, 12), 4))
def test_every_backend_merges_the_estimate_with_attention(backend: Library, case: Case, m: int, cut: int):
    q, k, v = case.arrays()
    scale, u = case.factor(), unit(case.dtype)
    state = gathered(backend, case, m)
    kept = k[..., :cut, :], v[..., :cut, :]
    retained = attend(backend.asarray(q), *(backend.asarray(x) for x in kept), scale=scale)
    part, estimated = oracle.attend(q, *kept, scale), formula(backend, q, state, scale)
    exact = oracle.merge(part, estimated)
    size = max(np.linalg.norm(x, axis=-1).max(initial=0.0) for x in (v, estimated.out))
    lse = np.maximum(np.nan_to_num(np.abs(part.lse), posinf=0), np.abs(estimated.lse))
    of_attention = attention_error(q, *kept, part.lse, u, scale)
    error = merge_error(of_attention, formula_error(backend, q, state, scale, u), size, lse, u)
    for name in ("array-api", *(("torch",) if backend.name == "torch" else ())):
        out = get_backend(name).correct(retained, backend.asarray(q), state.expansion(), scale=scale)
        assert backend.dtype(out) == case.dtype
        assert_within(backend.numpy(out), exact.out, error.out)


@pytest.mark.parametrize("rank", [0, 2])
def test_torch_corrects_as_the_array_api_does(rank: int):
    torch, rng = LIBRARIES["torch"], np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.standard_normal((2, heads, 60, 8))) for heads in (6, 2, 2))
    window = QueryWindow.from_queries(q, 2)
    state = Summaries.empty(k, v, summaries=5, rank=rank).update(k, v, window)
    retained = attend(q, k[..., :9, :], v[..., :9, :])
    outs = [get_backend(name).correct(retained, 3 * q, state.expansion(), scale=0.4) for name in ("torch", "array-api")]
    assert_within(torch.numpy(outs[0]), torch.numpy(outs[1]), 1e-12)
