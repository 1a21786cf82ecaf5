"""Grouping of weighted points, and approximation of matrices by few directions; deterministic and batched."""

from __future__ import annotations

import math
from collections.abc import Callable

from momentkv._array import Array, array_namespace, device, leading, library, orthonormal
from momentkv.statistics.weights import positive

__all__ = ["centres", "cluster", "low_rank"]

LLOYD_STEPS = 3
SUBSPACE_STEPS = 3
OVERSAMPLING = 4
# Up to this many points for each group, all distances between them are computed at once.
MANY = 16
# By library, what groups its arrays in less time, or gives None. Backends enter it here, which know this module.
FASTER: dict[str | None, Callable[[Array, Array, int], Array | None]] = {}


def cluster(x: Array, weight: Array, groups: int) -> Array:
    """Group points by weighted k-means: farthest-first centres, then a few steps of Lloyd's.

    Parameters
    ----------
    x : array, shape (..., n, f)
    weight : array, shape (..., n)
        Not negative; a point of weight 0 does not count.
    groups : int

    Returns
    -------
    array, shape (..., n, groups)
        1 where the point is in the group, else 0. With at most ``groups`` points of positive weight, different points
        are in different groups.

    Notes
    -----
    Farthest-first: each next centre is the point with the largest weight times squared distance to the centres so
    far (Gonzalez, 1985, *Theor. Comput. Sci.* 38), the first is the heaviest. Lloyd (1982), *IEEE Trans. Inf. Theory*
    28. Nothing is random, so equal inputs give equal groups. Derivation: docs/derivations/summaries.md.
    """
    xp = array_namespace(x, weight)
    if groups == 1:
        return xp.ones_like(x[..., :1])
    faster = FASTER.get(library(x))
    member = None if faster is None else faster(x, weight, groups)
    return by_products(x, weight, groups) if member is None else member


def by_products(x: Array, weight: Array, groups: int) -> Array:
    """`cluster` on any library: distances by products of matrices."""
    xp = array_namespace(x, weight)
    *lead, n, f = x.shape
    count = math.prod(lead)
    x, weight = xp.reshape(x, (count, n, f)), xp.reshape(weight, (count, n))
    # Distances below are differences of squares, which resolve little far from zero.
    x = x - (weight[:, None, :] @ x) / positive(xp, xp.sum(weight, axis=-1))[:, None, None]
    square = xp.linalg.vector_norm(x, axis=-1) ** 2  # x * x would be as large as x
    first = xp.arange(0, count * n, n or 1, device=device(x))
    rows, table = xp.reshape(x, (count * n, f)), None
    if n <= MANY * groups:
        # Few points: all distances at once, and then a row of them for each centre.
        table = square[:, :, None] + square[:, None, :] - 2 * (x @ x.mT)
        table = xp.reshape(weight[:, None, :] * xp.where(table > 0, table, 0.0), (count * n, n))

    def away(row: Array) -> Array:
        """Weight times squared distance of each point from a chosen one."""
        if table is not None:
            return xp.take(table, row, axis=0)
        centre = xp.take(rows, row, axis=0)
        # A row times many columns takes PyTorch an eighth of the time of many rows times a column.
        far = square - 2 * (centre[:, None, :] @ x.mT)[:, 0, :] + xp.sum(centre * centre, axis=-1, keepdims=True)
        return weight * xp.where(far > 0, far, 0.0)

    picked = [first + xp.argmax(weight, axis=-1)]
    nearest = away(picked[0])
    for _ in range(2, groups):
        picked.append(first + xp.argmax(nearest, axis=-1))
        nearest = xp.minimum(nearest, away(picked[-1]))
    picked.append(first + xp.argmax(nearest, axis=-1))
    centre = xp.reshape(xp.take(rows, xp.reshape(xp.stack(picked, axis=-1), (-1,)), axis=0), (count, groups, f))
    # With fewer different points than groups, a centre is picked again; between two at one place rounding would decide.
    apart = xp.max(xp.abs(centre[:, :, None, :] - centre[:, None, :, :]), axis=-1)
    again = xp.any(xp.tril(apart == 0, k=-1), axis=-1)
    never = xp.where(again, math.inf, xp.zeros_like(apart[:, 0, :]))
    slots = xp.arange(groups, device=device(x))
    for step in range(LLOYD_STEPS):
        # |x|^2 is the same for all groups and left out.
        length = xp.sum(centre * centre, axis=-1) + never
        distance = length[:, :, None] - (2 * centre) @ x.mT
        # The first of the nearest, and some group for a point that is not finite: as argmin, which takes ten times as
        # long over an axis that is not the last.
        nearest_of = distance == least(distance)
        chosen = least(xp.where(nearest_of, slots[:, None], groups - 1))[:, 0, :]
        member = xp.astype(chosen[:, :, None] == slots, x.dtype)
        if step < LLOYD_STEPS - 1:
            part, mean = centres(member, weight, x)
            centre = xp.where((part > 0)[:, :, None], mean, centre)
    return xp.reshape(member, (*lead, n, groups))


def least(x: Array) -> Array:
    """The minimum over the last axis but one, kept, by halves: PyTorch's own takes a CPU ten times as long."""
    xp = array_namespace(x)
    while (m := x.shape[-2]) > 1:
        half = (m + 1) // 2
        x = xp.minimum(x[..., :half, :], x[..., m - half :, :])
    return x


def centres(member: Array, weight: Array, *points: Array) -> tuple[Array, ...]:
    """Weight of each group, (..., groups), and its weighted means, (..., groups, f); zero for an empty group."""
    xp = array_namespace(member, weight, *points)
    weighted = (weight[..., None] * member).mT
    part = xp.sum(weighted, axis=-1)
    number = positive(xp, part)[..., None]
    return part, *((weighted @ x) / number for x in points)


def low_rank(matrix: Array, deviation: Array, rank: int) -> tuple[Array, Array]:
    """Best approximation of rank ``rank`` for inputs whose coordinates have the given standard deviations.

    Minimises ``E ||(M - L R) x||^2`` for uncorrelated coordinates of ``x``: the left factor spans the leading left
    singular vectors of ``M diag(deviation)``, the right one is ``L^T M``.

    Parameters
    ----------
    matrix : array, shape (..., p, d)
    deviation : array, shape (..., d)
    rank : int
        At least 1.

    Returns
    -------
    left : array, shape (..., p, rank)
    right : array, shape (..., rank, d)

    Notes
    -----
    By subspace iteration from a fixed start, an order of magnitude faster than a singular value decomposition of
    these small matrices, and then a decomposition within the subspace. Halko, Martinsson, Tropp (2011), *SIAM Review*
    53, algorithm 4.4. Derivation: docs/derivations/summaries.md.
    """
    xp = array_namespace(matrix, deviation)
    p, d = matrix.shape[-2:]
    scaled = matrix * deviation[..., None, :]
    # Decompositions refuse all matrices for one that is not finite; that one's factors are NaN.
    top = xp.max(xp.abs(scaled), axis=(-2, -1), keepdims=True)
    finite = xp.isfinite(top)
    # Nor do they bear a square that has left the range of the dtype; the directions do not depend on the size.
    bounds = xp.finfo(scaled.dtype)
    far = (top > bounds.max**0.25) | (top < bounds.smallest_normal**0.25)
    scaled = xp.where(finite, scaled / xp.where(far & finite & (top > 0), top, 1.0), 0.0)
    square = scaled @ scaled.mT
    basis = orthonormal(scaled @ start_of(matrix, min(rank + OVERSAMPLING, p, d)))
    for _ in range(SUBSPACE_STEPS):
        # The square is symmetric; a few rows times it take a fraction of the time of it times a few columns.
        basis = orthonormal((basis.mT @ square).mT)
    left = xp.where(finite, basis @ leading((basis.mT @ square) @ basis, rank), math.nan)
    return left, left.mT @ matrix


def start_of(matrix: Array, width: int) -> Array:
    """A fixed matrix (d, width) without structure that a covariance (..., p, d) could be orthogonal to.

    Made where the covariance is: an upload would wait for the device.
    """
    xp, d = array_namespace(matrix), matrix.shape[-1]
    row, column = (xp.arange(1, n + 1, dtype=matrix.dtype, device=device(matrix)) for n in (d, width))
    return xp.cos((math.sqrt(2) * row)[:, None] * (column * column))
