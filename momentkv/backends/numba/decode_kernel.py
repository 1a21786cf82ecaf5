"""The kernel that decodes on a CPU: one softmax over retained tokens, recent ones, and groups of evicted ones.

Of a record's bytes, each lane of a vector takes the one that holds its channel, shifts it and masks it: three
instructions for sixteen channels of a plane. The compiler does not find this by itself, so vectors are written in
LLVM's language; loops are Numba's.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from momentkv.backends.numba.compiled import BFLOAT, compiled, signature_of
from momentkv.backends.numba.decode import LANES
from momentkv.backends.numba.llvm import BYTE, FLOAT, INT, at, fused, integers, summed
from momentkv.codes import GRADES, PLANES, centre, row_bytes

__all__ = ["kernel"]

# A step of 16 bits from here on is infinite or no number.
INFINITE = 0x7C00
# The exponents of 16 and 32 bits count from other numbers.
REBASED = (127 - 15) << 23
# Added to a number of less than 2 ** 22, it leaves the nearest whole number in the lowest bits.
ROUNDING = np.float32(1.5 * 2**23)
# Bytes that come from memory at once, and tokens that are asked for before their turn.
LINE, AHEAD = 64, 16
# Below, a weight is no normal number any more.
LEAST = np.float32(-87.0)
PER_NAT = np.float32(1 / np.log(2))
# The logarithm of two in two parts, the first of which has few digits: its whole multiples are exact.
LN2, LN2_REST = np.float32(355 / 512), np.float32(np.log(2) - 355 / 512)


def channels_of(bits, d, graded):
    """For each half of the channels: its first, their number, the centre, and the planes of their codes.

    A plane is its first byte, the number of bytes, the bits of a code in it, and the place of the lowest.
    """
    halves = tuple((each, d // 2) for each in GRADES[bits]) if graded else ((bits, d),)
    byte = first = 0
    for each, channels in halves:
        place, planes = each, []
        for width in PLANES[each]:
            place -= width
            planes.append((byte, -(-channels * width // 8), width, place))
            byte += planes[-1][1]
        yield first, channels, centre(each), planes
        first += channels


@intrinsic(prefer_literal=True)
def unpack(typing, record, levels, bits, d, graded):
    """The codes of a record, less their centre, as ``d`` numbers of 32 bits."""

    def emit(context, builder, signature, arguments):
        source, target = arguments[:2]
        found = []
        for first, channels, middle, planes in channels_of(bits.literal_value, d.literal_value, graded.literal_value):
            loaded = [
                builder.load(at(builder, source, byte, ir.VectorType(BYTE, size)), align=1)
                for byte, size, _, _ in planes
            ]
            for start in range(0, channels, LANES):
                own = range(start, min(start + LANES, channels))
                wide, code = ir.VectorType(INT, len(own)), None
                for (_, size, width, place), x in zip(planes, loaded, strict=True):
                    x = builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), integers([c % size for c in own]))
                    x = builder.lshr(builder.zext(x, wide), integers([width * (c // size) for c in own]))
                    x = builder.shl(builder.and_(x, integers([2**width - 1] * len(own))), integers([place] * len(own)))
                    code = x if code is None else builder.or_(code, x)
                level = builder.sitofp(code, ir.VectorType(FLOAT, len(own)))
                level = builder.fsub(level, ir.Constant(level.type, [ir.Constant(FLOAT, middle)] * len(own)))
                found.append((first + start, level))
        for start, level in found:
            builder.store(level, at(builder, target, 4 * start, level.type), align=4)
        return context.get_dummy_value()

    return types.void(types.voidptr, types.voidptr, bits, d, graded), emit


@intrinsic(prefer_literal=True)
def widen(typing, vector, numbers, d):
    """A vector of bfloat16 as ``d`` numbers of 32 bits, of which it is the upper half."""

    def emit(context, builder, signature, arguments):
        half, whole = (ir.VectorType(kind, LANES) for kind in (ir.IntType(16), INT))
        for start in range(0, d.literal_value, LANES):
            x = builder.zext(builder.load(at(builder, arguments[0], 2 * start, half), align=2), whole)
            x = builder.shl(x, integers([16] * LANES))
            builder.store(x, at(builder, arguments[1], 4 * start, whole), align=4)
        return context.get_dummy_value()

    return types.void(types.voidptr, types.voidptr, d), emit


@intrinsic(prefer_literal=True)
def dot(typing, x, y, d):
    """The product of two vectors of ``d`` numbers, a multiple of `LANES`."""

    def emit(context, builder, signature, arguments):
        return summed(builder, *arguments[:2], d.literal_value, lambda *each: fused(builder, *each))

    return types.float32(types.voidptr, types.voidptr, d), emit


@intrinsic(prefer_literal=True)
def add(typing, total, factor, x, d):
    """To ``d`` numbers, that many times those of ``x``."""

    def emit(context, builder, signature, arguments):
        target, factor, source = arguments[:3]
        vector = ir.VectorType(FLOAT, LANES)
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), factor, ir.Constant(INT, 0))
        factors = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), integers([0] * LANES))
        for start in range(0, d.literal_value, LANES):
            into = at(builder, target, 4 * start, vector)
            new = builder.load(at(builder, source, 4 * start, vector), align=4)
            builder.store(fused(builder, factors, new, builder.load(into, align=4)), into, align=4)
        return context.get_dummy_value()

    return types.void(types.voidptr, types.float32, types.voidptr, d), emit


@intrinsic
def address(typing, array, offset):
    """Where an array's bytes from ``offset`` on lie."""

    def emit(context, builder, signature, arguments):
        data = make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(builder.bitcast(data, BYTE.as_pointer()), [arguments[1]])

    return types.voidptr(array, types.intp), emit


@intrinsic(prefer_literal=True)
def fetch(typing, pointer, size):
    """Ask for bytes that are read soon; where there are none, nothing happens."""

    def emit(context, builder, signature, arguments):
        one = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), INT, INT, INT])
        function = cgutils.get_or_insert_function(builder.module, one, "llvm.prefetch.p0i8")
        for line in range(0, size.literal_value, LINE):
            where = builder.gep(arguments[0], [ir.Constant(INT, line)])
            builder.call(function, [where, ir.Constant(INT, 0), ir.Constant(INT, 3), ir.Constant(INT, 1)])
        return context.get_dummy_value()

    return types.void(types.voidptr, size), emit


@intrinsic
def as_float(typing, bits):
    """The number that has these 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], FLOAT
    )


@intrinsic
def as_bits(typing, x):
    """The inverse of `as_float`."""
    return types.int32(types.float32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], INT)


@njit(error_model="numpy")
def step_of(half):
    """A positive number of 16 bits; NaN for one that is infinite or none."""
    if half >= INFINITE:
        return np.float32(np.nan)
    return as_float(np.int32((np.int32(half) << 13) + REBASED))


@njit(error_model="numpy")
def exponential(x):
    """``exp`` of a number of at most 0, to rounding; of less than `LEAST`, that of `LEAST`.

    With ``x = n ln 2 + r`` the Taylor series of ``exp(r)``, of which the term in ``r ** 8`` is below 6e-9.
    """
    x = LEAST if x < LEAST else x
    shifted = x * PER_NAT + ROUNDING
    whole = shifted - ROUNDING
    rest = (x - whole * LN2) - whole * LN2_REST
    series = np.float32(1 / 5040)
    for divisor in (720, 120, 24, 6, 2, 1, 1):
        series = series * rest + np.float32(1 / divisor)
    return series * as_float(np.int32((as_bits(shifted) << 23) + (127 << 23)))


@njit
def packed(x, row, slot):
    """Where the vector or the record of a packed slot lies."""
    return address(x, row * x.strides[0] + slot * x.strides[1])


@njit
def token(x, row, head, slot):
    """Where a vector (row, head, slot) lies."""
    return address(x, row * x.strides[0] + head * x.strides[1] + slot * x.strides[2])


@njit(error_model="numpy")
def shares(logits, top):
    """Logits as weights that add up to one, and their log-sum-exp; all zero, and ``-inf``, where no token is seen.

    ``top`` is the largest logit that is a number. A slot that holds no token has a weight of 2e-38, and is not read.
    """
    if top == -np.inf and not np.isnan(logits).any():
        logits[:] = 0
        return np.float32(-np.inf)
    total = np.float64(0)  # of thousands of weights
    for t in range(logits.size):
        logits[t] = exponential(logits[t] - top)
    for t in range(logits.size):
        total += logits[t]
    for t in range(logits.size):
        logits[t] /= np.float32(total)
    return np.float32(np.log(total) + top)


def bytes_of(d, bits):
    """Of a vector or a record."""
    return row_bytes(d, bits) if bits > 0 else 2 * d if bits == BFLOAT else 4 * d


@cache
def kernel(key_bits, value_bits, d, dv, graded):
    """Attention of few queries to stored tokens and groups of evicted ones, compiled for these codes.

    Parameters
    ----------
    key_bits, value_bits : int
        Where retained tokens are vectors, 0 of 32 bits, or `BFLOAT`.
    d, dv : int
        Multiples of `LANES`.
    graded : int
        1 where channels of keys are graded; of values none are.

    Returns
    -------
    callable
        Of the arrays that `momentkv.backends.numba.decode` gives it, C-contiguous and of 32 bits, but for steps and
        records; tokens may lie apart. What there is none of has size 0. It works on the pairs of row and head from the
        first number to the second.
    """
    vector, wide = 4 * d, 4 * dv
    key_bytes, value_bytes = bytes_of(d, key_bits), bytes_of(dv, value_bits)
    coded = key_bits > 0

    @compiled(signature_of(key_bits, value_bits))
    def attend(
        q, scale, keys, values, valid, slots,
        key_step, value_step, mean, deviation, order, value_deviation,
        recent_keys, recent_values, recent_valid,
        against, into, log_weight, less_anchor, half, cap,
        out, lse, first_pair, last_pair,
    ):  # fmt: skip
        heads, rows = q.shape[1], q.shape[2]
        m, groups = recent_keys.shape[2], log_weight.shape[2]
        rank = against.shape[2] - groups
        longest = slots[:, 1].max() + m + groups
        asked, tilted = np.empty((rows, d), np.float32), np.empty((rows, d), np.float32)
        levels = np.empty(max(d, dv), np.float32)
        shift, top = np.empty(rows, np.float32), np.empty(rows, np.float32)
        logits, right = np.empty((rows, longest), np.float32), np.empty((rows, rank), np.float32)
        where = address(levels, 0)
        for pair in range(first_pair, last_pair):
            row, head = pair // heads, pair % heads
            start, width = slots[head]
            stored = width + m
            length = stored + groups
            for r in range(rows):
                shift[r], top[r] = np.float32(0), np.float32(-np.inf)
                for c in range(d):
                    asked[r, c] = scale * q[row, head, r, c]
                if coded:
                    for c in range(d):
                        shift[r] += asked[r, c] * mean[row, head, c]
                        channel = order[row, head, c] if graded else c
                        tilted[r, c] = asked[r, channel] * deviation[row, head, channel]

            # Logits of retained tokens.
            for t in range(width):
                if valid.size and not valid[row, head, t]:
                    for r in range(rows):
                        logits[r, t] = np.float32(-np.inf)
                    continue
                key = packed(keys, row, start + t)
                fetch(packed(keys, row, start + t + AHEAD), key_bytes)
                if coded:
                    unpack(key, where, key_bits, d, graded)
                    step = step_of(key_step[row, start + t])
                if key_bits == BFLOAT:
                    widen(key, where, d)
                    key = where
                for r in range(rows):
                    if coded:
                        logit = dot(address(tilted, r * vector), where, d) * step + shift[r]
                    else:
                        logit = dot(address(asked, r * vector), key, d)
                    logits[r, t] = logit
                    top[r] = logit if logit > top[r] else top[r]

            # Of recent ones.
            for t in range(m):
                seen = not recent_valid.size or recent_valid[row, head, t]
                key = token(recent_keys, row, head, t)
                fetch(token(recent_keys, row, head, t + AHEAD), vector)
                for r in range(rows):
                    logit = dot(address(asked, r * vector), key, d) if seen else np.float32(-np.inf)
                    logits[r, width + t] = logit
                    top[r] = logit if logit > top[r] else top[r]

            # Of groups, as `momentkv.backends.plain.Prepared` says.
            for r in range(rows if groups else 0):
                if less_anchor.size:
                    for c in range(d):
                        asked[r, c] += less_anchor[row, head, c]
                gain = np.float32(0)
                if half.size:
                    for c in range(d):
                        gain += asked[r, c] * asked[r, c] * half[row, head, c]
                    gain = gain if gain < cap[row, head] else cap[row, head]
                own = address(asked, r * vector)
                for i in range(groups):
                    logit = dot(own, token(against, row, head, i), d)
                    logit += log_weight[row, head, i] + gain
                    logits[r, stored + i] = logit
                    top[r] = logit if logit > top[r] else top[r]
                for i in range(rank):
                    right[r, i] = dot(own, token(against, row, head, groups + i), d)

            for r in range(rows):
                lse[row, head, r] = shares(logits[r, :length], top[r])

            total = out[row, head]
            total[:] = 0
            for t in range(width):
                if valid.size and not valid[row, head, t]:
                    continue
                value = packed(values, row, start + t)
                fetch(packed(values, row, start + t + AHEAD), value_bytes)
                if coded:
                    unpack(value, where, value_bits, dv, 0)
                    step = step_of(value_step[row, start + t])
                if value_bits == BFLOAT:
                    widen(value, where, dv)
                    value = where
                for r in range(rows):
                    sum_of = address(total, r * wide)
                    if coded:
                        add(sum_of, logits[r, t] * step, where, dv)
                    else:
                        add(sum_of, logits[r, t], value, dv)
            if coded:
                for r in range(rows):
                    for c in range(dv):
                        total[r, c] *= value_deviation[row, head, c]
            for t in range(m):
                if recent_valid.size and not recent_valid[row, head, t]:
                    continue
                fetch(token(recent_values, row, head, t + AHEAD), wide)
                for r in range(rows):
                    add(address(total, r * wide), logits[r, width + t], token(recent_values, row, head, t), dv)
            for r in range(rows if groups else 0):
                share = np.float32(0)
                for i in range(groups + rank):
                    if i < groups:
                        factor = logits[r, stored + i]
                        share += factor
                    else:
                        factor = share * right[r, i - groups]
                    add(address(total, r * wide), factor, token(into, row, head, i), dv)

    return attend
