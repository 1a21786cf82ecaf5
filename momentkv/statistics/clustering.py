"""Parting weighted points into groups, and matrices into few directions; deterministic and batched."""

from __future__ import annotations

import math

from momentkv._array import Array, array_namespace, device
from momentkv.statistics.weights import positive

__all__ = ["centres", "cluster", "low_rank"]

LLOYD_STEPS = 3
SUBSPACE_STEPS = 3
OVERSAMPLING = 4
# More points than so many for each group: distances as differences of squares.
MANY = 16


def cluster(x: Array, weight: Array, groups: int) -> Array:
    """Group points by weighted k-means: farthest-first centres, then a few steps of Lloyd's.

    Parameters
    ----------
    x : array, shape (..., n, f)
    weight : array, shape (..., n)
        Not negative; a point of weight 0 has no say.
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
    # Distances below are differences of squares, which resolve little far from zero.
    x = x - (xp.matmul(weight[..., None, :], x) / positive(xp, xp.sum(weight, axis=-1))[..., None, None])
    chosen = xp.argmax(weight, axis=-1, keepdims=True)
    picked = [xp.take_along_axis(x, chosen[..., None], axis=-2)]
    many = x.shape[-2] > MANY * groups
    square = xp.sum(x * x, axis=-1) if many else None

    def distance_to(centre: Array) -> Array:
        if square is None:
            return xp.sum((x - centre) ** 2, axis=-1)
        # One product instead of three passes over memory; among many points, ones this close may share a group.
        product = xp.matmul(x, xp.matrix_transpose(centre))[..., 0]
        far = square - 2 * product + xp.sum(centre * centre, axis=-1)
        return xp.maximum(far, xp.zeros_like(far))

    nearest = distance_to(picked[0])
    for _ in range(1, groups):
        chosen = xp.argmax(weight * nearest, axis=-1, keepdims=True)
        picked.append(xp.take_along_axis(x, chosen[..., None], axis=-2))
        nearest = xp.minimum(nearest, distance_to(picked[-1]))
    centre = xp.concat(picked, axis=-2)
    # With fewer different points than groups, a centre is picked again; between two at one place rounding would decide.
    alike = xp.all(centre[..., :, None, :] == centre[..., None, :, :], axis=-1)
    again = xp.any(xp.tril(alike, k=-1), axis=-1)
    slots = xp.arange(groups, device=device(x))
    for step in range(LLOYD_STEPS):
        # |x|^2 is the same for all groups and left out.
        length = xp.sum(centre * centre, axis=-1)
        length = xp.where(again, xp.full_like(length, math.inf), length)
        distance = length[..., None, :] - 2 * xp.matmul(x, xp.matrix_transpose(centre))
        member = xp.astype(xp.argmin(distance, axis=-1)[..., None] == slots, x.dtype)
        if step < LLOYD_STEPS - 1:
            part, mean = centres(member, weight, x)
            centre = xp.where((part > 0)[..., None], mean, centre)
    return member


def centres(member: Array, weight: Array, x: Array) -> tuple[Array, Array]:
    """Weight and weighted mean of each group: shapes (..., groups) and (..., groups, f); zero for an empty group."""
    xp = array_namespace(member, weight, x)
    weighted = xp.matrix_transpose(weight[..., None] * member)
    part = xp.sum(weighted, axis=-1)
    return part, xp.matmul(weighted, x) / positive(xp, part)[..., None]


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
    left, right : array, shape (..., p, rank) and (..., rank, d)

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
    finite = xp.all(xp.isfinite(scaled), axis=(-2, -1))[..., None, None]
    scaled = xp.where(finite, scaled, xp.zeros_like(scaled))
    width = min(rank + OVERSAMPLING, p, d)
    # A fixed matrix without structure that a covariance could be orthogonal to.
    rows = xp.arange(1, d + 1, dtype=matrix.dtype, device=device(matrix))
    columns = xp.arange(1, width + 1, dtype=matrix.dtype, device=device(matrix))
    start = xp.cos(math.sqrt(2) * rows[:, None] * columns[None, :] ** 2)
    basis, _ = xp.linalg.qr(xp.matmul(scaled, start))
    for _ in range(SUBSPACE_STEPS):
        basis, _ = xp.linalg.qr(xp.matmul(scaled, xp.matmul(xp.matrix_transpose(scaled), basis)))
    inside = xp.matmul(xp.matrix_transpose(basis), scaled)
    _, vectors = xp.linalg.eigh(xp.matmul(inside, xp.matrix_transpose(inside)))
    left = xp.matmul(basis, vectors[..., -rank:])
    left = xp.where(finite, left, xp.full_like(left, math.nan))
    return left, xp.matmul(xp.matrix_transpose(left), matrix)
