"""Budgets that are shared anew while tokens are decoded, or read a few at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import prompt, tiny

from momentkv.cache.allocation import minimise_error
from momentkv.cache.curves import error_curves
from momentkv.cache.layer import LayerCache
from momentkv.cache.queries import joined_judges, judges_of
from momentkv.cache.second_reading import RereadBudget
from momentkv.cache.shared_budget import AGAIN, SharedBudget
from momentkv.hf import MomentCache, read

BUDGET = 70


def decode(model: Any, cache: MomentCache, ids: torch.Tensor, *, at_once: int = 1, **kwargs) -> torch.Tensor:
    parts = [ids[:, start : start + at_once] for start in range(0, ids.shape[1], at_once)]
    return torch.cat([model(part, past_key_values=cache, **kwargs).logits for part in parts], dim=1)


def cores_of(cache: MomentCache) -> list[LayerCache]:
    return list(cache.moment_layers.values())


@pytest.fixture
def shared_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens read at each time that budgets were shared by gathered queries."""
    seen: list[int] = []
    for kind in (SharedBudget, RereadBudget):

        def judge(self: SharedBudget, judges: Any, before: Any = kind.judge) -> None:
            seen.append(self.caches[0].seen)
            assert any(cache.is_due for cache in self.caches)
            before(self, judges)
            for cache in self.caches:
                assert all(n <= b for n, b in zip(cache.stored_by_head, cache.budgets, strict=True))

        monkeypatch.setattr(kind, "judge", judge)
    return seen


@pytest.mark.parametrize("parts", [[40], [1] * 40, [3, 17, 1, 19]])
def test_of_each_token_one_head_of_each_group_judges_in_turn(parts: list[int]):
    q = np.random.default_rng(0).normal(size=(2, 6, 40, 4))
    judges, first = None, 5
    for part in parts:
        start = first - 5
        judges = joined_judges(judges, q[..., start : start + part, :], None, 2, first)
        first += part
    assert judges.shape == (2, 2, 32, 4)
    for head in range(2):
        for slot, token in enumerate(range(8, 40)):
            assert np.array_equal(judges[:, head, slot], q[:, head * 3 + (5 + token) % 3, token])


def test_padding_judges_nothing():
    q = np.ones((1, 2, 3, 4))
    real = np.array([[[True, False, True]]])
    judges = joined_judges(None, q, real, 1, 0)
    assert np.array_equal(np.isnan(judges[0, 0, :, 0]), [False, True, False])


@pytest.mark.parametrize("bits", [None, 4])
@torch.inference_mode()
def test_budgets_are_those_of_the_least_error_for_the_gathered_queries(
    bits: int | None, monkeypatch: pytest.MonkeyPatch
):
    model, ids = tiny("llama"), prompt(1, 300)
    cache = MomentCache(model, BUDGET, bits=bits)
    queries: dict[int, list[torch.Tensor]] = {}
    attend, judge, checked = LayerCache.attend, SharedBudget.judge, []

    def seen(self: LayerCache, q: torch.Tensor, **kwargs: Any) -> Any:
        queries.setdefault(self.number, []).append(q)
        return attend(self, q, **kwargs)

    def judged(self: SharedBudget, judges: Any) -> None:
        """As of each layer by itself, ranked as at any other eviction while decoding."""
        ranked = [core.importance() for core in self.caches]
        for core, given in zip(self.caches, judges, strict=True):
            of_heads = torch.cat(queries[core.number][-32:], dim=2).reshape(1, 2, 2, 32, 16)
            turn = (core.seen - 31 + torch.arange(32)) % 2
            assert torch.equal(given, torch.stack([of_heads[:, :, turn[i], i] for i in range(32)], dim=2))
            core.newest_queries = given
        expected = minimise_error(self.caches, ranked, BUDGET, True)
        for core in self.caches:
            core.newest_queries = None
        judge(self, judges)
        budgets = [budget for core in self.caches for budget in core.budgets]
        assert budgets == expected
        assert sum(budgets) <= BUDGET * len(budgets)
        # All come down to their budgets at once, so that the next blocks are full at the same step.
        assert all(n <= b for core in self.caches for n, b in zip(core.stored_by_head, core.budgets, strict=True))
        assert {core.state.layout.recent - core.state.filled for core in self.caches} == {32}
        assert all(core.state.judges is None and core.newest_queries is None for core in self.caches)
        checked.append(budgets)

    monkeypatch.setattr(LayerCache, "attend", seen)
    monkeypatch.setattr(SharedBudget, "judge", judged)
    decode(model, cache, ids)
    assert len(checked) >= 3
    assert any(len(set(budgets)) > 1 for budgets in checked)


@pytest.mark.parametrize("at_once", [1, 8])
@pytest.mark.parametrize(("once", "first"), [(0, 112), (10, 112), (150, 310)])
@torch.inference_mode()
def test_budgets_are_shared_after_every_so_many_tokens(at_once: int, once: int, first: int, shared_at: list[int]):
    model, ids = tiny("llama"), prompt(1, 480)
    cache = MomentCache(model, 80)
    if once:
        model(ids[:, :once], past_key_values=cache)
    decode(model, cache, ids[:, once:], at_once=at_once)
    if at_once == 1:
        assert shared_at == list(range(first, 481, AGAIN))
    gaps = np.diff(shared_at)
    assert len(shared_at) >= 3
    assert min(gaps) >= AGAIN
    assert max(gaps) <= AGAIN + 40


@pytest.mark.parametrize(
    "options",
    [
        {"sharing": "uniform"},
        {"sharing": "ada-kv", "policy": "snapkv"},
        {"sharing": "pyramid", "budget": 80},
        {"budget": "60KiB"},
        {"static": True},
        {"certify": 1, "tolerance": 1e9},
    ],
)
@torch.inference_mode()
def test_where_budgets_are_not_shared_while_decoding_no_query_is_kept(options: dict[str, Any], shared_at: list[int]):
    model, ids = tiny("llama"), prompt(1, 260)
    cache = MomentCache(model, **({"budget": BUDGET} | options))
    model(ids[:, :100], past_key_values=cache)
    for token in ids[:, 100:].T:
        model(token[None], past_key_values=cache)
        assert all(core.state.judges is None for core in cores_of(cache))
    assert not shared_at


@torch.inference_mode()
def test_layers_that_evict_one_by_one_share_too(shared_at: list[int]):
    """Evidence counts the terms of sums, so that these layers are never joined."""
    model, ids = tiny("llama"), prompt(1, 300)
    cache = MomentCache(model, BUDGET, certify=1)
    decode(model, cache, ids)
    budgets = [budget for core in cores_of(cache) for budget in core.budgets]
    assert len(shared_at) == 4
    assert len(set(budgets)) > 1
    assert sum(budgets) <= BUDGET * len(budgets)


@torch.inference_mode()
def test_after_a_second_reading_its_scores_count_too(shared_at: list[int]):
    model, ids = tiny("llama"), prompt(1, 400)
    cache = MomentCache(model, BUDGET, policy="twice")
    read(model, ids[:, :130], cache, request=[])
    assert {core.shares_from for core in cores_of(cache)} == {2 * 130}
    before = [core.budgets for core in cores_of(cache)]
    decode(model, cache, ids[:, 130:])
    after = [core.budgets for core in cores_of(cache)]
    assert len(shared_at) == 2
    assert after != before
    assert sum(map(sum, after)) <= BUDGET * 4


@torch.inference_mode()
def test_bits_are_not_chosen_by_a_first_eviction_while_decoding(shared_at: list[int]):
    """Nothing has to go then, and as many bits as there are would seem best."""
    model, ids = tiny("llama"), prompt(1, 500)
    cache = MomentCache(model, BUDGET, bits="auto", sharing="heads")
    decode(model, cache, ids)
    assert {core.config.bits for core in cores_of(cache)} == {(5, 3)}
    assert shared_at
    budgets = [budget for core in cores_of(cache) for budget in core.budgets]
    assert len(set(budgets)) > 1
    assert sum(budgets) <= len(budgets) * cache.shared_budgets[0].tokens(cores_of(cache), [])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize(("once", "seen", "end"), [(1, 90, 200), (1, 120, 200), (1, 150, 200), (200, 210, 440)])
@torch.inference_mode()
def test_files_and_copies_go_on_with_the_queries_gathered_so_far(
    bits: int | None, once: int, seen: int, end: int, tmp_path: Path, shared_at: list[int]
):
    model, ids = tiny("llama"), prompt(2, end)
    cache = MomentCache(model, BUDGET, bits=bits)
    model(ids[:, :once], past_key_values=cache)
    decode(model, cache, ids[:, once:seen])
    cache.save(tmp_path / "cache")
    loaded, copied = MomentCache.load(tmp_path / "cache", model), copy.deepcopy(cache)
    expected = decode(model, cache, ids[:, seen:])
    assert any(at > seen for at in shared_at)
    for other in (loaded, copied):
        assert torch.equal(decode(model, other, ids[:, seen:]), expected)
        assert [core.budgets for core in cores_of(other)] == [core.budgets for core in cores_of(cache)]


def test_some_of_these_files_hold_queries(tmp_path: Path):
    model = tiny("llama")
    cache = MomentCache(model, BUDGET)
    with torch.inference_mode():
        decode(model, cache, prompt(1, 150))
    assert all(core.state.judges.shape == (1, 2, 16, 16) for core in cores_of(cache))


@torch.inference_mode()
def test_a_shared_eviction_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny("llama"), prompt(1, 300)
    cache, undisturbed = MomentCache(model, BUDGET), MomentCache(model, BUDGET)
    after, left = SharedBudget.share_from, [1]

    def fails(self: SharedBudget, tokens: int) -> None:
        after(self, tokens)
        if self is cache.shared_budgets[0] and left:
            left.pop()
            raise MemoryError

    monkeypatch.setattr(SharedBudget, "share_from", fails)
    for token in ids.T:
        expected = model(token[None], past_key_values=undisturbed).logits
        before = [core.state for core in cores_of(cache)]
        try:
            given = model(token[None], past_key_values=cache).logits
        except MemoryError:
            assert cache.get_seq_length() == undisturbed.get_seq_length() - 1
            cache.crop(0)
            assert all(core.state is state for core, state in zip(cores_of(cache), before, strict=True))
            given = model(token[None], past_key_values=cache).logits
        assert torch.equal(given, expected)
    assert not left


@torch.inference_mode()
def test_a_padded_row_shares_as_it_does_alone():
    model, ids, pads = tiny("llama"), prompt(1, 300), 20
    padded, alone = MomentCache(model, BUDGET), MomentCache(model, BUDGET)
    mask = torch.ones(1, pads + 300, dtype=torch.long)
    mask[:, :pads] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    long = torch.cat([torch.zeros(1, pads, dtype=torch.long), ids], dim=1)
    for start, stop in [(0, 40), *((t, t + 1) for t in range(40, 300))]:
        given = slice(pads + start if start else 0, pads + stop)
        kwargs = {"attention_mask": mask[:, : given.stop], "position_ids": places[:, given]}
        out = model(long[:, given], past_key_values=padded, **kwargs).logits[:, -1]
        expected = model(ids[:, start:stop], past_key_values=alone).logits[:, -1]
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    budgets = [[core.budgets for core in cores_of(cache)] for cache in (padded, alone)]
    assert budgets[0] == budgets[1]
    assert len({budget for own in budgets[0] for budget in own}) > 1


@torch.inference_mode()
def test_rows_that_have_ended_have_no_say():
    model, ids = tiny("llama"), prompt(2, 300)
    both, alone = MomentCache(model, BUDGET), MomentCache(model, BUDGET)
    ended = 60
    for t in range(300):
        mask = torch.ones(2, t + 1, dtype=torch.bool)
        mask[1, ended:] = False
        model(ids[:, t : t + 1], past_key_values=both, attention_mask=mask)
        model(ids[:1, t : t + 1], past_key_values=alone)
    budgets = [[core.budgets for core in cores_of(cache)] for cache in (both, alone)]
    assert budgets[0] == budgets[1]
    assert len({budget for own in budgets[0] for budget in own}) > 1


@torch.inference_mode()
def test_tokens_that_are_taken_back_judge_nothing(shared_at: list[int]):
    model, ids = tiny("llama"), prompt(1, 300)
    cache = MomentCache(model, BUDGET)
    decode(model, cache, ids[:, :160])
    assert all(core.state.judges is not None for core in cores_of(cache))
    cache.crop(-3)
    assert all(core.state.judges is None for core in cores_of(cache))
    before = len(shared_at)
    decode(model, cache, ids[:, 157:])
    assert shared_at[before] >= 157 + 32


def test_a_head_goes_down_to_its_budget_though_its_block_is_not_full():
    rng = np.random.default_rng(0)
    cache = LayerCache(20, sinks=1, window=4, block=8)
    for _ in range(40):
        cache.step(*(rng.normal(size=(1, heads, 1, 8)) for heads in (4, 2, 2)))
    assert 20 < cache.stored < 28
    cache.evict()
    assert cache.stored > 20
    cache.evict(block=1)
    assert cache.stored == 20
    assert (cache.moments.weight == 20).all()


def test_layers_of_different_heads_each_err_as_a_part_of_their_own_outputs():
    rng = np.random.default_rng(0)
    settings = {"sinks": 1, "window": 32, "block": 32, "policy": "attention", "correction": "summaries"}
    caches = [LayerCache([60] * heads, keep_queries=True, **settings) for heads in (2, 4)]
    shared = SharedBudget(caches, minimise_error, by_head=True)
    for _ in range(400):
        for layer, cache in enumerate(caches):
            heads = (2, 4)[layer]
            q, k, v = (rng.normal(size=(1, number, 1, 8)) for number in (2 * heads, heads, heads))
            cache.append(k, v * 10.0**layer)  # outputs of one layer are ten times as large
            cache.attend(q)
        if not shared.is_ready:
            for cache in caches:
                shared.evict(cache)
            continue
        judges = [judges_of(cache) for cache in caches]
        ranked = [cache.importance() for cache in caches]
        for cache, queries in zip(caches, judges, strict=True):
            cache.newest_queries = queries
        expected = minimise_error(caches, ranked, 60, True)
        for cache in caches:
            cache.newest_queries = None
        shared.share_again()
        assert [budget for cache in caches for budget in cache.budgets] == expected
    assert len(set(expected)) > 1


@torch.inference_mode()
def test_a_reset_cache_shares_as_a_new_one(shared_at: list[int]):
    model, ids = tiny("llama"), prompt(1, 200)
    cache = MomentCache(model, BUDGET)
    first = decode(model, cache, ids)
    times = list(shared_at)
    cache.reset()
    assert torch.equal(decode(model, cache, ids), first)
    assert shared_at == times * 2


@pytest.mark.parametrize("window", [4, 32])
def test_errors_are_of_tokens_that_came_before_each_query(window: int):
    """Queries that were gathered may be older than the window, whose slots then hold other tokens than theirs."""
    rng = np.random.default_rng(0)
    cache = LayerCache(48, policy="knorm", correction="none", sinks=1, window=window, block=4, keep_queries=True)
    for _ in range(120):
        cache.step(*(rng.normal(size=(1, heads, 1, 8)) for heads in (4, 2, 2)))
    judges = rng.normal(size=(1, 2, 32, 8))
    cache.newest_queries = judges
    view, grid = cache.view(), [36, 42]
    curves = error_curves(cache, grid)
    assert (view.positions[0, :, -32] < 120 - 32).all() == (window < 32)
    for head in range(2):
        keys, values, positions = view.keys[0, head], view.values[0, head], view.positions[0, head]
        order = np.argsort(np.linalg.norm(keys, axis=-1), kind="stable")
        free = [j for j in order if positions[j] != 0 and positions[j] < 120 - window]

        def out(slots: list[int], keys=keys, values=values, positions=positions, head=head) -> np.ndarray:
            logits = judges[0, head] @ keys[slots].T * 8**-0.5
            logits[positions[slots] > np.arange(120 - 32, 120)[:, None]] = -np.inf
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            return weights @ values[slots] / weights.sum(axis=-1, keepdims=True)

        always = [j for j in range(len(positions)) if j not in free]
        exact = out(list(range(len(positions))))
        for place, budget in enumerate(grid):
            off = out(always + free[: budget - len(always)]) - exact
            squares = (off * off).sum(axis=-1).mean()
            assert curves[head][place] > 0
            ratio = curves[head][place] / squares
            if (head, place) == (0, 0):
                norm = ratio
            np.testing.assert_allclose(ratio, norm, rtol=1e-8)
