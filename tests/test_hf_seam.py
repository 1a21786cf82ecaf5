"""Where momentkv and transformers meet: nothing may come between a cache and its attention without a word."""

from __future__ import annotations

import copy
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, SIZES, build, prompt, tiny
from sweep import build as build_kind
from transformers import DynamicCache, GemmaConfig, LlamaConfig, Phi3Config

from momentkv.hf import MomentCache, momentkv_attention

ABOVE = 4096  # a budget above every length here
FLOAT32 = 2e-5  # as in test_hf


def assert_equal(x: torch.Tensor, reference: torch.Tensor) -> None:
    assert x.shape == reference.shape
    assert (x - reference).abs().max() <= FLOAT32 * reference.abs().max()


def passes(model: Any, cache: Any, **settings: Any) -> torch.Tensor:
    """Logits of a prompt, a chunk and a token."""
    ids = prompt(2, 40)
    with torch.no_grad():
        return torch.cat(
            [model(ids[:, a:b], past_key_values=cache, **settings).logits for a, b in ((0, 30), (30, 39), (39, 40))],
            1,
        )


# Keys and values that changed on their way.


def handed_out(model: Any) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """An attention module, a query, and the keys and values that a new cache hands out for them."""
    cache = MomentCache(model, ABOVE)
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    handed_out.kept = cache  # type: ignore[attr-defined]  # a model's caller holds it, too
    return model.model.layers[0].self_attn, torch.zeros(1, 4, 3, 16), *cache.update(x, x, 0)


@pytest.mark.parametrize("changed", ["keys", "values", "keys and values"])
def test_attention_to_something_else_than_was_handed_out_is_refused(changed: str):
    module, query, keys, values = handed_out(tiny("llama"))
    if "keys" in changed:
        keys = keys * 1
    if "values" in changed:
        values = values.flip(1)
    with pytest.raises(ValueError, match=f"LlamaAttention changes the {changed} between .* use a DynamicCache"):
        momentkv_attention(module, query, keys, values, None)


def test_attention_twice_to_what_one_update_returned_is_refused():
    module, query, keys, values = handed_out(tiny("llama"))
    momentkv_attention(module, query, keys, values, None)
    with pytest.raises(ValueError, match=r"LlamaAttention attends more than once .*DynamicCache"):
        momentkv_attention(module, query, keys, values, None)


def test_keys_of_another_cache_beside_ours_are_not_mistaken_for_changed_ones():
    """Also after a pass of ours that failed before its attention, once the cache is reset."""
    module, query, keys, values = handed_out(tiny("llama"))
    handed_out.kept.reset()  # type: ignore[attr-defined]
    out, _ = momentkv_attention(module, query, keys * 1, values * 1, None)
    assert out.shape == (1, 3, 4, 16)


# Attention that is not causal.


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("how", ["module", "keyword"])
def test_attention_that_is_not_causal_is_sdpas_beside_other_caches(how: str, padded: bool):
    settings: dict[str, Any] = {"is_causal": False} if how == "keyword" else {}
    found = []
    for name in ("momentkv", "sdpa"):
        model = build(FAMILIES["llama"](), name)
        if how == "module":
            for layer in model.model.layers:
                layer.self_attn.is_causal = False
        cache, out = DynamicCache(config=model.config), []
        mask = torch.ones(2, 40, dtype=torch.long)
        if padded:
            mask[0, :5] = 0
        ids = prompt(2, 40)
        with torch.no_grad():
            for a, b in ((0, 30), (30, 39), (39, 40)):
                masked = {"attention_mask": mask[:, :b]} if padded else {}
                out.append(model(ids[:, a:b], past_key_values=cache, **masked, **settings).logits)
        found.append(torch.cat(out, 1)[mask.bool()])
    assert torch.equal(*found)
    if not padded:
        assert not torch.equal(found[0], passes(tiny("llama"), DynamicCache(), **{}).flatten(0, 1))


def test_a_bidirectional_model_is_refused_and_is_sdpas_beside_other_caches():
    config = GemmaConfig(**SIZES, head_dim=16, use_bidirectional_attention=True)
    found = [build(copy.deepcopy(config), name) for name in ("momentkv", "sdpa")]
    with pytest.raises(ValueError, match=r"'gemma' is not supported.*use_bidirectional_attention"):
        MomentCache(found[0], ABOVE)
    a, b = (passes(model, DynamicCache(config=model.config)) for model in found)
    assert torch.equal(a, b)


@pytest.mark.parametrize("how", ["module", "keyword"])
def test_attention_that_is_not_causal_is_refused_by_name(how: str):
    model = build(FAMILIES["llama"]())
    settings: dict[str, Any] = {"is_causal": False} if how == "keyword" else {}
    if how == "module":
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"is_causal=False \(LlamaAttention\).*DynamicCache"):
        passes(model, MomentCache(model, ABOVE), **settings)


# Arguments of attention that are not ours.


def test_an_argument_that_is_not_known_is_refused_by_a_compressed_layer():
    module, query, keys, values = handed_out(tiny("llama"))
    with pytest.raises(ValueError, match=r"surprise was passed to attention: an argument that momentkv does not know"):
        momentkv_attention(module, query, keys, values, None, surprise=torch.ones(1))


class Strange(torch.nn.Module):
    """An attention whose model's module may have an eager function."""

    is_causal = True
    num_key_value_groups = 2


def test_an_argument_that_is_not_known_goes_to_the_models_own_function(monkeypatch: pytest.MonkeyPatch):
    """With the additive mask that such functions take; without such a function it is refused by name."""
    home = types.ModuleType("modeling_strange")
    monkeypatch.setitem(sys.modules, home.__name__, home)
    monkeypatch.setattr(Strange, "__module__", home.__name__)
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match=r"Strange passes surprise to attention.*eager.*DynamicCache"):
        momentkv_attention(Strange(), torch.randn(1, 4, 3, 8), x, x, None, surprise=1.0, position_ids=None)
    seen: dict[str, Any] = {}

    def eager_attention_forward(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, mask=mask)
        return q, None

    home.eager_attention_forward = eager_attention_forward  # type: ignore[attr-defined]
    momentkv_attention(Strange(), torch.randn(1, 4, 3, 8), x, x, None, scaling=0.5, surprise=1.0)
    assert (seen["surprise"], seen["scaling"], seen["dropout"]) == (1.0, 0.5, 0.0)
    assert seen["mask"].dtype == torch.float32
    assert torch.equal(seen["mask"][0, 0] == 0, torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "flint", "mimo_v2_flash", "bloom"])
def test_advice_to_use_a_dynamic_cache_is_good_advice(kind: str):
    """Sinks, soft caps and attention that knows of no interface, under momentkv's name, padded and not."""
    model, own = build_kind(kind, "momentkv"), build_kind(kind, "eager")
    assert_equal(passes(model, DynamicCache(config=model.config)), passes(own, DynamicCache(config=own.config)))


# Models that give up the cache they were given.

LIMIT = 60


def phi3(**settings: Any) -> Any:
    return build(
        Phi3Config(**(SIZES | {"max_position_embeddings": 240}), original_max_position_embeddings=LIMIT, **settings)
    )


LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": LIMIT,
    }
}


@pytest.mark.parametrize("settings", [{}, LONGROPE], ids=["default", "longrope"])
def test_phi3_keeps_the_budget_over_a_prompt_beyond_its_limit(settings: dict[str, Any]):
    model = phi3(**settings)
    generate = {"max_new_tokens": 20, "do_sample": False, "return_dict_in_generate": True}
    small = {"sinks": 1, "window": 8, "block": 4}
    cache = MomentCache(model, 20, sharing="uniform", **small)
    result = model.generate(prompt(1, 90), past_key_values=cache, **generate)
    assert result.past_key_values is cache
    assert cache.get_seq_length() == 109
    assert all(layer.stored < 24 for layer in cache.moment_layers.values())
    exact = model.generate(prompt(1, 90), past_key_values=MomentCache(model, ABOVE), **generate)
    stock = model.generate(prompt(1, 90), past_key_values=DynamicCache(config=model.config), **generate)
    assert torch.equal(exact.sequences, stock.sequences)


def test_phi3_that_gives_up_the_cache_at_its_limit_is_refused_by_name():
    model = phi3()
    cache = MomentCache(model, 40)
    message = rf"phi3 model has given up the MomentCache.*original_max_position_embeddings={LIMIT}.*more than {LIMIT}"
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(1, 50), past_key_values=cache, max_new_tokens=20)
    # In the next turn, too.
    cache = MomentCache(model, 40)
    ids = model.generate(prompt(1, 40), past_key_values=cache, max_new_tokens=9)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.cat([ids, prompt(1, 40)], 1), past_key_values=cache, max_new_tokens=2)
    # And nobody else is refused afterwards.
    model.generate(prompt(1, 90), max_new_tokens=2)
    assert bool(cache)
    tiny("llama")(prompt(1, 90))


def test_keys_of_two_kinds_of_rotation_are_not_mixed():
    """Beyond its limit a model with longrope turns keys by other factors than before."""
    model = phi3(**LONGROPE)
    cache = MomentCache(model, ABOVE)
    with torch.no_grad():
        model(prompt(1, 50), past_key_values=cache)
        with pytest.raises(ValueError, match=rf"11 tokens after 50 pass original_max_position_embeddings={LIMIT}"):
            model(prompt(1, 11), past_key_values=cache)
        model(prompt(1, 10), past_key_values=cache)
    assert cache.get_seq_length() == 60


def test_a_cache_is_true_once_it_has_read():
    model = tiny("llama")
    cache = MomentCache(model, ABOVE)
    assert not cache
    passes(model, cache)
    assert cache
    cache.reset()
    assert not cache


# Copies, and other models.


def test_a_copy_is_of_the_model_and_not_of_a_copy_of_its_configuration():
    model = build(FAMILIES["llama"]())
    cache = MomentCache(model, 20, sinks=1, window=8, block=4)
    passes(model, cache)
    other = copy.deepcopy(copy.deepcopy(cache))
    assert other.config is model.config
    assert other.layers[0].core is not cache.layers[0].core
    a, b = (passes(model, one) for one in (cache, other))
    assert torch.equal(a, b)
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), pytest.raises(ValueError, match="attn_implementation is 'sdpa'"):
        model(prompt(2, 1), past_key_values=other)


def test_attention_that_never_reaches_momentkv_is_noticed_within_the_pass():
    """As of a cache whose configuration is not the model's own."""
    model = build(FAMILIES["llama"](), "sdpa")
    cache = MomentCache(LlamaConfig(**SIZES, attn_implementation="momentkv"), ABOVE)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"never reached momentkv.*set_attn_implementation"):
        model(prompt(1, 40), past_key_values=cache)


def test_a_cache_of_one_model_is_refused_by_another_of_the_same_shape(tmp_path: Path):
    model = build(FAMILIES["llama"]())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = type(model)(copy.deepcopy(model.config)).eval()
    cache = MomentCache(model, ABOVE)
    passes(model, cache)
    cache.save(tmp_path / "cache")
    message = r"keys of a model with other weights than this LlamaAttention.*reset\(\)"
    for one in (cache, copy.deepcopy(cache), MomentCache.load(tmp_path / "cache", model)):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            other(prompt(2, 1), past_key_values=one)
    # The same weights in another object are the same model, and an empty cache has nothing of either.
    a, b = (passes(one, cache) for one in (copy.deepcopy(model), model))
    assert a.shape == b.shape
    cache.reset()
    assert_equal(passes(other, cache), passes(other, DynamicCache()))
