"""Rules that part a total among layers and heads, against their formulas, and caches that keep to them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from models import left_padded, prompt, tiny

from momentkv import LayerCache
from momentkv.cache.allocation import minimise_error, pyramid_budgets
from momentkv.cache.competition import by_importance
from momentkv.cache.shared_budget import SharedBudget
from momentkv.hf import MomentCache

SINKS, WINDOW, AVERAGE = 1, 8, 40


def waiting(seed: int = 0, batch: int = 1, peaked: float = 1.0, count: int = 200, **options) -> LayerCache:
    """A layer of two heads after the attention of a prefill; queries of the second fit its keys ``peaked`` times."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, heads, count, 8)) for heads in (4, 2, 2))
    q[:, 2:] *= peaked
    settings = {"sinks": SINKS, "window": WINDOW, "block": 1, "keep_queries": True, "policy": "snapkv"}
    cache = LayerCache(AVERAGE, **(settings | options))
    cache.append(k, v)
    cache.attend(q)
    return cache


@given(seed=st.integers(0, 10**6), peaked=st.sampled_from([0.0, 1.0, 20.0]), batch=st.integers(1, 2))
def test_ada_kv_counts_the_tokens_of_a_head_among_the_most_important_of_all(seed: int, peaked: float, batch: int):
    cache = waiting(seed, batch, peaked)
    free = AVERAGE - SINKS - WINDOW
    won = np.zeros(2)
    for row in range(batch):
        importance = cache.importance()[row]
        pairs = [(-importance[head, j], head, j) for head in range(2) for j in range(SINKS, 200 - WINDOW)]
        for _, head, _ in sorted(pairs)[: 2 * free]:
            won[head] += 1 / batch
    expected = [SINKS + WINDOW + int(0.2 * free + 0.8 * count + 1e-9) for count in won]
    assert by_importance([cache], [cache.importance()], AVERAGE, True) == expected
    assert sum(expected) <= 2 * AVERAGE


def test_ada_kv_gives_more_to_the_head_whose_attention_is_spread():
    cache = LayerCache([AVERAGE, AVERAGE], sinks=SINKS, window=WINDOW, keep_queries=True, policy="snapkv")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, heads, 200, 8)) for heads in (4, 2, 2))
    q[:, 2:], k[:, 1, 50] = 1.0, 10.0  # all queries of the second head want one token
    cache.append(k, v)
    cache.attend(q)
    spread, sharp = by_importance([cache], [cache.importance()], AVERAGE, True)
    assert spread > AVERAGE > sharp


def test_heads_of_different_lengths_compete_too():
    cache = waiting()
    SharedBudget([cache], by_importance, by_head=True).evict(cache)
    assert len(set(cache.stored_by_head)) == 2
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, heads, 64, 8)) for heads in (4, 2, 2))
    cache.append(k, v)
    cache.attend(q)
    again = by_importance([cache], [cache.importance()], AVERAGE, True)
    assert sum(again) <= 2 * AVERAGE
    assert min(again) > SINKS + WINDOW


@pytest.mark.parametrize("rule", [minimise_error, by_importance])
def test_each_head_keeps_what_it_would_keep_with_its_share_alone(rule):
    cache = waiting(policy="attention")
    SharedBudget([cache], rule, by_head=True).evict(cache)
    assert len(set(cache.budgets)) == 2
    for head, budget in enumerate(cache.budgets):
        own = waiting(policy="attention")
        own.budget = budget
        own.evict()
        positions = cache.positions[0, head]
        assert np.array_equal(positions[positions >= 0], own.positions[0, head])
        assert cache.moments.weight[0, head] == own.moments.weight[0, head]


@pytest.mark.parametrize("rule", [minimise_error, by_importance])
def test_a_layer_that_shares_by_itself_evicts_at_once(rule):
    cache = waiting(policy="attention", order=1, correction="summaries")
    shared = SharedBudget([cache], rule, by_head=True)
    shared.evict(cache)
    assert cache.stored_by_head == cache.budgets
    assert sum(cache.budgets) <= 2 * AVERAGE
    shared.reset()
    assert cache.budget == AVERAGE


def test_layers_that_share_wait_for_the_last_and_then_evict_all_or_none():
    layers = [waiting(seed, peaked=peaked) for seed, peaked in ((0, 0.2), (1, 3.0))]
    shared = SharedBudget(layers, minimise_error, by_head=False)
    shared.evict(layers[0])
    assert [layer.stored for layer in layers] == [200, 200]
    layers[1].config = None  # what the second layer raises with, after the first has been cut
    before = [layer.held() for layer in layers]
    with pytest.raises(AttributeError):
        shared.evict(layers[1])
    assert [layer.held() for layer in layers] == before
    layers[1].config = layers[0].config
    for layer in layers:
        shared.evict(layer)
    assert [layer.stored for layer in layers] == [layer.budget for layer in layers]
    assert sum(layer.budget for layer in layers) <= 2 * AVERAGE
    assert layers[0].budget != layers[1].budget
    assert all(len(set(layer.budgets)) == 1 for layer in layers)


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
    cache = LayerCache([average] * heads, sinks=SINKS, window=WINDOW, keep_queries=True, policy="snapkv")
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, 60, 4)) * 10 for _ in range(3))
    cache.append(k, v)
    cache.attend(q)
    budgets = by_importance([cache], [cache.importance()], average, True)
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
    cores = list(cache.moment_layers.values())
    budgets = [budget for core in cores for budget in core.budgets]
    assert sum(budgets) <= 60 * 2 * len(cores)
    assert len(set(budgets)) > 1
    for core in cores:
        assert all(stored < budget + 8 for stored, budget in zip(core.stored_by_head, core.budgets, strict=True))
        assert sum(core.budgets) <= 2 * 60 or sharing == "pyramid"
        assert len(set(core.budgets)) == 1 or sharing != "pyramid"


def read_in_two_parts(budgets: list[int], average: int, seed: int, *, spread: bool | None = None) -> LayerCache:
    """A layer whose heads hold different numbers of tokens: 200 were cut to the budgets, and 60 have come.

    If ``spread`` is not None, what comes looks for one token; if it is true, that of the last head for all.
    """
    cache = waiting(seed, peaked=4.0)
    cache.budgets = budgets
    cache.evict()
    rng = np.random.default_rng(seed + 1)
    q, k, v = (rng.standard_normal((1, heads, 60, 8)) for heads in (4, 2, 2))
    if spread is not None:
        q[:], k[:, :, 20] = 1.0, 30.0
    if spread:
        q[:, 2:], v[:, 1] = 0.0, 10 * v[:, 1]
    cache.append(k, v)
    cache.attend(q)
    cache.budget = average
    return cache


@given(seed=st.integers(0, 10**6), first=st.integers(10, 150), average=st.integers(60, 140))
@example(seed=0, first=10, average=140)
def test_no_head_is_given_more_than_it_holds_where_others_can_use_it(seed: int, first: int, average: int):
    caches = [read_in_two_parts(budgets, average, seed) for budgets in ([first, 150], [40, 60])]
    shares = minimise_error(caches, [cache.importance() for cache in caches], average, True)
    held = [count for cache in caches for count in cache.stored_by_head]
    assert held == [first + 60, 210, 100, 120]
    if sum(held) >= 4 * average:
        assert all(share <= most for share, most in zip(shares, held, strict=True))
        # Those that have least are filled to one level, which leaves less than a token for each.
        assert 4 * average - 4 < sum(shares) <= 4 * average
    else:  # nothing has to go, and there is room for what comes
        assert all(share >= most for share, most in zip(shares, held, strict=True))
        assert 4 * average - 4 < sum(shares) <= 4 * average


def test_a_head_may_keep_all_it_holds_though_no_head_of_the_first_layer_holds_as_much():
    """Errors are measured up to what the fullest layer holds, whichever it is."""
    average = 75
    caches = [
        read_in_two_parts(budgets, average, 0, spread=spread)
        for budgets, spread in (([30, 30], False), ([10, 190], True))
    ]
    assert [cache.stored_by_head for cache in caches] == [[90, 90], [70, 250]]
    shares = minimise_error(caches, [cache.importance() for cache in caches], average, True)
    assert shares[3] == max(shares) > 90
