"""What a compiled model does with a cache outside of its graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["apart"]

REASON = (
    "MomentCache supports torch.compile for steps of one token with static=True, after a pass that was not compiled: "
    "make it with static=True, and read the prompt with the model uncompiled; or leave fullgraph out, and the cache "
    "runs between the graphs"
)
GIVEN: dict[str, Any] = {"reason": REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}


def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function returns."""
    return function(*args, **kwargs)


# Sizes change from pass to pass and eviction decides on the host, so a graph ends before such a call; with
# fullgraph=True this is an error. Only a compiled model calls it: it would take time in every pass of others.
disable: Any = torch.compiler.disable
apart: Callable[..., Any] = disable(called, **GIVEN)
