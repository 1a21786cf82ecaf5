"""Phi-3 and its kin, whose ``generate`` gives up a cache at a length: what the cache knows of that.

Beyond the limit these models rotate keys by other factors, and read all anew without the cache.
"""

from __future__ import annotations

import sys
import threading
import weakref
from typing import Any

import torch

__all__ = ["check_limit", "has_read", "refuse_dropped_cache"]

# Types whose generate() gives up the cache when the ids pass `original_max_position_embeddings`.
DROPPING = ("phi3", "phimoe", "phi4_multimodal")
# What of `generate` asks, before the pass that uses the cache or does not.
PREPARES = "prepare_inputs_for_generation"


class _Asked(threading.local):
    """For each thread, caches of dropping models whose ``generate`` asked whether they hold anything."""

    def __init__(self) -> None:
        self.caches: Any = weakref.WeakSet()


_asked = _Asked()


def limit_of(config: Any) -> int | None:
    """Length beyond which a model's ``generate`` gives up a shorter cache and reads all anew; None if it never does."""
    if getattr(config, "model_type", None) not in DROPPING:
        return None
    limit: int | None = getattr(config, "original_max_position_embeddings", None)
    return limit


def has_read(cache: Any) -> bool:
    """Truth of a cache: whether it has read any tokens, as of a `DynamicCache`, whose layers come with the first.

    Phi-3's ``generate`` gives up a cache that has, when the ids pass a limit, and asks this first; an empty cache is
    so kept, and reads a prompt of any length. That one was asked is remembered for `refuse_dropped_cache`.
    """
    asks = limit_of(cache.config) is not None and not torch.compiler.is_compiling()
    if asks and sys._getframe(2).f_code.co_name == PREPARES:
        _asked.caches.add(cache)
    return cache.is_initialized


def check_limit(cache: Any, new: int) -> None:
    """Raise where ``new`` tokens would be rotated by other factors than those that a cache holds (longrope)."""
    limit = limit_of(cache.config)
    if limit is None:
        return
    _asked.caches.discard(cache)
    seen = int(cache.get_seq_length())
    rope = getattr(cache.config, "rope_parameters", None) or {}
    if 0 < seen <= limit < seen + new and rope.get("rope_type") == "longrope":
        raise ValueError(
            f"{new} tokens after {seen} pass original_max_position_embeddings={limit}, beyond which this "
            f"{cache.config.model_type} model rotates keys by other factors than those the cache holds; {within(limit)}"
        )


def within(limit: int) -> str:
    """How to stay on one side of a limit."""
    return f"read more than {limit} tokens in the first pass of an empty cache, or stay within {limit}"


def refuse_dropped_cache(module: Any, length: int) -> None:
    """Raise if a pass runs beside the cache that ``generate`` was given, because the model has given that up."""
    if not _asked.caches or torch.compiler.is_compiling():
        return
    for cache in list(_asked.caches):
        limit, kind = limit_of(cache.config), cache.config.model_type
        if limit is not None and length > limit and cache.config is getattr(module, "config", None):
            _asked.caches.discard(cache)
            raise ValueError(
                f"this {kind} model has given up the MomentCache, which has read "
                f"{int(cache.get_seq_length())} tokens, and reads all {length} anew without a budget: generate() does "
                f"so when the ids pass original_max_position_embeddings={limit}; {within(limit)}"
            )
