"""Out of `torch.autocast`: a cache computes in the dtypes that it names, and stores what it computes."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["without_autocast"]

DEVICES = ("cpu", "cuda")


def without_autocast() -> contextlib.AbstractContextManager[object]:
    """Within it, nothing is cast for the caller who reads under autocast.

    Examples
    --------
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     with without_autocast():
    ...         torch.is_autocast_enabled("cpu")
    False
    """
    casting = [name for name in DEVICES if torch.is_autocast_enabled(name)]
    if not casting:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for name in casting:
        stack.enter_context(torch.autocast(name, enabled=False))
    return stack
