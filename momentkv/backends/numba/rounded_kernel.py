"""The kernel that rounds tokens as records of few bits would, and makes no record: a token at a time."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import njit, types

from momentkv.backends.numba.compiled import compiled
from momentkv.backends.numba.decode_kernel import as_bits, as_float
from momentkv.codes.records import LEAST, MOST, UP

__all__ = ["kernel"]

NUMBER = types.float32
SIGNATURE = types.void(
    types.Array(NUMBER, 4, "C"),
    types.Array(types.bool_, 3, "C"),
    *[types.Array(NUMBER, 3, "C")] * 3,
    types.Array(NUMBER, 4, "C"),
    *[types.int64] * 2,
)
SMALLEST, LARGEST, RAISED = np.float32(LEAST), np.float32(MOST), np.float32(UP)
HALF = np.float32(0.5)
# Sizes of numbers are in the order of their bits but for the sign; of infinite ones and of none they are these or more.
SIZE, INFINITE = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


@njit(error_model="numpy")
def in_16_bits(x):
    """A normal number of 16 bits, the nearest one, the even one of two; in 32 bits."""
    bits = as_bits(x)
    return as_float(np.int32((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF))


@cache
def kernel(d):
    """Compiled for so many channels, and any bits.

    ``middle`` is the centre of each channel's codes: one number, or two. ``mean`` is empty where it is zero.
    """

    @compiled(SIGNATURE)
    def rounded(x, exact, mean, deviation, middle, out, first_pair, last_pair):
        heads, n = x.shape[1], x.shape[2]
        z = np.empty(d, np.float32)
        bits, finer, coarser = z.view(np.int32), np.empty(d, np.int32), np.empty(d, np.int32)
        for pair in range(first_pair, last_pair):
            row, head = pair // heads, pair % heads
            by, centre = deviation[row, head], middle[row, head]
            high, low = centre.max(), centre.min()
            for c in range(d):
                finer[c] = SIZE if centre[c] == high else 0
                coarser[c] = SIZE & ~finer[c]
            for t in range(n):
                own, read = x[row, head, t], out[row, head, t]
                if exact[row, head, t]:
                    for c in range(d):
                        read[c] = own[c]
                    continue
                if mean.size:
                    for c in range(d):
                        z[c] = (own[c] - mean[row, head, c]) / by[c]
                else:
                    for c in range(d):
                        z[c] = own[c] / by[c]
                fine = coarse = np.int32(0)
                for c in range(d):
                    fine = np.int32(max(fine, np.int32(bits[c] & finer[c])))
                    coarse = np.int32(max(coarse, np.int32(bits[c] & coarser[c])))
                if max(fine, coarse) >= INFINITE:
                    for c in range(d):
                        read[c] = np.nan
                    continue
                top = max(as_float(fine) / (high + HALF), as_float(coarse) / (low + HALF))
                step = in_16_bits(min(max(top * RAISED, SMALLEST), LARGEST))
                for c in range(d):
                    code = np.floor(z[c] / step) + HALF
                    code = code if code < centre[c] else centre[c]
                    code = code if code > -centre[c] else -centre[c]
                    read[c] = by[c] * (code * step)
                if mean.size:
                    for c in range(d):
                        read[c] = mean[row, head, c] + read[c]

    return rounded
