"""Ways to compress: what their names mean, and how many tokens they retain at equal bytes."""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import pytest
import torch
from models import prompt, tiny

from momentkv import POLICIES
from momentkv.evaluation.commands import grid_of
from momentkv.evaluation.settings import (
    CHOICES,
    DEFAULT,
    NAMED,
    TRIAL,
    Setting,
    bytes_as_tokens,
    empty_cache,
    moment_tokens,
    setting_of,
    settings_grid,
)
from momentkv.hf import MomentCache
from momentkv.policies import SnapKV
from momentkv.statistics.corrections import AnchoredSummaries

SMALL = {"sinks": 1, "window": 8}
CONTEXT = 60


@pytest.mark.parametrize("exact_window", [2, 8])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("method", ["snapkv/none", "default"])
@torch.inference_mode()
def test_few_bits_are_compared_at_equal_bytes(bits: int, itemsize: int, method: str, exact_window: int):
    """Codes, steps, exact tokens, standards and statistics: at most those of the budget, and not one token less."""
    model, budget = tiny("llama"), 90
    named = setting_of(f"{method}@{bits}")
    chosen, always = (named.order, named.kind, named.sharing, named.bits), {"window": 8, "exact_window": exact_window}
    (setting,) = settings_grid(model, [named.policy], [budget], [chosen], itemsize=itemsize, **always)
    cache = empty_cache(model, setting, **always)
    model(prompt(1, 15 * CONTEXT), past_key_values=cache)
    cores = cache.moment_layers.values()
    assert all(sum(core.config.bits) == 2 * bits and core.has_evicted for core in cores)
    held = [item for core in cores for item in core.arrays().items()]
    names = ("keys", "values", "_step", "_mean", "_deviation")
    floats = {"recent_keys", "recent_values", "key_mean", "key_deviation", "value_deviation"}
    # The model stores numbers of 32 bits, whatever they are counted in; the step to come has a slot more.
    counted = sum(
        x.numel() * (itemsize if name in floats else x.element_size())
        for name, x in held
        if name.endswith(names) and not name.startswith(("evicted", "query"))
    )
    heads, pair = 4, 2 * 16 * itemsize
    state = moment_tokens(model, setting, itemsize=itemsize) - 1.5
    counted = counted / heads - pair + state * pair
    assert budget * pair - 2 * pair < counted <= budget * pair
    assert bytes_as_tokens(model, setting, itemsize=itemsize, **always) == budget


@pytest.mark.parametrize("method", ["default@2", "default@", "snapkv@4", "snapkv/none@four", "@4"])
def test_bits_that_there_are_not_are_refused_by_name(method: str):
    with pytest.raises(ValueError, match=r"(bits is|methods has) "):
        setting_of(method)


CORRECTIONS = [(None, "moments"), (0, "moments"), (1, "moments"), (0, "summaries"), (1, "summaries")]


@pytest.mark.parametrize(("itemsize", "budgets"), [(None, [35, 40]), (4, [35, 40]), (2, [44, 50])])
@torch.inference_mode()
def test_grid_compares_at_equal_bytes(itemsize: int | None, budgets: list[int]):
    """Keys, values and what stands for the others: at most those of the budget, and less than one token a head less."""
    model, ids = tiny("llama"), prompt(1, CONTEXT)
    grid = settings_grid(model, ["momentkv", "knorm"], budgets, CORRECTIONS, window=8, itemsize=itemsize)
    assert [(x.policy, x.order, x.kind) for x in grid] == [
        (policy, *correction) for _ in budgets for policy in ("momentkv", "knorm") for correction in CORRECTIONS
    ]
    stored, counted = 2 * 16 * 4, 2 * 16 * (itemsize or 4)
    for index, setting in enumerate(grid):
        budget = budgets[index // 10]
        assert setting.budget == budget - moment_tokens(model, setting, itemsize=itemsize)
        cache = MomentCache(
            model,
            setting.budget,
            policy=setting.policy,
            order=setting.order,
            correction=setting.kind,
            block=1,
            sharing="uniform",
            **SMALL,
        )
        model(ids, past_key_values=cache)
        cores = cache.moment_layers.values()
        arrays = [(name, x) for core in cores for name, x in core.arrays().items()]
        assert {core.stored for core in cores} == {setting.budget}
        # The model stores numbers of 32 bits, whatever they are counted in; statistics are counted as they are stored.
        vectors = sum(x.nbytes for name, x in arrays if name.endswith(("keys", "values")))
        assert vectors == 2 * 2 * stored * (setting.budget + 1)  # a slot for the token to come
        held = sum(x.nbytes for name, x in arrays if name.startswith(("evicted.", "query_")))
        besides = sum(x.nbytes for name, x in arrays if name.endswith(("positions", "attention", "nt_count", "counts")))
        assert cache.nbytes == vectors + held + besides
        statistics = held / (2 * 2)
        assert 0 <= budget * counted - (setting.budget * counted + statistics) < counted


def test_grid_leaves_out_heads_where_a_policy_looks_across_them():
    heads, layers = (None, "moments", "heads"), (None, "moments", "layers")
    grid = settings_grid(tiny("llama"), ["tova", "knorm"], [64], [heads, layers])
    assert [(x.policy, x.sharing) for x in grid] == [("tova", "layers"), ("knorm", "heads"), ("knorm", "layers")]
    with pytest.raises(ValueError, match="policy is 'tova', which looks across heads"):
        settings_grid(tiny("llama"), ["tova"], [64], [heads])


def test_grid_leaves_out_what_would_retain_too_few_and_is_never_empty():
    corrections = [(None, "moments"), (1, "moments"), (1, "summaries")]
    grid = settings_grid(tiny("llama"), ["knorm"], [43, 34, 33], corrections)
    assert [(x.budget, x.correction) for x in grid] == [(43, "none"), (37, "order 1"), (34, "none")]
    with pytest.raises(ValueError, match=r"budget is 43, whose bytes hold \d+ tokens .* at least 34 must be retained"):
        settings_grid(tiny("llama"), ["knorm"], [34, 43], corrections[2:])


@pytest.mark.parametrize(
    ("dtype", "itemsize", "size"), [("float32", None, 4), ("bfloat16", None, 2), ("float32", 2, 2), ("bfloat16", 4, 4)]
)
def test_moments_are_counted_in_tokens_rounded_up(dtype: str, itemsize: int | None, size: int):
    model = tiny("qwen3", "momentkv", dtype)
    token, vector = 2 * 16 * size, 2 * 16 + 4  # numbers of 16 bits and a step

    def cost(*setting: Any) -> int:
        return moment_tokens(model, Setting(*setting), itemsize=itemsize)

    state = {
        (0, "moments"): 4 + 2 * vector,
        (1, "moments"): 4 + (2 + 16) * vector,
        # Three scalars, twelve weights and pairs of means, anchor, variance, two query moments, two slopes of rank 2.
        (0, "summaries"): 4 * (3 + 12 + 2 * 16) + (2 * 12 + 2) * vector,
        (1, "summaries"): 4 * (3 + 12 + 2 * 16) + (2 * 12 + 2 + 2 * 2) * vector,
    }
    for (order, kind), held in state.items():
        assert cost("knorm", 64, order, kind) == math.ceil(held / token)
        # Summaries keep the statistics of queries that the policy needs; with others they come on top.
        both = held + 4 * 2 * 16 * (kind == "moments")
        assert cost("balanced", 64, order, kind) == math.ceil(both / token)
    assert cost("knorm", 64, None, "summaries") == 0
    assert cost("expected-attention", 64, None) == 4 // size


def test_methods_are_settings_by_name():
    for policy in POLICIES:
        for name, correction in CHOICES.items():
            setting = setting_of(f"{policy}/{name}")
            # "twice/none" is "twice" without its correction, budgets shared as there.
            assert setting == Setting(policy, 0, *correction) or f"{policy}/{name}" in NAMED
            assert setting.method == f"{policy}/{name}"
    assert setting_of("default") == setting_of("balanced/summaries-heads") == DEFAULT
    for method in NAMED:
        assert setting_of(method).method == method
    assert setting_of("twice") == setting_of("twice/summaries-heads")
    assert setting_of("twice/none") == setting_of("twice/none-heads")
    assert setting_of("kvzip/none") == setting_of("second-reading/none-kvzip")
    tried = setting_of("twice@tried")
    assert tried == dataclasses.replace(setting_of("twice@auto"), trial=TRIAL)
    assert (tried.method, tried.correction) == ("twice@tried", "summaries, by heads, tried bits")
    for method in ("", "snapkv", "snapkv/", "/none", "snapkv/none/none", "Default"):
        with pytest.raises(
            ValueError, match=f"methods has '{method}'; use default, twice, twice/none, kvzip/none, or POLICY"
        ):
            setting_of(method)


def test_settings_have_names():
    assert Setting("snapkv", 20, None).policy_name == Setting(SnapKV(), 20, None).policy_name == "snapkv"
    assert Setting(SnapKV(kernel=7), 20, None).policy_name == "SnapKV(observes=32, kernel=7)"
    assert [Setting("h2o", 20, order).correction for order in (None, 0, 1)] == ["none", "order 0", "order 1"]
    assert Setting("h2o", 20, None, "summaries").correction == "none"
    assert Setting("h2o", 20, 1, "summaries").correction == "summaries"
    assert "summaries=3" in Setting("h2o", 20, 1, AnchoredSummaries(summaries=3)).correction


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"decode": 32, "context": 64, "following": 64}, True),  # a text that becomes twice as long
        ({"decode": 32, "context": 64, "following": 63}, False),
        ({"segment": 31}, True),
        ({"segment": 32}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("bits", [16, 32])
def test_queries_that_budgets_are_shared_by_while_decoding_count(options: dict[str, int], counted: bool, bits: int):
    """32 vectors for each KV head, half a token each; where budgets are not shared by errors there are none."""
    model, methods = tiny("llama"), ["default", "default@4", "snapkv/none"]
    protocol = {"methods": methods, "budgets": [128], "bytes": bits, "window": 32, "exact_window": 8}
    default, coded, plain = grid_of(model, argparse.Namespace(**(protocol | options)))
    before = grid_of(model, argparse.Namespace(**protocol))
    assert before[0].budget - default.budget == (16 if counted else 0)
    assert (before[1].budget - coded.budget > 16) == counted
    assert plain.budget == 128
