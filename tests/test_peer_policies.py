"""Policies of other papers, each against its formula in plain float64 loops, and laws that they share."""

from __future__ import annotations

import dataclasses

import numpy as np
import peer_formulas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import LayerCache, Moments, Policy, Tokens
from momentkv.policies import CAOTE, CriticalKV, ExpectedAttention, LagKV, Leverage, Novelty
from momentkv.testing.rounding import assert_same, assert_within, unit
from momentkv.testing.strategies import Case, cases, shape

NUMPY = LIBRARIES["numpy"]
PEERS = [
    CAOTE(),
    CAOTE(fast=True),
    CriticalKV(kernel=1),
    LagKV(lag=4),
    Leverage(),
    Leverage(values=True),
    ExpectedAttention(),
]
# What a policy is shown of a head as a whole.
OF_HEAD = ("query_mean", "query_variance")
REFUSED = [
    (CAOTE, {"observes": 0}, "observes is 0; use a window of at least 1"),
    (CAOTE, {"observes": None}, "observes is None; use"),
    (CriticalKV, {"observes": 0}, "observes is 0; use"),
    (CriticalKV, {"first": 1.5}, "first is 1.5; use a share"),
    (CriticalKV, {"first": -0.1}, "first is -0.1; use"),
    (CriticalKV, {"epsilon": -1.0}, "epsilon is -1.0; use"),
    (CriticalKV, {"epsilon": float("nan")}, "epsilon is nan; use"),
    (CriticalKV, {"kernel": 4}, "kernel is 4; use an odd"),
    (LagKV, {"lag": 1}, "lag is 1; use runs of at least 2"),
]
few_or_many = st.one_of(st.integers(1, 12), st.integers(13, 40))


def numbers_of(case: Case) -> dict[str, np.ndarray]:
    """What a policy is shown; about a fifth of the slots are empty, and hold NaN."""
    k, v = case.tokens()
    rng = case.rng(30)
    empty = rng.random((*case.lead, case.n)) < 0.2
    positions = np.where(empty, -1, np.cumsum(rng.integers(1, 4, empty.shape), axis=-1)).astype(np.int32)
    score = case.rounded(case.rng(31).random(empty.shape) ** 4)
    k[empty], v[empty], score[empty] = np.nan, np.nan, 0.0
    mean = case.rounded(case.rng(32).standard_normal((*case.lead, case.d)))
    variance = case.rounded(case.rng(33).random((*case.lead, case.d)))
    shown = {"keys": k, "values": v, "positions": positions, "attention": score}
    return shown | {"query_mean": mean, "query_variance": variance}


def importance(backend: Library, policy: Policy, numbers: dict[str, np.ndarray], scale: float = 0.6) -> np.ndarray:
    arrays = {name: backend.asarray(x) for name, x in numbers.items()}
    moments = Moments.empty(arrays["keys"], arrays["values"])
    return backend.numpy(policy.importance(Tokens(**arrays, moments=moments, scale=scale)))


def heads(numbers: dict[str, np.ndarray]) -> list[tuple[tuple, np.ndarray, dict]]:
    """Index, real slots and real tokens of each head that has some."""
    positions = numbers["positions"]
    found = []
    for head in np.ndindex(positions.shape[:-1]):
        real = positions[head] >= 0
        if real.any():
            own = {name: x[head] if name in OF_HEAD else x[head][real] for name, x in numbers.items()}
            found.append((head, real, own))
    return found


def apart(x: np.ndarray, error: np.ndarray | float) -> bool:
    """Whether no two numbers are so near that rounding could exchange them."""
    order = np.argsort(x)
    gaps = np.diff(x[order])
    error = np.broadcast_to(error, x.shape)[order]
    return bool((gaps > error[1:] + error[:-1]).all())


@pytest.mark.parametrize("fast", [False, True])
@given(case=cases(n=few_or_many))
def test_caote_is_the_distance_that_the_output_moves(backend: Library, case: Case, fast: bool):
    numbers, u = numbers_of(case), unit(case.dtype)
    got = importance(backend, CAOTE(fast=fast), numbers)
    for head, real, own in heads(numbers):
        exact = peer_formulas.caote(own["attention"], own["values"], fast)
        score, values = own["attention"].astype(float), own["values"].astype(float)
        a = score / (score.sum() or 1.0)
        rest = a.sum() - a if len(a) > 1 else 1 + 0 * a
        # Sums of n terms, then some ten operations on each component; the fast one is divided by what others have.
        size = 3 * np.abs(values).max() * np.sqrt(case.dv)
        error = u * (4 * case.n + case.dv + 20) * a * size / (np.maximum(rest, 2.0**-52) if fast else 1.0)
        error = error + (2.0**-52 * 4 * case.n * size * a / np.maximum(rest, 2.0**-52))  # of the plain formula
        some = rest > 1e-3
        assert_within(got[head][real][some], exact[some], error[some])


def test_caote_is_what_eviction_does_to_the_output():
    """Attention of one query: the output with and without each token."""
    rng = np.random.default_rng(0)
    powers, values = np.exp(2 * rng.standard_normal(9)), rng.standard_normal((9, 4))
    numbers = {"keys": values[None], "values": values[None], "positions": np.arange(9)[None], "attention": powers[None]}
    whole = powers @ values / powers.sum()
    moved = [
        np.linalg.norm(whole - np.delete(powers, j) @ np.delete(values, j, 0) / np.delete(powers, j).sum())
        for j in range(9)
    ]
    np.testing.assert_allclose(importance(NUMPY, CAOTE(), numbers)[0], moved, rtol=1e-12)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("other", [0.0, 1e-30])
def test_caote_keeps_a_token_with_all_attention(backend: Library, fast: bool, other: float):
    values = np.array([[[1.0], [2.0], [6.0]]], dtype=np.float32)
    score = np.array([[other, 1.0, other]], dtype=np.float32)
    numbers = {"keys": values, "values": values, "positions": np.arange(3)[None], "attention": score}
    got = importance(backend, CAOTE(fast=fast), numbers)
    assert np.isfinite(got).all()
    assert got[0].argmax() == 1
    assert (got[0, [0, 2]] <= 1e-20).all()


@given(case=cases(n=few_or_many), kernel=st.sampled_from([1, 5]), first=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_criticalkv_takes_two_rankings_in_turn(backend: Library, case: Case, kernel: int, first: float):
    numbers, u = numbers_of(case), unit(case.dtype)
    policy = CriticalKV(first=first, kernel=kernel)
    got = importance(backend, policy, numbers)
    for head, real, own in heads(numbers):
        arguments = own["attention"], own["positions"], own["values"]
        attention, both = (peer_formulas.criticalkv(*arguments, first=x, kernel=kernel) for x in (1, 0))
        errors = [u * (case.n + kernel + case.dv + 8) * 2 * np.abs(x) for x in (attention, both)]
        if first in (0.0, 1.0):
            assert_within(got[head][real], *((attention, errors[0]) if first else (both, errors[1])))
        elif apart(attention, errors[0]) and apart(both, errors[1]):
            exact = peer_formulas.criticalkv(*arguments, first=first, kernel=kernel)
            assert_within(got[head][real], exact, 4 * u * np.abs(exact))


@pytest.mark.parametrize(("first", "budget"), [(0.5, 10), (0.25, 8), (0.75, 20)])
def test_criticalkv_keeps_the_share_of_each_stage(first: float, budget: int):
    rng = np.random.default_rng(1)
    values = rng.standard_normal((1, 40, 6))
    numbers = {"keys": values, "values": values, "positions": np.arange(40)[None], "attention": rng.random((1, 40))}
    mixed, attention, both = (
        np.argsort(-importance(NUMPY, CriticalKV(first=x, kernel=1), numbers)[0]) for x in (first, 1.0, 0.0)
    )
    kept = set(mixed[:budget])
    assert set(attention[: int(first * budget)]) <= kept
    assert set(both[: int((1 - first) * budget)]) <= kept


def test_criticalkv_does_not_depend_on_how_many_queries_were_observed():
    numbers = numbers_of(Case((2,), 2, 1, 1, 30, 4, 4, "gaussian", "none", "float64", 3))
    more = {**numbers, "attention": 8 * numbers["attention"]}
    for first in (0.0, 0.5, 1.0):
        policy = CriticalKV(first=first)
        real = numbers["positions"] >= 0
        assert_same(importance(NUMPY, policy, more)[real], importance(NUMPY, policy, numbers)[real])


@given(case=cases(n=few_or_many), lag=shape(st.sampled_from([2, 3, 8, 32]), 3))
def test_lagkv_compares_with_the_run_that_follows(backend: Library, case: Case, lag: int):
    case = dataclasses.replace(case, dtype="float64")
    numbers = numbers_of(case)
    got = importance(backend, LagKV(lag=lag), numbers)
    for head, real, own in heads(numbers):
        exact, rounded = (peer_formulas.lagkv(own["keys"], own["values"] * (1 + x), lag) for x in (0.0, 2.0**-40))
        if case.law in ("ties", "heavy") or (exact != rounded).any():
            # Equal scores, or softmax of next to nothing: which goes first is left to rounding.
            places, known = np.sort(got[head][real]), np.sort(exact)
        else:
            places, known = got[head][real], exact
        # A quotient may be a product with a reciprocal: two roundings. Places are far more apart.
        assert_within(places, known, 2 * unit() * np.abs(known))


def test_lagkv_serves_all_runs_alike():
    numbers = numbers_of(Case((), 1, 1, 1, 40, 4, 3, "gaussian", "none", "float64", 0))
    numbers["positions"] = np.arange(40, dtype=np.int32)[None]
    rng = np.random.default_rng(0)
    numbers["keys"], numbers["values"] = rng.standard_normal((2, 1, 40, 4))
    order = np.argsort(-importance(NUMPY, LagKV(lag=8), numbers)[0], kind="stable")
    assert order[:8].tolist() == list(range(39, 31, -1))  # the last run, latest first
    for kept in (8 + 4, 8 + 8, 8 + 20):
        assert np.bincount(order[8:kept] // 8, minlength=4).tolist() == [(kept - 8) // 4] * 4


def test_lagkv_keeps_an_outlier():
    rng = np.random.default_rng(1)
    k, v = rng.standard_normal((2, 1, 100, 8))
    k[0, 41], v[0, 41] = 9 * rng.standard_normal((2, 8))
    cache = LayerCache(24, policy=LagKV(lag=8), window=8, block=1)
    cache.step(rng.standard_normal((1, 100, 8)), k, v)
    assert 41 in cache.positions[0]


@given(case=cases(n=few_or_many), by_values=st.booleans(), centred=st.booleans())
def test_leverage_is_a_quadratic_form_of_the_inverse_gram_matrix(
    backend: Library, case: Case, by_values: bool, centred: bool
):
    numbers, u = numbers_of(case), unit(case.dtype)
    got = importance(backend, Leverage(values=by_values, centred=centred), numbers)
    for head, real, own in heads(numbers):
        exact = peer_formulas.leverage(own["keys"], own["values"], by_values, centred)
        # With its ridge the matrix has a condition below 1000 d + 1, and leverage is at most 1. Less a mean far from
        # zero, vectors have lost digits: as many as the mean is larger than what is left.
        lost = 1.0
        if centred:
            for x in (own["keys"].astype(float), own["values"].astype(float)):
                left = np.abs(x - x.mean(axis=0)).max()
                if left < 1e-9 * np.abs(x).max():
                    lost = np.inf  # equal tokens: nothing but rounding is left
                elif left > 0:
                    lost = max(lost, np.abs(x).max() / left)
        error = 4 * u * (1000 * max(case.d, case.dv) + 1) * (case.n + 4 * max(case.d, case.dv) + 8) * lost
        assert_within(got[head][real], exact, error)


def test_leverages_add_up_to_the_dimension():
    rng = np.random.default_rng(0)
    k = rng.standard_normal((1, 500, 4))
    numbers = {"keys": k, "values": k, "positions": np.arange(500)[None], "attention": np.zeros((1, 500))}
    got = importance(NUMPY, Leverage(), numbers)
    assert ((got > 0) & (got <= 1)).all()
    # trace(G (G + ridge)^-1) is d less the ridge's share, at most 0.1 % each here.
    assert got.sum() == pytest.approx(4, rel=2e-3)


def test_leverage_with_values_and_centred_ranks_as_novelty():
    numbers = numbers_of(Case((2,), 2, 1, 1, 30, 4, 4, "gaussian", "none", "float64", 5))
    got, novel = (importance(NUMPY, x, numbers) for x in (Leverage(values=True, centred=True), Novelty()))
    for head, real, _ in heads(numbers):
        assert_same(np.argsort(got[head][real]), np.argsort(novel[head][real]))


def test_a_key_that_repeats_others_has_little_leverage():
    k = np.repeat(np.eye(4)[None], 10, axis=1)[:, :-9]  # ten of each direction, but one of the last
    numbers = {"keys": k, "values": k, "positions": np.arange(31)[None], "attention": np.zeros((1, 31))}
    got = importance(NUMPY, Leverage(), numbers)[0]
    assert got[-1] > 0.98
    assert (got[:-1] < 0.11).all()


@given(case=cases(n=few_or_many), by_values=st.booleans())
def test_expected_attention_is_the_mean_of_the_exponential(backend: Library, case: Case, by_values: bool):
    numbers, u = numbers_of(case), unit(case.dtype)
    got = importance(backend, ExpectedAttention(values=by_values), numbers)
    for head, real, own in heads(numbers):
        k, v, mean, variance = (own[x].astype(float) for x in ("keys", "values", "query_mean", "query_variance"))
        exact = peer_formulas.expected_attention(k, v, mean, variance, by_values)
        # A logarithm and its argument, two sums of d products, and their own sum.
        terms = np.abs(k) @ np.abs(mean) + (k * k) @ variance
        finite = np.where(np.isfinite(exact), np.abs(exact), 0.0)
        error = u * ((case.d + 8) * terms + case.dv + 8 + 8 * (finite + terms))
        assert_within(got[head][real], exact, error)


def test_expected_attention_is_that_of_gaussian_queries():
    """A million of them."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 5, 3))
    mean, sd = rng.standard_normal((1, 3)), rng.random((1, 3))
    q = mean + sd * rng.standard_normal((1_000_000, 3))
    sampled = np.exp(q @ k[0].T).mean(axis=0) * np.linalg.norm(v[0], axis=-1)
    numbers = {"keys": k, "values": v, "positions": np.arange(5)[None], "attention": np.zeros((1, 5))}
    numbers |= {"query_mean": mean, "query_variance": sd**2}
    # The relative sd of an exponential with variance s is sqrt(exp(s) - 1), at most 20 here, over a thousand.
    np.testing.assert_allclose(np.exp(importance(NUMPY, ExpectedAttention(), numbers)[0]), sampled, rtol=0.06)


@pytest.mark.parametrize("order", [None, 0, 1])
def test_expected_attention_is_of_the_last_queries_of_a_prefill(backend: Library, order: int | None):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, 50, 4)) for heads in (6, 2, 2))
    cache = LayerCache(60, policy=ExpectedAttention(), order=order)
    cache.step(*(backend.asarray(x) for x in (q, k, v)))
    got = backend.numpy(cache.importance())
    recent = 0.5 * q[:, :, -32:].reshape(2, 2, 3 * 32, 4)
    for head in np.ndindex(2, 2):
        arguments = k[head], v[head], recent[head].mean(axis=0), recent[head].var(axis=0)
        np.testing.assert_allclose(got[head], peer_formulas.expected_attention(*arguments), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("length", [40, 300])
def test_after_a_prefill_expected_attention_is_that_of_each_head_of_the_group(backend: Library, length: int):
    """Of the last 256 queries, as far as there are so many, with their whole covariance."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, length, 4)) for heads in (6, 2, 2))
    cache = LayerCache(64, policy=ExpectedAttention(), block=1000)
    cache.append(*(backend.asarray(x) for x in (k, v)))
    cache.attend(backend.asarray(q))
    got = backend.numpy(cache.importance())
    recent = 0.5 * q[:, :, -256:].reshape(2, 2, 3, -1, 4)
    for head in np.ndindex(2, 2):
        exact = peer_formulas.expected_attention_of_heads(k[head], v[head], recent[head])
        np.testing.assert_allclose(got[head], exact, rtol=1e-10, atol=1e-12)


def test_queries_of_padding_are_not_expected():
    """A row's importances are those it has by itself, whatever its padding holds."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, 90, 4)) for heads in (4, 2, 2))
    alone, padded = (LayerCache(64, policy=ExpectedAttention(), block=1000) for _ in range(2))
    alone.append(k, v)
    alone.attend(q)
    wide = [np.concatenate([np.full((1, x.shape[1], 30, 4), 7.0), x], axis=2) for x in (q, k, v)]
    valid = np.broadcast_to(np.arange(120) >= 30, (1, 2, 120))
    padded.append(*wide[1:])
    padded.attend(wide[0], valid=valid)
    np.testing.assert_allclose(padded.importance()[..., 30:], alone.importance(), rtol=1e-12, atol=1e-12)


def test_expected_attention_needs_queries():
    x = np.ones((1, 3, 2))
    tokens = Tokens(x, x, np.arange(3)[None], x[..., 0], Moments.empty(x, x), 1.0)
    with pytest.raises(ValueError, match=r"query_mean or query_variance of the tokens is None.*pass both"):
        ExpectedAttention().importance(tokens)


@pytest.mark.parametrize("policy", [ExpectedAttention(), "knorm"])
@pytest.mark.parametrize("order", [None, 1])
def test_queries_are_remembered_only_where_they_are_needed(policy: str | Policy, order: int | None):
    cache = LayerCache(20, policy=policy, order=order, window=4)
    cache.step(*np.random.default_rng(0).standard_normal((3, 1, 2, 30, 4)))
    held = {"query_mean", "query_square"} & cache.arrays().keys()
    assert len(held) == 2 * cache.config.remembers_queries == 2 * (policy != "knorm")


# Laws of all of them.


@pytest.mark.many_shapes
@pytest.mark.parametrize("policy", PEERS, ids=repr)
@given(case=cases(n=few_or_many, laws=("gaussian",), dtypes=("float64",)))
def test_padding_equals_removal(backend: Library, policy: Policy, case: Case):
    numbers = numbers_of(case)
    got = importance(backend, policy, numbers)
    assert got.shape == numbers["positions"].shape
    assert not np.isnan(got).any()
    for head, real, own in heads(numbers):
        alone = importance(backend, policy, {name: x[None] for name, x in own.items()})[0]
        # Sums over more slots round otherwise, which a matrix of condition up to some thousands makes larger.
        np.testing.assert_allclose(got[head][real], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("policy", [x for x in PEERS if x.name != "lagkv"], ids=repr)
def test_order_of_tokens_changes_nothing(backend: Library, policy: Policy):
    """Where neither runs nor neighbours are looked at (`CriticalKV` with a kernel of 1)."""
    numbers = numbers_of(Case((2,), 3, 1, 1, 20, 5, 4, "gaussian", "none", "float64", 9))
    order = np.random.default_rng(0).permutation(20)
    moved = {name: x if name in OF_HEAD else x[:, :, order] for name, x in numbers.items()}
    real = moved["positions"] >= 0
    got, expected = importance(backend, policy, moved), importance(backend, policy, numbers)[:, :, order]
    np.testing.assert_allclose(got[real], expected[real], rtol=1e-10)


@pytest.mark.parametrize("policy", PEERS, ids=repr)
def test_one_token_is_finite(backend: Library, policy: Policy):
    x = np.ones((2, 1, 3))
    numbers = {"keys": x, "values": x, "positions": np.zeros((2, 1), dtype=np.int32), "attention": x[..., 0]}
    numbers |= {name: np.ones((2, 3)) for name in OF_HEAD}
    assert np.isfinite(importance(backend, policy, numbers)).all()


@pytest.mark.many_shapes
@pytest.mark.parametrize("policy", PEERS, ids=repr)
@pytest.mark.parametrize("correction", ["moments", "summaries"])
def test_usable_with_any_correction(backend: Library, policy: Policy, correction: str):
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((2, heads, 70, 6)).astype(np.float32)) for heads in (4, 2, 2))
    cache = LayerCache(20, policy=policy, correction=correction, window=4, block=4)
    for part in (slice(0, 60), *(slice(t, t + 1) for t in range(60, 70))):
        out = backend.numpy(cache.step(*(x[..., part, :] for x in (q, k, v))))
        assert np.isfinite(out).all()
    assert cache.stored < 24


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_wrong_parameters_are_refused(kind: type[Policy], options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        kind(**options)
