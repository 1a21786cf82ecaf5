"""A second reading of arrays: outputs and scores against plain NumPy, on every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, Library

from momentkv import LayerCache, Moments, Tokens
from momentkv.cache.rereading import reread, take_scores
from momentkv.policies import ExpectedAttention, SecondReading, Twice
from momentkv.policies.twice import largest_changes

HEADS, GROUP, N, M, D, DV = 2, 2, 30, 300, 4, 3


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def case(seed: int, stored: int = N, again: int = M, huge: bool = False) -> list[np.ndarray]:
    """Keys and values that are stored; queries, keys and values of a second reading, longer than a block of queries."""
    rng = np.random.default_rng(seed)
    scale = 1e3 if huge else 1.0
    shapes = [(HEADS, stored, D), (HEADS, stored, DV), (HEADS * GROUP, again, D), (HEADS, again, D), (HEADS, again, DV)]
    return [scale * rng.standard_normal((1, *shape)) for shape in shapes]


def filled(
    backend: Library, k: np.ndarray, v: np.ndarray, valid: np.ndarray | None = None, **options: Any
) -> LayerCache:
    """A cache that holds these tokens and has evicted none."""
    settings = {"budget": 6, "policy": "second-reading", "window": 2, "block": 1, "correction": "moments"}
    cache = LayerCache(**(settings | options))
    cache.recording = True
    cache.append(backend.asarray(k), backend.asarray(v))
    q = backend.asarray(np.zeros((k.shape[0], HEADS * GROUP, *k.shape[-2:])))
    cache.attend(q, valid=None if valid is None else backend.asarray(valid))
    cache.recording = False
    return cache


def oracle(
    k: Any, v: Any, q: Any, k2: Any, v2: Any, seen: Any = None, real: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention of each query over what is stored and the tokens up to its own, as one matrix."""
    n, m = k.shape[-2], k2.shape[-2]
    seen = np.ones(n, dtype=bool) if seen is None else seen
    real = np.ones(m, dtype=bool) if real is None else real
    causal = np.tril(np.ones((m, m), dtype=bool)) & real
    mask = np.concatenate([np.broadcast_to(seen, (m, n)), causal], axis=1)
    outs, scores = [], np.zeros((HEADS, n))
    for head in range(HEADS * GROUP):
        own = head // GROUP
        keys, values = (np.concatenate([x[0, own], y[0, own]]) for x, y in ((k, k2), (v, v2)))
        weights = softmax(np.where(mask, q[0, head] @ keys.T / np.sqrt(D), -np.inf))
        outs.append(weights @ values)
        scores[own] = np.maximum(scores[own], weights[real][:, :n].max(0))
    return np.stack(outs), scores


def rounding(q: np.ndarray, k: np.ndarray, k2: np.ndarray) -> float:
    """Relative error of a weight: that of its logit and of the log of their sum, and of adding so many up."""
    largest = max(np.abs(q[0, head] @ x[0, head // GROUP].T).max() for head in range(HEADS * GROUP) for x in (k, k2))
    return float(np.finfo(float).eps) * (3 * (D + 4) * (1 + largest / np.sqrt(D)) + 2 * (N + M))


@pytest.mark.parametrize("huge", [False, True])
def test_scores_are_the_largest_weights_and_outputs_those_of_one_softmax(backend: Library, huge: bool):
    k, v, q, k2, v2 = case(0, huge=huge)
    cache = filled(backend, k, v)
    before = cache.view()
    out, scores = reread(cache, *map(backend.asarray, (q, k2, v2)))
    outs, largest = oracle(k, v, q, k2, v2)
    error = rounding(q, k, k2)
    np.testing.assert_allclose(backend.numpy(out)[0], outs, rtol=0, atol=2 * error * np.abs(outs).max())
    np.testing.assert_allclose(backend.numpy(scores)[0], largest, rtol=0, atol=error)
    # Nothing was added and nothing changed.
    assert all(x is y for x, y in zip(before[:3], cache.view()[:3], strict=True))
    assert cache.seen == N


@pytest.mark.parametrize("place", [3, 255, 256, 290])
def test_a_query_of_any_block_may_be_the_one_that_looks(backend: Library, place: int):
    """Queries before others see fewer of their own tokens, so that in random ones the first block has all maxima."""
    k, v, q, k2, v2 = case(4)
    q[0, :, place] = 20 * np.repeat(k[0, :, 7], GROUP, axis=0)
    k[0, :, 7] = 4 * k[0, :, 7] / np.linalg.norm(k[0, :, 7], axis=-1, keepdims=True)
    outs, largest = oracle(k, v, q, k2, v2)
    without = oracle(k, v, *(np.delete(x, place, axis=2) for x in (q, k2, v2)))[1]
    assert (without < largest - 0.1).any(axis=1).all()
    out, scores = reread(filled(backend, k, v), *map(backend.asarray, (q, k2, v2)))
    error = rounding(q, k, k2)
    np.testing.assert_allclose(backend.numpy(out)[0], outs, rtol=0, atol=2 * error * np.abs(outs).max())
    np.testing.assert_allclose(backend.numpy(scores)[0], largest, rtol=0, atol=error)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e200])
def test_padding_is_not_seen_and_its_queries_do_not_count(backend: Library, garbage: float):
    k, v, q, k2, v2 = case(1)
    seen, real = np.arange(N) >= 4, np.arange(M) % 7 > 0
    for x in (k, v):
        x[..., ~seen, :] = garbage
    for x in (k2, v2):
        x[..., ~real, :] = garbage
    cache = filled(backend, k, v, seen[None, None])
    out, scores = reread(cache, *map(backend.asarray, (q, k2, v2)), valid=backend.asarray(real[None, None]))
    k, v = (np.where(seen[:, None], x, 0) for x in (k, v))
    k2, v2 = (np.where(real[:, None], x, 0) for x in (k2, v2))
    outs, largest = oracle(k, v, q, k2, v2, seen, real)
    error = rounding(q, k, k2)
    assert not backend.numpy(scores)[..., ~seen].any()
    np.testing.assert_allclose(backend.numpy(scores)[0], largest, rtol=0, atol=error)
    np.testing.assert_allclose(
        backend.numpy(out)[0][:, real], outs[:, real], rtol=0, atol=2 * error * np.abs(outs).max()
    )


def test_nan_of_one_row_stays_in_it(backend: Library):
    rows = [np.concatenate(pair) for pair in zip(case(2), case(3), strict=True)]
    rows[0][0, 0, 5] = np.nan
    k, v, q, k2, v2 = rows
    both, alone = filled(backend, k, v), filled(backend, k[1:], v[1:])
    _, scores = reread(both, *map(backend.asarray, (q, k2, v2)))
    _, one = reread(alone, *map(backend.asarray, (q[1:], k2[1:], v2[1:])))
    error = rounding(q[1:], k[1:], k2[1:])
    np.testing.assert_allclose(backend.numpy(scores)[1], backend.numpy(one)[0], rtol=0, atol=error)
    assert np.isnan(backend.numpy(scores)[0, 0]).any()


def test_what_was_evicted_has_its_part_in_the_weights(backend: Library):
    """Of one token evicted, moments of order 0 know the mass exactly: scores are those of attention over all."""
    k, v, q, k2, v2 = case(4)
    cache = filled(backend, k, v, budget=N - 1, order=0)
    importance = np.ones((1, HEADS, N))
    importance[..., 7] = 0
    cache.evict(backend.asarray(importance))
    assert cache.has_evicted
    out, scores = reread(cache, *map(backend.asarray, (q, k2, v2)))
    outs, largest = oracle(k, v, q, k2, v2)
    error = rounding(q, k, k2)
    np.testing.assert_allclose(backend.numpy(out)[0], outs, rtol=0, atol=4 * error * np.abs(outs).max())
    np.testing.assert_allclose(backend.numpy(scores)[0], np.delete(largest, 7, axis=1), rtol=0, atol=2 * error)


def test_the_tokens_with_the_best_scores_stay_and_keep_them(backend: Library):
    k, v, q, k2, v2 = case(5)
    cache = filled(backend, k, v)
    _, scores = reread(cache, *map(backend.asarray, (q, k2, v2)))
    take_scores(cache, scores)
    cache.evict()
    scores, positions = backend.numpy(scores)[0], backend.numpy(cache.positions)[0]
    for head in range(HEADS):
        best = 1 + np.argsort(-scores[head, 1 : N - 2])[:3]
        assert positions[head].tolist() == sorted([0, *best.tolist(), N - 2, N - 1])
        np.testing.assert_array_equal(backend.numpy(cache.attention)[0, head], scores[head, positions[head]])
    # Scores survive what comes after; a query that looks at a token more raises its score, and none lowers it.
    step = [
        backend.asarray(np.random.default_rng(6).standard_normal((1, n, 1, d))) for n, d in ((4, D), (2, D), (2, DV))
    ]
    held = backend.numpy(cache.attention)
    cache.append(*step[1:])
    cache.attend(step[0])
    assert (backend.numpy(cache.attention)[..., : held.shape[-1]] >= held).all()
    # Now with tokens in every tier, all of them given other scores.
    given = np.random.default_rng(7).random(backend.numpy(cache.attention).shape)
    take_scores(cache, backend.asarray(given))
    np.testing.assert_array_equal(backend.numpy(cache.attention), given)


def test_scores_need_a_policy_that_looks_at_them_and_one_for_each_token():
    k, v, *_ = case(8)
    numpy = LIBRARIES["numpy"]
    with pytest.raises(ValueError, match="policy is 'knorm', which looks at no scores"):
        take_scores(filled(numpy, k, v, policy="knorm"), np.zeros((1, HEADS, N)))
    with pytest.raises(
        ValueError, match=r"scores has shape \(1, 2, 29\); the cache holds tokens of shape \(1, 2, 30\)"
    ):
        take_scores(filled(numpy, k, v), np.zeros((1, HEADS, N - 1)))
    with pytest.raises(ValueError, match="the cache is empty"):
        reread(LayerCache(60), np.zeros((1, 2, 1, 4)), np.zeros((1, 1, 1, 4)), np.zeros((1, 1, 1, 4)))


def tokens(seed: int) -> Tokens:
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, 2, N, D))
    mean, variance = rng.standard_normal((2, D)), rng.random((2, D))
    positions = np.broadcast_to(np.arange(N, dtype=np.int32), (2, N))
    return Tokens(k, v, positions, rng.random((2, N)), Moments.empty(k, v), 0.5, mean, variance)


@pytest.mark.parametrize(("share", "budget"), [(0.0, 9), (0.25, 8), (0.5, 10), (0.75, 20), (1.0, 9)])
def test_each_ranking_has_its_share_at_every_budget(share: float, budget: int):
    shown = tokens(9)
    mixed, again, expected = (
        np.argsort(-policy.importance(shown), kind="stable")
        for policy in (Twice(share=share), Twice(share=1.0), ExpectedAttention())
    )
    for head in range(2):
        first = set(again[head, : round(share * budget)]) | set(expected[head, : round((1 - share) * budget)])
        assert first <= set(mixed[head, :budget])


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_one(share: float):
    with pytest.raises(ValueError, match="use a share of the budget from 0 to 1"):
        Twice(share=share)


def test_attention_is_observed_as_the_largest_weight(backend: Library):
    rng = np.random.default_rng(10)
    weights, received = rng.random((1, HEADS, GROUP, 5, N)), rng.random((1, HEADS, N))
    found = SecondReading().observe(backend.asarray(received), backend.asarray(weights))
    np.testing.assert_array_equal(backend.numpy(found), np.maximum(received, weights.max((2, 3))))


def test_what_an_output_may_lose_is_the_score_times_how_far_the_value_stands_out(backend: Library):
    rng = np.random.default_rng(11)
    scores, values, real = rng.random((2, N)), rng.standard_normal((2, N, DV)), rng.random((2, N)) < 0.7
    values[~real] = np.nan
    found = backend.numpy(largest_changes(*map(backend.asarray, (scores, values, real))))
    for head in range(2):
        own = values[head, real[head]]
        expected = (
            scores[head, real[head]] * np.linalg.norm(own - own.mean(0), axis=1) / np.linalg.norm(own, axis=1).mean()
        )
        np.testing.assert_allclose(found[head, real[head]], expected, rtol=1e-12)
        assert not found[head, ~real[head]].any()


def test_tokens_in_few_bits_are_read_as_they_are_decoded(backend: Library):
    """Segments read again what an earlier one has retained; of codes, that is what attention makes of them."""
    k, v, q, k2, v2 = case(12)
    cache = filled(backend, k, v, budget=20, correction="none", bits=4)
    cache.evict(backend.asarray(np.random.default_rng(13).random((1, HEADS, N))))
    assert cache.has_evicted
    view = cache.view()
    assert (backend.numpy(view.positions) >= 0).all()
    out, scores = reread(cache, *map(backend.asarray, (q, k2, v2)))
    keys, values = backend.numpy(view.keys), backend.numpy(view.values)
    outs, largest = oracle(keys, values, q, k2, v2)
    error = rounding(q, keys, k2)
    np.testing.assert_allclose(backend.numpy(out)[0], outs, rtol=0, atol=2 * error * np.abs(outs).max())
    np.testing.assert_allclose(backend.numpy(scores)[0], largest, rtol=0, atol=error)
