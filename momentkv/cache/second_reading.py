"""Who gets how many tokens after a second reading: what its scores choose in the whole model, then what errors say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace, device
from momentkv.cache.allocation import minimise_error, share_budget
from momentkv.cache.coded_budget import CODES, USUAL, CodedBudget, bought
from momentkv.cache.competition import candidates, finite_rows, whole_shares, wins
from momentkv.cache.curves import error_at, error_curves, measured_errors
from momentkv.cache.eviction import importance_of
from momentkv.cache.layer import LayerCache
from momentkv.policies.novelty import ranks
from momentkv.policies.select import protected
from momentkv.policies.twice import Twice, largest_changes

__all__ = ["RereadBudget", "by_threshold", "chosen_first", "places_of"]

# Budgets that errors are measured at, as multiples of the average.
MULTIPLES = (0.4, 1.0, 2.5, 6.25, 16.0)
# Tokens beside those of the second reading that are offered to a head, as parts of the average: finely, where most are.
EXTRAS = (0, *(0.05 * 1.25**step for step in range(24)))


def places_of(caches: Sequence[LayerCache], scores: Sequence[Array], places: int) -> list[int]:
    r"""How many of the best-scored tokens of a whole model are in each KV head: one threshold for all of them.

    $$ n_h = \#\{j : a_{hj} \ge \tau\}, \qquad \sum_h n_h = \text{places} $$

    Parameters
    ----------
    caches : sequence of LayerCache
    scores : sequence of array, shape (..., kv_head, n)
        Of each cache's tokens, such that they can be compared between heads and layers.
    places : int
        At least one for each head.

    Returns
    -------
    list of int
        For each head of each cache, at least one; their sum is at most ``places``. Sinks and window do not count.

    Notes
    -----
    Of a batch, the mean over rows decides; rows with numbers that are not finite have no say.
    """
    rows = [row for cache, score in zip(caches, scores, strict=True) for row in candidates(cache, score)]
    xp = array_namespace(scores[0])
    finite = xp.all(xp.stack([finite_rows(cache) for cache in caches]), axis=0)
    return whole_shares(wins(rows, places, finite), places)


def by_threshold(caches: Sequence[LayerCache], importances: Sequence[Array], average: int, by_head: bool) -> list[int]:
    """KVzip: one threshold on the importance of tokens for all heads and layers.

    Parameters
    ----------
    caches : sequence of LayerCache
        After the attention of a prefill, before its eviction.
    importances : sequence of array, shape (..., kv_head, n)
        Of each cache: `momentkv.policies.SecondReading`, or another that can be compared between heads and layers.
    average : int
        Tokens for each head on average.
    by_head : bool
        Must be True.

    Returns
    -------
    list of int
        A budget for each head; their sum is at most ``average`` for each.

    Notes
    -----
    Source: KVzip (Kim et al., 2025, arXiv 2505.23416), non-uniform head budgets. A head keeps a token beside sinks and
    window in any case.
    """
    config = caches[0].config
    fixed = config.protected
    heads = sum(importance.shape[-2] for importance in importances)
    return [fixed + own for own in places_of(caches, importances, (average - fixed) * heads)]


def chosen_first(chosen: Array, counts: Sequence[int], rest: Array, real: Array) -> Array:
    """An importance that puts the best of one ranking before all others, which follow by another ranking.

    Parameters
    ----------
    chosen, rest : array, shape (..., kv_head, n)
        Two importances.
    counts : sequence of int
        For each KV head, how many the first one chooses.
    real : bool array, shape (..., kv_head, n)
        False for tokens that do not compete, and slots that hold none.

    Examples
    --------
    >>> import numpy as np
    >>> scores, rest = np.array([[0.1, 0.9, 0.5, 0.2]]), np.array([[4.0, 3.0, 2.0, 1.0]])
    >>> chosen_first(scores, [2], rest, np.ones((1, 4), dtype=bool)).tolist()
    [[-1.0, 7.0, 6.0, -4.0]]
    """
    xp = array_namespace(chosen, rest)
    first = ranks(chosen, real)
    limits = xp.asarray(list(counts), dtype=first.dtype, device=device(chosen))[:, None]
    return xp.where(first <= limits, 2.0 * first.shape[-1] - first, -xp.astype(ranks(rest, real), first.dtype))


class RereadBudget(CodedBudget):
    """Evicts caches together after a second reading, each KV head to its share of one total.

    A part of the total, `momentkv.policies.Twice.share`, goes where what the second reading looks for is largest in the
    whole model (`places_of` of `momentkv.policies.twice.largest_changes`). Each head keeps those tokens and ranks its
    others by what the continuation is expected to attend to. The rest of the total is shared so that the errors
    measured with that ranking become small, given what the second reading has chosen already.

    Parameters
    ----------
    caches : sequence of LayerCache
        With the policy `momentkv.policies.Twice`, made with ``keep_queries=True`` and one budget, the average.
    chooses_bits : bool
        See `CodedBudget`.

    Notes
    -----
    Derivation: docs/derivations/second-reading.md.

    Raises
    ------
    ValueError
        If the policy is another.
    """

    # More than without a second reading, whose tokens look for other things than the queries that errors are measured
    # with. Chosen on two texts and two models: docs/what-we-tried.md#auto-twice.
    eviction_counts = 16.0

    def __init__(self, caches: Sequence[LayerCache], *, chooses_bits: bool = False) -> None:
        super().__init__(caches, minimise_error, by_head=True, chooses_bits=chooses_bits)
        policy = caches[0].config.policy
        if not isinstance(policy, Twice):
            raise ValueError(f"policy is {policy.name!r}; budgets after a second reading are for policy='twice'")
        self.policy = policy

    @property
    def share(self) -> float:
        """Of the total, for what the second reading looks for; `take_share` changes it."""
        policy: Any = self.caches[0].config.policy  # a `Twice`, as at first
        share: float = policy.share
        return share

    def take_share(self, share: float) -> None:
        """Use another share than the policy has, until `reset`."""
        for cache in self.caches:
            cache.config = dataclasses.replace(cache.config, policy=dataclasses.replace(self.policy, share=share))

    def reset(self) -> None:
        """Back to the average for all, to tokens as they come, and to the policy's share."""
        super().reset()
        self.take_share(self.policy.share)

    def importance(self, cache: LayerCache) -> Array:
        """What `Twice` ranks tokens by that the second reading did not choose."""
        config = dataclasses.replace(cache.config, policy=Twice.beside)
        state = cache.stored_state
        known = config.correction.known(state.evicted)
        return importance_of(config, cache.view(), known, cache.attention_scale, state, newest=cache.newest_queries)

    def _evict(self, waiting: list[LayerCache], ranked: list[Array]) -> None:
        if not any(each.is_due for each in waiting):
            super()._evict(waiting, ranked)
            return
        ranked = [self.importance(each) if x is None else x for each, x in zip(waiting, ranked, strict=True)]
        scores = [looked_for(each) for each in waiting]
        shares = self.shares_with_bits(waiting, ranked, scores) if self.chooses_bits else None
        if shares is None:
            shares = self.shares(waiting, ranked, scores, self.tokens(waiting, ranked))
        for each, importance, budgets in zip(waiting, shares.importances, shares.budgets, strict=True):
            each.budgets = budgets
            each.evict(importance)

    def shares(
        self, waiting: Sequence[LayerCache], ranked: Sequence[Array], scores: Sequence[Array], average: int
    ) -> Shares:
        """What each head gets of so many tokens on average."""
        fixed, heads = waiting[0].config.protected, [each.view().keys.shape[-3] for each in waiting]
        total = (average - fixed) * sum(heads)
        places = iter(places_of(waiting, scores, max(sum(heads), math.floor(self.share * total))))
        chosen = [[next(places) for _ in range(number)] for number in heads]
        importances = [
            chosen_first(score, own, rest, competing(each))
            for each, score, own, rest in zip(waiting, scores, chosen, ranked, strict=True)
        ]
        more, error = extra_tokens(waiting, importances, chosen, total - sum(map(sum, chosen)), average)
        each_more = iter(more)
        budgets = [[fixed + count + next(each_more) for count in own] for own in chosen]
        return Shares(importances, budgets, error)

    def shares_with_bits(
        self, waiting: Sequence[LayerCache], ranked: Sequence[Array], scores: Sequence[Array]
    ) -> Shares | None:
        """What each head gets in the bits that make the measured errors least, which it is given.

        None where bits are chosen already, or nothing can be measured. What is left beside the tokens of the second
        reading differs from code to code, and so do these tokens: each code has error curves of its own.
        """
        if waiting[0].config.bits is not None:
            return None
        tokens = bought(waiting[0], self.average, self.beside)
        offered = {code: self.shares(waiting, ranked, scores, tokens(code)) for code in CODES}
        rounding = rounding_errors(waiting, offered[USUAL].importances, tokens(USUAL))
        errors = {
            code: self.eviction_counts * shares.error + added
            for (code, shares), added in zip(offered.items(), rounding, strict=True)
        }
        if not all(map(math.isfinite, errors.values())):
            return None
        best = min(errors, key=errors.__getitem__)
        for each in waiting:
            each.code(best)
        return offered[best]


class Shares(NamedTuple):
    """How a total is shared: what tokens are ranked by, the budgets of all heads, and the errors that they leave."""

    importances: list[Array]
    budgets: list[list[int]]
    error: float


def rounding_errors(caches: Sequence[LayerCache], importances: Sequence[Array], budget: int) -> list[float]:
    """What each of `CODES` adds to the measured errors of all heads, where each keeps so many tokens."""
    added = [0.0] * len(CODES)
    for cache, importance in zip(caches, importances, strict=True):
        curves, rounded = measured_errors(cache, [budget], importance, codes=CODES, at=budget)
        for (without,), *errors in zip(curves, *rounded, strict=True):
            if all(map(math.isfinite, [without, *errors])):
                added = [sum(pair) for pair in zip(added, (max(0.0, x - without) for x in errors), strict=True)]
    return added


def looked_for(cache: LayerCache) -> Array:
    """What a second reading looks for, such that it can be compared between heads and layers."""
    return largest_changes(cache.attention, cache.values, cache.positions >= 0)


def competing(cache: LayerCache) -> Array:
    """Which tokens may be evicted, bool (..., kv_head, n): neither sinks nor window."""
    positions, config = cache.positions, cache.config
    return (positions >= 0) & ~protected(positions, sinks=config.sinks, window=config.window)


def extra_tokens(
    caches: Sequence[LayerCache],
    importances: Sequence[Array],
    chosen: Sequence[Sequence[int]],
    total: int,
    average: int,
) -> tuple[list[int], float]:
    """Tokens for each head beside those that are chosen already, that make the sum of the measured errors small.

    And that sum, NaN where nothing can be measured.
    """
    heads = sum(map(len, chosen))
    fixed = caches[0].config.protected
    grid = sorted({max(fixed + 1, round(multiple * average)) for multiple in MULTIPLES})
    extras = sorted({round(part * average) for part in EXTRAS})
    counts = [count for own in chosen for count in own]
    curves = [
        curve
        for cache, importance in zip(caches, importances, strict=True)
        for curve in error_curves(cache, grid, importance)
    ]
    known = [place for place, curve in enumerate(curves) if all(map(math.isfinite, curve))]
    even = max(total, 0) // heads
    more = [even] * heads
    if not known:
        return more, math.nan
    offered = [[error_at(grid, curves[place], fixed + counts[place] + extra) for extra in extras] for place in known]
    left = max(total, 0) - even * (heads - len(known))
    for place, share in zip(known, share_budget(offered, extras, left), strict=True):
        more[place] = share
    return more, sum(error_at(grid, curves[place], fixed + counts[place] + more[place]) for place in known)
