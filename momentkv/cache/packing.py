"""All tokens of a layer side by side, and back into their tiers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace, device
from momentkv._rows import chosen_first, take_rows_of_heads
from momentkv.backends.layout import Layout
from momentkv.cache.losses import STORED, with_lost
from momentkv.cache.recoding import Pool, pool_of
from momentkv.cache.state import LayerState, NewTokens, empty_state

__all__ = ["View", "repack", "view_is_padded", "view_of", "widths_of"]


class View(NamedTuple):
    """Tokens of all heads side by side, in order of position; a slot without one has position -1.

    Attributes
    ----------
    keys, values : array, shape (..., kv_head, n, d) and (..., kv_head, n, dv)
    positions : int32 array, shape (..., kv_head, n)
    attention : array, shape (..., kv_head, n), or None
    both : array, shape (2, ..., kv_head, n, d), or None
        Keys and values as one array, zero in slots without a token, where they were gathered so.
    """

    keys: Array
    values: Array
    positions: Array
    attention: Any
    both: Any = None


def view_of(state: LayerState | None, new: NewTokens | None = None) -> View:
    """All tokens of a state, and new ones behind them."""
    if state is None:
        if new is None:
            raise ValueError("the cache holds no tokens; append some first")
        return View(new.keys, new.values, new.positions, new.attention)
    xp = array_namespace(state.keys)
    layout, filled, sinks = state.layout, state.filled, min(state.layout.sinks, state.filled)
    recent_positions = state.recent_positions[..., :filled]
    positions = layout.rectangle(state.positions, vectors=False, fill=-1)
    valid = state.recent_valid()
    if valid is not None:
        recent_positions = xp.where(valid, recent_positions, xp.full_like(recent_positions, -1))
    parts: dict[str, list[Array]] = {
        "positions": [recent_positions[..., :sinks], positions, recent_positions[..., sinks:]]
    }
    both = None
    at_once = not layout.equal and layout.bits is None and can_stack(state.keys, state.values)
    for name, retained in () if at_once else zip(("keys", "values"), state.retained(), strict=True):
        recent = getattr(state, f"recent_{name}")
        parts[name] = [recent[..., :sinks, :], retained, recent[..., sinks:filled, :]]
    if state.attention is not None and state.recent_attention is not None:
        recent = state.recent_attention
        retained = layout.rectangle(state.attention, vectors=False, fill=0.0)
        parts["attention"] = [recent[..., :sinks], retained, recent[..., sinks:filled]]
    if new is not None:
        for name, pieces in parts.items():
            pieces.append(getattr(new, name))
    if layout.bits is not None and not view_is_padded(state, new) and can_stack(state.recent_keys, state.recent_values):
        # Slots without a token are zero already.
        pairs = (xp.stack(pair) for pair in zip(parts.pop("keys"), parts.pop("values"), strict=True))
        both = xp.concat(list(pairs), axis=-2)
    whole = {name: xp.concat(pieces, axis=-2 if name in ("keys", "values") else -1) for name, pieces in parts.items()}
    if at_once:
        both = side_by_side(state, new, whole["positions"] >= 0)
    if both is not None:
        return View(both[0, ...], both[1, ...], whole["positions"], whole.get("attention"), both)
    return View(whole["keys"], whole["values"], whole["positions"], whole.get("attention"))


def view_is_padded(state: LayerState | None, new: NewTokens | None) -> bool:
    """Whether some slots of what is stored and of what has come may hold no token, as far as the host knows."""
    return (state is not None and state.padded) or (new is not None and new.padded)


def can_stack(keys: Array, values: Array) -> bool:
    """Whether keys and values fit into one array."""
    return bool(keys.shape == values.shape and keys.dtype == values.dtype)


def side_by_side(state: LayerState, new: NewTokens | None, real: Array) -> Array:
    """Keys and values (2, ..., kv_head, n, d) of heads that retain different numbers of tokens, zero where not real.

    One gather does what a rectangle of retained tokens, its union with the recent ones and a copy without the empty
    slots would do in three.
    """
    xp, layout, filled = array_namespace(real), state.layout, state.filled
    sinks = min(layout.sinks, filled)
    *lead, heads, n = real.shape
    rows, d = math.prod(lead), state.keys.shape[-1]
    slots, recent = state.keys.shape[-2], state.recent_keys.shape[-2]
    row = xp.arange(rows, device=device(real))[:, None, None]
    head = xp.arange(heads, device=device(real))[:, None]
    # Rows of keys, then of values: packed ones, recent ones, new ones, and one of zeros.
    sources, first = [(state.keys, state.values), (state.recent_keys, state.recent_values)], rows * slots
    retained = xp.reshape(layout.beside(state.keys, "spread_out"), (heads, layout.width)) + row * slots
    newest = xp.arange(filled, device=device(real)) + (row * heads + head) * recent + first
    parts = [newest[..., :sinks], retained, newest[..., sinks:]]
    first = first + rows * heads * recent
    if new is not None:
        sources.append((new.keys, new.values))
        parts.append(xp.arange(new.length, device=device(real)) + (row * heads + head) * new.length + first)
        first = first + rows * heads * new.length
    index = xp.reshape(xp.concat(parts, axis=-1), (*lead, heads, n))
    pieces = [xp.reshape(x, (-1, d)) for of_both in zip(*sources, strict=True) for x in of_both]
    zero = xp.zeros((1, d), dtype=state.keys.dtype, device=device(real))
    index = xp.stack([index, index + first])
    index = xp.where(real, index, xp.full_like(index, 2 * first))
    return xp.reshape(xp.take(xp.concat([*pieces, zero]), xp.reshape(index, (-1,)), axis=0), (*index.shape, d))


def widths_of(totals: Sequence[int], budgets: Sequence[int], exact: int) -> tuple[tuple[int, ...], int]:
    """Slots of retained tokens of each head, and of recent ones in all, for so many tokens of each head.

    As many stay recent in every head. A head retains at most what its budget leaves beside ``exact`` tokens, so that
    recent slots run full exactly when a head has a block more than its budget.
    """
    recent = max(
        total - max(0, min(budget - exact, total - exact)) for total, budget in zip(totals, budgets, strict=True)
    )
    return tuple(max(0, total - recent) for total in totals), recent


def repack(
    view: View,
    kept: Array,
    state: LayerState,
    layout: Layout,
    *,
    filled: int,
    room: Array | None,
    renew: bool | Array = False,
) -> LayerState:
    """A state of the tokens of a view that are kept: the first as sinks, the newest recent, the others retained.

    Parameters
    ----------
    view : View
    kept : bool array, shape (..., kv_head, n)
    state : LayerState
        Whose tokens the first ones of the view are. All else is taken from it.
    layout : Layout
    filled : int
        Recent slots in use, where every row and head has as many; otherwise the most.
    room : int array, shape (..., kv_head), or None
        Tokens of each row and head to retain at most, where these differ; None where ``layout`` and ``filled`` say it.
    renew : bool or bool array, shape (..., kv_head)
        Whether retained tokens are coded anew, by the tokens of the view: of all heads, or of those where it is True.
    """
    xp = array_namespace(view.keys)
    where = device(view.keys)
    n, heads, sinks = kept.shape[-1], layout.heads, layout.sinks
    total = xp.sum(xp.astype(kept, xp.int32), axis=-1, dtype=xp.int32)
    if room is None:
        retained = xp.broadcast_to(xp.asarray(layout.widths, dtype=xp.int32, device=where), total.shape)
    else:
        retained = room
    # The slots of kept tokens first, in order: the j-th of them is token j.
    order = chosen_first(kept)
    flat = order + xp.arange(heads, dtype=order.dtype, device=where)[:, None] * n

    # Number of the token in each slot, n for none: of retained ones, from the first after the sinks on; then of the
    # recent tier, the sinks and the newest.
    place = xp.arange(layout.width + layout.recent, dtype=xp.int32, device=where) - layout.width
    later = xp.where(place < sinks, place, place + retained[..., None])
    packed = xp.where(place < retained[..., None] - layout.width, place + (layout.width + sinks), n)
    number = xp.where(place < 0, packed, later)
    full = number < total[..., None]
    index = xp.take_along_axis(flat, xp.astype(xp.where(full, number, n - 1), flat.dtype), axis=-1)

    def tier(x: Array, first: int, last: int) -> Array:
        return xp.reshape(x[..., first:last], (*x.shape[:-2], -1))

    def take(index: Array, real: Array, *, vectors: bool) -> dict[str, Array]:
        """Tokens by place; slots without one hold another's vectors, and are told by their position."""
        taken = {}
        if vectors:
            taken["keys"], taken["values"] = take_rows_of_heads(index, view.keys, view.values)
        for name, empty in (("positions", -1), ("attention", 0)):
            x = getattr(view, name)
            if x is not None:
                y = xp.take_along_axis(xp.reshape(x, (*x.shape[:-2], heads * n)), index, axis=-1)
                taken[name] = xp.where(real, y, empty)
        return taken

    own, real = (tier(x, 0, layout.width) for x in (index, full))
    if not layout.equal:
        # Kept beside a layout they take bytes, which static steps alone need: an upload waits for the device.
        places = xp.asarray(layout.packed, device=where) if state.clock is None else layout.beside(own, "packed")
        own, real = (xp.take(y, places, axis=-1) for y in (own, real))
    arrays = take(own, real, vectors=layout.bits is None)
    if layout.bits is not None:
        number = xp.cumulative_sum(xp.astype(kept, xp.int32), axis=-1) - 1
        stays = kept & (number >= sinks) & (number < sinks + retained[..., None])
        if state.evidence is not None:
            # Those that will be read from other records than now, or from none.
            moved = ~stays if isinstance(renew, bool) else ~stays | renew[..., None]
            arrays |= with_lost(state, STORED, kept if renew is True else kept & moved)
    if layout.bits is not None and layout.width:
        stay = filled if room is None else sinks
        pool = pool_of(view.keys, view.values, view.positions >= 0, stays, state, layout, stay=stay, renew=renew)
        arrays |= recorded(pool, own)
    elif layout.bits is not None:
        arrays |= without_records(state, layout)
    last = layout.width + layout.recent
    for name, x in take(*(tier(x, layout.width, last) for x in (index, full)), vectors=True).items():
        ends = x.shape[-1:] if name in ("keys", "values") else ()
        lead = x.shape[: len(x.shape) - 1 - len(ends)]
        arrays[f"recent_{name}"] = xp.reshape(x, (*lead, heads, layout.recent, *ends))
    return state.changed(
        **arrays,
        counts=xp.astype(retained, xp.int32),
        recent_count=total - xp.astype(retained, xp.int32),
        layout=layout,
        filled=filled,
    )


def recorded(pool: Pool, index: Array) -> dict[str, Array]:
    """Packed slots of records, given the token (of those of all heads, (..., heads * n)) that each slot holds."""
    xp = array_namespace(pool.source)
    heads, width = pool.key_step.shape[-2:]
    first = xp.arange(heads, dtype=pool.source.dtype, device=device(index))[:, None] * width
    source = xp.reshape(pool.source + first, (*pool.source.shape[:-2], heads * pool.source.shape[-1]))
    source = xp.take_along_axis(source, index, axis=-1)
    arrays = dict(zip(("keys", "values"), take_rows_of_heads(source, pool.keys, pool.values), strict=True))
    for name in ("key_step", "value_step"):
        x = getattr(pool, name)
        arrays[name] = xp.take_along_axis(xp.reshape(x, (*x.shape[:-2], heads * width)), source, axis=-1)
    arrays["key_mean"], arrays["key_deviation"], arrays["key_order"] = pool.key_standard
    return arrays | {"value_deviation": pool.value_standard.deviation}


def without_records(state: LayerState, layout: Layout) -> dict[str, Array]:
    """Packed slots of records where no head has one."""
    k, v = state.recent_keys, state.recent_values
    none = dataclasses.replace(layout, widths=(0,) * layout.heads)
    empty = empty_state(k, v, evicted=None, layout=none, observes=False, evidence=None)
    return {name: getattr(empty, name) for name in ("keys", "values", "key_step", "value_step")}
