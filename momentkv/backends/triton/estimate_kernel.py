"""Triton: the estimate of the evicted tokens for a tile of queries, as the state that an online softmax starts from."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["initial_state"]


@triton.jit
def sides_of(
    LEFT,
    RIGHT,
    head,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    RANK: tl.constexpr,
):
    """Of a slope of low rank, the vectors that meet a query and those that it then adds, in pairs."""
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    sides = ()
    for r in tl.static_range(RANK):
        right = tl.load(RIGHT + (head * RANK + r) * D + dd, mask=dd < D, other=0.0)
        left = tl.load(LEFT + (head * DV + vv) * RANK + r, mask=vv < DV, other=0.0)
        sides = sides + ((right, left),)
    return sides


@triton.jit
def initial_state(
    q,
    Q,
    row_mask,
    rr,
    head,
    rows,
    ANCHOR,
    LOG_WEIGHT,
    KEY_MEAN,
    VALUE_MEAN,
    SLOPE,
    LEFT,
    RIGHT,
    VARIANCE,
    STRENGTH,
    CAP,
    scale,
    stride_sd,
    stride_sv,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUMMARIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RANK: tl.constexpr,
    FULL_SLOPE: tl.constexpr,
    FULL_VARIANCE: tl.constexpr,
    DIAGONAL_VARIANCE: tl.constexpr,
    ANCHORED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Running maximum (base 2), sum and weighted values of the estimate: (lse, 1, out), or (-inf, 0, 0).

    Products with means err hardly more than float32, for an lse has to be right to the third decimal: by EXACT, float32
    itself, or three products of tensor cores for one. d x d matrices in their own dtype.
    """
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    dm = dd < D
    vm = vv < DV
    x = q.to(tl.float32) * scale
    if ANCHORED:
        x -= tl.load(ANCHOR + head * D + dd, mask=dm, other=0.0).to(tl.float32)[None, :]
    # All that is small is asked for at once: one answer is waited for, not one after the other. For many queries there
    # is no room.
    sides = ()
    if BLOCK_M <= 16:
        sides = sides_of(LEFT, RIGHT, head, D, DV, BLOCK_D, BLOCK_V, RANK)
    if DIAGONAL_VARIANCE:
        variance = tl.load(VARIANCE + head * D + dd, mask=dm, other=0.0)
    if DIAGONAL_VARIANCE or FULL_VARIANCE:
        half = 0.5 * tl.load(STRENGTH + head)
        cap = tl.load(CAP + head)
    if SUMMARIES == 1:
        mean = tl.load(KEY_MEAN + head * D + dd, mask=dm, other=0.0).to(tl.float32)
        lse = tl.load(LOG_WEIGHT + head) + tl.sum(x * mean[None, :], 1)
        value = tl.load(VALUE_MEAN + head * DV + vv, mask=vm, other=0.0)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32) + value[None, :]
    else:
        # As many at a time as a tile has, so that registers do not depend on how many there are.
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for first in tl.range(0, SUMMARIES, BLOCK_S, num_stages=1):
            ss = first + tl.arange(0, BLOCK_S)
            sm = ss < SUMMARIES
            place = head * SUMMARIES + ss
            mean = tl.load(KEY_MEAN + place[:, None] * D + dd[None, :], mask=sm[:, None] & dm[None, :], other=0.0)
            log_weight = tl.load(LOG_WEIGHT + place, mask=sm, other=float("-inf"))
            values = VALUE_MEAN + place[:, None] * DV + vv[None, :]
            if BLOCK_M <= 16:
                value = tl.load(values, mask=sm[:, None] & vm[None, :], other=0.0)
            products = tl.dot(x, tl.trans(mean.to(tl.float32)), input_precision=EXACT) + log_weight[None, :]
            new = tl.maximum(top, tl.max(products, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            fade = tl.exp(top - shift)
            weights = tl.exp(products - shift[:, None])
            total = total * fade + tl.sum(weights, 1)
            if BLOCK_M > 16:
                value = tl.load(values, mask=sm[:, None] & vm[None, :], other=0.0)
            out = tl.dot(weights, value.to(tl.float32), out * fade[:, None], input_precision=EXACT)
            top = new
        safe = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), tl.log(safe) + top)
        out /= safe[:, None]
    if BLOCK_M > 16:
        sides = sides_of(LEFT, RIGHT, head, D, DV, BLOCK_D, BLOCK_V, RANK)
    for r in tl.static_range(RANK):
        out += tl.sum(x * sides[r][0][None, :], 1)[:, None] * sides[r][1][None, :]
    if DIAGONAL_VARIANCE:
        lse += tl.minimum(half * tl.sum(x * x * variance[None, :], 1), cap)
    if FULL_SLOPE or FULL_VARIANCE:
        # d x d matrices, some rows at a time. A tensor in registers cannot be sliced: read these columns of q again.
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, BLOCK_D, BLOCK_C):
            cc = start + tl.arange(0, BLOCK_C)
            cm = cc < D
            part = tl.load(
                Q + (head * rows + rr[:, None]) * D + cc[None, :], mask=row_mask[:, None] & cm[None, :], other=0.0
            )
            part = part.to(tl.float32) * scale
            if ANCHORED:
                part -= tl.load(ANCHOR + head * D + cc, mask=cm, other=0.0)[None, :]
            if FULL_SLOPE:
                slope = tl.load(
                    SLOPE + head * D * DV + cc[:, None] * stride_sd + vv[None, :] * stride_sv,
                    mask=cm[:, None] & vm[None, :],
                    other=0.0,
                )
                out = tl.dot(part.to(slope.dtype), slope, out, input_precision="ieee")
            if FULL_VARIANCE:
                matrix = tl.load(
                    VARIANCE + (head * D + cc[:, None]) * D + dd[None, :], mask=cm[:, None] & dm[None, :], other=0.0
                )
                square += tl.sum(tl.dot(part.to(matrix.dtype), matrix, input_precision="ieee") * x, 1)
        if FULL_VARIANCE:
            lse += tl.minimum(half * square, cap)
    # NaN is some: it must not pass for the empty set.
    some = lse != float("-inf")
    return (
        tl.where(some, lse * 1.4426950408889634, float("-inf")),
        tl.where(some, 1.0, 0.0),
        tl.where(some[:, None], out, 0.0),
    )
