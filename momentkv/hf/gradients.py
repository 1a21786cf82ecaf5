"""What gradients through a cache lack, said where one is taken."""

from __future__ import annotations

import warnings
from typing import Any

import torch

__all__ = ["say_what_gradients_lack"]

LACKING = (
    "a gradient was taken through a MomentCache, which holds keys and values without: it lacks what comes through them "
    "to weights and inputs; train without past_key_values (use_cache=False), or read under torch.no_grad()"
)


def say_what_gradients_lack(out: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Warn once if a gradient of attention is taken that should have reached its keys and values.

    Not where one could be taken: models are often called without `torch.no_grad` and nothing else in mind.
    """
    if not torch.is_grad_enabled() or not (key.requires_grad or value.requires_grad):
        return
    if out.requires_grad:
        hooked: Any = out
        hooked.register_hook(warn)
    else:  # queries are frozen, so that no backward pass comes here
        warn(None)


def warn(gradient: Any) -> None:
    """Say it; Python shows a warning of one place once."""
    warnings.warn(LACKING, RuntimeWarning, stacklevel=1)
