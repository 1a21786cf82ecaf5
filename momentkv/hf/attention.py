"""The attention and the mask function of ``attn_implementation="momentkv"``."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask

from momentkv.hf.checks import (
    OWN_MASK,
    is_unpadded,
    refuse_changed_keys,
    refuse_second_attention,
    supports_sdpa,
    takes_whole_masks,
    unknown_arguments,
    uses_interface,
)
from momentkv.hf.compiling import apart
from momentkv.hf.dropping import refuse_dropped_cache

__all__ = ["LINK", "NEWEST", "SEVERAL", "link", "linked", "momentkv_attention", "momentkv_mask", "stock_attention"]

# Attribute of the keys and values that a cache returns: their layer, which does the attention.
LINK = "_momentkv"
# Offset that a static cache gives for the mask of a step: of the newest token alone, as what it retains has no padding.
NEWEST = -1
# And for the mask of several tokens in a compiled model, where a link of the clock may be lost between graphs.
SEVERAL = -2


class _Waiting(threading.local):
    """For each thread, the layer whose keys went to the model last and have not come to attention yet."""

    layer: Callable[[], Any] | None = None


_waiting = _Waiting()


def link(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values that lead `momentkv_attention` to the cache layer that stores them.

    What a model computes from them carries no link, so attention over anything but the stored keys is noticed.
    """
    if not torch.compiler.is_compiling():
        _waiting.layer = weakref.ref(layer)
    # Aliases, so that what is stored holds no link to itself.
    return linked(keys.view_as(keys), layer), linked(values.view_as(values), layer)


def linked(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """A tensor that leads to a cache layer."""
    setattr(x, LINK, layer)
    return x


def linked_layer(module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> Any:
    """The cache layer that keys and values lead to, or None for those of another cache."""
    layer, other = getattr(key, LINK, None), getattr(value, LINK, None)
    if torch.compiler.is_compiling():
        if layer is not other:
            refuse_changed_keys(module, "values" if other is None else "keys")
        return layer
    reference, _waiting.layer = _waiting.layer, None
    waiting = None if reference is None else reference()
    if layer is other and (layer is not None or waiting is None or not getattr(waiting, "waits", False)):
        if layer is not None and waiting is not layer:
            refuse_second_attention(module)
        return layer
    changed = [name for name, x in (("keys", layer), ("values", other)) if x is None]
    refuse_changed_keys(module, " and ".join(changed) or "values")


def momentkv_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    output : tensor, shape (batch, q_len, q_head, dv)
    weights : tensor or None
        None, unless `stock_attention` gives some.

    Raises
    ------
    ValueError
        If keys or values are not those that the cache layer handed out, or the pass is not one of the cache that
        ``generate`` was given.
    """
    result: tuple[torch.Tensor, None]
    settings = {"scaling": scaling, "dropout": dropout, **kwargs}
    if torch.compiler.is_compiling():
        links = [x for x in (getattr(key, LINK, None), getattr(value, LINK, None)) if x is not None]
        if links and not links[0].steps_statically(query.shape[2]):
            result = apart(momentkv_attention, module, query, key, value, attention_mask, **settings)
            return result
    layer = linked_layer(module, key, value)
    if layer is not None:
        result = layer.attend(module, query, key, value, attention_mask, **settings)
        return result
    refuse_dropped_cache(module, key.shape[2])
    return stock_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of caches that momentkv does not compress, as the model itself computes it.

    That is transformers' SDPA; where it would ignore an argument (sinks, soft caps, whatever a model has of its own),
    the eager function of the model's own module, which takes them all.

    Raises
    ------
    ValueError
        If there is such an argument and the model's module has no eager function.
    """
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    by_flag = causal or supports_sdpa(getattr(module, "config", None))  # a model without SDPA means its mask
    if by_flag and query.shape[2] == key.shape[2] and is_unpadded(attention_mask):
        attention_mask = None
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = _whole_mask(query, key, attention_mask)
    strange = unknown_arguments(kwargs)
    if not strange:
        stock: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return stock
    own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if own is None:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(strange)} to attention, which momentkv does not know; call "
            'model.set_attn_implementation("eager") and use a DynamicCache for this model'
        )
    if attention_mask is None and causal and query.shape[2] > 1:
        attention_mask = _whole_mask(query, key, None)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        hidden = torch.finfo(query.dtype).min
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        attention_mask = torch.where(attention_mask, zero, hidden)
    given = {} if scaling is None else {"scaling": scaling}
    result: tuple[torch.Tensor, torch.Tensor | None] = own(
        module, query, key, value, attention_mask, dropout=dropout, **given, **kwargs
    )
    return result


def _whole_mask(query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """The causal mask of the newest queries with padding, bool (batch, 1, q_len, n)."""
    q_len, n = query.shape[2], key.shape[2]
    mask: torch.Tensor = sdpa_mask(
        batch_size=query.shape[0],
        q_length=q_len,
        kv_length=n,
        q_offset=n - q_len,
        attention_mask=padding,
        allow_is_causal_skip=False,
        device=query.device,
    )
    return mask


def _newest_mask(seen: Any, attention_mask: torch.Tensor) -> torch.Tensor:
    """Whether the token after those ``seen`` is none of padding, bool (batch, 1, 1, 1), for a step of a static cache.

    Masks may be wider, with room for tokens to come. A step that is compiled reads the device's clock and asks nothing.
    """
    if torch.compiler.is_compiling():
        # Within the mask, as an index beyond it would end the device's whole process.
        place = seen.reshape(1).clamp(max=attention_mask.shape[1] - 1)
        return attention_mask.index_select(1, place).bool()[:, None, None]
    layer, seen = getattr(seen, LINK, None), int(seen)
    _check_width(attention_mask, seen + 1)
    attention_mask = attention_mask[:, : seen + 1]
    if layer is not None and layer.padding is not None:
        layer.padding.check(attention_mask, seen)
        layer.padding.read(attention_mask, None, seen, 1)
    return attention_mask[:, -1:].bool()[:, None, None]


def _check_width(attention_mask: torch.Tensor, tokens: int) -> None:
    """Raise if a mask does not cover all tokens, the new ones included."""
    if attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask has length {attention_mask.shape[1]}, but {tokens} tokens have been seen with this "
            "cache; pass a mask over all of them, not over the new ones alone"
        )


def momentkv_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Mask function of ``attn_implementation="momentkv"``.

    Returns
    -------
    tensor or None
        For a causal mask bool ``(batch, kv_length)``, where False is padding. Without padding it is one expanded True,
        and None for a single query. Any other mask is as SDPA takes it, bool ``(batch, 1, q_length, kv_length)``. For a
        step of a static cache it is None without a mask, else bool ``(batch, 1, 1, 1)``: True if the newest token is
        not padding; a sliding mask, which no layer of such a cache takes, has no entries. For a model whose attention
        does not go through transformers' interface, the additive mask that eager attention takes.

    Raises
    ------
    ValueError
        If the mask covers fewer tokens than the cache has seen, hides some that it has stored, or has rows for another
        batch.
    """
    if not torch.compiler.is_compiling():
        _waiting.layer = None  # of a pass that ended before its attention; another one starts
    if attention_mask is not None and len(attention_mask) != batch_size:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for a batch of {batch_size}; give each a row"
        )
    if kv_offset == NEWEST:
        if local_size is None and mask_function is not causal_mask_function:
            raise ValueError(OWN_MASK)
        if local_size is not None:
            # Models may make it whether a layer slides or not, and no layer of a static cache does: raises where used.
            return torch.empty((batch_size, 1, 1, 0), dtype=torch.bool, device=kwargs.get("device"))
        return None if attention_mask is None else _newest_mask(q_offset, attention_mask)
    if kv_offset == SEVERAL:
        kv_offset, q_offset = 0, kv_length - q_length
    config = kwargs.get("config")
    allow_is_causal_skip = allow_is_causal_skip and not takes_whole_masks(config)
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "local_size": local_size,
        "allow_is_causal_skip": allow_is_causal_skip,
        **kwargs,
    }
    if not uses_interface(config):
        eager: torch.Tensor = eager_mask(q_offset=q_offset, **settings)
        return eager
    if q_length > 1 and isinstance(q_offset, torch.Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)  # of a static cache that is to read several tokens
    causal = mask_function is causal_mask_function and local_size is None and kv_offset == 0 and allow_is_causal_skip
    if causal and isinstance(q_offset, int) and kv_length == q_offset + q_length:
        if attention_mask is not None:
            _check_width(attention_mask, kv_length)
        mask = None if attention_mask is None else attention_mask[:, :kv_length].bool()
        if mask is not None and not bool(mask.all()):
            return mask
        if q_length == 1:
            return None
        # Not None: attention could then not tell a causal mask from no mask.
        return torch.ones((), dtype=torch.bool, device=kwargs.get("device")).expand(batch_size, kv_length)
    masked: torch.Tensor | None = sdpa_mask(q_offset=q_offset, **settings)
    full = local_size is None and kv_offset == 0 and mask_function is not causal_mask_function
    if full and q_length > 1 and not takes_whole_masks(config) and not torch.compiler.is_compiling():
        # Of a text without images, the token types that a processor gives leave the mask what it is without them.
        settings |= {"mask_function": causal_mask_function, "allow_is_causal_skip": False}
        if masked is not None and torch.equal(masked, sdpa_mask(q_offset=q_offset, **settings)):
            return momentkv_mask(q_offset=q_offset, **settings | {"allow_is_causal_skip": True})
    return masked
