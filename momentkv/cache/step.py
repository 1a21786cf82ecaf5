"""The parts of a layer's step that depend on nothing but their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from momentkv._array import Array, accumulation_dtype, array_namespace, check_arrays, check_mask, device
from momentkv.attention import check_keys, check_values, merge
from momentkv.backends import ArrayBackend
from momentkv.backends.layout import Layout
from momentkv.cache.config import RECENT_QUERIES, CacheConfig
from momentkv.cache.given import as_given
from momentkv.cache.observing import observed, of_real_queries
from momentkv.cache.queries import joined_judges, remember
from momentkv.cache.state import LayerState, NewTokens, empty_state, place
from momentkv.statistics.moments import Moments

__all__ = [
    "arrived",
    "attended",
    "check_like_stored",
    "check_step",
    "decoded",
    "due_heads",
    "fresh",
    "remembered",
    "started",
]


def fresh(config: CacheConfig, k: Array, v: Array, positions: Array, *, padded: bool = False) -> NewTokens:
    """New tokens that no query has attended to."""
    attention = None
    if config.observes:
        xp = array_namespace(k, v)
        attention = xp.zeros(k.shape[:-1], dtype=accumulation_dtype(xp, k.dtype, v.dtype), device=device(k))
    return NewTokens(k, v, positions, attention, padded)


def arrived(config: CacheConfig, state: LayerState, k: Array, v: Array) -> NewTokens:
    """One new token a head, at the place that the device's clock tells."""
    xp = array_namespace(k, v)
    positions = xp.broadcast_to(state.clock[..., None, None], k.shape[:-1])
    return fresh(config, k, v, positions, padded=True)


@as_given
def decoded(
    config: CacheConfig,
    state: LayerState,
    new: NewTokens,
    q: Array,
    *,
    scale: float,
    expansion: Any,
    gathers: bool = False,
) -> tuple[Array, LayerState]:
    """Output of one query a head, whose token becomes a recent one at once, and the state after it.

    ``expansion`` is the estimate of the evicted tokens, as `ArrayBackend.prepare` makes it, or None; with ``gathers``
    the query is kept as one of those that budgets will be shared by. Nothing is asked of the device and nothing is
    changed but recent slots that are not in use: a step that can be traced and captured.
    """
    backend = config.backend_of(q)
    state = place(backend, state, new)
    if state.clock is not None and state.ticks is not None:
        state = state.changed(clock=state.clock + 1, ticks=state.ticks + 1)
    else:
        state = state.changed(seen=state.seen + 1)
    out, weights = backend.decode(q, state.tiers(), expansion, scale=scale, weights=config.observes)
    if weights is not None:
        state = observed(config.policy, state, of_real_queries(backend.detach(weights), new))
    return out, remembered(config, state, new, backend.detach(q), scale=scale, gathers=gathers)


def attended(
    backend: ArrayBackend, state: LayerState, new: NewTokens, q: Array, *, scale: float, expansion: Any
) -> Array:
    """Output of the queries of new tokens, which see what is stored and, causally, each other."""
    seen = new.positions >= 0 if new.padded else None
    if state.is_empty and expansion is None:
        return backend.prefill(q, new.keys, new.values, scale=scale, valid=seen)
    with backend.as_given():  # a prefill is as the caller has it, in bfloat16 under autocast
        both = backend.attend_causal(q, new.keys, new.values, scale=scale, valid=seen)
        if not state.is_empty:
            stored, _ = backend.attend_stored(q, state.tiers(), scale=scale)
            both = merge(stored, both)
        return both.out if expansion is None else backend.correct(both, q, expansion, scale=scale)


def remembered(
    config: CacheConfig, state: LayerState, new: NewTokens, q: Array, *, scale: float, gathers: bool = False
) -> LayerState:
    """The state after all that it knows of recent queries was brought up to date.

    That is their first and second moment; themselves for a tolerance; and with ``gathers``, judges.
    """
    recent = q[..., max(q.shape[-2] - RECENT_QUERIES, 0) :, :]
    xp = array_namespace(recent)
    real = None
    if new.padded or state.padded:
        real = new.positions[..., -recent.shape[-2] :] >= 0
    if config.tolerance is not None:
        kept = recent
        if real is not None:  # padding judges nothing
            judges = xp.repeat(real, recent.shape[-3] // real.shape[-2], axis=-2)
            kept = xp.where(judges[..., None], recent, xp.full_like(recent, math.nan))
        if state.recent_queries is not None:
            kept = xp.concat([state.recent_queries, kept], axis=-2)
        kept = kept[..., max(kept.shape[-2] - RECENT_QUERIES, 0) :, :]
        state = state.changed(recent_queries=(config.backend_of(q)).copy(kept))
    if gathers:
        kept = joined_judges(state.judges, recent, real, state.layout.heads, state.seen)
        state = state.changed(judges=config.backend_of(q).copy(kept))
    if not config.remembers_queries:
        return state
    mean, square = remember(recent, real, state.layout.heads, scale, state.query_mean, state.query_square)
    return state.changed(query_mean=mean, query_square=square)


@as_given
def started(config: CacheConfig, k: Array, v: Array, budget: int | tuple[int, ...]) -> tuple[LayerState, list[int]]:
    """The empty state and the budget of each KV head, now that heads and dimensions are known."""
    heads = k.shape[-3]
    budgets = [budget] * heads if isinstance(budget, int) else list(budget)
    if len(budgets) != heads:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, but budgets were given for {len(budgets)} KV heads; its third axis "
            "from the end must have that length"
        )
    evidence = None
    if config.certify is not None:
        evidence = Moments.empty(k, v, order=config.certify, extent=True)
    state = empty_state(
        k,
        v,
        evicted=config.correction.empty(k, v),
        layout=Layout(config.sinks, config.recent, (0,) * heads, config.bits),
        observes=config.observes,
        evidence=evidence,
    )
    return state, budgets


def due_heads(config: CacheConfig, budgets: Sequence[int], state: LayerState) -> Array:
    """Which heads of a static state have filled their block or their recent tier, bool (batch..., kv_head).

    Ticks count padding: what a row does then depends on no row beside it.
    """
    limits = [budget + config.block for budget in budgets]
    xp, dtype = array_namespace(state.ticks), state.ticks.dtype
    full = state.ticks >= xp.asarray(limits, dtype=dtype, device=device(state.ticks))
    return full | (state.ticks - state.counts >= config.recent)


def check_step(q: Array, k: Array, v: Array, valid: Array | None) -> None:
    """Raise unless a step's arrays fit each other."""
    check_keys(q, k)
    if q.shape[-2] != k.shape[-2]:
        raise ValueError(f"q has {q.shape[-2]} tokens but k has {k.shape[-2]}; a step needs one query a token")
    if q.shape[:-3] != k.shape[:-3] or k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ValueError(
            f"q has {q.shape[-3]} heads in shape {tuple(q.shape)}, k has {k.shape[-3]} in {tuple(k.shape)}; batch "
            "axes must be equal, and the number of query heads a multiple of the number of KV heads"
        )
    if math.prod(k.shape[:-2]) == 0 or k.shape[-1] == 0:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, which is of no rows or no dimensions; give at least one of each"
        )
    if valid is not None:
        check_mask("valid", valid, k.shape[:-1], k)
    check_values(k, v)


def check_like_stored(name: str, given: Array, stored: Array) -> None:
    """Raise unless new keys or values can be stored beside those of a cache."""
    if type(given) is not type(stored):
        check_arrays(**{name: given, "what the cache holds": stored})
    if given.shape[:-2] != stored.shape[:-2] or given.shape[-1] != stored.shape[-1]:
        held = (*stored.shape[:-2], "tokens", stored.shape[-1])
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, but the cache holds {held}; batch, KV heads and dimension must "
            "stay the same"
        )
    if given.dtype != stored.dtype:
        raise ValueError(
            f"{name} is {given.dtype}, but the cache holds {stored.dtype}; give all steps of a cache one dtype (under "
            "autocast, make all passes with it or none)"
        )
