"""One layer's cache whose heads have budgets of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import left_padded, prompt, tiny

from momentkv import POLICIES, LayerCache, get_policy
from momentkv.cache.ragged import RaggedCache
from momentkv.hf import MomentCache

OPTIONS = {"window": 8, "block": 4}


def tokens(count: int, seed: int = 0, batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((batch, heads, count, 8)) for heads in (4, 2, 2))
    return q, k, v


def heads_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, head: int) -> tuple[np.ndarray, ...]:
    return q[:, 2 * head : 2 * head + 2], k[:, head : head + 1], v[:, head : head + 1]


@settings(max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    budgets=st.tuples(st.integers(12, 50), st.integers(12, 50)),
    correction=st.sampled_from(["moments", "summaries"]),
    policy=st.sampled_from(["momentkv", "snapkv", "balanced", "keydiff"]),
)
def test_every_head_is_a_cache_of_its_own(seed: int, budgets: tuple[int, int], correction: str, policy: str):
    settings = {"correction": correction, "policy": policy, **OPTIONS}
    cache = RaggedCache(budgets, **settings)
    alone = [LayerCache(budget, **settings) for budget in budgets]
    q, k, v = tokens(90, seed)
    valid = np.ones((2, 1, 90), dtype=bool)
    valid[0, :, :5] = False
    for start, stop in [(0, 60), (60, 76), *((t, t + 1) for t in range(76, 90))]:
        x = tuple(part[..., start:stop, :] for part in (q, k, v))
        out = cache.step(*x, valid=valid[..., start:stop])
        expected = [part.step(*heads_of(*x, head), valid=valid[..., start:stop]) for head, part in enumerate(alone)]
        assert np.array_equal(out, np.concatenate(expected, axis=1))
        assert all(stored < budget + 4 for stored, budget in zip(cache.stored, budgets, strict=True))
    assert cache.nbytes == sum(part.nbytes for part in alone)
    assert cache.seen == 90
    assert cache.budget == list(budgets)
    assert [x.shape[-2] for x in cache.keys] == [x.shape[-2] for x in cache.values] == cache.stored


def test_equal_budgets_are_a_layer_cache():
    ragged, one = RaggedCache([30, 30], **OPTIONS), LayerCache(30, **OPTIONS)
    q, k, v = tokens(64)
    for start, stop in [(0, 50), *((t, t + 1) for t in range(50, 64))]:
        x = tuple(part[..., start:stop, :] for part in (q, k, v))
        # The same sums over an axis of another length; a few units in the last place.
        np.testing.assert_allclose(ragged.step(*x), one.step(*x), rtol=1e-12, atol=1e-14)
    assert ragged.nbytes == one.nbytes


def test_valid_may_differ_from_head_to_head():
    cache, alone = RaggedCache([20, 20], **OPTIONS), LayerCache(20, **OPTIONS)
    q, k, v = tokens(40)
    valid = np.ones((2, 2, 40), dtype=bool)
    valid[:, 1, :7] = False
    np.testing.assert_allclose(cache.step(q, k, v, valid=valid), alone.step(q, k, v, valid=valid), rtol=1e-12)


def test_a_step_that_fails_in_a_later_head_changes_none():
    cache = RaggedCache([20, 20], **OPTIONS)
    q, k, v = tokens(40)
    cache.step(q, k, v)
    before = {name: x.copy() for name, x in cache.arrays().items()}
    cache.parts[1].policy = None  # what the second head raises with
    with pytest.raises(AttributeError):
        cache.step(q[..., :8, :], k[..., :8, :], v[..., :8, :])
    assert cache.seen == 40
    assert before.keys() == cache.arrays().keys()
    assert all(np.array_equal(before[name], x) for name, x in cache.arrays().items())


@pytest.mark.parametrize(
    "act",
    [
        lambda cache, x: cache.append(*x[1:]),
        lambda cache, x: cache.observe(x[0]),
        lambda cache, x: cache.evict(),
        lambda cache, x: cache.map(lambda a: a[1:]),
    ],
    ids=["append", "observe", "evict", "map"],
)
def test_a_part_of_a_step_that_fails_in_a_later_head_changes_none(act, monkeypatch: pytest.MonkeyPatch):
    cache = RaggedCache([20, 20], **OPTIONS)
    cache.append(*tokens(40)[1:])
    before = {name: x.copy() for name, x in cache.arrays().items()}

    def fail(*arguments: object, **named: object) -> None:
        raise MemoryError

    for name in ("append", "observe", "evict", "map"):
        monkeypatch.setattr(cache.parts[1], name, fail)
    with pytest.raises(MemoryError):
        act(cache, tokens(40, seed=1))
    assert before.keys() == cache.arrays().keys()
    assert all(np.array_equal(before[name], x) for name, x in cache.arrays().items())


def test_heads_put_together_are_the_layer_that_they_are_parts_of():
    settings = {"keep_queries": True, "correction": "summaries", **OPTIONS}
    ragged, one = RaggedCache([20, 20], **settings), LayerCache(20, **settings)
    q, k, v = tokens(60)
    valid = np.ones((2, 2, 60), dtype=bool)
    valid[0, 1, :3] = False  # padding in one head alone
    for cache in (ragged, one):
        cache.append(k, v)
        cache.attend(q, valid=valid)
    together = ragged.together()
    assert together.padded
    assert together.arrays().keys() == one.arrays().keys()
    for name, x in one.arrays().items():
        np.testing.assert_allclose(together.arrays()[name], x, rtol=1e-12, atol=1e-14, err_msg=name)
    together.observe(q)
    one.observe(q)
    np.testing.assert_allclose(together.importance(), one.importance(), rtol=1e-12, atol=1e-14)
    ragged.evict()
    assert ragged.together() is None


def test_rows_can_be_selected_and_all_forgotten():
    cache, row = RaggedCache([20, 24], **OPTIONS), RaggedCache([20, 24], **OPTIONS)
    q, k, v = tokens(40)
    cache.step(q, k, v)
    row.step(q[1:], k[1:], v[1:])
    cache.map(lambda x: x[1:])
    for name, x in row.arrays().items():
        np.testing.assert_allclose(cache.arrays()[name], x, rtol=1e-12, err_msg=name)
    cache.reset()
    assert cache.seen == cache.nbytes == 0


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: RaggedCache([]), "budgets is empty"),
        (lambda: RaggedCache([40, 20]), "budget is 20"),
        (lambda: RaggedCache([40]).step(*tokens(9)), "budgets were given for 1 KV heads"),
        (lambda: RaggedCache([40, 40]).append(tokens(9)[1], tokens(8)[2]), "must agree up to the last axis"),
        (lambda: RaggedCache([40, 40]).step(*tokens(9), valid=np.ones((2, 3, 9), dtype=bool)), "valid has shape"),
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
    assert sum(sum(core.budget) for core in cores) <= 60 * 2 * len(cores)
    assert len({budget for core in cores for budget in core.budget}) > 1
    out = model.generate(
        torch.cat([ids, ids[:, -2:]], 1),
        attention_mask=torch.cat([mask, mask[:, -2:]], 1),
        past_key_values=cache,
        max_new_tokens=20,
        do_sample=False,
    )
    assert out.shape == (2, 322)
    for core in cores:
        assert all(stored < budget + 8 for stored, budget in zip(core.stored, core.budget, strict=True))


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
    model = tiny("llama")
    parts = [part for core in MomentCache(model, 60).moment_layers.values() for part in core.parts]
    assert len(parts) == 2 * 2
    assert {(part.policy.name, part.order, part.correction.name) for part in parts} == {("balanced", 1, "summaries")}
    for budget, policy, sharing in ((60, "tova", True), ([60, 50], "balanced", False), ([60, 50], "tova", False)):
        cache = MomentCache(model, budget, policy=policy)
        assert all(isinstance(core, LayerCache) for core in cache.moment_layers.values())
        assert bool(cache.shared_budgets) == sharing


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
