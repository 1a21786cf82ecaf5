"""Who gets how many tokens after a second reading: what its scores choose in the whole model, then what errors say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from momentkv._array import Array, array_namespace, device
from momentkv.cache.allocation import (
    MULTIPLES,
    budget_grid,
    least_share,
    minimise_error,
    share_on_grids,
    up_to,
    water_level,
)
from momentkv.cache.coded_budget import CodedBudget
from momentkv.cache.competition import candidates, finite_rows, whole_shares, wins
from momentkv.cache.curves import error_at, error_curves
from momentkv.cache.eviction import importance_of
from momentkv.cache.layer import LayerCache
from momentkv.cache.shared_budget import AGAIN, LONGER
from momentkv.policies.select import protected
from momentkv.policies.turns import ranks
from momentkv.policies.twice import Twice, largest_changes

__all__ = ["RereadBudget", "by_threshold", "chosen_first", "places_of"]

# Budgets that errors are measured at, as multiples of the average.
WIDER = (*MULTIPLES, (16.0, 0.97))
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
    chooses_bits, while_decoding : bool
        See `CodedBudget`.

    Notes
    -----
    Derivation: docs/derivations/second-reading.md.

    Raises
    ------
    ValueError
        If the policy is another.
    """

    # The text has been asked what it needs: what its own queries foretell is all that its errors have to count.
    unforetold = 0.0

    def __init__(
        self, caches: Sequence[LayerCache], *, chooses_bits: bool = False, while_decoding: bool = True
    ) -> None:
        super().__init__(caches, minimise_error, by_head=True, chooses_bits=chooses_bits, while_decoding=while_decoding)
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
        for each, importance in zip(waiting, self.shared_out(waiting, ranked), strict=True):
            each.evict(importance)
        self.share_from(LONGER * waiting[0].seen)

    def judge(self, judges: Sequence[Array]) -> None:
        """Share by these queries of each cache, and evict."""
        ranked = [self.importance(each) for each in self.caches]
        for each, queries in zip(self.caches, judges, strict=True):
            each.newest_queries = queries
        importances = self.shared_out(self.caches, ranked)
        for each, importance in zip(self.caches, importances, strict=True):
            each.newest_queries = None  # of one head of a group: nothing is calibrated by them
            each.evict(importance, block=1)
        self.share_from(self.caches[0].seen + AGAIN)

    def shared_out(self, waiting: Sequence[LayerCache], ranked: Sequence[Array]) -> list[Array]:
        """Give the caches their budgets; what the tokens of each are to be evicted by."""
        config = waiting[0].config
        fixed = config.protected
        heads = [each.view().keys.shape[-3] for each in waiting]
        average = self.tokens(waiting, ranked)
        total = (average - fixed) * sum(heads)
        scores = [looked_for(each) for each in waiting]
        places = iter(places_of(waiting, scores, max(sum(heads), math.floor(self.share * total))))
        chosen = [[next(places) for _ in range(number)] for number in heads]
        importances = [
            chosen_first(score, own, rest, competing(each))
            for each, score, own, rest in zip(waiting, scores, chosen, ranked, strict=True)
        ]
        more = iter(extra_tokens(waiting, importances, chosen, total - sum(map(sum, chosen)), average))
        for each, own in zip(waiting, chosen, strict=True):
            each.budgets = [fixed + count + next(more) for count in own]
        return importances


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
) -> list[int]:
    """Tokens for each head beside those that are chosen already, that make the sum of the measured errors small.

    No head is left with less than its `least_share`, as far as the total goes.
    """
    heads = sum(map(len, chosen))
    if total < 1:
        return [0] * heads
    fixed, stored = caches[0].config.protected, [count for cache in caches for count in cache.stored_by_head]
    grid = budget_grid(average, fixed + 1, max(stored), WIDER)
    curves = [
        curve
        for cache, importance in zip(caches, importances, strict=True)
        for curve in error_curves(cache, grid, importance)
    ]
    counts = [fixed + count for own in chosen for count in own]
    finite = [all(map(math.isfinite, curve)) for curve in curves]
    even = total // heads
    every = zip(curves, counts, stored, finite, strict=True)
    known = [(curve, count, most) for curve, count, most, is_known in every if is_known]
    rest = total - even * (heads - len(known))
    level = least_share(average, fixed + 1, caches[0].seen)
    least = water_level([count for _, count, _ in known], rest, [level] * len(known))
    grids = [
        sorted({min(max(round(part * average), least - count), most - count) for part in EXTRAS})
        for _, count, most in known
    ]
    errors = [
        [error_at(*up_to(most, grid, curve), count + extra) for extra in extras]
        for (curve, count, most), extras in zip(known, grids, strict=True)
    ]
    shares = iter(share_on_grids(errors, grids, rest))
    return [next(shares) if is_known else even for is_known in finite]
