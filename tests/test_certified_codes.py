"""Certificates of caches whose retained tokens are in few bits: the code's part is in them, by every road."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import LayerCache
from momentkv.backends import get_backend
from momentkv.bounds.rounding import code_error
from momentkv.cache.losses import EVICTED, STORED
from momentkv.codes import BITS, MOST, Standard, decode, encode
from momentkv.testing import oracle
from momentkv.trust import trust, trust_of

D, DV, ROWS, KV_HEADS, Q_HEADS = 8, 4, 2, 2, 4
SETTINGS: dict[str, Any] = {"sinks": 1, "window": 4, "exact_window": 1, "block": 4, "certify": 2}
STREAMS = ("even", "channels", "shift", "outlier", "clipped", "constant", "edges")


def stream(kind: str, n: int, seed: int, dtype: Any = np.float64) -> list[np.ndarray]:
    """Queries, keys and values that codes find easy, or hard in one way."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(ROWS, heads, n, d)) for heads, d in ((Q_HEADS, D), (KV_HEADS, D), (KV_HEADS, DV)))
    k = 0.3 * k
    if kind == "channels":
        k, v = k * np.exp(2 * rng.normal(size=D)) + 5 * rng.normal(size=D), v * np.exp(2 * rng.normal(size=DV))
    elif kind == "shift":
        k = k + np.linspace(0, 8, n)[:, None] * rng.normal(size=D)
    elif kind == "outlier":
        k[..., n // 2, :] *= 100
        v[..., n // 2, :] *= 100
    elif kind == "clipped":
        k[..., n // 3, 0] += 1e9
    elif kind == "constant":
        k, v = k * (np.arange(D) % 2) + 1, v * 0 + 1
    elif kind == "edges":  # all that lies between two levels falls on the same side
        k = np.sign(k) * np.where(np.arange(D) == 0, 1.0, 0.499)
    return [x.astype(dtype) for x in (q, k, v)]


def parts(n: int, first: int, chunk: int) -> list[slice]:
    """A prefill, a chunk, and the rest token by token."""
    middle = min(n, first + chunk)
    rest = [slice(at, at + 1) for at in range(middle, n)]
    return [x for x in (slice(0, first), slice(first, middle), *rest) if x.stop > x.start]


def error_of(cache: LayerCache, probe: np.ndarray, k: np.ndarray, v: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Of what the cache answers, from its codes, to queries that see all tokens; relative to that answer."""
    expansion = cache.config.correction.expansion(cache.moments) if cache.has_evicted else None
    out, _ = get_backend("numpy").decode(probe, cache.state.tiers(), expansion, scale=cache.attention_scale)
    exact = oracle.attend(probe, k, v, mask=valid[:, None, None, None, :]).out
    return np.linalg.norm(oracle.f64(out) - exact, axis=-1) / np.linalg.norm(oracle.f64(out), axis=-1)


@given(
    kind=st.sampled_from(STREAMS),
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
    seed=st.integers(0, 10_000),
    first=st.integers(1, 24),
    chunk=st.integers(0, 12),
    padding=st.integers(0, 6),
    budget=st.sampled_from([8, (7, 12), 20]),
    taken=st.integers(0, 4),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.sampled_from([0, 1, 2]),
)
def test_the_certificate_dominates_the_error_of_a_cache_of_codes(
    kind: str,
    bits: Any,
    seed: int,
    first: int,
    chunk: int,
    padding: int,
    budget: Any,
    taken: int,
    dtype: Any,
    order: int,
):
    n = 30
    q, k, v = stream(kind, n, seed, dtype)
    valid = np.arange(n) >= np.asarray([[0], [min(padding, first - 1)]])
    cache = LayerCache(budget, bits=bits, correction="summaries", **SETTINGS | {"certify": order})
    for part in parts(n, first, chunk):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :], valid=valid[:, None, part])
    seen = n - taken
    if taken:
        cache.drop(taken)
    probe = np.random.default_rng(seed + 1).normal(size=(ROWS, Q_HEADS, 3, D)).astype(dtype)
    report = trust(cache, probe)
    error = error_of(cache, probe, k[..., :seen, :], v[..., :seen, :], valid[:, :seen])
    assert (error <= report.certified).all()
    assert not np.isnan(report.certified).any()
    assert (report.estimated >= 0).all()


def test_without_the_part_of_codes_the_certificate_would_be_none():
    q, k, v = stream("even", 48, 0)
    cache = LayerCache(24, bits=3, **SETTINGS)
    for part in parts(48, 30, 0):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
    tight = 1e-3 * k  # of which evidence proves nearly all
    cache.reset()
    for part in parts(48, 30, 0):
        cache.step(q[..., part, :], tight[..., part, :], v[..., part, :])
    probe, view = q[..., -3:, :], cache.view()
    error = error_of(cache, probe, tight, v, np.ones((ROWS, 48), dtype=bool))
    unaware = trust_of(
        cache.config, probe, view.keys, view.values, view.positions, cache.state.evicted, cache.state.evidence,
        scale=cache.attention_scale,
    )  # fmt: skip
    assert (error > unaware.certified).any()
    assert (error <= trust(cache, probe).certified).all()


def test_what_was_evicted_from_codes_is_remembered_after_it_has_gone():
    """Its evidence is of what was read back."""
    q, k, v = stream("even", 60, 1)
    cache = LayerCache(10, bits=3, **SETTINGS)
    cache.step(q[..., :40, :], k[..., :40, :], v[..., :40, :])
    assert (cache.state.key_loss[..., EVICTED, :] == 0).all()  # all that went had come in the same pass
    for at in range(40, 60):
        cache.step(*(x[..., at : at + 1, :] for x in (q, k, v)))
    assert (cache.state.key_loss[..., EVICTED, :] > 0).all()
    assert (cache.state.value_loss[..., EVICTED, :] > 0).all()
    assert (cache.state.key_loss[..., STORED, :] == 0).all()


def test_what_is_coded_twice_has_lost_twice():
    """Standards are taken when tokens are first packed, and anew at the first eviction."""
    q, k, v = stream("even", 60, 2)
    cache = LayerCache(20, bits=3, **SETTINGS)
    for part in parts(60, 12, 0):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
        if not cache.has_evicted:
            assert (cache.state.key_loss[..., STORED, :] == 0).all()
    assert (cache.state.key_loss[..., STORED, :] > 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-30, 1e-5, 1.0, 1e6]))
def test_no_channel_is_farther_off_than_its_step_says(bits: int, dtype: str, seed: int, size: float):
    rng = np.random.default_rng(seed)
    x = (size * (rng.standard_t(2, size=(20, D)) * np.exp(2 * rng.normal(size=D)) + 5 * rng.normal(size=D))).astype(
        dtype
    )
    standard = Standard.of(x)
    codes, step = encode(x, standard, bits)
    read = decode(codes, step, standard, bits).astype(dtype)
    off = np.abs(read.astype(float) - x.astype(float))
    bound = np.stack([code_error(one, standard, bits, stored=x.dtype) for one in step])
    assert (off <= bound).all()
    assert np.isfinite(bound[step.astype(float) < MOST]).all()
    assert code_error(np.zeros(()), standard, bits, stored=x.dtype).max() == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [3, 8, 16])
def test_tokens_kept_in_half_precision_are_certified_too(dtype: str, bits: int):
    lib: Library = LIBRARIES["torch"]
    q, k, v = (lib.asarray(x, dtype) for x in stream("channels", 60, 3))
    cache = LayerCache(16, bits=bits, **SETTINGS)
    for part in parts(60, 40, 0):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
    report, view = trust(cache, q[..., -3:, :]), cache.view()
    wide = [lib.numpy(x).astype(float) for x in (q[..., -3:, :], k, v)]
    exact = oracle.attend(*wide).out
    shown = [lib.numpy(x).astype(float) for x in (view.keys, view.values)]
    state, _ = get_backend("numpy").attend(wide[0], *shown, scale=cache.attention_scale)
    out = get_backend("numpy").correct(
        state, wide[0], cache.moments.map(lambda x: lib.numpy(x).astype(float)).expansion(), scale=cache.attention_scale
    )
    error = np.linalg.norm(out - exact, axis=-1) / np.linalg.norm(out, axis=-1)
    assert (error <= lib.numpy(report.certified).astype(float)).all()


def test_trust_says_the_same_on_every_library(backend: Library):
    q, k, v = stream("channels", 40, 4)
    cache, plain = (LayerCache((12, 16), bits=(5, 3), **SETTINGS) for _ in range(2))
    cache.step(*(backend.asarray(x) for x in (q, k, v)))
    plain.step(q, k, v)
    report, expected = trust(cache, backend.asarray(q[..., -2:, :])), trust(plain, q[..., -2:, :])
    for one, other in zip(report, expected, strict=True):  # array-api-strict has no steps of 16 bits
        np.testing.assert_allclose(backend.numpy(one), other, rtol=2**-8)


def test_an_eviction_is_judged_by_the_codes_that_it_would_leave():
    """A head of large values refuses for what codes lose, where the same in full precision evicts."""
    q, k, v = stream("even", 60, 5)
    settings = SETTINGS | {"tolerance": 0.2}
    whole, fine = LayerCache(24, **settings), LayerCache(24, bits=16, **settings)
    coarse = LayerCache(24, bits=3, **settings)
    given = (q, 0.02 * k, v + 10)
    assert np.isfinite(whole.step(*given)).all()
    fine.step(*given)
    with pytest.warns(UserWarning, match="an eviction was refused"):
        coarse.step(*given)
    assert (whole.refused, fine.refused, coarse.refused) == (0, 0, 1)
    assert coarse.stored == 60


def test_a_row_that_is_not_finite_certifies_nothing_and_leaves_the_others_alone():
    q, k, v = stream("even", 60, 6)
    clean = LayerCache(12, bits=4, **SETTINGS)
    cache = LayerCache(12, bits=4, **SETTINGS)
    for part in parts(60, 30, 0):
        clean.step(q[..., part, :], k[..., part, :], v[..., part, :])
    k[1, 0, 20] = np.nan
    for part in parts(60, 30, 0):
        cache.step(q[..., part, :], k[..., part, :], v[..., part, :])
    report, expected = trust(cache, q[..., -2:, :]), trust(clean, q[..., -2:, :])
    np.testing.assert_allclose(report.certified[0], expected.certified[0], rtol=1e-12)
    np.testing.assert_allclose(report.certified[1, 2:], expected.certified[1, 2:], rtol=1e-12)
    assert np.isnan(report.certified[1, :2]).all()


def test_losses_are_counted_and_copied_with_the_state():
    q, k, v = stream("even", 40, 7)
    cache = LayerCache(12, bits=4, **SETTINGS)
    cache.step(q, k, v)
    held, without = cache.arrays(), dataclasses.replace(cache.state, key_loss=None, value_loss=None)
    assert held["key_loss"].shape == (ROWS, KV_HEADS, 2, D)
    assert cache.nbytes - without.nbytes == ROWS * KV_HEADS * 2 * (D + DV) * 8
    before = trust(cache, q[..., -2:, :])
    cache.map(lambda x: x[::-1])
    np.testing.assert_allclose(trust(cache, q[::-1, :, -2:]).certified, before.certified[::-1], rtol=1e-12)
