"""A cache that nobody refers to is freed at once, and not when Python next looks for circles."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompt, tiny

from momentkv.hf import MomentCache, read

SMALL: dict[str, Any] = {"budget": 20, "sinks": 1, "window": 8, "block": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "uniform": {"sharing": "uniform"},
    "static": {"static": True},
    "chosen bits": {"bits": "auto", "policy": "twice"},
    "certified": {"certify": 2, "tolerance": 1e9},
    "bytes": {"budget": "70KiB"},
}
Way = Callable[[Any, MomentCache, Path], MomentCache]


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def generated(model: Any, cache: MomentCache, folder: Path) -> MomentCache:
    model.generate(prompt(1, 60), past_key_values=cache, max_new_tokens=6, do_sample=False)
    return cache


def saved_and_loaded(model: Any, cache: MomentCache, folder: Path) -> MomentCache:
    generated(model, cache, folder).save(folder / "file")
    return MomentCache.load(folder / "file", model)


def failed(model: Any, cache: MomentCache, folder: Path) -> MomentCache:
    if not cache:
        generated(model, cache, folder)

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    try:
        model(prompt(1, 5), past_key_values=cache)
    except ValueError:
        return cache
    finally:
        hook.remove()
    raise AssertionError("nothing failed")


def read_twice(model: Any, cache: MomentCache, folder: Path) -> MomentCache:
    twice = next(iter(cache.moment_layers.values())).config.policy.rereads
    trial = 8 if cache.chooses_bits else 0
    return read(model, prompt(1, 60), cache, twice=twice, request=[], trial=trial, progress=False)


WAYS: dict[str, Way] = {
    "generated": generated,
    "copied": lambda model, cache, folder: copy.deepcopy(generated(model, cache, folder)),
    "pickled": lambda model, cache, folder: pickle.loads(pickle.dumps(generated(model, cache, folder))),
    "loaded": saved_and_loaded,
    "failed": failed,
    "read": read_twice,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", SETTINGS)
@torch.no_grad()
def test_a_dropped_cache_is_freed_at_once(settings: str, way: str, tmp_path: Path):
    model = tiny("llama")
    cache = WAYS[way](model, MomentCache(model, **(SMALL | SETTINGS[settings])), tmp_path)
    # It goes on, whoever keeps its passes now.
    model(prompt(1, 1), past_key_values=cache)
    layers = [weakref.ref(layer) for layer in cache.layers]
    del cache
    assert [layer() for layer in layers] == [None] * len(layers)


@pytest.mark.parametrize("way", ["copied", "pickled"])
@torch.no_grad()
def test_a_copy_keeps_its_own_passes(way: str, tmp_path: Path):
    """A pass of the copy that fails takes the copy back, after the first cache has gone, and no other."""
    model = tiny("llama")
    first = MomentCache(model, **SMALL)
    second = WAYS[way](model, first, tmp_path)
    for layer in second.passes.moments:
        assert layer.keeper() is second.passes
    for layer in first.passes.moments:
        assert layer.keeper() is first.passes
    del first
    seen = second.get_seq_length()
    failed(model, second, tmp_path)
    expected = model(prompt(1, 3), past_key_values=copy.deepcopy(second)).logits
    assert torch.equal(model(prompt(1, 3), past_key_values=second).logits, expected)
    assert second.get_seq_length() > seen
