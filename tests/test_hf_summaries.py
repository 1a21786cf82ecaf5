"""`MomentCache` with anchored summaries inside a model: rows, copies, chunks and half precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import left_padded, prompt, tiny
from test_hf import MODES, SMALL, generate
from test_hf_state import ROWS, proceed, state

from momentkv.hf import MomentCache
from momentkv.statistics.corrections import AnchoredSummaries
from momentkv.statistics.summaries import Summaries

SETTINGS: dict[str, Any] = {**SMALL, "correction": AnchoredSummaries(summaries=4, rank=2), "sharing": "uniform"}
# Of the largest element: roundings of two layers in float32, as in test_hf, and of regrouping summaries.
TOLERANCE = 1e-4
# Whole numbers of 16 bits fall to either side where these differ, once at each eviction.
CODES_TOLERANCE = 1e-3


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    tolerance = CODES_TOLERANCE if actual.dtype == torch.int16 else TOLERANCE
    actual, expected = (x.double() for x in (actual, expected))
    same = (actual == expected) | ((actual - expected).abs() <= tolerance * expected[expected.isfinite()].abs().max())
    assert same.all()


def assert_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        if "slope" not in name:  # directions have no sign
            assert_close(actual[name], x)


def conversation() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of three rows; the second is padded."""
    return left_padded([prompt(1, 60 - (13 if row == 1 else 0), seed=row) for row in range(3)])


def read(ids: torch.Tensor, mask: torch.Tensor, family: str = "llama") -> MomentCache:
    cache = MomentCache(tiny(family), 14, **SETTINGS)
    for start, stop in ((0, 58), (58, 59), (59, 60)):
        proceed(family, cache, ids[:, start:stop], mask[:, :stop])
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_left_padded_row_equals_the_row_alone(family: str):
    rows = [prompt(1, 120, seed=1), prompt(1, 98, seed=2), prompt(1, 118, seed=3)]
    # With fewer tokens than dimensions all are equally novel, and rounding would rank them.
    budget = 56
    ids, mask = left_padded(rows)
    batch = MomentCache(tiny(family), budget, **SETTINGS)
    tokens, logits = generate(tiny(family), batch, ids, mask, new=12)
    for index, row in enumerate(rows):
        alone = MomentCache(tiny(family), budget, **SETTINGS)
        own, expected = generate(tiny(family), alone, row, new=12)
        assert torch.equal(tokens[index, ids.shape[1] :], own[0, row.shape[1] :])
        assert_close(logits[index], expected[0])
        for layer, core in batch.moment_layers.items():
            twin = alone.moment_layers[layer].moments
            assert isinstance(twin, Summaries)
            assert torch.equal(core.moments.count[index], twin.count[0])
            assert_close(core.moments.strength[index], twin.strength[0])
            assert (twin.count > 0).all()


@pytest.mark.parametrize("operation", ROWS)
def test_rows_move_with_their_summaries_and_query_statistics(operation: str):
    ids, mask = conversation()
    move, rows = ROWS[operation]
    moved, fresh = read(ids, mask), read(ids[rows], mask[rows])
    before = state(moved)
    move(moved)
    for name, x in state(moved).items():
        assert torch.equal(x, before[name][rows])
    assert any("query_mean" in name for name in before)
    assert any("evicted.codes" in name for name in before)
    mask, more = mask[rows], prompt(len(rows), 9, seed=9)
    for step in range(9):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        assert_close(*(proceed("llama", cache, more[:, step : step + 1], mask) for cache in (moved, fresh)))
    assert_state(state(moved), state(fresh))


def test_deep_copies_are_independent():
    ids, mask = conversation()
    cache = read(ids, mask)
    before = {name: x.clone() for name, x in state(cache).items()}
    twin = copy.deepcopy(cache)
    more, longer = prompt(3, 9, seed=9), torch.nn.functional.pad(mask, (0, 9), value=1)
    out = proceed("llama", twin, more, longer)
    for name, x in state(cache).items():
        assert torch.equal(x, before[name]), name
    assert torch.equal(proceed("llama", cache, more, longer), out)


@pytest.mark.parametrize("mode", MODES)
def test_generation_in_every_mode_counts_each_token_once(mode: str):
    cache = MomentCache(tiny("llama"), 14, **SETTINGS)
    _, logits = generate(tiny("llama"), cache, prompt(2, 60), new=20, **MODES[mode])
    assert logits.isfinite().all()
    for core in cache.moment_layers.values():
        assert (core.keys.shape[2] + core.moments.count == core.seen).all()
        assert core.keys.shape[2] < 14 + 4
        assert core.state.query_mean.isfinite().all()
    sizes = sum(x.numel() * x.element_size() for x in state(cache).values())
    assert cache.nbytes == sizes


def test_order_zero_has_no_slope_and_plain_eviction_no_state():
    outs = {}
    for order in (None, 0, 1):
        cache = MomentCache(tiny("llama"), 14, policy="streaming", order=order, **SETTINGS)
        tiny("llama")(prompt(1, 60), past_key_values=cache)
        core = cache.moment_layers[0]
        assert getattr(core.moments, "rank", None) == {None: None, 0: 0, 1: 2}[order]
        assert (core.moments.nbytes == 0) == (order is None)
        assert (core.state.query_mean is None) == (order is None)
        outs[order] = tiny("llama")(prompt(1, 1, seed=5), past_key_values=cache).logits
    paper = MomentCache(tiny("llama"), 14, policy="streaming", **SMALL)
    tiny("llama")(prompt(1, 60), past_key_values=paper)
    outs["paper"] = tiny("llama")(prompt(1, 1, seed=5), past_key_values=paper).logits
    values = list(outs.values())
    assert all((a - b).abs().max() > 0.01 for index, a in enumerate(values) for b in values[:index])


def test_bfloat16_model_has_float32_summaries():
    model = tiny("qwen3", "momentkv", "bfloat16")
    cache = MomentCache(model, 14, **SETTINGS)
    _, logits = generate(model, cache, prompt(2, 60), new=10)
    assert logits.isfinite().all()
    for core in cache.moment_layers.values():
        assert core.keys.dtype == torch.bfloat16
        held = {x.dtype for x in (core.state.query_mean, core.state.query_square, *core.moments.arrays().values())}
        assert held == {torch.float32}
