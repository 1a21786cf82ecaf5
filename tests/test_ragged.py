"""One layer's cache whose heads have budgets of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import left_padded, prompt, tiny

from momentkv import POLICIES, LayerCache, get_policy
from momentkv.hf import MomentCache

OPTIONS = {"window": 8, "block": 4}


def tokens(count: int, seed: int = 0, batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, heads, count, 8)) for heads in (4, 2, 2))
    return q, k, v


def heads_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, head: int) -> tuple[np.ndarray, ...]:
    return q[:, 2 * head : 2 * head + 2], k[:, head : head + 1], v[:, head : head + 1]


def held(cache: LayerCache, row: int, head: int) -> list[int]:
    """Positions that a head of a row holds, in the order in which they are shown."""
    return [int(p) for p in cache.positions[row, head] if p >= 0]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    budgets=st.tuples(st.integers(12, 100), st.integers(12, 50)),
    correction=st.sampled_from(["moments", "summaries"]),
    policy=st.sampled_from(["momentkv", "snapkv", "balanced", "keydiff"]),
    prefill=st.sampled_from([5, 14, 60]),
    padding=st.sampled_from([(0, 0), (5, 5), (2, 13)]),
)
def test_every_head_is_a_cache_of_its_own(seed, budgets, correction, policy, prefill, padding):
    """Full or not, padded alike or each in its own way, in a prefill, a chunk and decoding."""
    options = {"correction": correction, "policy": policy, **OPTIONS}
    cache = LayerCache(budgets, **options)
    alone = [LayerCache(budget, **options) for budget in budgets]
    q, k, v = tokens(90, seed)
    valid = np.ones((2, 2, 90), dtype=bool)
    for head, count in enumerate(padding):
        valid[0, head, :count] = False
    for start, stop in [(0, prefill), (prefill, prefill + 16), *((t, t + 1) for t in range(prefill + 16, 90))]:
        x = tuple(part[..., start:stop, :] for part in (q, k, v))
        out = cache.step(*x, valid=valid[..., start:stop])
        for head, part in enumerate(alone):
            own = valid[:, head : head + 1, start:stop]
            expected = part.step(*heads_of(*x, head), valid=own)
            # The same sums in arrays of another shape, float64.
            np.testing.assert_allclose(out[:, 2 * head : 2 * head + 2], expected, rtol=1e-8, atol=1e-9)
            assert [held(cache, row, head) for row in range(2)] == [held(part, row, 0) for row in range(2)]
            for name, one in part.moments.arrays().items():
                if not name.startswith("slope"):  # directions have no sign
                    got = cache.moments.arrays()[name][:, head : head + 1]
                    np.testing.assert_allclose(got, one, rtol=1e-7, atol=1e-8, err_msg=name)
            assert cache.stored_by_head[head] < budgets[head] + 4
    # Heads that are not full yet may hold a block of slots more than they would alone; full ones do not (below).
    block = 4 * max(part.nbytes / part.stored for part in alone)
    assert cache.nbytes <= sum(part.nbytes for part in alone) + block
    assert cache.seen == 90
    assert cache.budget == list(budgets)
    assert cache.stored == max(cache.stored_by_head)


def test_bytes_are_those_of_the_heads_budgets():
    """Each head takes what it would take alone, once all of them are full."""
    cache, alone = LayerCache([20, 50], **OPTIONS), [LayerCache(budget, **OPTIONS) for budget in (20, 50)]
    q, k, v = tokens(70)
    cache.step(q, k, v)
    for head, part in enumerate(alone):
        part.step(*heads_of(q, k, v, head))
    assert cache.nbytes == sum(part.nbytes for part in alone)
    # By hand: float64 keys and values of 8, a position and attention a slot; budget and block; counts; moments.
    slot, moments = 2 * 8 * 8 + 4 + 8, (1 + 8 + 8 + 64) * 8
    assert cache.nbytes == 2 * sum((budget + 4) * slot + 2 * 4 + moments for budget in (20, 50))


def test_equal_budgets_are_one_budget():
    ragged, one = LayerCache([30, 30], **OPTIONS), LayerCache(30, **OPTIONS)
    q, k, v = tokens(64)
    for start, stop in [(0, 50), *((t, t + 1) for t in range(50, 64))]:
        x = tuple(part[..., start:stop, :] for part in (q, k, v))
        assert np.array_equal(ragged.step(*x), one.step(*x))
    assert ragged.arrays().keys() == one.arrays().keys()
    assert all(np.array_equal(ragged.arrays()[name], x) for name, x in one.arrays().items())
    assert (ragged.budget, one.budget) == ([30, 30], 30)


@given(budgets=st.tuples(st.integers(10, 40), st.integers(10, 40)), first=st.integers(1, 50), chunk=st.integers(1, 9))
@settings(max_examples=20)
def test_sinks_and_window_stay_and_every_token_is_held_or_folded_once(budgets, first, chunk):
    cache = LayerCache(budgets, sinks=2, window=6, block=3)
    q, k, v = tokens(60)
    gone: list[set[int]] = [set(), set()]
    for start in [0, *range(first, 60, chunk)]:
        stop = first if start == 0 else min(start + chunk, 60)
        cache.step(*(x[..., start:stop, :] for x in (q, k, v)))
        for row, head in np.ndindex(2, 2):
            there = held(cache, row, head)
            assert there == sorted(set(there))
            assert {p for p in range(stop) if p < 2 or p >= stop - 6} <= set(there) <= set(range(stop))
            assert len(there) <= max(budgets[head] + 2, 0)
            assert len(there) + cache.moments.weight[row, head] == stop
            if row == 0:
                assert not gone[head] & set(there)  # none comes back
                gone[head] = set(range(stop)) - set(there)


def test_heads_that_wait_rank_as_each_alone():
    """Between attention and eviction, where budgets are shared; also of heads that hold different numbers."""
    options = {"keep_queries": True, "correction": "summaries", **OPTIONS}
    cache, alone = LayerCache([20, 33], **options), [LayerCache(budget, **options) for budget in (20, 33)]
    q, k, v = tokens(120)
    valid = np.ones((2, 2, 120), dtype=bool)
    valid[0, 1, :3] = False  # padding in one head alone
    for part in (slice(0, 60), slice(60, 120)):
        x = tuple(each[..., part, :] for each in (q, k, v))
        cache.append(*x[1:])
        cache.attend(x[0], valid=valid[..., part])
        importance, shown = cache.importance(), cache.positions
        for head, one in enumerate(alone):
            own = heads_of(*x, head)
            one.append(*own[1:])
            one.attend(own[0], valid=valid[:, head : head + 1, part])
            for row in range(2):
                mine, other = shown[row, head] >= 0, one.positions[row, 0] >= 0
                assert held(cache, row, head) == held(one, row, 0)
                expected = one.importance()[row, 0, other]
                np.testing.assert_allclose(importance[row, head, mine], expected, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(cache.newest_queries[:, 2 * head : 2 * head + 2], one.newest_queries)
            one.evict()
        cache.evict()
        assert cache.newest_queries is None


def test_a_map_that_fails_at_any_array_changes_none():
    cache = LayerCache([20, 24], certify=1, **OPTIONS)
    q, k, v = tokens(40)
    cache.step(q, k, v)
    cache.append(*(x[..., :3, :] for x in (k, v)))
    before = {name: x.copy() for name, x in cache.arrays().items()}
    seen: list[int] = []
    cache.map(lambda x: seen.append(1) or x)
    assert len(seen) == len(before) + 4  # and those of the tokens that wait
    for fails_at in range(len(seen)):
        calls = iter(range(len(seen)))

        def select(x: np.ndarray, calls=calls, fails_at: int = fails_at) -> np.ndarray:
            if next(calls) == fails_at:
                raise MemoryError
            return x[1:]

        with pytest.raises(MemoryError):
            cache.map(select)
        assert cache.seen == 43
        assert before.keys() == cache.arrays().keys()
        assert all(np.array_equal(before[name], x) for name, x in cache.arrays().items())
    assert cache.attend(q[..., :3, :]).shape == (2, 4, 3, 8)


def test_rows_can_be_selected_and_all_forgotten():
    cache, row = LayerCache([20, 24], **OPTIONS), LayerCache([20, 24], **OPTIONS)
    q, k, v = tokens(40)
    cache.step(q, k, v)
    row.step(q[1:], k[1:], v[1:])
    cache.map(lambda x: x[1:])
    for name, x in row.arrays().items():
        np.testing.assert_allclose(cache.arrays()[name], x, rtol=1e-12, err_msg=name)
    cache.reset()
    assert cache.seen == cache.nbytes == 0
    assert cache.stored_by_head == [0, 0]
    assert cache.budget == [20, 24]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: LayerCache([]), "budget is empty"),
        (lambda: LayerCache([40, 20]), "budget is 20"),
        (lambda: LayerCache([40]).step(*tokens(9)), "budgets were given for 1 KV heads"),
        (lambda: LayerCache([40, 40]).append(tokens(9)[1], tokens(8)[2]), "all axes but the last must be equal"),
        (lambda: LayerCache([40, 40]).step(*tokens(9), valid=np.ones((2, 3, 9), dtype=bool)), "valid has shape"),
        (lambda: LayerCache([40, 41], policy="tova"), "policy is 'tova', which looks across"),
    ],
)
def test_what_does_not_fit_is_refused(act, message: str):
    with pytest.raises(ValueError, match=message):
        act()


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_heads_of_a_model_share_one_total(family: str):
    model = tiny(family)
    cache = MomentCache(model, budget=60, sharing="heads", correction="summaries", window=8, block=8)
    ids, mask = left_padded([prompt(1, 300), prompt(1, 280, seed=1)])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    cores = cache.moment_layers.values()
    assert sum(sum(core.budgets) for core in cores) <= 60 * 2 * len(cores)
    assert len({budget for core in cores for budget in core.budgets}) > 1
    out = model.generate(
        torch.cat([ids, ids[:, -2:]], 1),
        attention_mask=torch.cat([mask, mask[:, -2:]], 1),
        past_key_values=cache,
        max_new_tokens=20,
        do_sample=False,
    )
    assert out.shape == (2, 322)
    for core in cores:
        assert all(stored < budget + 8 for stored, budget in zip(core.stored_by_head, core.budgets, strict=True))


def test_heads_within_the_budget_are_the_full_cache():
    model, ids = tiny("llama"), prompt(1, 50)
    cache = MomentCache(model, budget=60, sharing="heads", correction="summaries", window=8)
    with torch.no_grad():
        logits = model(ids, past_key_values=cache).logits
        expected = tiny("llama", "sdpa")(ids).logits
    # Float32, sums of up to 64 products in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_rows_of_a_shared_cache_can_be_reordered():
    model = tiny("llama")
    cache = MomentCache(model, budget=60, sharing="heads", window=8, block=8)
    ids = prompt(2, 200)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        a = model(ids[1:, -1:], past_key_values=cache).logits
    assert a.shape[0] == 1


def test_defaults_share_among_heads_where_that_is_possible():
    model, ids = tiny("llama"), prompt(1, 300)
    shares = {}
    for budget, policy in ((60, "balanced"), (60, "tova"), ([60, 50], "balanced"), ([60, 50], "tova")):
        cache = MomentCache(model, budget, policy=policy)
        assert bool(cache.shared_budgets) == (budget == 60)
        with torch.no_grad():
            model(ids, past_key_values=cache)
        configs = [core.config for core in cache.moment_layers.values()]
        assert {(x.policy.name, x.order, x.correction.name) for x in configs} == {(policy, 1, "summaries")}
        shares[str(budget), policy] = [core.budgets for core in cache.moment_layers.values()]
    assert shares["60", "balanced"] != [[60, 60], [60, 60]]
    assert any(len(set(budgets)) > 1 for budgets in shares["60", "balanced"])
    # A policy that looks across heads shares among layers, and budgets that are given are kept.
    assert all(len(set(budgets)) == 1 for budgets in shares["60", "tova"])
    assert len({budgets[0] for budgets in shares["60", "tova"]}) > 1
    assert shares["[60, 50]", "balanced"] == shares["[60, 50]", "tova"] == [[60, 60], [50, 50]]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_policies_say_whether_they_look_across_heads(name: str):
    """What one head keeps changes with the other head, or its place, exactly where a policy says so."""
    q, k, v = tokens(90, batch=1)
    together, alone = (LayerCache(20, policy=name, **OPTIONS) for _ in range(2))
    together.step(q, k, v)
    alone.step(*heads_of(q, k, v, 1))
    assert np.array_equal(together.positions[:, 1:], alone.positions) != get_policy(name).couples_heads
    if get_policy(name).couples_heads:
        with pytest.raises(ValueError, match=f"policy is '{name}', which looks across"):
            MomentCache(tiny("llama"), 60, policy=name, sharing="heads")
