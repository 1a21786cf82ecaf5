"""Attention as policies see it: of new tokens' queries, over all that a layer holds."""

from __future__ import annotations

from momentkv._array import Array, array_namespace
from momentkv._rows import chosen_first, take_rows
from momentkv.backends import ArrayBackend
from momentkv.backends.base import causal_mask
from momentkv.cache.by_heads import check_given
from momentkv.cache.config import CacheConfig
from momentkv.cache.given import as_given
from momentkv.cache.packing import View
from momentkv.cache.state import LayerState, NewTokens
from momentkv.policies import Policy

__all__ = ["observed", "observed_queries", "of_real_queries", "real_ones_last", "without_padding"]


def of_real_queries(weights: Array, new: NewTokens) -> Array:
    """Attention weights (..., kv_head, group, m, n) of the newest queries, those of padding set to zero."""
    if not new.padded:
        return weights
    xp = array_namespace(weights)
    real = new.positions[..., -weights.shape[-2] :] >= 0
    return xp.where(real[..., None, :, None], weights, xp.zeros_like(weights))


def real_ones_last(new: NewTokens, q: Array, *, ask: bool = True) -> tuple[NewTokens, Array]:
    """Tokens and their queries, the padding among the last ``q_len`` tokens moved before the real ones of each row.

    The newest queries of a row are then its own, wherever its padding lay; real tokens stay in order of position. The
    device is not asked whether any have to move if ``ask`` is False.
    """
    xp = array_namespace(new.positions)
    q_len = q.shape[-2]
    real = new.positions[..., new.length - q_len :] >= 0
    if not new.padded or q_len == 1 or (ask and not bool(xp.any(real[..., :-1] & ~real[..., 1:]))):
        return new, q
    order = chosen_first(~real)

    def moved(x: Array) -> Array:
        earlier, last = x[..., : new.length - q_len], x[..., new.length - q_len :]
        return xp.concat([earlier, xp.take_along_axis(last, order, axis=-1)], axis=-1)

    def moved_vectors(x: Array) -> Array:
        earlier, last = x[..., : new.length - q_len, :], x[..., new.length - q_len :, :]
        return xp.concat([earlier, take_rows(last, order)], axis=-2)

    heads = real.shape[-2]
    grouped = xp.reshape(q, (*q.shape[:-3], heads, q.shape[-3] // heads, q_len, q.shape[-1]))
    index = xp.broadcast_to(order[..., None, :], grouped.shape[:-1])
    arranged = NewTokens(
        moved_vectors(new.keys),
        moved_vectors(new.values),
        moved(new.positions),
        None if new.attention is None else moved(new.attention),
        new.padded,
    )
    return arranged, xp.reshape(take_rows(grouped, index), q.shape)


def without_padding(new: NewTokens, q: Array) -> Array:
    """The newest tokens' queries, those of padding set to zero: they may be anything, also NaN."""
    if not new.padded:
        return q
    xp = array_namespace(q)
    real = new.positions[..., new.length - q.shape[-2] :] >= 0
    real = xp.repeat(real, q.shape[-3] // real.shape[-2], axis=-2)
    return xp.where(real[..., None], q, xp.zeros_like(q))


def observed(policy: Policy, state: LayerState, weights: Array) -> LayerState:
    """The state after the policy has seen attention weights over retained and recent tokens, in this order."""
    xp = array_namespace(weights)
    layout, filled, recent = state.layout, state.filled, state.recent_attention
    retained = layout.rectangle(state.attention, vectors=False, fill=0.0)
    score = received(policy, xp.concat([retained, recent[..., :filled]], axis=-1), weights)
    whole = xp.concat([score[..., layout.width :], recent[..., filled:]], axis=-1)
    return state.changed(attention=layout.pack(score[..., : layout.width]), recent_attention=whole)


def received(policy: Policy, before: Array, weights: Array) -> Array:
    """`Policy.observe`, or an error where it is of another shape than what tokens had received before."""
    after = policy.observe(before, weights)
    check_given(policy, "what tokens have received (observe)", after, before.shape)
    return after


@as_given
def observed_queries(
    config: CacheConfig, backend: ArrayBackend, state: LayerState, new: NewTokens, q: Array, scale: float
) -> tuple[LayerState, NewTokens]:
    """State and new tokens after the policy has seen the attention of the last queries, by blocks of them."""
    xp = array_namespace(q)
    layout, filled, n = state.layout, state.filled, new.length
    view = None if state.is_empty else stored_tokens(state)
    seen = 0 if view is None else view.keys.shape[-2]
    keys, values, score = new.keys, new.values, new.attention
    if view is not None:
        keys, values = (xp.concat([x, y], axis=-2) for x, y in ((view.keys, keys), (view.values, values)))
        score = xp.concat([view.attention, score], axis=-1)
    valid = None
    if view is not None or new.padded:
        valid = new.positions >= 0
        if view is not None:
            valid = xp.concat([view.positions >= 0, valid], axis=-1)
    observes, q_len = config.policy.observes, q.shape[-2]
    count = q_len if observes is None else min(q_len, observes)
    if observes is not None and q_len >= observes and not config.policy.accumulates:
        # A whole observation window, of the row's own queries: what came before no longer counts.
        own = xp.sum(xp.astype(new.positions[..., n - q_len :] >= 0, xp.int32), axis=-1)
        score = xp.where((own >= observes)[..., None], xp.zeros_like(score), score)
    for start in range(q_len - count, q_len, backend.query_block):
        stop = min(start + backend.query_block, q_len)
        visible = seen + n - q_len + stop
        mask = causal_mask(keys, q_len, start, stop, valid)
        _, weights = backend.attend(
            q[..., start:stop, :], keys[..., :visible, :], values[..., :visible, :], scale=scale, mask=mask
        )
        of_block = new._replace(positions=new.positions[..., : n - q_len + stop])
        weights = of_real_queries(weights, of_block)
        part = received(config.policy, score[..., :visible], weights)
        score = xp.concat([part, score[..., visible:]], axis=-1)
    if view is None:
        return state, new._replace(attention=score)
    recent = xp.concat([score[..., layout.width : seen], state.recent_attention[..., filled:]], axis=-1)
    state = state.changed(attention=layout.pack(score[..., : layout.width]), recent_attention=recent)
    return state, new._replace(attention=score[..., seen:])


def stored_tokens(state: LayerState) -> View:
    """Retained tokens as a rectangle, then recent ones: an order in which attention does not differ."""
    xp = array_namespace(state.keys)
    layout, filled = state.layout, state.filled
    recent = state.recent_positions[..., :filled]
    valid = state.recent_valid()
    if valid is not None:
        recent = xp.where(valid, recent, xp.full_like(recent, -1))

    positions = xp.concat([layout.rectangle(state.positions, vectors=False, fill=-1), recent], axis=-1)
    attention = layout.rectangle(state.attention, vectors=False, fill=0)
    keys, values = state.retained()
    return View(
        xp.concat([keys, state.recent_keys[..., :filled, :]], axis=-2),
        xp.concat([values, state.recent_values[..., :filled, :]], axis=-2),
        positions,
        xp.concat([attention, state.recent_attention[..., :filled]], axis=-1),
    )
