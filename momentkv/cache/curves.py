"""The error that each budget would cause in the heads of a layer, measured on the newest queries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from momentkv._array import Array, array_namespace, take_rows
from momentkv.attention import AttentionState, merge
from momentkv.cache.config import RECENT_QUERIES
from momentkv.cache.layer import LayerCache
from momentkv.cache.packing import View
from momentkv.policies.select import ranking

__all__ = ["error_curve", "error_curves"]


def error_curves(cache: LayerCache, grid: Sequence[int], importance: Array | None = None) -> list[list[float]]:
    """Error that eviction to each budget would cause in each KV head for the newest queries, correction included.

    Squared error of the output, against what the cache gives before the eviction (exact attention if nothing has been
    evicted yet), in mean over the group and the queries, as a part of the mean squared output of all heads of the
    layer; then the mean over the rows of a batch whose errors are all finite, NaN if none has such. So a head counts
    for as much as it says: the mean over heads is the relative error of the layer. Tokens are ranked once for all
    budgets, as they are now; at a first eviction one summary stands in for several.

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
    q = q[..., max(q.shape[-2] - RECENT_QUERIES, 0) :, :]
    config, state, view = cache.config, cache.stored_state, cache.view()
    backend = config.backend_of(q)
    xp = array_namespace(q)
    scale, n = cache.attention_scale, view.keys.shape[-2]
    order = ranking(
        cache.importance() if importance is None else importance,
        view.positions,
        sinks=config.sinks,
        window=config.window,
    )
    cuts = [0, *(min(budget, n) for budget in grid), n]
    segments = [ranked(view, order[..., start:stop]) for start, stop in itertools.pairwise(cuts)]
    places = view.positions[..., -q.shape[-2] :, None]  # a query of padding sees nothing
    states = []
    for k, v, positions in segments:
        visible = (positions[..., None, :] <= places) & (positions >= 0)[..., None, :]
        states.append(backend.attend(q, k, v, scale=scale, mask=visible[..., None, :, :])[0])
    # states[i] becomes attention over what the i-th budget retains.
    states = list(itertools.accumulate(states, merge))
    evicted, correction = state.evicted, config.correction
    if not state.has_evicted:
        correction = correction.stand_in()
        evicted = correction.empty(view.keys, view.values)

    def output(state: AttentionState, evicted: Any, some: bool) -> Array:
        expansion = correction.expansion(evicted) if some else None
        return state.out if expansion is None else backend.correct(state, q, expansion, scale=scale)

    exact = output(states[-1], evicted, state.has_evicted)
    norm = xp.mean(xp.sum(exact * exact, axis=-1), axis=(-2, -1), keepdims=True)
    kv_heads, window = view.keys.shape[-3], cache.query_window
    errors = []
    for budget, attended, (k, v, positions) in zip(
        reversed(grid), reversed(states[:-1]), reversed(segments[1:]), strict=True
    ):
        if budget < n:
            evicted = correction.fold(evicted, k, v, mask=positions >= 0, window=window)
        off = output(attended, evicted, state.has_evicted or budget < n) - exact
        relative = xp.sum(off * off, axis=-1) / xp.where(norm > 0, norm, xp.ones_like(norm))
        of_heads = xp.reshape(relative, (-1, kv_heads, relative.shape[-2] // kv_heads, q.shape[-2]))
        errors.append(xp.mean(of_heads, axis=(2, 3)))
    by_row = xp.stack(errors[::-1])  # (budget, row, kv_head)
    counts = xp.all(xp.isfinite(by_row), axis=(0, 2))[:, None]
    number = xp.sum(xp.astype(counts, by_row.dtype))
    mean = xp.sum(xp.where(counts, by_row, xp.zeros_like(by_row)), axis=1) / xp.where(number > 0, number, number + 1)
    mean = xp.where(number > 0, mean, xp.full_like(mean, math.nan))
    return [[float(mean[budget, head]) for budget in range(len(grid))] for head in range(kv_heads)]


def ranked(view: View, slots: Array) -> tuple[Array, Array, Array]:
    """Keys, values and positions of some slots of each head."""
    xp = array_namespace(slots)
    k, v = (take_rows(x, slots) for x in (view.keys, view.values))
    return k, v, xp.take_along_axis(view.positions, slots, axis=-1)


def error_curve(cache: LayerCache, grid: Sequence[int], importance: Array | None = None) -> list[float]:
    """`error_curves`, averaged over the KV heads: the curve of a layer."""
    return [sum(errors) / len(errors) for errors in zip(*error_curves(cache, grid, importance), strict=True)]
