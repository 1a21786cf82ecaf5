"""Parts of a step that compute in the dtypes of their arrays, whatever mode the caller is in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from momentkv.backends import ArrayBackend
from momentkv.cache.config import CacheConfig

__all__ = ["as_given"]

P = ParamSpec("P")
T = TypeVar("T")


def as_given(part: Callable[Concatenate[CacheConfig, Any, P], T]) -> Callable[Concatenate[CacheConfig, Any, P], T]:
    """A part of a step, of settings and a state (or keys, or a backend), out of `torch.autocast`.

    Under it products of float32 are of bfloat16, statistics of one step would not fit those of the next, and logits
    would have three digits.
    """

    @functools.wraps(part)
    def within(config: CacheConfig, first: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        backend = first if isinstance(first, ArrayBackend) else config.backend_of(getattr(first, "recent_keys", first))
        with backend.as_given():
            return part(config, first, *args, **kwargs)

    return within
