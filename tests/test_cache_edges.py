"""Edges of the layer cache: budgets that change, padding alone, snapshots of another cache, parts of a step by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, Library
from passes import SIZES, passes

from momentkv import LayerCache, Moments, attend
from momentkv.statistics.window import QueryWindow
from momentkv.testing.rounding import assert_same
from momentkv.trust import trust

SMALL: dict[str, Any] = {"window": 2, "block": 4}


def arrays(n: int = 60, rows: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((rows, heads, n, 4)) for heads in (4, 2, 2))
    return q, k, v


def step(backend: Library, cache: LayerCache, part: slice, rows: int = 1) -> np.ndarray:
    return backend.numpy(cache.step(*(backend.asarray(x[..., part, :]) for x in arrays(rows=rows))))


def stored(backend: Library, cache: LayerCache) -> list[set[int]]:
    """Positions of each KV head."""
    return [{int(x) for x in head if x >= 0} for head in backend.numpy(cache.positions)[0]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [10, [10, 20], [10, 14], 30], ids=str)
def test_no_token_is_lost_where_a_budget_changes(budget: Any, static: bool, backend: Library):
    """Each is stored or stands in the statistics, and the budget is kept at once."""
    cache = LayerCache(20, static=static, **SMALL)
    step(backend, cache, slice(0, 40))
    for t in range(40, 43):
        step(backend, cache, slice(t, t + 1))
    cache.budget = budget
    budgets = budget if isinstance(budget, list) else [budget] * 2
    for t in range(43, 60):
        assert all(len(x) < b + 4 for x, b in zip(stored(backend, cache), budgets, strict=True))
        step(backend, cache, slice(t, t + 1))
        held = stored(backend, cache)
        gone = [[p for p in range(t + 1) if p not in head] for head in held]
        assert backend.numpy(cache.moments.weight)[0].tolist() == [len(x) for x in gone]
    _, k, v = arrays()
    for head, positions in enumerate(gone):
        expected = Moments.from_tokens(*(x[0, head : head + 1][:, positions] for x in (k, v)))
        found = cache.moments.map(lambda x, head=head: backend.numpy(x)[0, head : head + 1])
        np.testing.assert_allclose(found.value_mean, expected.value_mean, atol=1e-10)
        np.testing.assert_allclose(found.value_key, expected.value_key, atol=1e-8)


def test_static_steps_go_on_as_others_after_a_budget_fell(backend: Library):
    known, cache = LayerCache(20, **SMALL), LayerCache(20, static=True, **SMALL)
    for each in (known, cache):
        step(backend, each, slice(0, 40))
        each.budget = 10
    for t in range(40, 60):
        np.testing.assert_allclose(
            *(step(backend, each, slice(t, t + 1)) for each in (cache, known)), rtol=1e-9, atol=1e-11
        )
        assert stored(backend, cache) == stored(backend, known)


@pytest.mark.parametrize("static", [False, True])
def test_a_snapshot_may_be_another_caches(static: bool, backend: Library):
    one, other, alone = (LayerCache(10, static=static, **SMALL) for _ in range(3))
    for part in (slice(0, 20), slice(20, 21), slice(21, 22)):
        for each in (one, alone):
            step(backend, each, part)
    other.restore(one.snapshot())
    for t in range(22, 40):
        step(backend, other, slice(60 - t, 61 - t))
        np.testing.assert_allclose(*(step(backend, each, slice(t, t + 1)) for each in (one, alone)), rtol=1e-12)
    assert (one.seen, other.seen, alone.seen) == (40, 40, 40)
    assert one.number != other.number


def test_padding_alone_is_nothing(backend: Library):
    cache = LayerCache(8, certify=1, window=2, block=2)
    q, k, v = (backend.asarray(x[..., :5, :]) for x in arrays())
    cache.step(q, k, v, valid=backend.asarray(np.zeros((1, 1, 5), dtype=bool)))
    assert all(x is None for x in (cache.keys, cache.values, cache.positions, cache.attention))
    cache.drop(2)
    assert (cache.seen, cache.stored) == (3, 0)
    out = backend.numpy(cache.step(q, k, v))
    mask = np.tril(np.ones((5, 5), dtype=bool))
    np.testing.assert_allclose(out, attend(*(x[..., :5, :] for x in arrays()), mask=mask).out, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 80, 4), (2, 4, 5, 4), (1, 3, 5, 4), (1, 4, 5, 3)], ids=str)
def test_queries_must_be_those_of_the_keys_that_wait(shape: tuple[int, ...], backend: Library):
    cache = LayerCache(8, **SMALL)
    _, k, v = (backend.asarray(x[..., :40, :]) for x in arrays())
    cache.append(k, v)
    with pytest.raises(ValueError, match="q has"):
        cache.attend(backend.asarray(np.zeros(shape)))


@pytest.mark.parametrize("shape", [(40,), (1, 2, 1), (1, 2, 3)], ids=str)
def test_importances_must_be_of_each_token(shape: tuple[int, ...], backend: Library):
    cache = LayerCache(8, **SMALL)
    q, k, v = (backend.asarray(x[..., :40, :]) for x in arrays())
    cache.append(k, v)
    cache.attend(q)
    with pytest.raises(ValueError, match=r"importance has shape .*; it needs a number for each token .* \(1, 2, 40\)"):
        cache.evict(backend.asarray(np.zeros(shape)))
    cache.evict()
    assert cache.stored == 8


@pytest.mark.parametrize("shape", [(3, 4, 1, 4), (1, 3, 1, 4), (1, 4, 1, 3), (1, 4, 0, 4), (4, 4)], ids=str)
def test_trust_is_of_queries_that_fit(shape: tuple[int, ...], backend: Library):
    cache = LayerCache(8, certify=2, **SMALL)
    step(backend, cache, slice(0, 40))
    with pytest.raises(ValueError, match="q has"):
        trust(cache, backend.asarray(np.zeros(shape)))


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 1)], ids=["no rows", "no dimensions"])
def test_a_step_is_of_something(part: slice, backend: Library):
    q, k, v = (backend.asarray(x[part, ..., : 4 * part.stop]) for x in arrays())
    q, k, v = (x if part.stop == 0 else x[..., :0] for x in (q, k, v))
    with pytest.raises(ValueError, match=r"k has shape .* of no rows or no dimensions"):
        LayerCache(8, **SMALL).step(q, k, v)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_rows_are_not_stopped_by_values_whose_squares_are_not_numbers(backend: Library):
    """Finite in one row, and without a covariance that is: the others are what they are alone."""
    q, k, v = (x.astype(np.float32) for x in arrays(rows=2))
    v[1] *= np.float32(1e20)
    cache, alone = (LayerCache(20, correction="summaries", **SMALL) for _ in range(2))
    outs = []
    for part in (slice(0, 40), slice(40, 41)):
        outs.append(backend.numpy(cache.step(*(backend.asarray(x[..., part, :]) for x in (q, k, v)))))
        expected = backend.numpy(alone.step(*(backend.asarray(x[:1, ..., part, :]) for x in (q, k, v))))
        np.testing.assert_allclose(outs[-1][:1], expected, rtol=1e-4, atol=1e-5)
    # Attention itself is exact as long as nothing is evicted.
    assert np.isfinite(outs[0]).all()


def test_arrays_of_a_file_are_converted_first():
    k, v = (x.astype(">f8") for x in arrays()[1:])
    with pytest.raises(ValueError, match="k is >f8, of the other byte order; convert it"):
        Moments.from_tokens(k, v)


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="no wider numbers here")
def test_wider_numbers_than_are_computed_in_are_refused():
    q, k, v = arrays()
    wide = k.astype(np.longdouble)
    with pytest.raises(ValueError, match=r"k is float\d+, wider than anything is computed in; convert it to float64"):
        LayerCache(8, window=2).step(q, wide, v)
    with pytest.raises(ValueError, match=r"k is float\d+, wider than"):
        Moments.from_tokens(wide, v)
    for take in (lambda: attend(q.astype(np.longdouble), k, v), lambda: QueryWindow.from_queries(wide, 2)):
        with pytest.raises(ValueError, match=r"q is float\d+, wider than"):
            take()


def test_a_prefill_takes_queries_of_another_dtype_as_later_steps_do(backend: Library):
    if backend.name == "array-api-strict":
        return  # it has no 16-bit numbers
    q, k, v = arrays()
    given = [backend.asarray(x[..., :20, :], kind) for x, kind in ((q, "float32"), (k, "float16"), (v, "float16"))]
    out = LayerCache(30, **SMALL).step(*given)
    assert backend.dtype(out) == "float32"
    halves = [backend.numpy(x) for x in given]
    exact = attend(*halves, mask=np.tril(np.ones((20, 20), dtype=bool))).out
    np.testing.assert_allclose(backend.numpy(out), exact, rtol=0, atol=1e-5)
    assert_same(halves[1], halves[1].astype(np.float16).astype(np.float64))


@pytest.mark.parametrize("policy", ["expected-attention", "twice", "momentkv"])
def test_a_turn_of_few_tokens_is_ranked_as_alone(policy: str, backend: Library):
    """Beside a turn of more, whose newest queries are many: its own are not enough, and what is remembered serves."""
    settings: dict[str, Any] = {"budget": 64, "policy": policy, "correction": "summaries"}
    together, alone = LayerCache(**settings), LayerCache(**settings)
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, heads, 381, 8)) for heads in (4, 2, 2))
    valid = np.ones((2, 1, 60), dtype=bool)
    valid[0, :, :45] = False
    for part in (slice(0, 300), slice(300, 320), slice(320, 380), slice(380, 381)):
        own = slice(365, 380) if part.stop == 380 else part
        given = backend.asarray(valid) if part.stop == 380 else None
        out = together.step(*(backend.asarray(x[..., part, :]) for x in (q, k, v)), valid=given)
        expected = alone.step(*(backend.asarray(x[:1, ..., own, :]) for x in (q, k, v)))
    held, of_one = stored(backend, together), stored(backend, alone)
    assert [{p - 45 if p >= 365 else p for p in head} for head in held] == of_one
    np.testing.assert_allclose(backend.numpy(out)[:1], backend.numpy(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("between", ["append", "attend"])
def test_tokens_that_wait_in_static_steps_are_not_replaced(library: str, between: str):
    backend: Library = LIBRARIES[library]
    caches = [LayerCache(100, static=static, **SIZES) for static in (False, True)]
    outs = []
    for cache in caches:
        first, some, one = ([backend.asarray(x.numpy()) for x in part] for part in passes((10, 3, 1)))
        cache.step(*first)
        cache.append(*some[1:])
        if between == "attend":
            cache.attend(some[0])
        cache.append(*one[1:])
        outs.append(backend.numpy(cache.attend(one[0])))
        cache.evict()
        assert (cache.seen, (backend.numpy(cache.positions) >= 0).sum() // 2) == (14, 14)
    np.testing.assert_allclose(outs[1], outs[0], rtol=1e-5, atol=1e-6)


def test_a_budget_is_not_lowered_while_a_token_waits_for_static_steps():
    cache, plain = (LayerCache(20, static=True, **SIZES) for _ in range(2))
    prefill, *steps = passes((60, *[1] * 12))
    for each in (cache, plain):
        each.step(*prefill)
    q, k, v = steps[0]
    cache.append(k, v)
    with pytest.raises(ValueError, match=r"budget was set to \[10, 10\] between append and evict.*call evict first"):
        cache.budget = 10
    assert cache.budget == 20
    cache.attend(q)
    cache.evict()
    plain.step(q, k, v)
    for each in (cache, plain):
        each.budget = 10
        for step in steps[1:]:
            each.step(*step)
    kept = int((cache.positions >= 0).sum()) // 2
    assert kept + float(cache.moments.weight[0, 0]) == cache.seen == 72
    for name, x in plain.arrays().items():
        assert torch.equal(cache.arrays()[name], x), name
