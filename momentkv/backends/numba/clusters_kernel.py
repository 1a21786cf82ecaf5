"""The kernel that groups points on a CPU: each point is read once for a new centre, and once for a step of Lloyd's."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import types
from numba.extending import intrinsic

from momentkv.backends.numba.compiled import compiled
from momentkv.backends.numba.decode_kernel import add, address
from momentkv.backends.numba.llvm import fused, summed
from momentkv.statistics.clustering import LLOYD_STEPS

__all__ = ["kernel"]

NUMBER = types.float32
SIGNATURE = types.void(
    types.Array(NUMBER, 3, "C"), types.Array(NUMBER, 2, "C"), types.Array(NUMBER, 3, "C"), *[types.int64] * 2
)


@intrinsic(prefer_literal=True)
def apart(typing, x, y, d):
    """The squared distance of two vectors of ``d`` numbers, a multiple of `LANES`."""

    def emit(context, builder, signature, arguments):
        def squared(one, other, total):
            off = builder.fsub(one, other)
            return fused(builder, off, off, total)

        return summed(builder, *arguments[:2], d.literal_value, squared)

    return types.float32(types.voidptr, types.voidptr, d), emit


@cache
def kernel(f):
    """Groups of points of so many features, compiled for them, as `momentkv.statistics.clustering.cluster` says.

    ``member`` (set, point, group) comes as zeros. Distances are of differences, so that points may lie far from zero.
    """
    size = 4 * f

    @compiled(SIGNATURE)
    def clusters(x, weight, member, first_set, last_set):
        n, groups = member.shape[1], member.shape[2]
        centre, mean = np.empty((groups, f), np.float32), np.empty((groups, f), np.float32)
        part, nearest, group = np.empty(groups, np.float32), np.empty(n, np.float32), np.empty(n, np.int64)
        for i in range(first_set, last_set):
            w = weight[i]
            picked = np.argmax(w)
            for g in range(groups):
                for c in range(f):
                    centre[g, c] = x[i, picked, c]
                if g == groups - 1:
                    break
                most, picked = np.float32(-1), 0
                for t in range(n):
                    far = w[t] * apart(address(x, (i * n + t) * size), address(centre, g * size), f)
                    if g == 0 or far < nearest[t]:
                        nearest[t] = far
                    if nearest[t] > most:
                        most, picked = nearest[t], t
            for step in range(LLOYD_STEPS):
                mean[:] = 0
                part[:] = 0
                for t in range(n):
                    point, least, own = address(x, (i * n + t) * size), np.float32(np.inf), groups - 1
                    # Of two centres at one place, which there are where points are few, the first.
                    for g in range(groups):
                        far = apart(point, address(centre, g * size), f)
                        if far < least:
                            least, own = far, g
                    group[t] = own
                    if w[t] != 0:
                        part[own] += w[t]
                        add(address(mean, own * size), w[t], point, f)
                if step < LLOYD_STEPS - 1:
                    for g in range(groups):
                        if part[g] > 0:
                            for c in range(f):
                                centre[g, c] = mean[g, c] / part[g]
            for t in range(n):
                member[i, t, group[t]] = 1

    return clusters
