"""Eviction outside of `torch.autocast`: it computes in the dtypes that it names, and stores what it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["without_autocast"]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Within it, nothing is cast for the caller who reads under autocast.

    Examples
    --------
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     with without_autocast():
    ...         torch.is_autocast_enabled("cpu")
    False
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
