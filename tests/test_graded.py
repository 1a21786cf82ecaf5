"""Channels of keys with more bits and with fewer: which, in how many bytes, how far off, and what they gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from libraries import Library

from momentkv import LayerCache
from momentkv import codes as few
from momentkv.attention import attend
from momentkv.bounds.rounding import code_error
from momentkv.cache.curves import measured_errors

DIMENSIONS = [16, 64, 80]


def keys_of(d: int, seed: int = 0, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Keys (2, n, d) of channels that differ in mean and deviation, and the mean square of the queries they meet."""
    rng = np.random.default_rng(seed)
    k = (rng.normal(size=(2, n, d)) + 2 * rng.normal(size=d)) * np.exp(rng.normal(size=d))
    return k, np.exp(2 * rng.normal(size=(2, d)))


@pytest.mark.parametrize("bits", few.GRADES)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_the_finer_half_are_the_channels_in_which_rounding_costs_more(bits: int, d: int):
    k, queries = keys_of(d)
    even = few.Standard.of(k)
    graded = even.graded(bits, queries)
    cost = queries * even.deviation**2
    fine, rough = (np.take_along_axis(cost, half.astype(int), -1) for half in np.split(graded.order, 2, axis=-1))
    assert (fine.min(-1) >= rough.max(-1)).all()
    finer = cost >= fine.min(-1)[:, None]
    np.testing.assert_array_equal(graded.deviation, np.where(finer, even.deviation / 4, even.deviation))
    np.testing.assert_array_equal(graded.even().deviation, even.deviation)
    assert graded.even().order is None


@pytest.mark.parametrize("bits", few.GRADES)
@pytest.mark.parametrize("d", DIMENSIONS)
def test_records_take_as_many_bytes_and_are_read_back_within_half_a_step(backend: Library, bits: int, d: int):
    k, queries = keys_of(d)
    standard = few.Standard.of(backend.asarray(k)).graded(bits, backend.asarray(queries))
    codes, step = few.encode(backend.asarray(k), standard, bits)
    assert codes.shape[-1] == few.row_bytes(d, bits) == d * bits // 8
    read, deviation, delta = (backend.numpy(x) for x in (few.decode(codes, step, standard, bits), *standard[1:2], step))
    assert (np.abs(read - k) <= (0.5 + 1e-9) * delta[..., None] * deviation[:, None] + 1e-12).all()
    bound = backend.numpy(
        code_error(step, standard.map(lambda x: x[:, None, :]), bits, stored=standard.deviation.dtype)
    )
    assert (np.abs(read - k) <= bound).all()
    assert (bound <= 1.01 * delta[..., None] * deviation[:, None] / 2 + 1e-9).all()
    shown = backend.numpy(standard.restore(few.coarse(standard.standardise(backend.asarray(k)), standard, bits)))
    np.testing.assert_allclose(shown, read, rtol=1e-12)
    fine, rough = np.split(backend.numpy(few.unpacked(codes, standard, bits)).astype(int), 2, axis=-1)
    assert fine.max() <= 2 ** few.GRADES[bits][0] - 1
    assert rough.max() <= 2 ** few.GRADES[bits][1] - 1
    assert fine.max() > 2**bits - 1


@pytest.mark.parametrize("bits", few.GRADES)
def test_the_bound_counts_what_the_largest_code_of_the_finer_half_loses_where_it_is_stored(bits: int):
    k, queries = keys_of(16)
    standard = few.Standard.of(k.astype(np.float32), centred=False).graded(bits, queries)
    step = np.full((2,), 0.5, dtype=np.float16)
    of_step = 0.25 * standard.deviation.astype(float)
    stored = code_error(step, standard, bits, stored=np.float16) - of_step
    fine, rough = ((2**each - 1) * of_step for each in few.GRADES[bits])
    largest = np.where(standard.deviation < standard.even().deviation, fine, rough)
    assert (stored >= 2.0**-11 * largest).all()


@pytest.mark.parametrize("bits", few.GRADES)
def test_attention_from_graded_codes_is_that_of_the_decoded_tokens(backend: Library, bits: int):
    (k, queries), (v, _) = keys_of(32), keys_of(32, 1)
    q = np.random.default_rng(2).normal(size=(4, 3, 32))
    of_keys = few.Standard.of(backend.asarray(k)).graded(bits, backend.asarray(queries))
    of_values = few.Standard.of(backend.asarray(v), centred=False)
    (keys, key_step), (values, value_step) = (
        few.encode(backend.asarray(x), standard, bits) for x, standard in ((k, of_keys), (v, of_values))
    )
    coded = few.Coded((bits, bits), keys, values, key_step, value_step, of_keys, of_values)
    state, _ = few.attend_codes(backend.asarray(q), coded, scale=0.2)
    tokens = (
        few.decode(x, s, standard, bits)
        for x, s, standard in ((keys, key_step, of_keys), (values, value_step, of_values))
    )
    exact = attend(q, *(backend.numpy(x) for x in tokens), scale=0.2)
    np.testing.assert_allclose(backend.numpy(state.out), exact.out, rtol=0, atol=1e-9)
    np.testing.assert_allclose(backend.numpy(state.lse), exact.lse, rtol=0, atol=1e-9)


@pytest.mark.parametrize("bits", few.GRADES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_what_rounding_costs_falls_as_the_derivation_says(bits: int, spread: float):
    """By a quarter of the costs of one half and four times those of the other: more, where all cost alike."""
    rng = np.random.default_rng(bits)
    k, queries = rng.normal(size=(1, 4000, 64)), np.exp(spread * rng.normal(size=(1, 64)))
    even = few.Standard.of(k)
    graded = even.graded(bits, queries)

    def cost(standard: few.Standard) -> float:
        off = few.decode(*few.encode(k, standard, bits), standard, bits) - k
        return float(np.mean(queries * np.mean(off**2, axis=-2)))

    square = queries * even.deviation**2
    halves = np.split(np.take_along_axis(square, graded.order.astype(int), -1), 2, axis=-1)
    expected = (halves[0].sum() / 4 + 4 * halves[1].sum()) / square.sum()
    # A step of three bits is so wide that errors are not quite even within it.
    assert cost(graded) / cost(even) == pytest.approx(expected, rel=0.15)
    assert (cost(graded) < cost(even)) == (spread > 0)


@pytest.mark.parametrize(("bits", "d"), [(6, 64), (8, 64), (16, 64), (5, 8), (4, 24), (3, 1)])
def test_where_there_is_no_such_code_nothing_is_graded(bits: int, d: int):
    k, queries = keys_of(d)
    standard = few.Standard.of(k)
    assert standard.graded(bits, queries) is standard
    assert standard.graded(5, None) is standard
    assert few.order_bytes(bits, d) == 0


def test_queries_that_are_not_finite_cost_nothing_and_poison_nothing():
    k, queries = keys_of(16)
    queries[0, 3:5] = np.nan, np.inf
    graded = few.Standard.of(k).graded(4, queries)
    assert (graded.order[0, :8] != 3).all()
    assert (graded.order[0, :8] != 4).all()
    assert np.isfinite(graded.deviation).all()
    np.testing.assert_array_equal(graded.order[1], few.Standard.of(k).graded(4, np.nan_to_num(queries)).order[1])


def test_so_little_deviation_that_a_quarter_of_it_is_none_stays_positive():
    k = np.zeros((1, 9, 16), dtype=np.float16)
    k[:, ::2] = 6e-8
    standard = few.Standard.of(k, centred=False).graded(4, np.ones((1, 16), dtype=np.float32))
    assert (standard.deviation > 0).all()
    assert np.isfinite(few.decode(*few.encode(k, standard, 4), standard, 4)).all()


SETTINGS: dict[str, Any] = {"policy": "expected-attention", "correction": "summaries", "window": 8, "block": 4}


def cache_of(backend: Library, budget: Any, bits: Any, **settings: Any) -> tuple[LayerCache, list[np.ndarray]]:
    """A cache that has read 60 tokens, whose queries look at some channels more than at others."""
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, 1, 2, 60, 16))
    q = rng.normal(size=(1, 4, 60, 16)) * np.exp(2 * np.random.default_rng(6).normal(size=16))
    cache = LayerCache(budget, bits=bits, **SETTINGS | settings)
    cache.append(backend.asarray(k), backend.asarray(v))
    cache.attend(backend.asarray(q))
    cache.evict()
    return cache, [q, k, v]


@pytest.mark.parametrize("budget", [24, (20, 30)], ids=["equal", "ragged"])
def test_a_cache_grades_by_the_queries_that_it_remembers(backend: Library, budget: Any):
    cache, (q, k, _) = cache_of(backend, budget, 4)
    state = cache.state
    recent = (q[:, :, -32:].reshape(1, 2, 2, 32, 16) * 0.25) ** 2
    expected = few.Standard.of(k).graded(5, recent.mean((2, 3)))
    np.testing.assert_array_equal(backend.numpy(state.key_order), expected.order)
    np.testing.assert_allclose(backend.numpy(state.key_deviation), expected.deviation, rtol=1e-9)
    assert cache_of(backend, budget, None)[0].state.key_order is None  # where tokens stay as they came
    fits = [backend.numpy(x) for x in cache.misfit()]
    assert all(((x > 0.8) & (x < 1.3)).all() for x in fits)


def test_bits_are_chosen_by_what_graded_codes_lose(backend: Library):
    rng = np.random.default_rng(5)
    k, v = rng.normal(size=(2, 1, 2, 60, 16))
    q = rng.normal(size=(1, 4, 60, 16)) * np.exp(2 * np.random.default_rng(6).normal(size=16))
    cache = LayerCache(60, keep_queries=True, **SETTINGS)
    cache.append(backend.asarray(k), backend.asarray(v))
    cache.attend(backend.asarray(q))
    codes = [(5, 16), (6, 16)]
    graded = np.asarray(measured_errors(cache, [60], codes=codes, at=60)[1])
    cache.state = cache.state.changed(query_square=None)
    even = np.asarray(measured_errors(cache, [60], codes=codes, at=60)[1])
    assert (graded[0] < 0.7 * even[0]).all()
    np.testing.assert_array_equal(graded[1], even[1])


def test_without_queries_every_channel_has_as_many_bits(backend: Library):
    cache, _ = cache_of(backend, 24, 4, policy="snapkv", correction="moments", order=None)
    assert cache.state.key_step is not None
    assert cache.state.key_order is None


@pytest.mark.parametrize("static", [False, True])
def test_a_row_that_is_coded_anew_beside_even_records_gets_such_records(static: bool, monkeypatch: pytest.MonkeyPatch):
    """As in a file of before: heads of a layer are read alike."""
    rng = np.random.default_rng(8)
    q, k, v = (rng.normal(size=(2, heads, 70, 16)) for heads in (4, 2, 2))
    valid = np.arange(20) >= np.asarray([[[0]], [[9]]])
    settings: dict[str, Any] = {"policy": "expected-attention", "sinks": 1, "window": 3, "exact_window": 1, "block": 4}
    outputs = []
    for always in (False, True):
        with monkeypatch.context() as before:
            before.setattr(few.Standard, "graded", lambda self, bits, queries: self)
            cache = LayerCache(12, bits=3, static=static, **settings)
            cache.step(q[..., :20, :], k[..., :20, :], v[..., :20, :], valid=valid)
            assert cache.state.early is not None
            if always:
                outputs.append([cache.step(*(x[..., t : t + 1, :] for x in (q, k, v))) for t in range(20, 70)])
        if not always:
            outputs.append([cache.step(*(x[..., t : t + 1, :] for x in (q, k, v))) for t in range(20, 70)])
        assert cache.state.key_order is None
    np.testing.assert_array_equal(*outputs)
