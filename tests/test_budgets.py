"""One budget shared among layers: curves that are measured, and totals that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import prompt, tiny

from momentkv import AttentionState, LayerCache
from momentkv.backends import get_backend
from momentkv.cache.allocation import budget_grid, least_share, refine, share_budget, share_on_grids, water_level
from momentkv.cache.curves import error_curve, error_curves
from momentkv.hf import MomentCache
from momentkv.statistics.corrections import AnchoredSummaries

GRID = [4, 6, 10]


def waiting(seed: int = 0, window: int = 8, **options) -> LayerCache:
    """A layer after the attention of a prefill of 200 tokens, before its eviction."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, heads, 200, 8)) for heads in (4, 2, 2))
    cache = LayerCache(40, window=window, block=1, keep_queries=True, **options)
    cache.append(k, v)
    cache.attend(q)
    return cache


curves = st.lists(
    st.lists(st.floats(0, 1), min_size=len(GRID), max_size=len(GRID)).map(lambda x: sorted(x, reverse=True)),
    min_size=1,
    max_size=4,
)


@given(curves=curves, extra=st.integers(0, 30))
def test_shares_stay_within_total_and_grid(curves: list[list[float]], extra: int):
    total = GRID[0] * len(curves) + extra
    budgets = share_budget(curves, GRID, total)
    assert sum(budgets) <= total
    assert all(GRID[0] <= budget <= GRID[-1] for budget in budgets)


@given(seed=st.integers(0, 10**6), layers=st.integers(1, 4), extra=st.integers(0, 24))
def test_greedy_is_optimal_on_convex_curves_where_the_last_step_fits(seed: int, layers: int, extra: int):
    rng = np.random.default_rng(seed)
    grid = [4, 5, 6, 7, 8]  # equal steps, so that the last one always fits
    falls = -np.sort(-rng.random((layers, len(grid) - 1)), axis=1)
    convex = np.concatenate([np.zeros((layers, 1)), -np.cumsum(falls, axis=1)], axis=1) + 10
    total = grid[0] * layers + extra

    def error(budgets: tuple[int, ...]) -> float:
        return sum(convex[layer, grid.index(budget)] for layer, budget in enumerate(budgets))

    best = min(error(x) for x in itertools.product(grid, repeat=layers) if sum(x) <= total)
    assert error(tuple(share_budget(convex.tolist(), grid, total))) == pytest.approx(best, abs=1e-12)


def test_a_layer_without_error_gets_the_least():
    assert share_budget([[0.0, 0.0, 0.0], [1.0, 0.5, 0.1]], GRID, 14) == [4, 10]


def test_what_lowers_no_error_goes_to_those_that_have_least():
    assert share_budget([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], GRID, 14) == [7, 7]
    assert share_budget([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]], GRID, 30) == [10, 10]  # no more than the grid has
    assert share_on_grids([[0.0, 0.0], [0.0], [1.0, 0.5]], [[2, 9], [3], [4, 8]], 20) == [9, 3, 8]


@given(
    heads=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 60)), min_size=1, max_size=5), total=st.integers(0, 200)
)
def test_heads_fill_to_one_level_and_the_total_goes_as_far_as_it_can(heads: list[tuple[int, int]], total: int):
    def taken(level: int) -> int:
        return sum(max(0, min(level, top) - count) for count, top in heads)

    counts, tops = zip(*heads, strict=True)
    level = water_level(counts, total, tops)
    assert taken(level) <= total
    assert level == max(tops) or taken(level + 1) > total


def test_a_total_below_the_least_is_refused():
    with pytest.raises(ValueError, match="total is 7, but 2 layers need at least 8 tokens together"):
        share_budget([[1.0, 0.5, 0.1]] * 2, GRID, 7)


def test_grids_rise_and_leave_room_for_sinks_and_window():
    assert budget_grid(100, 34, 1000) == [40, 100, 250, 625]
    assert budget_grid(40, 40, 1000) == [40, 100, 250]


def test_each_share_gets_the_part_of_the_average_that_is_retained_of_all():
    """Of all that was read, not of what is stored: later chunks of a text are shared as freely as the first."""
    assert least_share(500, 34, 1000) == 250
    assert least_share(500, 34, 5000) == 50
    assert least_share(500, 34, 50_000) == 34
    assert least_share(500, 34, 400) == 500


@pytest.mark.parametrize("average", range(40, 4200, 37))
@pytest.mark.parametrize("read", [200, 1000, 4096])
def test_grids_end_with_all_tokens_and_keep_away_from_them_before(average: int, read: int):
    """At a few tokens less than all the error is next to nothing, and no power of the budget leads there."""
    grid = budget_grid(average, 34, read)
    assert grid == sorted(set(grid))
    assert average in grid
    if average < read:
        assert grid[-1] <= read
        within = [budget for budget in grid if average < budget < read]
        assert all(read - budget >= 0.1 * (read - average) - 1 for budget in within)
        assert (grid[-1] == read) == (6.25 * average > read)


ONE = AnchoredSummaries(summaries=1, rank=0, calibrated=False)


@pytest.mark.parametrize("window", [8, 32])
@pytest.mark.parametrize("options", [{"order": None}, {"order": 1}, {"order": 0, "correction": ONE}])
def test_curve_is_the_error_that_eviction_then_causes(options: dict, window: int):
    """Of a window that has all queries that judge, too: what is outside of it, all of them see."""
    options = options | {"window": window}
    cache = waiting(**options)
    q, k, v = cache.newest_queries, cache.keys, cache.values
    grid = [20, 60, 200, 300] if window < 20 else [40, 60, 200, 300]
    measured = error_curve(cache, grid)
    causal = np.arange(200) <= np.arange(168, 200)[:, None]
    products = np.einsum("bhgqd,bhnd->bhgqn", q.reshape(1, 2, 2, 32, 8), k) / np.sqrt(8)
    weights = np.exp(np.where(causal, products, -np.inf))
    exact = np.einsum("bhgqn,bhnd->bhgqd", weights / weights.sum(-1, keepdims=True), v)
    for budget, error in zip(grid, measured, strict=True):
        trial = waiting(**options)
        trial.budget = budget
        trial.evict()
        stored = trial.positions[0]
        kept = np.stack([np.isin(np.arange(200), head) for head in stored])[None, :, None, None, :]
        part = weights * kept
        out = np.einsum("bhgqn,bhnd->bhgqd", part / part.sum(-1, keepdims=True), v)
        if trial.config.corrects and trial.has_evicted:
            state = AttentionState(out.reshape(1, 4, 32, 8), np.log(part.sum(-1)).reshape(1, 4, 32))
            corrected = get_backend(q).correct(state, q, trial.moments.expansion(), scale=1 / np.sqrt(8))
            out = corrected.reshape(out.shape)
        expected = ((out - exact) ** 2).sum() / (exact**2).sum()
        # Both sides sum a few hundred products of order one in float64.
        assert error == pytest.approx(expected, rel=1e-9, abs=1e-20)
    assert measured[-1] == 0


def test_several_summaries_are_measured_by_one_that_stands_in():
    several, one = (error_curve(waiting(correction=kind), [20, 60]) for kind in ("summaries", ONE))
    assert several == one


def test_refined_curves_pass_through_what_was_measured_and_never_rise():
    budgets, errors = refine([34, 85, 212], [0.3, 0.01, 0.0])
    assert budgets == sorted(set(budgets))
    assert errors == sorted(errors, reverse=True)
    assert errors[budgets.index(85)] == pytest.approx(0.01)
    # Towards nothing in proportion: a head that needs all of its tokens is not thought to do with some.
    assert errors[1:][budgets[1:].index(next(b for b in budgets if b > 85)) :] == pytest.approx(
        [0.01 * (212 - budget) / (212 - 85) for budget in budgets if budget > 85]
    )


@pytest.mark.parametrize("window", [8, 32])
@pytest.mark.parametrize("correction", ["moments", "summaries"])
def test_curves_of_heads_are_those_of_each_head_alone(correction: str, window: int):
    """Also where heads hold different numbers, after an eviction; each in proportion to what it says.

    Of a window that has all queries that judge, too.
    """
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, heads, 260, 8)) for heads in (4, 2, 2))
    options = {"correction": correction, "window": window, "block": 1, "keep_queries": True}
    layer, grid = LayerCache([40, 55], **options), [20 if window == 8 else 36, 50, 90]
    alone = [LayerCache(budget, **options) for budget in (40, 55)]
    for start, stop in ((0, 200), (200, 260)):
        layer.append(k[:, :, start:stop], v[:, :, start:stop])
        layer.attend(q[:, :, start:stop])
        expected, said = [], []
        for head, each in enumerate(alone):
            each.append(*(x[:, head : head + 1, start:stop] for x in (k, v)))
            said.append((each.attend(q[:, 2 * head : 2 * head + 2, start:stop])[..., -32:, :] ** 2).mean())
            expected.append(error_curve(each, grid))
            each.evict()
        expected = np.array(expected) * (np.array(said) / np.mean(said))[:, None]
        # The same sums in arrays of another shape; where all is retained, their rounding is all there is.
        np.testing.assert_allclose(error_curves(layer, grid), expected, rtol=1e-9, atol=1e-24)
        np.testing.assert_allclose(error_curve(layer, grid), np.mean(expected, axis=0), rtol=1e-9)
        layer.evict()
        with pytest.raises(ValueError, match="the cache holds no newest queries"):
            error_curves(layer, [20, 50])
    assert layer.stored_by_head == [40, 55]


def test_curves_leave_the_cache_as_it_was():
    cache = waiting(correction="summaries")
    before, arrays = cache.held(), {name: x.copy() for name, x in cache.arrays().items()}
    waiting_tokens = [x.copy() for x in cache.new[:4]]
    error_curve(cache, [20, 60])
    assert cache.held() == before  # the very objects
    assert all(np.array_equal(x, cache.arrays()[name]) for name, x in arrays.items())
    assert all(np.array_equal(x, y) for x, y in zip(waiting_tokens, cache.new, strict=False))


def test_curves_without_queries_are_refused():
    cache = LayerCache(40, window=8)
    with pytest.raises(ValueError, match="keep_queries=True"):
        error_curve(cache, [40])


@settings(max_examples=5)
@given(seed=st.integers(0, 100))
def test_shared_caches_keep_to_the_total_at_every_step(seed: int):
    model, ids = tiny("llama"), prompt(1, 300, seed=seed)
    cache = MomentCache(model, budget=60, sharing="layers", correction="summaries", window=8, block=8)
    cores = cache.moment_layers.values()
    model(ids[:, :280], past_key_values=cache)
    assert sum(core.budget for core in cores) <= 60 * len(cores)
    assert sum(core.keys.shape[2] for core in cores) <= 60 * len(cores)
    for t in range(280, 300):
        model(ids[:, t : t + 1], past_key_values=cache)
        assert all(core.keys.shape[2] < core.budget + 8 for core in cores)


def test_shared_caches_forget_their_shares_on_reset():
    model = tiny("llama")
    cache = MomentCache(model, budget=60, sharing="layers", policy="momentkv", correction="moments", window=8)
    model(prompt(1, 280), past_key_values=cache)
    cache.reset()
    assert {core.budget for core in cache.moment_layers.values()} == {60}


def test_chunks_share_anew_and_stay_bounded():
    model = tiny("llama")
    cache = MomentCache(model, budget=60, sharing="layers", correction="summaries", window=8)
    model.generate(prompt(1, 300), past_key_values=cache, prefill_chunk_size=64, max_new_tokens=4, do_sample=False)
    cores = cache.moment_layers.values()
    assert sum(core.budget for core in cores) <= 60 * len(cores)
    assert all(core.keys.shape[2] < core.budget + core.config.block for core in cores)


def test_contexts_within_the_budget_are_not_touched():
    model = tiny("llama")
    cache = MomentCache(model, budget=300, sharing="layers", policy="momentkv", correction="moments", window=8)
    model(prompt(1, 200), past_key_values=cache)
    assert {core.keys.shape[2] for core in cache.moment_layers.values()} == {200}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"sharing": "even"}, "sharing is 'even'"), ({"sharing": "layers", "budget": [60, 60]}, "their average")],
)
def test_wrong_sharing_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MomentCache(tiny("llama"), **({"budget": 60} | options))


@pytest.mark.parametrize("padding", [slice(0, 30), slice(170, 200), slice(150, 180)], ids=["left", "right", "within"])
@pytest.mark.parametrize("correction", ["moments", "summaries"])
def test_curves_of_a_padded_batch_are_the_mean_of_its_rows(correction: str, padding: slice):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((2, heads, 200, 8)) for heads in (4, 2, 2))
    valid = np.ones((2, 1, 200), dtype=bool)
    valid[0, :, padding] = False
    options = {"window": 8, "block": 1, "keep_queries": True, "correction": correction, "policy": "attention"}

    def curves(row: slice, tokens: np.ndarray) -> list[list[float]]:
        cache = LayerCache(40, **options)
        cache.append(k[row][:, :, tokens], v[row][:, :, tokens])
        cache.attend(q[row][:, :, tokens], valid=valid[row][:, :, tokens])
        return error_curves(cache, [20, 60, 180, 300])

    together = curves(slice(0, 2), np.arange(200))
    alone = (curves(slice(0, 1), np.flatnonzero(valid[0])), curves(slice(1, 2), np.arange(200)))
    # 180 tokens are all that the shorter row has, 300 more than either has.
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=1e-9, atol=1e-20)


def test_a_known_importance_changes_nothing():
    one, other = waiting(correction="summaries"), waiting(correction="summaries")
    importance = one.importance()
    assert error_curves(one, [20, 60], importance) == error_curves(one, [20, 60])
    one.evict(importance)
    other.evict()
    assert all(np.array_equal(x, other.arrays()[name]) for name, x in one.arrays().items())
    backwards = waiting(correction="summaries")
    backwards.evict(-importance)
    assert not np.array_equal(backwards.positions, one.positions)
