"""Rules that part a total among layers and heads, against their formulas, and caches that keep to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import left_padded, prompt, tiny

from momentkv.cache.ragged import RaggedCache
from momentkv.cache.sharing import SharedBudget, by_error, by_importance, importances_of, pyramid_budgets
from momentkv.hf import MomentCache

SINKS, WINDOW, AVERAGE = 1, 8, 40


def waiting(seed: int = 0, batch: int = 1, peaked: float = 1.0, count: int = 200, **options) -> RaggedCache:
    """A layer of two heads after the attention of a prefill; queries of the second fit its keys ``peaked`` times."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, heads, count, 8)) for heads in (4, 2, 2))
    q[:, 2:] *= peaked
    settings = {"sinks": SINKS, "window": WINDOW, "block": 1, "keep_queries": True, "policy": "snapkv"}
    cache = RaggedCache([AVERAGE, AVERAGE], **(settings | options))
    cache.append(k, v)
    cache.attend(q)
    return cache


@given(seed=st.integers(0, 10**6), peaked=st.sampled_from([0.0, 1.0, 20.0]), batch=st.integers(1, 2))
def test_ada_kv_counts_the_tokens_of_a_head_among_the_most_important_of_all(seed: int, peaked: float, batch: int):
    cache = waiting(seed, batch, peaked)
    free = AVERAGE - SINKS - WINDOW
    won = np.zeros(2)
    for row in range(batch):
        pairs = [
            (-part.importance()[row, 0, j], head, j)
            for head, part in enumerate(cache.parts)
            for j in range(SINKS, 200 - WINDOW)
        ]
        for _, head, _ in sorted(pairs)[: 2 * free]:
            won[head] += 1 / batch
    expected = [SINKS + WINDOW + int(0.2 * free + 0.8 * count + 1e-9) for count in won]
    assert by_importance([cache], [importances_of(cache)], AVERAGE) == expected
    assert sum(expected) <= 2 * AVERAGE


def test_ada_kv_gives_more_to_the_head_whose_attention_is_spread():
    cache = RaggedCache([AVERAGE, AVERAGE], sinks=SINKS, window=WINDOW, keep_queries=True, policy="snapkv")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 200, 8)) for heads in (4, 2, 2))
    q[:, 2:], k[:, 1, 50] = 1.0, 10.0  # all queries of the second head want one token
    cache.append(k, v)
    cache.attend(q)
    spread, sharp = by_importance([cache], [importances_of(cache)], AVERAGE)
    assert spread > AVERAGE > sharp


def test_heads_of_different_lengths_compete_too():
    cache = waiting()
    SharedBudget([cache], by_importance).evict(cache)
    assert len(set(cache.stored)) == 2
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, 64, 8)) for heads in (4, 2, 2))
    cache.append(k, v)
    cache.attend(q)
    again = by_importance([cache], [importances_of(cache)], AVERAGE)
    assert sum(again) <= 2 * AVERAGE
    assert min(again) > SINKS + WINDOW


@pytest.mark.parametrize("rule", [by_error, by_importance])
def test_each_head_keeps_what_it_would_keep_with_its_share_alone(rule):
    cache, alone = waiting(policy="attention"), waiting(policy="attention")
    SharedBudget([cache], rule).evict(cache)
    for part, own in zip(cache.parts, alone.parts, strict=True):
        own.budget = part.budget
        own.evict()
        assert np.array_equal(part.positions, own.positions)


@pytest.mark.parametrize("rule", [by_error, by_importance])
def test_a_layer_that_shares_by_itself_evicts_at_once(rule):
    cache = waiting(policy="attention", order=1, correction="summaries")
    shared = SharedBudget([cache], rule)
    shared.evict(cache)
    assert cache.stored == cache.budget
    assert sum(cache.budget) <= 2 * AVERAGE
    shared.reset()
    assert cache.budget == [AVERAGE, AVERAGE]


@given(free=st.integers(1, 5000), layers=st.integers(1, 80))
def test_pyramid_budgets_fall_linearly_within_the_total(free: int, layers: int):
    budgets = pyramid_budgets(SINKS + WINDOW + free, layers, sinks=SINKS, window=WINDOW)
    assert len(budgets) == layers
    assert min(budgets) >= SINKS + WINDOW + 1
    assert budgets == sorted(budgets, reverse=True)
    assert sum(budgets) <= (SINKS + WINDOW + free) * layers
    exact = np.linspace(2 * free - free / 20, free / 20, layers) if layers > 1 else np.array([free])
    if free >= 20:  # rounded down to whole tokens; below, the last layers' one token is taken from the first
        np.testing.assert_array_less(np.abs(np.array(budgets) - SINKS - WINDOW - exact), 1 + 1e-6)


@given(heads=st.integers(1, 8), free=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_ada_kv_keeps_to_the_total_however_small(heads: int, free: int, seed: int):
    average = SINKS + WINDOW + free
    cache = RaggedCache([average] * heads, sinks=SINKS, window=WINDOW, keep_queries=True, policy="snapkv")
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, 60, 4)) * 10 for _ in range(3))
    cache.append(k, v)
    cache.attend(q)
    budgets = by_importance([cache], [importances_of(cache)], average)
    assert sum(budgets) <= average * heads
    assert min(budgets) > SINKS + WINDOW


def test_a_pyramid_without_room_is_refused():
    with pytest.raises(ValueError, match="budget is 33; it must be at least"):
        pyramid_budgets(33, 4)


@pytest.mark.parametrize("sharing", ["layer-heads", "ada-kv", "pyramid"])
def test_models_keep_to_the_total_and_go_on(sharing: str):
    model = tiny("llama")
    cache = MomentCache(model, 60, sharing=sharing, policy="snapkv", correction="summaries", window=8, block=8)
    ids, mask = left_padded([prompt(1, 300), prompt(1, 280, seed=1)])
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False, prefill_chunk_size=128
    )
    assert out.shape == (2, 312)
    parts = [part for core in cache.moment_layers.values() for part in core.parts]
    heads = 2 if sharing == "pyramid" else 1
    assert heads * sum(part.budget for part in parts) <= 60 * 2 * len(cache.moment_layers)
    assert len({part.budget for part in parts}) > 1
    assert all(part.stored < part.budget + 8 for part in parts)
    if sharing != "pyramid":
        for core in cache.moment_layers.values():
            assert sum(core.budget) <= 2 * 60
