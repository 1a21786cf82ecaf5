"""Modes of the library that a caller may be in, and tokens that wait in static steps, padding that judges, and such."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, Library

from momentkv import LayerCache
from momentkv.attention import attend
from momentkv.statistics.moments import Moments
from momentkv.trust import trust

SIZES: dict[str, Any] = {"sinks": 1, "window": 4, "block": 4}
D = 8


def parts(lengths: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """Queries, keys and values of passes of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, heads, n, D, generator=generator).to(dtype) for heads in (4, 2, 2)] for n in lengths]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"correction": "summaries"},
        {"bits": 4},
        {"certify": 2},
        {"order": None},
        {"policy": "h2o"},
        {"policy": "tova"},
    ],
    ids=str,
)
@pytest.mark.parametrize("static", [False, True])
def test_steps_do_not_mind_autocast(settings: dict[str, Any], static: bool):
    """A product in bfloat16 would lose half of what a correction gives, and its moments would fit no others."""
    if static and "certify" in settings:
        pytest.skip("certificates decide on the host")
    given, alone = (LayerCache(20, static=static, **SIZES, **settings) for _ in range(2))
    for q, k, v in parts((60, *[1] * 20, 5, *[1] * 8)):
        expected = alone.step(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            out = given.step(q, k, v)
        assert out.dtype == torch.float32
        if q.shape[-2] < 60:  # a prefill is as the caller has it
            assert torch.equal(out, expected)
    for name, x in alone.arrays().items():
        assert torch.equal(given.arrays()[name], x), name


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("filled", [60, 61, 75])
def test_what_inference_mode_made_may_be_used_after_it(static: bool, filled: int):
    steps = parts((50, *[1] * 40))
    mixed, alone = (LayerCache(20, static=static, **SIZES) for _ in range(2))
    for step, (q, k, v) in enumerate(steps):
        expected = alone.step(q, k, v)
        with torch.inference_mode(50 + step < filled):
            out = mixed.step(q, k, v)
        assert torch.equal(out, expected)
    assert not any(x.is_inference() for x in mixed.arrays().values())


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("between", ["append", "attend"])
def test_tokens_that_wait_in_static_steps_are_not_replaced(library: str, between: str):
    backend: Library = LIBRARIES[library]
    caches = [LayerCache(100, static=static, **SIZES) for static in (False, True)]
    outs = []
    for cache in caches:
        first, some, one = ([backend.asarray(x.numpy()) for x in part] for part in parts((10, 3, 1)))
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
    prefill, *steps = parts((60, *[1] * 12))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("seed", range(5))
def test_a_certificate_counts_what_short_dtypes_lose(dtype: torch.dtype, seed: int):
    """Nothing is evicted, so that rounding is all there is; the truth is attention over the same numbers in float64."""
    cache = LayerCache(200, certify=2, **SIZES)
    for q, k, v in parts((40, 1, 3, 1), seed, dtype):
        out = cache.step(q, k, v)
    exact = attend(q.double(), cache.keys.double(), cache.values.double()).out[..., -1:, :]
    error = (out[..., -1:, :].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    certified = trust(cache, q[..., -1:, :]).certified
    assert (error <= certified).all()
    assert (certified <= 20 * max(torch.finfo(dtype).eps, 1e-4)).all()


def test_a_cache_all_of_whose_tokens_were_dropped_errs_nowhere():
    cache = LayerCache(40, certify=2, **SIZES)
    q, k, v = parts((20,))[0]
    cache.step(q, k, v)
    cache.drop(20)
    assert trust(cache, q).certified.tolist() == trust(cache, q).estimated.tolist() == torch.zeros(1, 4, 20).tolist()


@pytest.mark.parametrize("loud", [1.0, 1e3])
def test_queries_of_padding_judge_no_eviction(loud: float):
    """Of a row padded at the left, and at a token while it decodes."""
    cache, alone = (LayerCache(12, certify=2, tolerance=0.5, **SIZES) for _ in range(2))
    (q, k, v), *steps = parts((40, *[1] * 12))
    q, k, v = 0.1 * q, 0.1 * k, v
    valid = torch.arange(40) >= 15
    q[..., :15, :] = loud
    cache.step(q, k, v, valid=valid)
    alone.step(*(x[..., 15:, :] for x in (q, k, v)))
    for number, (q, k, v) in enumerate(steps):
        if number == 3:
            cache.step(torch.full_like(q, loud), k, v, valid=torch.zeros(1, dtype=torch.bool))
            continue
        cache.step(0.1 * q, 0.1 * k, v)
        alone.step(0.1 * q, 0.1 * k, v)
    assert cache.budgets == alone.budgets
    assert cache.refused == alone.refused


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mean_of_many_tokens_keeps_its_digits(library: str):
    """Sums of a hundred thousand numbers one after the other lose them, far from zero the most."""
    backend: Library = LIBRARIES[library]
    rng = np.random.default_rng(0)
    k, v = (101 + 0.5 * rng.standard_normal((1, 200_000, 3)) for _ in range(2))
    moments = Moments.from_tokens(*(backend.asarray(x.astype(np.float32)) for x in (k, v)), order=2)
    whole = Moments.from_tokens(
        k.astype(np.float32).astype(np.float64), v.astype(np.float32).astype(np.float64), order=2
    )
    for name, limit in (("key_mean", 1e-6), ("value_mean", 1e-6), ("key_key", 1e-3)):
        exact = getattr(whole, name)
        assert np.abs(backend.numpy(getattr(moments, name)) - exact).max() <= limit * np.abs(exact).max(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_head_that_has_faded_is_empty_before_its_weight_loses_digits(dtype: type):
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 2, 30, 4)).astype(dtype) for _ in range(2))
    limits = np.finfo(dtype)
    moments = Moments.from_tokens(k, v, order=2, extent=True)
    weights = [moments.weight]
    for _ in range(12_000):
        moments = moments.decay(np.asarray([0.9, 1.0], dtype=dtype))
        weights.append(moments.weight)
        if not moments.weight[0, 0]:
            break
    fading = np.stack(weights)[:, 0, 0]
    least = limits.smallest_normal / limits.eps
    assert fading[-1] == 0 < least <= fading[-2] < 2 * least
    for before, after in itertools.pairwise(fading[:-1]):
        assert abs(after - before * dtype(0.9)) <= limits.eps * after
    assert moments.weight[0, 1] == 30
    assert moments.expansion().log_weight[0, 0, 0] == -math.inf


def test_factors_and_weights_that_do_not_fit_are_refused():
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((1, 2, 6, 4)).astype(np.float32) for _ in range(2))
    moments = Moments.from_tokens(k, v)
    for gamma in (np.ones((5, 1, 2)), np.ones((3, 2)), np.ones(3)):
        with pytest.raises(ValueError, match=r"gamma has shape .* broadcast to \(1, 2\)"):
            moments.decay(gamma.astype(np.float32))
    with pytest.raises(ValueError, match="weights has a sum that is no number of float32"):
        Moments.from_tokens(k, v, weights=np.full(6, 3e38, dtype=np.float32))
