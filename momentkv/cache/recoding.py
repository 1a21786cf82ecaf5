"""Records of retained tokens through an eviction: those that stay keep theirs to the last bit."""

from __future__ import annotations

from typing import Any, NamedTuple

from momentkv._array import Array, array_namespace, device
from momentkv._rows import chosen_first, take_rows
from momentkv.backends.layout import Layout
from momentkv.cache.config import CacheConfig
from momentkv.cache.state import LayerState
from momentkv.codes import Standard, encode

__all__ = ["Pool", "pool_of", "renewal"]


class Pool(NamedTuple):
    """Records that retained slots are filled from: those at hand, and behind them those of tokens that enter the tier.

    Attributes
    ----------
    keys, values : uint8 array, shape (..., kv_head, m, bytes)
    key_step, value_step : array, shape (..., kv_head, m)
    key_standard, value_standard : Standard
    source : int array, shape (..., kv_head, n)
        For each token of a view that will be retained, its place among the ``m``.
    """

    keys: Array
    values: Array
    key_step: Array
    value_step: Array
    key_standard: Standard
    value_standard: Standard
    source: Array


def pool_of(
    keys: Array,
    values: Array,
    real: Array,
    retained: Array,
    state: LayerState,
    layout: Layout,
    *,
    stay: int,
    renew: bool | Array,
) -> Pool:
    """Records of the tokens that a layer is to retain.

    Parameters
    ----------
    keys, values : array, shape (..., kv_head, n, d) and (..., kv_head, n, dv)
        All tokens in order of position: sinks, those that are retained now, and all others.
    real, retained : bool array, shape (..., kv_head, n)
        Which slots hold a token, and which of these are to be retained.
    state : LayerState
        Whose tokens they are, new ones excepted.
    layout : Layout
        Of the state to come.
    stay : int
        Tokens of each head that are in no record now and will be in none.
    renew : bool or bool array, shape (..., kv_head)
        Whether the standard is made anew, and all records with it: of all heads, or of those where it is True.
    """
    xp = array_namespace(keys)
    coding, bits = None if renew is True else state.coding(), layout.bits or (0, 0)
    n, first, width = keys.shape[-2], min(state.layout.sinks, state.filled), 0
    if coding is None:
        standards, enters = standards_of(keys, values, real, bits[0], state.query_square), retained
    else:
        standards, width = (coding.key_standard, coding.value_standard), state.layout.width
        slot = xp.arange(n, dtype=xp.int32, device=device(keys))
        enters = retained & ((slot < first) | (slot >= first + width))
    # Only tokens that change their tier are coded: at most so many of any head.
    most = max(1, min(layout.width, n - width - stay))
    if coding is not None and not isinstance(renew, bool):
        # Heads of a file whose channels are not graded stay like each other.
        queries = None if coding.key_standard.order is None else state.query_square
        anew, (of_keys, of_values) = renew[..., None], standards_of(keys, values, real, bits[0], queries)
        standards = of_keys.where(anew, standards[0]), of_values.where(anew, standards[1])
        enters, most = enters | (retained & anew), max(1, min(layout.width, n))
    index = chosen_first(enters)[..., :most]
    records = [
        encode(take_rows(x, index), standard, number)
        for x, standard, number in zip((keys, values), standards, bits, strict=True)
    ]
    (key_codes, key_step), (value_codes, value_step) = records
    source = xp.cumulative_sum(xp.astype(enters, index.dtype), axis=-1) - 1
    source = xp.where(source > 0, source, xp.zeros_like(source))
    if coding is not None:
        source = xp.where(enters, source + width, xp.astype(slot, source.dtype) - first)
        source = xp.clip(source, 0, width + most - 1)
        rectangle, old = state.layout.rectangle, (state.keys, state.values)
        key_codes, value_codes = (
            xp.concat([rectangle(x, vectors=True), y], axis=-2)
            for x, y in zip(old, (key_codes, value_codes), strict=True)
        )
        key_step, value_step = (
            xp.concat([rectangle(x, vectors=False), y], axis=-1)
            for x, y in zip((coding.key_step, coding.value_step), (key_step, value_step), strict=True)
        )
    return Pool(key_codes, value_codes, key_step, value_step, *standards, source)


def standards_of(
    keys: Array, values: Array, real: Array, bits: int, queries: Array | None
) -> tuple[Standard, Standard]:
    """What the tokens at hand, those where ``real`` is True, are coded by: keys in so many bits, given what is known of
    recent queries, their mean square.
    """
    # Tokens that are attended to for want of others have values near zero, which must stay so.
    return Standard.of(keys, real).graded(bits, queries), Standard.of(values, real, centred=False)


def renewal(config: CacheConfig, state: LayerState, cut: Array, *, alike: bool, goes: bool) -> tuple[bool | Array, Any]:
    """Heads whose records are made anew in an eviction, and `LayerState.early` after it.

    Records are made when a head first retains tokens; then they are made anew when it first evicts: by then it has seen
    what its tokens are like.

    Parameters
    ----------
    config : CacheConfig
    state : LayerState
        Before the eviction.
    cut : bool array, shape (..., kv_head)
        Heads that evict.
    alike : bool
        Whether rows evict together, as the host knows.
    goes : bool
        Whether any head evicts, as far as the host knows.
    """
    if config.bits is None:
        return False, None
    if state.early is None and not config.static and (alike or state.has_evicted):
        return goes and not state.has_evicted, None
    xp, first = array_namespace(cut), state.coding() is None
    early = xp.ones_like(cut) if state.early is None else state.early
    renew = True if first else early & (cut | (state.counts == 0))
    # What is coded when a row first evicts is coded by all that the row has seen.
    early = early & ~(xp.any(cut, axis=-1)[..., None] if first else cut)
    return renew, early if config.static or bool(xp.any(early)) else None
