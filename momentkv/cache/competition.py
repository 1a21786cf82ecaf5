"""Heads that compete by the importance of their tokens: the rule of Ada-KV, and what other rules share with it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from momentkv._array import Array, array_namespace
from momentkv.cache.layer import LayerCache
from momentkv.policies.select import protected

__all__ = ["by_importance", "candidates", "finite_rows", "whole_shares", "wins"]

# Part of the average that Ada-KV gives to every head before heads compete, as in its paper.
SAFEGUARD = 0.2


def by_importance(caches: Sequence[LayerCache], importances: Sequence[Array], average: int, by_head: bool) -> list[int]:
    r"""Ada-KV: heads of a layer compete for one total by the importance of their tokens.

    With free budget $b$ (the average less sinks and window) and $H$ heads, head $h$ gets

    $$ \alpha b + (1 - \alpha)\, n_h $$

    beside sinks and window, where $n_h$ of the $bH$ most important tokens of all heads are in head
    $h$, and $\alpha = 0.2$ is a safeguard.

    Parameters
    ----------
    caches : sequence of LayerCache
        After the attention of a prefill, before its eviction. Each layer is shared by itself.
    importances : sequence of array, shape (..., kv_head, n)
        Of each cache, `LayerCache.importance`.
    average : int
        Tokens for each head on average.
    by_head : bool
        Must be True: heads compete.

    Returns
    -------
    list of int
        A budget for each head of each layer; those of a layer add up to at most ``average`` for each.

    Notes
    -----
    Rows of a batch with numbers that are not finite are left out; the mean over the other rows decides. Only for
    policies whose importances can be compared between heads: attention weights can. Ranks, as `Balanced` gives, cannot,
    and share evenly.
    Source: Ada-KV (Feng et al., 2024, arXiv 2407.11550), algorithm 1 and its safeguard.
    """
    budgets: list[int] = []
    for cache, importance in zip(caches, importances, strict=True):
        fixed = cache.config.protected
        free = average - fixed
        rows = candidates(cache, importance)
        won = wins(rows, free * len(rows), finite_rows(cache))
        shares = [SAFEGUARD * free + (1 - SAFEGUARD) * count for count in won]
        budgets += [fixed + share for share in whole_shares(shares, free * len(rows))]
    return budgets


def whole_shares(shares: Sequence[float], total: int) -> list[int]:
    """Shares rounded down to whole tokens, at least one each; what that adds is taken from the largest.

    Examples
    --------
    >>> whole_shares([2.6, 0.2, 0.2], 3), whole_shares([0.95, 0.05, 5.4], 7)
    ([1, 1, 1], [1, 1, 5])
    """
    # A product of decimal fractions may fall a rounding below the whole number that it stands for.
    whole = [max(1, math.floor(share + 1e-9)) for share in shares]
    while sum(whole) > total:
        whole[whole.index(max(whole))] -= 1
    return whole


def candidates(cache: LayerCache, importance: Array) -> list[Array]:
    """For each KV head, the importance of every token that may be evicted, shape (row, n); ``-inf`` elsewhere."""
    xp, config = array_namespace(importance), cache.config
    positions = cache.view().positions
    always = protected(positions, sinks=config.sinks, window=config.window)
    competing = xp.where((positions >= 0) & ~always, importance, -xp.inf * xp.ones_like(importance))
    heads, n = competing.shape[-2:]
    return [xp.reshape(competing[..., head, :], (-1, n)) for head in range(heads)]


def finite_rows(cache: LayerCache) -> Array:
    """Which rows of a batch, (row,), hold finite keys, values and newest queries alone."""
    view = cache.view()
    xp = array_namespace(view.keys)
    real = (view.positions >= 0)[..., None]
    arrays = [xp.where(real, x, xp.zeros_like(x)) for x in (view.keys, view.values)]
    arrays += [x for x in (cache.newest_queries,) if x is not None]
    rows = [xp.all(xp.isfinite(xp.reshape(x, (-1, math.prod(x.shape[-3:])))), axis=-1) for x in arrays]
    return xp.all(xp.stack(rows), axis=0)


def wins(rows: Sequence[Array], places: int, counted: Array | None = None) -> list[float]:
    """How many of the most important places go to each head, on average over the rows of a batch that are counted.

    Where none is, every head has as many.

    Examples
    --------
    >>> import numpy as np
    >>> wins([np.array([[5.0, 1.0]]), np.array([[4.0, 3.0, 2.0]])], 3)
    [1.0, 2.0]
    """
    xp = array_namespace(rows[0])
    everyone = xp.concat(list(rows), axis=-1)
    counted = xp.ones_like(everyone[:, 0], dtype=xp.bool) if counted is None else counted
    number = float(xp.sum(xp.astype(counted, everyone.dtype)))
    if not number:
        return [places / len(rows)] * len(rows)
    order = xp.argsort(everyone, axis=-1, descending=True, stable=True)[:, :places]
    real = xp.isfinite(xp.take_along_axis(everyone, order, axis=-1)) & counted[:, None]
    counts, start = [], 0
    for row in rows:
        stop = start + row.shape[-1]
        own = real & (order >= start) & (order < stop)
        counts.append(float(xp.sum(xp.astype(own, everyone.dtype))) / number)
        start = stop
    return counts
