"""Operations on the state of a `MomentCache`: rows, copies, resets and bytes, nothing left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import COMPRESSED, FAMILIES, left_padded, prompt, tiny

from momentkv import POLICIES
from momentkv.hf import MomentCache

SMALL = {"sinks": 1, "window": 8, "block": 4}
UNIFORM = SMALL | {"correction": "moments", "sharing": "uniform"}  # every head alike, as the references are
# As in test_hf: of the largest element, the roundings of a few layers in float32.
TOLERANCE = 2e-5
ROWS: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "reorder_cache": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
    "batch_repeat_interleave": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "batch_select_indices": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
}


def conversation(rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; the second row is padded."""
    return left_padded([prompt(1, 40 - (7 if row == 1 else 0), seed=row) for row in range(rows)])


def read(family: str, ids: torch.Tensor, mask: torch.Tensor, policy: str = "momentkv") -> MomentCache:
    """A cache after a prefill that evicts, and two steps that do not."""
    cache = MomentCache(tiny(family), 14, policy=policy, **UNIFORM)
    for start, stop in ((0, 38), (38, 39), (39, 40)):
        proceed(family, cache, ids[:, start:stop], mask[:, :stop])
    return cache


def proceed(family: str, cache: MomentCache, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return tiny(family)(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def state(cache: MomentCache) -> dict[str, torch.Tensor]:
    """Every tensor, sliding layers included."""
    tensors = {f"{index}.{name}": x for index, core in cache.moment_layers.items() for name, x in core.arrays().items()}
    for index, layer in enumerate(cache.layers):
        if index not in cache.moment_layers:
            tensors |= {f"{index}.{name}": getattr(layer, name) for name in ("keys", "values")}
    return tensors


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("policy", ["momentkv", "h2o", "keydiff"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("operation", ROWS)
def test_rows_move_with_their_whole_state(operation: str, family: str, policy: str):
    """A cache whose rows were moved is the cache of the moved rows, then and many evictions later."""
    ids, mask = conversation()
    move, rows = ROWS[operation]
    moved, fresh = read(family, ids, mask, policy), read(family, ids[rows], mask[rows], policy)
    before = state(moved)
    move(moved)
    assert_same(state(moved), {name: x[rows] for name, x in before.items()})
    for name, x in state(fresh).items():
        assert_close(state(moved)[name], x)
    mask, more = mask[rows], prompt(len(rows), 9, seed=9)
    for step in range(9):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        outs = [proceed(family, cache, more[:, step : step + 1], mask) for cache in (moved, fresh)]
        assert_close(*outs)
    for name, x in state(fresh).items():
        assert_close(state(moved)[name], x)


@pytest.mark.parametrize("operation", ROWS)
def test_moving_the_rows_of_an_empty_cache_does_nothing(operation: str):
    cache = MomentCache(tiny("llama"), 14, **UNIFORM)
    ROWS[operation][0](cache)
    assert cache.get_seq_length() == cache.nbytes == 0


@pytest.mark.parametrize("family", COMPRESSED)
def test_reset_gives_a_fresh_cache(family: str):
    ids, mask = conversation()
    cache = read(family, ids, mask)
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0
    assert all(core.arrays() == {} for core in cache.moment_layers.values())
    other = ids[:2].flip(0)
    again, fresh = cache, MomentCache(tiny(family), 14, policy="momentkv", **UNIFORM)
    outs = [proceed(family, x, other, torch.ones_like(other)) for x in (again, fresh)]
    assert torch.equal(*outs)
    assert_same(state(again), state(fresh))


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("order", [None, 0, 1])
def test_nbytes_is_the_sum_of_all_tensors_held(policy: str, order: int | None):
    model = tiny("gemma3")
    cache = MomentCache(model, 14, policy=policy, order=order, **UNIFORM)
    assert cache.nbytes == 0
    proceed("gemma3", cache, *conversation())
    sizes = {name: x.numel() * x.element_size() for name, x in state(cache).items()}
    assert cache.nbytes == sum(sizes.values())
    # By hand, for 3 rows and 2 KV heads of dimension 16: a recent tier of sink, window and block and what the budget
    # leaves beside the first two, with a number of each; or the 15 tokens before a new one of a sliding window of 16.
    token = 2 * 16 * 4
    # A weight, and vectors of 16 bits a number with a step: two means, and the rows of the co-moment.
    vector = 2 * 16 + 4
    moments = {None: 0, 0: 4 + 2 * vector, 1: 4 + (2 + 16) * vector}[order]
    attention = 0 if POLICIES[policy]().observes == 0 else 4
    queries = 2 * 16 * 4 if POLICIES[policy].needs_queries else 0
    tokens = (1 + 8 + 4) + (14 - 1 - 8)
    assert cache.nbytes == 3 * 2 * 2 * (tokens * (token + 4 + attention) + 2 * 4 + moments + queries + 15 * token)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_deep_copies_are_independent(family: str):
    ids, mask = conversation()
    cache = read(family, ids, mask)
    before = {name: x.clone() for name, x in state(cache).items()}
    twin = copy.deepcopy(cache)
    assert_same(state(twin), before)
    more, longer = prompt(3, 9, seed=9), torch.nn.functional.pad(mask, (0, 9), value=1)
    out = proceed(family, twin, more, longer)
    assert twin.get_seq_length() == 49
    assert cache.get_seq_length() == 40
    assert_same(state(cache), before)
    assert torch.equal(proceed(family, cache, more, longer), out)
    assert_same(state(cache), state(twin))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_cache_says_so(family: str):
    cache = MomentCache(tiny(family), 14, **UNIFORM)
    assert cache.get_seq_length() == cache.nbytes == 0
    for layer in cache.layers:
        assert not layer.is_initialized
        assert layer.get_mask_sizes(5) == (5, 0)
        assert layer.keys is layer.values is None


def test_layers_say_what_they_hold():
    cache = read("gemma3", *conversation())
    assert repr(cache.layers[1]) == "MomentLayer(budget=14, stored=16, seen=40)"
    assert cache.layers[1].get_mask_sizes(3) == (43, 0)
    assert cache.get_max_length(1) == -1
    assert not cache.layers[1].is_sliding
    assert list(cache.moment_layers) == [1, 3]
