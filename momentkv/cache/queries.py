"""What a layer remembers of recent queries: their mean and square, that corrections and policies are anchored by."""

from __future__ import annotations

from typing import Any

from momentkv._array import Array, accumulate, array_namespace
from momentkv.attention import group_queries
from momentkv.cache.config import RECENT_QUERIES
from momentkv.statistics.summaries import QueryWindow

__all__ = ["query_window", "remember"]


def query_window(state: Any) -> QueryWindow | None:
    """The recent queries that a state remembers, as corrections take them."""
    if state is None or state.query_mean is None or state.query_square is None:
        return None
    xp = array_namespace(state.query_mean)
    variance = state.query_square - state.query_mean * state.query_mean
    return QueryWindow(state.query_mean, xp.maximum(variance, xp.zeros_like(variance)))


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
