"""Layers that evict at the same step evict together: an eviction costs calls, and many heads need no more than few.

An eviction treats each KV head by itself, unless a policy or a correction says otherwise. So the states of several
layers that are alike can be joined into the state of one layer with the heads of all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from copy import copy as copy_of
from typing import Any

from momentkv._array import array_namespace, device
from momentkv.backends import get_backend
from momentkv.backends.layout import Layout
from momentkv.cache.by_heads import images
from momentkv.cache.config import CacheConfig
from momentkv.cache.eviction import Totals, evicted_state
from momentkv.cache.layer import LayerCache
from momentkv.cache.packing import widths_of
from momentkv.cache.state import PACKED, STATISTICS, LayerState, overwritten
from momentkv.policies import Policy
from momentkv.statistics.corrections import Correction

__all__ = ["evict_together", "flush_together", "flushed_together", "groups", "joined_cache"]


def evict_together(caches: Sequence[LayerCache], *, block: int | None = None) -> None:
    """`LayerCache.evict` of caches that have run full (`LayerCache.is_full`); those that are alike evict together.

    With a ``block`` of 1, of all that hold more than their budgets, full or not. Results are those of one after the
    other, to rounding: sums may be taken in another order. If it fails, all caches are as before.
    """
    held = [cache.held() for cache in caches]
    states = [cache.stored_state for cache in caches]
    try:
        for group in groups(caches, states, block=block):
            alike = [caches[index] for index in group]
            if len(group) == 1:
                alike[0].evict(block=block)
                continue
            after = evicted_together(alike, [states[index] for index in group], copy=True, block=block)
            for cache, state in zip(alike, after, strict=True):
                cache.take(state)
    except BaseException:
        for cache, before in zip(caches, held, strict=True):
            cache.go_back(before)
        raise


def flush_together(caches: Sequence[LayerCache]) -> None:
    """`LayerCache.flush` of caches whose steps are static; those that are alike flush together.

    If it fails, all caches are as before; if it is interrupted while it writes, they are refused until they are reset.
    """
    held = [cache.held() for cache in caches]
    states = [cache.stored_state for cache in caches]
    in_place = [cache for cache, state in zip(caches, states, strict=True) if state is cache.fixed]
    try:
        for cache, after in zip(caches, flushed_together(caches, states), strict=True):
            cache.state = after
        for cache in in_place:
            cache.torn = True
        write = get_backend(states[0].counts).overwrite_all
        fixed, new = ([getattr(cache, name) for cache in in_place] for name in ("fixed", "state"))
        written = overwritten(fixed, new, write)
        for cache, state in zip(in_place, written, strict=True):
            cache.state = cache.fixed = state
            cache.torn = False
    except BaseException:
        for cache, before in zip(caches, held, strict=True):
            cache.go_back(before)
        raise


def flushed_together(caches: Sequence[LayerCache], states: Sequence[LayerState]) -> list[LayerState]:
    """`LayerCache.flushed` of static states of these caches; the caches do not change."""
    after = list(states)
    for group in groups(caches, states):
        if len(group) == 1:
            after[group[0]] = caches[group[0]].flushed(states[group[0]])
            continue
        # Whoever calls writes them elsewhere.
        flushed = evicted_together([caches[i] for i in group], [states[i] for i in group], copy=False)
        for index, state in zip(group, flushed, strict=True):
            after[index] = state
    return after


def groups(caches: Sequence[LayerCache], states: Sequence[LayerState], *, block: int | None = None) -> list[list[int]]:
    """Numbers of the caches that may evict at once, a list for each time.

    Those of a group have equal settings, arrays that differ in the number of heads or slots alone, and come to have as
    many recent tokens; their keys and values take at most
    `ArrayBackend.joined_at_once` bytes in float32.
    """
    kinds: list[tuple[Any, list[int]]] = []
    for index, (cache, state) in enumerate(zip(caches, states, strict=True)):
        kind = kind_of(cache, state, block or cache.config.block)
        members = next((own for other, own in kinds if kind is not None and same(kind, other)), None)
        if members is None:
            kinds.append((kind, [index]))
        else:
            members.append(index)
    parts: list[list[int]] = []
    most = get_backend(states[0].counts).joined_at_once(states[0].counts) if states else 0
    for _, members in kinds:
        part: list[int] = []
        # In order of their widths: side by side, all heads are as wide as the widest.
        for index in sorted(members, key=lambda index: states[index].layout.width):
            if part and joined_bytes([states[each] for each in (*part, index)]) > most:
                parts.append(part)
                part = []
            part.append(index)
        parts.append(part)
    return parts


def joined_bytes(states: Sequence[LayerState]) -> int:
    """Bytes of keys and values of all heads side by side, in float32."""
    width = max(state.layout.width + state.layout.recent for state in states)
    heads = sum(math.prod(state.counts.shape) for state in states)
    return 4 * heads * width * (states[0].recent_keys.shape[-1] + states[0].recent_values.shape[-1])


def kind_of(cache: LayerCache, state: LayerState, block: int) -> Any:
    """What caches that evict at once have in common; None for one that must evict by itself."""
    config, budgets = cache.config, cache.budgets or []
    # Evidence counts the terms of sums, which depend on what is summed beside.
    if config.policy.couples_heads or config.correction.couples_heads or config.certify is not None:
        return None
    lead = state.counts.ndim - 1
    arrays = {
        name: (x.dtype, device(x), *x.shape[:lead], *(x.shape[lead + 1 :] if x.ndim > lead else ()))
        for name, x in state.arrays().items()
    }
    kind: tuple[Any, ...] = (config, cache.attention_scale, type(state.evicted), arrays, state.seen, state.filled)
    kind = (*kind, state.layout.bits, state.padded, state.has_evicted)
    if config.static or state.padded:
        # Of padded rows the host does not know which evict; records are made when the first ones do.
        return kind if config.static or state.has_evicted else None
    totals = Totals(state, None, len(budgets))
    due = any(most >= budget + block for most, budget in zip(totals.most, budgets, strict=True))
    left = totals.after(budgets, block).most
    _, filled = widths_of(left, budgets, config.exact)
    return (*kind, due, filled, min(left) < filled)


def same(a: Any, b: Any) -> bool:
    """Whether settings are equal; of objects of other classes than those here, whether they are one."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (CacheConfig, Policy, Correction)):
        a, b = vars(a), vars(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(x, b[name]) for name, x in a.items())
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    # Arrays in a setting of one's own would be compared number by number.
    return not hasattr(a, "shape") and bool(a == b)


def evicted_together(
    caches: Sequence[LayerCache], states: Sequence[LayerState], *, copy: bool, block: int | None = None
) -> list[LayerState]:
    """`evicted_state` of caches that are alike; with ``copy``, in arrays that share no memory with each other."""
    first, whole = caches[0], joined_state(states)
    budgets = [budget for cache in caches for budget in cache.budgets or []]
    after, _ = evicted_state(first.config, whole, None, budgets, scale=first.attention_scale, block=block)
    return parted_state(after, whole, states, copy=copy)


def joined_cache(caches: Sequence[LayerCache]) -> LayerCache:
    """A cache with the heads of all, which must be alike, to look at: nothing is to be read or evicted with it."""
    whole = copy_of(caches[0])
    whole.state = joined_state([cache.stored_state for cache in caches])
    whole.budgets = [budget for cache in caches for budget in cache.budgets or []]
    return whole


def joined_state(states: Sequence[LayerState]) -> LayerState:
    """The state of one layer with the heads of all, in their order."""
    first = states[0]
    xp, lead = array_namespace(first.counts), first.counts.ndim - 1
    changed: dict[str, Any] = {}
    for name, x in first.own().items():
        # The clock is the same for all heads.
        changed[name] = x if x.ndim == lead else xp.concat([getattr(state, name) for state in states], axis=lead)
    for name in STATISTICS:
        if getattr(first, name) is not None:
            parts = [images(getattr(state, name)) for state in states]
            whole = iter([xp.concat(list(each), axis=lead) for each in zip(*parts, strict=True)])
            changed[name] = getattr(first, name).map(lambda _, whole=whole: next(whole))
    return first.changed(**changed, layout=joined_layout([state.layout for state in states]))


def joined_layout(layouts: Sequence[Layout]) -> Layout:
    """That of the heads of all, kept with the first: arrays that are uploaded once are kept with a layout."""
    first, widths = layouts[0], tuple(width for layout in layouts for width in layout.widths)
    key = ("joined", widths)
    if key not in first.placed:
        first.placed[key] = dataclasses.replace(first, widths=widths)
    joined: Layout = first.placed[key]
    return joined


def parted_state(
    after: LayerState, before: LayerState, states: Sequence[LayerState], *, copy: bool
) -> list[LayerState]:
    """The inverse of `joined_state` for what came of it; arrays that are still those of ``before`` are the layers' own.

    With ``copy``, each layer's arrays are memory of their own, so that none holds that of all.
    """
    lead, split = after.counts.ndim - 1, get_backend(after.counts).split
    heads = [state.layout.heads for state in states]
    ends = [sum(heads[: index + 1]) for index in range(len(heads))]
    widths = [after.layout.widths[end - own : end] for own, end in zip(heads, ends, strict=True)]
    slots = [sum(own) for own in widths]
    layouts = [dataclasses.replace(after.layout, widths=own) for own in widths]
    parts: list[dict[str, Any]] = [
        {"layout": state.layout if state.layout == layout else layout}
        for state, layout in zip(states, layouts, strict=True)
    ]
    for name, x in after.own().items():
        if x is getattr(before, name):
            continue
        pieces = split(x, slots if name in PACKED else heads, axis=lead, copy=copy)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    for name in STATISTICS:
        whole = getattr(after, name)
        if whole is None or whole is getattr(before, name):
            continue
        of_all = [iter(split(x, heads, axis=lead, copy=copy)) for x in images(whole)]
        for part in parts:
            own = iter([next(pieces) for pieces in of_all])
            part[name] = whole.map(lambda _, own=own: next(own))
    if after.padded and after.clock is None:
        # Of padded rows, a layer's fullest head may have fewer recent tokens than that of all.
        xp = array_namespace(after.recent_count)
        most = [int(x) for x in xp.max(xp.reshape(after.recent_count, (-1, sum(heads))), axis=0)]
        for part, number, end in zip(parts, heads, ends, strict=True):
            part["filled"] = max(most[end - number : end])
    host: dict[str, Any] = {name: getattr(after, name) for name in ("filled", "padded", "has_evicted")}
    gone: dict[str, Any] = {name: None for name in before.own() if getattr(after, name) is None}
    return [state.changed(**(host | gone | part)) for state, part in zip(states, parts, strict=True)]
