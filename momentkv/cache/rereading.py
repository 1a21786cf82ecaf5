"""A second reading of what a cache holds: queries that see all of it, add nothing, and leave scores."""

from __future__ import annotations

import math

from momentkv._array import Array, array_namespace, device
from momentkv.attention import logits, merge
from momentkv.backends.layout import Tiers
from momentkv.cache.layer import LayerCache
from momentkv.cache.state import hidden
from momentkv.cache.step import check_like_stored, check_step, fresh
from momentkv.statistics.expansion import estimate_expansion

__all__ = ["reread", "take_scores"]


def reread(cache: LayerCache, q: Array, k: Array, v: Array, *, valid: Array | None = None) -> tuple[Array, Array]:
    r"""Attention of tokens that are not added to a cache, and the largest weight that each stored token got of it.

    Each query sees all that the cache holds, the correction for what it has evicted, and the tokens ``k``, ``v`` up to
    its own. A stored token's score is $\max_{h, i} p^{(h)}_{ij}$ over the queries and the heads of its group.

    Parameters
    ----------
    cache : LayerCache
        That holds some tokens, whether they have been evicted from or wait for it; it is not changed.
    q : array, shape (batch..., kv_head * group, m, d)
    k, v : array, shape (batch..., kv_head, m, d) and (batch..., kv_head, m, dv)
    valid : bool array, broadcastable to (batch..., kv_head, m), optional
        False for padding, which is not seen and whose queries do not count.

    Returns
    -------
    out : array, shape (batch..., kv_head * group, m, dv)
    scores : array, shape (batch..., kv_head, n)
        For the tokens of `LayerCache.view`; zero for slots that hold none. Between 0 and 1.

    Raises
    ------
    ValueError
        If shapes do not fit, or the cache is empty.

    Notes
    -----
    By blocks of queries: memory is that of ``query_block * n`` weights a query head. Accumulated in float32 at least.
    Source: KVzip (arXiv 2505.23416). Derivation: docs/derivations/second-reading.md.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> cache = LayerCache(budget=40, policy="second-reading")
    >>> q, k, v = (rng.normal(size=(1, heads, 100, 8)) for heads in (4, 2, 2))
    >>> cache.append(k, v)
    >>> out, scores = reread(cache, q, k, v)
    >>> out.shape, scores.shape
    ((1, 4, 100, 8), (1, 2, 100))
    >>> take_scores(cache, scores)
    >>> cache.evict()
    >>> cache.stored
    40
    """
    state, config = cache.stored_state, cache.config
    check_step(q, k, v, valid)
    check_like_stored("k", k, state.recent_keys)
    check_like_stored("v", v, state.recent_values)
    backend = config.backend_of(q)
    q, k, v = backend.detach(q), backend.detach(k), backend.detach(v)
    view, xp, scale = cache.view(), array_namespace(q), cache.attention_scale
    again = fresh(config, k, v, xp.zeros(k.shape[:-1], dtype=xp.int32, device=device(k)))
    if valid is not None:
        again = hidden(again, valid, k.shape[-2])
    real = again.positions >= 0 if again.padded else None
    # Whether every slot holds a token is known without asking the device only before the first eviction.
    whole = state.is_empty and cache.new is not None and not cache.new.padded
    seen = None if whole else view.positions >= 0
    tiers = Tiers.of(view.keys, view.values, seen)
    expansion = config.correction.expansion(state.evicted) if state.has_evicted else None
    outs, scores = [], None
    for start in range(0, q.shape[-2], backend.query_block):
        stop = min(start + backend.query_block, q.shape[-2])
        block = q[..., start:stop, :]
        stored, _ = backend.attend_stored(block, tiers, scale=scale)
        before = None if real is None else real[..., :stop]
        own = backend.attend_causal(
            block, again.keys[..., :stop, :], again.values[..., :stop, :], scale=scale, valid=before
        )
        state_of_all = merge(stored, own)
        if expansion is not None:
            state_of_all = merge(state_of_all, estimate_expansion(block, expansion, scale=scale))
        outs.append(state_of_all.out)
        largest = largest_logits(
            block, view.keys, state_of_all.lse, scale, seen, None if real is None else real[..., start:stop]
        )
        scores = largest if scores is None else xp.maximum(scores, largest)
    out = outs[0] if len(outs) == 1 else xp.concat(outs, axis=-2)
    return xp.astype(out, q.dtype, copy=False), xp.exp(scores)


def largest_logits(q: Array, k: Array, lse: Array, scale: float, seen: Array | None, real: Array | None) -> Array:
    """For each token, the largest logit that a query gave it, less the query's ``lse``: the log of the largest weight.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    k : array, shape (..., kv_head, n, d)
    lse : array, shape (..., kv_head * group, q_len)
        Of all that a query attends to.
    scale : float
    seen : bool array, shape (..., kv_head, n), or None
        False for a slot that holds no token.
    real : bool array, shape (..., kv_head, q_len), or None
        False for a query that does not count.

    Returns
    -------
    array, shape (..., kv_head, n)
    """
    products = logits(q, k, scale=scale)
    xp = array_namespace(products)
    # A query that sees nothing has no weights.
    counts = lse > -math.inf
    shift = xp.reshape(xp.where(counts, lse, xp.full_like(lse, math.inf)), products.shape[:-1])
    if real is not None:
        shift = xp.where(real[..., None, :], shift, xp.full_like(shift, math.inf))
    products = xp.max(xp.max(products - shift[..., None], axis=-2), axis=-2)
    return products if seen is None else xp.where(seen, products, xp.full_like(products, -math.inf))


def take_scores(cache: LayerCache, scores: Array) -> None:
    """Give the tokens that a cache holds scores from outside, in place of what its policy has observed.

    Parameters
    ----------
    cache : LayerCache
        With a policy that observes attention, such as `momentkv.policies.SecondReading`.
    scores : array, shape (batch..., kv_head, n)
        For the tokens of `LayerCache.view`.

    Raises
    ------
    ValueError
        If the policy looks at no scores, or there is not one for each token.
    """
    state, new, policy = cache.stored_state, cache.new, cache.config.policy
    if not cache.config.observes:
        raise ValueError(
            f"policy is {policy.name!r}, which looks at no scores of tokens; make the cache with "
            'policy="second-reading" or "twice"'
        )
    layout, filled = state.layout, state.filled
    sinks, stored = min(layout.sinks, filled), layout.width + filled
    shape = (*state.recent_count.shape, stored + (0 if new is None else new.length))
    if tuple(scores.shape) != shape:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; the cache holds tokens of shape {shape}")
    xp = array_namespace(scores)
    if stored and state.recent_attention is not None:
        scores = xp.astype(scores, state.recent_attention.dtype, copy=False)
        after = sinks + layout.width
        parts = [scores[..., :sinks], scores[..., after:stored], state.recent_attention[..., filled:]]
        retained = layout.pack(scores[..., sinks:after])
        cache.state = state.changed(recent_attention=xp.concat(parts, axis=-1), attention=retained)
    if new is not None:
        scores = xp.astype(scores, new.attention.dtype, copy=False)
        cache.new = new._replace(attention=scores[..., stored:])
