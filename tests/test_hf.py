"""Laws of `MomentCache` inside a model: exact while nothing is evicted, within its budget always, rows independent."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from models import COMPRESSED, FAMILIES, left_padded, prompt, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from momentkv import POLICIES, LayerCache
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.hf import MomentCache, MomentLayer
from momentkv.policies import H2O, Policy

ROOM = 400  # more than any sequence here
# Of the largest logit: a few hundred float32 roundings (6e-8 each), carried through four layers.
TOLERANCE = 2e-5
SMALL = {"sinks": 1, "window": 8, "block": 4}
UNIFORM = SMALL | {"correction": "moments", "sharing": "uniform"}  # every head alike, as the references are
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5},
    "chunks": {"prefill_chunk_size": 7},
    "beams": {"num_beams": 2},
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def generate(
    model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, new: int = 8, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and logits of the new ones, shape (row, new token, vocabulary)."""
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **settings},
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def full(family: str) -> tuple[Any, DynamicCache]:
    model = tiny(family, "sdpa")
    return model, DynamicCache(config=model.config)


def ragged(length: int = 40) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rows = [prompt(1, length, seed=1), prompt(1, length - 13, seed=2), prompt(1, length - 2, seed=3)]
    return rows, *left_padded(rows)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_nothing_evicted_equals_sdpa_with_padding(family: str, mode: str):
    """All families without it: test_hf_matrix."""
    ids, mask = ragged()[1:]
    cache = MomentCache(tiny(family), ROOM)
    tokens, logits = generate(tiny(family), cache, ids, mask, **MODES[mode])
    expected = generate(*full(family), ids, mask, **MODES[mode])
    assert torch.equal(tokens, expected[0])
    assert_close(logits, expected[1])


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_turns_with_nothing_evicted_equal_one_conversation_with_a_full_cache(family: str, padded: bool):
    ids, mask = ragged()[1:] if padded else (prompt(3, 40), torch.ones(3, 40, dtype=torch.long))
    cache = MomentCache(tiny(family), ROOM)
    for turn in range(3):
        tokens, logits = generate(tiny(family), cache, ids, mask)
        expected = generate(*full(family), ids, mask)
        assert torch.equal(tokens, expected[0])
        assert_close(logits, expected[1])
        ids = torch.cat([tokens, prompt(3, 5 - turn, seed=10 + turn)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_cache_under_momentkv_equals_sdpa(family: str, mode: str, padded: bool):
    ids, mask = ragged()[1:] if padded else (prompt(2, 40), None)
    model = tiny(family)
    tokens, logits = generate(model, DynamicCache(config=model.config), ids, mask, **MODES[mode])
    expected = generate(*full(family), ids, mask, **MODES[mode])
    assert torch.equal(tokens, expected[0])
    assert_close(logits, expected[1])


def test_without_any_cache_momentkv_equals_sdpa():
    ids, mask = ragged()[1:]
    outs = [
        tiny("gemma3", implementation)(ids, attention_mask=mask, use_cache=False).logits
        for implementation in ("momentkv", "sdpa")
    ]
    assert_close(outs[0][mask.bool()], outs[1][mask.bool()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_stored_tokens_never_exceed_the_budget_and_a_block(family: str, mode: str):
    model, seen = tiny(family), []
    cache = MomentCache(model, 14, **UNIFORM)

    def check(*_: Any) -> None:
        seen.append(cache.get_seq_length())
        for layer in cache.layers:
            limit = 15 if isinstance(layer, DynamicSlidingWindowLayer) else 14 + 4 - 1
            assert layer.keys.shape[2] == layer.values.shape[2] <= limit
            assert layer.get_seq_length() == seen[-1]

    hook = model.register_forward_hook(check)
    try:
        ids = prompt(2, 40)
        for turn in range(2):
            tokens, logits = generate(model, cache, ids, new=11, **MODES[mode])
            assert logits.isfinite().all()
            ids = torch.cat([tokens, prompt(2, 9, seed=turn)], dim=1)
    finally:
        hook.remove()
    # All but the last generated token, which no forward pass has read.
    assert seen[-1] == 40 + 11 + 9 + 11 - 1
    assert seen == sorted(seen)
    assert len(seen) > (25 if mode == "chunks" else 21)


@pytest.mark.parametrize("evicts", [False, True], ids=["exact", "evicted"])
@pytest.mark.parametrize("family", COMPRESSED)
def test_left_padded_row_equals_the_row_alone(family: str, evicts: bool):
    rows, ids, mask = ragged()
    budget = 16 if evicts else ROOM
    batch = MomentCache(tiny(family), budget, policy="momentkv", **UNIFORM)
    tokens, logits = generate(tiny(family), batch, ids, mask, new=12)
    for index, row in enumerate(rows):
        alone = MomentCache(tiny(family), budget, policy="momentkv", **UNIFORM)
        own, expected = generate(tiny(family), alone, row, new=12)
        assert torch.equal(tokens[index, ids.shape[1] :], own[0, row.shape[1] :])
        assert_close(logits[index], expected[0])
        for layer, core in batch.moment_layers.items():
            weight = alone.moment_layers[layer].moments.weight
            assert torch.equal(core.moments.weight[index], weight[0])
            assert (weight > 0).all() == evicts


@pytest.mark.parametrize("order", [None, 0, 1])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_token_is_stored_or_folded_under_every_policy_and_order(policy: str, order: int | None):
    model = tiny("llama")
    cache = MomentCache(model, 14, policy=policy, order=order, **UNIFORM)
    _, logits = generate(model, cache, prompt(2, 40), new=16)
    assert logits.isfinite().all()
    for core in cache.moment_layers.values():
        stored, folded = core.keys.shape[2], core.moments.weight
        assert (stored + folded == core.seen).all() if order is not None else (folded == 0).all()
        assert core.seen == 55
        assert core.config.order == order
        assert getattr(core.moments, "order", None) == order


def test_orders_differ_once_something_is_evicted():
    outs = []
    for order in (None, 0, 1):
        cache = MomentCache(tiny("llama"), 14, policy="streaming", order=order, **UNIFORM)
        tiny("llama")(prompt(1, 40), past_key_values=cache)
        outs.append(tiny("llama")(prompt(1, 1, seed=5), past_key_values=cache).logits)
    assert all((a - b).abs().max() > 0.01 for a, b in ((outs[0], outs[1]), (outs[1], outs[2])))


def test_each_layer_has_its_own_budget():
    cache = MomentCache(tiny("gemma3"), [20, 14, 20, 25], **UNIFORM)
    tiny("gemma3")(prompt(1, 40), past_key_values=cache)
    assert {index: core.keys.shape[2] for index, core in cache.moment_layers.items()} == {1: 14, 3: 25}
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer", "MomentLayer"] * 2


def test_bfloat16_model_has_float32_moments():
    model = tiny("qwen3", "momentkv", "bfloat16")
    cache = MomentCache(model, 14, **UNIFORM)
    _, logits = generate(model, cache, prompt(2, 40), new=10)
    assert logits.isfinite().all()
    for core in cache.moment_layers.values():
        assert core.keys.dtype == core.values.dtype == torch.bfloat16
        assert {x.dtype for x in core.moments.arrays().values()} == {torch.float32}
        assert (core.moments.weight > 0).all()


def test_two_runs_are_the_same_to_the_last_bit():
    runs = []
    for _ in range(2):
        cache = MomentCache(tiny("gemma3"), 14, policy="random", **UNIFORM)
        tokens, logits = generate(tiny("gemma3"), cache, prompt(2, 40), new=12)
        runs.append([tokens, logits, *(x for core in cache.moment_layers.values() for x in core.arrays().values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("family", COMPRESSED)
def test_layer_in_a_model_equals_a_layer_cache_driven_by_hand(family: str, monkeypatch: pytest.MonkeyPatch):
    """On the queries, keys and values of the model, its scale included, through prefill and decode-time eviction."""
    model, steps = tiny(family), []
    update, attend = MomentLayer.update, MomentLayer.attend
    watched: list[MomentLayer] = []

    def spy_update(layer: MomentLayer, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if layer in watched:
            steps.append([k, v])
        return update(layer, k, v, *args, **kwargs)

    def spy_attend(layer: MomentLayer, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = attend(layer, module, query, *args, **kwargs)
        if layer in watched:
            steps[-1] += [query, out]
        return out, weights

    monkeypatch.setattr(MomentLayer, "update", spy_update)
    monkeypatch.setattr(MomentLayer, "attend", spy_attend)
    cache = MomentCache(model, 14, **UNIFORM)
    index, core = list(cache.moment_layers.items())[-1]
    watched.append(cache.layers[index])
    with torch.no_grad():
        generate(model, cache, prompt(2, 40), new=10)
    config = model.config
    scale = getattr(config, "query_pre_attn_scalar", 16) ** -0.5  # the head dimension is 16
    by_hand = LayerCache(14, scale=scale, policy="balanced", statistics_bits=16, **SMALL)
    for k, v, q, out in steps:
        assert torch.equal(by_hand.step(q, k, v).transpose(1, 2), out)
    assert len(steps) == 10
    assert by_hand.arrays().keys() == core.arrays().keys()
    for name, x in by_hand.arrays().items():
        assert torch.equal(core.arrays()[name], x)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(x.numel() for x in made if isinstance(x, torch.Tensor))])
        return out


def largest(implementation: str, cache: Any, ids: torch.Tensor, **settings: Any) -> int:
    with Largest() as mode, torch.no_grad():
        tiny("llama", implementation)(ids, past_key_values=cache, logits_to_keep=1, **settings)
    return mode.numel


@pytest.mark.parametrize("policy", ["momentkv", H2O(observes=None)], ids=str)
def test_no_tensor_of_prefill_grows_with_the_square_of_the_length(policy: str | Policy):
    """A matrix of all queries by all keys has N^2 elements a head; a block of 256 queries of 4 heads has 1024 N."""
    n = 4096
    ids, padded = prompt(1, n), torch.ones(1, n, dtype=torch.long)
    padded[:, :5] = 0
    for mask in (None, padded):
        cache = MomentCache(tiny("llama"), 64, policy=policy)
        assert largest("momentkv", cache, ids, attention_mask=mask) <= 1024 * n
    # The measure sees a matrix where there is one.
    assert largest("eager", None, ids[:, :512]) >= 4 * 512**2


def test_settings_of_layers_by_default_are_those_of_a_model_s_cache():
    """What measures layers without transformers takes them from the core."""
    defaults = inspect.signature(MomentCache.__init__).parameters
    assert {name: defaults[name].default for name in MODEL_DEFAULTS} == MODEL_DEFAULTS
    other = inspect.signature(LayerCache.__init__).parameters
    differ = {
        name for name, x in defaults.items() if name in other and name != "self" and x.default != other[name].default
    }
    # Budgets have a default in a model, and bits are chosen where they are in bytes.
    assert differ - set(MODEL_DEFAULTS) == {"budget", "bits"}
