"""Each policy's importance against its formula, and what it makes of observed attention."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import POLICIES, LayerCache, Moments, Policy, Tokens, get_policy
from momentkv.policies import H2O, TOVA, KeyDiff, Knorm, MomentKV, Random, SnapKV, Streaming
from momentkv.testing import oracle
from momentkv.testing.rounding import (
    FUNCTION,
    assert_same,
    assert_within,
    attention_error,
    estimate_error,
    moments_error,
    unit,
)
from momentkv.testing.strategies import Case, cases, some_tokens

SCALE = 0.6
many_shapes = pytest.mark.many_shapes


def positions_of(case: Case) -> np.ndarray:
    """Rising, with gaps from earlier evictions and empty slots anywhere."""
    rng = case.rng(20)
    steps = rng.integers(1, 4, (*case.lead, case.n))
    empty = rng.random(steps.shape) < 0.2
    # An empty slot may lie between neighbours: a row that kept fewer tokens than others is filled up.
    return np.where(empty, -1, np.cumsum(np.where(empty, 0, steps), axis=-1) - 1).astype(np.int32)


def evicted_of(case: Case, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = case.rng(21)
    k, v = (rng.standard_normal((*case.lead, n, size)) for size in (case.d, case.dv))
    return case.rounded(k), case.rounded(v)


def importance(backend: Library, policy: Policy, case: Case, evicted: int = 0) -> np.ndarray:
    k, v = case.tokens()
    score = case.rounded(case.rng(22).random((*case.lead, case.n)))
    tokens = Tokens(
        *(backend.asarray(x) for x in (k, v, positions_of(case), score)),
        Moments.from_tokens(*(backend.asarray(x) for x in evicted_of(case, evicted))),
        SCALE,
    )
    return backend.numpy(policy.importance(tokens))


def score_of(case: Case) -> np.ndarray:
    return case.rounded(case.rng(22).random((*case.lead, case.n))).astype(np.float64)


@given(case=cases(n=some_tokens))
def test_streaming_ranks_by_position(backend: Library, case: Case):
    assert_same(importance(backend, Streaming(), case), positions_of(case).astype(np.float64))


@pytest.mark.parametrize("policy", [H2O(), TOVA()])
@given(case=cases(n=some_tokens))
def test_h2o_and_tova_rank_by_observed_attention(backend: Library, case: Case, policy: Policy):
    assert_same(importance(backend, policy, case), score_of(case))


@given(case=cases(n=some_tokens))
def test_knorm_is_minus_the_norm(backend: Library, case: Case):
    exact = oracle.knorm(case.tokens()[0])
    # d squares and their sum, halved by the root; the root itself.
    assert_within(importance(backend, Knorm(), case), exact, unit(case.dtype) * (case.d + 3) * np.abs(exact))


@given(case=cases(n=some_tokens))
def test_keydiff_is_minus_the_cosine_to_the_mean_direction(backend: Library, case: Case):
    k, held = case.tokens()[0].astype(np.float64), positions_of(case) >= 0
    exact = oracle.keydiff(k, held)
    lengths = np.linalg.norm(k, axis=-1, keepdims=True)
    directions = np.where(held[..., None], k / np.where(lengths > 0, lengths, 1), 0)
    mean = np.linalg.norm(directions.mean(axis=-2), axis=-1) * case.n / np.maximum(held.sum(axis=-1), 1)
    # The mean of unit vectors errs by u (n + d + 8) a component; its direction by that over its length.
    u = unit(case.dtype)
    with np.errstate(divide="ignore"):
        turned = 2 * math.sqrt(case.d) * u * (case.n + case.d + 8) / mean
    error = np.minimum(turned + u * (2 * case.d + 8), 2)
    got = importance(backend, KeyDiff(), case)
    assert_within(np.where(held, got, 0), exact, error[..., None])


@given(case=cases(n=some_tokens), kernel=st.sampled_from([1, 3, 5, 7]))
def test_snapkv_pools_over_neighbouring_positions(backend: Library, case: Case, kernel: int):
    """Positions, not slots: a gap of evicted tokens parts neighbours, an empty slot between them does not."""
    positions, score = positions_of(case), score_of(case)
    exact = oracle.snapkv(score, positions, kernel)
    got = importance(backend, SnapKV(kernel=kernel), case)
    assert_within(np.where(positions >= 0, got, 0), exact, unit(case.dtype) * (kernel + 2) * exact)


def test_snapkv_pools_over_an_empty_slot(backend: Library):
    """Positions 4 and 5 are neighbours wherever they are stored."""
    score, positions = (backend.asarray(np.array([x])) for x in ([3.0, 0.0, 0.0, 6.0], [4, -1, -1, 5]))
    empty = Moments.from_tokens(*(backend.asarray(np.zeros((1, 0, 1))) for _ in range(2)))
    pooled = backend.numpy(SnapKV(kernel=3).importance(Tokens(None, None, positions, score, empty, 1.0)))
    assert_same(pooled[:, [0, 3]], np.array([[3.0, 3.0]]))


@given(case=cases(n=some_tokens), evicted=st.sampled_from([0, 1, 7]))
def test_momentkv_is_attention_times_residual(backend: Library, case: Case, evicted: int):
    k, v = (x.astype(np.float64) for x in case.tokens())
    gone, score, u = evicted_of(case, evicted), score_of(case), unit(case.dtype)
    sums = oracle.moments(*gone)
    exact = oracle.momentkv(score, k, v, sums, SCALE)
    # The prediction is an estimate with the key as query; then two subtractions, a norm and a product.
    predicted = oracle.estimate(k, sums, 1, SCALE)
    error = estimate_error(k, sums, moments_error(*gone, u), np.zeros(k.shape[:-1]), u, SCALE).out
    error = error + 2 * u * (np.abs(v) + np.abs(predicted.out) + 2 * np.abs(sums.value_mean)[..., None, :])
    error = score * np.linalg.norm(error, axis=-1) + u * (case.dv + 4) * exact
    assert_within(importance(backend, MomentKV(), case, evicted), exact, error)


@given(case=cases(n=some_tokens))
def test_momentkv_with_order_zero_takes_the_residual_to_the_mean(backend: Library, case: Case):
    k, v = case.tokens()
    gone, score, u = evicted_of(case, 4), score_of(case), unit(case.dtype)
    moments = Moments.from_tokens(*(backend.asarray(x) for x in gone), order=0)
    arrays = (backend.asarray(x) for x in (k, v, positions_of(case), case.rounded(score)))
    got = backend.numpy(MomentKV().importance(Tokens(*arrays, moments, SCALE)))
    sums = oracle.moments(*gone)
    exact = oracle.momentkv(score, k, v, sums._replace(value_key=0 * sums.value_key), SCALE)
    error = moments_error(*gone, u).value_mean[..., None, :] + 2 * u * (
        np.abs(v) + np.abs(sums.value_mean)[..., None, :]
    )
    assert_within(got, exact, score * np.linalg.norm(error, axis=-1) + u * (case.dv + 4) * exact)


def lot(backend: Library, n: int, heads: int = 2, **kwargs: int) -> np.ndarray:
    positions = np.broadcast_to(np.arange(n, dtype=np.int32), (heads, n))
    empty = Moments.from_tokens(*(backend.asarray(np.zeros((heads, 0, 1))) for _ in range(2)))
    tokens = Tokens(None, None, backend.asarray(positions), None, empty, 1.0)
    return backend.numpy(Random(**kwargs).importance(tokens))


def test_random_is_the_same_on_every_backend_and_at_every_eviction(backend: Library):
    whole = lot(backend, 500)
    assert_same(whole, lot(LIBRARIES["numpy"], 500))
    assert_same(whole[:, :100], lot(backend, 100))


def test_random_depends_on_seed_head_and_position(backend: Library):
    draws = np.concatenate([lot(backend, 300, 3, seed=seed) for seed in (0, 1, 2, 2**31 - 1)])
    # Distinct 32-bit numbers, but for birthdays: 3600 draws collide 3600^2 / 2^33 = 0.002 times.
    assert len(np.unique(draws)) == draws.size
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    # 12 independent rows of 300: a correlation has sd 1 / sqrt(300), and the largest of 66 stays below 4.5 of them.
    assert np.abs(correlations).max() < 4.5 / math.sqrt(300)


def test_random_is_uniform():
    n = 50_000
    for row in lot(LIBRARIES["numpy"], n, 2, seed=3):
        distance = np.abs(np.sort(row) - (np.arange(n) + 0.5) / n).max()
        assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, level 0.001
        assert abs(np.corrcoef(row[:-1], row[1:])[0, 1]) < 4 / math.sqrt(n)
        assert ((row >= 0) & (row < 1)).all()


def observed(
    backend: Library, policy: Policy, lengths: list[int], seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score that a cache without eviction holds after steps of those lengths; exact attention; its error."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    q, k, v = (rng.standard_normal((2, heads, n, 3)) for heads in (6, 2, 2))
    cache = LayerCache(n + 1, policy=policy, sinks=0, window=0)
    done = 0
    for length in lengths:
        cache.step(*(backend.asarray(x[..., done : done + length, :]) for x in (q, k, v)))
        done += length
    weights = oracle.causal_weights(q, k).reshape(2, 2, 3, n, n)
    error = attention_error(q, k, v, np.zeros(1), unit())
    # A weight errs like an output whose values are bounded by 1; up to n queries are added up.
    size = np.linalg.norm(v, axis=-1).max(axis=-1).min()
    return backend.numpy(cache.attention), weights, n * (error.out.max() / size + (n + FUNCTION) * unit())


@pytest.mark.parametrize(
    "lengths", [[20], [9, 1, 1, 5], *(pytest.param(x, marks=many_shapes) for x in ([1] * 8, [530]))]
)
def test_h2o_of_all_queries_equals_column_sums_of_the_attention_matrix(backend: Library, lengths: list[int]):
    """530 queries make several blocks on every backend."""
    score, weights, error = observed(backend, H2O(observes=None), lengths)
    assert_within(score, weights.mean(axis=2).sum(axis=-2), error)


@pytest.mark.parametrize("name", ["h2o", "snapkv", "momentkv"])
@pytest.mark.parametrize("length", [3, 4, 15])
def test_prefill_is_observed_by_its_last_queries(backend: Library, name: str, length: int):
    score, weights, error = observed(backend, POLICIES[name](observes=4), [length])
    assert_within(score, weights.mean(axis=2)[..., -4:, :].sum(axis=-2), error)


@pytest.mark.parametrize("name", ["snapkv", "momentkv"])
def test_a_whole_observation_window_replaces_what_came_before(backend: Library, name: str):
    score, weights, error = observed(backend, POLICIES[name](observes=4), [9, 1, 6, 3, 1])
    # Of the step of 6 the last 4, then those of 3 and 1.
    assert_within(score, weights.mean(axis=2)[..., -8:, :].sum(axis=-2), error)


def test_h2o_adds_up_every_observation(backend: Library):
    score, weights, error = observed(backend, H2O(observes=4), [9, 1, 6, 3, 1])
    queries = [5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 18, 19]
    assert_within(score, weights.mean(axis=2)[..., queries, :].sum(axis=-2), error)


@pytest.mark.parametrize("lengths", [[12], [12, 1], [5, 4]])
def test_tova_scores_by_the_last_query_over_all_heads(backend: Library, lengths: list[int]):
    score, weights, error = observed(backend, TOVA(), lengths)
    exact = weights[..., -1, :].mean(axis=(1, 2))
    assert_within(score, np.broadcast_to(exact[:, None], score.shape), error)


@many_shapes
def test_tova_retains_the_same_tokens_in_all_heads(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((2, heads, 30, 4))) for heads in (6, 3, 3))
    cache = LayerCache(9, policy="tova", window=2, block=2)
    for part in (slice(0, 20), *(slice(t, t + 1) for t in range(20, 30))):
        cache.step(*(x[:, :, part, :] for x in (q, k, v)))
        positions = backend.numpy(cache.positions)
        assert (positions == positions[:, :1]).all()


def test_policies_are_found_by_name():
    for name, policy in POLICIES.items():
        assert get_policy(name) == policy()
        assert policy().name == name
    own = SnapKV(kernel=7)
    assert get_policy(own) is own


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_lies_in_an_empty_slot_is_not_looked_at(backend: Library, name: str):
    rng = np.random.default_rng(0)
    k, v, score = rng.normal(size=(1, 2, 12, 4)), rng.normal(size=(1, 2, 12, 4)), rng.random((1, 2, 12))
    positions = np.broadcast_to(np.arange(-1, 11, dtype=np.int32), (1, 2, 12))
    found = []
    for x in (0.0, 1e3, np.nan, np.inf):
        k[..., 0, :] = v[..., 0, :] = x
        arrays = [backend.asarray(y) for y in (k, v, np.ascontiguousarray(positions), score)]
        moments = Moments.empty(*arrays[:2])
        about = [backend.asarray(y) for y in (np.zeros((1, 2, 4)), np.ones((1, 2, 4)))]
        found.append(backend.numpy(get_policy(name).importance(Tokens(*arrays, moments, SCALE, *about)))[..., 1:])
    for x in found[1:]:
        np.testing.assert_array_equal(x, found[0])
