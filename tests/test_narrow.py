"""Statistics in 16 bits: what is lost, what is not, and that nothing is lost in one direction."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

import momentkv
from momentkv import LayerCache, Moments
from momentkv.statistics import narrow
from momentkv.statistics.corrections import CORRECTIONS, get_correction
from momentkv.statistics.expansion import estimate_expansion
from momentkv.statistics.narrow import NarrowStatistics, dither, round_vectors
from momentkv.statistics.summaries import Summaries
from momentkv.statistics.window import QueryWindow

NARROW = [name for name in CORRECTIONS if name != "none"]
EXACT = ("count", "weight", "log_weight", "strength", "cap")


def folded(name: str, seed: int, *, bits: int | None, parts: int = 1, d: int = 8, dv: int = 6):
    """A correction and its state after some evictions."""
    rng = np.random.default_rng(seed)
    correction = get_correction(name, bits=bits)
    k, v = rng.normal(size=(2, 3, 200, d)), rng.normal(size=(2, 3, 200, dv))
    window = QueryWindow.from_queries(rng.normal(size=(2, 6, 32, d)), kv_heads=3)
    state = correction.empty(k, v)
    for part in np.array_split(np.arange(200), parts):
        mask = np.ones((2, 3, len(part)), dtype=bool)
        state = correction.fold(state, k[..., part, :], v[..., part, :], mask=mask, window=window)
    return correction, state


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
@settings(max_examples=30)
def test_no_number_is_off_by_more_than_a_step_and_a_step_is_the_largest_over_32767(seed: int, size: float):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 5, 7)) * size
    codes, steps = round_vectors(x, rng.uniform(size=x.shape))
    assert codes.dtype == np.int16
    np.testing.assert_allclose(steps, abs(x).max(-1) / 32767, rtol=1e-12)
    assert (abs(codes * steps[..., None] - x) <= steps[..., None] * (1 + 1e-9)).all()


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=list(LIBRARIES))
def test_every_library_stores_what_numpy_stores(library: Library):
    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)
    weight = np.asarray([32.0, 64.0], dtype=np.float32)
    codes, steps = round_vectors(library.asarray(x), dither(library.asarray(weight), 4, 8))
    expected, own = round_vectors(x, dither(weight, 4, 8))
    np.testing.assert_allclose(library.numpy(steps), own, rtol=1e-6)
    # A number that falls upon a whole one may be rounded either way.
    off = abs(library.numpy(codes).astype(int) - expected)
    assert (off.max() <= 1) & ((off == 0).mean() > 0.9)


@pytest.mark.parametrize("name", NARROW)
def test_a_state_is_the_exact_one_to_a_step_and_weights_are_exact(name: str):
    _, exact = folded(name, 0, bits=None)
    correction, narrow = folded(name, 0, bits=16)
    restored = correction.statistics(narrow)
    assert type(restored) is type(exact)
    for field, x in exact.arrays().items():
        y = restored.arrays()[field]
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        if field in EXACT:
            np.testing.assert_array_equal(x, y)
        else:
            # Vectors lie along either of the last two axes.
            most = abs(x).max((-2, -1), keepdims=True) if x.ndim > 3 else abs(x).max(-1, keepdims=True)
            assert (abs(x - y) <= most / 32767 * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", NARROW)
def test_it_takes_two_bytes_a_number_a_step_for_each_vector_and_what_must_be_exact(name: str):
    correction, narrow = folded(name, 0, bits=16, d=16, dv=16)
    arrays = correction.statistics(narrow).arrays()
    vectors = sum(x.size for field, x in arrays.items() if field not in EXACT)
    exact = sum(x.nbytes for field, x in arrays.items() if field in EXACT)
    assert narrow.nbytes == 2 * vectors + 8 * vectors // 16 + exact  # steps in float64, as the state would be


@pytest.mark.parametrize("name", NARROW)
def test_heads_that_get_no_token_keep_their_state_to_the_last_bit(name: str, monkeypatch: pytest.MonkeyPatch):
    correction, state = folded(name, 1, bits=16)
    # A whole number that is a rounding too small would be rounded down.
    monkeypatch.setattr(narrow, "dither", lambda weight, rows, length: np.zeros((*weight.shape, rows, length)))
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, 3, 5, 8)), rng.normal(size=(2, 3, 5, 6))
    mask = np.zeros((2, 3, 5), dtype=bool)
    mask[0, 1] = True
    window = QueryWindow.from_queries(rng.normal(size=(2, 6, 32, 8)), kv_heads=3)
    new = correction.fold(state, k, v, mask=mask, window=window)
    for before, after in zip(state.arrays().values(), new.arrays().values(), strict=True):
        same = (before == after).reshape(2, 3, -1).all(-1)
        assert (same | mask.any(-1)).all()
    assert (new.weight - state.weight).tolist() == [[0, 5, 0], [0, 0, 0]]


def test_a_vector_that_is_not_finite_is_nan_and_spoils_no_other():
    x = np.ones((4, 3))
    x[1, 2], x[2, 0] = math.nan, math.inf
    codes, steps = round_vectors(x, np.zeros_like(x))
    restored = codes * steps[:, None]
    np.testing.assert_array_equal(np.isnan(restored).all(-1), [False, True, True, False])
    np.testing.assert_allclose(restored[[0, 3]], 1.0)


def test_a_million_tokens_later_a_mean_still_follows_what_is_evicted():
    """A block moves a mean by a fifteenth of a step by then: rounded to the nearest, it would never move again."""
    correction = get_correction("order-0", bits=16)
    rng = np.random.default_rng(0)
    k = np.concatenate([np.full((1, 1, 1, 1), 100.0), rng.normal(size=(1, 1, 1, 7))], axis=-1).astype(np.float32)
    exact = Moments(np.full((1, 1), 1e6, dtype=np.float32), k[:, :, 0], k[:, :, 0])
    start, state = exact, correction.rounded(exact)
    block = np.repeat(k + np.float32(6.0), 32, axis=-2)
    mask = np.ones((1, 1, 32), dtype=bool)
    for _ in range(3000):
        state = correction.fold(state, block, block, mask=mask, window=None)
        exact = exact.update(block, block)
    step, moved = 100 / 32767, exact.key_mean - start.key_mean
    assert (step / 10 > 6.0 * 32 / 1e6) & (moved > 100 * step).all()
    # Steps that are made up for leave a random walk at most: 3,000 roundings of less than a step.
    np.testing.assert_allclose(state.restored().key_mean, exact.key_mean, atol=10 * step)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("parts", [1, 9])
def test_the_estimate_changes_by_what_rounding_changes_in_logits_and_values(name: str, parts: int):
    _, exact = folded(name, 3, bits=None, parts=parts)
    correction, narrow = folded(name, 3, bits=16, parts=parts)
    q = np.random.default_rng(4).normal(size=(2, 6, 4, 8))
    one = estimate_expansion(q, correction.exact.expansion(exact))
    other = estimate_expansion(q, correction.expansion(narrow))
    # A step of keys and values for every rounding so far, and what grouping makes of the difference.
    np.testing.assert_allclose(other.lse, one.lse, atol=parts * 2e-3)
    np.testing.assert_allclose(other.out, one.out, atol=parts * 2e-3)


def test_a_cache_stores_them_and_shows_them_in_full_precision():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, heads, 300, 16)).astype(np.float32) for heads in (4, 2, 2))
    wide, narrow = (LayerCache(64, correction="summaries", statistics_bits=bits) for bits in (None, 16))
    np.testing.assert_array_equal(wide.step(q, k, v), narrow.step(q, k, v))
    assert isinstance(narrow.moments, Summaries)
    assert isinstance(narrow.state.evicted, NarrowStatistics)
    assert narrow.nbytes < wide.nbytes
    # Several rounds of an eviction: each rounds once more.
    np.testing.assert_allclose(narrow.moments.key_mean, wide.moments.key_mean, atol=0.02)
    token = [x[..., -1:, :] for x in (q, k, v)]
    np.testing.assert_allclose(narrow.step(*token), wide.step(*token), atol=2e-3)


@pytest.mark.parametrize("bits", [8, 32, True, "16", 16.5])
def test_other_numbers_of_bits_are_refused_by_name(bits: object):
    with pytest.raises(ValueError, match=r"statistics_bits is .*; use 16, or None"):
        LayerCache(64, statistics_bits=bits)


def test_plain_eviction_has_nothing_to_round():
    assert get_correction("none", bits=16) == get_correction("none")


def test_a_correction_of_ones_own_is_stored_as_it_is_unless_it_names_vectors():
    class Own(type(CORRECTIONS["order-0"])):
        vectors = ()

    assert get_correction(Own(order=0), bits=16) == Own(order=0)
    assert momentkv.LayerCache(64, correction=Own(order=0), statistics_bits=16).config.correction == Own(order=0)


def test_moving_them_moves_all_of_them():
    correction, state = folded("summaries", 0, bits=16)
    torched = state.map(torch.asarray)
    assert {type(x) for x in torched.arrays().values()} == {torch.Tensor}
    one, other = correction.statistics(torched).arrays(), correction.statistics(state).arrays()
    for name, x in one.items():
        np.testing.assert_allclose(x.numpy(), other[name])
