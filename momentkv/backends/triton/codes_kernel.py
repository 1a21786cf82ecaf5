"""Triton: attention to records, codes of few bits that are unpacked in registers and never decoded.

The affine map of a channel moves into the query and out of the output, the step of a token into its logit and its
weight; see `momentkv.codes.attention`. What remains are products with whole numbers, which halves hold exactly.

Two codes are made at once, in the halves of a word: their bits become digits behind a one. So levels are codes and what
stands in front of them. It is taken off products, not off levels: off those with keys by the sum of the query's
components, off those with values by the sum of a tile's weights, both as they were rounded.

Byte ``j`` of a plane holds the channels ``j, m + j, 2 m + j, ...``. Planes are read as words of W bytes. A thread
unpacks a word of the narrowest plane, and those of the wider one that hold the same channels, and leaves the codes side
by side, as *places*: place ``x`` holds channel ``e // W * WIDE + x // E * W + in_word(e % W)`` with ``e = x % E``,
where a word of the narrowest plane, which has WIDE bytes, holds E codes. Nothing moves between threads; the query is
read in that order, and the output put back into its own.

Where channels of keys are graded, a record holds the finer half of them, then the coarser one, as two such records of
half the channels. The query is read in two parts, in the order of its head, and products of both are added up.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_codes"]


@triton.constexpr_function
def paired(high, low, width, dtype):
    """Whether codes are made two at once: in halves, which have digits enough for them behind a one in front."""
    return width == 4 and high + low <= {"fp16": 10, "bf16": 7, "fp32": 0}[str(dtype)]


@triton.constexpr_function
def front_of(high, low, dtype):
    """Of such halves the digit that the ones of codes become, their bits without a code, and what these stand for.

    A code ends where its byte does, or where the digits of a bfloat16 begin.
    """
    digits, one = {"fp16": (10, 0x3C00), "bf16": (7, 0x3F80)}[str(dtype)]
    digit = min(8, digits) - high - low
    return digit, one + ((digits - digit) << digits), 2.0 ** (digits - digit)


@triton.constexpr_function
def kept(high, low, width, dtype):
    """What levels have more than codes less their centre."""
    return front_of(high, low, dtype)[2] + 2.0 ** (high + low - 1) - 0.5 if paired(high, low, width, dtype) else 0.0


@triton.constexpr_function
def each_byte(bits):
    """A word of four such bytes, as a signed number."""
    return bits * 0x01010101 - (bits >> 7 << 32)


@triton.constexpr_function
def place_of(e, high, low, width):
    """Where code ``e`` of words of so many bytes begins: its bit in the wider plane's, and in the narrower one's."""
    least = low if low > 0 else high
    # Of four bytes, those that are two apart follow each other: they are in different halves.
    byte, place = e % width // 2 + e % 2 * 2 if width == 4 else e % width, e // width
    return 8 * byte + high * (place // (high // least)), 8 * byte + low * place


@triton.constexpr_function
def shift_of(e, high, low, width):
    """By how much the wider plane's word is shifted right for code ``e``, which becomes a float32: mostly nothing.

    So that the ones of the code are none but the last of its 23 digits, for its centre has a half.
    """
    at = place_of(e, high, low, width)[0]
    if at <= low:
        return -8
    if at + high <= 23:
        return 0
    return 8 if at <= 16 + low else 16


@triton.constexpr_function
def ones_of(e, high, low, width):
    """The bit at which the ones of code ``e`` then are."""
    return place_of(e, high, low, width)[0] - shift_of(e, high, low, width) - low


@triton.constexpr_function
def offset_of(e, high, low, width):
    """What such a float32 has more than code ``e`` less its centre."""
    return 2.0 ** (23 - ones_of(e, high, low, width)) + 2.0 ** (high + low - 1) - 0.5


@triton.jit
def moved(word, right: tl.constexpr):
    """Shifted to the right, or to the left."""
    if right > 0:
        word = word >> right
    if right < 0:
        word = word << -right
    return word


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


@triton.jit
def pairs_of(tiles, one, dtype: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr):
    """Halves in front of whose digits a one stands, side by side, of words of four bytes."""
    LEAST: tl.constexpr = LOW if LOW > 0 else HIGH
    PARTS: tl.constexpr = HIGH // LEAST
    DIGIT: tl.constexpr = front_of(HIGH, LOW, dtype)[0]
    WIDER: tl.constexpr = each_byte((2**HIGH - 1) << (DIGIT + LOW))
    CODE: tl.constexpr = ((2 ** (HIGH + LOW) - 1) << DIGIT) * 65537
    FRONT: tl.constexpr = front_of(HIGH, LOW, dtype)[1] * 65537
    pairs = ()
    for place in tl.static_range(8 // LEAST):
        if LOW > 0:
            # Of both planes, one beneath the other in each byte.
            less = moved(tiles[PARTS], LOW * place - DIGIT)
            more = moved(tiles[place % PARTS], HIGH * (place // PARTS) - DIGIT - LOW)
            word = (more & (one * WIDER)) | (less & ~(one * WIDER))
            two, others = word, word >> 8
        else:
            two, others = moved(tiles[0], HIGH * place - DIGIT), moved(tiles[0], HIGH * place - DIGIT + 8)
        pairs = pairs + ((two & CODE) | (one * FRONT), (others & CODE) | (one * FRONT))
    halves = side_by_side(pairs)
    halves = side_by_side((halves.to(tl.int16), (halves >> 16).to(tl.int16)))
    # The sum of one number is nothing to a device. But behind a join the compiler plans for operands of half the width,
    # which matrices are not loaded for; and it does not look behind a sum.
    halves = tl.sum(tl.reshape(halves, [halves.shape[0], halves.shape[1], 1]), 2, dtype=tl.int16)
    return halves.to(dtype, bitcast=True)


@triton.jit
def singles_of(tiles, one, dtype: tl.constexpr, HIGH: tl.constexpr, LOW: tl.constexpr, W: tl.constexpr):
    """Codes less their centre, side by side, each by a float32."""
    LEAST: tl.constexpr = LOW if LOW > 0 else HIGH
    PARTS: tl.constexpr = HIGH // LEAST
    levels = ()
    for e in tl.static_range(8 // LEAST * W):
        code = moved(tiles[e // W % PARTS], shift_of(e, HIGH, LOW, W))
        code = code & ((2**HIGH - 1) << (ones_of(e, HIGH, LOW, W) + LOW))
        if LOW > 0:
            less = moved(tiles[PARTS], place_of(e, HIGH, LOW, W)[1] - ones_of(e, HIGH, LOW, W))
            code = code | (less & ((2**LOW - 1) << ones_of(e, HIGH, LOW, W)))
        code = code | (one * ((150 - ones_of(e, HIGH, LOW, W)) << 23))
        level = code.to(tl.float32, bitcast=True) - offset_of(e, HIGH, LOW, W)
        levels = levels + (level.to(dtype),)
    return side_by_side(levels)


@triton.jit
def levels_of(
    records,
    at,
    valid,
    one,
    dtype: tl.constexpr,
    D: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    W: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes less their centre and plus what is `kept`, place by place, of the tokens ``at``.

    HIGH + LOW bits of D channels in two planes, or in one, at every STRIDE-th word. The bits of a code become digits of
    a number; nothing is converted from an integer. ``one`` is 1, which only the device knows: of two constants, the
    assembler makes an instruction each.
    """
    LEAST: tl.constexpr = LOW if LOW > 0 else HIGH
    WORDS: tl.constexpr = D * LEAST // 8 // W
    ww = tl.arange(0, BLOCK // (8 // LEAST * W))
    places = records + at[:, None] * STRIDE + ww[None, :]
    there = valid[:, None] & (ww < WORDS)[None, :]
    # The wider plane in parts as wide as the narrower one, which lies behind it.
    tiles = ()
    for part in tl.static_range(HIGH // LEAST + (LOW > 0)):
        tiles = tiles + (tl.load(places + part * WORDS, mask=there, other=0).to(tl.int32),)
    if paired(HIGH, LOW, W, dtype):
        return pairs_of(tiles, one, dtype, HIGH, LOW)
    else:
        return singles_of(tiles, one, dtype, HIGH, LOW, W)


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    """``a b + c``; of eight columns as it is, of more by the transposes, of which no side is 64.

    For such sides the compiler would take instructions that several warps wait for.
    """
    if b.shape[1] > 8:
        return tl.trans(tl.dot(tl.trans(b), tl.trans(a), tl.trans(c), input_precision=PRECISION))
    else:
        return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def query_of(
    Q,
    MEAN,
    DEVIATION,
    ORDER,
    head,
    rr,
    rm,
    rows,
    scale,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    LEAST: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scaled queries times deviations, place by place, of so many channels of a record; and their products with means.

    Queries are columns.
    """
    E: tl.constexpr = 8 // LEAST * W
    xx = tl.arange(0, BLOCK)
    byte = in_word(xx % W, W)
    dd = xx % E // W * (CHANNELS * LEAST // 8) + xx // E * W + byte
    dm = xx // E * W < CHANNELS * LEAST // 8
    if ORDER is not None:
        dd = tl.load(ORDER + head * D + FIRST + dd, mask=dm, other=0).to(tl.int32)
    q = tl.load(Q + (head * rows + rr[None, :]) * D + dd[:, None], mask=rm[None, :] & dm[:, None], other=0.0)
    q = q.to(tl.float32) * scale
    shift = tl.zeros([q.shape[1]], tl.float32)
    if MEAN is not None:
        mean = tl.load(MEAN + head * D + dd, mask=dm, other=0.0)
        shift = tl.sum(q * mean.to(tl.float32)[:, None], 0)
    deviation = tl.load(DEVIATION + head * D + dd, mask=dm, other=0.0)
    return q * deviation.to(tl.float32)[:, None], shift


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
    one,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    ROUGH_HIGH: tl.constexpr,
    ROUGH_LOW: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    KEY_W: tl.constexpr,
    VALUE_W: tl.constexpr,
    SCORED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """State of the queries ``rr`` over the tokens ``begin`` to ``end`` of a head, of which the first ``count`` exist.

    The head's tokens begin at ``first``; ``slots`` logits of a query are stored one after the other. Matrices lie the
    other way round than elsewhere: queries, of which there may be eight only, are columns.
    """
    dtype: tl.constexpr = Q.dtype.element_ty
    # In its own units a query fits into float16, which has more digits than bfloat16.
    query_dtype: tl.constexpr = tl.float32 if dtype == tl.float32 else tl.float16
    # Of the first KEY_D channels of a record, and where these are the finer half, of the others.
    GRADED: tl.constexpr = ROUGH_HIGH > 0
    KEY_D: tl.constexpr = D // 2 if GRADED else D
    BLOCK_K: tl.constexpr = max(16, BLOCK_D // 2) if GRADED else BLOCK_D
    LEAST_FINE: tl.constexpr = KEY_LOW if KEY_LOW > 0 else KEY_HIGH
    LEAST_ROUGH: tl.constexpr = ROUGH_LOW if ROUGH_LOW > 0 else ROUGH_HIGH
    BEHIND: tl.constexpr = KEY_D * (KEY_HIGH + KEY_LOW) // 8 // KEY_W
    STRIDE: tl.constexpr = BEHIND + KEY_D * (ROUGH_HIGH + ROUGH_LOW) // 8 // KEY_W
    VALUE_STRIDE: tl.constexpr = DV * (VALUE_HIGH + VALUE_LOW) // 8 // VALUE_W
    q, shift = query_of(
        Q, MEAN, DEVIATION, ORDER, head, rr, rm, rows, scale, D, 0, KEY_D, LEAST_FINE, KEY_W, BLOCK_K
    )  # fmt: skip
    largest = tl.max(tl.abs(q), 0)
    rough = q
    if GRADED:
        rough, others = query_of(
            Q, MEAN, DEVIATION, ORDER, head, rr, rm, rows, scale, D, KEY_D, KEY_D, LEAST_ROUGH, KEY_W, BLOCK_K
        )  # fmt: skip
        shift += others
        largest = tl.maximum(largest, tl.max(tl.abs(rough), 0))
    # In units of the power of two below its largest, so that halves neither overflow nor lose digits.
    unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit > 0.0, unit, 1.0)
    q = (q / unit[None, :]).to(query_dtype)
    KEPT: tl.constexpr = kept(KEY_HIGH, KEY_LOW, KEY_W, query_dtype)
    zero = tl.sum(q.to(tl.float32), 0) * -KEPT
    if GRADED:
        rough = (rough / unit[None, :]).to(query_dtype)
        zero -= tl.sum(rough.to(tl.float32), 0) * kept(ROUGH_HIGH, ROUGH_LOW, KEY_W, query_dtype)
    # To base 2.
    unit *= 1.4426950408889634
    shift *= 1.4426950408889634

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
    # Offsets in 64 bits: a packed cache of many heads has more than 2**31 bytes.
    keys = KEYS + first * STRIDE
    values = VALUES + first * VALUE_STRIDE
    nn = begin + tl.arange(0, BLOCK_N)
    last = tl.minimum(count, end)
    # Steps are read a tile ahead: two bytes a thread are too few for a copy that does not wait.
    key_step = tl.load(KEY_STEP + first + nn, mask=nn < last, other=0.0)
    value_step = tl.load(VALUE_STEP + first + nn, mask=nn < last, other=0.0)
    for start in range(begin, end, BLOCK_N):
        nn = start + tl.arange(0, BLOCK_N)
        valid = nn < last
        levels = levels_of(keys, nn, valid, one, query_dtype, KEY_D, KEY_HIGH, KEY_LOW, KEY_W, STRIDE, BLOCK_K)
        products = product(levels, q, tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
        if GRADED:
            levels = levels_of(
                keys + BEHIND, nn, valid, one, query_dtype, KEY_D, ROUGH_HIGH, ROUGH_LOW, KEY_W, STRIDE, BLOCK_K
            )
            products = product(levels, rough, products, PRECISION)
        if KEPT > 0.0:
            products += zero[None, :]
        powers = products * (key_step.to(tl.float32)[:, None] * unit[None, :]) + shift[None, :]
        powers = tl.where(valid[:, None], powers, float("-inf"))
        new = tl.maximum(top, tl.max(powers, 0))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        least = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - least)
        top = new
        weights = tl.exp2(powers - least[None, :])
        # Added up over the tokens of a tile at the end.
        total = total * fade[None, :] + weights
        weights = (weights * value_step.to(tl.float32)[:, None]).to(dtype)
        levels = levels_of(values, nn, valid, one, dtype, DV, VALUE_HIGH, VALUE_LOW, VALUE_W, VALUE_STRIDE, BLOCK_V)
        acc *= fade[None, :]
        if kept(VALUE_HIGH, VALUE_LOW, VALUE_W, dtype) > 0.0:
            # Tile by tile, for what is left grows with the tokens.
            rest: tl.constexpr = kept(VALUE_HIGH, VALUE_LOW, VALUE_W, dtype)
            acc -= (tl.sum(weights.to(tl.float32), 0) * rest)[None, :]
        acc = product(tl.trans(levels), weights, acc, PRECISION)
        if SCORED:
            tl.store(
                LOGITS + (head * rows + rr[None, :]) * slots + nn[:, None],
                powers * 0.6931471805599453,
                mask=rm[None, :] & (nn < end)[:, None],
            )
        after = nn + BLOCK_N
        key_step = tl.load(KEY_STEP + first + after, mask=after < last, other=0.0)
        value_step = tl.load(VALUE_STEP + first + after, mask=after < last, other=0.0)
    LEAST: tl.constexpr = VALUE_LOW if VALUE_LOW > 0 else VALUE_HIGH
    WIDE: tl.constexpr = DV * LEAST // 8
    vv = tl.arange(0, BLOCK_V)
    acc = tl.trans(acc)
    if LEAST < 8 or VALUE_W == 4:
        place = vv % WIDE // VALUE_W * (8 // LEAST * VALUE_W) + vv // WIDE * VALUE_W
        place = tl.where(vv < DV, place + in_word(vv % WIDE % VALUE_W, VALUE_W), 0)
        acc = tl.gather(acc, tl.broadcast_to(place[None, :], [BLOCK_M, BLOCK_V]), 1)
    spread = tl.load(SPREAD + head * DV + vv, mask=vv < DV, other=0.0)
    return top, tl.sum(total, 0), acc * spread.to(tl.float32)[None, :]


@triton.jit
def in_word(place, W: tl.constexpr):
    """The byte of a word whose codes are so many places from the first, and the place of those of a byte."""
    if W == 4:
        place = place // 2 + place % 2 * 2
    return place
