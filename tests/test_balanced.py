"""Attention, novelty, and expected attention and novelty in turn, against their formulas in plain NumPy."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from momentkv import LayerCache, Moments, Policy, Tokens
from momentkv.policies import Attention, Balanced, ExpectedAttention, Novelty
from momentkv.policies.novelty import RIDGE, from_mean, mahalanobis

N, D = 40, 6


def tokens(seed: int, empty: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, 2, N, D)) * np.array([1.0, 3.0])[:, None, None, None]
    positions = np.broadcast_to(np.arange(N, dtype=np.int32), (2, N)).copy()
    positions[:, :empty] = -1
    k[:, :empty], v[:, :empty] = np.nan, np.nan
    mean, variance = rng.standard_normal((2, D)), rng.random((2, D))
    return Tokens(k, v, positions, rng.random((2, N)), Moments.empty(k, v), 0.5, mean, variance)


def distance(x: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance from the mean, by NumPy's own covariance."""
    off = x - x.mean(0)
    covariance = np.cov(x.T, bias=True)
    covariance = covariance + 1e-3 * np.trace(covariance) / x.shape[1] * np.eye(x.shape[1])
    return np.array([row @ np.linalg.solve(covariance, row) for row in off])


@pytest.mark.parametrize("empty", [0, 3])
def test_halves_are_those_of_their_formulas(empty: int):
    shown = tokens(0, empty)
    attention, novelty = (policy.importance(shown)[:, empty:] for policy in (Attention(), Novelty()))
    for share, half in ((0.0, ExpectedAttention()), (1.0, Novelty())):
        policy = Balanced(novelty=share, kernel=1)
        assert np.array_equal(policy.importance(shown)[:, empty:], half.importance(shown)[:, empty:])
    for head in range(2):
        k, v, score = (x[head, empty:] for x in (shown.keys, shown.values, shown.score))
        # Solutions with a covariance of condition up to some hundreds: a few hundred roundings.
        np.testing.assert_allclose(attention[head], score * np.linalg.norm(v - v.mean(0), axis=1), rtol=1e-12)
        np.testing.assert_allclose(novelty[head], distance(k) * distance(v), rtol=1e-10)


@pytest.mark.parametrize("half", [Attention, Novelty])
def test_halves_are_averaged_over_neighbouring_positions(half: type):
    shown, kernel = tokens(5, empty=2), 5
    plain, pooled = (half(kernel=width).importance(shown) for width in (1, kernel))
    for head in range(2):
        for j in range(2, N):
            near = [plain[head, i] for i in range(j - kernel // 2, j + kernel // 2 + 1) if 2 <= i < N]
            assert pooled[head, j] == pytest.approx(sum(near) / kernel, rel=1e-12), (head, j)


@pytest.mark.parametrize(("novelty", "budget"), [(0.25, 8), (0.5, 10), (0.75, 20)])
def test_shares_are_kept_at_every_budget(novelty: float, budget: int):
    shown = tokens(1)
    mixed, expected, novel = (np.argsort(-Balanced(novelty=x).importance(shown)) for x in (novelty, 0.0, 1.0))
    for head in range(2):
        kept = set(mixed[head, :budget])
        # What either ranking puts within its share is kept, whatever the other says.
        assert set(novel[head, : int(novelty * budget)]) <= kept
        assert set(expected[head, : int((1 - novelty) * budget)]) <= kept


def test_smaller_budgets_keep_part_of_what_larger_ones_keep():
    mixed = Balanced().importance(tokens(2))
    assert mixed.shape == (2, N)
    assert len({float(x) for x in mixed[0]}) >= N // 2  # a ranking, not a few classes


def test_equal_tokens_and_single_tokens_are_finite():
    equal = np.ones((1, 5, 3))
    for n in (1, 5):
        shown = Tokens(
            equal[:, :n],
            equal[:, :n],
            np.arange(n, dtype=np.int32)[None],
            np.ones((1, n)),
            Moments.empty(equal, equal),
            1,
            np.ones((1, 3)),
            np.ones((1, 3)),
        )
        for novelty in (0.0, 0.3, 1.0):
            assert np.isfinite(Balanced(novelty=novelty).importance(shown)).all()


def test_distances_add_up_to_the_dimension():
    x = np.random.default_rng(3).standard_normal((1, 500, 4))
    off = x - x.mean(1, keepdims=True)
    # trace(C (C + ridge)^-1) is d less the ridge's share, at most 0.1 % each here.
    assert mahalanobis(off, np.ones((1, 500), dtype=bool)).mean() == pytest.approx(4, rel=2e-3)


def test_an_outlier_that_nothing_attends_to_is_kept():
    rng = np.random.default_rng(4)
    k, v = rng.standard_normal((2, 1, 300, 8))
    k[0, 100], v[0, 100] = 6.0, 6.0
    q = rng.standard_normal((1, 300, 8))
    q[..., -280:, :] = -k[0, 100]  # recent queries look away from it
    kept = {}
    for policy in (Balanced(novelty=0.0), Balanced()):
        cache = LayerCache(40, policy=policy, window=8, block=1)
        cache.step(q, k, v)
        kept[policy.novelty] = 100 in cache.positions[0]
    assert kept == {0.0: False, 0.3: True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"novelty": 1.5}, "novelty is 1.5"),
        ({"kernel": 2}, "kernel is 2"),
    ],
)
def test_wrong_parameters_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Balanced(**options)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["a line", "a plane", "three tokens", "two points", "falling"])
@pytest.mark.parametrize("d", [8, 64, 256])
def test_distances_are_right_where_tokens_lie_in_few_directions(library: str, kind: str, d: int):
    """As in float64, but for the rounding of a covariance against its ridge. An explicit inverse gave some below 0."""
    rng, n = np.random.default_rng(0), 1500
    made = {
        "a line": lambda: rng.normal(size=(n, 1)) @ rng.normal(size=(1, d)),
        "a plane": lambda: rng.normal(size=(n, 2)) @ rng.normal(size=(2, d)),
        "three tokens": lambda: rng.normal(size=(n, d)) * (np.arange(n) < 3)[:, None],
        "two points": lambda: (rng.random((n, 1)) > 0.5) * rng.normal(size=(1, d)),
        "falling": lambda: rng.normal(size=(n, d)) * np.logspace(0, -6, d),
    }
    real = np.ones((1, n), dtype=bool)
    x = from_mean(made[kind]()[None].astype(np.float32), real)
    arrays = (x, real) if library == "numpy" else tuple(map(pytest.importorskip("torch").asarray, (x, real)))
    got, exact = np.asarray(mahalanobis(*arrays)), mahalanobis(x.astype(np.float64), real)
    assert (got >= 0).all()
    assert np.abs(got - exact).max() <= 8 * 2.0**-24 * d / RIDGE * exact.max()


@dataclasses.dataclass(frozen=True)
class Watching(Policy):
    """Evicts in rounds, and is shown nothing in slots that hold no token."""

    name: ClassVar[str] = "watching"
    rounds: int = 3

    def importance(self, tokens: Tokens) -> np.ndarray:
        empty = tokens.positions < 0
        SHOWN.append(int(empty.sum()))
        for x in tokens.vectors:
            assert (x[empty] == 0).all()
        return tokens.positions.astype(np.float64)


SHOWN: list[int] = []


def test_what_earlier_rounds_have_evicted_is_hidden_from_later_ones():
    """Also of heads that retain different numbers of tokens, whose keys and values are gathered once."""
    SHOWN.clear()
    cache = LayerCache([20, 40], policy=Watching(), window=4, block=4)
    rng = np.random.default_rng(0)
    for length in (100, 60):
        cache.step(*(rng.normal(size=(1, heads, length, 8)) for heads in (4, 2, 2)))
    assert len(SHOWN) == 6
    assert SHOWN[3] < SHOWN[4] < SHOWN[5]
