"""Every ValueError says which argument is wrong and what it was, and a failed step leaves the cache as it was."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from libraries import Library

from momentkv import LayerCache, Moments, Policy, Tokens, attend, correct, estimate, get_policy
from momentkv.backends import get_backend
from momentkv.cache.state import HOST
from momentkv.policies import MomentKV, Random, SnapKV, retain
from momentkv.statistics.corrections import Correction, PaperMoments, get_correction
from momentkv.statistics.summaries import QueryWindow, Summaries, estimate_summaries
from momentkv.testing.rounding import assert_same

Maker = Callable[..., object]


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape)


def moments(*, order: int = 1, heads: int = 2, d: int = 4) -> Moments:
    return Moments.from_tokens(zeros(heads, 5, d), zeros(heads, 5, 3), order=order)


WINDOW = QueryWindow(zeros(2, 4), zeros(2, 4))


def summaries(**settings: float) -> Summaries:
    return Summaries.empty(zeros(2, 5, 4), zeros(2, 5, 3), **settings)


class OneOrder(PaperMoments):
    """A correction that has no order but its own."""

    name = "one order"
    of_order = Correction.of_order


# What is called, and parts of the message: the name of the argument and its value.
CASES: dict[str, tuple[Maker, list[str]]] = {
    "attend: head groups": (lambda: attend(zeros(3, 1, 4), zeros(2, 5, 4), zeros(2, 5, 3)), ["q has 3 ", "2 KV heads"]),
    "attend: dimension": (lambda: attend(zeros(2, 1, 4), zeros(2, 5, 6), zeros(2, 5, 3)), ["q ", "4", "k has 6"]),
    "attend: axes": (lambda: attend(zeros(1, 4), zeros(2, 5, 4), zeros(2, 5, 3)), ["q has shape (1, 4)"]),
    "attend: values": (lambda: attend(zeros(2, 1, 4), zeros(2, 5, 4), zeros(2, 6, 3)), ["k ", "v has (2, 6, 3)"]),
    "moments: values": (lambda: Moments.from_tokens(zeros(2, 5, 4), zeros(5, 3)), ["k ", "v has (5, 3)"]),
    "moments: order": (lambda: moments(order=3), ["order is 3"]),
    "moments: mask": (
        lambda: Moments.from_tokens(zeros(2, 5, 4), zeros(2, 5, 3), mask=zeros(3, 5) > 0),
        ["mask has shape (3, 5)", "(2, 5)"],
    ),
    "moments: weights": (
        lambda: Moments.from_tokens(zeros(2, 5, 4), zeros(2, 5, 3), weights=zeros(1, 2, 5)),
        ["weights has shape (1, 2, 5)", "(2, 5)"],
    ),
    "moments: negative weight": (
        lambda: Moments.from_tokens(zeros(2, 5, 4), zeros(2, 5, 3), weights=np.array([1, 1, -0.25, 1, 1])),
        ["weights", "-0.25"],
    ),
    "moments: NaN weight": (
        lambda: Moments.from_tokens(zeros(2, 5, 4), zeros(2, 5, 3), weights=np.array([1, 1, np.nan, 1, 1])),
        ["weights", "nan"],
    ),
    "merge: shape": (lambda: moments().merge(moments(heads=1)), ["weight has shape (2,)", "(1,)"]),
    "merge: dimension": (lambda: moments().merge(moments(d=6)), ["key_mean has shape (2, 4)", "(2, 6)"]),
    "merge: order": (lambda: moments().merge(moments(order=0)), ["order 1", "order 0", "order="]),
    "update: heads": (lambda: moments().update(zeros(1, 5, 4), zeros(1, 5, 3)), ["weight has shape (2,)", "(1,)"]),
    "downdate: too much": (lambda: moments().downdate(zeros(2, 6, 4), zeros(2, 6, 3)), ["would be left is -1"]),
    "rotate": (lambda: moments().rotate(zeros(3, 4)), ["rotation has shape (3, 4)", "(4, 4)"]),
    "decay: high": (lambda: moments().decay(1.5), ["gamma is 1.5"]),
    "decay: negative": (lambda: moments().decay(-0.5), ["gamma is -0.5"]),
    "estimate: order": (lambda: estimate(zeros(2, 1, 4), moments(), order=2), ["order is 2"]),
    "estimate: order of moments": (
        lambda: estimate(zeros(2, 1, 4), moments(order=0), order=1),
        ["order is 1", "of order 0"],
    ),
    "estimate: dimension": (lambda: estimate(zeros(2, 1, 5), moments()), ["q has shape (2, 1, 5)", "4"]),
    "estimate: axes": (lambda: estimate(zeros(1, 4), moments()), ["q has shape (1, 4)"]),
    "estimate: head groups": (lambda: estimate(zeros(3, 1, 4), moments()), ["q has 3 ", "2 KV heads"]),
    "correct: order": (
        lambda: correct(attend(*[zeros(2, 1, 4)] * 3), zeros(2, 1, 4), moments(), order=-1),
        ["order is -1"],
    ),
    "cache: budget": (lambda: LayerCache(33), ["budget is 33", "sinks (1)", "window (32)", "34"]),
    "cache: sinks": (lambda: LayerCache(64, sinks=-1), ["sinks is -1"]),
    "cache: window": (lambda: LayerCache(64, window=-2), ["window is -2"]),
    "cache: order": (lambda: LayerCache(64, order=3), ["order is 3"]),
    "cache: certify": (lambda: LayerCache(64, certify=3), ["certify is 3", "0, 1 or 2"]),
    "cache: scale": (lambda: LayerCache(64, scale="1"), ["scale is '1'", "finite"]),
    "cache: scale NaN": (lambda: LayerCache(64, scale=float("nan")), ["scale is nan", "finite"]),
    "cache: scale of nothing": (lambda: LayerCache(64, scale=0), ["scale is 0", "positive"]),
    "cache: scale negative": (lambda: LayerCache(64, scale=-0.5), ["scale is -0.5", "positive"]),
    "cache: observes": (
        lambda: LayerCache(64, policy=SnapKV(observes=-1)),
        ["policy is SnapKV(observes=-1", "observes is -1", "or None"],
    ),
    "cache: tolerance as text": (lambda: LayerCache(64, certify=1, tolerance="a"), ["tolerance is 'a'", "at least 0"]),
    "retain: budget": (
        lambda: retain(np.ones((1, 9)), np.arange(9)[None], budget=2, sinks=1, window=2),
        ["budget is 2", "sinks and window"],
    ),
    "cache: tolerance, static": (
        lambda: LayerCache(64, certify=1, tolerance=0.5, static=True),
        ["tolerance is 0.5", "static=True", "leave one"],
    ),
    "cache: block": (lambda: LayerCache(64, block=0), ["block is 0"]),
    "cache: policy": (lambda: LayerCache(64, policy="lru"), ["policy is 'lru'", "snapkv"]),
    "cache: backend": (lambda: LayerCache(64, backend="cupy"), ["backend is 'cupy'", "numpy"]),
    "cache: attend on nothing": (lambda: LayerCache(64).attend(zeros(1, 2, 1, 4)), ["attend", "empty", "append"]),
    "cache: correction": (lambda: LayerCache(64, correction="mean"), ["correction is 'mean'", "moments", "summaries"]),
    "correction: name": (lambda: get_correction("mean"), ["correction is 'mean'", "summaries", "none"]),
    "correction: order": (lambda: get_correction("moments", order=2), ["order is 2", "None"]),
    "correction: order of moments": (lambda: PaperMoments(order=2), ["order is 2", "1", "0"]),
    "correction: no such order": (lambda: get_correction(OneOrder(), order=0), ["order is 0", "'one order'"]),
    "correction: no window": (
        lambda: get_correction("summaries").fold(
            summaries(), zeros(2, 5, 4), zeros(2, 5, 3), mask=zeros(2, 5) == 0, window=None
        ),
        ["window is None", "QueryWindow"],
    ),
    "summaries: number": (lambda: summaries(summaries=0), ["summaries is 0", "at least 1"]),
    "summaries: rank": (lambda: summaries(rank=4), ["rank is 4", "0 to 3"]),
    "summaries: negative rank": (lambda: summaries(rank=-1), ["rank is -1"]),
    "summaries: strength": (lambda: summaries(strength=1.5), ["strength is 1.5"]),
    "summaries: negative strength": (lambda: summaries(strength=-0.5), ["strength is -0.5"]),
    "summaries: values": (lambda: Summaries.empty(zeros(2, 5, 4), zeros(5, 3)), ["k ", "v has (5, 3)"]),
    "summaries: mask": (
        lambda: summaries().update(zeros(2, 5, 4), zeros(2, 5, 3), WINDOW, mask=zeros(3, 5) > 0),
        ["mask has shape (3, 5)", "(2, 5)"],
    ),
    "summaries: keys": (
        lambda: summaries().update(zeros(2, 5, 6), zeros(2, 5, 3), WINDOW),
        ["k has shape (2, 5, 6)", "(2,)", "4"],
    ),
    "summaries: heads": (
        lambda: summaries().update(zeros(1, 5, 4), zeros(1, 5, 3), WINDOW),
        ["k has shape (1, 5, 4)", "(2,)"],
    ),
    "summaries: dimension of values": (
        lambda: summaries().update(zeros(2, 5, 4), zeros(2, 5, 4), WINDOW),
        ["v has shape (2, 5, 4)", "3"],
    ),
    "summaries: query dimension": (
        lambda: estimate_summaries(zeros(2, 1, 5), summaries()),
        ["q has shape (2, 1, 5)", "4"],
    ),
    "summaries: query axes": (lambda: estimate_summaries(zeros(1, 4), summaries()), ["q has shape (1, 4)"]),
    "summaries: head groups": (lambda: estimate_summaries(zeros(3, 1, 4), summaries()), ["q has 3 ", "2 KV heads"]),
    "policy: name": (lambda: get_policy("lru"), ["policy is 'lru'", "momentkv"]),
    "policy: kernel": (lambda: SnapKV(kernel=4), ["kernel is 4"]),
    "policy: no kernel": (lambda: SnapKV(kernel=-1), ["kernel is -1"]),
    "policy: rounds": (lambda: MomentKV(rounds=0), ["rounds is 0"]),
    "policy: seed": (lambda: Random(seed=-1), ["seed is -1"]),
    "policy: large seed": (lambda: Random(seed=2**31), ["seed is 2147483648"]),
    "backend: name": (lambda: get_backend("cupy"), ["backend is 'cupy'", "torch"]),
}


NO_WHOLE_NUMBERS = [float("nan"), 40.0, np.float64(40), None, "40", True, np.True_, {}, np.array([40.0, 41.0])]


@pytest.mark.parametrize("bad", NO_WHOLE_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["budget", "budget of a head", "sinks", "window", "block"])
def test_what_is_no_whole_number_is_refused_by_name(name: str, bad: object):
    """NaN above all, below which every comparison is false."""
    argument = name.partition(" ")[0]
    value = [40, bad] if name == "budget of a head" else bad
    with pytest.raises(TypeError, match=f"{argument} is ") as caught:
        LayerCache(**({"budget": 64} | {argument: value}))
    assert repr(bad) in str(caught.value)
    assert "whole number" in str(caught.value)
    if argument == "budget":
        cache = LayerCache(64)
        with pytest.raises(TypeError, match="budget is "):
            cache.budget = value
        assert cache.budget == 64


@pytest.mark.parametrize(
    "kind",
    [int, np.int64, np.uint8, lambda x: np.array(x, dtype=np.int32)],
    ids=["int", "int64", "uint8", "array"],  # the same in every worker
)
def test_whole_numbers_of_every_library_are_taken(kind: Callable[[int], object]):
    one, heads = (
        LayerCache(kind(8), window=kind(2), block=kind(2), sinks=kind(1)),
        LayerCache([kind(8), kind(9)], window=2),
    )
    for cache in (one, heads):
        cache.step(*np.random.default_rng(0).standard_normal((3, 1, 2, 30, 4)))
    assert (one.budget, heads.budget) == (8, [8, 9])
    assert {type(x) for x in (one.budget, *heads.budget, *one.budgets, one.config.window)} == {int}
    assert one.stored_by_head == [8, 8]
    one.budget = kind(20)
    assert one.budget == 20


def test_a_budget_for_other_heads_than_there_are_is_refused_by_name():
    cache, coupled = LayerCache(8, window=2), LayerCache(8, window=2, policy="tova")
    for each in (cache, coupled):
        each.step(*np.random.default_rng(0).standard_normal((3, 1, 2, 30, 4)))
    with pytest.raises(ValueError, match=r"budget is \[8, 9, 10\], for 3 KV heads, but the cache holds 2"):
        cache.budget = [8, 9, 10]
    with pytest.raises(ValueError, match="policy is 'tova', which looks across"):
        coupled.budget = [8, 9]
    assert (cache.budget, coupled.budget) == (8, 8)
    cache.budget = [9, 12]
    assert cache.budget == [9, 12]


@pytest.mark.parametrize("name", CASES)
def test_message_names_the_argument_and_its_value(name: str):
    make, parts = CASES[name]
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


# Shapes of q, k, v and perhaps of valid, for a cache of one row, 4 query heads, 2 KV heads, d = 4, dv = 3.
STEPS: dict[str, tuple[list[tuple[int, ...]], list[str]]] = {
    "head groups": ([(1, 3, 2, 4), (1, 2, 2, 4), (1, 2, 2, 3)], ["q has 3 "]),
    "rows of q": ([(3, 4, 2, 4), (1, 2, 2, 4), (1, 2, 2, 3)], ["q", "3"]),
    "dimension of q": ([(1, 4, 2, 5), (1, 2, 2, 4), (1, 2, 2, 3)], ["q", "5"]),
    "axes of q": ([(2, 4), (1, 2, 2, 4), (1, 2, 2, 3)], ["q has shape (2, 4)"]),
    "a query a token": ([(1, 4, 1, 4), (1, 2, 2, 4), (1, 2, 2, 3)], ["q has 1 ", "k has 2"]),
    "tokens of v": ([(1, 4, 2, 4), (1, 2, 2, 4), (1, 2, 3, 3)], ["k", "v has (1, 2, 3, 3)"]),
    "no tokens": ([(1, 4, 0, 4), (1, 2, 0, 4), (1, 2, 0, 3)], ["k has shape (1, 2, 0, 4)"]),
    "valid": ([(1, 4, 2, 4), (1, 2, 2, 4), (1, 2, 2, 3), (1, 1, 3)], ["valid has shape (1, 1, 3)"]),
}
LATER_STEPS = {
    "KV heads": ([(1, 4, 2, 4), (1, 4, 2, 4), (1, 4, 2, 3)], ["k has shape (1, 4, 2, 4)", "(1, 2, "]),
    "dimension of keys": ([(1, 4, 2, 6), (1, 2, 2, 6), (1, 2, 2, 3)], ["k has shape (1, 2, 2, 6)"]),
    "dimension of values": ([(1, 4, 2, 4), (1, 2, 2, 4), (1, 2, 2, 5)], ["v has shape (1, 2, 2, 5)"]),
    "rows": ([(2, 4, 2, 4), (2, 2, 2, 4), (2, 2, 2, 3)], ["k has shape (2, 2, 2, 4)"]),
}


def snapshot(backend: Library, cache: LayerCache) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Arrays, and everything else but the settings that never change."""
    arrays = {name: backend.numpy(x) for name, x in cache.arrays().items()}
    rest = {name: getattr(cache, name) for name in ("seen", "budget", "stored_by_head", "refused")}
    return arrays, rest | {name: getattr(cache.state, name, None) for name in HOST}


def fail(backend: Library, cache: LayerCache, shapes: list[tuple[int, ...]], parts: list[str]) -> None:
    q, k, v = (backend.asarray(np.ones(shape)) for shape in shapes[:3])
    valid = backend.asarray(np.zeros(shapes[3], dtype=bool)) if len(shapes) == 4 else None
    arrays, rest = snapshot(backend, cache)
    with pytest.raises(ValueError, match=r".") as caught:
        cache.step(q, k, v, valid=valid)
    for part in parts:
        assert part in str(caught.value)
    after, rest_after = snapshot(backend, cache)
    assert rest_after == rest
    assert after.keys() == arrays.keys()
    for name, x in arrays.items():
        assert_same(after[name], x)


@pytest.mark.parametrize("policy", ["momentkv", "streaming"])
@pytest.mark.parametrize("name", [*STEPS, *LATER_STEPS])
def test_a_failed_step_leaves_the_cache_unchanged(backend: Library, name: str, policy: str):
    cache = LayerCache(6, window=2, block=2, policy=policy)
    rng = np.random.default_rng(0)
    cache.step(*(backend.asarray(rng.standard_normal((1, h, 9, d))) for h, d in ((4, 4), (2, 4), (2, 3))))
    fail(backend, cache, *(STEPS | LATER_STEPS)[name])


@pytest.mark.parametrize("name", STEPS)
def test_a_failed_first_step_leaves_the_cache_empty(backend: Library, name: str):
    cache = LayerCache(6, window=2, block=2)
    fail(backend, cache, *STEPS[name])
    assert cache.keys is None


class Broken(Policy):
    """Fails once its flag is set, after the tokens are stored and attended to."""

    broken = False

    def importance(self, tokens: Tokens) -> object:
        if self.broken:
            raise ValueError("importance of 3 tokens is undefined")
        return tokens.score


def test_a_step_whose_policy_fails_leaves_the_cache_unchanged(backend: Library):
    policy = Broken()
    cache = LayerCache(6, window=2, block=2, policy=policy)
    q, k, v = (backend.asarray(np.random.default_rng(i).standard_normal((1, 2, 9, 4))) for i in range(3))
    cache.step(q, k, v)
    policy.broken = True
    fail(backend, cache, [(1, 2, 5, 4)] * 3, ["importance of 3"])
    policy.broken = False
    cache.step(q, k, v)
    assert cache.seen == 18
