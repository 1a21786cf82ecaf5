"""Who gets how many tokens: rules that give the layers or KV heads of a model their parts of one total."""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Literal

from momentkv._array import Array
from momentkv.cache.competition import whole_shares
from momentkv.cache.curves import error_at, error_curves
from momentkv.cache.layer import LayerCache

__all__ = [
    "Sharing",
    "budget_grid",
    "least_errors",
    "least_share",
    "minimise_error",
    "pyramid_budgets",
    "refine",
    "share_budget",
    "share_on_grids",
    "up_to",
    "water_level",
]

Sharing = Literal["uniform", "layers", "heads", "layer-heads", "ada-kv", "kvzip", "pyramid"]
# Budgets that errors are measured at, as multiples of the average, each with the share of the tokens beyond the
# average that it takes at most; and steps between them that are interpolated.
MULTIPLES = ((0.4, 0.0), (1.0, 0.0), (2.5, 0.6), (6.25, 0.9))
STEPS = 4
# How many times fewer tokens than the average PyramidKV gives to the last layer, as in its paper.
STEEPNESS = 20


def minimise_error(
    caches: Sequence[LayerCache], importances: Sequence[Array], average: int, by_head: bool
) -> list[int]:
    """Shares that make the sum of the measured errors small; see docs/derivations/eviction.md.

    Parameters
    ----------
    caches : sequence of LayerCache
        After the attention of a prefill, before its eviction.
    importances : sequence of array, shape (..., kv_head, n)
        Of each cache, `LayerCache.importance`.
    average : int
        Tokens for each share on average.
    by_head : bool
        Whether each KV head has a share, or each cache one.

    Returns
    -------
    list of int
        A budget for each share; their sum is at most ``average`` for each.

    Notes
    -----
    Rows of a batch whose errors are not finite are left out. If no row has finite errors, each share is the average.
    """
    grid = budget_grid(average, caches[0].config.protected + 1, max(importance.shape[-1] for importance in importances))
    measured = [error_curves(cache, grid, importance) for cache, importance in zip(caches, importances, strict=True)]
    return least_errors(caches, grid, measured, average, by_head)


def least_errors(
    caches: Sequence[LayerCache],
    grid: Sequence[int],
    curves_of: Sequence[list[list[float]]],
    average: int,
    by_head: bool,
) -> list[int]:
    """`minimise_error`, given the curves of the heads of each cache at the budgets of a grid."""
    least = least_share(average, caches[0].config.protected + 1, caches[0].seen)
    grids, curves, is_known = list[list[int]](), list[list[float]](), list[bool]()
    for cache, measured in zip(caches, curves_of, strict=True):
        held = cache.stored_by_head
        if not by_head:
            measured = [[sum(errors) / len(errors) for errors in zip(*measured, strict=True)]]
            held = [max(held)]
        for curve, most in zip(measured, held, strict=True):
            is_known.append(all(map(math.isfinite, curve)))
            if is_known[-1]:
                fine, refined = refine(*up_to(most, grid, curve), min(least, most))
                grids.append(fine)
                curves.append(refined)
    total = average * len(curves)
    shares = share_on_grids(curves, grids, total)
    # What all that is held leaves over is room to come.
    spare = (total - sum(shares)) // max(1, len(shares)) if shares == [fine[-1] for fine in grids] else 0
    rest = iter(shares)
    return [next(rest) + spare if known else average for known in is_known]


def up_to(most: int, grid: Sequence[int], curve: Sequence[float]) -> tuple[list[int], list[float]]:
    """A curve of a head that holds ``most`` tokens: with all of them it errs by nothing, and cannot use more.

    Examples
    --------
    >>> up_to(300, [100, 250, 625], [0.5, 0.1, 0.0]), up_to(900, [100, 250, 625], [0.5, 0.1, 0.02])
    (([100, 250, 300], [0.5, 0.1, 0.0]), ([100, 250, 625], [0.5, 0.1, 0.02]))
    """
    if most >= grid[-1]:
        return list(grid), list(curve)
    below = [budget for budget in grid if budget < most]
    return [*below, most], [*curve[: len(below)], 0.0]


def pyramid_budgets(average: int, layers: int, *, sinks: int = 1, window: int = 32) -> list[int]:
    r"""PyramidKV: budgets that fall linearly from the first layer to the last.

    With free budget $b$ (the average less sinks and window), the last of the layers gets $b / \beta$
    beside sinks and window, the first $2b - b / \beta$; $\beta = 20$.

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


def budget_grid(average: int, least: int, read: int, multiples: Sequence[tuple[float, float]] = MULTIPLES) -> list[int]:
    """Budgets to measure errors at: from 0.4 to 6.25 times the average, none below ``least``.

    Where that is more than the tokens that there are, ``read``, the last one is all of them, which err by nothing; and
    those before keep away from it. For an error of next to nothing says little of what fewer tokens lose.

    Examples
    --------
    >>> budget_grid(100, 50, 4000)
    [50, 100, 250, 625]
    >>> budget_grid(1600, 50, 4000)
    [640, 1600, 3040, 3760, 4000]
    """
    beyond = max(0, read - average)
    points = {
        max(least, round(min(multiple * average, average + share * beyond) if multiple > 1 else multiple * average))
        for multiple, share in multiples
    }
    return sorted(points | {read} if multiples[-1][0] * average > read > average else points)


def least_share(average: int, least: int, seen: int) -> int:
    """What each share gets in any case: that part of the average which the average is of all tokens ``seen``.

    Not below ``least``. For the newest queries do not show all that a head is needed for: where little is retained,
    heads may differ much, and little where much is.

    Examples
    --------
    >>> least_share(400, 50, 4000), least_share(2000, 50, 4000)
    (50, 1000)
    """
    return max(least, round(min(1.0, average / seen) * average))


def refine(grid: Sequence[int], curve: Sequence[float], least: int | None = None) -> tuple[list[int], list[float]]:
    """Put ``STEPS`` steps between the budgets of a grid, with errors interpolated as by `error_at`.

    They begin at the first of the grid, or at ``least``.

    Examples
    --------
    >>> refine([16, 256], [1.0, 0.0625])
    ([16, 32, 64, 128, 256], [1.0, 0.5, 0.25, 0.125, 0.0625])
    >>> refine([16, 256], [1.0, 0.0625], 8)[0], refine([16, 256], [1.0, 0.0625], 100)[0]
    ([8, 16, 32, 64, 128, 256], [100, 128, 256])
    """
    first = grid[0] if least is None else least
    budgets = {first, *grid}
    for low, high in itertools.pairwise(grid):
        budgets |= {round(low * (high / low) ** (step / STEPS)) for step in range(1, STEPS)}
    fine = sorted(budget for budget in budgets if budget >= first)
    return fine, [error_at(grid, curve, budget) for budget in fine]


def share_budget(curves: Sequence[Sequence[float]], grid: Sequence[int], total: int) -> list[int]:
    """Budgets of layers that make the sum of their errors small, within a total: `share_on_grids` on one grid for all.

    Parameters
    ----------
    curves : sequence of sequence of float
        Error of each layer at each budget of the grid.
    grid : sequence of int
        Budgets, rising.
    total : int
        Tokens to share; at least ``grid[0]`` for every layer.

    Returns
    -------
    list of int
        Their sum is at most ``total``; none is above ``grid[-1]``.

    Raises
    ------
    ValueError
        If the total is too small.

    Examples
    --------
    >>> share_budget([[1.0, 0.2, 0.05], [0.5, 0.4, 0.3]], [10, 20, 40], 60)
    [40, 20]
    """
    return share_on_grids(curves, [grid] * len(curves), total)


def share_on_grids(curves: Sequence[Sequence[float]], grids: Sequence[Sequence[int]], total: int) -> list[int]:
    """`share_budget` where each layer has budgets of its own to choose from.

    Greedy on the lower convex hull of each curve: always the step that removes the most error per token; the last step
    gets what is left, and what lowers no error any more goes to those that have least. Optimal for the hulls
    (docs/derivations/eviction.md).

    Examples
    --------
    >>> share_on_grids([[1.0, 0.2, 0.05], [0.5]], [[10, 20, 40], [5]], 60)
    [40, 5]
    """
    level = [0] * len(curves)
    budgets = [grid[0] for grid in grids]
    left = total - sum(budgets)
    if left < 0:
        raise ValueError(
            f"total is {total}, but {len(curves)} layers need at least {sum(budgets)} tokens together; use a larger "
            "budget"
        )
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        here, curve, grid = level[layer], curves[layer], grids[layer]
        steps = [
            ((curve[here] - curve[there]) / (grid[there] - grid[here]), -there) for there in range(here + 1, len(grid))
        ]
        if steps:
            gain, there = max(steps)
            heapq.heappush(queue, (-gain, layer, -there))

    for layer in range(len(curves)):
        offer(layer)
    while queue and left > 0:
        gain, layer, there = heapq.heappop(queue)
        if gain >= 0:
            break
        cost = min(grids[layer][there] - grids[layer][level[layer]], left)
        budgets[layer] += cost
        left -= cost
        level[layer] = there
        offer(layer)
    # What lowers no error is not thrown away: it fills those that have least.
    even = water_level(budgets, left, [grid[-1] for grid in grids])
    return [max(budget, min(even, grid[-1])) for budget, grid in zip(budgets, grids, strict=True)]


def water_level(counts: Sequence[int], total: int, tops: Sequence[int]) -> int:
    """The level up to which a total fills heads that have some tokens each, none of them above its top.

    Examples
    --------
    >>> water_level([10, 30, 80], 30, [100] * 3), water_level([10, 30, 80], 30, [20, 100, 100])
    (35, 50)
    """

    def taken(level: int) -> int:
        return sum(max(0, min(level, top) - count) for count, top in zip(counts, tops, strict=True))

    return bisect.bisect_right(range(max(tops, default=0) + 1), total, key=taken) - 1
