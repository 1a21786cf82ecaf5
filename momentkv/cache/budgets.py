"""The error that each budget would cause in a layer or head, and the best parts of one total by these errors."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any

from momentkv._array import Array, array_namespace, device
from momentkv.attention import AttentionState, merge
from momentkv.backends import get_backend
from momentkv.cache.layer import LayerCache
from momentkv.policies.select import ranking

__all__ = ["budget_grid", "error_curve", "error_curves", "refine", "share_budget"]

# Budgets that errors are measured at, as multiples of the average, and steps between them that are interpolated.
MULTIPLES = (0.4, 1.0, 2.5, 6.25)
STEPS = 4


def budget_grid(average: int, least: int) -> list[int]:
    """Budgets to measure errors at: from 0.4 to 6.25 times the average, none below ``least``.

    Examples
    --------
    >>> budget_grid(100, 50)
    [50, 100, 250, 625]
    """
    return sorted({max(least, round(multiple * average)) for multiple in MULTIPLES})


def error_curves(cache: LayerCache, grid: Sequence[int], importance: Array | None = None) -> list[list[float]]:
    """Error that eviction to each budget would cause in each KV head for the newest queries, correction included.

    Mean over the group and the queries (and the rows of a batch) of the squared relative error of the output, against
    what the cache gives before the eviction (exact attention if nothing has been evicted yet). Tokens are ranked once
    for all budgets, as they are now; at a first eviction one summary stands in for several.

    Parameters
    ----------
    cache : LayerCache
        After `LayerCache.attend` of at least a window of queries, before `LayerCache.evict`; it is not changed.
    grid : sequence of int
        Budgets, rising.
    importance : array, shape (..., kv_head, n), optional
        `LayerCache.importance`, where it is known.

    Returns
    -------
    list of list of float
        A curve for each KV head.

    Raises
    ------
    ValueError
        If the cache holds no newest queries.

    Notes
    -----
    One pass over the tokens, whatever the number of budgets: what a larger budget retains beyond a smaller one is a
    segment of the ranking; attention over a budget is the merge of its segments, and what it evicts is folded segment
    by segment from the far end. Derivation: docs/derivations/eviction.md.
    """
    q = cache.newest_queries
    if q is None:
        raise ValueError(
            "the cache holds no newest queries to measure errors with: call error_curves between attend(q) of a whole "
            "window of queries and evict(), on a cache made with keep_queries=True"
        )
    backend = cache.backend or get_backend(q)
    xp = array_namespace(q)
    scale, n = cache.attention_scale, cache.stored
    order = ranking(
        cache.importance() if importance is None else importance,
        cache.positions,
        sinks=cache.sinks,
        window=cache.window,
        seen=cache.seen,
    )
    cuts = [0, *(min(budget, n) for budget in grid), n]
    segments = [ranked(cache, order[..., start:stop]) for start, stop in itertools.pairwise(cuts)]
    places = xp.arange(cache.seen - q.shape[-2], cache.seen, dtype=cache.positions.dtype, device=device(q))
    states = []
    for k, v, positions in segments:
        visible = (positions[..., None, :] <= places[:, None]) & (positions >= 0)[..., None, :]
        states.append(backend.attend(q, k, v, scale=scale, mask=visible[..., None, :, :])[0])
    # states[i] becomes attention over what the i-th budget retains.
    states = list(itertools.accumulate(states, merge))
    moments, correction = cache.moments, cache.correction
    if not cache.has_evicted:
        correction = correction.stand_in()
        moments = correction.empty(cache.keys, cache.values)

    def output(state: AttentionState, moments: Any, evicted: bool) -> Array:
        expansion = correction.expansion(moments) if evicted else None
        return state.out if expansion is None else backend.correct(state, q, expansion, scale=scale)

    exact = output(states[-1], moments, cache.has_evicted)
    norm = xp.sum(exact * exact, axis=-1)
    kv_heads = cache.keys.shape[-3]
    errors = []
    for budget, state, (k, v, positions) in zip(
        reversed(grid), reversed(states[:-1]), reversed(segments[1:]), strict=True
    ):
        if budget < n:
            moments = correction.fold(moments, k, v, mask=positions >= 0, window=cache.query_window)
        off = output(state, moments, cache.has_evicted or budget < n) - exact
        relative = xp.sum(off * off, axis=-1) / xp.where(norm > 0, norm, xp.ones_like(norm))
        by_head = xp.mean(
            xp.reshape(relative, (-1, kv_heads, relative.shape[-2] // kv_heads, q.shape[-2])), axis=(0, 2, 3)
        )
        errors.append([float(x) for x in by_head])
    return [list(curve) for curve in zip(*reversed(errors), strict=True)]


def ranked(cache: LayerCache, slots: Array) -> tuple[Array, Array, Array]:
    """Keys, values and positions of some slots of each head."""
    xp = array_namespace(slots)
    k, v = (xp.take_along_axis(x, slots[..., None], axis=-2) for x in (cache.keys, cache.values))
    return k, v, xp.take_along_axis(cache.positions, slots, axis=-1)


def error_curve(cache: LayerCache, grid: Sequence[int], importance: Array | None = None) -> list[float]:
    """`error_curves`, averaged over the KV heads: the curve of a layer."""
    return [sum(errors) / len(errors) for errors in zip(*error_curves(cache, grid, importance), strict=True)]


def refine(grid: Sequence[int], curve: Sequence[float]) -> tuple[list[int], list[float]]:
    """Put ``STEPS`` steps between the budgets of a grid, with errors interpolated as powers of the budget.

    Examples
    --------
    >>> refine([16, 256], [1.0, 0.0625])
    ([16, 32, 64, 128, 256], [1.0, 0.5, 0.25, 0.125, 0.0625])
    """
    # An error of zero has no logarithm; so small a one is as good.
    tiny = 1e-12
    budgets, errors = [grid[0]], [max(curve[0], tiny)]
    for (low, high), (first, last) in zip(itertools.pairwise(grid), itertools.pairwise(curve), strict=True):
        for step in range(1, STEPS + 1):
            budget = round(low * (high / low) ** (step / STEPS))
            if budget > budgets[-1]:
                position = math.log(budget / low) / math.log(high / low)
                budgets.append(budget)
                errors.append(max(first, tiny) ** (1 - position) * max(last, tiny) ** position)
    return budgets, errors


def share_budget(curves: Sequence[Sequence[float]], grid: Sequence[int], total: int) -> list[int]:
    """Budgets of layers that make the sum of their errors small, within a total.

    Greedy on the lower convex hull of each curve: always the step that takes away the most error a token; the last one
    gets what is left. Optimal for the hulls (docs/derivations/eviction.md).

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
    if total < grid[0] * len(curves):
        raise ValueError(
            f"total is {total}, but {len(curves)} layers need at least {grid[0]} tokens each; use a larger budget"
        )
    level = [0] * len(curves)
    budgets = [grid[0]] * len(curves)
    left = total - sum(budgets)
    queue: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        here, curve = level[layer], curves[layer]
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
        cost = min(grid[there] - grid[level[layer]], left)
        budgets[layer] += cost
        left -= cost
        level[layer] = there
        offer(layer)
    return budgets
