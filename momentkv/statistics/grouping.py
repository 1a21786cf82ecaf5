"""Regrouping of weighted tokens and groups: the new groups' weights, means and variation within."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace
from momentkv.statistics.clustering import centres, cluster
from momentkv.statistics.weights import positive

__all__ = ["Groups", "part", "shares", "total_weights"]

# Tokens count for the grouping with the square root of their weight: between "every token alike" and "only the few
# that the anchor attends to".
GROUPING_POWER = 0.5


class Groups(NamedTuple):
    """Weighted points, divided into groups.

    Attributes
    ----------
    log_weight : array, shape (..., m)
        Natural log; ``-inf`` for a group without weight.
    key_mean, value_mean : array, shape (..., m, d) and (..., m, dv)
    variance : array, shape (..., d)
        Of each coordinate of the keys within groups, weighted by shares of the total weight.
    covariance : array, shape (..., dv, d), or None
        Of values and keys within groups, likewise.
    share : array, shape (..., n)
        Of each point in the total weight.
    """

    log_weight: Array
    key_mean: Array
    value_mean: Array
    variance: Array
    covariance: Array | None
    share: Array


def part(log_weight: Array, keys: Array, values: Array, deviation: Array, groups: int, *, covariance: bool) -> Groups:
    """Divide points into groups that queries tell apart.

    Parameters
    ----------
    log_weight : array, shape (..., n)
    keys, values : array, shape (..., n, d) and (..., n, dv)
    deviation : array, shape (..., d)
        Standard deviation of the coordinates of the queries.
    groups : int
    covariance : bool
        Whether it is wanted.
    """
    xp = array_namespace(keys)
    share, total = shared(log_weight)
    if groups == 1:
        member = xp.ones_like(keys[..., :1])
    else:
        features = xp.concat([keys * deviation[..., None, :], standardised(values, share)], axis=-1)
        member = cluster(features, share**GROUPING_POWER, groups)
    weight, key_mean, value_mean = centres(member, share, keys, values)
    off_keys, off_values = keys - member @ key_mean, values - member @ value_mean
    weighted = share[..., None] * off_keys
    return Groups(
        xp.where(weight > 0, xp.log(positive(xp, weight)) + total, -math.inf),
        key_mean,
        value_mean,
        xp.sum(weighted * off_keys, axis=-2),
        off_values.mT @ weighted if covariance else None,
        share,
    )


def finite_max(x: Array) -> Array:
    """Maximum over the last axis, kept; 0 where all is ``-inf``."""
    xp = array_namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return xp.where(top > -math.inf, top, 0.0)


def shares(log_weight: Array) -> Array:
    """Weights as shares of their sum over the last axis; all zero for the empty set."""
    return shared(log_weight)[0]


def shared(log_weight: Array) -> tuple[Array, Array]:
    """`shares`, and the log of the sum, with the last axis kept; that of the empty set means nothing."""
    xp = array_namespace(log_weight)
    top = finite_max(log_weight)
    weight = xp.exp(log_weight - top)
    total = positive(xp, xp.sum(weight, axis=-1, keepdims=True))
    return weight / total, xp.log(total) + top


def total_weights(*log_weights: Array) -> tuple[Array, ...]:
    """Sums of several sets of weights, in units that all share."""
    xp = array_namespace(*log_weights)
    top = finite_max(xp.concat(list(log_weights), axis=-1))
    return tuple(xp.sum(xp.exp(x - top), axis=-1) for x in log_weights)


def standardised(values: Array, share: Array) -> Array:
    """Values from their mean, in units of their mean distance from it; slots without weight are left out."""
    xp = array_namespace(values)
    some: Any = xp.astype(share > 0, values.dtype)[..., None]
    number = positive(xp, xp.sum(some, axis=-2, keepdims=True))
    mean = xp.sum(some * values, axis=-2, keepdims=True) / number
    off = some * (values - mean)
    spread = xp.sum(xp.linalg.vector_norm(off, axis=-1, keepdims=True), axis=-2, keepdims=True) / number
    return off / positive(xp, spread)
