"""Eviction: which tokens of a layer go, what they are folded into, and the state that is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from momentkv._array import Array, accumulation_dtype, array_namespace, concrete, device
from momentkv.attention import group_queries
from momentkv.backends import get_backend
from momentkv.backends.layout import Layout
from momentkv.cache.by_heads import calibrated, folded, gathered, importance_by_heads, name_of
from momentkv.cache.config import RECENT_QUERIES, CacheConfig
from momentkv.cache.given import as_given
from momentkv.cache.losses import EVICTED, choose_lost, losses_of, with_lost
from momentkv.cache.packing import View, repack, view_is_padded, view_of, widths_of
from momentkv.cache.queries import query_window
from momentkv.cache.recoding import renewal
from momentkv.cache.state import LayerState, NewTokens
from momentkv.policies import Tokens
from momentkv.policies.select import kept
from momentkv.trust import trust_of

__all__ = ["Totals", "evicted_state", "importance_of", "kept_by_rank"]


class Totals:
    """Tokens of each KV head as the host knows them: the least and the most of any row.

    Where no row is padded the host knows them without asking; otherwise it asks once.
    """

    def __init__(self, state: LayerState | None, new: NewTokens | None, heads: int) -> None:
        if not view_is_padded(state, new):
            stored = [0] * heads if state is None else [width + state.filled for width in state.layout.widths]
            self.most = self.least = [n + (0 if new is None else new.length) for n in stored]
            return
        counts: Any = 0 if state is None else state.counts + state.recent_count
        if new is not None:
            xp = array_namespace(new.positions)
            counts = counts + xp.sum(xp.astype(new.positions >= 0, xp.int32), axis=-1, dtype=xp.int32)
        xp = array_namespace(counts)
        rows = xp.reshape(counts, (-1, heads))
        self.most, self.least = ([int(x) for x in f(rows, axis=0)] for f in (xp.max, xp.min))

    @classmethod
    def of_kept(cls, kept: Array) -> Totals:
        """Of the tokens that a mask (..., kv_head, n) keeps."""
        xp = array_namespace(kept)
        totals = object.__new__(cls)
        rows = xp.reshape(xp.sum(xp.astype(kept, xp.int32), axis=-1, dtype=xp.int32), (-1, kept.shape[-2]))
        totals.most, totals.least = ([int(x) for x in f(rows, axis=0)] for f in (xp.max, xp.min))
        return totals

    def after(self, budgets: Sequence[int], block: int) -> Totals:
        """Those that an eviction to these budgets leaves."""
        left = object.__new__(Totals)
        left.most, left.least = list(self.most), list(self.least)
        for head, budget in enumerate(budgets):
            full = budget + block
            if self.most[head] >= full:
                # A row that is not full yet keeps all that it has.
                left.most[head] = budget if self.least[head] >= full else full - 1
                left.least[head] = min(budget, self.least[head])
        return left

    @property
    def even(self) -> bool:
        """Whether all rows have as many."""
        return self.most == self.least


def importance_of(
    config: CacheConfig,
    view: View,
    known: Any,
    scale: float,
    state: LayerState | None,
    *,
    newest: Array | None = None,
    ask: bool = True,
) -> Array:
    """The policy's ranking of the tokens of a view, shape (..., kv_head, n).

    Raises
    ------
    ValueError
        If the policy gives anything else, or NaN for a token for no reason; of that nothing is known unless the device
        may be asked.
    """
    xp = array_namespace(view.keys)
    attention = view.attention
    if attention is None:
        attention = xp.zeros(view.positions.shape, dtype=known.weight.dtype, device=device(view.positions))
    window = query_window(state)
    summary = (None, None) if window is None else window
    queries = None
    if newest is not None and config.policy.needs_queries:
        of_heads = group_queries(newest, view.keys.shape[-3])
        of_heads = xp.reshape(of_heads, (*of_heads.shape[:-2], -1, *newest.shape[-2:]))
        queries = scale * xp.astype(of_heads, accumulation_dtype(xp, newest.dtype), copy=False)
    tokens = Tokens(
        view.keys, view.values, view.positions, attention, known, scale, summary[0], summary[1], queries, view.both
    )
    importance = importance_by_heads(config.policy, tokens)
    if queries is not None and ask:
        # Padded rows with fewer queries than are kept are ranked by what is remembered of them, as they are alone.
        few = xp.sum(xp.astype(view.positions[..., -queries.shape[-2] :] >= 0, xp.int32), axis=-1) < RECENT_QUERIES
        if not concrete(few) or bool(xp.any(few)):
            remembered = importance_by_heads(config.policy, dataclasses.replace(tokens, queries=None))
            importance = xp.where(few[..., None], remembered, importance)
    if ask and concrete(importance) and xp.isdtype(importance.dtype, "real floating"):
        nameless = xp.isnan(importance) & (view.positions >= 0)
        if bool(xp.any(nameless)) and bool(xp.any(nameless & is_sound(tokens)[..., None])):
            raise ValueError(
                f"policy {name_of(config.policy)!r} gave NaN as importance of a token, and all that it was shown is "
                "finite; give every token a number (-inf to one that may go first)"
            )
    return importance


def is_sound(tokens: Tokens) -> Array:
    """KV heads (..., kv_head) in which a policy is shown nothing that is not finite, or whose products may not be."""
    xp = array_namespace(tokens.keys)
    real = tokens.positions >= 0
    known = (tokens.moments.key_mean, tokens.moments.value_mean, tokens.query_mean, tokens.query_variance)
    arrays = [xp.where(real[..., None], x, xp.zeros_like(x)) for x in (tokens.keys, tokens.values)]
    arrays += [xp.where(real, tokens.attention, xp.zeros_like(tokens.attention))[..., None]]
    arrays += [x[..., None] for x in known if x is not None]
    if tokens.queries is not None:
        q = tokens.queries
        q = xp.where(real[..., None, -q.shape[-2] :, None], q, xp.zeros_like(q))
        arrays += [xp.reshape(q, (*q.shape[:-3], -1, q.shape[-1]))]
    sound = xp.ones_like(real[..., 0])
    for x in arrays:
        limit = xp.finfo(x.dtype).max ** 0.125
        sound = sound & xp.all(xp.abs(x) < limit, axis=(-2, -1))
    return sound


def kept_by_rank(importance: Array, positions: Array, limits: Array, config: CacheConfig) -> Array:
    """Which tokens are among the ``limits`` (..., kv_head) first of the ranking, sinks and window always."""
    return kept(importance, positions, limits, sinks=config.sinks, window=config.window)


def between(counts: Array, limits: Array, share: float) -> Array:
    """Retained counts on the way from ``counts`` (share 0) to ``limits`` (share 1), falling geometrically."""
    xp = array_namespace(counts, limits)
    start, end = (xp.log(xp.astype(xp.maximum(x, xp.ones_like(x)), xp.float32)) for x in (counts, limits))
    step = xp.astype(xp.floor(xp.exp(start + share * (end - start))), counts.dtype)
    return xp.minimum(counts, xp.maximum(step, limits))


@as_given
def evicted_state(
    config: CacheConfig,
    state: LayerState,
    new: NewTokens | None,
    budgets: Sequence[int],
    *,
    scale: float,
    importance: Array | None = None,
    newest: Array | None = None,
    resized: bool = False,
    block: int | None = None,
) -> tuple[LayerState, dict[int, float]]:
    """A layer's state after eviction to its budgets, all heads at once.

    Every row and head that holds a block (of the settings, or another) more tokens than its budget is cut to it.

    Parameters
    ----------
    config : CacheConfig
    state : LayerState
    new : NewTokens or None
        Tokens that have come since.
    budgets : sequence of int
        One for each KV head.
    scale : float
        Factor on ``q . k``.
    importance : array, shape (..., kv_head, n), optional
        Of the tokens of `view_of`, where it is known.
    newest : array, shape (..., q_head, m, d), optional
        Newest queries, for a policy that ranks by them and a correction that is calibrated at its first eviction.
    resized : bool
        Whether static steps had room for other budgets until now.

    Returns
    -------
    state : LayerState
    refused : dict
        KV heads whose eviction was refused for the tolerance, with the certified error; they keep all their tokens.
    """
    heads, stored, block = len(budgets), None if state.is_empty else state, block or config.block
    view = view_of(stored, new)
    xp = array_namespace(view.keys)
    if importance is not None and tuple(importance.shape) != tuple(view.positions.shape):
        raise ValueError(
            f"importance has shape {tuple(importance.shape)}; it needs a number for each token at hand, shape "
            f"{tuple(view.positions.shape)}"
        )
    in_place = config.static and state.clock is not None and new is None and not resized
    # In place nothing is asked of the device: all heads are looked at, and the clock says which are due.
    totals = None if in_place else Totals(stored, new, heads)
    budget = get_backend(view.keys).numbers(state.layout, tuple(budgets), view.keys)
    counts = xp.sum(xp.astype(view.positions >= 0, xp.int32), axis=-1)
    if totals is None:
        due, most = list(range(heads)), block
        full = (state.ticks if state.ticks is not None else counts) >= budget + block
    else:
        due = [head for head in range(heads) if totals.most[head] >= budgets[head] + block]
        most = max((totals.most[head] - budgets[head] for head in due), default=0)
        full = counts >= budget + block
    evicted, evidence, attention = state.evicted, state.evidence, view.attention
    positions, refused, cut = view.positions, dict[int, float](), xp.zeros_like(full)
    alike, fills = totals is not None and totals.even, None
    padded = view_is_padded(stored, new)
    if config.bits is not None and (config.static or padded or not alike):
        # Where rows or heads differ, each passes tokens on when its own recent ones run full, as it would alone.
        fills = (counts if totals is not None else state.ticks) - state.counts >= config.recent
        if alike and not config.static:
            # Rows that are padded alike do so together, but not when the slots of their padding run full.
            alike, fills = (True, None) if bool(xp.all(fills)) else (False, fills)
    if due:
        limits = xp.where(full, xp.minimum(counts, 0 * counts + budget), counts)
        rounds = config.policy.rounds if config.corrects and most > config.block else 1
        one_block = counts - limits <= config.block
        window = query_window(state)
        for done in range(1, rounds + 1):
            if importance is None or done > 1:
                # Later rounds have emptied slots, whose vectors are no longer hidden.
                left = view if done == 1 else view._replace(positions=positions, both=None)
                known = config.correction.known(evicted)
                # Queries belong to the last slots, and later rounds have emptied some of these.
                queries = newest if done == 1 else None
                importance = importance_of(config, left, known, scale, state, newest=queries, ask=not in_place)
            target = limits if rounds == 1 else xp.where(one_block, limits, between(counts, limits, done / rounds))
            kept = kept_by_rank(importance, positions, target, config)
            if config.corrects:
                k, v, mask = gathered(view, (positions >= 0) & ~kept, most)
                evicted = folded(config.correction, evicted, k, v, mask=mask, window=window)
            positions = xp.where(kept, positions, xp.full_like(positions, -1))
        gone = (view.positions >= 0) & (positions < 0)
        if newest is not None and config.corrects:
            # Rows whose first eviction this is and whose newest queries are all real; others keep what they have.
            first = xp.all(view.positions[..., -RECENT_QUERIES:] >= 0, axis=-1) & (state.evicted.weight == 0)
            judges = newest[..., -RECENT_QUERIES:, :]
            mask = gone & first[..., None]
            # In later chunks of a prefill there are mostly none.
            if in_place or not concrete(mask) or bool(xp.any(mask)):
                evicted = calibrated(config.correction, evicted, judges, view.keys, scale=scale, mask=mask)
        if evidence is not None:
            k, v, mask = gathered(view, gone, most)
            evidence, before = evidence.update(k, v, mask=mask), state
            if config.bits is not None:
                state = state.changed(**with_lost(state, EVICTED, gone))
            judged = state.changed(evicted=evicted, evidence=evidence)
            renew = renewal(config, state, limits < counts, alike=alike, goes=True)[0]
            later = None if totals is None else totals.after(budgets, block)
            refused = refused_heads(config, judged, view, positions, budgets, later, scale, renew, fills)
            if refused:
                stays = xp.asarray([head in refused for head in range(heads)], device=device(view.keys))
                state = choose_lost(stays, before, state)
                evicted, evidence = choose(stays, state.evicted, evicted), choose(stays, state.evidence, evidence)
                positions = xp.where(stays[:, None], view.positions, positions)
                limits = xp.where(stays, counts, limits)
        cut = limits < counts
        if attention is not None and not config.policy.accumulates:
            attention = xp.where(cut[..., None], xp.zeros_like(attention), attention)
        if state.ticks is not None and totals is None:
            state = state.changed(ticks=state.ticks - xp.astype(full, state.ticks.dtype) * config.block)
    if totals is not None:
        budgets = [totals.most[head] if head in refused else budgets[head] for head in range(heads)]
        totals = totals.after(budgets, block)
    went = any(head not in refused for head in due)
    renew, early = renewal(config, state, cut, alike=alike, goes=went)
    view = view._replace(attention=attention)
    packed = settle(config, state, view, positions >= 0, budgets, totals, renew=renew, fills=fills)
    changed: dict[str, Any] = {"evicted": evicted, "evidence": evidence, "has_evicted": state.has_evicted or went}
    return packed.changed(**changed, early=early, recent_queries=None if went else state.recent_queries), refused


def settle(
    config: CacheConfig,
    state: LayerState,
    view: View,
    kept: Array,
    budgets: Sequence[int],
    totals: Totals | None,
    *,
    renew: bool | Array = False,
    fills: Array | None = None,
) -> LayerState:
    """The kept tokens of a view in their tiers, in as little memory as they need or, where steps are static, in all.

    ``totals`` are those of the kept tokens; None where the host may not ask. With ``renew`` they are coded anew, see
    `repack`. Where rows differ, those and heads that are False in ``fills`` retain what they do, and no more.
    """
    xp, where, beside = array_namespace(view.keys), device(view.keys), config.exact
    filled, room, padded = config.recent, None, True
    if config.static:
        widths = tuple(max(0, budget - beside) for budget in budgets)
    else:
        if totals is None:
            raise ValueError("totals is None, which only static steps do without")
        widths, filled = widths_of(totals.most, budgets, config.exact)
        padded = fills is not None or not totals.even or min(totals.most) < filled
        if padded:
            widths = tuple(max(0, min(n, b) - beside) for n, b in zip(totals.most, budgets, strict=True))
    if padded:
        held = xp.sum(xp.astype(kept, xp.int32), axis=-1, dtype=xp.int32)
        free = get_backend(view.keys).numbers(
            state.layout, tuple(max(0, budget - beside) for budget in budgets), view.keys
        )
        room = xp.minimum(xp.maximum(held - beside, xp.zeros_like(held)), xp.zeros_like(held) + free)
        room = room if fills is None else xp.where(fills, room, xp.minimum(room, state.counts))
        if not config.static:
            filled = int(xp.max(held - room))
    layout = Layout(config.sinks, config.recent, widths, config.bits)
    layout = state.layout if state.layout == layout else layout  # with the arrays that were uploaded for it
    packed = repack(view, kept, state, layout, filled=filled, room=room, renew=renew)
    if config.static and totals is not None:
        clock = xp.zeros(packed.counts.shape[:-1], dtype=xp.int32, device=where) + state.seen
        packed = packed.changed(clock=clock, ticks=packed.counts + packed.recent_count, has_evicted=True)
    return packed.changed(padded=padded)


def without_newest(
    config: CacheConfig, state: LayerState, budgets: Sequence[int], seen: int, tokens: int
) -> LayerState:
    """A state without its newest tokens, none of which has been evicted."""
    state = state.changed(judges=None, seen=seen - tokens)
    if state.is_empty:  # all that was read was padding
        return state
    view = view_of(state)
    kept = (view.positions >= 0) & (view.positions < seen - tokens)
    if view.attention is not None:
        xp = array_namespace(view.attention)
        view = view._replace(attention=xp.where(kept, view.attention, xp.zeros_like(view.attention)))
    counted = Totals.of_kept(kept)
    return settle(config, state, view, kept, budgets, counted)


def refused_heads(
    config: CacheConfig,
    state: LayerState,
    view: View,
    positions: Array,
    budgets: Sequence[int],
    left: Totals | None,
    scale: float,
    renew: bool | Array,
    fills: Array | None,
) -> dict[int, float]:
    """KV heads in which a recent query's certified error would be above the tolerance, and that error.

    The state has the statistics and the evidence that it would have, and the view's tokens of positions >= 0; its
    records are made anew, and rows pass tokens on, as in `settle`.
    """
    queries = state.recent_queries
    if config.tolerance is None or queries is None:
        return {}
    xp, losses, evidence = array_namespace(view.keys), None, state.evidence
    if evidence is None:
        raise ValueError("evidence is None, without which nothing is certified")
    if config.bits is not None and left is not None:
        # What is judged are the tokens as they would be read.
        state = settle(config, state, view, positions >= 0, budgets, left, renew=renew, fills=fills)
        view = view_of(state)
        positions, losses = view.positions, losses_of(state, view.positions)
    report = trust_of(
        config, queries, view.keys, view.values, positions, state.evicted, evidence,
        scale=scale, losses=losses,
    )  # fmt: skip
    heads = view.keys.shape[-3]
    # Of a row with NaN nothing can be certified, nor saved by keeping more; it does not hold up the others.
    certified = xp.where(xp.isnan(report.certified), xp.zeros_like(report.certified), report.certified)
    by_head = xp.reshape(certified, (-1, heads, report.certified.shape[-2] // heads, report.certified.shape[-1]))
    worst = [float(x) for x in xp.max(by_head, axis=(0, 2, 3))]
    return {head: error for head, error in enumerate(worst) if not error <= config.tolerance}


def choose(heads: Array, old: Any, new: Any) -> Any:
    """Statistics with some heads' arrays of another state of the same make."""
    xp = array_namespace(heads)
    former = old.arrays()
    if not former:
        return new
    names = iter(new.arrays())

    def pick(x: Array) -> Array:
        y = former[next(names)]
        lead = x.ndim - (new.weight.ndim - 1) - 1
        return xp.where(xp.reshape(heads, (*heads.shape, *(1,) * lead)), y, x)

    return new.map(pick)
