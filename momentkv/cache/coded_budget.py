"""How many bits retained tokens get, where a budget is in bytes: few bits for many tokens, or many for few."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from momentkv._array import Array, array_namespace
from momentkv.cache.allocation import budget_grid, least_share, refine, share_budget
from momentkv.cache.budget_rules import tokens_bought
from momentkv.cache.curves import error_at, measured_errors
from momentkv.cache.layer import LayerCache
from momentkv.cache.shared_budget import Rule, SharedBudget
from momentkv.codes import USUAL, pair_of_bits, record_bytes

__all__ = ["CODES", "EVICTION_COUNTS", "UNFORETOLD", "CodedBudget", "chosen_code", "expected_error", "shared_error"]

# Bits of keys and of values that are offered, in the order of their bytes.
CODES = tuple(map(pair_of_bits, (3, (4, 3), 4, (5, 4), 5, 6, 8)))
# How many times as much an error of eviction counts as one of rounding that is as large for the newest queries.
# Rounding errs in another direction for each token, head and layer, so that much of it cancels; eviction does not.
EVICTION_COUNTS = 8.0
# The part of later outputs that is of tokens which nothing in the newest queries foretold, anywhere in the text.
UNFORETOLD = 0.02
# Both were chosen on eight texts and two models: docs/what-we-tried.md#auto.


class CodedBudget(SharedBudget):
    """Evicts caches together, within the bytes of a budget at full precision if they choose their bits.

    Parameters
    ----------
    caches, rule, by_head, while_decoding
        As `SharedBudget` takes them.
    chooses_bits : bool
        Whether the average is in tokens as they came, whose bytes are spent on tokens of few bits once they do not do:
        of as many bits as make the measured errors least, the same for all caches. What fits as it came stays so.

    Attributes
    ----------
    beside : int
        Bytes of a token beside its key and value that then count.
    unforetold : float
        See `chosen_code`.
    """

    unforetold = UNFORETOLD

    def __init__(
        self,
        caches: Sequence[LayerCache],
        rule: Rule,
        *,
        by_head: bool,
        chooses_bits: bool,
        while_decoding: bool = True,
    ) -> None:
        super().__init__(caches, rule, by_head=by_head, while_decoding=while_decoding)
        self.chooses_bits, self.beside = chooses_bits, 0

    @property
    def can_share(self) -> bool:
        """Whether bits are known: at a first eviction while decoding there is too little to choose them by."""
        return not self.chooses_bits or self.caches[0].config.bits is not None

    def prepare(self, cache: LayerCache) -> None:
        """Choose the bits of a cache whose first tokens go while decoding, or whose steps are static from now on."""
        if self.chooses_bits and cache.config.bits is None and (cache.is_due or cache.config.static):
            # There are no queries to measure with, or no errors.
            cache.code(USUAL)
            cache.budget = bought(cache, self.average, self.beside)(USUAL)

    def _evict(self, waiting: list[LayerCache], ranked: list[Array]) -> None:
        if not any(each.is_due for each in waiting):
            for each in waiting:
                self.prepare(each)
        super()._evict(waiting, ranked)

    def tokens(self, waiting: Sequence[LayerCache], importances: Sequence[Array]) -> int:
        """Tokens that each KV head may retain on average, in the bits that are chosen for them now."""
        if not self.chooses_bits:
            return super().tokens(waiting, importances)
        code, tokens = chosen_code(waiting, importances, self.average, beside=self.beside, unforetold=self.unforetold)
        for each in waiting:
            each.code(code)
        return tokens

    def reset(self) -> None:
        """Back to the average for all, and to tokens as they come."""
        super().reset()
        if self.chooses_bits:
            for cache in self.caches:
                cache.config = dataclasses.replace(cache.config, bits=None)


def bought(cache: LayerCache, average: int, beside: int) -> Callable[[tuple[int, int]], int]:
    """From a code to the tokens of it that a KV head gets for the bytes of an average at full precision."""
    config, state = cache.config, cache.stored_state
    k, v = state.recent_keys, state.recent_values
    d, dv = k.shape[-1], v.shape[-1]
    return lambda code: tokens_bought(
        average,
        exact=config.exact_with(USUAL),
        token=d * k.dtype.itemsize + dv * v.dtype.itemsize + beside,
        record=record_bytes(d, dv, code) + beside,
        least=config.protected + 1,
    )


def chosen_code(
    caches: Sequence[LayerCache],
    importances: Sequence[Array],
    average: int,
    *,
    beside: int = 0,
    unforetold: float = UNFORETOLD,
) -> tuple[tuple[int, int], int]:
    """The code that makes the errors to be expected least within the bytes of a budget at full precision.

    Parameters
    ----------
    caches : sequence of LayerCache
        After the attention of a prefill, before its eviction, made with ``keep_queries=True``. If they have a code
        already, it is returned.
    importances : sequence of array, shape (..., kv_head, n)
        Of each cache, `LayerCache.importance`.
    average : int
        Tokens for each KV head on average, as they came.
    beside : int
        Bytes of a token beside its key and value that count.
    unforetold : float
        Part of later outputs that is of tokens which the newest queries do not foretell.

    Returns
    -------
    code : tuple of int
        Bits of keys and of values.
    tokens : int
        As many as take the bytes of the average, sinks and window included, which stay exact.

    Notes
    -----
    Rows of a batch whose errors are not finite have no say; where none has finite ones, it is 5 bits for keys and 3 for
    values. Derivation: docs/derivations/codes.md.
    """
    config = caches[0].config
    tokens = bought(caches[0], average, beside)
    if config.bits is not None:
        return config.bits, tokens(config.bits)
    grid = budget_grid(tokens(USUAL), config.protected + 1, importances[0].shape[-1])
    eviction, rounding = list[list[float]](), [0.0] * len(CODES)
    for cache, importance in zip(caches, importances, strict=True):
        curves, rounded = measured_errors(cache, grid, importance, codes=CODES, at=tokens(USUAL))
        for curve, *errors in zip(curves, *rounded, strict=True):
            if all(map(math.isfinite, curve)):
                eviction.append(curve)
                without = curve[grid.index(tokens(USUAL))]
                rounding = [sum(pair) for pair in zip(rounding, (max(0.0, x - without) for x in errors), strict=True)]
    if not eviction:
        return USUAL, tokens(USUAL)
    read = tokens_read(caches[0])
    errors = [
        expected_error(
            shared_error(grid, eviction, tokens(code), least_share(tokens(code), config.protected + 1, caches[0].seen)),
            rounded,
            unforetold=unforetold * len(eviction),
            kept=tokens(code) / read,
        )
        for code, rounded in zip(CODES, rounding, strict=True)
    ]
    best = CODES[errors.index(min(errors))]
    return best, tokens(best)


def tokens_read(cache: LayerCache) -> float:
    """Tokens that a row has stored, in mean over the rows of a batch."""
    positions = cache.view().positions
    xp = array_namespace(positions)
    return float(xp.sum(positions >= 0)) / math.prod(positions.shape[:-1])


def shared_error(grid: Sequence[int], eviction: Sequence[Sequence[float]], average: int, least: int) -> float:
    """What the errors of eviction of all heads amount to, shared as well as can be, with ``least`` for each at least.

    Examples
    --------
    >>> round(shared_error([10, 20, 40], [[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]], 25, 10), 6)
    0.25
    >>> round(shared_error([10, 20, 40], [[1.0, 0.5, 0.25], [0.0, 0.0, 0.0]], 25, 20), 6)
    0.333333
    """
    fine, _ = refine(grid, eviction[0], least)
    curves = [refine(grid, curve, least)[1] for curve in eviction]
    total = max(average, fine[0]) * len(curves)
    shares = share_budget(curves, fine, total)
    return sum(map(error_at, [fine] * len(curves), curves, shares))


def expected_error(
    evicted: float, rounded: float, *, unforetold: float, kept: float, eviction_counts: float = EVICTION_COUNTS
) -> float:
    """What later queries lose, to be compared between codes, from the errors of the newest ones.

    Parameters
    ----------
    evicted, rounded : float
        Errors of eviction and of rounding, summed over heads.
    unforetold : float
        For all heads together, the part of later outputs that is of tokens which nothing foretold.
    kept : float
        Part of the tokens read that is retained.
    eviction_counts : float

    Examples
    --------
    >>> expected_error(0.25, 3.0, unforetold=2.0, kept=0.75)
    5.5
    """
    return eviction_counts * evicted + rounded + unforetold * max(0.0, 1 - kept)
