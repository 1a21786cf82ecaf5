"""Certificates hold where weights vanish, squares overflow and shares underflow; what is no number stays none."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from momentkv import AttentionState, LayerCache, Moments, attend, bounds, correct, estimate
from momentkv.bounds import Interval, mass_from_range, mass_from_variance, range_from_deviation
from momentkv.bounds.functions import safe_ratio, two_point
from momentkv.policies.snapkv import pool_neighbours
from momentkv.statistics.calibration import CAP
from momentkv.statistics.summaries import QueryWindow, Summaries


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 0.8, 0.82, 0.84, 0.9, 0.94, 0.99, 1.1])
@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e6])
def test_a_set_far_below_another_is_kept_or_refused(dtype: Any, part: float, weight: float):
    """Beside one whose weights at the anchor are so many times larger, it is never taken for none."""
    gap = -part * np.log(np.finfo(dtype).smallest_normal)
    k, v = np.asarray([[[0.0], [1.0]]], dtype), np.asarray([[[0.0], [1.0]]], dtype)
    anchor, q = np.asarray([[gap]], dtype), np.asarray([[[-10.0]]], dtype)  # a query that looks at the first token
    given = np.full((1, 1), weight, dtype)
    try:
        first = Moments.from_tokens(k[:, :1], v[:, :1], order=2, extent=True, anchor=anchor, weights=given)
        moments = first.update(k[:, 1:], v[:, 1:], weights=given)
    except ValueError as error:
        assert part > 0.75
        assert "log-weights at the anchor" in str(error)  # noqa: PT017
        return
    k, v, q = k.astype(np.float64), v.astype(np.float64), q.astype(np.float64)
    exact = attend(q, k, v, scale=1.0)
    low, high = bounds.lse_interval(q.astype(dtype), moments, scale=1.0)
    assert low <= exact.lse + np.log(weight) <= high
    guess = estimate(q.astype(dtype), moments, scale=1.0).out
    assert abs(guess - exact.out) <= bounds.value_error(q.astype(dtype), moments, guess, scale=1.0)


def test_a_small_weight_that_nothing_fades_is_kept():
    """Another head's factor of decay is no reason to forget it."""
    k = np.asarray([[[0.0], [0.0]], [[0.0], [9.0]]], np.float32)
    weights = np.asarray([[1e-33, 1e-33], [1.0, 1.0]], np.float32)
    anchor = np.ones((2, 1), np.float32)
    first, second = (
        Moments.from_tokens(k[:, [i]], k[:, [i]], anchor=anchor, weights=weights[:, [i]]) for i in range(2)
    )
    np.testing.assert_allclose(first.merge(second).weight[0], 2e-33, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 3e17), (np.float64, 1e153)])
@pytest.mark.parametrize("far", [1.0, 3.3])
def test_products_of_keys_beyond_the_dtype_tell_nothing(dtype: Any, size: float, far: float):
    rng = np.random.default_rng(0)
    k = (size * np.sign(rng.normal(size=(1, 5000, 2)))).astype(dtype)
    k[..., 1:] *= 0.1
    k[0, 0] *= far
    v = np.zeros((1, 5000, 2), dtype)
    v[0, 1] = 1
    with np.errstate(over="ignore", invalid="ignore"):
        moments = Moments.from_tokens(k, v, order=2, extent=True)
        assert not np.isfinite(moments.key_key).all()
        for reach in (0.5, 4.0, 6.0):
            q = np.full((1, 1, 2), reach / size, dtype)
            exact = attend(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), scale=1.0)
            low, high = bounds.lse_interval(q, moments, scale=1.0)
            assert not exact.lse < low
            assert not exact.lse > high
            retained = AttentionState(np.full((1, 1, 2), 5, dtype), (exact.lse + 2).astype(dtype))
            share = 1 / (1 + np.exp(retained.lse.astype(np.longdouble) - exact.lse))[..., None]
            true = (1 - share) * retained.out + share * exact.out
            guess = np.zeros((1, 1, 2), dtype)
            error = np.linalg.norm((guess - true).astype(np.float64), axis=-1)
            assert not error > bounds.output_error(retained, q, moments, guess, scale=1.0)


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e5), (np.float32, 1e6), (np.float64, 1e12)])
def test_a_share_that_underflows_may_be_off_all_the_same(dtype: Any, size: float):
    """Two keys with nearly equal logits, so large that their difference is rounding: either may have all the weight."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        k, q = ((size * rng.normal(size=(1, n, 3))).astype(dtype) for n in (2, 1))
        k[0, 1] = k[0, 0] * (1 + dtype(3 * np.finfo(dtype).eps) * rng.integers(-1, 2, size=3))
        v = np.asarray([[[0.0], [1.0]]], dtype)
        logit = (k[0].astype(np.longdouble) @ q[0, 0].astype(np.longdouble))[1]
        retained = attend(q.astype(np.float64), k[:, :1].astype(np.float64), v[:, :1].astype(np.float64), scale=1.0)
        retained = AttentionState(retained.out.astype(dtype), retained.lse.astype(dtype))
        moments = Moments.from_tokens(k[:, 1:], v[:, 1:], order=2, extent=True, anchor=q[:, 0])
        state, bound = correct(retained, q, moments, scale=1.0, certify=True)
        true = 1 / (1 + np.exp(np.clip(np.longdouble(retained.lse.item()) - logit, -1e4, 1e4)))
        error = abs(state.out.item() - true)
        wrong += error > 0.5
        assert error <= bound.item()
    assert wrong  # that such errors occur is what makes this a test


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_stays_none():
    nan, one = np.asarray(np.nan), np.asarray(1.0)
    assert all(np.isnan(x) for x in mass_from_variance(Interval(-5 * one, 5 * one), Interval(nan, nan)))
    assert all(np.isnan(x) for x in range_from_deviation(nan, 9 * one))
    assert np.isnan(mass_from_range(Interval(nan, nan)).high)
    assert np.isnan(two_point(one, nan))
    assert np.isnan(two_point(nan, one))
    assert np.isnan(safe_ratio(one, nan))
    assert safe_ratio(one, 0 * one) == 0
    assert range_from_deviation(0 * one, np.inf * one) == Interval(0, 0)


@pytest.mark.parametrize(("before", "after"), [(np.float32, np.float64), (np.float64, np.float32)])
def test_moments_whose_errors_are_counted_keep_their_dtype(before: Any, after: Any):
    k = np.random.default_rng(0).normal(size=(1, 20, 4)).astype(before)
    moments = Moments.from_tokens(k, k, order=2, extent=True)
    with pytest.raises(ValueError, match=r"summed in float.*drop the extent with dataclasses\.replace"):
        moments.map(lambda x: x.astype(after))
    other = Moments.from_tokens(k.astype(after), k.astype(after), order=2, extent=True)
    with pytest.raises(ValueError, match="build both from tokens of one dtype"):
        moments.merge(other)
    free = dataclasses.replace(moments, extent=None).map(lambda x: x.astype(after))
    assert free.weight.dtype == after
    assert moments.map(np.copy).extent is not None


@pytest.mark.parametrize("prior", [0.0, 0.1, 0.75])
def test_a_strength_that_was_none_is_credited_once_it_is_fitted(prior: float):
    rng = np.random.default_rng(0)
    q, k, v = 3 * rng.normal(size=(1, 32, 8)), rng.normal(size=(1, 400, 8)), rng.normal(size=(1, 400, 8))
    window = QueryWindow.from_queries(q, kv_heads=1)
    summaries = Summaries.empty(k, v, summaries=3, rank=1, strength=prior).update(k, v, window)
    fitted = summaries.calibrate(q, k)
    assert fitted.strength > 0.4
    gain = 0.5 * fitted.strength * (window.variance * fitted.key_variance).sum(-1)
    np.testing.assert_allclose(fitted.cap, CAP * gain)


@pytest.mark.parametrize("policy", ["knorm", "expected-attention", "lagkv"])
@pytest.mark.parametrize("bits", [3, 4, 16])
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_that_are_padded_alike_are_as_alone_in_few_bits(policy: str, bits: int, rows: int):
    """Slots that hold no token fill no tier."""
    settings: dict[str, Any] = {"sinks": 1, "window": 8, "block": 8, "exact_window": 2, "policy": policy, "bits": bits}
    correction = "none" if policy == "lagkv" else "summaries"
    outputs = []
    for padding in (0, 1, 5):
        rng = np.random.default_rng(0)
        cache = LayerCache(16, correction=correction, **settings)
        outputs.append([])
        for t in range(40):
            q, k, v = (np.repeat(rng.normal(size=(1, heads, 1, 16)), rows, 0) for heads in (2, 1, 1))
            valid = None
            if padding and t == 3:
                q, k, v = (np.concatenate([np.zeros_like(x)] * padding + [x], axis=2) for x in (q, k, v))
                valid = np.broadcast_to(np.arange(padding + 1) == padding, (rows, 1, padding + 1))
            outputs[-1].append(cache.step(q, k, v, valid=valid)[:, :, -1:])
    for padded in outputs[1:]:
        np.testing.assert_allclose(padded, outputs[0], atol=1e-12)


def test_equal_sums_of_neighbours_are_equal_in_every_batch():
    """A tie that rounding broke by the shape of a batch would keep another token than alone."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    score = torch.from_numpy(rng.random((7, 3, 33)))
    positions = torch.arange(33).expand(7, 3, 33)
    together = pool_neighbours(score, positions, 5)
    for row in range(7):
        assert torch.equal(pool_neighbours(score[[row]], positions[[row]], 5)[0], together[row])
        assert torch.equal(pool_neighbours(score[row, 1], positions[row, 1], 5), together[row, 1])
