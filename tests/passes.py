"""Queries, keys and values of a few passes, as tensors."""

from __future__ import annotations

from typing import Any

import torch

# Of a small cache.
SIZES: dict[str, Any] = {"sinks": 1, "window": 4, "block": 4}


def passes(lengths: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[list[torch.Tensor]]:
    """One row, four query heads for two KV heads of dimension 8."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, heads, n, 8, generator=generator).to(dtype) for heads in (4, 2, 2)] for n in lengths]
