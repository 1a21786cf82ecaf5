"""Triton: attention to records, codes of few bits that are unpacked in registers and never decoded.

The affine map of a channel moves into the query and out of the output, the step of a token into its logit and its
weight; see `momentkv.codes.attention`. What remains are products with whole numbers.

Every warp goes through tokens of its own, the first axis of all tiles, and has a state of its own. They are joined
once, at the end: before that, warps exchange nothing. Each byte goes from memory to shared memory, from there to the
registers that a tensor core reads, and nowhere else.

- **Keys** are bytes, multiplied as such: the query is a whole number of 16 bits (of 32 for float32), in units of its
  largest component, and each of its bytes is a column. Sums are exact.
- **Values** are words of two bytes. Tensor cores add up pairs of tokens, and such pairs can be read across rows in
  pieces of two bytes, no smaller. Codes become the last digits of float16 behind a one, less which and less the centre
  they are exact. Weights are float16, in two pieces where there is room or need.

Where channels of keys are graded, a record holds the finer half of them, then the coarser one, as two such records of
half the channels. The query is read in the order of its head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from momentkv.backends.triton.planes_kernel import bytes_of, copies, halves_of, low_bit, size_of, words_of
from momentkv.backends.triton.whole_kernel import queries_of, whole, whole_queries

__all__ = ["attend_codes"]

# Weights are so many powers of two above their own size, so that float16 holds small ones.
RAISED = tl.constexpr(14.0)
# The smallest step of a token that is not zero.
LEAST_STEP = tl.constexpr(2.0**-24)


@triton.constexpr_function
def centre_of(high, low):
    """What is taken off a code, and off one whose first bit became its sign."""
    return 2.0 ** (high + low - 1) - 0.5 if high + low < 8 else -0.5


@triton.jit
def multiply(
    products,
    queries,
    records,
    at,
    valid,
    splits,
    STRIDE: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Products of the keys of some tokens, of so many channels that begin at ``records``, with whole queries."""
    SIZE: tl.constexpr = CHANNELS * HIGH // 8
    COPIES: tl.constexpr = copies(SIZE, HIGH, COLUMNS, 8)
    high, low = words_of(
        records, records + at[:, :, None] * STRIDE, valid[:, :, None], splits, HIGH, LOW, SIZE, COLUMNS, 8, 2
    )  # fmt: skip
    for slot in tl.static_range(8 // HIGH // COPIES):
        codes = bytes_of(
            high, low, HIGH, LOW, HIGH * COPIES * slot, low_bit(COPIES * slot, HIGH, LOW)
        )  # fmt: skip
        products = tl.dot(codes, queries[slot], products, out_dtype=tl.int32)
    return products


@triton.jit
def attend_codes(
    Q,
    KEYS,
    VALUES,
    KEY_STEP,
    VALUE_STEP,
    MEAN,
    DEVIATION,
    ORDER,
    SPREAD,
    LOGITS,
    head,
    first,
    begin,
    count,
    end,
    rr,
    rm,
    rows,
    slots,
    scale,
    splits,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    ROUGH_HIGH: tl.constexpr,
    ROUGH_LOW: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    VALUE_W: tl.constexpr,
    WARPS: tl.constexpr,
    SCORED: tl.constexpr,
):
    """State of the queries ``rr`` over the tokens ``begin`` to ``end`` of a head, of which the first ``count`` exist.

    The head's tokens begin at ``first``; ``slots`` logits of a query are stored one after the other. Matrices lie the
    other way round than elsewhere: queries, of which there may be four only, are columns.
    """
    SINGLE: tl.constexpr = Q.dtype.element_ty == tl.float32
    PIECES: tl.constexpr = 4 if SINGLE else 2
    # Eight columns cost no more than four.
    WEIGHTS: tl.constexpr = 2 if SINGLE or BLOCK_M == 4 else 1
    N: tl.constexpr = BLOCK_N // WARPS
    # Of the first KEY_D channels of a record, and where these are the finer half, of the others.
    GRADED: tl.constexpr = ROUGH_HIGH > 0
    KEY_D: tl.constexpr = D // 2 if GRADED else D
    COLUMNS: tl.constexpr = max(32, triton.next_power_of_2(KEY_D * KEY_HIGH // 8))
    ROUGH_COLUMNS: tl.constexpr = max(32, triton.next_power_of_2(KEY_D * ROUGH_HIGH // 8))
    BEHIND: tl.constexpr = KEY_D * (KEY_HIGH + KEY_LOW) // 8
    STRIDE: tl.constexpr = BEHIND + KEY_D * (ROUGH_HIGH + ROUGH_LOW) // 8
    queries, shift, largest = queries_of(
        Q, MEAN, DEVIATION, ORDER, head, rr, rm, rows, scale, D, 0, KEY_D, KEY_HIGH, COLUMNS
    )  # fmt: skip
    rough = queries
    if GRADED:
        rough, others, most = queries_of(
            Q, MEAN, DEVIATION, ORDER, head, rr, rm, rows, scale, D, KEY_D, KEY_D, ROUGH_HIGH, ROUGH_COLUMNS
        )  # fmt: skip
        shift += others
        largest = tl.maximum(largest, most)
    largest = tl.where(largest > 0.0, largest, 1.0)
    queries, zero, unit = whole_queries(queries, largest, centre_of(KEY_HIGH, KEY_LOW), PIECES, WARPS)
    if GRADED:
        rough, others, unit = whole_queries(rough, largest, centre_of(ROUGH_HIGH, ROUGH_LOW), PIECES, WARPS)
        zero += others
    # To base 2.
    unit *= 1.4426950408889634
    shift *= 1.4426950408889634

    WORD: tl.constexpr = 8 * VALUE_W
    SIZE: tl.constexpr = DV * VALUE_HIGH // WORD
    VALUE_STRIDE: tl.constexpr = DV * (VALUE_HIGH + VALUE_LOW) // WORD
    ROWS: tl.constexpr = max(16, triton.next_power_of_2(SIZE))
    COPIES: tl.constexpr = copies(SIZE, VALUE_HIGH, ROWS, WORD)
    SLOTS: tl.constexpr = WORD // VALUE_HIGH // COPIES
    top = tl.full([WARPS, BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, N, BLOCK_M], tl.float32)
    accs = ()
    for _ in tl.static_range(SLOTS):
        accs = accs + (tl.zeros([WARPS, ROWS, BLOCK_M * WEIGHTS], tl.float32),)
    # Offsets in 64 bits: a packed cache of many heads has more than 2**31 bytes.
    keys = KEYS + first * STRIDE
    values = VALUES + first * VALUE_STRIDE
    inside = tl.arange(0, WARPS)[:, None] * N + tl.arange(0, N)[None, :]
    last = tl.minimum(count, end)
    # Steps are read a tile ahead: two bytes a thread are too few for a copy that does not wait.
    nn = begin + inside
    key_step = tl.load(KEY_STEP + first + nn, mask=nn < last, other=0.0)
    value_step = tl.load(VALUE_STEP + first + nn, mask=nn < last, other=0.0)
    for start in range(begin, end, BLOCK_N):
        nn = start + inside
        valid = nn < last
        after = nn + BLOCK_N
        next_key_step = tl.load(KEY_STEP + first + after, mask=after < last, other=0.0)
        next_value_step = tl.load(VALUE_STEP + first + after, mask=after < last, other=0.0)
        products = tl.zeros([WARPS, N, BLOCK_M * PIECES], tl.int32)
        products = multiply(products, queries, keys, nn, valid, splits, STRIDE, KEY_D, KEY_HIGH, KEY_LOW, COLUMNS)
        if GRADED:
            products = multiply(
                products, rough, keys + BEHIND, nn, valid, splits, STRIDE, KEY_D, ROUGH_HIGH, ROUGH_LOW, ROUGH_COLUMNS
            )  # fmt: skip
        powers = whole(products, PIECES) - zero[None, None, :]
        powers = powers * (key_step.to(tl.float32)[:, :, None] * unit[None, None, :]) + shift[None, None, :]
        powers = tl.where(valid[:, :, None], powers, float("-inf"))
        # In units in which the largest weight times its step is from half to twice 2**RAISED.
        step = value_step.to(tl.float32)
        exponent = tl.maximum(step, LEAST_STEP).to(tl.int32, bitcast=True) >> 23
        sized = powers + (exponent - 127).to(tl.float32)[:, :, None]
        new = tl.maximum(top, tl.max(sized, 1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        least = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - least)
        top = new
        weights = tl.exp2(powers - (least - RAISED)[:, None, :])
        # Added up over the tokens of a tile at the end.
        total = total * fade[:, None, :] + weights
        weights = weights * step[:, :, None]
        halves = weights.to(tl.float16)
        if WEIGHTS == 2:
            halves = tl.join(halves, (weights - halves.to(tl.float32)).to(tl.float16))
            halves = tl.reshape(halves, [WARPS, N, BLOCK_M * 2])
            fade = tl.reshape(tl.join(fade, fade), [WARPS, BLOCK_M * 2])
        places = values + nn[:, None, :] * VALUE_STRIDE
        high, low = words_of(
            KEYS, places, valid[:, None, :], splits, VALUE_HIGH, VALUE_LOW, SIZE, ROWS, WORD, 1
        )  # fmt: skip
        sums = ()
        for slot in tl.static_range(SLOTS):
            levels = halves_of(
                high,
                low,
                VALUE_HIGH,
                VALUE_LOW,
                VALUE_HIGH * COPIES * slot,
                low_bit(COPIES * slot, VALUE_HIGH, VALUE_LOW),
            )
            # Added up in float32, not by tensor cores, which cut digits off.
            sums = sums + (
                tl.fma(accs[slot], tl.broadcast_to(fade[:, None, :], accs[slot].shape), tl.dot(levels, halves)),
            )
        accs = sums
        if SCORED:
            tl.store(
                LOGITS + (head * rows + rr[None, None, :]) * slots + nn[:, :, None],
                powers * 0.6931471805599453,
                mask=rm[None, None, :] & (nn < end)[:, :, None],
            )
        key_step, value_step = next_key_step, next_value_step
    # The states of all warps.
    new = tl.max(top, 0)
    least = tl.where(new == float("-inf"), 0.0, new)
    fade = tl.exp2(top - least[None, :])
    total = tl.sum(tl.sum(total, 1) * fade, 0)
    tiles = ()
    for slot in tl.static_range(SLOTS):
        acc = tl.sum(tl.reshape(accs[slot], [WARPS, ROWS, BLOCK_M, WEIGHTS]), 3)
        acc = tl.trans(tl.sum(acc * fade[:, None, :], 0))
        tiles = tiles + (acc / size_of(VALUE_HIGH * COPIES * slot, VALUE_HIGH, VALUE_LOW),)
    acc = side_by_side(tiles)
    vv = tl.arange(0, BLOCK_V)
    slot = vv % (SIZE * VALUE_W) % VALUE_W * (8 // VALUE_HIGH) + vv // (SIZE * VALUE_W)
    row = slot % COPIES * SIZE + vv % (SIZE * VALUE_W) // VALUE_W
    place = tl.where(vv < DV, row * SLOTS + slot // COPIES, 0)
    acc = tl.gather(acc, tl.broadcast_to(place[None, :], [BLOCK_M, BLOCK_V]), 1)
    spread = tl.load(SPREAD + head * DV + vv, mask=vv < DV, other=0.0)
    return new - RAISED, total, acc * spread.to(tl.float32)[None, :]


@triton.jit
def side_by_side(tiles):
    """Tiles as one whose rows have a number of the first, one of the second and so on, then the next of the first."""
    for _ in tl.static_range(5):
        if len(tiles) > 1:
            pairs = ()
            for i in tl.static_range(len(tiles) // 2):
                both = tl.join(tiles[i], tiles[i + len(tiles) // 2])
                pairs = pairs + (tl.reshape(both, [both.shape[0], both.shape[1] * 2]),)
            tiles = pairs
    return tiles[0]
