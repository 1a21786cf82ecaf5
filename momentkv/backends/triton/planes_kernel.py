"""Triton: words of packed codes, as they lie in records, and the codes in them, as operands of a tensor core.

A byte of a plane holds the channels ``j, m + j, 2 m + j, ...`` with ``m`` bytes a plane. A tile has a column for each
word of the wider plane, or as many as a product takes, where several columns hold the same word, from different bits
on. One product is of all columns at one of their bits, a *slot* of them.

A register holds four bytes, or two words of 16 bits, and instructions treat them together. The interpreter knows none
of these instructions: there the same is computed number by number.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

__all__ = ["bytes_of", "copies", "halves_of", "low_bit", "size_of", "words_of"]

PACKED = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")


@triton.constexpr_function
def copies(size, high, columns, width):
    """How many columns hold the same word of a plane, each from other bits on; there are ``size`` words."""
    return min(columns // size, width // high) if columns % size == 0 else 1


@triton.constexpr_function
def low_bit(slot, high, low):
    """Where in a word of the narrower plane the bits of a slot of the wider one's begin."""
    return high * slot // 8 * 8 + high * (slot % (8 // high)) if low else 0


@triton.constexpr_function
def place_of(bit, high, low):
    """By how much a word is shifted right so that its code is among the digits of a float16; and the digit it is at.

    At least one, for the centre of codes has a half.
    """
    for right in (0, 8):
        if bit - right > low and bit - right + high <= 10:
            return right, bit - right - low
    return bit - low - 1, 1


@triton.constexpr_function
def size_of(bit, high, low):
    """What one step of such a code is worth in that float16."""
    return 2.0 ** place_of(bit, high, low)[1]


@triton.constexpr_function
def moved(name, right):
    """Instruction that shifts a word to the right, or to the left."""
    return f"shr.u32 {name}, {name}, {right};" if right > 0 else f"shl.b32 {name}, {name}, {-right};" if right else ""


@triton.constexpr_function
def byte_instructions(high, low, high_at, low_at):
    """Four codes of a word of each plane, as signed bytes."""
    wider, narrower = (2**high - 1 << low) * 0x01010101, (2**low - 1) * 0x01010101
    text = f".reg .b32 t, u; mov.b32 t, $1; {moved('t', high_at - low)} and.b32 t, t, {wider};"
    if low:
        text += f"mov.b32 u, $2; {moved('u', low_at)} and.b32 u, u, {narrower}; or.b32 t, t, u;"
    if high + low == 8:
        text += f"xor.b32 t, t, {0x80808080};"
    return f"{{ {text} mov.b32 $0, t; }}"


@triton.constexpr_function
def half_instructions(high, low, high_at, low_at):
    """Two codes of a word of each plane, less their centre, times two to the power of their digit, as float16."""
    right, digit = place_of(high_at, high, low)
    wider, narrower = (2**high - 1 << digit + low) * 0x10001, (2**low - 1 << digit) * 0x10001
    front, less = 0x6400 * 0x10001, (0x6400 + (2 ** (high + low) - 1 << digit) // 2) * 0x10001
    # Of three words lop3 with 0xEA makes (first and second) or third.
    text = f".reg .b32 t, u, v; mov.b32 t, $1; {moved('t', right)} mov.b32 v, {front}; lop3.b32 t, t, {wider}, v, 0xEA;"
    if low:
        text += f"mov.b32 u, $2; {moved('u', low_at - digit)} lop3.b32 t, u, {narrower}, t, 0xEA;"
    return f"{{ {text} mov.b32 v, {less}; sub.f16x2 $0, t, v; }}"


@triton.jit
def shifted(words, by, EACH: tl.constexpr, TOGETHER: tl.constexpr):
    """Words to the right, EACH of them in a register, where bits of one get into the next.

    TOGETHER, as the numbers are the same for all that share a register; else one by one.
    """
    if PACKED and TOGETHER and EACH == 4:
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, $2;", "=r,r,r,r,r,r", [words, by], dtype=words.dtype, is_pure=True, pack=4
        )
    elif PACKED and TOGETHER:
        return tl.inline_asm_elementwise(
            "shr.u32 $0, $1, $2;", "=r,r,r,r", [words, by], dtype=words.dtype, is_pure=True, pack=2
        )
    else:
        return ((words.to(tl.int32) & (2 ** (32 // EACH) - 1)) >> by).to(words.dtype)


@triton.jit
def code_of(
    high,
    low,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH_AT: tl.constexpr,
    LOW_AT: tl.constexpr,
):
    """Codes whose bits begin there in the words of both planes, as int32."""
    code = ((high.to(tl.int32) >> HIGH_AT) & (2**HIGH - 1)) << LOW
    if LOW > 0:
        code = code | ((low.to(tl.int32) >> LOW_AT) & (2**LOW - 1))
    return code


@triton.jit
def bytes_of(
    high,
    low,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH_AT: tl.constexpr,
    LOW_AT: tl.constexpr,
):
    """Such codes as int8; of eight bits, less 128."""
    if PACKED:
        return tl.inline_asm_elementwise(
            byte_instructions(HIGH, LOW, HIGH_AT, LOW_AT), "=r,r,r", [high, low], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return (code_of(high, low, HIGH, LOW, HIGH_AT, LOW_AT) - (128 if HIGH + LOW == 8 else 0)).to(tl.int8)


@triton.jit
def halves_of(
    high,
    low,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    HIGH_AT: tl.constexpr,
    LOW_AT: tl.constexpr,
):
    """Such codes less their centre, times two to the power of their digit, as float16."""
    if PACKED:
        return tl.inline_asm_elementwise(
            half_instructions(HIGH, LOW, HIGH_AT, LOW_AT), "=r,r,r", [high, low], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        code = code_of(high, low, HIGH, LOW, HIGH_AT, LOW_AT).to(tl.float32)
        return ((code - (2.0 ** (HIGH + LOW - 1) - 0.5)) * size_of(HIGH_AT, HIGH, LOW)).to(tl.float16)


@triton.jit
def given(POINTER, splits, numbers):
    """Such numbers, of int32, as if they had been read.

    The compiler does what follows a load in the registers of a tensor core's operand, but only where all that it needs
    is loaded. That nothing is, it does not know.
    """
    place = tl.arange(0, numbers.shape[0])
    return tl.load(POINTER.to(tl.pointer_type(tl.int32)) + place, mask=place < -splits, other=numbers)


@triton.jit
def across(places, valid, SIZE: tl.constexpr, WIDTH: tl.constexpr, COPIES: tl.constexpr, AXIS: tl.constexpr):
    """The SIZE words of a plane along an axis of a tile, over and over up to WIDTH.

    Where WIDTH is a multiple of SIZE, each is read once, and registers are copied. Queries, or places of the output,
    leave out what is beyond COPIES.
    """
    ONCE: tl.constexpr = SIZE if WIDTH % SIZE == 0 else WIDTH
    place = tl.arange(0, ONCE)
    there = place < COPIES * SIZE
    word = place % SIZE
    W: tl.constexpr = places.shape[0]
    if AXIS == 2:
        N: tl.constexpr = places.shape[1]
        words = tl.load(places + word[None, None, :], mask=valid & there[None, None, :], other=0)
        if ONCE < WIDTH:
            words = tl.broadcast_to(words[:, :, None, :], [W, N, WIDTH // ONCE, ONCE])
            words = tl.reshape(words, [W, N, WIDTH])
    else:
        N: tl.constexpr = places.shape[2]
        words = tl.load(places + word[None, :, None], mask=valid & there[None, :, None], other=0)
        if ONCE < WIDTH:
            words = tl.broadcast_to(words[:, None, :, :], [W, WIDTH // ONCE, ONCE, N])
            words = tl.reshape(words, [W, WIDTH, N])
    return words


@triton.jit
def words_of(
    POINTER,
    places,
    valid,
    splits,
    HIGH: tl.constexpr,
    LOW: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WORD: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Words of WORD bits of both planes along an axis of a tile, shifted so that the same slot of all is at one bit.

    The wider plane has SIZE words at ``places``, and the narrower one, if there is one, is behind it.
    """
    COPIES: tl.constexpr = copies(SIZE, HIGH, WIDTH, WORD)
    LESS: tl.constexpr = SIZE * LOW // HIGH if LOW > 0 else SIZE
    RATIO: tl.constexpr = SIZE // LESS
    # Columns that share a register, which holds four bytes; along the other axis, all words of a register share a row.
    EACH: tl.constexpr = 4 if AXIS == 2 else 2
    TOGETHER: tl.constexpr = AXIS == 1 or LESS % 4 == 0
    SHARED: tl.constexpr = 4 if AXIS == 2 and TOGETHER else 1
    place = given(POINTER, splits, tl.arange(0, WIDTH) // SHARED * SHARED)
    place = place[None, None, :] if AXIS == 2 else place[None, :, None]
    high = across(places, valid, SIZE, WIDTH, COPIES, AXIS)
    if AXIS == 1:
        high = high.to(tl.int16)
    if COPIES > 1:
        high = shifted(high, place // SIZE * HIGH, EACH, TOGETHER)
    low = high
    if LOW > 0:
        low = across(places + SIZE, valid, LESS, WIDTH, COPIES * RATIO, AXIS)
        if AXIS == 1:
            low = low.to(tl.int16)
        if COPIES * RATIO > 1:
            slot = place // SIZE
            by = slot * HIGH // 8 * 8 + (slot % (8 // HIGH) * RATIO + place % SIZE // LESS) * LOW
            low = shifted(low, by, EACH, TOGETHER)
    return high, low
