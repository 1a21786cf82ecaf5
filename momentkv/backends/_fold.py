"""Launching the kernels that fold evicted tokens into moments."""

from __future__ import annotations

import torch
import triton

from momentkv.backends._fold_kernel import close_kernel, fold_kernel

__all__ = ["fold_triton"]

TILE = 64


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
    """Run both kernels; arguments as those of `momentkv.backends._operators.fold`, checked there."""
    batch, kv_heads, capacity, d = keys.shape
    dv, block = values.shape[-1], evicted.shape[-1]
    heads = batch * kv_heads
    padded = max(16, triton.next_power_of_2(block))
    if heads == 0 or block == 0:
        return
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
            BLOCK_E=padded,
            BLOCK_D=TILE,
            BLOCK_V=TILE,
            PRECISION="ieee" if keys.dtype == torch.float32 else "tf32x3",
            num_warps=4,
            num_stages=1,
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
        BLOCK_E=padded,
        BLOCK_D=triton.next_power_of_2(d),
        BLOCK_V=triton.next_power_of_2(dv),
        num_warps=4 if padded <= 32 else 8,
        num_stages=1,
    )
