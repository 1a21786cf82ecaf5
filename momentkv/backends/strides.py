"""Vectors without gaps, for kernels that take the stride of the last axis to be 1."""

from __future__ import annotations

import torch

__all__ = ["side_by_side"]


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, those of the last axis beside each other: copied if they are not, as of einsum or ``mT``."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
