"""Launching the fused decode kernel: block sizes, splits, strides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from momentkv.backends.triton.decode_kernel import combine_kernel, decode_kernel
from momentkv.statistics.expansion import Expansion

__all__ = ["DecodeBlocks", "decode_blocks", "decode_triton", "estimate_flags", "number_of_splits"]

# Blocks of the sequence for each multiprocessor, so that all have work while some wait for memory.
WAVES = 2
SPLITS = 64  # at most; the combine kernel holds the outputs of all splits of a query


class DecodeBlocks(NamedTuple):
    """Compile-time sizes of `decode_kernel`; all but ``num_warps`` and ``num_stages`` are its arguments.

    Attributes
    ----------
    BLOCK_M, BLOCK_N : int
        Queries of a group, and tokens, in one tile.
    BLOCK_D, BLOCK_V, BLOCK_C : int
        Dimension of keys and of values, padded, and rows of a ``d x d`` matrix at a time.
    num_warps, num_stages : int
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


def decode_blocks(rows: int, d: int, dv: int, dtype: torch.dtype) -> DecodeBlocks:
    """Sizes for so many queries of a KV head; a tile of `tl.dot` has at least 16 in each direction."""
    wide = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    largest = max(wide)
    # Full float32 products are not done by tensor cores and hold their factors in registers.
    single = dtype == torch.float32
    # A group of more than 16 queries reads the cache once with a tile of 32, where registers allow.
    queries = 32 if rows > 16 and not single and largest <= 128 else 16
    return DecodeBlocks(
        BLOCK_M=queries,
        BLOCK_N=(32 if largest <= 64 else 16) if single else (64 if largest <= 128 else 32),
        BLOCK_D=wide[0],
        BLOCK_V=wide[1],
        BLOCK_C=16 if single or largest > 128 else 32,
        num_warps=8 if queries == 32 or (single and largest > 64) else 4,
        num_stages=2 if single else 3,
    )


def number_of_splits(programs: int, capacity: int, block_n: int, processors: int) -> int:
    """Parts of the sequence: enough to occupy the device, none smaller than a tile.

    Depends on shapes only, never on counts: those are known to the device alone, and a captured graph is fixed.
    """
    wanted = triton.cdiv(WAVES * processors, max(programs, 1))
    return max(1, min(wanted, triton.cdiv(capacity, block_n), SPLITS))


def estimate_flags(expansion: Expansion | None) -> dict[str, Any]:
    """Compile-time arguments that say what an estimate consists of."""
    if expansion is None:
        return {
            "SUMMARIES": 0,
            "BLOCK_S": 16,
            "RANK": 0,
            "FULL_SLOPE": False,
            "FULL_VARIANCE": False,
            "DIAGONAL_VARIANCE": False,
            "ANCHORED": False,
        }
    summaries = expansion.log_weight.shape[-1]
    spread = 0 if expansion.variance is None else expansion.variance.ndim - expansion.log_weight.ndim + 1
    return {
        "SUMMARIES": summaries,
        "BLOCK_S": max(16, triton.next_power_of_2(summaries)),
        "RANK": 0 if expansion.slope_right is None else expansion.slope_right.shape[-2],
        "FULL_SLOPE": expansion.slope is not None,
        "FULL_VARIANCE": spread == 2,
        "DIAGONAL_VARIANCE": spread == 1,
        "ANCHORED": expansion.anchor is not None,
    }


def decode_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor | None,
    starts: torch.Tensor | None,
    capacity: int,
    expansion: Expansion | None,
    scale: float,
    scored: bool,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the kernel; arguments as those of `momentkv.backends.operators.decode`, checked there.

    ``splits`` overrules the number of parts of the sequence.
    """
    batch, q_heads, q_len, d = q.shape
    dv = v.shape[-1]
    kv_heads = k.shape[1] if starts is None else starts.shape[-1]
    rows, heads = q_heads // kv_heads * q_len, batch * kv_heads
    blocks = decode_blocks(rows, d, dv, q.dtype)
    tiles = triton.cdiv(rows, blocks.BLOCK_M)
    q = q.contiguous()
    if splits is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        splits = number_of_splits(heads * tiles, capacity, blocks.BLOCK_N, processors)
    # With few heads the estimate would make one split the slowest; it gets one for itself.
    own = expansion is not None and splits > 1
    splits += own
    out = q.new_empty((batch, q_heads, q_len, dv))
    lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32, device=q.device)
    logits = None
    if scored:
        logits = torch.empty(
            (batch, kv_heads, q_heads // kv_heads, q_len, capacity), dtype=torch.float32, device=q.device
        )
    part_out = part_lse = None
    if splits > 1:
        part_out = torch.empty((heads, splits, rows, dv), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((heads, splits, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse, logits
    packed = starts is not None
    strides = [0, 0, k.stride(-2), 0, 0, v.stride(-2)] if packed else [*k.stride()[:3], *v.stride()[:3]]
    strides += [0, 0] if packed or positions is None else list(positions.stride()[:2])
    estimate = [None] * 10 if expansion is None else [contiguous(name, x) for name, x in expansion._asdict().items()]
    log_weight, key_mean, value_mean, anchor, slope, left, right, variance, strength, cap = estimate
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # the latter means nothing to halves
    decode_kernel[(heads, splits, tiles)](
        q,
        k,
        v,
        positions,
        counts,
        starts,
        anchor,
        log_weight,
        key_mean,
        value_mean,
        slope,
        left,
        right,
        variance,
        strength,
        cap,
        out,
        lse,
        part_out,
        part_lse,
        logits,
        scale,
        rows,
        capacity,
        kv_heads,
        *strides,
        *((0, 0) if slope is None else slope.stride()[-2:]),
        D=d,
        DV=dv,
        SPLITS=splits,
        OWN_SPLIT=int(own),
        MASKED=positions is not None,
        COUNTED=counts is not None,
        PACKED=packed,
        SCORED=scored,
        PRECISION=precision,
        **estimate_flags(expansion),
        **blocks._asdict(),
    )
    if splits > 1:
        combine_kernel[(heads, rows)](
            part_out,
            part_lse,
            out,
            lse,
            rows,
            DV=dv,
            BLOCK_V=blocks.BLOCK_V,
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
            num_warps=4,
        )
    return out, lse, logits


def contiguous(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as the kernel reads it; only the slope may lie the other way round."""
    if x is None or (name == "slope" and x.mT.is_contiguous()):
        return x
    return x.contiguous()
