"""Budgets after a second reading: one threshold on scores, then measured errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from momentkv import LayerCache
from momentkv.cache.allocation import least_share, minimise_error
from momentkv.cache.coded_budget import CodedBudget, chosen_code
from momentkv.cache.curves import error_curves
from momentkv.cache.rereading import take_scores
from momentkv.cache.second_reading import RereadBudget, by_threshold, error_at, looked_for, places_of
from momentkv.cache.shared_budget import SharedBudget
from momentkv.policies import Policy, Twice, get_policy

SINKS, WINDOW, AVERAGE, COUNT = 1, 4, 30, 150
FIXED = SINKS + WINDOW


def waiting(seed: int, batch: int = 1, peaked: float = 1.0, **options) -> LayerCache:
    """A layer of two heads after a prefill and a second reading, whose scores are ``peaked`` in the second head."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, heads, COUNT, 8)) for heads in (4, 2, 2))
    settings = {"sinks": SINKS, "window": WINDOW, "block": 1, "keep_queries": True, "policy": "twice"}
    cache = LayerCache(AVERAGE, **(settings | options))
    cache.append(k, v)
    cache.attend(q)
    scores = rng.random((batch, 2, COUNT)) ** np.array([1.0, peaked])[:, None]
    take_scores(cache, scores)
    return cache


def free_of_all(caches: list[LayerCache], of=lambda cache: cache.attention) -> list[tuple[float, int, int, int]]:
    """Scores of one row that compete, with layer, head and position."""
    return [
        (float(scores[0, head, j]), layer, head, j)
        for layer, scores in enumerate(map(of, caches))
        for head in range(2)
        for j in range(SINKS, COUNT - WINDOW)
    ]


@given(seed=st.integers(0, 10**6), peaked=st.sampled_from([0.2, 1.0, 6.0]))
def test_kvzip_keeps_what_is_above_one_threshold_in_the_whole_model(seed: int, peaked: float):
    caches = [waiting(seed + layer, peaked=peaked, policy="second-reading") for layer in range(2)]
    best = sorted(free_of_all(caches), reverse=True)[: 4 * (AVERAGE - FIXED)]
    shared = SharedBudget(caches, by_threshold, by_head=True)
    for cache in caches:
        shared.evict(cache)
    assert sum(sum(cache.budgets) for cache in caches) <= 4 * AVERAGE
    # A head without any keeps one, which is taken from the head that has most.
    alone = {(layer, head) for layer in range(2) for head in range(2)} - {(x[1], x[2]) for x in best}
    kept = {
        (layer, head, j) for layer, c in enumerate(caches) for head in range(2) for j in c.positions[0, head].tolist()
    }
    missing = [x for x in best if x[1:] not in kept]
    assert len(missing) <= len(alone)


def test_kvzip_parts_a_batch_by_the_mean_and_rows_with_nan_have_no_say():
    caches = [waiting(0, batch=2, peaked=4.0)]
    one = [waiting(0, batch=2, peaked=4.0)]
    places = 2 * (AVERAGE - FIXED)
    both = places_of(caches, [caches[0].attention], places)
    assert sum(both) <= places
    keys = one[0].new.keys.copy()
    keys[1, 0, 40] = np.nan
    one[0].new = one[0].new._replace(keys=keys)
    first = places_of(one, [one[0].attention], places)
    competing = sorted(free_of_all(one), reverse=True)[:places]
    assert first == [sum(x[2] == head for x in competing) for head in range(2)]


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("correction", ["none", "summaries"])
def test_each_head_keeps_what_the_second_reading_chose_for_it(share: float, correction: str):
    caches = [waiting(layer, peaked=3.0, policy=Twice(share=share), correction=correction) for layer in range(3)]
    total = 6 * (AVERAGE - FIXED)
    places = places_of(caches, [looked_for(cache) for cache in caches], int(share * total))
    best = sorted(free_of_all(caches, looked_for), reverse=True)[: int(share * total)]
    assert places == [sum(x[1:3] == (layer, head) for x in best) for layer in range(3) for head in range(2)]
    shared = RereadBudget(caches)
    for cache in caches:
        shared.evict(cache)
    kept = {
        (layer, head, j) for layer, c in enumerate(caches) for head in range(2) for j in c.positions[0, head].tolist()
    }
    assert {x[1:] for x in best} <= kept
    budgets = [budget for cache in caches for budget in cache.budgets]
    assert sum(budgets) <= 6 * AVERAGE
    assert sum(budgets) >= 6 * AVERAGE - 6  # shares are whole tokens
    if share == 1:
        assert budgets == [FIXED + count for count in places]


def one_head_needs_tokens(
    average: int, share: float, scores: np.ndarray, needless: Sequence[int] = (1,), policy: Policy | None = None
) -> LayerCache:
    """A layer of two heads; the newest queries of the second, or of others, attend to its sink alone."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, COUNT, 8)) for heads in (4, 2, 2))
    for head in needless:
        q[:, 2 * head : 2 * head + 2], k[:, head, 0] = 1.0, 20.0
    settings = {"sinks": SINKS, "window": WINDOW, "block": 1, "keep_queries": True, "correction": "none"}
    cache = LayerCache(average, policy=policy or Twice(share=share), **settings)
    cache.append(k, v)
    cache.attend(q)
    if policy is None:
        take_scores(cache, scores)
    return cache


def test_the_rest_goes_where_it_lowers_the_measured_error():
    cache = one_head_needs_tokens(AVERAGE, 0.5, np.random.default_rng(1).random((1, 2, COUNT)))
    chosen = places_of([cache], [looked_for(cache)], AVERAGE - FIXED)
    needs = [curve[0] for curve in error_curves(cache, [AVERAGE])]
    assert needs[1] < 1e-6 < needs[0]
    RereadBudget([cache]).evict(cache)
    assert cache.budgets[0] > FIXED + chosen[0] + (AVERAGE - FIXED) // 2
    assert sum(cache.budgets) <= 2 * AVERAGE


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_no_head_is_left_with_nothing_because_its_newest_queries_need_nothing(share: float):
    """Nor does the other get more than all tokens: what it cannot use goes to those that can."""
    average = 80
    scores = np.random.default_rng(1).random((1, 2, COUNT)) * np.array([1.0, 1e-9])[:, None]
    cache = one_head_needs_tokens(average, share, scores)
    RereadBudget([cache]).evict(cache)
    assert min(cache.budgets) == cache.budgets[1] >= round(average**2 / COUNT) > FIXED + 1
    assert max(cache.budgets) <= COUNT


def test_no_head_gets_more_than_all_tokens_and_the_others_get_what_is_left():
    average, scores = 90, np.random.default_rng(1).random((1, 2, COUNT))
    caches = [one_head_needs_tokens(average, 0.05, scores, needless) for needless in ((1,), (0, 1))]
    shared = RereadBudget(caches)
    for cache in caches:
        shared.evict(cache)
    budgets = [budget for cache in caches for budget in cache.budgets]
    assert budgets[0] == max(budgets) == COUNT
    assert sum(budgets) >= 4 * average - 4
    assert min(budgets) > round(average**2 / COUNT)


def test_after_one_reading_too_each_head_gets_the_part_that_is_retained_of_all_that_was_read():
    average = 80
    cache = one_head_needs_tokens(average, 0.0, np.zeros(0), policy=get_policy("expected-attention"))
    shared = SharedBudget([cache], minimise_error, by_head=True)
    shared.evict(cache)
    assert cache.budgets == [2 * average - least_share(average, FIXED + 1, COUNT), round(average**2 / COUNT)]
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((1, heads, 60, 8)) for heads in (4, 2, 2))
    q[:, 2:] = 1.0
    cache.append(k, v)
    cache.attend(q)
    shared.evict(cache)
    assert cache.budgets[1] == round(average**2 / (COUNT + 60))


def test_what_heads_get_in_any_case_is_scaled_to_the_total():
    average, scores = 80, np.random.default_rng(1).random((1, 2, COUNT)) * np.array([1.0, 1e-9])[:, None]
    cache = one_head_needs_tokens(average, 0.95, scores)
    RereadBudget([cache]).evict(cache)
    rest = 2 * (average - FIXED) - math.floor(0.95 * 2 * (average - FIXED))
    # The second reading has chosen one token of that head, and all that is left fills it.
    assert cache.budgets[1] == FIXED + 1 + rest < average**2 / COUNT
    assert sum(cache.budgets) == 2 * average


def test_a_later_prefill_shares_anew_and_scores_have_stayed():
    cache = waiting(0)
    shared = RereadBudget([cache])
    shared.evict(cache)
    before = {(head, j) for head in range(2) for j in cache.positions[0, head].tolist() if j >= 0}
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, 64, 8)) for heads in (4, 2, 2))
    cache.append(k, v)
    cache.attend(q)
    shared.evict(cache)
    assert sum(cache.budgets) <= 2 * AVERAGE
    after = {(head, j) for head in range(2) for j in cache.positions[0, head].tolist() if j >= 0}
    # Far more of the text than an even choice among all tokens would have left.
    assert len(before & after) > 10


@given(seed=st.integers(0, 10**6), average=st.integers(55, 80))
def test_after_a_second_reading_too_no_head_is_given_more_than_it_holds(seed: int, average: int):
    cache = waiting(seed, policy=Twice(share=0.1))
    cache.budgets = [FIXED + 1, 100]
    cache.evict()
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, 64, 8)) for heads in (4, 2, 2))
    q[:, :2], v[:, 0] = 0, 30 * v[:, 0]  # the first head attends to all it has, and says most
    cache.append(k, v)
    cache.attend(q)
    cache.budget = average
    held = cache.stored_by_head
    assert held == [FIXED + 1 + 64, 164]
    RereadBudget([cache]).evict(cache)
    assert all(budget <= most for budget, most in zip(cache.budgets, held, strict=True))


def test_after_a_second_reading_nothing_of_the_text_is_unforetold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CodedBudget, "unforetold", 5.0)
    caches = [waiting(layer, exact_window=2) for layer in range(2)]
    shared = RereadBudget(caches, chooses_bits=True)
    shared.average = 14
    ranked = [shared.importance(cache) for cache in caches]
    code, tokens = chosen_code(caches, ranked, 14, unforetold=0.0)
    assert chosen_code(caches, ranked, 14, unforetold=5.0)[0] != code
    for cache in caches:
        shared.evict(cache)
    assert {cache.config.bits for cache in caches} == {code}
    assert sum(sum(cache.budgets) for cache in caches) <= 4 * tokens


def test_nan_of_a_row_stops_no_other():
    cache = waiting(3, batch=2)
    keys = cache.new.keys.copy()
    keys[1, 1, 9] = np.nan
    cache.new = cache.new._replace(keys=keys)
    with np.errstate(all="ignore"):
        RereadBudget([cache]).evict(cache)
    assert np.isfinite(cache.keys[0]).all()
    assert sum(cache.budgets) <= 2 * AVERAGE


def test_budgets_after_a_second_reading_are_for_its_policy():
    with pytest.raises(ValueError, match="policy is 'snapkv'; budgets after a second reading are for policy='twice'"):
        RereadBudget([waiting(0, policy="snapkv")])


def test_errors_between_measured_budgets_are_powers():
    grid, curve = [10, 100, 1000], [1.0, 0.1, 0.05]
    assert [error_at(grid, curve, budget) for budget in (5, 10, 100, 1000, 5000)] == pytest.approx(
        [1, 1, 0.1, 0.05, 0.05]
    )
    assert error_at(grid, curve, 30) == pytest.approx(1 / 3)
    assert error_at(grid, [1.0, 0.5, 0.0], 550) == pytest.approx(0.25)
    assert error_at(grid, [1.0, 0.0, 0.0], 500) == 0
    assert math.isnan(error_at(grid, [1.0, math.nan, 0.1], 50))
