"""The attention and the mask function of ``attn_implementation="momentkv"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

__all__ = ["LINK", "NEWEST", "momentkv_attention", "momentkv_mask"]

# Attribute of the keys that a cache returns: their layer, which does the attention.
LINK = "_momentkv"
# Offset that a static cache gives for the mask of a step: of the newest token alone, as what it retains has no padding.
NEWEST = -1


def momentkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function of ``attn_implementation="momentkv"``: through the linked cache layer, else SDPA.

    Parameters
    ----------
    module : torch.nn.Module
    query : tensor, shape (batch, q_head, q_len, d)
    key, value : tensor, shape (batch, kv_head, n, d) and (batch, kv_head, n, dv)
    attention_mask : bool tensor or None
        What `momentkv_mask` made.
    scaling, dropout, **kwargs
        As transformers passes them.

    Returns
    -------
    tensor, shape (batch, q_len, q_head, dv), and None for the attention weights
    """
    layer = getattr(key, LINK, None)
    if layer is not None:
        result: tuple[torch.Tensor, None] = layer.attend(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return result
    q_len, n = query.shape[2], key.shape[2]
    compact = attention_mask is not None and attention_mask.dim() == 2
    if getattr(module, "is_causal", True) and (compact or (attention_mask is None and 1 < q_len < n)):
        attention_mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=q_len,
            kv_length=n,
            q_offset=n - q_len,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=query.device,
        )
    stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )
    return stock


def momentkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask function of ``attn_implementation="momentkv"``.

    Returns
    -------
    tensor or None
        None for a causal mask without padding, bool ``(batch, kv_length)`` for a causal mask with padding (False is
        padding); anything else as SDPA takes it, bool ``(batch, 1, q_length, kv_length)``. For a step of a static
        cache None without padding, else bool ``(batch, 1, 1, 1)``: whether the newest token is none.
    """
    if kv_offset == NEWEST:
        if mask_function is not causal_mask_function or local_size is not None:
            raise ValueError("a step of a static cache got a mask of its own; make the cache with static=False for it")
        return None if attention_mask is None else attention_mask[:, -1:].bool()[:, None, None]
    if q_length > 1 and isinstance(q_offset, torch.Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)  # of a static cache that is to read several tokens
    causal = mask_function is causal_mask_function and local_size is None and kv_offset == 0
    if causal and isinstance(q_offset, int) and kv_length == q_offset + q_length:
        if attention_mask is None:
            return None
        if attention_mask.shape[1] < kv_length:
            raise ValueError(
                f"attention_mask has length {attention_mask.shape[1]}, but {kv_length} tokens have been seen with this "
                "cache; pass a mask over all of them, not over the new ones alone"
            )
        mask = attention_mask[:, :kv_length].bool()
        return None if bool(mask.all()) else mask
    masked: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
    return masked
