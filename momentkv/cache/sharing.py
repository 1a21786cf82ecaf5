"""Who gets how many tokens: rules that give the layers or KV heads of a model their parts of one total."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from momentkv._array import Array, array_namespace
from momentkv.cache.budgets import budget_grid, error_curve, error_curves, refine, share_budget
from momentkv.cache.layer import LayerCache
from momentkv.cache.ragged import RaggedCache
from momentkv.policies.select import protected

__all__ = ["SharedBudget", "by_error", "by_importance", "pyramid_budgets"]

# Part of the average that Ada-KV gives to every head before heads compete, as in its paper.
SAFEGUARD = 0.2
# How many times fewer tokens than the average PyramidKV gives to the last layer, as in its paper.
STEEPNESS = 20

Cache = LayerCache | RaggedCache
Rule = Callable[[Sequence[Cache], Sequence[list[Array]], int], list[int]]


class SharedBudget:
    """Evicts caches together after a prefill, each layer or each KV head to its share of one total.

    Parameters
    ----------
    caches : sequence of LayerCache or RaggedCache
        Made with ``keep_queries=True`` and one budget, the average. A `LayerCache` has one share, a `RaggedCache` one
        for each KV head.
    rule : callable
        `by_error` or `by_importance`: from the caches that are full, the importances of their tokens and the average to
        a budget for each share.

    Notes
    -----
    Until the last of the caches has attended, every one holds all its tokens: when the layers of a model share, a
    prefill in one piece needs as much memory as the full cache while it lasts, one in chunks as much as the budget and
    a chunk. Each chunk shares anew. While decoding, each keeps to its budget.
    """

    def __init__(self, caches: Sequence[Cache], rule: Rule) -> None:
        self.caches = list(caches)
        self.rule = rule
        self.average = self.caches[0].parts[0].budget
        self.waiting: list[Cache] = []

    def evict(self, cache: Cache) -> None:
        """Evict one cache, or, after a prefill, wait for the others and then evict them all."""
        first = cache.parts[0]
        if first.newest_queries is None:
            cache.evict()
            return
        if any(cache is other for other in self.waiting):
            self.waiting = []  # left by a pass that failed
        self.waiting.append(cache)
        if len(self.waiting) < len(self.caches):
            return
        waiting, self.waiting = self.waiting, []
        parts = [part for each in waiting for part in each.parts]
        if all(part.stored < part.budget + part.block for part in parts):
            for part in parts:
                part.evict()  # nothing goes yet, but the queries are let go
            return
        importances = [importances_of(each) for each in waiting]
        budgets = self.rule(waiting, importances, self.average)
        for part, importance, budget in zip(parts, itertools.chain(*importances), budgets, strict=True):
            part.budget = budget
            part.evict(importance)

    def reset(self) -> None:
        """Back to the average for all."""
        self.waiting = []
        for part in (part for cache in self.caches for part in cache.parts):
            part.budget = self.average


def by_error(caches: Sequence[Cache], importances: Sequence[list[Array]], average: int) -> list[int]:
    """Shares that make the sum of the measured errors small; see docs/derivations/eviction.md.

    Parameters
    ----------
    caches : sequence of LayerCache or RaggedCache
        After the attention of a prefill, before its eviction.
    importances : sequence of list of array
        Of each cache, the importances of the tokens of its `parts`.
    average : int
        Tokens for each share on average.

    Returns
    -------
    list of int
        A budget for each layer, or for each head of each `RaggedCache`; their sum is at most ``average`` for each.
    """
    first = caches[0].parts[0]
    grid = budget_grid(average, first.sinks + first.window + 1)
    fine: list[int] = []
    curves = []
    for cache, importance in zip(caches, importances, strict=True):
        for curve in curves_of(cache, grid, importance):
            fine, refined = refine(grid, curve)
            curves.append(refined)
    return share_budget(curves, fine, average * len(curves))


def by_importance(caches: Sequence[Cache], importances: Sequence[list[Array]], average: int) -> list[int]:
    r"""Ada-KV: heads of a layer compete for one total by the importance of their tokens.

    With free budget :math:`b` (the average less sinks and window) and :math:`H` heads, head :math:`h` gets

    .. math:: \alpha b + (1 - \alpha)\, n_h

    beside sinks and window, where :math:`n_h` of the :math:`bH` most important tokens of all heads are in head
    :math:`h`, and :math:`\alpha = 0.2` is a safeguard.

    Parameters
    ----------
    caches : sequence of RaggedCache
        After the attention of a prefill, before its eviction. Each layer is shared by itself, and has a part for each
        head.
    importances : sequence of list of array
        Of each cache, the importances of the tokens of its `parts`.
    average : int
        Tokens for each head on average.

    Returns
    -------
    list of int
        A budget for each head of each layer; those of a layer add up to at most ``average`` for each.

    Notes
    -----
    Only for policies whose importances can be compared between heads: attention weights can, ranks (as `Balanced`
    gives) cannot and share evenly. Of a batch, the mean over rows decides.
    Source: Ada-KV (Feng et al., 2024, arXiv 2407.11550), algorithm 1 and its safeguard.
    """
    budgets = []
    for cache, ranked in zip(caches, importances, strict=True):
        first = cache.parts[0]
        fixed = first.sinks + first.window
        free = average - fixed
        rows = [candidates(part, importance) for part, importance in zip(cache.parts, ranked, strict=True)]
        won = wins(rows, free * len(rows))
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


def candidates(head: LayerCache, importance: Array) -> Array:
    """Importance of every token of a head that may be evicted, shape (row, n); ``-inf`` for all other slots."""
    xp = array_namespace(importance)
    always = protected(head.positions, sinks=head.sinks, window=head.window, seen=head.seen)
    competing = xp.where((head.positions >= 0) & ~always, importance, -xp.inf * xp.ones_like(importance))
    return xp.reshape(competing, (-1, importance.shape[-1]))


def wins(rows: Sequence[Array], places: int) -> list[float]:
    """How many of the most important places go to each head, on average over the rows of a batch.

    Examples
    --------
    >>> import numpy as np
    >>> wins([np.array([[5.0, 1.0]]), np.array([[4.0, 3.0, 2.0]])], 3)
    [1.0, 2.0]
    """
    xp = array_namespace(rows[0])
    everyone = xp.concat(list(rows), axis=-1)
    order = xp.argsort(everyone, axis=-1, descending=True, stable=True)[:, :places]
    real = xp.isfinite(xp.take_along_axis(everyone, order, axis=-1))
    counts, start = [], 0
    for row in rows:
        stop = start + row.shape[-1]
        own = real & (order >= start) & (order < stop)
        counts.append(float(xp.sum(xp.astype(own, everyone.dtype))) / everyone.shape[0])
        start = stop
    return counts


def pyramid_budgets(average: int, layers: int, *, sinks: int = 1, window: int = 32) -> list[int]:
    r"""PyramidKV: budgets that fall linearly from the first layer to the last.

    With free budget :math:`b` (the average less sinks and window), the last of the layers gets :math:`b / \beta`
    beside sinks and window, the first :math:`2b - b / \beta`; :math:`\beta = 20`.

    Parameters
    ----------
    average : int
        Tokens for each KV head on average over layers.
    layers : int
    sinks, window : int
        As in the cache.

    Returns
    -------
    list of int
        One for each layer; their sum is at most ``average * layers``.

    Raises
    ------
    ValueError
        If the average leaves nothing beside sinks and window.

    Notes
    -----
    Source: PyramidKV (Cai et al., 2024, arXiv 2406.02069): budgets in arithmetic sequence.

    Examples
    --------
    >>> pyramid_budgets(133, 3)
    [228, 133, 38]
    """
    free = average - sinks - window
    if free < 1:
        raise ValueError(f"budget is {average}; it must be at least sinks + window + 1 = {sinks + window + 1}")
    last = free / STEEPNESS
    shares = [2 * free - last - (2 * free - 2 * last) * index / max(layers - 1, 1) for index in range(layers)]
    if layers == 1:
        shares = [free]
    return [sinks + window + share for share in whole_shares(shares, free * layers)]


def importances_of(cache: Cache) -> list[Array]:
    """Importance of the tokens of each part of a cache, of all heads at once where that can be."""
    together = cache.together() if isinstance(cache, RaggedCache) else None
    if together is None:
        return [part.importance() for part in cache.parts]
    whole = together.importance()
    return [whole[..., head : head + 1, :] for head in range(len(cache.parts))]


def curves_of(cache: Cache, grid: Sequence[int], importances: list[Array]) -> list[list[float]]:
    """One curve for each part of a cache."""
    together = cache.together() if isinstance(cache, RaggedCache) else None
    if together is not None:
        xp = array_namespace(importances[0])
        return error_curves(together, grid, xp.concat(importances, axis=-2))
    return [error_curve(part, grid, importance) for part, importance in zip(cache.parts, importances, strict=True)]
