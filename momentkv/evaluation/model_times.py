"""Times of a whole model's decode step; needs PyTorch and transformers alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache

from momentkv.evaluation.layer_times import Call, Row, Sizes, measure
from momentkv.hf import DecodeGraphs, MomentCache
from momentkv.hf.models import takes

__all__ = ["of_model"]


def of_model(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A step of a whole model with random weights: the full cache, a budget, the same in place, and as CUDA graphs."""
    config = LlamaConfig(**sizes.model, max_position_embeddings=2 * sizes.model_context)
    config._attn_implementation = "momentkv"
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype, attn_implementation="momentkv").eval()
    ids = torch.randint(sizes.model["vocab_size"], (1, sizes.model_context), device=device)
    weights = sum(x.nbytes for x in model.parameters())
    budget = f"budget {sizes.model_budget}"
    kept = {
        "full cache": DynamicCache(config=config),
        budget: MomentCache(model, sizes.model_budget),
        f"{budget}, static": MomentCache(model, sizes.model_budget, static=True),
    }
    if device.type == "cuda":
        kept[f"{budget}, CUDA graphs"] = MomentCache(model, sizes.model_budget, static=True)
    for name, cache in kept.items():
        # Of a few thousand tokens at a time, for each is followed by an eviction in every layer.
        for chunk in torch.split(ids, 8192, dim=1):
            model(chunk, **takes(model, cache), logits_to_keep=1)
        one = step(model, ids[:, :1], cache, graphs=name.endswith("graphs"))
        yield measure("model", name, one, sizes._replace(graphed=0), device, nbytes=weights) | {
            "context": sizes.model_context
        }


def step(model: Any, token: torch.Tensor, cache: Any, *, graphs: bool) -> Call:
    """One step of decoding, evictions as they fall due."""
    if graphs:
        replayed = DecodeGraphs(model, cache, capture_flush=True)
        return lambda _: replayed(token)
    return lambda _: model(token, **takes(model, cache))
