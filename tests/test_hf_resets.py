"""Resets, crops, files and pickles at the edges: interrupted, of more than was read, of models of windows alone."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny

from momentkv.hf import MomentCache


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral sliding"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_reset_that_is_interrupted_changes_nothing(family: str, layer: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny(family)
    cache = MomentCache(model, budget=40)
    model(prompt(1, 60), past_key_values=cache)
    twin = copy.deepcopy(cache)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.layers[layer], "reset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.reset()
    assert cache.get_seq_length() == 60
    more = prompt(1, 5, seed=1)
    after = model(more, past_key_values=cache).logits
    assert torch.equal(after, model(more, past_key_values=twin).logits)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("bits", [None, "auto"])
def test_a_reset_that_is_interrupted_at_its_end_changes_nothing(bits: Any, monkeypatch: pytest.MonkeyPatch):
    """What was chosen for the text, shares and bits, is part of what stays."""
    model = tiny("llama")
    cache = MomentCache(model, budget=40, bits=bits)
    model(prompt(1, 200), past_key_values=cache)
    twin, shared = copy.deepcopy(cache), cache.shared_budgets[0]
    whole = shared.reset

    def interrupted() -> None:
        whole()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shared, "reset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.reset()
    more = prompt(1, 40, seed=1)
    assert torch.equal(model(more, past_key_values=cache).logits, model(more, past_key_values=twin).logits)
    assert cache.nbytes == twin.nbytes


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral sliding"])
@pytest.mark.parametrize("records", [False, True])
def test_no_more_is_taken_back_than_was_read(family: str, records: bool):
    model = tiny(family)
    cache = MomentCache(model, budget=40)
    if records:
        cache.activate_past_recording()
    model(prompt(1, 10), past_key_values=cache)
    with pytest.raises(ValueError, match=r"crop\(-13\): the cache has read 10 tokens only"):
        cache.crop(-13)
    assert cache.get_seq_length() == 10
    model(prompt(1, 2), past_key_values=cache)
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("wrong", [-2.5, None, "-2", True])
def test_what_is_no_number_of_tokens_is_refused(wrong: Any):
    model = tiny("llama")
    cache = MomentCache(model)
    model(prompt(1, 10), past_key_values=cache)
    with pytest.raises(TypeError, match="tokens_to_remove is"):
        cache.crop(wrong)
    cache.crop(torch.tensor(-2))
    assert cache.get_seq_length() == 8


def test_a_cache_that_was_reset_is_saved_as_it_was_made(tmp_path: Path):
    model = tiny("llama")
    cache = MomentCache(model, 64)
    model(prompt(1, 120), past_key_values=cache)
    cache.reset()
    cache.save(tmp_path / "cache")
    loaded = MomentCache.load(tmp_path / "cache", model)
    assert str(loaded.summary()) == str(MomentCache(model, 64).summary())
    ids = prompt(1, 100)
    assert torch.equal(model(ids, past_key_values=loaded).logits, model(ids, past_key_values=cache).logits)


def test_files_of_models_of_windows_alone_say_what_they_were_made_with(tmp_path: Path):
    model = tiny("mistral sliding")
    cache = MomentCache(model, budget=20, window=8, sharing="pyramid")
    model(prompt(1, 30), past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = MomentCache.load(tmp_path / "cache", model)
    assert loaded.protected == {"sinks": 1, "window": 8, "block": 32}
    more = prompt(1, 4)
    assert torch.equal(model(more, past_key_values=loaded).logits, model(more, past_key_values=cache).logits)


@pytest.mark.parametrize("family", ["llama", "mistral sliding"])
def test_recorded_tokens_are_settled_before_they_are_saved(family: str, tmp_path: Path):
    model = tiny(family)
    cache = MomentCache(model)
    cache.activate_past_recording()
    model(prompt(1, 30), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"recorded passes wait for crop; call cache\.crop\(0\)"):
        cache.save(tmp_path / "cache")
    cache.crop(0)
    cache.save(tmp_path / "cache")
    assert MomentCache.load(tmp_path / "cache", model).get_seq_length() == 30


@pytest.mark.parametrize("budget", [64, 512])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_static_caches_can_be_pickled_however_long_until_they_flush(budget: int, how: str):
    model = tiny("llama")
    cache = MomentCache(model, budget=budget, static=True)
    model(prompt(1, 100), past_key_values=cache)
    for t in range(3):
        model(prompt(1, 1, seed=t), past_key_values=cache)
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(cache))
    else:
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    flushes = []
    for t in range(80):
        step = prompt(1, 1, seed=t)
        mine, other = (model(step, past_key_values=each).logits for each in (cache, twin))
        assert torch.equal(mine, other)
        flushes.append((cache.static.beat.flushes, twin.static.beat.flushes))
    assert all(a == b for a, b in flushes)
    assert any(a for a, _ in flushes)


def test_a_pass_that_begins_anew_is_refused_at_once():
    """As `generate` makes them with use_cache=False; its second token would be of a text that was read twice."""
    model, ids = tiny("llama"), prompt(1, 60)
    for tokens in (2, 5):
        cache = MomentCache(model, 4096)
        with pytest.raises(ValueError, match=r"at positions of the 60 tokens .* with use_cache=False"):
            model.generate(ids, past_key_values=cache, max_new_tokens=tokens, do_sample=False, use_cache=False)
        assert cache.get_seq_length() == 60
    cache = MomentCache(model, 4096)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="at positions of the 60 tokens"):
        model(prompt(1, 65), past_key_values=cache, position_ids=torch.arange(65)[None])
    assert cache.get_seq_length() == 60


def test_a_first_pass_that_found_no_memory_may_be_followed_by_another():
    model = tiny("llama")
    cache = MomentCache(model, budget=64)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    hook = model.model.layers[0].mlp.register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model(prompt(1, 200), past_key_values=cache)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"failed there, for want of memory .* read any tokens now"):
        model(prompt(1, 50), past_key_values=cache)
    model(prompt(1, 50), past_key_values=cache)
    assert cache.get_seq_length() == 50
