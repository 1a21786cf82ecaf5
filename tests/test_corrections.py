"""Corrections by name: one table, one contract, and no correction as one of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, Library

from momentkv import LayerCache, Moments, attend, correct
from momentkv.cache.accounting import state_bytes
from momentkv.cache.curves import error_curve
from momentkv.policies import POLICIES
from momentkv.statistics.corrections import (
    CORRECTIONS,
    AnchoredSummaries,
    Correction,
    NoCorrection,
    PaperMoments,
    get_correction,
)
from momentkv.statistics.expansion import Expansion, estimate_expansion
from momentkv.statistics.summaries import QueryWindow
from momentkv.testing.rounding import assert_same


@dataclasses.dataclass(frozen=True)
class Centre:
    """A state in a file of its own: the number of tokens and their means, under other names."""

    number: Any
    keys: Any
    values: Any

    @property
    def weight(self) -> Any:
        return self.number

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays().values())

    def arrays(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def map(self, function: Any) -> Centre:
        return Centre(*(function(x) for x in self.arrays().values()))

    def moments(self) -> Moments:
        return Moments(self.number, self.keys, self.values)

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        return self.moments().expansion(order=0)


class Centres(Correction):
    """All that a correction must say; the cache does the rest."""

    name = "centres"

    @property
    def order(self) -> int:
        return 0

    def empty(self, k: Any, v: Any) -> Centre:
        moments = Moments.empty(k, v, order=0)
        return Centre(moments.weight, moments.key_mean, moments.value_mean)

    def fold(self, state: Centre, k: Any, v: Any, *, mask: Any, window: QueryWindow | None) -> Centre:
        moments = state.moments().update(k, v, mask=mask)
        return Centre(moments.weight, moments.key_mean, moments.value_mean)

    def known(self, state: Centre) -> Moments:
        return state.moments()


def stepped(library: Library, *, budget: Any = 24, **settings: Any) -> tuple[Any, list[Any]]:
    """A cache after a prefill and forty tokens, and what it answered."""
    rng = np.random.default_rng(0)
    cache, outs = LayerCache(budget, window=8, block=4, **settings), []
    for count in (60, *[1] * 40):
        q, k, v = (library.asarray(rng.standard_normal((2, heads, count, 8))) for heads in (4, 2, 2))
        outs.append(library.numpy(cache.step(q, k, v)))
    return cache, outs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("correction", ["none", "order-0", "moments", "summaries"])
def test_every_name_is_a_correction_for_every_policy(correction: str, policy: str):
    cache, outs = stepped(LIBRARIES["numpy"], correction=correction, policy=policy)
    assert cache.config.correction == CORRECTIONS[correction]
    assert all(np.isfinite(out).all() for out in outs)
    state = cache.moments
    assert state.nbytes == sum(x.nbytes for x in state.arrays().values())
    assert (state.weight == (0 if correction == "none" else 100 - cache.stored)).all()
    known = cache.config.correction.known(state)
    assert (known.weight.shape, known.key_mean.shape, known.value_mean.shape) == ((2, 2), (2, 2, 8), (2, 2, 8))
    expansion = cache.config.correction.expansion(state)
    assert (expansion is None) == (correction == "none")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"correction": "none"}, {"order": None}),
        ({"correction": "none"}, {"order": None, "correction": "summaries"}),
        ({"correction": "none", "order": 0}, {"correction": NoCorrection()}),
        ({"correction": "order-0"}, {"order": 0}),
        ({"correction": PaperMoments(order=0)}, {"order": 0}),
        ({"correction": "order-1"}, {}),
        ({"correction": AnchoredSummaries(rank=0)}, {"correction": "summaries", "order": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("budget", [24, [20, 28]], ids=str)
def test_an_order_is_a_choice_of_the_correction(one: dict[str, Any], other: dict[str, Any], budget: Any):
    """So that each has two spellings, whose caches are equal to the last bit."""
    caches = [stepped(LIBRARIES["numpy"], budget=budget, policy="snapkv", **x) for x in (one, other)]
    for x, y in zip(*(outs for _, outs in caches), strict=True):
        assert_same(x, y)
    first, second = (cache.arrays() for cache, _ in caches)
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert_same(x, second[name])
    assert caches[0][0].nbytes == caches[1][0].nbytes


def test_no_correction_keeps_nothing_and_corrects_nothing(backend: Library):
    """And still is a state: it can be moved, folded and asked like any other."""
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((3, heads, 9, 4))) for heads in (4, 2, 2))
    correction = get_correction("none")
    state = correction.empty(k, v)
    mask = backend.asarray(np.ones((3, 2, 9), bool))
    state = correction.calibrate(correction.fold(state, k, v, mask=mask, window=None), q, k, scale=1.0, mask=mask)
    assert (state.nbytes, state.arrays(), correction.expansion(state)) == (0, {}, None)
    assert (correction.order, correction.anchored, correction.stand_in()) == (None, False, correction)
    one = state.map(lambda x: x[:1, ...])
    known = correction.known(one)
    assert (known.weight.shape, known.key_mean.shape, known.order) == ((1, 2), (1, 2, 4), 0)
    assert backend.dtype(known.weight) == "float64"
    assert (backend.numpy(one.weight) == 0).all()
    retained = attend(q, k, v)
    for x, y in zip(correct(retained, q, state), retained, strict=True):
        assert_same(backend.numpy(x), backend.numpy(y))
    assert state_bytes("none", d=4) == 0


def test_no_correction_holds_on_to_no_tokens():
    """The state outlives the prompt that it was made from; a view of it would keep all of it."""
    k = LIBRARIES["torch"].asarray(np.ones((1, 2, 5000, 8)))
    state = get_correction("none").empty(k, k)
    assert [x.untyped_storage().nbytes() for x in (state.keys, state.values)] == [0, 0]


@pytest.mark.parametrize("policy", ["momentkv", "novelty", "balanced", "streaming"])
def test_a_correction_is_one_class_and_nothing_else_knows_it(backend: Library, policy: str):
    """Its state has no field of `Moments`; it is order 0 of the paper under another name."""
    own, outs = stepped(backend, correction=Centres(), policy=policy)
    paper, expected = stepped(backend, correction="order-0", policy=policy)
    for x, y in zip(outs, expected, strict=True):
        assert_same(x, y)
    assert own.nbytes == paper.nbytes
    assert state_bytes(Centres(), d=8) == state_bytes("order-0", d=8)
    assert {"evicted.number", "evicted.keys", "evicted.values"} <= own.arrays().keys()
    ragged, _ = stepped(backend, budget=[20, 28], correction=Centres(), policy=policy)
    assert ragged.nbytes > 0


def test_budgets_are_measured_with_the_stand_in():
    """With one summary instead of twelve, until there is something that only the real ones know."""
    cache = LayerCache(24, window=8, block=4, correction="summaries", keep_queries=True)
    plain = LayerCache(24, window=8, block=4, correction=get_correction("summaries").stand_in(), keep_queries=True)
    for each in (cache, plain):
        q, k, v = (np.random.default_rng(1).standard_normal((1, heads, 60, 8)) for heads in (4, 2, 2))
        each.append(k, v)
        each.attend(q)
    assert error_curve(cache, [20, 30]) == error_curve(plain, [20, 30])
    assert get_correction("summaries").stand_in() == AnchoredSummaries(summaries=1, rank=0, calibrated=False)


def test_an_expansion_of_a_correction_is_that_of_its_state(backend: Library):
    rng = np.random.default_rng(0)
    q, k, v = (backend.asarray(rng.standard_normal((2, 9, 4))) for _ in range(3))
    window = QueryWindow.from_queries(q, 2)
    mask = backend.asarray(np.ones((2, 9), bool))
    for name in ("order-0", "moments", "summaries"):
        correction = CORRECTIONS[name]
        state = correction.fold(correction.empty(k, v), k, v, mask=mask, window=window)
        expansion = correction.expansion(state)
        assert expansion is not None
        assert (expansion.slope is None and expansion.slope_left is None) == (correction.order == 0)
        one = estimate_expansion(q, expansion, scale=0.5)
        other = estimate_expansion(q, state.expansion(order=correction.order), scale=0.5)
        for x, y in zip(one, other, strict=True):
            assert_same(backend.numpy(x), backend.numpy(y))
