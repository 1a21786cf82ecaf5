"""One layer's cache: append tokens, attend, evict, fold what was evicted into moments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from momentkv._array import Array, accumulate, accumulation_dtype, array_namespace, check_mask, device, nbytes
from momentkv.attention import check_values, default_scale, group_queries
from momentkv.backends import ArrayBackend, get_backend
from momentkv.backends.base import causal_mask
from momentkv.cache.step import CacheStep
from momentkv.policies import Policy, Tokens, check_budget, get_policy, retain
from momentkv.statistics.checks import check_order
from momentkv.statistics.corrections import Correction, get_correction
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow
from momentkv.trust import trust_of

__all__ = ["LayerCache"]

OWN_ARRAYS = ("keys", "values", "positions", "score", "query_mean", "query_square", "recent_queries")
# Queries that the correction is anchored at: the last of a prefill, and while decoding an average that fades at this
# rate. RoPE turns queries, so that an average over many positions says little about the next ones.
RECENT_QUERIES = 32


class LayerCache(CacheStep):
    """Keys and values of one attention layer within a budget, and the moments of what did not fit.

    Parameters
    ----------
    budget : int
        Tokens retained per KV head, sinks and window included.
    policy : str or Policy
        Who decides what to evict; see `momentkv.policies.POLICIES`.
    order : {1, 0, None}
        Highest order of the correction that is used: with 0, moments keep no co-moment and summaries no slope. None is
        ``correction="none"``.
    correction : str or Correction
        What stands for the evicted tokens: ``"moments"`` (the paper's), ``"summaries"`` (several, anchored), or
        ``"none"`` for plain eviction; see `momentkv.statistics.corrections.CORRECTIONS`.
    sinks : int
        First tokens of every row, always retained.
    window : int
        Most recent tokens, always retained.
    block : int
        Tokens evicted at a time while decoding: eviction starts at ``budget + block`` stored tokens.
    scale : float, optional
        Factor on ``q . k``; ``1 / sqrt(d)`` by default.
    backend : str or ArrayBackend, optional
        By default the one of the arrays that arrive.
    keep_queries : bool
        Hold the newest queries of a prefill between `attend` and `evict`, for `momentkv.cache.budgets.error_curve`.

    certify : {0, 1, 2, None}
        Keep evidence for `momentkv.trust.trust`: exact moments of this order, with extent, of all evicted tokens.
    tolerance : float, optional
        Refuse an eviction after which the certified error, relative to the output, of a recent query (one of the last
        32 since the last eviction) would be larger. The budget then grows to what is stored; the first time it warns.

    Raises
    ------
    ValueError
        If an argument is out of range, ``budget < sinks + window + 1``, or a tolerance is given without ``certify``.

    Attributes
    ----------
    keys, values : array, shape (batch..., kv_head, n, d) and (batch..., kv_head, n, dv)
        Stored tokens, in order of position; ``n < budget + block`` after every `step`.
    positions : int32 array, shape (batch..., kv_head, n)
        Place in the sequence, -1 for a slot that holds no token (padding).
    moments : Moments, Summaries or NoStatistics
        Of the tokens evicted so far.
    query_mean, query_square : array, shape (batch..., kv_head, d), or None
        First and second moment of the scaled recent queries, where the correction is anchored at them or the policy
        needs them.
    evidence : Moments or None
        See ``certify``.
    refused : int
        Evictions refused for the tolerance.
    seen : int
        Length of the sequence so far, padding and evicted tokens included.

    Notes
    -----
    Eviction comes after attention, so that every evicted token precedes all later queries and no mask is needed for
    the moments. Queries are always corrected by the moments of the tokens evicted in earlier steps.
    A prefill of any length is attended exactly first; then it is cut to the budget.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> cache = LayerCache(budget=64, window=16)
    >>> q, k, v = (rng.normal(size=(1, heads, 300, 8)) for heads in (4, 2, 2))
    >>> out = cache.step(q, k, v)                                              # prefill
    >>> out = cache.step(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:])             # decode
    >>> out.shape, cache.keys.shape, cache.moments.weight.tolist()
    ((1, 4, 1, 8), (1, 2, 65, 8), [[236.0, 236.0]])
    """

    def __init__(
        self,
        budget: int,
        *,
        policy: str | Policy = "momentkv",
        order: int | None = 1,
        correction: str | Correction = "moments",
        sinks: int = 1,
        window: int = 32,
        block: int = 32,
        scale: float | None = None,
        backend: str | ArrayBackend | None = None,
        keep_queries: bool = False,
        certify: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        check_budget(budget, sinks, window)
        if certify is not None:
            check_order(certify)
        if tolerance is not None and (certify is None or not tolerance >= 0):
            raise ValueError(
                f"tolerance is {tolerance} with certify={certify}; it must be at least 0 and needs certify=0, 1 or 2"
            )
        if block < 1:
            raise ValueError(f"block is {block}; evict at least one token at a time")
        self.budget, self.sinks, self.window, self.block = budget, sinks, window, block
        self.certify, self.tolerance = certify, tolerance
        self.policy, self.scale, self.keep_queries = get_policy(policy), scale, keep_queries
        self.correction = get_correction(correction, order=order)
        self.backend = None if backend is None else get_backend(backend)
        self.reset()

    def reset(self) -> None:
        """Forget everything; settings stay."""
        self.keys: Array = None
        self.values: Array = None
        self.positions: Array = None
        self.score: Array = None
        self.moments: Any = None
        self.evidence: Moments | None = None
        self.recent_queries: Array = None
        self.refused = 0
        self.query_mean: Array = None
        self.query_square: Array = None
        self.newest_queries: Array = None
        self.seen = 0
        self.padded = False
        self.has_evicted = False

    def append(self, k: Array, v: Array) -> None:
        """Store new tokens (first part of `step`)."""
        check_values(k, v)
        if k.shape[-2] == 0:
            raise ValueError(f"k has shape {tuple(k.shape)}: no tokens to append")
        xp = array_namespace(k, v)
        new = xp.arange(self.seen, self.seen + k.shape[-2], dtype=xp.int32, device=device(k))
        new = xp.broadcast_to(new, k.shape[:-1])
        zeros = None
        if self.policy.observes != 0:
            zeros = xp.zeros(k.shape[:-1], dtype=accumulation_dtype(xp, k.dtype, v.dtype), device=device(k))
        if self.keys is None:
            self.keys, self.values, self.positions, self.score = k, v, new, zeros
            self.moments = self.correction.empty(k, v)
            if self.certify is not None:
                self.evidence = Moments.empty(k, v, order=self.certify, extent=True)
        else:
            for name, old, fresh in (("k", self.keys, k), ("v", self.values, v)):
                if old.shape[:-2] != fresh.shape[:-2] or old.shape[-1] != fresh.shape[-1]:
                    raise ValueError(
                        f"{name} has shape {tuple(fresh.shape)}, but the cache holds {tuple(old.shape)}; "
                        "batch, KV heads and dimension must stay the same"
                    )
            self.keys = xp.concat([self.keys, k], axis=-2)
            self.values = xp.concat([self.values, v], axis=-2)
            self.positions = xp.concat([self.positions, new], axis=-1)
            if zeros is not None:
                self.score = xp.concat([self.score, zeros], axis=-1)
        self.seen += k.shape[-2]

    def attend(self, q: Array, *, valid: Array | None = None) -> Array:
        """Attend from the queries of the tokens appended last, corrected by the moments (second part of `step`)."""
        if self.keys is None:
            raise ValueError("attend was called on an empty cache; append the keys and values of its queries first")
        backend = self.backend or get_backend(q)
        xp = array_namespace(q, self.keys)
        q_len = q.shape[-2]
        if valid is not None:
            self._mark_padding(valid, q_len)
        seen_by_all = self.positions >= 0 if self.padded else None
        scale = self.attention_scale
        expansion = self.expansion if self.has_evicted else None
        if q_len == 1:
            observed = self.policy.observes != 0
            out, weights = backend.decode(
                q,
                self.keys,
                self.values,
                expansion,
                scale=scale,
                valid=seen_by_all,
                weights=observed,
            )
            if observed:
                self.observe_weights(weights)
        elif expansion is None:
            out = backend.prefill(q, self.keys, self.values, scale=scale, valid=seen_by_all)
        else:
            state = backend.attend_causal(q, self.keys, self.values, scale=scale, valid=seen_by_all)
            out = backend.correct(state, q, expansion, scale=scale)
        if q_len > 1:
            self.observe(q)
        else:
            self._remember(q)
        return xp.astype(out, q.dtype, copy=False)

    def observe_weights(self, weights: Array) -> None:
        """Show the policy the attention weights (batch..., kv_head, group, 1, n) of the token appended last."""
        n = self.keys.shape[-2]
        self.score = self.policy.observe(self.score, self._of_real_queries(weights, n - 1, n))

    def observe(self, q: Array, *, valid: Array | None = None) -> None:
        """Show policy and correction the queries ``q`` of the newest tokens, or as many of them as they want.

        `attend` does so itself; call it on its own to replay a step from stored keys, values and queries. ``valid`` is
        that of the step; it may cover more tokens than there are queries.
        """
        if valid is not None:
            self._mark_padding(valid, valid.shape[-1])
        self._remember(q)
        if self.policy.observes == 0:
            return
        xp = array_namespace(q, self.score)
        visible_to_all = self.positions >= 0 if self.padded else None
        backend = self.backend or get_backend(q)
        observes, q_len, n = self.policy.observes, q.shape[-2], self.keys.shape[-2]
        count = q_len if observes is None else min(q_len, observes)
        score = self.score
        if observes is not None and q_len >= observes and not self.policy.accumulates:
            score = xp.zeros_like(score)  # a whole observation window: what came before no longer counts
        for start in range(q_len - count, q_len, backend.query_block):
            stop = min(start + backend.query_block, q_len)
            visible = n - q_len + stop
            mask = causal_mask(self.keys, q_len, start, stop, visible_to_all)
            _, weights = backend.attend(
                q[..., start:stop, :],
                self.keys[..., :visible, :],
                self.values[..., :visible, :],
                scale=self.attention_scale,
                mask=mask,
            )
            weights = self._of_real_queries(weights, n - q_len + start, visible)
            observed = self.policy.observe(score[..., :visible], weights)
            score = xp.concat([observed, score[..., visible:]], axis=-1)
        self.score = score

    def evict(self, importance: Array | None = None) -> None:
        """Evict down to the budget where a row has filled its block, and fold in what goes (last part of `step`).

        The policy's `importance` of the tokens as they are now may be given, where it is known already.
        """
        n = self.keys.shape[-2]
        newest, self.newest_queries = self.newest_queries, None
        if n < self.budget + self.block:
            return
        xp = array_namespace(self.keys)
        counts = xp.sum(xp.astype(self.positions >= 0, xp.int64), axis=-1)
        # Each row by its own count, so that padding beside a longer row changes nothing.
        limits = xp.where(counts >= self.budget + self.block, xp.minimum(counts, 0 * counts + self.budget), counts)
        rounds = self.policy.rounds if self.order is not None and n - self.budget > self.block else 1
        one_block = counts - limits <= self.block
        positions, moments = self.positions, self.moments
        score = self.score
        for done in range(1, rounds + 1):
            selection = retain(
                self.importance(positions, score, moments) if importance is None or done > 1 else importance,
                positions,
                budget=xp.where(one_block, limits, between(counts, limits, done / rounds)),
                sinks=self.sinks,
                window=self.window,
                seen=self.seen,
            )
            moments = self.correction.fold(
                moments, self.keys, self.values, mask=selection.evicted, window=self.query_window
            )
            positions = xp.where(selection.evicted, xp.full_like(positions, -1), positions)
        if newest is not None and self.order is not None:
            # Rows whose first eviction this is and whose newest queries are all real; others keep what they have.
            fits = xp.all(self.positions[..., -RECENT_QUERIES:] >= 0, axis=-1) & (self.moments.weight == 0)
            gone = (self.positions >= 0) & (positions < 0) & fits[..., None]
            moments = self.correction.calibrate(moments, newest, self.keys, scale=self.attention_scale, mask=gone)
        evidence = self.evidence
        if evidence is not None:
            gone = (self.positions >= 0) & (positions < 0)
            evidence = evidence.update(self.keys, self.values, mask=gone)
            if self._refuses(positions, moments, evidence):
                return
        indices, filled = selection.indices, selection.filled
        kept = xp.take_along_axis(positions, indices, axis=-1)
        if self.score is not None:
            carried = xp.take_along_axis(score, indices, axis=-1)
            if not self.policy.accumulates:  # a row that did not evict goes on observing
                carried = xp.where((limits < counts)[..., None], xp.zeros_like(carried), carried)
            self.score = carried
        self.has_evicted = self.has_evicted or bool(xp.any(limits < counts))
        self.padded = self.padded and not bool(xp.all(filled))
        self.positions = xp.where(filled, kept, xp.full_like(kept, -1))
        self.keys = xp.take_along_axis(self.keys, indices[..., None], axis=-2)
        self.values = xp.take_along_axis(self.values, indices[..., None], axis=-2)
        self.moments, self.evidence, self.recent_queries = moments, evidence, None

    def _refuses(self, positions: Array, moments: Any, evidence: Moments) -> bool:
        """Whether an eviction would pass the tolerance; if so the budget grows instead."""
        if self.tolerance is None or self.recent_queries is None:
            return False
        xp = array_namespace(self.keys)
        report = trust_of(self, self.recent_queries, self.keys, self.values, positions, moments, evidence)
        worst = float(xp.max(report.certified))
        if worst <= self.tolerance:
            return False
        if not self.refused:
            warnings.warn(
                f"an eviction was refused: the certified error would be {worst:.3g} of the output, the tolerance is "
                f"{self.tolerance:g}; the budget of {self.budget} tokens grows (see LayerCache.refused)",
                stacklevel=4,
            )
        self.refused += 1
        self.budget = self.stored
        return True

    def importance(self, positions: Array = None, score: Array = None, moments: Any = None) -> Array:
        """The policy's ranking of the stored tokens, shape (batch..., kv_head, n), by the state's own or other data."""
        positions = self.positions if positions is None else positions
        score = self.score if score is None else score
        moments = self.moments if moments is None else moments
        known = self.correction.known(moments)
        if score is None:
            xp = array_namespace(positions)
            score = xp.zeros(positions.shape, dtype=known.weight.dtype, device=device(positions))
        queries = self.query_window or (None, None)
        return self.policy.importance(
            Tokens(self.keys, self.values, positions, score, known, self.attention_scale, *queries)
        )

    @property
    def expansion(self) -> Expansion | None:
        """The estimate of the evicted tokens, or None for plain eviction."""
        return self.correction.expansion(self.moments)

    @property
    def order(self) -> int | None:
        """Order of the correction; None for plain eviction."""
        return self.correction.order

    @property
    def remembers_queries(self) -> bool:
        """Whether it keeps mean and variance of recent queries: for the correction, the policy or both."""
        return self.policy.needs_queries or self.correction.anchored

    @property
    def attention_scale(self) -> float:
        """Factor on ``q . k``."""
        return default_scale(self.keys.shape[-1]) if self.scale is None else self.scale

    @property
    def stored(self) -> int:
        """Tokens stored now, by each KV head."""
        return 0 if self.keys is None else int(self.keys.shape[-2])

    @property
    def parts(self) -> tuple[LayerCache, ...]:
        """The caches it consists of, in order of KV heads: itself; a `RaggedCache` has several."""
        return (self,)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored now: keys, values, positions, scores and moments."""
        # Evidence is counted: whoever certifies pays for it.
        return sum(nbytes(x) for x in self.arrays().values())

    def arrays(self) -> dict[str, Array]:
        """Every array of the state, by name (those of the moments as ``moments.weight`` and so on)."""
        if self.keys is None:
            return {}
        own = {name: getattr(self, name) for name in OWN_ARRAYS}
        own |= {f"moments.{name}": x for name, x in self.moments.arrays().items()}
        if self.evidence is not None:
            own |= {f"evidence.{name}": x for name, x in self.evidence.arrays().items()}
        return {name: x for name, x in own.items() if x is not None}

    def map(self, function: Callable[[Array], Array]) -> None:
        """Apply a function to every array of the state: to select, repeat or reorder rows, or to move devices."""
        if self.keys is None:
            return
        changed = {name: function(x) for name, x in self.arrays().items() if name in OWN_ARRAYS}
        moments = self.moments.map(function)
        evidence = None if self.evidence is None else self.evidence.map(function)
        for name, x in changed.items():
            setattr(self, name, x)
        self.moments, self.evidence = moments, evidence

    def hold(self, recent: Array) -> None:
        """Keep recent queries for the certificate that an eviction is judged by, where there is a tolerance."""
        if self.tolerance is None:
            return
        if self.recent_queries is not None:
            recent = array_namespace(recent).concat([self.recent_queries, recent], axis=-2)
        self.recent_queries = recent[..., max(recent.shape[-2] - RECENT_QUERIES, 0) :, :]

    def _remember(self, q: Array) -> None:
        """Keep first and second moment of recent queries, and the newest queries until the eviction that follows."""
        recent = q[..., max(q.shape[-2] - RECENT_QUERIES, 0) :, :]
        self.hold(recent)
        if recent.shape[-2] == RECENT_QUERIES and (self.remembers_queries or self.keep_queries):
            self.newest_queries = recent
        if not self.remembers_queries:
            return
        self.query_mean, self.query_square = remember(
            recent, self.positions, self.attention_scale, self.query_mean, self.query_square
        )

    @property
    def query_window(self) -> QueryWindow | None:
        """The recent queries as the correction takes them."""
        if self.query_mean is None:
            return None
        xp = array_namespace(self.query_mean)
        variance = self.query_square - self.query_mean * self.query_mean
        return QueryWindow(self.query_mean, xp.maximum(variance, xp.zeros_like(variance)))

    def _mark_padding(self, valid: Array, q_len: int) -> None:
        """Empty the slots of padding among the newest tokens."""
        xp = array_namespace(self.positions, valid)
        newest = self.positions[..., -q_len:]
        check_mask("valid", valid, newest.shape, newest)
        newest = xp.where(valid, newest, xp.full_like(newest, -1))
        self.padded = self.padded or not bool(xp.all(valid))
        self.positions = xp.concat([self.positions[..., :-q_len], newest], axis=-1)

    def _of_real_queries(self, weights: Array, start: int, stop: int) -> Array:
        """Attention weights with those of padding queries (slots ``start`` to ``stop``) set to zero."""
        if not self.padded:
            return weights
        xp = array_namespace(weights)
        real = self.positions[..., start:stop] >= 0
        return xp.where(real[..., None, :, None], weights, xp.zeros_like(weights))


def remember(
    recent: Array, positions: Array, scale: float, mean: Array | None, square: Array | None
) -> tuple[Array, Array]:
    """First and second moment of scaled recent queries, given those of the queries before them.

    ``recent`` are queries (batch..., kv_head * group, q_len, d) of the newest ``q_len`` of the tokens at ``positions``.
    """
    xp = array_namespace(recent)
    kv_heads, count = positions.shape[-2], recent.shape[-2]
    (grouped,) = accumulate(xp, group_queries(recent, kv_heads))
    grouped = xp.reshape(grouped, (*grouped.shape[:-2], -1, count, grouped.shape[-1])) * scale
    real = positions[..., -count:] >= 0
    weight = xp.astype(real, grouped.dtype)[..., None, :, None]
    # Several queries at once count alike; one by one, each fades what came before it.
    number = xp.sum(weight, axis=(-3, -2))
    safe = xp.where(number > 0, number, xp.ones_like(number))
    new_mean = xp.sum(weight * xp.mean(grouped, axis=-3, keepdims=True), axis=(-3, -2)) / safe
    new_square = xp.sum(weight * xp.mean(grouped * grouped, axis=-3, keepdims=True), axis=(-3, -2)) / safe
    if mean is None or square is None:
        return new_mean, new_square
    share = xp.minimum(number * (2.0 / RECENT_QUERIES), xp.ones_like(number))
    # Where all before was padding there is nothing to fade.
    share = xp.where(xp.sum(square, axis=-1, keepdims=True) > 0, share, xp.ones_like(share))
    return mean + share * (new_mean - mean), square + share * (new_square - square)


def between(counts: Array, limits: Array, share: float) -> Array:
    """Retained counts on the way from ``counts`` (share 0) to ``limits`` (share 1), falling geometrically."""
    xp = array_namespace(counts, limits)
    start, end = (xp.log(xp.astype(xp.maximum(x, xp.ones_like(x)), xp.float32)) for x in (counts, limits))
    step = xp.astype(xp.floor(xp.exp(start + share * (end - start))), counts.dtype)
    return xp.minimum(counts, xp.maximum(step, limits))
