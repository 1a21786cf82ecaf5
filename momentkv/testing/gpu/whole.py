"""A decoding step of a model of transformers, 8B wide with random weights, where transformers is installed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from momentkv.testing.gpu.layers import TINY, sizes_of
from momentkv.testing.gpu.parts import Row, modules_needed

__all__ = ["times"]


def times(rehearse: bool) -> Iterator[Row]:
    """The rows of `momentkv bench` for a model."""
    modules_needed("transformers", "accelerate")
    from momentkv.evaluation.model_times import of_model

    sizes, device = sizes_of(rehearse)
    if rehearse:
        small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
        sizes = TINY._replace(model=TINY.model | small, model_context=128, model_budget=40)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield from of_model(sizes, device)
