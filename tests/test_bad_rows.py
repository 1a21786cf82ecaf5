"""Numbers that are none, in one row of a batch: they stop nothing, and no other row feels them, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, Library

from momentkv import LayerCache, Moments, Tokens, get_policy
from momentkv.cache.allocation import minimise_error
from momentkv.cache.competition import by_importance
from momentkv.cache.shared_budget import SharedBudget
from momentkv.statistics.corrections import AnchoredSummaries

# A prefill that evicts, tokens until several flushes, a chunk.
LENGTHS = (60, *[1] * 11, 9, 1, 1)
BAD_ROW = 1


def run(
    library: Library, dtype: str, change: tuple[str, int, float] | None, **options: Any
) -> tuple[list[np.ndarray], LayerCache]:
    """Outputs of a cache of three rows, in one of which a number of an argument of a step may be another one."""
    rng = np.random.default_rng(0)
    cache, outs = LayerCache(sinks=1, window=4, block=3, **options), []
    for index, length in enumerate(LENGTHS):
        part = {name: rng.standard_normal((3, heads, length, 4)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
        if change is not None and index == change[1]:
            part[change[0]][BAD_ROW, 0, -1, 2] = change[2]
        arrays = [library.asarray(x, dtype) for x in part.values()]
        with np.errstate(all="ignore"):
            outs.append(library.numpy(cache.step(*arrays)))
    return outs, cache


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("budget", [20, [14, 20]], ids=["one", "heads"])
@pytest.mark.parametrize("correction", ["moments", AnchoredSummaries(3), "none"], ids=["moments", "summaries", "none"])
@pytest.mark.parametrize("policy", ["balanced", "momentkv", "snapkv", "h2o", "leverage", "keydiff", "lagkv"])
def test_what_is_not_a_number_stays_in_its_row(library: str, budget: Any, correction: Any, policy: str):
    options = {"budget": budget, "policy": policy, "correction": correction}
    good, cache = run(LIBRARIES[library], "float32", None, **options)
    fine = [row for row in range(3) if row != BAD_ROW]
    for change in (("q", 0, np.nan), ("k", 0, np.nan), ("v", 0, np.inf), ("k", 4, np.nan), ("v", 12, np.nan)):
        outs, other = run(LIBRARIES[library], "float32", change, **options)
        for one, two in zip(good, outs, strict=True):
            assert np.array_equal(one[fine], two[fine]), change
        assert not np.isfinite(outs[change[1]][BAD_ROW]).all()
        assert other.stored_by_head == cache.stored_by_head
        for name, x in cache.arrays().items():
            mine, theirs = (LIBRARIES[library].numpy(y)[fine] for y in (x, other.arrays()[name]))
            assert np.array_equal(mine, theirs), (change, name)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 20])
def test_a_query_that_is_no_number_has_an_output_that_is_none(backend: Library, n: int, dtype: str):
    """In a prompt of any length: PyTorch's operator for a CPU gives zeros where tokens do not fill a register."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, n, 8)) for heads in (4, 2, 2))
    q[1, 2, n // 2] = np.nan
    with np.errstate(all="ignore"):
        out = backend.numpy(LayerCache(64).step(*(backend.asarray(x, dtype) for x in (q, k, v))))
    expected = np.zeros(out.shape[:-1], dtype=bool)
    expected[1, 2, n // 2] = True
    assert np.array_equal(np.isnan(out).all(-1), expected)
    assert np.array_equal(np.isnan(out).any(-1), expected)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("correction", ["moments", AnchoredSummaries(3)], ids=["moments", "summaries"])
def test_a_row_with_nan_counts_its_tokens_all_the_same(library: str, correction: Any):
    for change in (("k", 0, np.nan), ("v", 0, np.nan)):
        _, cache = run(LIBRARIES[library], "float32", change, budget=20, correction=correction, policy="balanced")
        positions, weight = (LIBRARIES[library].numpy(x) for x in (cache.positions, cache.moments.weight))
        assert ((positions >= 0).sum(-1) + weight == sum(LENGTHS)).all()
        assert {0, *range(sum(LENGTHS) - 4, sum(LENGTHS))} <= set(positions[BAD_ROW, 0].tolist())


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_row_with_nan_holds_up_no_eviction(library: str):
    """Where evictions are judged: rows that are numbers evict, or are refused, as they would be without it."""
    options = {"budget": 20, "policy": "momentkv", "correction": "moments", "certify": 2, "tolerance": 1e6}
    good, cache = run(LIBRARIES[library], "float64", None, **options)
    for change in (("k", 0, np.nan), ("v", 4, np.nan)):
        outs, other = run(LIBRARIES[library], "float64", change, **options)
        assert (other.refused, other.stored, other.budget) == (0, cache.stored, 20)
        assert all(np.array_equal(one[[0, 2]], two[[0, 2]]) for one, two in zip(good, outs, strict=True))


@pytest.mark.parametrize("bad", ["q", "k", "v"])
@pytest.mark.parametrize("policy", ["balanced", "snapkv"])
@pytest.mark.parametrize("rule", [minimise_error, by_importance])
def test_a_row_with_nan_has_no_say_in_budgets(backend: Library, rule: Any, policy: str, bad: str):
    """Shares are those that the other rows would have by themselves; of no other rows, all alike."""

    def shares(rows: list[int]) -> list[int]:
        rng = np.random.default_rng(0)
        arrays = {name: rng.standard_normal((3, heads, 200, 8)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
        arrays["q"][:, 2:] *= 3
        arrays[bad][BAD_ROW, :, -20] = np.nan
        q, k, v = (backend.asarray(x[rows]) for x in arrays.values())
        cache = LayerCache(40, window=8, block=1, keep_queries=True, policy=policy)
        cache.append(k, v)
        with np.errstate(all="ignore"):
            cache.attend(q)
            SharedBudget([cache], rule, by_head=True).evict(cache)
        assert cache.stored_by_head == cache.budgets
        return cache.budgets

    assert shares([0, 1, 2]) == shares([0, 2])
    assert sum(shares([0, 1, 2])) <= 80
    assert shares([1]) == [40, 40]


@pytest.mark.parametrize("policy", ["expected-attention", "balanced"])
@pytest.mark.parametrize("place", [-1, -40, -200])
def test_a_query_that_is_not_finite_stops_no_other_row(backend: Library, policy: str, place: int):
    """Also one of those that only the ranking looks at, long before the window; keys and values are all finite."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, heads, 260, 8)) for heads in (4, 2, 2)]

    def kept(rows: list[int]) -> np.ndarray:
        cache = LayerCache(64, window=8, block=1, policy=policy)
        with np.errstate(all="ignore"):
            cache.step(*(backend.asarray(x[rows]) for x in arrays))
        return backend.numpy(cache.positions)

    alone = kept([1])
    arrays[0][0, 0, place] = np.nan
    assert np.array_equal(kept([0, 1])[1:], alone)


# Squares of the first are no numbers of float32, those of the others are zero, or hardly more.
@pytest.mark.parametrize("scale", [1e30, 1e20, 1e-20, 3e-23, 1e-30])
@pytest.mark.parametrize("name", ["balanced", "novelty", "leverage"])
def test_a_row_of_huge_or_tiny_vectors_stops_no_other(backend: Library, name: str, scale: float):
    """A covariance without digits has no inverse, which stopped all rows."""
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((2, 2, 50, 8)).astype(np.float32) for _ in range(2))
    importance = []
    for factor in (1.0, scale):
        keys, values = k.copy(), v.copy()
        keys[1], values[1] = keys[1] * np.float32(factor), values[1] * np.float32(factor)
        keys, values = backend.asarray(keys), backend.asarray(values)
        positions = backend.asarray(np.broadcast_to(np.arange(50, dtype=np.int32), (2, 2, 50)))
        queries = (backend.asarray(np.full((2, 2, 8), x, np.float32)) for x in (0.0, 0.0))
        tokens = Tokens(keys, values, positions, None, Moments.empty(keys, values), 0.3, *queries)
        with np.errstate(all="ignore"):
            importance.append(backend.numpy(get_policy(name).importance(tokens)))
    one, other = importance
    assert np.array_equal(one[0], other[0])
    assert np.isfinite(other[1]).all() or scale > 1
