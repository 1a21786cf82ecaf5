"""A policy that gives no ranking, or is given no numbers, is refused by name, and nothing is half changed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from libraries import Library

from momentkv import POLICIES, LayerCache, Policy, Tokens
from momentkv._array import array_namespace
from momentkv.policies.select import retain

SIZES: dict[str, Any] = {"sinks": 1, "window": 4, "block": 3}


@dataclasses.dataclass(frozen=True)
class Own(Policy):
    """Ranks by position, until it is told to do something else."""

    name = "own"
    wrong: list[Callable[[Any, Tokens], Any]] = dataclasses.field(default_factory=list)

    def importance(self, tokens: Tokens) -> Any:
        xp = array_namespace(tokens.keys)
        right = xp.astype(tokens.positions, tokens.keys.dtype)
        return self.wrong[0](right, tokens) if self.wrong else right


def nan_at(right: Any, tokens: Tokens, *, real: bool = True) -> Any:
    xp = array_namespace(right)
    place = xp.arange(right.shape[-1]) == (2 if real else 0)
    return xp.where(place, xp.full_like(right, float("nan")), right)


WRONG: dict[str, tuple[Callable[[Any, Tokens], Any], str]] = {
    "heads": (lambda x, _: x[:, :1, :], r"gave an array of shape \(2, 1, .*as importance; it must give .*\(2, 2, "),
    "tokens": (lambda x, _: x[..., 1:], r"gave an array of shape .* as importance"),
    "a number each head": (lambda x, _: x[..., 0], r"gave an array of shape \(2, 2\) as importance"),
    "queries": (lambda x, _: x[..., None], "gave an array of shape"),
    "nothing": (lambda x, _: None, "gave NoneType as importance"),
    "a list": (lambda x, _: [1.0], "gave list as importance"),
    "NaN": (nan_at, "gave NaN as importance of a token.*finite"),
}


def steps(library: Library, lengths: tuple[int, ...]) -> list[list[Any]]:
    rng = np.random.default_rng(0)
    return [[library.asarray(rng.standard_normal((2, heads, n, 4))) for heads in (4, 2, 2)] for n in lengths]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_ranking_is_refused_by_name(backend: Library, kind: str, padded: bool):
    """In a prefill and in a step that fills the block; mended, the policy goes on from there."""
    act, message = WRONG[kind]
    policy, good = Own(), Own()
    cache, other = (LayerCache([10, 14], policy=each, **SIZES) for each in (policy, good))
    for index, (q, k, v) in enumerate(steps(backend, (30, 1, 1, 1, 5))):
        valid = np.ones((2, 1, k.shape[2]), dtype=bool)
        valid[1, :, : min(3, k.shape[2] - 1)] = not padded
        mask = backend.asarray(valid)
        if index in (0, 3, 4):
            state, budget, held = cache.state, cache.budget, cache.arrays()
            policy.wrong.append(act)
            with pytest.raises(ValueError, match=f"policy 'own' {message}"):
                cache.step(q, k, v, valid=mask)
            policy.wrong.clear()
            assert cache.state is state
            assert cache.new is None
            assert cache.budget == budget
            assert all(x is held[name] for name, x in cache.arrays().items())
        outs = [backend.numpy(each.step(q, k, v, valid=mask)) for each in (cache, other)]
        assert np.array_equal(*outs)
    for name, x in cache.arrays().items():
        if not name.startswith("recent") or "count" in name:
            assert np.array_equal(backend.numpy(x), backend.numpy(other.arrays()[name])), name


@dataclasses.dataclass(frozen=True)
class Watching(Policy):
    """Ranks by what tokens have received, which it is told to get wrong."""

    name = "watching"
    observes = None
    wrong: list[Callable[[Any], Any]] = dataclasses.field(default_factory=list)

    def observe(self, received: Any, attention: Any) -> Any:
        right = super().observe(received, attention)
        return self.wrong[0](right) if self.wrong else right

    def importance(self, tokens: Tokens) -> Any:
        return tokens.attention


@pytest.mark.parametrize(
    ("act", "given"),
    [
        (lambda x: x[..., :1], r"an array of shape \(2, 2, 1\)"),
        (lambda x: x[0, ...], r"an array of shape \(2, \d+\)"),
        (lambda _: None, "NoneType"),
    ],
)
def test_what_tokens_have_received_is_a_number_each(backend: Library, act: Callable[[Any], Any], given: str):
    policy, good = Watching(), Watching()
    cache, other = (LayerCache(12, policy=each, **SIZES) for each in (policy, good))
    for q, k, v in steps(backend, (30, 1, 5)):
        state = cache.state
        policy.wrong.append(act)
        with pytest.raises(ValueError, match=rf"policy 'watching' gave {given} as what tokens have received"):
            cache.step(q, k, v)
        policy.wrong.clear()
        assert cache.state is state
        assert np.array_equal(*(backend.numpy(each.step(q, k, v)) for each in (cache, other)))


def test_a_ranking_asked_for_is_checked_too(backend: Library):
    policy = Own()
    cache = LayerCache(20, policy=policy, **SIZES)
    (q, k, v), *_ = steps(backend, (12,))
    cache.step(q, k, v)
    policy.wrong.append(nan_at)
    with pytest.raises(ValueError, match="policy 'own' gave NaN"):
        cache.importance()


def test_a_slot_without_a_token_may_have_any_importance(backend: Library):
    policy = Own([lambda x, tokens: array_namespace(x).where(tokens.positions >= 0, x, x * float("nan"))])
    cache = LayerCache(10, policy=policy, **SIZES)
    (q, k, v), *_ = steps(backend, (30,))
    valid = np.ones((2, 1, 30), dtype=bool)
    valid[1, :, :20] = False
    cache.step(q, k, v, valid=backend.asarray(valid))
    assert (backend.numpy(cache.positions) >= 0).sum(-1).tolist() == [[10, 10], [10, 10]]


def test_nan_is_no_fault_of_a_policy_that_was_shown_nan(backend: Library):
    policy = Own([lambda x, tokens: x + 0 * tokens.keys[..., 0]])
    cache = LayerCache(10, policy=policy, **SIZES)
    (q, k, v), *_ = steps(backend, (30,))
    bad = np.asarray(backend.numpy(k)).copy()
    bad[1, 0, 5] = np.nan
    cache.step(q, backend.asarray(bad), v)
    assert cache.stored == 10


@pytest.mark.parametrize("scale", [1e18, 1e-25])
@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_of_ours_is_blamed_for_numbers_near_the_end_of_their_dtype(name: str, scale: float):
    rng = np.random.default_rng(0)
    cache = LayerCache(10, policy=name, **SIZES)
    with np.errstate(all="ignore"):
        for n in (30, 1, 1, 1, 1):
            cache.step(*((rng.standard_normal((2, heads, n, 4)) * scale).astype("float32") for heads in (4, 2, 2)))
    assert cache.stored < 13


def chosen(budget: Any = 3, **sizes: Any) -> Any:
    places = np.arange(5)[None] + np.zeros((2, 1), dtype=int)
    return retain(places * 1.0, places, **{"budget": budget, "sinks": 1, "window": 1, **sizes})


BUDGETS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "floats": (lambda: chosen(np.asarray([2.5, 3.0])), TypeError, "budget is float64 of shape (2,); use whole numbers"),
    "negative": (lambda: chosen(np.asarray([3, -2])), ValueError, "budget is -2, less than sinks and window, 1 + 1"),
    "less": (lambda: chosen(np.asarray([3, 1])), ValueError, "budget is 1, less than sinks and window, 1 + 1"),
    "shape": (lambda: chosen(np.asarray([3, 3, 3])), ValueError, "budget has shape (3,), which does not broadcast to"),
    "axes": (
        lambda: chosen(np.full((3, 2), 3)),
        ValueError,
        "budget has shape (3, 2), which does not broadcast to (2,)",
    ),
    "library": (lambda: chosen(torch.tensor([3, 3])), TypeError, "budget is an array of torch, positions one of numpy"),
    "True": (lambda: chosen(True, sinks=0), TypeError, "budget is True; use a whole number"),
    "sinks": (lambda: chosen(sinks=-1), ValueError, "sinks is -1; it cannot be negative"),
    "half": (lambda: chosen(sinks=1.5), TypeError, "sinks is 1.5, a float; use a whole number"),
    "window": (lambda: chosen(window=None), TypeError, "window is None, a NoneType; use a whole number"),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_budgets_are_refused_by_name(name: str):
    call, error, message = BUDGETS[name]
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_budgets_of_whole_numbers_hold_for_each_head():
    assert chosen(np.asarray([3, 2])).evicted.sum(-1).tolist() == [2, 3]
    assert chosen(np.int64(2)).evicted.sum(-1).tolist() == [3, 3]


WHOLE, NUMBER, TRUE = "use a whole number", "use a number", "use True or False"


@pytest.mark.parametrize(
    ("policy", "argument", "bad", "remedy"),
    [
        ("caote", "fast", "no", TRUE),
        ("caote", "fast", np.True_, TRUE),
        ("caote", "observes", "x", WHOLE),
        ("caote", "observes", 2.5, WHOLE),
        ("criticalkv", "observes", "x", WHOLE),
        ("criticalkv", "first", None, NUMBER),
        ("criticalkv", "first", "x", NUMBER),
        ("criticalkv", "epsilon", None, NUMBER),
        ("criticalkv", "epsilon", [1], NUMBER),
        ("leverage", "values", "no", TRUE),
        ("leverage", "centred", 0, TRUE),
        ("expected-attention", "values", None, TRUE),
        ("random", "seed", None, WHOLE),
        ("random", "seed", 2.5, WHOLE),
        ("lagkv", "lag", None, WHOLE),
        ("lagkv", "lag", 2.5, WHOLE),
        ("balanced", "novelty", None, NUMBER),
        ("balanced", "novelty", "x", NUMBER),
        ("twice", "share", None, NUMBER),
        ("twice", "share", True, NUMBER),
    ],
)
def test_policies_refuse_by_name_when_they_are_made(policy: str, argument: str, bad: Any, remedy: str):
    with pytest.raises(TypeError, match=rf"^{argument} is {re.escape(repr(bad))}.*{remedy}"):
        POLICIES[policy](**{argument: bad})  # type: ignore[arg-type]


def test_a_criticalkv_of_infinite_attention_is_refused():
    with pytest.raises(ValueError, match="epsilon is inf; use a share of attention, finite"):
        POLICIES["criticalkv"](epsilon=math.inf)  # type: ignore[call-arg]


def test_policies_take_any_librarys_numbers():
    assert POLICIES["balanced"](novelty=np.float32(0.5)).novelty == 0.5  # type: ignore[call-arg, attr-defined]
    assert POLICIES["random"](seed=np.int64(3)).seed == 3  # type: ignore[call-arg, attr-defined]
