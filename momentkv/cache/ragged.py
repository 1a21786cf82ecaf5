"""One layer's cache whose KV heads retain different numbers of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from momentkv._array import Array, array_namespace, check_mask
from momentkv.backends import get_backend
from momentkv.cache.layer import LayerCache, remember
from momentkv.cache.step import CacheStep

__all__ = ["RaggedCache"]

# Arrays of a `LayerCache` that is still complete, and their axis of heads.
HEAD_AXES = {
    "keys": -3,
    "values": -3,
    "positions": -2,
    "score": -2,
    "query_mean": -2,
    "query_square": -2,
    "newest_queries": -3,
}

QUERY_ARRAYS = ("query_mean", "query_square")


class RaggedCache(CacheStep):
    """A `LayerCache` for every KV head, each with a budget of its own, behind the interface of one.

    A head stores what it retains and nothing else: no head is padded to the length of another.

    Parameters
    ----------
    budgets : sequence of int
        Tokens retained by each KV head, sinks and window included.
    **settings
        As `LayerCache` takes them, the same for all heads.

    Raises
    ------
    ValueError
        If there are no budgets, one is too small, or the policy looks across heads (`Policy.couples_heads`).

    Attributes
    ----------
    parts : tuple of LayerCache
        One for each KV head, with an axis of length 1 for it.

    Notes
    -----
    Heads are attended one after the other: as much arithmetic as together, in as many calls as there are KV heads.
    While decoding they are corrected together; on CUDA, a token costs one launch of the kernel for all heads.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> cache = RaggedCache([20, 60], window=16)
    >>> q, k, v = (rng.normal(size=(1, heads, 300, 8)) for heads in (4, 2, 2))
    >>> cache.step(q, k, v).shape, [part.keys.shape[-2] for part in cache.parts]
    ((1, 4, 300, 8), [20, 60])
    """

    def __init__(self, budgets: Sequence[int], **settings: Any) -> None:
        if len(budgets) == 0:
            raise ValueError("budgets is empty; give the budget of every KV head")
        self.parts = tuple(LayerCache(budget, **settings) for budget in budgets)
        self._joined: tuple[list[Any], Any] | None = None
        policy = self.parts[0].policy
        if policy.couples_heads:
            raise ValueError(
                f"policy is {policy.name!r}, which looks across the KV heads of a layer, so that none can have a "
                'budget of its own; use a LayerCache, in MomentCache sharing="layers" or "uniform"'
            )

    @property
    def seen(self) -> int:
        """Length of the sequence so far, padding and evicted tokens included."""
        return self.parts[0].seen

    @property
    def budget(self) -> list[int]:
        """Budget of each KV head."""
        return [part.budget for part in self.parts]

    @property
    def stored(self) -> list[int]:
        """Tokens stored now by each KV head."""
        return [part.stored for part in self.parts]

    @property
    def keys(self) -> list[Array]:
        """Retained keys of each KV head, shape (batch..., 1, n, d)."""
        return [part.keys for part in self.parts]

    @property
    def values(self) -> list[Array]:
        """Retained values of each KV head, shape (batch..., 1, n, dv)."""
        return [part.values for part in self.parts]

    @property
    def scale(self) -> float | None:
        """Factor on ``q . k``, or None for the usual one."""
        return self.parts[0].scale

    @scale.setter
    def scale(self, scale: float | None) -> None:
        for part in self.parts:
            part.scale = scale

    def append(self, k: Array, v: Array) -> None:
        """Store new tokens (first part of `step`)."""
        if k.ndim < 3 or k.shape[-3] != len(self.parts):
            raise ValueError(
                f"k has shape {tuple(k.shape)}, but budgets were given for {len(self.parts)} KV heads; its third axis "
                "from the end must have that length"
            )
        if k.shape[:-1] != v.shape[:-1]:
            raise ValueError(f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; they must agree up to the last axis")
        self._all(lambda head, part: part.append(k[..., head : head + 1, :, :], v[..., head : head + 1, :, :]))

    def attend(self, q: Array, *, valid: Array | None = None) -> Array:
        """Attend from the queries of the tokens appended last, corrected by the moments (second part of `step`)."""
        if valid is not None:
            check_mask("valid", valid, (*q.shape[:-3], len(self.parts), q.shape[-2]), q)

        def attend(head: int, part: LayerCache) -> Array:
            return part.attend(self._queries(q, head), valid=of_head(valid, head))

        xp = array_namespace(q)
        if q.shape[-2] == 1 and self.parts[0].keys is not None:
            before = self.snapshot()
            try:
                return self._decode(q, valid)
            except BaseException:
                self.restore(before)
                raise
        return xp.concat(self._all(attend), axis=-3)

    def observe(self, q: Array, *, valid: Array | None = None) -> None:
        """Show policy and correction the queries of the newest tokens; see `LayerCache.observe`."""
        self._all(lambda head, part: part.observe(self._queries(q, head), valid=of_head(valid, head)))

    def evict(self) -> None:
        """Evict each head down to its budget (last part of `step`)."""
        self._all(lambda head, part: part.evict())

    def reset(self) -> None:
        """Forget everything; settings stay."""
        self._joined = None
        for part in self.parts:
            part.reset()

    def snapshot(self) -> dict[str, Any]:
        """The whole state, to go back to with `restore`. Nothing is copied: no array is ever changed in place."""
        return {"parts": [part.snapshot() for part in self.parts]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `snapshot` gave."""
        for part, before in zip(self.parts, state["parts"], strict=True):
            part.restore(before)

    def map(self, function: Callable[[Array], Array]) -> None:
        """Apply a function to every array of the state: to select, repeat or reorder rows, or to move devices."""
        self._joined = None
        self._all(lambda head, part: part.map(function))

    def arrays(self) -> dict[str, Array]:
        """Every array of the state, by name: ``heads.0.keys`` and so on."""
        return {f"heads.{head}.{name}": x for head, part in enumerate(self.parts) for name, x in part.arrays().items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored now."""
        return sum(part.nbytes for part in self.parts)

    def together(self) -> LayerCache | None:
        """All heads in one `LayerCache` to measure with, or None once they differ in length or have evicted."""
        if any(part.has_evicted for part in self.parts) or len(set(self.stored)) > 1 or not self.seen:
            return None
        one = copy.copy(self.parts[0])
        xp = array_namespace(one.keys)
        for name, axis in HEAD_AXES.items():
            arrays = [getattr(part, name) for part in self.parts]
            setattr(one, name, None if arrays[0] is None else xp.concat(arrays, axis=axis))
        one.padded = any(part.padded for part in self.parts)
        # To measure with; evidence and refusals stay with the parts.
        one.certify = one.tolerance = one.evidence = one.recent_queries = None
        one.moments = one.correction.empty(one.keys, one.values)
        return one

    def _decode(self, q: Array, valid: Array | None) -> Array:
        """`attend` for one query a head: all heads in one call, as are the correction and the memory of queries."""
        first = self.parts[0]
        if valid is not None:
            for head, part in enumerate(self.parts):
                part._mark_padding(of_head(valid, head), 1)
        corrects = first.order is not None and any(part.has_evicted for part in self.parts)
        observed = first.policy.observes != 0
        out, weights = (first.backend or get_backend(q)).decode_ragged(
            q,
            self.keys,
            self.values,
            first.correction.expansion(self._moments()) if corrects else None,
            scale=first.attention_scale,
            valid=[part.positions >= 0 if part.padded else None for part in self.parts],
            weights=observed,
        )
        if weights is not None:
            for part, seen in zip(self.parts, weights, strict=True):
                part.observe_weights(seen)
        for head, part in enumerate(self.parts):
            part.hold(self._queries(q, head))
        if first.remembers_queries:
            self._remember(q)
        return array_namespace(q).astype(out, q.dtype, copy=False)

    def _moments(self) -> Any:
        """Moments of all heads in one; joined anew only when those of a head have changed."""
        parts = [part.moments for part in self.parts]
        held = self._joined
        if held is None or any(one is not other for one, other in zip(held[0], parts, strict=True)):
            xp, axis = array_namespace(parts[0].weight), parts[0].weight.ndim - 1
            arrays = [moments.arrays() for moments in parts]
            one = type(parts[0])(**{name: xp.concat([each[name] for each in arrays], axis=axis) for name in arrays[0]})
            for head, part in enumerate(self.parts):  # what a head holds is now a part of it: nothing is stored twice
                own = (slice(None),) * axis + (slice(head, head + 1), ...)
                part.moments = one.map(lambda x, own=own: x[own])
            self._joined = held = ([part.moments for part in self.parts], one)
        return held[1]

    def _remember(self, q: Array) -> None:
        """The memory of queries of all heads, brought up to date at once."""
        xp = array_namespace(q)
        before: list[Array | None] = [None, None]
        if self.parts[0].query_mean is not None:
            before = [xp.concat([getattr(part, name) for part in self.parts], axis=-2) for name in QUERY_ARRAYS]
        newest = xp.concat([part.positions[..., -1:] for part in self.parts], axis=-2)
        after = remember(q, newest, self.parts[0].attention_scale, *before)
        for name, x in zip(QUERY_ARRAYS, after, strict=True):
            for head, part in enumerate(self.parts):
                setattr(part, name, x[..., head : head + 1, :])

    def _queries(self, q: Array, head: int) -> Array:
        """The queries of one KV head's group."""
        group = q.shape[-3] // len(self.parts)
        return q[..., head * group : (head + 1) * group, :, :]

    def _all(self, function: Callable[[int, LayerCache], Any]) -> list[Any]:
        """Do something with every head; on an error none has changed."""
        before = self.snapshot()
        try:
            return [function(head, part) for head, part in enumerate(self.parts)]
        except BaseException:
            self.restore(before)
            raise


def of_head(valid: Array | None, head: int) -> Array | None:
    """The padding of one head, where heads differ in it."""
    if valid is None or valid.ndim < 2 or valid.shape[-2] == 1:
        return valid
    return valid[..., head : head + 1, :]
