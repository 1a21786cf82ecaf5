"""`torch.inference_mode`, `torch.no_grad` and gradients, one after the other on one cache."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny

from momentkv.hf import MomentCache

MODES: dict[str, Any] = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
SMALL: dict[str, Any] = {"budget": 20, "sinks": 1, "window": 8, "block": 4}


def read(family: str, cache: MomentCache, tokens: int, seed: int) -> torch.Tensor:
    """Logits of a few tokens one by one, or of many at once."""
    step = 1 if tokens < 20 else tokens
    parts = [tiny(family)(ids, past_key_values=cache).logits for ids in prompt(2, tokens, seed).split(step, dim=1)]
    return torch.cat(parts, 1).detach()


@pytest.mark.parametrize("policy", ["balanced", "h2o"])
@pytest.mark.parametrize(("family", "static"), [("llama", False), ("llama", True), ("gemma3", False)])
def test_modes_may_follow_each_other_and_change_nothing(family: str, static: bool, policy: Any):
    modes = [name for name in MODES if not (static and name == "grad")]
    passes = list(enumerate((60, 6, 7)))
    other = MomentCache(tiny(family), policy=policy, static=static, **SMALL)
    with torch.no_grad():
        expected = [read(family, other, tokens, seed) for seed, tokens in passes]
    for chosen in itertools.product(modes, repeat=3):
        cache = MomentCache(tiny(family), policy=policy, static=static, **SMALL)
        for (seed, tokens), mode in zip(passes, chosen, strict=True):
            with MODES[mode]():
                found = read(family, cache, tokens, seed)
            # Whether weights want a gradient decides which of PyTorch's kernels computes, to a rounding.
            exact = "grad" not in chosen
            same = torch.equal(found, expected[seed]) if exact else torch.allclose(found, expected[seed], atol=1e-4)
            assert same, chosen


@pytest.mark.parametrize("static", [False, True])
def test_what_is_changed_under_inference_mode_is_read_on_outside(static: bool, tmp_path: Path):
    model = tiny("llama")
    cache = MomentCache(model, static=static, **SMALL)
    with torch.no_grad():
        read("llama", cache, 60, 0)
    cache.save(tmp_path / "cache")
    with torch.inference_mode():
        caches = [MomentCache.load(tmp_path / "cache", model) for _ in range(3)]
        caches[0].batch_repeat_interleave(2)
        caches[0].batch_select_indices(torch.tensor([0, 2]))
        caches[1].reorder_cache(torch.tensor([1, 0]))
        caches[1].reorder_cache(torch.tensor([1, 0]))
        caches[2].crop(-2)
    with torch.no_grad():
        read("llama", caches[2], 2, 5)
        expected = read("llama", cache, 9, 1)
        assert all(torch.equal(read("llama", one, 9, 1), expected) for one in caches[:2])
        assert read("llama", caches[2], 9, 1).isfinite().all()


def test_a_gradient_comes_through_what_was_read_under_inference_mode():
    """To the new tokens; what the cache holds has none."""
    model, cache = tiny("llama"), MomentCache(tiny("llama"), **SMALL)
    with torch.inference_mode():
        read("llama", cache, 60, 0)
        read("llama", cache, 2, 1)
    embedded = model.get_input_embeddings()(prompt(2, 1, 2)).detach().requires_grad_()
    with pytest.warns(RuntimeWarning, match="a gradient was taken through a MomentCache"):
        model(inputs_embeds=embedded, past_key_values=cache).logits.sum().backward()
    assert embedded.grad is not None
    assert (embedded.grad != 0).any()
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_a_cache_holds_has_no_gradient(family: str, recorded: bool):
    """Stock layers included: a graph that is held grows with every pass, and cannot be copied."""
    cache = MomentCache(tiny(family), **SMALL)
    if recorded:
        cache.activate_past_recording()
    tiny(family).zero_grad(set_to_none=True)
    for seed, tokens in enumerate((60, 1, 30, 2)):
        tiny(family)(prompt(2, tokens, seed), past_key_values=cache)
    for layer in cache.layers:
        held = [layer.keys, layer.values] if not hasattr(layer, "core") else list(layer.core.arrays().values())
        held += [layer.core.new.keys, layer.core.new.values] if recorded and hasattr(layer, "core") else []
        assert not any(x.requires_grad for x in held)
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        assert torch.equal(read(family, twin, 5, 9), read(family, cache, 5, 9))


@pytest.mark.parametrize("new", [1, 3, 40])
@pytest.mark.parametrize("before", [10, 300])
def test_a_gradient_does_not_mind_what_is_written_later(before: int, new: int):
    """Neither the pass's own tokens, which are written behind those that it attended to, nor those of the next."""
    model, found = tiny("llama"), []
    for more in (False, True):
        cache = MomentCache(model, 2000)
        with torch.no_grad():
            model(prompt(1, before), past_key_values=cache)
        embedded = model.get_input_embeddings()(prompt(1, new)).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, past_key_values=cache).logits
        if more:
            model(prompt(1, 2), past_key_values=cache)
        with pytest.warns(RuntimeWarning, match="a gradient was taken through a MomentCache"):
            logits.sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", ""])
def test_a_loss_says_what_its_gradient_lacks(trained: str):
    """Of keys and values, which a cache holds without: nothing said so. Where none is taken, nothing is said."""
    model, ids = copy.deepcopy(tiny("llama")), prompt(1, 40)
    for name, x in model.named_parameters():
        x.requires_grad_(not trained or f"layers.0.self_attn.{trained}" in name)
    one, other = (MomentCache(model, **SMALL) for _ in range(2))
    warns = pytest.warns(RuntimeWarning, match=r"holds keys and values without.*train without past_key_values")
    if trained == "k_proj":  # nothing is there to be differentiated
        with warns:
            assert not model(ids, labels=ids, past_key_values=one).loss.requires_grad
        return
    loss = model(ids, labels=ids, past_key_values=one).loss
    with torch.no_grad():
        assert torch.equal(model(ids, labels=ids, past_key_values=other).loss, loss)
    with warns:  # of all layers, or of the second, whose keys are made of what the first one's queries found
        loss.backward()
