"""Arguments of the core that fit nothing: each gets an error that names it, what it is, and what to do.

Most of these gave numbers that meant nothing, the others an error from within.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, Library

from momentkv import AttentionState, LayerCache, Moments, attend, bounds, correct, distributed, estimate, merge
from momentkv.codes import BITS, Standard, decode, encode, pack, unpack
from momentkv.diagnostics import eviction_error
from momentkv.plan import plan
from momentkv.shapes import KNOWN, Shape, find_shape, shape_from_config
from momentkv.statistics.corrections import AnchoredSummaries, PaperMoments, get_correction
from momentkv.statistics.summaries import QueryWindow, Summaries, estimate_summaries
from momentkv.testing import check_backend, check_library
from momentkv.testing.rounding import assert_same
from momentkv.trust import estimated_error, trust

Calls = dict[str, tuple[Callable[[], Any], type[Exception], str]]
RNG = np.random.default_rng(0)
Q, K, V = RNG.standard_normal((4, 3, 4)), RNG.standard_normal((2, 6, 4)), RNG.standard_normal((2, 6, 2))
STATE = attend(Q, K, V)
MOMENTS = Moments.from_tokens(K, V, order=2, extent=True)
PARTS = MOMENTS.map(lambda x: np.stack([x, x], axis=1))
WINDOW = QueryWindow.from_queries(Q, 2)
SUMMARIES = Summaries.empty(K, V).update(K, V, WINDOW)
X = RNG.standard_normal((5, 16))
STANDARD = Standard.of(X)
GRADED = STANDARD.graded(4, np.ones(16))
ARRAY = np.asarray([1, 1])


def check(calls: Calls, name: str) -> None:
    call, error, message = calls[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


# Outputs, lse and estimates that are not of the queries, or not of the values: what is wrong with each.
SHAPES: dict[str, Callable[[Any], Any]] = {
    "one value": lambda x: x[..., :1],
    "one token": lambda x: x[:, :1, :],
    "one head": lambda x: x[:1, :, :],
    "fewer heads": lambda x: x[:2, :, :],
    "fewer tokens": lambda x: x[:, :2, :],
}


# An lse has no values.
PLACES = [(name, shape) for name in ("retained.out", "output", "estimate") for shape in SHAPES]
PLACES += [("retained.lse", shape) for shape in SHAPES if shape != "one value"]


@pytest.mark.parametrize(("name", "shape"), PLACES)
def test_outputs_of_other_shapes_are_refused_by_name(backend: Library, name: str, shape: str):
    """Most would broadcast, and get a bound."""
    q, k, v = (backend.asarray(x) for x in (Q, K, V))
    moments, parts = (x.map(lambda x: backend.asarray(np.asarray(x))) for x in (MOMENTS, PARTS))
    state = attend(q, k, v)
    out, bad = state.out, SHAPES[shape](state.out)
    if name == "retained.lse":
        state = AttentionState(out, SHAPES[shape](state.lse[..., None])[..., 0])
        bad = state.lse
    elif name == "retained.out":
        state = AttentionState(bad, state.lse)
    calls: list[Callable[[], Any]] = []
    if name == "estimate":
        calls = [lambda: bounds.value_error(q, moments, bad)]
    else:
        wrong = bad if name == "output" else out
        calls += [lambda: bounds.output_error(state, q, moments, wrong)]
        calls += [lambda: bounds.output_error_of_parts(state, q, parts, wrong)]
    if name.startswith("retained"):
        calls += [lambda: correct(state, q, moments), lambda: estimated_error(state, q, moments)]
    for call in calls:
        with pytest.raises(ValueError, match=r"has shape .* must be") as caught:
            call()
        assert f"{name} has" in str(caught.value)
        assert str(tuple(bad.shape)) in str(caught.value)


@pytest.mark.parametrize("shape", SHAPES)
def test_states_of_other_shapes_do_not_merge(backend: Library, shape: str):
    q, k, v = (backend.asarray(x) for x in (Q, K, V))
    state = attend(q, k, v)
    with pytest.raises(ValueError, match=r"[ab]\.out has shape .* but .* has .* must be"):
        merge(state, AttentionState(SHAPES[shape](state.out), state.lse))
    both = AttentionState(SHAPES[shape](state.out), SHAPES[shape](state.lse[..., None])[..., 0])
    if shape in ("one token", "one head"):  # documented to broadcast
        assert tuple(merge(state, both).out.shape) == tuple(state.out.shape)
        return
    with pytest.raises(ValueError, match=r"a\.out has shape .* same queries"):
        merge(state, both)


@pytest.mark.parametrize("scale", ["a", ARRAY, np.asarray(0.5), math.nan, math.inf, -1.0, 0, 1j], ids=str)
def test_a_factor_that_is_none_is_refused_by_name(scale: Any):
    calls: list[Callable[[], Any]] = [
        lambda: attend(Q, K, V, scale=scale),
        lambda: estimate(Q, MOMENTS, scale=scale),
        lambda: correct(STATE, Q, MOMENTS, scale=scale),
        lambda: estimate_summaries(Q, SUMMARIES, scale=scale),
        lambda: SUMMARIES.calibrate(Q, K, scale=scale),
        lambda: QueryWindow.from_queries(Q, 2, scale=scale),
        lambda: bounds.read(Q, MOMENTS, scale=scale),
        lambda: bounds.lse_interval(Q, MOMENTS, scale=scale),
        lambda: bounds.value_error(Q, MOMENTS, STATE.out, scale=scale),
        lambda: bounds.output_error(STATE, Q, MOMENTS, STATE.out, scale=scale),
        lambda: bounds.output_error_of_parts(STATE, Q, PARTS, STATE.out, scale=scale),
        lambda: eviction_error(Q, K, V, np.arange(6) < 2, scale=scale),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"scale is {re.escape(repr(scale))}; use a positive, finite factor"):
            call()


OF_MOMENTS: Calls = {
    "extent None": (lambda: Moments.from_tokens(K, V, extent=None), TypeError, "extent is None, a NoneType; use True"),
    "extent of NumPy": (lambda: Moments.from_tokens(K, V, extent=np.False_), TypeError, "extent is np.False_"),
    "extent no": (lambda: Moments.empty(K, V, extent="no"), TypeError, "extent is 'no', a str; use True, False, or"),
    "extent of moments": (lambda: Moments.from_tokens(K, V, extent=MOMENTS), TypeError, "a Moments; use True, False"),
    "order": (lambda: Moments.from_tokens(K, V, order=ARRAY), ValueError, "order is array([1, 1]); use 0"),
    "weights": (lambda: Moments.from_tokens(K, V, weights=np.ones(6) * 1j), ValueError, "weights is complex128"),
    "anchor NaN": (lambda: Moments.from_tokens(K, V, anchor=np.full(4, np.nan)), ValueError, "anchor has an entry"),
    "anchor inf": (lambda: Moments.from_tokens(K, V, anchor=np.full(4, -np.inf)), ValueError, "anchor has an entry"),
    "rotate, None": (lambda: MOMENTS.rotate(None), TypeError, "rotation is a NoneType; pass an array"),
    "rotate, list": (lambda: MOMENTS.rotate(np.eye(4).tolist()), TypeError, "rotation is a list; pass an array"),
    "rotate, bool": (lambda: MOMENTS.rotate(np.eye(4) > 0), ValueError, "rotation is bool of shape (4, 4); it must"),
    "rotate, int": (lambda: MOMENTS.rotate(np.eye(4, dtype=int)), ValueError, "rotation is int64 of shape (4, 4)"),
    "rotate, heads": (lambda: MOMENTS.rotate(np.stack([np.eye(4)] * 3)), ValueError, "rotation has shape (3, 4, 4)"),
    "rotate, more axes": (lambda: MOMENTS.rotate(np.ones((1, 1, 4, 4))), ValueError, "rotation has shape (1, 1, 4, 4)"),
    "estimate, order": (lambda: estimate(Q, MOMENTS, order=ARRAY), ValueError, "order is array([1, 1]); use 0"),
    "estimate, strength": (
        lambda: estimate(Q, MOMENTS, strength="a"),
        TypeError,
        "strength is 'a', a str; use a number",
    ),
    "estimate, strengths": (lambda: estimate(Q, MOMENTS, strength=ARRAY), TypeError, "strength is array([1, 1])"),
    "correct, order": (lambda: correct(STATE, Q, MOMENTS, order=ARRAY), ValueError, "order is array([1, 1]); use 0"),
    "correct, summaries": (
        lambda: correct(STATE, Q, SUMMARIES, order=ARRAY),
        ValueError,
        "order is [1 1] and strength",
    ),
    "certify": (lambda: correct(STATE, Q, MOMENTS, certify="no"), TypeError, "certify is 'no'; use True or False"),
    "certify None": (lambda: correct(STATE, Q, MOMENTS, certify=None), TypeError, "certify is None; use True or False"),
    "rank 1.5": (lambda: bounds.compact_slope(MOMENTS, 1.5), TypeError, "rank is 1.5, a float; use a whole number"),
    "rank None": (lambda: bounds.compact_slope(MOMENTS, None), TypeError, "rank is None, a NoneType; use a whole"),
    "rank True": (lambda: bounds.compact_slope(MOMENTS, True), TypeError, "rank is True; use a whole number"),
    "slope of None": (lambda: bounds.compact_slope(None, 1), TypeError, "moments is a NoneType; use Moments"),
    "slope": (
        lambda: bounds.output_error(STATE, Q, MOMENTS, STATE.out, slope=(1, 2, 3)),
        TypeError,
        "slope is a tuple; use CompactSlope",
    ),
    "parts": (
        lambda: bounds.output_error_of_parts(STATE, Q, MOMENTS, STATE.out),
        ValueError,
        "parts has weights of shape (2,) but q has shape (4, 3, 4); moments of parts have the axes",
    ),
    # Whose batch would be taken for heads.
    "parts of a batch": (
        lambda: bounds.output_error_of_parts(
            AttentionState(STATE.out[None], STATE.lse[None]), Q[None], MOMENTS.map(lambda x: x[None]), STATE.out[None]
        ),
        ValueError,
        "parts has weights of shape (1, 2) but q has shape (1, 4, 3, 4)",
    ),
    "parts of other keys": (
        lambda: bounds.output_error_of_parts(STATE, Q[..., :3], PARTS, STATE.out),
        ValueError,
        "q has shape (4, 3, 3); it must be (..., q_head, q_len, 4)",
    ),
    "no dimension": (lambda: attend(Q[..., :0], K[..., :0], V), ValueError, "the head dimension is 0"),
    "trust": (lambda: trust(None, Q), TypeError, "cache is a NoneType; use a LayerCache made with certify="),
    "moments' order": (lambda: PaperMoments(order=ARRAY), ValueError, "order is array([1, 1]); use 1"),
}


@pytest.mark.parametrize("name", OF_MOMENTS)
def test_moments_and_bounds_refuse_by_name(name: str):
    check(OF_MOMENTS, name)


OF_QUERIES: Calls = {
    "no queries": (lambda: QueryWindow.from_queries(Q[:, :0], 2), ValueError, "q has shape (4, 0, 4); give at least"),
    "no heads": (lambda: QueryWindow.from_queries(Q[0], 2), ValueError, "q has shape (3, 4); give at least one query"),
    "KV heads": (lambda: QueryWindow.from_queries(Q, 2.0), TypeError, "kv_heads is 2.0, a float; use a whole number"),
    "negative heads": (lambda: QueryWindow.from_queries(Q, -1), ValueError, "no multiple of the -1 KV heads"),
    "summaries None": (lambda: estimate_summaries(Q, None), TypeError, "summaries is a NoneType; use Summaries"),
    "reanchor": (
        lambda: SUMMARIES.reanchor(np.ones(4)),
        ValueError,
        "anchor has shape (4,); give one for each KV head",
    ),
    "update": (lambda: SUMMARIES.update(K, V, window=None), TypeError, "window is a NoneType; use QueryWindow"),
    "merge": (lambda: SUMMARIES.merge(SUMMARIES, None), TypeError, "window is a NoneType; use QueryWindow"),
    "strength": (lambda: Summaries.empty(K, V, strength=None), TypeError, "strength is None, a NoneType; use a number"),
}


@pytest.mark.parametrize("name", OF_QUERIES)
def test_summaries_refuse_by_name(name: str):
    check(OF_QUERIES, name)


OF_CODES: Calls = {
    "channels": (lambda: encode(X[:, :1], STANDARD, 4), ValueError, "x has shape (5, 1) and the standard 16 channels"),
    "fewer": (lambda: encode(X[:, :8], STANDARD, 4), ValueError, "x has shape (5, 8) and the standard 16 channels"),
    "none": (
        lambda: encode(X[:, :0], Standard(None, np.ones(0)), 4),
        ValueError,
        "x has shape (5, 0) and the standard 0 channels",
    ),
    "standard": (lambda: encode(X, None, 4), TypeError, "standard is a NoneType; use Standard"),
    "list": (lambda: encode(X.tolist(), STANDARD, 4), TypeError, "x is a list; pass an array"),
    "graded": (lambda: encode(X, GRADED, 8), ValueError, "bits is 8, and the standard's channels are graded; use 3, 4"),
    "decode": (lambda: decode(*encode(X, GRADED, 4), GRADED, 8), ValueError, "bits is 8, and the standard's channels"),
    "decode bits": (lambda: decode(*encode(X, STANDARD, 4), STANDARD, 5), ValueError, "codes is uint8 of shape (5, 8)"),
    "decode channels": (
        lambda: decode(*encode(X, STANDARD, 4), Standard.of(X[:, :8]), 4),
        ValueError,
        "codes is uint8 of shape (5, 8); 8 codes of bits=4 are uint8 (..., 4)",
    ),
    "decode step": (
        lambda: decode(encode(X, STANDARD, 4)[0], np.ones(1, np.float16), STANDARD, 4),
        ValueError,
        "step has shape (1,), codes (5, 8); give one step for each token",
    ),
    "unpack": (
        lambda: unpack(np.ones(3, np.uint8), 4, 8),
        ValueError,
        "codes is uint8 of shape (3,); 8 codes of",
    ),
    "unpack signed": (
        lambda: unpack(np.ones(4, int), 4, 8),
        ValueError,
        "codes is int64 of shape (4,); 8 codes of",
    ),
    "negative": (lambda: pack(np.asarray([3, -1]), 4), ValueError, "codes has an entry -1; with bits=4 every code is"),
    "large": (
        lambda: pack(np.asarray([3, 16]), 4),
        ValueError,
        "codes has an entry 16; with bits=4 every code is from",
    ),
    "floats": (lambda: pack(np.ones(8), 4), ValueError, "codes is float64 of shape (8,); use whole numbers"),
    "one number": (
        lambda: pack(np.asarray(3), 4),
        ValueError,
        "codes is int64 of shape (); use whole numbers (..., d)",
    ),
}


@pytest.mark.parametrize("name", OF_CODES)
def test_codes_refuse_by_name(name: str):
    check(OF_CODES, name)


@pytest.mark.parametrize("bits", BITS)
def test_all_codes_of_so_many_bits_are_packed(backend: Library, bits: int):
    codes = np.asarray([0, 1, 2**bits - 2, 2**bits - 1], dtype=np.int32)
    given = backend.asarray(codes)
    assert backend.numpy(unpack(pack(given, bits), bits, 4)).tolist() == codes.tolist()
    assert tuple(pack(given[:0], bits).shape) == (0,)


def test_codes_that_jax_has_not_yet_are_packed():
    """Where numbers are not there yet, only types and shapes are looked at."""
    import jax

    packed = jax.jit(lambda x: pack(x, 4))(LIBRARIES["jax"].asarray(np.arange(4, dtype=np.int32)))
    assert packed.tolist() == pack(np.arange(4), 4).tolist()
    with pytest.raises(ValueError, match="codes is float32"):
        jax.jit(lambda x: pack(x, 4))(LIBRARIES["jax"].asarray(np.ones(4, dtype=np.float32)))


SIZES: dict[str, Any] = {"layers": 2, "kv_heads": 2, "q_heads": 4, "head_dim": 8}
OF_SHAPES: Calls = {
    **{
        f"Shape {name}": (
            lambda name=name: Shape(**{**SIZES, name: 1.5}),  # type: ignore[misc]
            TypeError,
            f"{name} is 1.5, a float; use a whole number",
        )
        for name in (field.name for field in dataclasses.fields(Shape))
    },
    **{
        f"find_shape {bad}": (
            lambda bad=bad: find_shape(bad),  # type: ignore[misc]
            TypeError,
            f"model is {bad!r}, a {type(bad).__name__}; use the name of a model or the path",
        )
        for bad in (5, None, [])
    },
    **{
        f"shape_from_config {bad}": (
            lambda bad=bad: shape_from_config(bad),  # type: ignore[misc]
            TypeError,
            f"config is {bad!r}, a {type(bad).__name__}; use the contents of a config.json",
        )
        for bad in (None, [], "a")
    },
    "dtype": (lambda: plan(KNOWN["Phi-4"], 1000, 100, dtype=["a"]), ValueError, "dtype is ['a']; use one of bfloat16"),
    "bits": (
        lambda: plan(KNOWN["Phi-4"], 1000, 100, bits=np.array([4, 3])),
        ValueError,
        "bits is array([4, 3]); use 3",
    ),
    "certify": (lambda: LayerCache(8, window=2, certify=ARRAY), ValueError, "certify is array([1, 1]); use None"),
    "order": (lambda: LayerCache(8, window=2, order=ARRAY), ValueError, "order is array([1, 1]); use None"),
    "statistics_bits": (
        lambda: get_correction("moments", bits=ARRAY),
        ValueError,
        "statistics_bits is array([1, 1]); use 16",
    ),
    "batches": (lambda: check_backend("numpy", batches=-1), ValueError, "batches is -1; use at least 1"),
    "no batch": (lambda: check_library(np.asarray, np.asarray, batches=0), ValueError, "batches is 0; use at least 1"),
}


@pytest.mark.parametrize("name", OF_SHAPES)
def test_shapes_plans_and_checks_refuse_by_name(name: str):
    check(OF_SHAPES, name)


TENSORS = tuple(torch.as_tensor(x) for x in STATE)
OF_RANKS: Calls = {
    "states, None": (lambda: distributed.merge_states(None), TypeError, "state is a NoneType; use AttentionState"),
    "states, tuple": (lambda: distributed.merge_states(TENSORS), TypeError, "state is a tuple; use AttentionState"),
    "states, NumPy": (lambda: distributed.merge_states(STATE), TypeError, "out is a ndarray; collectives need torch"),
    "moments, None": (lambda: distributed.merge_moments(None), TypeError, "moments is a NoneType; use Moments"),
    "moments, other": (lambda: distributed.merge_moments(SUMMARIES), TypeError, "moments is a Summaries; use Moments"),
    "moments, NumPy": (lambda: distributed.merge_moments(MOMENTS), TypeError, "weight is a ndarray; collectives need"),
    "summaries, None": (
        lambda: distributed.merge_summaries(None, WINDOW),
        TypeError,
        "summaries is a NoneType; use Summaries",
    ),
    "window, None": (
        lambda: distributed.merge_summaries(SUMMARIES.map(torch.as_tensor), None),
        TypeError,
        "window is a NoneType; use QueryWindow",
    ),
    "summaries, NumPy": (
        lambda: distributed.merge_summaries(SUMMARIES, WINDOW),
        TypeError,
        "count is a ndarray; collectives need torch.Tensor",
    ),
    "window, NumPy": (
        lambda: distributed.merge_summaries(SUMMARIES.map(torch.as_tensor), WINDOW),
        TypeError,
        "window.mean is a ndarray; collectives need torch.Tensor",
    ),
}


@pytest.mark.parametrize("name", OF_RANKS)
def test_ranks_refuse_by_name_before_they_wait_for_each_other(name: str):
    check(OF_RANKS, name)


@pytest.mark.parametrize("narrow", ["keys", "values"])
def test_a_cache_of_one_dimension_says_how_summaries_fit_it(narrow: str):
    arrays = [RNG.standard_normal((1, 1, 20, 4)) for _ in range(3)]
    arrays = [x[..., :1] if (place == 2) == (narrow == "values") else x for place, x in enumerate(arrays)]
    cache = LayerCache(6, correction="summaries", window=2, block=2)
    with pytest.raises(ValueError, match=r"rank is 2; use 0 to 1.*AnchoredSummaries\(rank=1\)"):
        cache.step(*arrays)
    assert cache.seen == 0
    cache = LayerCache(6, correction=AnchoredSummaries(rank=1), window=2, block=2)
    assert np.isfinite(cache.step(*arrays)).all()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_an_order_that_is_left_out_is_the_highest_of_0_and_1(backend: Library, order: int):
    q, k, v = (backend.asarray(x) for x in (Q, K, V))
    moments, state = Moments.from_tokens(k, v, order=order), attend(q, k, v)
    both = (estimate(q, moments), estimate(q, moments, order=min(order, 1)))
    both_corrected = (correct(state, q, moments), correct(state, q, moments, order=min(order, 1)))
    for one, other in (both, both_corrected):
        for x, y in zip(one, other, strict=True):
            assert_same(backend.numpy(x), backend.numpy(y))


def test_any_librarys_numbers_are_numbers():
    expected = estimate(Q, MOMENTS, order=2, strength=0.5, scale=0.25)
    given = estimate(Q, MOMENTS, order=np.int64(2), strength=np.float64(0.5), scale=np.float32(0.25))
    for x, y in zip(given, expected, strict=True):
        assert_same(np.asarray(x), np.asarray(y))


def test_a_factor_may_be_a_fraction():
    x = np.random.default_rng(0).standard_normal((3, 1, 2, 60, 8))
    for arrays in (x, torch.from_numpy(x), torch.from_numpy(x).float()):
        fraction, same = (LayerCache(40, scale=scale, window=8) for scale in (Fraction(1, 8), 0.125))
        for part in (slice(0, 59), slice(59, 60)):
            one, other = (cache.step(*(a[:, :, part] for a in arrays)) for cache in (fraction, same))
            assert np.array_equal(np.asarray(one), np.asarray(other))
    assert np.array_equal(attend(*x, scale=Fraction(1, 8)).out, attend(*x, scale=0.125).out)


def test_a_budget_that_positions_cannot_count_is_refused_by_name():
    with pytest.raises(ValueError, match=r"budget is 2147483648, .*use at most 2147483647"):
        LayerCache(2**31)
    cache, x = LayerCache(2**31 - 1), np.random.default_rng(0).standard_normal((3, 1, 2, 60, 8))
    cache.step(*x)
    assert cache.seen == 60
