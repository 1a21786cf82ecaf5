"""Regrouping of weighted tokens and groups: the new groups' weights, means and variation within."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace
from momentkv._rows import column_products, less_product, scaled
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
        features = scaled(
            xp.concat([keys, values], axis=-1), xp.concat([deviation, unit_of(values, share)], axis=-1)[..., None, :]
        )
        member = cluster(features, share**GROUPING_POWER, groups)
    weight, key_mean, value_mean = centres(member, share, keys, values)
    off = less_product(keys, member, key_mean)
    of_both, weighted = None, share[..., None] * off
    if covariance:
        of_both = less_product(values, member, value_mean).mT @ weighted
    return Groups(
        xp.where(weight > 0, xp.log(positive(xp, weight)) + total, -math.inf),
        key_mean,
        value_mean,
        column_products(off, weighted),
        of_both,
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


def unit_of(values: Array, share: Array) -> Array:
    """The factor (..., dv) that makes the mean distance of values with weight from their mean 1."""
    xp = array_namespace(values)
    some: Any = xp.astype(share > 0, values.dtype)
    number = positive(xp, xp.sum(some, axis=-1, keepdims=True))
    mean = some[..., None, :] @ values / number[..., None]
    spread = xp.sum(some * xp.linalg.vector_norm(values - mean, axis=-1), axis=-1, keepdims=True) / number
    return xp.ones_like(values[..., 0, :]) / positive(xp, spread)
