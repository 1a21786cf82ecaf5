"""One layer's cache: append tokens, attend, evict, fold what was evicted into statistics."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from momentkv._array import Array, array_namespace, device
from momentkv._typing import ArrayObject
from momentkv.attention import check_values, default_scale
from momentkv.backends import ArrayBackend
from momentkv.cache.config import EXACT_WINDOW, NO_GRADIENT, RECENT_QUERIES, CacheConfig, checked_budget, make_config
from momentkv.cache.eviction import evicted_state, importance_of, without_newest
from momentkv.cache.holdings import Holdings
from momentkv.cache.observing import observed_queries, real_ones_last, without_padding
from momentkv.cache.queries import gathers
from momentkv.cache.state import LayerState, NewTokens, hidden, joined, place, told
from momentkv.cache.step import arrived, attended, check_like_stored, check_step, decoded, fresh, remembered, started
from momentkv.cache.threads import alone
from momentkv.cache.traces import check_trace
from momentkv.policies import Policy, PolicyName
from momentkv.statistics.corrections import Correction, CorrectionName

__all__ = ["LayerCache"]


class LayerCache(Holdings):
    """Keys and values of one attention layer within a budget, and statistics of the tokens that did not fit.

    Parameters
    ----------
    budget : int or sequence of int
        Tokens retained for each KV head, sinks and window included: one number for all, or one for each.
    policy : str or Policy
        What decides which tokens to evict; see `momentkv.policies.POLICIES`.
    order : {1, 0, None}
        Order of the correction; None for plain eviction, which keeps no moments.
    correction : str or Correction
        What stands for the evicted tokens: ``"moments"`` (the paper's) or ``"summaries"`` (several, anchored); see
        `momentkv.statistics.corrections.CORRECTIONS`. With order 0, summaries have no slope.
    sinks, window : int
        First and most recent tokens of every row, always retained.
    block : int
        Tokens evicted at a time while decoding: eviction starts at ``budget + block`` stored tokens.
    scale : float, optional
        Factor on ``q . k``; ``1 / sqrt(d)`` by default.
    backend : str or ArrayBackend, optional
        By default the one of the arrays that arrive.
    keep_queries : bool
        Keep the newest queries of a prefill between `attend` and `evict`, for `momentkv.cache.allocation.error_curves`.
    certify : {0, 1, 2, None}
        Keep evidence for `momentkv.trust.trust`: exact moments of this order, with extent, of all evicted tokens.
    tolerance : float, optional
        Refuse to evict from a KV head if the certified error, relative to the output, of a recent query (one of the
        last 32 since the last eviction) would be larger. Its budget then grows to what it stores, with a warning.
    static : bool
        Whether steps of one token are done in arrays that keep their size and place, by the device's own count. `step`
        then asks the device whether a block is full; `momentkv.hf` keeps the time on the host, so that nothing waits.
    bits : int or pair of int, optional
        Quantization: bits for each number of a retained token, on average (3, 4, 5, 6, 8 or 16), or for those of its
        key and of its value: see `momentkv.codes`. None for the dtype of the arrays.
    exact_window : int
        With ``bits``: how many of the window's newest tokens stay exact, beside sinks and the filling block.
    statistics_bits : {None, 16}
        Bits for each number of what stands for evicted tokens, between steps: see `momentkv.statistics.narrow`. None
        for full precision.

    Raises
    ------
    ValueError
        If an argument is out of range, ``budget < sinks + window + 1``, or a tolerance is given without ``certify``.
    TypeError
        If an argument that counts something is not a whole number.

    Attributes
    ----------
    state : LayerState or None
        All that is stored, see `momentkv.cache.state`; None before the first token.
    budgets : list of int, or None
        Budget of each KV head, once their number is known.
    refused : int
        Evictions refused for the tolerance.

    Notes
    -----
    Eviction comes after attention, so that every evicted token precedes all later queries and the moments need no mask.
    Queries are corrected by the moments of the tokens evicted in earlier steps.
    A prefill of any length gets exact attention first; then it is cut to the budget.
    The cache keeps copies of the arrays it is given, without gradients. One thread at a time: `step` refuses another.
    The defaults are the paper's method; `momentkv.hf.MomentCache` has others, which gave better results on models.

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
        budget: int | Sequence[int],
        *,
        policy: PolicyName | Policy = "momentkv",
        order: int | None = 1,
        correction: CorrectionName | Correction = "moments",
        sinks: int = 1,
        window: int = 32,
        block: int = 32,
        scale: float | None = None,
        backend: str | ArrayBackend | None = None,
        keep_queries: bool = False,
        certify: int | None = None,
        tolerance: float | None = None,
        static: bool = False,
        bits: int | Sequence[int] | None = None,
        exact_window: int = EXACT_WINDOW,
        statistics_bits: int | None = None,
    ) -> None:
        self.config: CacheConfig = make_config(
            policy=policy,
            order=order,
            correction=correction,
            sinks=sinks,
            window=window,
            block=block,
            scale=scale,
            backend=backend,
            keep_queries=keep_queries,
            certify=certify,
            tolerance=tolerance,
            static=static,
            bits=bits,
            exact_window=exact_window,
            statistics_bits=statistics_bits,
        )
        self._budget = checked_budget(self.config, budget)
        self.scale = self.config.scale
        self.take_number()
        self.fixed: LayerState | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything; settings stay, and so do the arrays of static steps."""
        self.state: LayerState | None = None
        # Tokens that were appended and have not been evicted or placed yet.
        self.new: NewTokens | None = None
        self.newest_queries: Array = None
        # While set, tokens may be taken back: nothing is observed or evicted.
        self.recording = self.torn = self.frozen = False
        self.refused = 0
        self.budgets: list[int] | None = None if isinstance(self._budget, int) else list(self._budget)

    @property
    def budget(self) -> int | list[int]:
        """Tokens retained per KV head; a list where heads were given, or have come to have, budgets of their own."""
        if self.budgets is None or (isinstance(self._budget, int) and len(set(self.budgets)) == 1):
            return self._budget if self.budgets is None else self.budgets[0]  # type: ignore[return-value]
        return list(self.budgets)

    @budget.setter
    def budget(self, budget: int | Sequence[int]) -> None:
        checked, budgets = self.checked_budgets(budget)
        refused: dict[int, float] = {}
        if self.state is not None and budgets is not None and self.has_to_move(budgets):
            check_trace(self, self.state.keys)
            state = told(self.stored_state, self.config.corrects).changed(seen=self.seen)
            self.state, refused = evicted_state(
                self.config, state, None, budgets, scale=self.attention_scale, resized=True
            )
        self._budget, self.budgets = checked, budgets
        if refused:
            self._refuse(refused)

    @alone
    def step(self, q: ArrayObject, k: ArrayObject, v: ArrayObject, *, valid: ArrayObject | None = None) -> Array:
        """Append tokens, attend from their queries, then evict down to the budget if the block is full.

        Parameters
        ----------
        q : array, shape (batch..., kv_head * group, m, d)
        k, v : array, shape (batch..., kv_head, m, d) and (batch..., kv_head, m, dv)
        valid : bool array, broadcastable to (batch..., kv_head, m), optional
            False for padding, which is never attended to, retained or folded.

        Returns
        -------
        array, shape (batch..., kv_head * group, m, dv)
            In the dtype of ``q``.

        Raises
        ------
        ValueError
            If shapes do not fit; the cache is then unchanged.
        RuntimeError
            If another step is under way, or one was interrupted while a static state's own arrays were written.

        Notes
        -----
        A step that fails, for whatever reason, leaves the cache as it was; Ctrl-C within a static step's last lines
        alone leaves one that refuses to go on.
        """
        check_step(q, k, v, valid)
        before = self.held()
        try:
            self.append(k, v)
            out = self.attend(q, valid=valid)
            self.evict()
            if self.is_ticked:
                self.state = self.flushed(self.stored_state)
            self.fix()
        except BaseException:
            self.go_back(before)
            raise
        return out

    def append(self, k: ArrayObject, v: ArrayObject) -> None:
        """Take new tokens (first part of `step`)."""
        self.check_whole()
        check_values(k, v)
        check_trace(self, k)
        if k.shape[-2] == 0:
            raise ValueError(f"k has shape {tuple(k.shape)}: no tokens to append")
        self.thaw()
        backend = self.config.backend_of(k)
        k, v = backend.detach(k), backend.detach(v)
        if self.state is None:
            self.state, self.budgets = started(self.config, k, v, self._budget)
        state = self.state
        for name, old, given in (("k", state.recent_keys, k), ("v", state.recent_values, v)):
            check_like_stored(name, given, old)
        xp = array_namespace(k, v)
        if self.is_fixed and k.shape[-2] == 1 and self.new is None:
            self.new = arrived(self.config, state, k, v)
            return
        self.state = told(state, self.config.corrects)
        positions = xp.arange(self.seen, self.seen + k.shape[-2], dtype=xp.int32, device=device(k))
        positions = xp.broadcast_to(positions, k.shape[:-1])
        new = fresh(self.config, k, v, positions)
        with backend.as_given():
            self.new = new if self.new is None else joined(self.new, new)

    def attend(self, q: ArrayObject, *, valid: ArrayObject | None = None) -> Array:
        """Attend from the queries of the tokens appended last, corrected by the moments (second part of `step`)."""
        state, new = self.awaiting(q)
        backend = self.config.backend_of(q)
        xp = array_namespace(q, new.keys)
        if self.config.static and backend.differentiates(q):
            raise RuntimeError(NO_GRADIENT)
        if valid is not None:
            new = hidden(new, valid, q.shape[-2], ask=not self.is_fixed)
        if new.length == 1 and not self.recording and (self.is_fixed or state.filled < state.layout.recent):
            out, self.state = self.decoded(state, new, q)
            self.new = None
            return xp.astype(out, q.dtype, copy=False)
        self.new = new
        expansion = self.config.correction.expansion(state.evicted) if state.has_evicted else None
        out = attended(backend, state, new, q, scale=self.attention_scale, expansion=expansion)
        if not self.recording:
            self.observe(q)
        return xp.astype(out, q.dtype, copy=False)

    def decoded(self, state: LayerState, new: NewTokens, q: ArrayObject) -> tuple[Array, LayerState]:
        """`momentkv.cache.step.decoded` by these settings; nothing is changed."""
        expansion = self._prepared(self.config.backend_of(q), state)
        return decoded(
            self.config, state, new, q, scale=self.attention_scale, expansion=expansion, gathers=gathers(self)
        )

    @property
    def attention_scale(self) -> float:
        """Factor on ``q . k``."""
        return default_scale(self.stored_state.recent_keys.shape[-1]) if self.scale is None else self.scale

    def _prepared(self, backend: ArrayBackend, state: LayerState) -> Any:
        """The estimate of evicted tokens as the backend evaluates it fastest; kept, it would take more than they do."""
        if not (self.config.corrects and (self.is_fixed or state.has_evicted)):
            return None
        expansion = self.config.correction.expansion(state.evicted)
        # Of a static state they are read as they are, overwritten later: also by a step recorded while they were empty.
        return expansion if expansion is None or self.is_fixed else backend.prepare(expansion)

    def observe(self, q: ArrayObject, *, valid: ArrayObject | None = None) -> None:
        """Show policy and correction the queries ``q`` of the newest tokens, or as many of them as they want.

        `attend` does so itself; call it on its own to replay a step from stored keys, values and queries. ``valid`` is
        that of the step; it may cover more tokens than there are queries.
        """
        state, new, config = self.state, self.new, self.config
        if state is None or new is None:
            raise ValueError("observe was called on an empty cache; append the keys and values of its queries first")
        if valid is not None:
            new = hidden(new, valid, valid.shape[-1])
        backend = config.backend_of(q)
        with backend.as_given():
            new, q = real_ones_last(new, backend.detach(q), ask=not self.is_fixed)
            q = without_padding(new, q)
        few = q.shape[-2] < RECENT_QUERIES
        state = remembered(config, state, new, q, scale=self.attention_scale, gathers=few and gathers(self))
        if q.shape[-2] >= RECENT_QUERIES and (config.remembers_queries or config.keep_queries):
            self.newest_queries = backend.copy(q[..., max(q.shape[-2] - config.newest, 0) :, :])
        if new.attention is not None and state.attention is not None:
            state, new = observed_queries(config, backend, state, new, q, self.attention_scale)
        self.state, self.new = state, new

    def evict(self, importance: ArrayObject | None = None, *, block: int | None = None) -> None:
        """Evict down to the budget where a row has filled its block, and fold in what goes (last part of `step`).

        The policy's `importance` of the tokens as they are now may be given, where it is known already; and a
        ``block`` of another size, 1 to go down to the budget in any case.
        """
        state, new = self.state, self.new
        if state is None or self.recording or (self.is_fixed and new is None and importance is None):
            return
        check_trace(self, state.keys)
        newest, recent = self.newest_queries, state.layout.recent
        state = state.changed(seen=self.seen)
        if new is not None and importance is None and state.filled + new.length <= recent:
            state, new = place(self.config.backend_of(new.keys), state, new), None
        refused: dict[int, float] = {}
        full = state.filled == recent or (self.config.static and state.clock is None)
        if new is not None or full or block is not None:
            state, refused = evicted_state(
                self.config,
                state,
                new,
                self.budgets or [],
                scale=self.attention_scale,
                importance=importance,
                newest=newest,
                block=block,
            )
        self.state, self.new, self.newest_queries = state, None, None
        if refused:
            self._refuse(refused)

    def flush(self) -> None:
        """Evict from every row and head whose block is full, where steps are static; the caller keeps the time."""
        before, state = self.held(), self.stored_state
        check_trace(self, state.keys)
        try:
            self.state = self.flushed(state)
            if state is self.fixed:
                self.fix()
        except BaseException:
            self.go_back(before)
            raise

    def flushed(self, state: LayerState) -> LayerState:
        """A static state after eviction; nothing is asked of the device, and nothing of the cache is changed."""
        return evicted_state(self.config, state, None, self.budgets or [], scale=self.attention_scale)[0]

    def drop(self, tokens: int) -> None:
        """Take the newest tokens out, all of which must still be stored in every head.

        Attention is then as if they had not come; they have had their part in what was observed.

        Raises
        ------
        TypeError, ValueError
            If it is no number of tokens that were read, or some of them were evicted; the cache is then unchanged.
        """
        check_trace(self, self.stored_state.keys)
        tokens = self.checked_newest(tokens)
        self.state = without_newest(self.config, self.stored_state, self.budgets or [], self.seen, tokens)

    @property
    def is_due(self) -> bool:
        """Whether any KV head stores a block more than its budget."""
        return any(
            stored >= budget + self.config.block
            for stored, budget in zip(self.stored_by_head, self.budgets or [], strict=True)
        )

    def _refuse(self, refused: dict[int, float]) -> None:
        """Let budgets grow to what is stored, for heads whose eviction was refused with this certified error."""
        if not self.refused:
            warnings.warn(
                f"an eviction was refused: the certified error would be {max(refused.values()):.3g} of the output, the "
                f"tolerance is {self.config.tolerance:g}; the budget of {self.budget} tokens grows (see "
                "LayerCache.refused)",
                stacklevel=4,
            )
        self.refused += 1
        stored = self.stored_by_head
        self.budgets = [stored[head] if head in refused else b for head, b in enumerate(self.budgets or [])]

    def importance(self) -> Array:
        """The policy's ranking of the tokens of `view`, shape (batch..., kv_head, n)."""
        state, known = self.stored_state, self.config.correction.known(self.stored_state.evicted)
        return importance_of(self.config, self.view(), known, self.attention_scale, state, newest=self.newest_queries)

    def take(self, state: LayerState) -> None:
        """Go on from a state that a cache of these settings had."""
        self.state, self.new, self.newest_queries, self.torn = state, None, None, False
