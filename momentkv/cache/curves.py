"""The error that each budget would cause in the heads of a layer, measured on the newest queries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from momentkv._array import Array, array_namespace, device
from momentkv._rows import take_rows
from momentkv.attention import AttentionState, merge
from momentkv.cache.by_heads import folded
from momentkv.cache.config import RECENT_QUERIES, CacheConfig
from momentkv.cache.layer import LayerCache
from momentkv.cache.packing import View, view_is_padded
from momentkv.codes import Standard
from momentkv.policies.select import protected, ranking

__all__ = ["error_at", "error_curve", "error_curves", "measured_errors"]


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
    return measured_errors(cache, grid, importance)[0]


def measured_errors(
    cache: LayerCache,
    grid: Sequence[int],
    importance: Array | None = None,
    *,
    codes: Sequence[tuple[int, int]] = (),
    at: int | None = None,
    layers: int = 1,
) -> tuple[list[list[float]], list[list[float]]]:
    """`error_curves`, and for each code the errors of all KV heads where retained tokens are rounded as well.

    ``codes`` are bits of keys and of values, ``at`` the budget of the grid that they are measured at. The heads may be
    those of several ``layers``, as many of each (`momentkv.cache.joining.joined_state`).
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
    places = places_of_queries(cache, view, q.shape[-2])
    # Where no slot is empty and the window has every judge, all else came before them. Heads that retain fewer tokens
    # than others have empty slots.
    whole = state.layout.equal and not view_is_padded(state, cache.new)
    earlier = whole and config.window >= q.shape[-2]

    def attended(k: Array, v: Array, positions: Array, *, first: int = 0) -> AttentionState:
        """Over tokens by rank, of which those before ``first`` have a higher one."""
        near = config.protected - first if earlier else k.shape[-2]
        if near <= 0:
            return backend.attend(q, k, v, scale=scale)[0]
        if near < k.shape[-2]:
            # A mask that hides nothing takes a CPU as long as all else.
            hidden, seen = (
                (k[..., own, :], v[..., own, :], positions[..., own]) for own in (slice(near), slice(near, None))
            )
            return merge(attended(*hidden, first=first), attended(*seen, first=first + near))
        visible = (positions[..., None, :] <= places) & (positions >= 0)[..., None, :]
        return backend.attend(q, k, v, scale=scale, mask=visible[..., None, :, :])[0]

    # states[i] is attention over what the i-th budget retains; the first has all of the window.
    parts = (attended(*segment, first=cut) for cut, segment in zip(cuts, segments, strict=False))
    states = list(itertools.accumulate(parts, merge))
    evicted, correction = state.evicted, config.correction
    if not state.has_evicted:
        correction = correction.stand_in()
        evicted = correction.empty(view.keys, view.values)

    def output(state: AttentionState, expansion: Any) -> Array:
        return state.out if expansion is None else backend.correct(state, q, expansion, scale=scale)

    exact = output(states[-1], correction.expansion(evicted) if state.has_evicted else None)
    squares = xp.sum(exact * exact, axis=-1)
    of_layers = xp.mean(xp.reshape(squares, (*squares.shape[:-2], layers, -1)), axis=-1)
    norm = xp.repeat(of_layers, squares.shape[-2] // layers, axis=-1)[..., None]
    kv_heads, window = view.keys.shape[-3], cache.query_window

    def error(state: AttentionState, expansion: Any) -> Array:
        """Of each row and KV head, shape (row, kv_head)."""
        off = output(state, expansion) - exact
        relative = xp.sum(off * off, axis=-1) / xp.where(norm > 0, norm, xp.ones_like(norm))
        of_heads = xp.reshape(relative, (-1, kv_heads, relative.shape[-2] // kv_heads, q.shape[-2]))
        return xp.mean(of_heads, axis=(2, 3))

    errors, rounded = list[Array](), list[Array]()
    for budget, kept, (k, v, positions) in zip(
        reversed(grid), reversed(states[:-1]), reversed(segments[1:]), strict=True
    ):
        if budget < n:
            evicted = folded(correction, evicted, k, v, mask=positions >= 0, window=window)
        expansion = correction.expansion(evicted) if state.has_evicted or budget < n else None
        errors.append(error(kept, expansion))
        if budget == at:
            real = None if whole else view.positions >= 0
            tokens = rounded_tokens(view, real, order[..., : min(budget, n)], codes, config, state.query_square)
            rounded = [error(attended(*each), expansion) for each in tokens]
    by_row = xp.stack([*errors[::-1], *rounded])  # (budget or code, row, kv_head)
    counts = xp.all(xp.isfinite(by_row), axis=(0, 2))[:, None]
    number = xp.sum(xp.astype(counts, by_row.dtype))
    mean = xp.sum(xp.where(counts, by_row, xp.zeros_like(by_row)), axis=1) / xp.where(number > 0, number, number + 1)
    mean = xp.where(number > 0, mean, xp.full_like(mean, math.nan))
    numbers = [[float(mean[place, head]) for head in range(kv_heads)] for place in range(mean.shape[0])]
    return [list(curve) for curve in zip(*numbers[: len(grid)], strict=True)], numbers[len(grid) :]


def places_of_queries(cache: LayerCache, view: View, count: int) -> Array:
    """Place in the sequence of each newest query, shape (..., count, 1); -1 for padding, which sees nothing."""
    if cache.new is not None and cache.new.length >= count:
        return view.positions[..., -count:, None]
    # Gathered while decoding: of the newest tokens, not all of which need be stored. Those of padding are NaN.
    xp = array_namespace(view.positions)
    newest = xp.arange(cache.seen - count, cache.seen, dtype=view.positions.dtype, device=device(view.positions))
    return newest[:, None]


def rounded_tokens(
    view: View,
    real: Array | None,
    slots: Array,
    codes: Sequence[tuple[int, int]],
    config: CacheConfig,
    queries: Array | None,
) -> Iterator[tuple[Array, Array, Array]]:
    """For each code, keys, values and positions of some slots as they are read; sinks and the newest stay exact.

    ``real`` says which slots of the view hold a token, None that all do.
    """
    xp = array_namespace(slots)
    keys, values, positions = ranked(view, slots)
    plain = Standard.of(view.keys, real), Standard.of(view.values, real, centred=False)
    kept = protected(view.positions, sinks=config.sinks, window=config.exact_with(codes) - config.sinks)
    exact, backend = xp.take_along_axis(kept, slots, axis=-1), config.backend_of(keys)
    for bits in codes:
        standards = plain[0].graded(bits[0], queries), plain[1]
        read = (backend.rounded(*each, exact) for each in zip((keys, values), standards, bits, strict=True))
        yield (*read, positions)


def ranked(view: View, slots: Array) -> tuple[Array, Array, Array]:
    """Keys, values and positions of some slots of each head."""
    xp = array_namespace(slots)
    k, v = (take_rows(x, slots) for x in (view.keys, view.values))
    return k, v, xp.take_along_axis(view.positions, slots, axis=-1)


def error_curve(cache: LayerCache, grid: Sequence[int], importance: Array | None = None) -> list[float]:
    """`error_curves`, averaged over the KV heads: the curve of a layer."""
    return [sum(errors) / len(errors) for errors in zip(*error_curves(cache, grid, importance), strict=True)]


def error_at(grid: Sequence[int], curve: Sequence[float], budget: int) -> float:
    """The error at a budget, as a power of it between budgets of the grid; at the ends it does not change.

    Towards an error of zero, which is no power, it falls in proportion.

    Examples
    --------
    >>> error_at([16, 64], [1.0, 0.25], 32), error_at([16, 64], [1.0, 0.25], 8), error_at([16, 64], [1.0, 0.0], 40)
    (0.5, 1.0, 0.5)
    """
    if budget <= grid[0]:
        return curve[0]
    for (low, high), (first, last) in zip(itertools.pairwise(grid), itertools.pairwise(curve), strict=True):
        if budget <= high:
            if not last > 0:
                return first * (high - budget) / (high - low) if last == 0 else math.nan
            part = math.log(budget / low) / math.log(high / low)
            return first ** (1 - part) * last**part
    return curve[-1]
