"""Attention that is wrong on purpose: what a comparison must tell from the right one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def blind(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """The mean of all that may be seen: wherever queries and keys point, weights are equal."""
    return sdpa_attention_forward(module, torch.zeros_like(query), *args, **kwargs)


def all_seen(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """A mask that hides nothing: no padding, and none of the tokens that come later."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    return None if mask is None else torch.ones_like(mask)


WRONG = ("blind", "unmasked")
for name, attention, mask in ((WRONG[0], blind, sdpa_mask), (WRONG[1], sdpa_attention_forward, all_seen)):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
