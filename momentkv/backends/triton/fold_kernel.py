"""Triton: fold a block of tokens into the paper's moments and close the gaps they leave, in place.

Two kernels, one after the other, for every tile of the co-moment needs the means before the fold and the evicted tokens
themselves: `fold_kernel` reads both and writes the co-moment; `close_kernel` then writes weight and means, and moves
tokens from the end of the cache into the gaps. Cost: the evicted tokens and the moments, whatever the cache holds.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["close_kernel", "fold_kernel"]


@triton.jit
def fold_kernel(
    KEYS,
    VALUES,
    EVICTED,
    WEIGHT,
    KEY_MEAN,
    VALUE_MEAN,
    KEY_VALUE,
    SLOPE,
    capacity,
    block,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Co-moment of (head, D, DV) and its copy per unit of weight. Grid: (batch * kv_head, tiles of D, tiles of DV).

    EVICTED is (head, block): slots, negative for none.
    """
    head = tl.program_id(0).to(tl.int64)
    ee = tl.arange(0, BLOCK_E)
    dd = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    vv = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    dm = dd < D
    vm = vv < DV
    slot = tl.load(EVICTED + head * block + ee, mask=ee < block, other=-1)
    real = slot >= 0
    number = tl.sum(real.to(tl.float32), 0)
    if number > 0:
        at = (head * capacity + slot).to(tl.int64)
        k = tl.load(KEYS + at[:, None] * D + dd[None, :], mask=real[:, None] & dm[None, :], other=0.0).to(tl.float32)
        v = tl.load(VALUES + at[:, None] * DV + vv[None, :], mask=real[:, None] & vm[None, :], other=0.0)
        v = v.to(tl.float32)
        key_mean = tl.sum(k, 0) / number
        value_mean = tl.sum(v, 0) / number
        k = tl.where(real[:, None], k - key_mean[None, :], 0.0)
        v = tl.where(real[:, None], v - value_mean[None, :], 0.0)
        weight = tl.load(WEIGHT + head)
        total = weight + number
        key_shift = key_mean - tl.load(KEY_MEAN + head * D + dd, mask=dm, other=0.0)
        value_shift = value_mean - tl.load(VALUE_MEAN + head * DV + vv, mask=vm, other=0.0)
        tile = head * D * DV + dd[:, None] * DV + vv[None, :]
        held = tl.load(KEY_VALUE + tile, mask=dm[:, None] & vm[None, :], other=0.0)
        held += (weight * (number / total)) * key_shift[:, None] * value_shift[None, :]
        held = tl.dot(tl.trans(k), v, held, input_precision=PRECISION)
        tl.store(KEY_VALUE + tile, held, mask=dm[:, None] & vm[None, :])
        tl.store(SLOPE + tile, (held / total).to(SLOPE.dtype.element_ty), mask=dm[:, None] & vm[None, :])


@triton.jit
def close_kernel(
    KEYS,
    VALUES,
    POSITIONS,
    SCORE,
    COUNTS,
    EVICTED,
    WEIGHT,
    LOG_WEIGHT,
    KEY_MEAN,
    VALUE_MEAN,
    capacity,
    block,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Weight and means of (head, ...), then the tokens of the last slots into the gaps. Grid: (batch * kv_head,).

    With c tokens of which e are evicted, c - e stay in use. Of the last e slots those not evicted move, each into the
    gap of the same rank among the gaps before slot c - e: there are as many of one as of the other.
    """
    head = tl.program_id(0).to(tl.int64)
    ee = tl.arange(0, BLOCK_E)
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    dm = dd < D
    vm = vv < DV
    slot = tl.load(EVICTED + head * block + ee, mask=ee < block, other=-1)
    real = slot >= 0
    evicted = tl.sum(real.to(tl.int32), 0)
    if evicted > 0:
        at = (head * capacity + slot).to(tl.int64)
        number = evicted.to(tl.float32)
        weight = tl.load(WEIGHT + head)
        share = number / (weight + number)
        k = tl.load(KEYS + at[:, None] * D + dd[None, :], mask=real[:, None] & dm[None, :], other=0.0)
        key_mean = tl.load(KEY_MEAN + head * D + dd, mask=dm, other=0.0)
        key_mean += share * (tl.sum(k.to(tl.float32), 0) / number - key_mean)
        v = tl.load(VALUES + at[:, None] * DV + vv[None, :], mask=real[:, None] & vm[None, :], other=0.0)
        value_mean = tl.load(VALUE_MEAN + head * DV + vv, mask=vm, other=0.0)
        value_mean += share * (tl.sum(v.to(tl.float32), 0) / number - value_mean)

        left = tl.load(COUNTS + head) - evicted
        gap = real & (slot < left)
        tail = left + ee
        stays = (ee < evicted) & (tl.sum((slot[:, None] == tail[None, :]).to(tl.int32), 0) == 0)
        # Rank of each gap among gaps, and of each token that moves among those that do.
        before = ee[:, None] < ee[None, :]
        rank_of_gap = tl.sum((before & gap[:, None]).to(tl.int32), 0)
        rank_of_tail = tl.sum((before & stays[:, None]).to(tl.int32), 0)
        pair = gap[:, None] & stays[None, :] & (rank_of_gap[:, None] == rank_of_tail[None, :])
        source = tl.sum(tl.where(pair, tail[None, :], 0), 1)
        origin = (head * capacity + source).to(tl.int64)
        k = tl.load(KEYS + origin[:, None] * D + dd[None, :], mask=gap[:, None] & dm[None, :], other=0.0)
        v = tl.load(VALUES + origin[:, None] * DV + vv[None, :], mask=gap[:, None] & vm[None, :], other=0.0)
        position = tl.load(POSITIONS + origin, mask=gap, other=-1)
        score = tl.load(SCORE + origin, mask=gap, other=0.0)

        # All that is read has been read before anything is written: warps are not in step, and small tensors are held
        # by several of them.
        tl.debug_barrier()
        tl.store(KEY_MEAN + head * D + dd, key_mean, mask=dm)
        tl.store(VALUE_MEAN + head * DV + vv, value_mean, mask=vm)
        tl.store(WEIGHT + head, weight + number)
        tl.store(LOG_WEIGHT + head, tl.log(weight + number))
        tl.store(KEYS + at[:, None] * D + dd[None, :], k, mask=gap[:, None] & dm[None, :])
        tl.store(VALUES + at[:, None] * DV + vv[None, :], v, mask=gap[:, None] & vm[None, :])
        tl.store(POSITIONS + at, position, mask=gap)
        tl.store(SCORE + at, score, mask=gap)
        # Slots of the tail are no gaps: they are free now.
        free = (head * capacity + tail).to(tl.int64)
        tl.store(POSITIONS + free, tl.full([BLOCK_E], -1, tl.int32), mask=ee < evicted)
        tl.store(COUNTS + head, left)
