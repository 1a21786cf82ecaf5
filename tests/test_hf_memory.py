"""What a cache holds while a prompt is read: never more than the full cache; counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import GEMMA, HYBRID, SIZES, build, prompt, tiny
from transformers import Gemma3TextConfig, GPTNeoXConfig
from transformers.cache_utils import DynamicSlidingWindowLayer

from momentkv.cache.config import RECENT_QUERIES
from momentkv.hf import MomentCache, read

TOKENS = 700
SMALL: dict[str, Any] = {"budget": 64, "sinks": 1, "window": 16, "block": 8}


def gpt_neox() -> Any:
    """One projection for queries, keys and values, whose parts are views of it."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 2048}
    return build(GPTNeoXConfig(**sizes, bos_token_id=None, eos_token_id=None, initializer_range=0.2))


MODELS = {"llama": lambda: tiny("llama"), "phi3": lambda: tiny("phi3"), "gpt_neox": gpt_neox}


def held(x: Any, storages: dict[int, int], seen: set[int]) -> dict[int, int]:
    """Bytes of every storage that can be reached from an object of momentkv's, by its address."""
    if id(x) in seen or isinstance(x, type):
        return storages
    seen.add(id(x))
    if isinstance(x, torch.Tensor):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    elif isinstance(x, dict | list | tuple | set):
        for one in x.values() if isinstance(x, dict) else x:
            held(one, storages, seen)
    elif type(x).__module__.startswith(("momentkv", "transformers.cache_utils")):
        held(getattr(x, "__dict__", {}), storages, seen)
    return storages


@pytest.mark.parametrize("sharing", [None, "uniform"], ids=["default", "uniform"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_prefill_never_holds_more_than_the_full_cache(name: str, sharing: str | None):
    """After each layer: keys and values of those so far, their importances, and the queries that errors take."""
    model, counts = MODELS[name](), []
    cache = MomentCache(model, sharing=sharing, **SMALL)
    hooks = [
        layer.register_forward_hook(lambda *_: counts.append(sum(held(cache, {}, set()).values())))
        for layer in model.base_model.layers
    ]
    try:
        model(prompt(1, TOKENS), past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = config.hidden_size // config.num_attention_heads
    full = TOKENS * kv_heads * (2 * head_dim * 4 + 4 + 4)  # of a layer: keys, values, positions and importances
    newest = RECENT_QUERIES * config.hidden_size * 4
    state = cache.nbytes // len(cache.layers)
    assert len(counts) == config.num_hidden_layers
    for index, count in enumerate(counts, 1):
        # Layers that share a budget wait for the last of them; others are cut to it one by one.
        waits = index if sharing is None and index < len(counts) else 0
        assert count <= waits * (full + newest) + len(cache.layers) * state
    assert cache.nbytes < len(counts) * full / 2


@pytest.mark.parametrize("last", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("way", ["one pass", "passes of 50", "read in chunks"])
@torch.no_grad()
def test_a_hybrid_model_holds_what_it_counts(way: str, last: str):
    """Once a pass is over, neither what was before it nor all that a window has seen: deep copies would copy it."""
    kinds = sorted(HYBRID, key=lambda kind: kind == last)
    model, ids = build(Gemma3TextConfig(**(SIZES | GEMMA), layer_types=kinds)), prompt(1, TOKENS)
    cache = MomentCache(model, **SMALL)
    if way == "read in chunks":
        read(model, ids, cache, twice=False, chunk=64, progress=False)
    else:
        for part in ids.split(50 if way == "passes of 50" else TOKENS, dim=1):
            model(part, past_key_values=cache)
    assert any(isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers)
    # Numbers by which KV heads are found beside each other, and a token or two in a window's storage.
    assert sum(held(cache, {}, set()).values()) < 1.1 * cache.nbytes
