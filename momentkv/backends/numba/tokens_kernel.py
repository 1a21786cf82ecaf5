"""The kernel that reads records as tokens: what an eviction ranks by, a token's bytes at a time."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import types

from momentkv.backends.numba.compiled import compiled
from momentkv.backends.numba.decode_kernel import address, packed, step_of, unpack

__all__ = ["kernel"]

NUMBER = types.float32
SIGNATURE = types.void(
    types.Array(types.uint8, 3, "A"),
    types.Array(types.uint16, 2, "C"),
    types.Array(NUMBER, 3, "C"),
    types.Array(NUMBER, 3, "C"),
    types.Array(types.uint8, 3, "C"),
    types.Array(types.int64, 2, "C"),
    types.Array(NUMBER, 4, "C"),
    *[types.int64] * 2,
)


@cache
def kernel(bits, d, graded):
    """Tokens of records of so many bits and channels, compiled for them; arguments as in `decode_kernel.kernel`."""

    @compiled(SIGNATURE)
    def tokens(records, steps, mean, deviation, order, slots, out, first_pair, last_pair):
        heads, width = out.shape[1], out.shape[2]
        levels, place = np.empty(d, np.float32), np.arange(d)
        where = address(levels, 0)
        for pair in range(first_pair, last_pair):
            row, head = pair // heads, pair % heads
            start, own = slots[head]
            if graded:
                for c in range(d):
                    place[order[row, head, c]] = c
            for t in range(own):
                unpack(packed(records, row, start + t), where, bits, d, graded)
                step = step_of(steps[row, start + t])
                for c in range(d):
                    out[row, head, t, c] = levels[place[c]] * step * deviation[row, head, c]
                if mean.size:
                    for c in range(d):
                        out[row, head, t, c] += mean[row, head, c]
            out[row, head, own:width] = 0

    return tokens
