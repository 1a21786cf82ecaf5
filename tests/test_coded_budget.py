"""Bits and tokens chosen together by measured error, within a total of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import prompt, tiny
from transformers import DynamicCache

import momentkv.hf
from momentkv import LayerCache
from momentkv.cache.allocation import budget_grid, minimise_error, refine, share_budget
from momentkv.cache.coded_budget import (
    CODES,
    EVICTION_COUNTS,
    UNFORETOLD,
    CodedBudget,
    bought,
    chosen_code,
    tokens_read,
)
from momentkv.cache.curves import error_at, error_curves, measured_errors
from momentkv.codes import Standard, decode, encode, pair_of_bits, record_bytes

SINKS, WINDOW, EXACT, AVERAGE, COUNT, D = 1, 4, 2, 40, 200, 8
FIXED = SINKS + WINDOW
AS_IS = SINKS + EXACT  # of them, those that stay exact beside few bits
TOKEN = 2 * D * 8  # float64


def waiting(seed: int, **options) -> tuple[LayerCache, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A layer of two heads after a prefill, and what it has read; channels differ, and so does what attention needs."""
    rng = np.random.default_rng(seed)
    batch, budget = options.pop("batch", 1), options.pop("budget", AVERAGE)
    q, k, v = (rng.standard_normal((batch, heads, COUNT, D)) for heads in (4, 2, 2))
    k = k * np.exp(rng.standard_normal((2, 1, D))) + 3 * rng.standard_normal((2, 1, D))
    settings = {"sinks": SINKS, "window": WINDOW, "exact_window": EXACT, "block": 1, "keep_queries": True}
    settings["policy"] = "snapkv"
    cache = LayerCache(budget, **(settings | options))
    cache.append(k, v)
    cache.attend(q)
    return cache, (q, k, v)


def evicting(caches: list[LayerCache], *, by_head: bool = True, beside: int = 0) -> CodedBudget:
    shared = CodedBudget(caches, minimise_error, by_head=by_head, chooses_bits=True)
    shared.beside = beside
    for cache in caches:
        shared.evict(cache)
    return shared


@given(seed=st.integers(0, 10**6), by_head=st.booleans(), beside=st.sampled_from([0, 4]))
def test_all_records_take_at_most_the_bytes_of_the_average_at_full_precision(seed: int, by_head: bool, beside: int):
    caches = [waiting(seed + layer)[0] for layer in range(2)]
    shared = evicting(caches, by_head=by_head, beside=beside)
    (code,) = {cache.config.bits for cache in caches}
    assert code in CODES
    spent = sum((record_bytes(D, D, code) + beside) * (b - AS_IS) for cache in caches for b in cache.budgets)
    room = 4 * (AVERAGE - AS_IS) * (TOKEN + beside)
    assert spent <= room
    assert shared.average == AVERAGE
    for cache in caches:
        assert cache.state.layout.bits == code
        assert cache.state.keys.dtype == np.uint8
        stored = [width + cache.state.filled for width in cache.state.layout.widths]
        assert stored == [min(COUNT, budget) for budget in cache.budgets]


@pytest.mark.parametrize("unforetold", [0.0, UNFORETOLD, 0.5])
@pytest.mark.parametrize("average", [7, 9, 12, 16, 22, 30, 40])
def test_the_code_has_the_least_of_the_errors_that_it_names(average: int, unforetold: float):
    """By hand: each code's own curves at its own budget, shared, what rounding adds at the usual one, and the rest."""
    caches = [waiting(layer)[0] for layer in range(3)]
    importances = [cache.importance() for cache in caches]
    code, tokens = chosen_code(caches, importances, average, unforetold=unforetold)
    room = (average - AS_IS) * TOKEN
    usual = AS_IS + room // record_bytes(D, D, pair_of_bits(4))
    bought = {each: AS_IS + room // record_bytes(D, D, each) for each in CODES}
    least = {each: max(FIXED + 1, round(min(1.0, most / COUNT) * most)) for each, most in bought.items()}
    grid = budget_grid(usual, FIXED + 1, importances[0].shape[-1])
    curves = [x for c, i in zip(caches, importances, strict=True) for x in error_curves(c, grid, i)]
    found = {}
    for each in CODES:
        fine = sorted({least[each], *(budget for budget in refine(grid, curves[0])[0] if budget > least[each])})
        refined = [[error_at(grid, curve, budget) for budget in fine] for curve in curves]
        most = max(fine[0], bought[each])
        shares = share_budget(refined, fine, most * len(curves))
        evicted = sum(error_at(fine, y, b) for b, y in zip(shares, refined, strict=True))
        rounded = [
            measured_errors(c, grid, i, codes=[each], at=usual)[1][0] for c, i in zip(caches, importances, strict=True)
        ]
        place = grid.index(usual)
        more = [x - y[place] for x, y in zip([x for own in rounded for x in own], curves, strict=True)]
        away = max(0.0, 1 - bought[each] / COUNT)
        found[each] = EVICTION_COUNTS * evicted + sum(max(0.0, x) for x in more) + 6 * unforetold * away
    assert code == min(found, key=found.__getitem__)
    assert tokens == bought[code]
    assert len({round(x, 6) for x in found.values()}) == len(CODES)


def test_a_large_budget_gets_more_bits_than_a_small_one():
    chosen = []
    for average in (8, 30):
        caches = [waiting(layer, budget=average)[0] for layer in range(2)]
        chosen.append(chosen_code(caches, [cache.importance() for cache in caches], average)[0])
    assert sum(chosen[0]) < sum(chosen[1])


@pytest.mark.parametrize("average", [18, 20])
def test_what_nothing_foretells_wants_more_tokens_until_all_are_kept(average: int):
    caches = [waiting(layer, budget=average)[0] for layer in range(2)]
    importances = [cache.importance() for cache in caches]
    bits, kept = [], []
    for unforetold in (0.0, 0.1, 1.0, 10.0, 1e6):
        code, tokens = chosen_code(caches, importances, average, unforetold=unforetold)
        bits.append(sum(code))
        kept.append(min(COUNT, tokens))
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]
    most = bought(caches[0], average, 0)
    # Where several codes keep all tokens, the one of most bits.
    assert kept[-1] == min(COUNT, most(CODES[0]))
    assert all(min(COUNT, most(code)) < kept[-1] for code in CODES if sum(code) > bits[-1])


def test_padding_is_no_text_that_was_read():
    cache, _ = waiting(0, batch=2)
    assert tokens_read(cache) == COUNT
    positions = cache.new.positions.copy()
    positions[1, :, :50] = -1
    cache.new = cache.new._replace(positions=positions, padded=True)
    assert tokens_read(cache) == COUNT - 25


def test_rows_that_are_not_finite_have_no_say_and_without_any_it_is_four_bits():
    cache, _ = waiting(0)
    keys = cache.new.keys.copy()
    keys[0, :, 50] = np.nan
    cache.new = cache.new._replace(keys=keys)
    importance = np.random.default_rng(0).random((1, 2, COUNT))
    assert chosen_code([cache], [importance], AVERAGE)[0] == pair_of_bits(4)
    one, other = waiting(1, batch=2)[0], waiting(1, batch=2)[0]
    importance = np.random.default_rng(0).random((2, 2, COUNT))
    keys = other.new.keys.copy()
    keys[1, :, 50] = np.nan
    other.new = other.new._replace(keys=keys)
    grid = [20, 40]
    alone = [measured_errors(x, grid, importance, codes=CODES, at=40) for x in (one, other)]
    assert np.isfinite(alone[1][0]).all()
    assert np.isfinite(alone[1][1]).all()
    assert alone[0] != alone[1]


@pytest.mark.parametrize("policy", ["snapkv", "momentkv"])
def test_codes_change_no_curve_and_sixteen_bits_are_as_good_as_none(policy: str):
    cache, _ = waiting(0, policy=policy)
    grid = [10, 30, 100, 300]
    curves = error_curves(cache, grid)
    assert measured_errors(cache, grid, codes=[(3, 3)], at=30)[0] == curves
    fine = measured_errors(cache, grid, codes=[(16, 16)], at=100)[1][0]
    np.testing.assert_allclose(fine, [curve[2] for curve in curves], rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("bits", [(4, 2), (6, 6)])
def test_an_error_is_that_of_attention_to_records_of_the_best_tokens(bits: tuple[int, int]):
    """The oracle: records made and read, softmax over all of them, no correction."""
    cache, (q, k, v) = waiting(1, order=None)
    importance = np.random.default_rng(2).random((1, 2, COUNT))
    grid = [20, 90, 400]
    at = {budget: measured_errors(cache, grid, importance, codes=[(8, 8), bits], at=budget)[1][1] for budget in grid}
    standards = Standard.of(k), Standard.of(v, centred=False)
    rounded = [
        decode(*encode(x, standard, number), standard, number)
        for x, standard, number in zip((k, v), standards, bits, strict=True)
    ]
    always = np.arange(COUNT) < SINKS
    exact = always | (np.arange(COUNT) >= COUNT - EXACT)
    always |= np.arange(COUNT) >= COUNT - WINDOW
    newest = np.arange(COUNT - 32, COUNT)
    outs = {}
    for name, (keys, values) in {"exact": (k, v), "read": rounded}.items():
        keys, values = (np.where(exact[:, None], x, y) for x, y in zip((k, v), (keys, values), strict=True))
        for budget in [COUNT, *grid] if name == "read" else [COUNT]:
            for head in range(4):
                rank = np.argsort(-np.where(always, np.inf, importance[0, head // 2]), kind="stable")
                held = np.zeros(COUNT, dtype=bool)
                held[rank[:budget]] = True
                logits = q[0, head, newest] @ keys[0, head // 2].T / np.sqrt(D)
                logits = np.where(held & (np.arange(COUNT) <= newest[:, None]), logits, -np.inf)
                p = np.exp(logits - logits.max(-1, keepdims=True))
                outs[name, budget, head] = p @ values[0, head // 2] / p.sum(-1, keepdims=True)
    norm = np.mean([(outs["exact", COUNT, head] ** 2).sum(-1) for head in range(4)])
    for budget in grid:
        for head in range(2):
            off = [outs["read", budget, h] - outs["exact", COUNT, h] for h in (2 * head, 2 * head + 1)]
            np.testing.assert_allclose(at[budget][head], np.mean([(x**2).sum(-1) for x in off]) / norm, rtol=1e-9)


def test_layers_that_retain_tokens_keep_their_bits_at_the_next_prefill():
    caches = [waiting(layer)[0] for layer in range(2)]
    shared = evicting(caches)
    before = [cache.config.bits for cache in caches]
    rng = np.random.default_rng(9)
    for cache in caches:
        q, k, v = (rng.standard_normal((1, heads, 60, D)) for heads in (4, 2, 2))
        cache.append(k, v)
        cache.attend(q)
        shared.evict(cache)
    assert [cache.config.bits for cache in caches] == before
    with pytest.raises(ValueError, match=r"tokens are retained in .* already; call reset\(\) first"):
        caches[0].code((3, 3))
    for cache in caches:
        cache.reset()
    shared.reset()
    assert [(cache.config.bits, cache.budget) for cache in caches] == [(None, AVERAGE)] * 2


def test_an_eviction_that_fails_leaves_bits_as_they_were(monkeypatch: pytest.MonkeyPatch):
    caches = [waiting(layer)[0] for layer in range(2)]
    shared = CodedBudget(caches, minimise_error, by_head=True, chooses_bits=True)
    shared.evict(caches[0])
    monkeypatch.setattr(LayerCache, "evict", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        shared.evict(caches[1])
    assert all(cache.config.bits is None for cache in caches)
    assert all(cache.state.layout.bits is None for cache in caches)


@pytest.mark.parametrize("d", [1, 2, 4, 16])
@pytest.mark.parametrize("exact_window", [0, 2, 4])
def test_records_of_short_vectors_still_leave_a_token_beside_sinks_and_window(d: int, exact_window: int):
    """They take more bytes than the vectors of 16 bits that the budget was for."""
    rng = np.random.default_rng(d)
    q, k, v = (rng.standard_normal((1, heads, COUNT, d)).astype(np.float16) for heads in (4, 2, 2))
    settings = {"sinks": SINKS, "window": WINDOW, "exact_window": exact_window, "block": 1, "keep_queries": True}
    cache = LayerCache(FIXED + 1, policy="snapkv", **settings)
    cache.append(k, v)
    cache.attend(q)
    assert all(bought(cache, FIXED + 1, 4)(code) >= FIXED + 1 for code in CODES)
    evicting([cache], beside=4)
    assert all(budget >= FIXED + 1 for budget in cache.budgets)
    for head in range(2):
        held = cache.positions[0, head][cache.positions[0, head] >= 0].tolist()
        assert len(held) == cache.budgets[head]
        assert held[0] == 0
        assert held[-WINDOW:] == list(range(COUNT - WINDOW, COUNT))


@pytest.mark.parametrize("policy", ["balanced", "snapkv", "momentkv"])
@pytest.mark.parametrize(("bits", "exact_window"), [("auto", 8), ("auto", 2), (4, 2), ((3, 5), 0)])
@pytest.mark.parametrize("first", [40, 220])
@torch.inference_mode()
def test_a_total_in_bytes_is_never_exceeded_and_nearly_spent(policy: str, bits: Any, exact_window: int, first: int):
    model = tiny("llama")
    ids = prompt(2, 260)
    settings = {"policy": policy, "window": 8, "exact_window": exact_window, "block": 8}
    cache = momentkv.hf.MomentCache(model, "50KiB", bits=bits, **settings)
    model(ids[:, :first], past_key_values=cache)
    spent = [cache.nbytes]
    for t in range(first, 260):
        model(ids[:, t : t + 1], past_key_values=cache)
        spent.append(cache.nbytes)
    assert max(spent) <= 50 * 1024
    assert max(spent) >= 35 * 1024


@torch.inference_mode()
def test_what_fits_as_it_came_stays_exact_and_is_coded_when_it_no_longer_does():
    model = tiny("llama")
    ids = prompt(1, 400)
    cache, full = momentkv.hf.MomentCache(model, 80, bits="auto", window=8, block=8), DynamicCache(config=model.config)
    spent = []
    for start, stop in [(0, 40), *((t, t + 1) for t in range(40, 400))]:
        given, expected = (model(ids[:, start:stop], past_key_values=c).logits for c in (cache, full))
        cores = list(cache.moment_layers.values())
        bits = {core.state.layout.bits for core in cores}
        if stop < 88:
            assert bits == {None}
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
        else:
            assert bits == {pair_of_bits(4)}
        spent.append(cache.nbytes)
    # As many bytes as 80 tokens and a block as they came, what stands for the evicted ones, and the queries that
    # budgets are shared by, one for each KV head and token.
    core = cores[0]
    token = 2 * 16 * 4
    beside = core.state.evicted.nbytes / 2 + 2 * 16 * 4 + 3 * token / 2
    retained = core.state.layout.width
    assert retained > 3 * (80 - 9)
    per_head = (80 + 8) * token + 4 * (retained + 17) + 8 + beside + 32 * 16 * 4
    assert max(spent) <= len(cores) * 2 * per_head


@torch.inference_mode()
def test_a_file_holds_each_layers_bits(tmp_path: Path):
    model = tiny("llama")
    ids = prompt(1, 300)
    cache = momentkv.hf.MomentCache(model, 48, bits="auto", window=8, exact_window=3, block=8)
    model(ids[:, :280], past_key_values=cache)
    first = next(iter(cache.moment_layers.values()))
    cache.save(tmp_path / "a.safetensors")
    loaded = momentkv.hf.MomentCache.load(tmp_path / "a.safetensors", model)
    assert loaded.chooses_bits
    bits = [core.config.bits for core in cache.moment_layers.values()]
    assert [core.config.bits for core in loaded.moment_layers.values()] == bits
    assert first.config.bits == bits[0]
    assert {core.config.exact_window for core in loaded.moment_layers.values()} == {3}
    for t in range(280, 300):
        one, other = (model(ids[:, t : t + 1], past_key_values=c).logits for c in (cache, loaded))
        assert torch.equal(one, other)


@torch.inference_mode()
def test_after_a_second_reading_all_layers_have_the_same_bits():
    model = tiny("llama")
    cache = momentkv.hf.MomentCache(model, 48, bits="auto", policy="twice", window=8, block=8)
    momentkv.hf.read(model, prompt(1, 300), cache, request=[5, 6], progress=False)
    cores = list(cache.moment_layers.values())
    assert len({core.config.bits for core in cores}) == 1
    one = cores[0]
    k = one.state.recent_keys
    whole = 2 * k.shape[-1] * k.dtype.itemsize
    spent = sum(
        (b - 9) * record_bytes(k.shape[-1], k.shape[-1], one.config.bits) for core in cores for b in core.budgets
    )
    assert spent <= sum(len(core.budgets) for core in cores) * (48 - 9) * whole


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sharing": "uniform"}, "sharing='uniform', which does not measure errors"),
        ({"sharing": "kvzip"}, "sharing='kvzip'"),
        ({"budget": [64, 64]}, "sharing='uniform'"),
        ({"bits": "automatic"}, "bits is 'automatic'"),
    ],
)
def test_what_cannot_choose_its_bits_says_so(settings: dict, named: str):
    with pytest.raises(ValueError, match=named):
        momentkv.hf.MomentCache(tiny("llama"), **({"budget": 64, "bits": "auto"} | settings))


@pytest.mark.parametrize(
    ("settings", "chooses"),
    [
        ({"budget": "64KiB"}, True),
        ({"budget": 64}, False),
        ({"budget": 0.5}, False),
        ({"budget": "64KiB", "certify": 1}, False),
        ({"budget": "64KiB", "sharing": "uniform"}, False),
        ({"budget": "64KiB", "bits": None}, False),
        ({"budget": "64KiB", "policy": "twice"}, True),
    ],
)
def test_by_default_bits_are_chosen_where_the_budget_is_in_bytes_and_errors_are_measured(settings: dict, chooses: bool):
    assert momentkv.hf.MomentCache(tiny("llama"), **settings).chooses_bits == chooses
