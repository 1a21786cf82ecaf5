"""Launching the kernels that fold evicted tokens into moments."""

from __future__ import annotations

from typing import Any

import torch
import triton

from momentkv.backends.triton.fold_kernel import close_kernel, fold_kernel

__all__ = ["fold_options", "fold_triton"]

TILE = 32


def fold_options(d: int, dv: int, block: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time arguments and options of `fold_kernel` and of `close_kernel`, dimensions aside."""
    padded = max(16, triton.next_power_of_2(block))
    wide = max(triton.next_power_of_2(d), triton.next_power_of_2(dv))
    fold = {
        "BLOCK_E": padded,
        "BLOCK_D": TILE,
        "BLOCK_V": TILE,
        # Moments are float32 sums over many blocks; products of halves would be theirs no longer.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32x3",
        "num_warps": 4,
        "num_stages": 1,
    }
    close = {
        "BLOCK_E": padded,
        "BLOCK_D": triton.next_power_of_2(d),
        "BLOCK_V": triton.next_power_of_2(dv),
        "num_warps": 4 if padded * wide <= 4096 else 8,
        "num_stages": 1,
    }
    return fold, close


def fold_triton(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    score: torch.Tensor,
    counts: torch.Tensor,
    evicted: torch.Tensor,
    weight: torch.Tensor,
    log_weight: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    key_value: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> None:
    """Run both kernels; arguments as those of `momentkv.backends.operators.fold`, checked there."""
    batch, kv_heads, capacity, d = keys.shape
    dv, block = values.shape[-1], evicted.shape[-1]
    heads = batch * kv_heads
    if heads == 0 or block == 0:
        return
    of_fold, of_close = fold_options(d, dv, block, keys.dtype)
    if key_value is not None:
        fold_kernel[(heads, triton.cdiv(d, TILE), triton.cdiv(dv, TILE))](
            keys,
            values,
            evicted,
            weight,
            key_mean,
            value_mean,
            key_value,
            slope,
            capacity,
            block,
            D=d,
            DV=dv,
            **of_fold,
        )
    close_kernel[(heads,)](
        keys,
        values,
        positions,
        score,
        counts,
        evicted,
        weight,
        log_weight,
        key_mean,
        value_mean,
        capacity,
        block,
        D=d,
        DV=dv,
        **of_close,
    )
