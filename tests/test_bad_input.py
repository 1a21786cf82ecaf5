"""Arguments that are no floating-point arrays of one library, and masks that are not bool: one answer everywhere.

Refused by type, before anything is computed; the message names the argument, what it is, and what to do.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, Library

from momentkv import LayerCache, Moments, attend, bounds, correct, estimate, merge
from momentkv.attention import logits, softmax_state
from momentkv.backends import get_backend
from momentkv.cache.accounting import state_bytes, token_equivalents
from momentkv.codes import Standard, pack, row_bytes, unpack
from momentkv.diagnostics import eviction_error
from momentkv.plan import plan
from momentkv.policies import MomentKV, SnapKV
from momentkv.policies.select import retain
from momentkv.shapes import KNOWN
from momentkv.statistics.corrections import AnchoredSummaries
from momentkv.statistics.summaries import QueryWindow, Summaries, estimate_summaries
from momentkv.testing.rounding import assert_same
from momentkv.trust import estimated_error

Arrays = dict[str, Any]


def good(library: Library = LIBRARIES["numpy"]) -> Arrays:
    rng = np.random.default_rng(0)
    arrays = {
        "q": rng.standard_normal((4, 1, 4)),
        "k": rng.standard_normal((2, 5, 4)),
        "v": rng.standard_normal((2, 5, 3)),
        "mask": rng.random((2, 5)) < 0.5,
        "weights": rng.random((2, 5)),
        "anchor": rng.standard_normal((2, 4)),
        "out": rng.standard_normal((4, 1, 3)),
    }
    return {name: library.asarray(x) for name, x in arrays.items()}


def evicted(a: Arrays, **options: Any) -> Moments:
    """Moments of good arrays, of the library of the others."""
    whole = good(LIBRARIES["torch"] if isinstance(a["mask"], torch.Tensor) else LIBRARIES["numpy"])
    return Moments.from_tokens(whole["k"], whole["v"], extent=True, **options)


def summaries(a: Arrays) -> Summaries:
    whole = good(LIBRARIES["torch"] if isinstance(a["mask"], torch.Tensor) else LIBRARIES["numpy"])
    return Summaries.empty(whole["k"], whole["v"]).update(whole["k"], whole["v"], window(whole))


def window(a: Arrays) -> QueryWindow:
    return QueryWindow.from_queries(a["q"], 2)


def retained(a: Arrays) -> Any:
    whole = good(LIBRARIES["torch"] if isinstance(a["mask"], torch.Tensor) else LIBRARIES["numpy"])
    return attend(whole["q"], whole["k"], whole["v"])


# Every function that takes arrays from users, and which of them it takes.
CALLS: dict[str, tuple[Callable[[Arrays], Any], tuple[str, ...]]] = {
    "attend": (lambda a: attend(a["q"], a["k"], a["v"]), ("q", "k", "v")),
    "attend, masked": (lambda a: attend(a["q"], a["k"], a["v"], mask=a["mask"][:, None, None]), ("q", "k", "v")),
    "logits": (lambda a: logits(a["q"], a["k"]), ("q", "k")),
    "merge": (lambda a: merge(retained(a), retained(a)._replace(out=a["out"])), ("out",)),
    "softmax_state": (lambda a: softmax_state(retained(a).lse[:2, None, :, None] * 0, a["v"][:, :1]), ("v",)),
    "moments": (lambda a: Moments.from_tokens(a["k"], a["v"]), ("k", "v")),
    "moments, empty": (lambda a: Moments.empty(a["k"], a["v"]), ("k", "v")),
    "moments, anchored": (lambda a: Moments.from_tokens(a["k"], a["v"], anchor=a["anchor"]), ("k", "v", "anchor")),
    "moments, update": (lambda a: evicted(a).update(a["k"], a["v"]), ("k", "v")),
    "moments, downdate": (lambda a: evicted(a).downdate(a["k"], a["v"]), ("k", "v")),
    "summaries, empty": (lambda a: Summaries.empty(a["k"], a["v"]), ("k", "v")),
    "summaries, update": (
        lambda a: summaries(a).update(
            a["k"], a["v"], QueryWindow(retained(a).out.sum() + a["anchor"], a["anchor"] ** 2)
        ),
        ("k", "v"),
    ),
    "summaries, calibrate": (lambda a: summaries(a).calibrate(a["q"], a["k"]), ("q", "k")),
    "summaries, reanchor": (lambda a: summaries(a).reanchor(a["anchor"]), ("anchor",)),
    "query window": (window, ("q",)),
    "estimate": (lambda a: estimate(a["q"], evicted(a)), ("q",)),
    "estimate of summaries": (lambda a: estimate_summaries(a["q"], summaries(a)), ("q",)),
    "correct": (lambda a: correct(retained(a), a["q"], evicted(a)), ("q",)),
    "eviction error": (lambda a: eviction_error(a["q"], a["k"], a["v"], a["mask"]), ("q", "k", "v")),
    "lse interval": (lambda a: bounds.lse_interval(a["q"], evicted(a)), ("q",)),
    "value error": (lambda a: bounds.value_error(a["q"], evicted(a), a["out"]), ("q", "out")),
    "output error": (lambda a: bounds.output_error(retained(a), a["q"], evicted(a), a["out"]), ("q", "out")),
    "estimated error": (lambda a: estimated_error(retained(a), a["q"], evicted(a)), ("q",)),
}
# What an argument is called where it stands for another one.
NAMES = {("merge", "out"): "b.out", ("value error", "out"): "estimate", ("output error", "out"): "output"}

PLACES = [(call, name) for call, (_, names) in CALLS.items() for name in names]


def refused(call: str, name: str, bad: Any, library: Library, kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        CALLS[call][0](good(library) | {name: bad})
    message = str(caught.value)
    assert NAMES.get((call, name), name) in message, message
    return message


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["int64", "bool"])
@pytest.mark.parametrize(("call", "name"), PLACES)
def test_numbers_that_are_no_floats_are_refused_by_name(call: str, name: str, dtype: str, library: str):
    x = LIBRARIES["numpy"].numpy(good()[name]).astype(dtype)
    message = refused(call, name, LIBRARIES[library].asarray(x), LIBRARIES[library], ValueError)
    assert dtype in message
    assert "floating point" in message


@pytest.mark.parametrize("other", ["torch", "jax"])
@pytest.mark.parametrize(("call", "name"), [place for place in PLACES if len(CALLS[place[0]][1]) > 1])
def test_arrays_of_two_libraries_are_refused_by_name(call: str, name: str, other: str):
    message = refused(call, name, good(LIBRARIES[other])[name], LIBRARIES["numpy"], TypeError)
    assert other in message
    assert "numpy" in message
    assert "convert" in message


@pytest.mark.parametrize("call", ["estimate", "estimate of summaries", "correct", "lse interval", "merge"])
def test_a_state_of_another_library_is_refused_by_name(call: str):
    (name,) = CALLS[call][1]
    message = refused(call, name, good(LIBRARIES["torch"])[name], LIBRARIES["numpy"], TypeError)
    assert "torch" in message
    assert "numpy" in message


@pytest.mark.parametrize("bad", [None, 1.0, "list"], ids=str)
@pytest.mark.parametrize(("call", "name"), [p for p in PLACES if p[0] in ("attend", "moments", "summaries, empty")])
def test_what_is_no_array_is_refused_by_name(call: str, name: str, bad: Any):
    bad = good()[name].tolist() if bad == "list" else bad
    message = refused(call, name, bad, LIBRARIES["numpy"], TypeError)
    assert f"a {type(bad).__name__}" in message
    assert "pass an array" in message


MASKED: dict[str, tuple[str, Callable[[Arrays, Any], Any]]] = {
    "attend": ("mask", lambda a, m: attend(a["q"], a["k"], a["v"], mask=m[:, None, None])),
    "moments": ("mask", lambda a, m: Moments.from_tokens(a["k"], a["v"], mask=m)),
    "update": ("mask", lambda a, m: evicted(a).update(a["k"], a["v"], mask=m)),
    "downdate": ("mask", lambda a, m: evicted(a).downdate(a["k"], a["v"], mask=m)),
    "summaries": ("mask", lambda a, m: summaries(a).update(a["k"], a["v"], window(a), mask=m)),
    "calibrate": ("mask", lambda a, m: summaries(a).calibrate(a["q"], a["k"], mask=m)),
    "eviction error": ("retained", lambda a, m: eviction_error(a["q"], a["k"], a["v"], m)),
    "cache": ("valid", lambda a, m: step(LayerCache(8, window=2), a, m)),
    "ragged cache": ("valid", lambda a, m: step(LayerCache([8, 9], window=2), a, m)),
}


def step(cache: Any, a: Arrays, valid: Any) -> Any:
    q, k, v = (a[name][None] for name in ("q", "k", "v"))
    queries = np.zeros((1, 4, 5, 4)) if isinstance(q, np.ndarray) else torch.zeros(1, 4, 5, 4, dtype=q.dtype)
    return cache.step(queries, k, v, valid=valid)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["ints", "zeros and ones", "additive"])
@pytest.mark.parametrize("call", MASKED)
def test_masks_that_are_not_bool_are_refused_by_name(call: str, kind: str, library: str):
    """An int mask would be inverted bit by bit, an additive one read the wrong way round."""
    name, function = MASKED[call]
    given = np.asarray(good()["mask"])
    bad = {"ints": given.astype(int), "zeros and ones": given * 1.0, "additive": np.where(given, 0, -np.inf)}[kind]
    with pytest.raises(ValueError, match=f"{name} is .*(int|float)64 of shape .* must be bool") as caught:
        function(good(LIBRARIES[library]), LIBRARIES[library].asarray(bad))
    assert f"{name} == 0" in str(caught.value)
    assert f"{name} != 0" in str(caught.value)
    # What the message says to do gives the mask.
    assert ((bad == 0) if kind == "additive" else (bad != 0)).tolist() == given.tolist()


@pytest.mark.parametrize("call", [name for name in MASKED if name not in ("attend", "calibrate")])
def test_masks_of_another_library_or_none_are_refused_by_name(call: str):
    name, function = MASKED[call]
    with pytest.raises(TypeError, match=f"{name} is an array of numpy, .* torch"):
        function(good(LIBRARIES["torch"]), np.asarray(good()["mask"]))
    with pytest.raises(TypeError, match=f"{name} is a list; pass an array"):
        function(good(), np.asarray(good()["mask"]).tolist())


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, -1.0])
def test_weights_that_are_no_weights_are_refused_by_name(backend: Library, weight: float):
    a = good(backend)
    weights = np.ones((2, 5))
    weights[1, 3] = weight
    for function in (Moments.from_tokens, evicted_of(a).update, evicted_of(a).downdate):
        with pytest.raises(ValueError, match=r"weights has an entry .* finite and at least 0"):
            function(a["k"], a["v"], weights=backend.asarray(weights))


def evicted_of(a: Arrays) -> Moments:
    return Moments.from_tokens(a["k"], a["v"])


def test_weights_may_be_integers_and_not_masks(backend: Library):
    a = good(backend)
    counts = np.asarray([[1, 0, 2, 3, 1], [0, 1, 1, 4, 2]])
    one, other = (Moments.from_tokens(a["k"], a["v"], weights=backend.asarray(x)) for x in (counts, counts * 1.0))
    for name, x in one.arrays().items():
        assert_same(backend.numpy(x), backend.numpy(other.arrays()[name]))
    with pytest.raises(ValueError, match=r"weights is .*bool .* mask="):
        Moments.from_tokens(a["k"], a["v"], weights=a["mask"])
    with pytest.raises(TypeError, match="weights is a list"):
        Moments.from_tokens(a["k"], a["v"], weights=counts.tolist())


def test_two_dtypes_in_a_call_give_the_wider_one(backend: Library):
    """And to a state, tokens are added in its own dtype, or not at all if it would lose their digits."""
    single, double = (
        {n: backend.asarray(np.asarray(x), t) for n, x in good().items() if n in "qkv"} for t in ("float32", "float64")
    )
    for wide in itertools.product((single, double), repeat=3):
        q, k, v = (x[name] for x, name in zip(wide, "qkv", strict=True))
        expected = "float64" if any(x is double for x in wide) else "float32"
        assert {backend.dtype(x) for x in attend(q, k, v)} == {expected}
        of_tokens = "float64" if any(x is double for x in wide[1:]) else "float32"
        assert {backend.dtype(x) for x in Moments.from_tokens(k, v).arrays().values()} == {of_tokens}
    states = [Moments.from_tokens(x["k"], x["v"]) for x in (single, double)]
    assert backend.dtype(states[1].update(single["k"], single["v"]).weight) == "float64"
    with pytest.raises(ValueError, match=r"k is .*float64, but the moments it is added to are .*float32"):
        states[0].update(double["k"], double["v"])
    with pytest.raises(ValueError, match=r"cannot combine moments: weight is .*float32 here and .*float64 there"):
        states[0].merge(states[1])
    groups = [Summaries.empty(x["k"], x["v"]) for x in (single, double)]
    recent = QueryWindow.from_queries(double["q"], 2)
    assert {backend.dtype(x) for x in groups[0].update(single["k"], single["v"], recent).arrays().values()} == {
        "float32"
    }
    assert {backend.dtype(x) for x in groups[1].update(single["k"], single["v"], recent).arrays().values()} == {
        "float64"
    }
    with pytest.raises(ValueError, match=r"k is .*float64, but the summaries it is added to are .*float32"):
        groups[0].update(double["k"], double["v"], recent)
    with pytest.raises(ValueError, match=r"cannot merge summaries of .*float32 and of .*float64"):
        groups[0].merge(groups[1], recent)


def backend_of(library: Library) -> str:
    return get_backend(library.asarray(np.zeros(1))).name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_heads_bad_numbers_stay_with_it(backend: Library, bad: float, where: str, groups: int):
    """They stop nothing, no other head feels them, to the last bit, and NaN does not pass for nothing evicted."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((2, heads, 20, 6)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    window = QueryWindow.from_queries(backend.asarray(arrays["q"]), 2)
    results = []
    for changed in (False, True):
        k, v = arrays["k"].copy(), arrays["v"].copy()
        if changed:
            {"k": k, "v": v}[where][1, 0, 7, 2] = bad
        k, v = backend.asarray(k), backend.asarray(v)
        with np.errstate(all="ignore"):
            states = [
                Moments.from_tokens(k, v, order=2),
                AnchoredSummaries(summaries=groups).empty(k, v).update(k, v, window),
            ]
            outs = [estimate(backend.asarray(arrays["q"]), state) for state in states]
            if changed and np.isnan(bad):
                retained = attend(*(backend.asarray(arrays[name]) for name in "qkv"))
                for state, name in itertools.product(states, {"array-api", backend_of(backend)}):
                    q = backend.asarray(arrays["q"])
                    out = get_backend(name).correct(retained, q, state.expansion(), scale=0.4)
                    assert np.isnan(backend.numpy(out)[1, :2]).any(axis=-1).all()
        results.append([backend.numpy(x) for state in states for x in state.arrays().values()])
        results[-1] += [backend.numpy(x).reshape(2, 2, 2, *x.shape[2:]) for out in outs for x in out]
    untouched = np.ones((2, 2), bool)
    untouched[1, 0] = False
    for one, other in zip(*results, strict=True):
        assert_same(one[untouched], other[untouched])


@pytest.mark.parametrize(
    ("backend", "library"), [("numpy", "torch"), ("torch", "numpy"), ("numpy", "array-api-strict")]
)
def test_a_backend_refuses_arrays_of_another_library(backend: str, library: str):
    a = {name: LIBRARIES[library].asarray(np.ones((2, 5, 4))) for name in "qkv"}
    cache = LayerCache(40, backend=backend)
    with pytest.raises(TypeError, match=rf"backend is '{backend}'.*leave backend out"):
        cache.step(a["q"], a["k"], a["v"])
    assert cache.seen == 0


NOT_WHOLE = "{} is {}, a float; use a whole number"
SMALL = np.ones((1, 2, 3, 4), dtype=np.float32)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SnapKV(kernel=1.5), TypeError, NOT_WHOLE.format("kernel", 1.5)),
        (lambda: SnapKV(kernel=math.nan), TypeError, NOT_WHOLE.format("kernel", "nan")),
        (lambda: MomentKV(rounds=1.5), TypeError, NOT_WHOLE.format("rounds", 1.5)),
        (lambda: Summaries.empty(SMALL, SMALL, summaries=1.5), TypeError, NOT_WHOLE.format("summaries", 1.5)),
        (lambda: Summaries.empty(SMALL, SMALL, rank=True), TypeError, "rank is True; use a whole number"),
        (lambda: plan("SmolLM2-135M", 1000, 100), TypeError, "shape is 'SmolLM2-135M'; find_shape finds"),
        (lambda: plan(KNOWN["Llama-3.1-8B"], 1000.5, 100), TypeError, NOT_WHOLE.format("context", 1000.5)),
        (lambda: plan(KNOWN["Llama-3.1-8B"], 1000, 100, window=1.5), TypeError, NOT_WHOLE.format("window", 1.5)),
        (lambda: plan(KNOWN["Llama-3.1-8B"], 1000, 100, exact_window=-5), ValueError, "exact_window is -5; use 0"),
        (lambda: row_bytes(8, 7), ValueError, "bits is 7; use 2, 3, 4, 5, 6, 8 or 16"),
        (lambda: pack(np.ones((2, 8), dtype=np.uint8), 7), ValueError, "bits is 7; use 2, 3"),
        (lambda: unpack(np.ones((2, 8), dtype=np.uint8), "four", 8), ValueError, "bits is 'four'; use 2, 3"),
        (lambda: Standard.of(np.ones((1, 3, 4), dtype=np.int64)), TypeError, "x is int64; means and deviations"),
        (lambda: state_bytes("none", d=0), ValueError, "d is 0; a key and a value have at least one number"),
        (lambda: state_bytes("moments", d=8, dv=0), ValueError, "dv is 0; a key and a value have at least one number"),
        (lambda: token_equivalents("none", d=8, itemsize=0), ValueError, "itemsize is 0; a number takes at least"),
        (lambda: LayerCache(8, window=2, static="no"), TypeError, "static is 'no'; use True or False"),
        (lambda: LayerCache(8, window=2, keep_queries=1), TypeError, "keep_queries is 1; use True or False"),
        (lambda: LayerCache(8, window=2, backend=3), TypeError, "backend is 3; use the name of one"),
        (lambda: LayerCache(8, window=2, policy=[]), ValueError, "policy is []; use one of"),
        (lambda: LayerCache(8, window=2, correction=[]), ValueError, "correction is []; use one of none"),
    ],
)
def test_numbers_that_fit_nothing_are_named_at_once(make: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("importance", "positions", "error", "message"),
    [
        (np.ones((2, 5)), np.arange(5), ValueError, "importance has shape (2, 5) and positions (5,); both must be"),
        (np.ones(()), np.ones(()), ValueError, "importance has shape () and positions (); both must be"),
        (np.ones(5), np.arange(5.0), ValueError, "positions is float64; use whole numbers"),
        (np.ones(5), torch.arange(5), TypeError, "importance is an array of numpy, positions one of torch"),
        ([1.0] * 5, np.arange(5), TypeError, "importance is a list; pass an array"),
    ],
)
def test_tokens_cannot_be_ranked_by_what_is_not_of_them(
    importance: Any, positions: Any, error: type[Exception], message: str
):
    with pytest.raises(error, match=re.escape(message)):
        retain(importance, positions, budget=3, sinks=1, window=1)


# Functions of a state of attention or of evicted tokens, and the name of that argument.
OF_STATES: dict[str, tuple[Callable[[Any, Arrays], Any], str]] = {
    "merge, first": (lambda x, a: merge(x, retained(a)), "a"),
    "merge, second": (lambda x, a: merge(retained(a), x), "b"),
    "correct, retained": (lambda x, a: correct(x, a["q"], evicted(a)), "retained"),
    "correct, moments": (lambda x, a: correct(retained(a), a["q"], x), "moments"),
    "estimate": (lambda x, a: estimate(a["q"], x), "moments"),
    "moments, merge": (lambda x, a: evicted(a).merge(x), "other"),
    "summaries, merge": (lambda x, a: summaries(a).merge(x, window(a)), "other"),
    "lse interval": (lambda x, a: bounds.lse_interval(a["q"], x), "moments"),
    "value error": (lambda x, a: bounds.value_error(a["q"], x, a["out"]), "moments"),
    "output error, retained": (lambda x, a: bounds.output_error(x, a["q"], evicted(a), a["out"]), "retained"),
    "output error, moments": (lambda x, a: bounds.output_error(retained(a), a["q"], x, a["out"]), "moments"),
    "parts, retained": (lambda x, a: bounds.output_error_of_parts(x, a["q"], evicted(a), a["out"]), "retained"),
    "parts, moments": (lambda x, a: bounds.output_error_of_parts(retained(a), a["q"], x, a["out"]), "parts"),
    "estimated error, retained": (lambda x, a: estimated_error(x, a["q"], evicted(a)), "retained"),
    "estimated error, moments": (lambda x, a: estimated_error(retained(a), a["q"], x), "moments"),
    "restore": (lambda x, a: LayerCache(8, window=2).restore(x), "snapshot"),
}


@pytest.mark.parametrize("bad", [None, (1, 2), {}, np.ones((2, 4))], ids=["None", "tuple", "dict", "array"])
@pytest.mark.parametrize("call", OF_STATES)
def test_what_is_no_state_is_refused_by_name(call: str, bad: Any):
    of_state, name = OF_STATES[call]
    with pytest.raises(TypeError, match=rf"^{name} is a {type(bad).__name__}"):
        of_state(bad, good())
