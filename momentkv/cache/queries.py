"""What a layer remembers of recent queries: their mean and square, that corrections and policies are anchored by."""

from __future__ import annotations

import math
from typing import Any

from momentkv._array import Array, accumulate, array_namespace
from momentkv.attention import group_queries
from momentkv.cache.config import RECENT_QUERIES
from momentkv.statistics.summaries import QueryWindow

__all__ = ["gathers", "joined_judges", "judges_of", "query_window", "remember"]


def query_window(state: Any) -> QueryWindow | None:
    """The recent queries that a state remembers, as corrections take them."""
    if state is None or state.query_mean is None or state.query_square is None:
        return None
    xp = array_namespace(state.query_mean)
    variance = state.query_square - state.query_mean * state.query_mean
    return QueryWindow(state.query_mean, xp.maximum(variance, xp.zeros_like(variance)))


def gathers(cache: Any) -> bool:
    """Whether a `LayerCache` that was given new tokens keeps their queries to share budgets by."""
    return cache.shares_from is not None and cache.seen > cache.shares_from - RECENT_QUERIES


def judges_of(cache: Any) -> Array | None:
    """Queries to share budgets by, shape (..., kv_head, 32, d), once it is time to and there are so many."""
    judges = None if cache.state is None else cache.state.judges
    if judges is None or judges.shape[-2] < RECENT_QUERIES:
        return None
    return judges if cache.shares_from is not None and cache.seen >= cache.shares_from else None


def joined_judges(judges: Array | None, recent: Array, real: Array | None, kv_heads: int, first: int) -> Array:
    """The newest judges, given those before: of each token the query of one head of each group, in turn.

    One for each KV head takes a group's part of the memory that all would. Their errors average to the same.

    Parameters
    ----------
    judges : array, shape (..., kv_head, m, d), or None
    recent : array, shape (..., kv_head * group, n, d)
        Of the newest tokens.
    real : bool array, shape (..., kv_head, n), or None
        False for the query of padding; None where there is none.
    kv_heads : int
    first : int
        Where in the group to begin, counted round and round.

    Returns
    -------
    array, shape (..., kv_head, min(m + n, 32), d)

    Examples
    --------
    >>> import numpy as np
    >>> joined_judges(None, np.array([[[1.0], [2.0]], [[3.0], [4.0]]]), None, 1, 7).tolist()  # a group of two heads
    [[[3.0], [2.0]]]
    """
    xp = array_namespace(recent)
    count, group = recent.shape[-2], recent.shape[-3] // kv_heads
    grouped = xp.reshape(recent, (*recent.shape[:-3], kv_heads, group, *recent.shape[-2:]))
    own = xp.stack([grouped[..., (first + token) % group, token, :] for token in range(count)], axis=-2)
    if real is not None:  # padding judges nothing
        own = xp.where(real[..., None], own, xp.full_like(own, math.nan))
    own = own if judges is None else xp.concat([judges, own], axis=-2)
    return own[..., max(own.shape[-2] - RECENT_QUERIES, 0) :, :]


def remember(
    recent: Array, real: Array | None, kv_heads: int, scale: float, mean: Array | None, square: Array | None
) -> tuple[Array, Array]:
    """First and second moment of scaled recent queries, given those of the queries before them.

    Parameters
    ----------
    recent : array, shape (..., kv_head * group, m, d)
    real : bool array, shape (..., kv_head, m), or None
        False for the query of padding; None where there is none.
    kv_heads : int
    scale : float
    mean, square : array, shape (..., kv_head, d), or None
        Of the queries before.
    """
    xp = array_namespace(recent)
    count = recent.shape[-2]
    (grouped,) = accumulate(xp, group_queries(recent, kv_heads))
    grouped = xp.reshape(grouped, (*grouped.shape[:-2], -1, count, grouped.shape[-1])) * scale
    if real is not None:  # that of padding may be anything, also what times zero is not zero
        grouped = xp.where(real[..., None, :, None], grouped, xp.zeros_like(grouped))
    dtype = grouped.dtype
    if real is None or (count == 1 and mean is not None):
        new_mean, new_square = (xp.mean(x, axis=(-3, -2)) for x in (grouped, grouped * grouped))
        if mean is None or square is None:
            return new_mean, new_square
        # Several queries at once count alike; one by one, each fades what came before it. Without ``real``, something
        # did: rows that have seen nothing yet are told apart by their counts, and then there is a ``real``.
        share: Any = min(2.0 * count / RECENT_QUERIES, 1.0)
        if real is not None:
            weight = xp.astype(real, dtype)
            share = faded(share * weight, weight, square)
    else:
        weight = xp.astype(real, dtype)[..., None, :, None]
        number = xp.sum(weight, axis=(-3, -2))
        safe = xp.where(number > 0, number, xp.ones_like(number))
        new_mean, new_square = (
            xp.sum(weight * xp.mean(x, axis=-3, keepdims=True), axis=(-3, -2)) / safe
            for x in (grouped, grouped * grouped)
        )
        if mean is None or square is None:
            return new_mean, new_square
        share = xp.minimum(number * (2.0 / RECENT_QUERIES), xp.ones_like(number))
        share = faded(share, xp.ones_like(share), square)
    return mean + share * (new_mean - mean), square + share * (new_square - square)


def faded(share: Array, first: Array, square: Array) -> Array:
    """The share of new queries; ``first`` where all before was padding, so that there is nothing to fade."""
    xp = array_namespace(share, square)
    return xp.where(xp.sum(square, axis=-1, keepdims=True) > 0, share, first)
