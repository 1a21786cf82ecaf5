"""Positions that images moved: the model keeps how far, of what it read last, and a cache goes on from its own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SIZES, build, prompt
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from momentkv.hf import CacheFileError, MomentCache

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4}


@pytest.fixture
def model() -> Any:
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = Qwen2VLConfig(text_config=SIZES | {"rope_parameters": sections}, vision_config=vision)
    return build(config, of=Qwen2VLForConditionalGeneration)


@torch.no_grad()
def step(model: Any, cache: MomentCache) -> torch.Tensor:
    """Logits after one more token, at the place that the model gives it."""
    logits: torch.Tensor = model(prompt(1, 1, seed=3), past_key_values=cache).logits
    return logits


@torch.no_grad()
def after_images(model: Any, moved: int = -12, **settings: Any) -> MomentCache:
    """A cache of a text in which images moved positions so far."""
    cache = MomentCache(model, 30, **SMALL, **settings)
    model.model.rope_deltas = torch.tensor([[moved]])
    model(prompt(1, 60), past_key_values=cache)
    return cache


@pytest.mark.parametrize("static", [False, True])
def test_a_loaded_cache_goes_on_where_the_saved_one_was(model: Any, static: bool, tmp_path: Path):
    cache = after_images(model, static=static)
    cache.save(tmp_path / "x")
    expected = step(model, cache)
    model.model.rope_deltas = None  # as in another process
    assert torch.equal(step(model, MomentCache.load(tmp_path / "x", model)), expected)
    with pytest.raises(CacheFileError, match=r"positions that images have moved.*in place of its configuration"):
        MomentCache.load(tmp_path / "x", model.config)


def test_a_file_of_text_alone_needs_no_model(model: Any, tmp_path: Path):
    after_images(model, 0).save(tmp_path / "x")
    cache = MomentCache.load(tmp_path / "x", model.config)
    with pytest.raises(RuntimeError, match=r"made for a configuration.*make the cache with the model itself"):
        cache.save(tmp_path / "y")


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_does_not_go_on_where_another_text_was(model: Any, static: bool):
    cache = after_images(model, static=static)
    twin, expected = copy.deepcopy(cache), step(model, copy.deepcopy(cache))
    other = after_images(model, -5)
    with pytest.raises(ValueError, match=r"that was another cache's; call cache.moved.put_back\(\) before going on"):
        step(model, cache)
    cache.moved.put_back()
    assert torch.equal(step(model, cache), expected)
    assert torch.equal(step(model, twin), expected)  # of the same text
    other.reset()
    model.model.rope_deltas = None
    assert torch.equal(step(model, other), step(model, MomentCache(model, 30, **SMALL)))


def test_an_unpickled_cache_says_that_it_does_not_know_the_positions(model: Any):
    cache = pickle.loads(pickle.dumps(after_images(model)))
    with pytest.raises(ValueError, match="take it to another process with save and load"):
        step(model, cache)
    assert cache.get_seq_length() == 60
    step(model, pickle.loads(pickle.dumps(after_images(model, 0))))
