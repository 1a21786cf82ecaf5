"""Triton: attention to records, codes of few bits that are unpacked in registers and never decoded.

The affine map of a channel moves into the query and out of the output, the step of a token into its logit and its
weight; see `momentkv.codes.attention`. What remains are products with whole numbers and a half, which halves hold
exactly.

Byte ``j`` of a plane holds the channels ``j, m + j, 2 m + j, ...``. Planes are read as words of W bytes. A thread
unpacks a word of the narrowest plane, and those of the wider one that hold the same channels, and leaves the codes side
by side, as *places*: place ``x`` holds channel ``e // W * WIDE + x // E * W + e % W`` with ``e = x % E``, where a word
of the narrowest plane, which has WIDE bytes, holds E codes. Nothing moves between threads; the query is read in that
order, and the output put back into its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from momentkv.backends.triton.online_kernel import online

__all__ = ["attend_codes"]


@triton.constexpr_function
def place_of(e, high, low, width):
    """Where code ``e`` of words of so many bytes begins: its bit in the wider plane's, and in the narrower one's."""
    least = low if low > 0 else high
    byte, place = e % width, e // width
    return 8 * byte + high * (place // (high // least)), 8 * byte + low * place


@triton.constexpr_function
def shift_of(e, high, low, width):
    """By how much the wider plane's word is shifted right for code ``e``: mostly nothing.

    So that the ones of the code are none but the last of the 23 digits of a float32, for its centre has a half.
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
def levels_of(
    records,
    at,
    valid,
    one,
    dtype,
    D: tl.constexpr,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes less their centre, place by place, of the tokens ``at``; HIGH + LOW bits in two planes, or in one.

    The bits of a code become digits of a float32 between 2**e and 2**(e + 1), where its ones are: nothing is converted,
    and few codes are shifted. ``one`` is 1, which only the device knows: of two constants, the assembler makes an
    instruction each.
    """
    LEAST: tl.constexpr = LOW if LOW > 0 else HIGH
    WORDS: tl.constexpr = D * LEAST // 8 // W
    E: tl.constexpr = 8 // LEAST * W
    PARTS: tl.constexpr = HIGH // LEAST
    ww = tl.arange(0, BLOCK // E)
    places = records + at[:, None] * (D * (HIGH + LOW) // 8 // W) + ww[None, :]
    there = valid[:, None] & (ww < WORDS)[None, :]
    # The wider plane in parts as wide as the narrower one, which lies behind it.
    tiles = ()
    for part in tl.static_range(PARTS + (LOW > 0)):
        tiles = tiles + (tl.load(places + part * WORDS, mask=there, other=0).to(tl.int32),)
    levels = ()
    for e in tl.static_range(E):
        code = tiles[e // W % PARTS]
        if shift_of(e, HIGH, LOW, W) > 0:
            code = code >> shift_of(e, HIGH, LOW, W)
        if shift_of(e, HIGH, LOW, W) < 0:
            code = code << -shift_of(e, HIGH, LOW, W)
        code = code & ((2**HIGH - 1) << (ones_of(e, HIGH, LOW, W) + LOW))
        if LOW > 0:
            less = tiles[PARTS]
            if place_of(e, HIGH, LOW, W)[1] > ones_of(e, HIGH, LOW, W):
                less = less >> (place_of(e, HIGH, LOW, W)[1] - ones_of(e, HIGH, LOW, W))
            if place_of(e, HIGH, LOW, W)[1] < ones_of(e, HIGH, LOW, W):
                less = less << (ones_of(e, HIGH, LOW, W) - place_of(e, HIGH, LOW, W)[1])
            code = code | (less & ((2**LOW - 1) << ones_of(e, HIGH, LOW, W)))
        code = code | (one * ((150 - ones_of(e, HIGH, LOW, W)) << 23))
        level = code.to(tl.float32, bitcast=True) - offset_of(e, HIGH, LOW, W)
        levels = levels + (level.to(dtype),)
    for step in tl.static_range(5):
        if 2**step < E:
            pairs = ()
            for i in tl.static_range(E // 2 ** (step + 1)):
                both = tl.join(levels[i], levels[i + E // 2 ** (step + 1)])
                pairs = pairs + (tl.reshape(both, [both.shape[0], both.shape[1] * 2]),)
            levels = pairs
    return levels[0]


@triton.jit
def attend_codes(
    Q,
    KEYS,
    VALUES,
    KEY_STEP,
    VALUE_STEP,
    MEAN,
    DEVIATION,
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
    VALUE_HIGH: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    KEY_W: tl.constexpr,
    VALUE_W: tl.constexpr,
    SCORED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """State of the queries ``rr`` over the tokens ``begin`` to ``end`` of a head, of which the first ``count`` exist.

    The head's tokens begin at ``first``; ``slots`` logits of a query are stored one after the other.
    """
    dtype: tl.constexpr = Q.dtype.element_ty
    KEY_LEAST: tl.constexpr = KEY_LOW if KEY_LOW > 0 else KEY_HIGH
    E: tl.constexpr = 8 // KEY_LEAST * KEY_W
    xx = tl.arange(0, BLOCK_D)
    dd = xx % E // KEY_W * (D * KEY_LEAST // 8) + xx // E * KEY_W + xx % KEY_W
    dm = xx // E * KEY_W < D * KEY_LEAST // 8
    q = tl.load(Q + (head * rows + rr[:, None]) * D + dd[None, :], mask=rm[:, None] & dm[None, :], other=0.0)
    q = q.to(tl.float32) * scale
    shift = tl.zeros([BLOCK_M], tl.float32)
    if MEAN is not None:
        mean = tl.load(MEAN + head * D + dd, mask=dm, other=0.0)
        shift = tl.sum(q * mean.to(tl.float32)[None, :], 1)
    deviation = tl.load(DEVIATION + head * D + dd, mask=dm, other=0.0)
    q *= deviation.to(tl.float32)[None, :]
    # In units of the power of two below its largest, so that halves neither overflow nor lose digits.
    unit = (tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.where(unit > 0.0, unit, 1.0)
    q = (q / unit[:, None]).to(dtype)

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    # Offsets in 64 bits: a packed cache of many heads has more than 2**31 bytes.
    keys = KEYS + first * (D * (KEY_HIGH + KEY_LOW) // 8 // KEY_W)
    values = VALUES + first * (DV * (VALUE_HIGH + VALUE_LOW) // 8 // VALUE_W)
    nn = begin + tl.arange(0, BLOCK_N)
    last = tl.minimum(count, end)
    # Steps are read a tile ahead: two bytes a thread are too few for a copy that does not wait.
    key_step = tl.load(KEY_STEP + first + nn, mask=nn < last, other=0.0)
    value_step = tl.load(VALUE_STEP + first + nn, mask=nn < last, other=0.0)
    for start in range(begin, end, BLOCK_N):
        nn = start + tl.arange(0, BLOCK_N)
        valid = nn < last
        levels = levels_of(keys, nn, valid, one, dtype, D, KEY_HIGH, KEY_LOW, KEY_W, BLOCK_D)
        logits = tl.dot(q, tl.trans(levels), input_precision=PRECISION)
        logits = logits * (key_step.to(tl.float32)[None, :] * unit[:, None]) + shift[:, None]
        logits = tl.where(valid[None, :], logits, float("-inf"))
        top, fade, weights, total = online(logits, top, total)
        weights = (weights * value_step.to(tl.float32)[None, :]).to(dtype)
        levels = levels_of(values, nn, valid, one, dtype, DV, VALUE_HIGH, VALUE_LOW, VALUE_W, BLOCK_V)
        acc = tl.dot(weights, levels, acc * fade[:, None], input_precision=PRECISION)
        if SCORED:
            tl.store(
                LOGITS + (head * rows + rr[:, None]) * slots + nn[None, :],
                logits,
                mask=rm[:, None] & (nn < end)[None, :],
            )
        after = nn + BLOCK_N
        key_step = tl.load(KEY_STEP + first + after, mask=after < last, other=0.0)
        value_step = tl.load(VALUE_STEP + first + after, mask=after < last, other=0.0)
    LEAST: tl.constexpr = VALUE_LOW if VALUE_LOW > 0 else VALUE_HIGH
    WIDE: tl.constexpr = DV * LEAST // 8
    vv = tl.arange(0, BLOCK_V)
    if LEAST < 8:
        place = vv % WIDE // VALUE_W * (8 // LEAST * VALUE_W) + vv // WIDE * VALUE_W + vv % WIDE % VALUE_W
        place = tl.where(vv < DV, place, 0)
        acc = tl.gather(acc, tl.broadcast_to(place[None, :], [BLOCK_M, BLOCK_V]), 1)
    spread = tl.load(SPREAD + head * DV + vv, mask=vv < DV, other=0.0)
    return top, total, acc * spread.to(tl.float32)[None, :]
