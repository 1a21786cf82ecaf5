"""What states hold for bounds, and certificates in use: on every array library, by every road that leads to them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import LayerCache, Moments, attend, bounds, correct, estimate
from momentkv.backends import get_backend
from momentkv.bounds.rounding import state_error
from momentkv.cache.accounting import state_bytes
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, attention_error, moments_error, unit
from momentkv.testing.strategies import Case, cases, some_tokens
from momentkv.trust import trust


def gathered(backend: Library, k, v, **kwargs):
    return Moments.from_tokens(backend.asarray(k), backend.asarray(v), **{"extent": True, **kwargs})


@given(case=cases(n=st.integers(2, 12)), parts=st.integers(2, 4))
def test_radii_from_fixed_anchors_are_exact_however_tokens_arrive(backend: Library, case: Case, parts: int):
    k, v = case.tokens()
    state = Moments.empty(backend.asarray(k), backend.asarray(v), extent=True, order=2)
    for piece in np.array_split(np.arange(case.n), parts):
        state = state.update(backend.asarray(k[..., piece, :]), backend.asarray(v[..., piece, :]))
    extent = {name: backend.numpy(x) for name, x in state.extent.arrays().items()}
    for anchor, radius, x in (("key_anchor", "key_radius", k), ("value_anchor", "value_radius", v)):
        distance = np.linalg.norm(oracle.f64(x) - extent[anchor][..., None, :], axis=-1).max(axis=-1)
        size = np.linalg.norm(oracle.f64(x), axis=-1).max(axis=-1) + distance
        assert (np.abs(extent[radius] - distance) <= unit(case.dtype) * (x.shape[-1] + 8) * size).all()
    assert (extent["least_weight"] == 1).all()


@given(case=cases())
def test_covariance_of_keys_equals_that_of_keys_as_values(backend: Library, case: Case):
    k, _ = case.tokens()
    moments = gathered(backend, k, k, order=2)
    exact, error = oracle.moments(k, k), moments_error(k, k, unit(case.dtype))
    assert (np.abs(backend.numpy(moments.key_key) - exact.value_key) <= error.value_key).all()


@given(case=cases(), order=st.sampled_from([0, 1, 2]))
def test_empty_is_the_identity_also_with_an_extent(backend: Library, case: Case, order: int):
    k, v = (backend.asarray(x) for x in case.tokens())
    moments, empty = Moments.from_tokens(k, v, order=order, extent=True), Moments.empty(k, v, order=order, extent=True)
    for merged in (empty.merge(moments), moments.merge(empty)):
        for name, x in merged.arrays().items():
            assert_same(backend.numpy(x), backend.numpy(moments.arrays()[name]))


@given(case=cases(masks=("tokens",)))
def test_masked_tokens_do_not_reach(backend: Library, case: Case):
    k, v = case.tokens()
    mask = case.token_mask()
    bad_k, bad_v = (np.where(mask[..., None], x, np.asarray(np.nan, x.dtype)) for x in (k, v))
    moments = gathered(backend, bad_k, bad_v, mask=backend.asarray(mask))
    for name, x in moments.extent.arrays().items():
        assert not np.isnan(backend.numpy(x)).any(), name
    far = np.where(mask[..., None], 0.0, 0.0 * k + 1e6).astype(k.dtype)
    masked = gathered(backend, far, v, mask=backend.asarray(mask))
    assert (backend.numpy(masked.extent.key_radius) == 0).all()


def test_states_without_extent_are_as_before(backend: Library):
    k, v = (backend.asarray(np.ones((2, 5, 4), np.float32)) for _ in range(2))
    assert list(Moments.from_tokens(k, v).arrays()) == ["weight", "key_mean", "value_mean", "value_key"]
    with_extent = Moments.from_tokens(k, v, extent=True)
    assert with_extent.nbytes - Moments.from_tokens(k, v).nbytes == 4 * 2 * (4 + 4 + 7)
    assert Moments.from_tokens(k, v, order=2).nbytes == 4 * 2 * (1 + 4 + 4 + 16 + 16)
    assert state_bytes("moments", d=4, certify=0) == state_bytes("moments", d=4) + 4 * (1 + 4 + 4 + 4 + 4 + 7)


def test_misuse_of_extents_raises():
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 6, 4)), rng.standard_normal((2, 6, 3))
    a, b = (Moments.from_tokens(k[:, s], v[:, s], extent=True) for s in (slice(0, 3), slice(3, 6)))
    with pytest.raises(ValueError, match="other anchors"):
        a.merge(b)
    same = Moments.from_tokens(k[:, 3:], v[:, 3:], extent=a.extent)
    assert a.merge(same).weight.tolist() == [6.0, 6.0]
    with pytest.raises(ValueError, match="with and without extent"):
        a.merge(Moments.from_tokens(k[:, 3:], v[:, 3:]))
    with pytest.raises(ValueError, match="off orthogonal"):
        a.rotate(2 * np.eye(4))
    with pytest.raises(ValueError, match="have no extent"):
        correct(attend(k[:, :1], k, v), k[:, :1], Moments.from_tokens(k, v), certify=True)
    with pytest.raises(ValueError, match="spread by"):
        Moments.from_tokens(k.astype(np.float32), v.astype(np.float32), anchor=np.full((2, 4), 100, np.float32))
    with pytest.raises(ValueError, match=r"tolerance is 0\.1"):
        LayerCache(40, tolerance=0.1)
    with pytest.raises(ValueError, match="keeps no evidence"):
        trust(LayerCache(40, window=4), k)


@given(case=cases(), cut=st.integers(0, 12), order=st.sampled_from([0, 1, 2]), halves=st.booleans())
def test_certified_correction_is_within_its_bound(backend: Library, case: Case, cut: int, order: int, halves: bool):
    """Grouped queries, empty sets on either side, huge and far-off keys; never NaN, never infinite."""
    q, k, v = case.arrays()
    if halves and backend.name == "torch" and case.dtype == "float32":
        torch = LIBRARIES["torch"]
        q, k, v = (torch.numpy(torch.asarray(np.clip(x, -1e3, 1e3), "bfloat16")).astype("float32") for x in (q, k, v))
    scale, cut = case.factor(), min(cut, case.n)
    kept, gone = (k[..., :cut, :], v[..., :cut, :]), (k[..., cut:, :], v[..., cut:, :])
    exact = oracle.attend(q, k, v, scale)
    arrays = [backend.asarray(x) for x in (q, *kept)]
    retained = attend(*arrays, scale=scale)
    moments = gathered(backend, *gone, order=max(order, 1))
    state, bound = correct(retained, arrays[0], moments, order=min(order, 1), scale=scale, certify=True)
    bound = backend.numpy(bound)
    assert np.isfinite(bound).all()
    # The certificate takes the retained state as exact; its rounding, and the oracle's, are added here.
    u = unit(case.dtype)
    part = attention_error(q, *kept, oracle.attend(q, *kept, scale).lse, u, scale)
    whole = attention_error(q, k, v, exact.lse, unit(), scale)
    size = np.linalg.norm(v, axis=-1).max(initial=0.0) * 2
    slack = np.sqrt(v.shape[-1]) * (part.out + whole.out).max(axis=-1) + size * np.tanh(part.lse / 4)
    assert (np.linalg.norm(backend.numpy(state.out) - exact.out, axis=-1) <= bound + slack).all()
    if case.n == cut:
        assert (bound <= 200 * u * (np.linalg.norm(backend.numpy(state.out), axis=-1) * 4 + 1e-300)).all()


@given(case=cases(n=some_tokens, laws=("gaussian", "ties")))
def test_anchored_moments_are_exact_at_the_anchor_and_merge(backend: Library, case: Case):
    case = dataclasses.replace(case, group=1, q_len=1)
    q, k, v = case.arrays()
    anchor = (0.5 * q[..., 0, :]).astype(case.dtype)
    half = case.n // 2
    state = Moments.from_tokens(
        backend.asarray(k[..., :half, :]),
        backend.asarray(v[..., :half, :]),
        anchor=backend.asarray(anchor),
        extent=True,
    ).update(backend.asarray(k[..., half:, :]), backend.asarray(v[..., half:, :]))
    got, exact = estimate(backend.asarray(q), state, scale=0.5), oracle.attend(q, k, v, 0.5)
    u = unit(case.dtype)
    size = np.abs(k).max() * np.abs(q).sum(axis=-1).max() + 1
    error = 40 * u * (case.n + case.d + 8) * size
    assert (np.abs(backend.numpy(got.lse) - exact.lse) <= error).all()
    assert (np.abs(backend.numpy(got.out) - exact.out) <= error * (1 + np.abs(v).max())).all()


def test_estimate_of_order_2_credits_the_variance():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, n, 3)) for n in (2, 400, 400))
    moments = Moments.from_tokens(k, v, order=2)
    low, high = (estimate(q, moments, order=order, scale=1.0) for order in (1, 2))
    gain = 0.5 * np.einsum("hid,hde,hie->hi", q, oracle.moments(k, k).value_key, q) / 400
    np.testing.assert_allclose(high.lse - low.lse, gain, rtol=1e-12)
    np.testing.assert_array_equal(high.out, low.out)
    half = estimate(q, moments, order=2, scale=1.0, strength=0.5)
    np.testing.assert_allclose(half.lse - low.lse, gain / 2, rtol=1e-12)
    exact = oracle.attend(q, k, v, 1.0).lse
    assert (np.abs(high.lse - exact) < np.abs(low.lse - exact)).all()
    with pytest.raises(ValueError, match="strength is 2"):
        estimate(q, moments, order=2, strength=2.0)


def rare(p: float = 0.01, reach: float = 5.0):
    """One rare token far along the query, that alone has a value."""
    n = round(1 / p)
    k, v = np.zeros((1, n, 1)), np.zeros((1, n, 1))
    k[0, 0], v[0, 0] = reach, 1.0
    return np.ones((1, 1, 1)), k, v


def test_second_order_terms_alone_bound_neither_mass_nor_value():
    """Against the paper's eq. 29 and 30, which drop terms of order sigma^4: here sigma is 0.5."""
    q, k, v = rare()
    exact = oracle.attend(q, k, v, 1.0)
    moments = Moments.from_tokens(k, v, order=2, extent=True)
    variance, radius = k.var(), np.abs(v - v.mean()).max()
    assert variance < 0.25
    guess = estimate(q, moments, scale=1.0)
    gap, error = (exact.lse - guess.lse).item(), abs(exact.out - guess.out).item()
    assert gap > 6 * variance / 2
    assert error > 4 * variance / 2 * radius
    # What is proved holds, and is attained: the law has two points.
    low, high = bounds.lse_interval(q, moments, scale=1.0)
    assert low.item() <= exact.lse.item() <= high.item()
    assert (high - guess.lse).item() < 1.001 * gap
    assert error <= bounds.value_error(q, moments, guess.out, scale=1.0).item()


def test_correction_may_be_worse_than_plain_eviction_and_the_certificate_says_so():
    """Against "always at least as accurate as plain eviction": docs/derivations/correction.md#when."""
    q, k, v = np.ones((1, 1, 1)), np.array([[[0.0], [-3.0], [3.0]]]), np.array([[[0.0], [1.0], [0.0]]])
    exact, retained = oracle.attend(q, k, v, 1.0).out, attend(q, k[:, :1], v[:, :1], scale=1.0)
    moments = Moments.from_tokens(k[:, 1:], v[:, 1:], order=2, extent=True)
    state, bound = correct(retained, q, moments, scale=1.0, certify=True)
    plain, corrected = abs(retained.out - exact).item(), abs(state.out - exact).item()
    assert corrected > 100 * plain
    assert corrected <= bound.item()
    assert plain <= bounds.output_error(retained, q, moments, retained.out, scale=1.0).item()


def test_mass_from_range_is_mass_from_the_largest_variance():
    low, high = -np.asarray([1e-3, 1.0, 5.0, 50.0]), np.asarray([2.0, 1e-3, 40.0, 100.0])
    logits, widest = bounds.Interval(low, high), np.sqrt(-low * high)
    one = bounds.mass_from_range(logits).high
    other = bounds.mass_from_variance(logits, bounds.Interval(widest, widest)).high
    np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("correction", ["moments", "summaries"])
@pytest.mark.parametrize("certify", [0, 1, 2])
@pytest.mark.parametrize("budget", [40, [40, 60]], ids=["one", "heads"])
def test_trust_dominates_the_error_of_a_long_decode(correction: str, certify: int, budget: int | list[int]):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 160, 4)).astype(np.float32) for heads in (4, 2, 2))
    k = 0.3 * k
    cache = LayerCache(budget, window=8, block=8, correction=correction, certify=certify)
    cache.step(q[:, :, :100], k[:, :, :100], v[:, :, :100])
    for t in range(100, 160):
        cache.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    probe = rng.standard_normal((1, 4, 5, 4)).astype(np.float32)
    report = trust(cache, probe)
    exact = oracle.attend(probe, k, v)
    # What the cache answers, without the probe's own token.
    expansion = cache.config.correction.expansion(cache.moments)
    out, _ = get_backend("numpy").decode(probe, cache.state.tiers(), expansion, scale=cache.attention_scale)
    error = np.linalg.norm(out - exact.out, axis=-1) / np.linalg.norm(out, axis=-1)
    assert report.certified.shape == report.estimated.shape == error.shape
    assert (error <= report.certified).all()
    assert np.isfinite(report.certified).all()
    assert (report.estimated > 0).all()


def test_trust_in_heads_is_that_in_each_head_alone():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, 100, 4)) for heads in (4, 2, 2))
    probe = rng.standard_normal((1, 4, 3, 4))
    cache = LayerCache([40, 60], window=8, block=8, certify=2)
    cache.step(q, 0.3 * k, v)
    report = trust(cache, probe)
    for head, budget in enumerate((40, 60)):
        alone, own = LayerCache(budget, window=8, block=8, certify=2), slice(2 * head, 2 * head + 2)
        alone.step(q[:, own], 0.3 * k[:, head : head + 1], v[:, head : head + 1])
        expected = trust(alone, probe[:, own])
        np.testing.assert_allclose(report.estimated[:, own], expected.estimated, rtol=1e-9)
        # Rounding is bounded by the number of slots, and a head may show more of them than it has tokens.
        np.testing.assert_allclose(report.certified[:, own], expected.certified, rtol=1e-6)


def test_a_cache_with_tolerance_refuses_what_it_cannot_certify():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 100, 4)) for _ in range(3))
    strict = LayerCache(40, window=8, block=8, certify=2, tolerance=1e-3)
    with pytest.warns(UserWarning, match="an eviction was refused"):
        strict.step(q, k, v)
    assert (strict.stored, strict.budget, strict.refused) == (100, 100, 1)
    for t in range(20):  # no second warning: warnings are errors here
        strict.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert strict.stored == 120
    assert strict.refused > 1
    easy = LayerCache(40, window=8, block=8, certify=2, tolerance=0.5)
    easy.step(q, 0.01 * k, v)
    assert (easy.stored, easy.refused) == (40, 0)
    np.testing.assert_array_equal(easy.evidence.weight, easy.moments.weight)


def test_each_head_refuses_for_itself():
    """A head whose keys hardly differ evicts; one that cannot be certified keeps its tokens, and its budget grows."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 100, 4)) for _ in range(3))
    k[:, 1] *= 1e-5
    settings = {"window": 8, "block": 8, "certify": 2, "tolerance": 1e-3}
    cache, alone = LayerCache(40, **settings), LayerCache(40, **settings)
    with pytest.warns(UserWarning, match="an eviction was refused"):
        cache.step(q[:, :, :60], k[:, :, :60], v[:, :, :60])
    alone.step(q[:, 1:, :60], k[:, 1:, :60], v[:, 1:, :60])
    assert (cache.budget, cache.stored_by_head, cache.refused) == ([60, 40], [60, 40], 1)
    assert cache.moments.weight.tolist() == cache.evidence.weight.tolist() == [[0.0, 20.0]]
    for t in range(60, 100):
        x = [part[:, :, t : t + 1] for part in (q, k, v)]
        out = cache.step(*x)
        np.testing.assert_allclose(out[:, 1:], alone.step(*(part[:, 1:] for part in x)), rtol=1e-9)
        exact = oracle.attend(x[0][:, :1], k[:, :1, : t + 1], v[:, :1, : t + 1]).out
        np.testing.assert_allclose(out[:, :1], exact, rtol=1e-9, atol=1e-12)
    assert cache.budget == [100, 40]
    assert alone.refused == 0
    assert cache.positions[0, 0].tolist() == list(range(100))
    held = cache.positions[0, 1]
    assert held[held >= 0].tolist() == alone.positions[0, 0].tolist()


@pytest.mark.parametrize("budget", [40, [40, 42]], ids=["one", "heads"])
def test_an_eviction_while_decoding_is_judged_by_the_queries_before_it(budget: int | list[int]):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 2, 60, 4)) for _ in range(3))
    cache = LayerCache(budget, window=8, block=4, certify=2, tolerance=1e-3)
    cache.step(q[:, :, :30], k[:, :, :30], v[:, :, :30])  # within the budget: nothing to judge

    def decode() -> None:
        for t in range(30, 60):
            cache.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])

    with pytest.warns(UserWarning, match="an eviction was refused"):
        decode()
    assert cache.refused > 0
    assert cache.stored_by_head == [60, 60]
    np.testing.assert_array_equal(cache.state.recent_queries, q[:, :, -32:])


def test_state_errors_are_attained_within_reason():
    """Worst-case rounding is far above the usual one, but not by orders that would hide a mistake."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((1, 500, 4)).astype(np.float32), rng.standard_normal((1, 500, 4)).astype(np.float32)
    state = Moments.from_tokens(k, v, extent=True)
    assert state_error(state.extent).key_mean.item() < 1e-3


def test_a_million_tokens_folded_block_by_block_in_float32():
    """Relative to the size of each array, 1e-5 of the float64 batch."""
    rng = np.random.default_rng(0)
    n, block = 1_000_000, 500
    k, v = (1 + rng.standard_normal((1, n, 4), dtype=np.float32) for _ in range(2))
    state = Moments.empty(k, v, order=2, extent=True)
    for start in range(0, n, block):
        state = state.update(k[:, start : start + block], v[:, start : start + block])
    batch = Moments.from_tokens(k.astype(np.float64), v.astype(np.float64), order=2)
    for name in ("weight", "key_mean", "value_mean", "value_key", "key_key"):
        one, other = getattr(state, name), getattr(batch, name)
        scale = np.abs(batch.key_key).max() if name == "value_key" else np.abs(other).max()
        assert np.abs(one - other).max() <= 1e-5 * scale, name
    error = state_error(state.extent)
    assert np.linalg.norm(state.key_mean - batch.key_mean) <= error.key_mean.item()


def test_a_merge_tree_of_ten_thousand_leaves_in_float32():
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((10_000, 1, 4), dtype=np.float32) for _ in range(2))
    anchors = Moments.from_tokens(k[:1, :], v[:1, :], order=2, extent=True).extent
    leaves = Moments.from_tokens(k, v, order=2, extent=anchors.map(lambda x: np.repeat(x, 10_000, axis=0)))
    level = leaves
    while level.weight.shape[0] > 1:
        level = halved(level)
    batch = Moments.from_tokens(k.astype(np.float64)[:, 0][None], v.astype(np.float64)[:, 0][None], order=2)
    assert level.weight.item() == 10_000
    for name in ("key_mean", "value_mean", "value_key", "key_key"):
        scale = np.abs(batch.key_key).max() if name in ("value_key", "key_key") else 1.0
        assert np.abs(getattr(level, name) - getattr(batch, name)).max() <= 1e-5 * scale, name
    assert math.isclose(level.extent.merges.item(), 14)


def halved(level: Moments) -> Moments:
    """Neighbours merged; an odd one out is carried to the next level."""
    count = level.weight.shape[0]
    merged = level.map(lambda x: x[0 : count - count % 2 : 2]).merge(level.map(lambda x: x[1:count:2]))
    if count % 2 == 0:
        return merged
    last = iter([x[-1:] for x in level.arrays().values()])
    return merged.map(lambda x: np.concatenate([x, next(last)]))
