"""What is to be read: token ids and a mask, of whatever a text was given as."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from momentkv.hf.cache import MomentCache
from momentkv.hf.checks import check_rows
from momentkv.hf.models import config_of
from momentkv.hf.repeating import read_text

__all__ = ["check_positions", "check_reader", "first_ids", "ids_of", "placed"]


def check_reader(model: Any, tokenizer: Any) -> None:
    """Raise unless there is a model that reads, and a tokenizer that can be asked, if one is given."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the model that reads")
    config_of(model)
    if isinstance(tokenizer, str):
        raise TypeError(f"tokenizer is {tokenizer!r}; load it first: AutoTokenizer.from_pretrained({tokenizer!r})")
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; give the model's tokenizer, or token ids")


def ids_of(
    inputs: Any, tokenizer: Any, mask: torch.Tensor | None, cache: MomentCache, *, goes_on: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids (batch, n) of whatever a text was given as, and the attention mask over all that the cache has read and them.

    A text ``goes_on`` with the one that the cache has read last.
    """
    texts = isinstance(inputs, str) or (
        isinstance(inputs, Sequence) and bool(inputs) and all(isinstance(text, str) for text in inputs)
    )
    if texts:
        if tokenizer is None:
            raise ValueError("inputs is text, which only a tokenizer can read; pass tokenizer=, or token ids")
        if mask is not None:
            raise ValueError("attention_mask is given beside texts, which bring their own; leave it out")
        seen = int(cache.get_seq_length())
        ids, own = read_text(tokenizer, inputs, after=bool(seen), goes_on=goes_on)
        check_rows(cache, ids.shape[0])
        return ids, cache.padding.before(ids, own, seen)
    own = None
    if not isinstance(inputs, torch.Tensor) and hasattr(inputs, "keys"):
        if "input_ids" not in inputs:
            raise ValueError(f"inputs has {sorted(inputs)}, and no input_ids; give what a tokenizer returns, or ids")
        own, inputs = inputs.get("attention_mask"), inputs["input_ids"]
    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
        given = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise ValueError(
            f"inputs is {given}; give text, or token ids as a tensor of shape (batch, tokens): tokenizers return such "
            'with return_tensors="pt"'
        )
    mask = own if mask is None else mask
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask is a {type(mask).__name__}; give a tensor of shape (batch, tokens), or None")
    return inputs, mask


def placed(x: torch.Tensor, model: Any) -> torch.Tensor:
    """A tensor where the model reads; of weights that are elsewhere for as long as they wait, whoever fetches them."""
    device: torch.device = model.device
    return x if device.type == "meta" else x.to(device)


def check_positions(model: Any, seen: int, mask: torch.Tensor | None) -> None:
    """Raise where positions are to be counted by a mask, and images that were read have moved them."""
    if mask is None or not seen:
        return
    if any(getattr(x, "rope_deltas", None) is not None for x in model.modules()):
        raise ValueError(
            "the cache has read padding, or attention_mask has some, and images have moved the positions of this "
            "model, which read() cannot tell it; pass the text to generate(max_new_tokens=1), or read without padding"
        )


def first_ids(ids: torch.Tensor, mask: torch.Tensor | None) -> list[int]:
    """Ids of the first row that are no padding."""
    row = ids[0]
    real = row if mask is None else row[mask[0, -ids.shape[1] :].bool()]
    first: list[int] = real.tolist()
    return first
