"""The reference backend: attention primitives on any array-API namespace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from momentkv._array import Array, array_namespace, device
from momentkv.attention import AttentionState, logits, merge, softmax_state
from momentkv.backends.layout import Layout, Tiers
from momentkv.codes import Coded, Standard, attend_codes, coarse, decode
from momentkv.statistics.expansion import Expansion, estimate_expansion

__all__ = ["ArrayBackend", "causal_mask"]

# With fewer bytes, calls cost more than the work. More memory than this the system allocates anew at every call. See
# docs/decoding.md#speed.
AT_ONCE = 4 * 2**20
# What an eviction does with few tokens, such as those that go, costs calls alone, and more heads at once are better.
# Four times as many bytes cost more where all heads have as many tokens: docs/decoding.md#speed.
JOINED = 2


class ArrayBackend:
    """Attention primitives that a cache needs. Other backends subclass it and replace what they do better.

    Attributes
    ----------
    name : str
    query_block : int
        Queries handled at once by the causal primitives, so that no ``n x n`` matrix is ever held.
    """

    name: ClassVar[str] = "array-api"
    query_block: ClassVar[int] = 256

    def reads(self, x: Array) -> bool:
        """Whether it computes with arrays of the library of ``x``; this one does with any."""
        return True

    def attend(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Array | None = None
    ) -> tuple[AttentionState, Array]:
        """Attention state and attention weights of a few queries over all tokens.

        Parameters
        ----------
        q : array, shape (..., kv_head * group, q_len, d)
        k, v : array, shape (..., kv_head, n, d) and (..., kv_head, n, dv)
        scale : float
        mask : bool array, optional
            Broadcastable to ``(..., kv_head, group, q_len, n)``.

        Returns
        -------
        state : AttentionState
        weights : array, shape (..., kv_head, group, q_len, n)
        """
        return softmax_state(logits(q, k, scale=scale, mask=mask), v)

    def attend_causal(
        self, q: Array, k: Array, v: Array, *, scale: float, valid: Array | None = None
    ) -> AttentionState:
        """Attention state where the queries belong to the last ``q_len`` of the ``n`` tokens.

        Query ``i`` sees the tokens up to its own, ``n - q_len + i``; ``valid``, bool ``(..., kv_head, n)``, hides more.
        Memory: ``query_block * n`` logits for each query head.
        """
        xp = array_namespace(q, k, v)
        q_len = q.shape[-2]
        blocks = []
        for start in range(0, q_len, self.query_block):
            stop = min(start + self.query_block, q_len)
            visible = k.shape[-2] - q_len + stop
            mask = causal_mask(k, q_len, start, stop, valid)
            state, _ = self.attend(
                q[..., start:stop, :], k[..., :visible, :], v[..., :visible, :], scale=scale, mask=mask
            )
            blocks.append(state)
        if len(blocks) == 1:
            return blocks[0]
        return AttentionState(
            xp.concat([block.out for block in blocks], axis=-2), xp.concat([block.lse for block in blocks], axis=-1)
        )

    def prefill(self, q: Array, k: Array, v: Array, *, scale: float, valid: Array | None = None) -> Array:
        """Output of `attend_causal` alone, by the fastest way the library has."""
        return self.attend_causal(q, k, v, scale=scale, valid=valid).out

    def correct(self, retained: AttentionState, q: Array, expansion: Expansion, *, scale: float) -> Array:
        """Output of attention over retained tokens merged with the estimate of the evicted ones."""
        return merge(retained, estimate_expansion(q, expansion, scale=scale)).out

    def attend_stored(
        self, q: Array, tiers: Tiers, *, scale: float, weights: bool = False
    ) -> tuple[AttentionState, Array | None]:
        """Attention state of queries that see all stored tokens; nothing stored is copied.

        Parameters
        ----------
        q : array, shape (..., kv_head * group, q_len, d)
        tiers : Tiers
        scale : float
        weights : bool
            Whether to return the attention weights, which a fused kernel never holds otherwise.

        Returns
        -------
        state : AttentionState
        weights : array, shape (..., kv_head, group, q_len, width + m), or None
            Of retained tokens, as the rectangle of `Layout`, and behind them of recent ones.
        """
        retained, of_retained = self.attend_retained(q, tiers, scale=scale, weights=weights)
        mask = None if tiers.recent_valid is None else tiers.recent_valid[..., None, None, :]
        recent, of_recent = self.attend(q, tiers.recent_keys, tiers.recent_values, scale=scale, mask=mask)
        if retained is None:
            return recent, of_recent if weights else None
        state = merge(retained, recent)
        if not weights:
            return state, None
        # Each set's weights add up to one; of both together they add up to its share.
        parts = ((retained, of_retained), (recent, of_recent))
        return state, array_namespace(q).concat([share(one, state, w) for one, w in parts], axis=-1)

    def attend_retained(
        self, q: Array, tiers: Tiers, *, scale: float, weights: bool
    ) -> tuple[AttentionState | None, Array | None]:
        """`attend_stored` of the retained tokens alone; None where no head has a slot."""
        layout = tiers.layout
        if layout.width == 0:
            return None, None
        mask = None if tiers.valid is None else tiers.valid[..., None, None, :]
        if layout.equal:
            return self.attend_slots(q, tiers, None, scale=scale, mask=mask)
        xp, group = array_namespace(q), q.shape[-3] // layout.heads
        states, parts = [], []
        for head, width in enumerate(layout.widths):
            own = q[..., head * group : (head + 1) * group, :, :]
            seen = None if mask is None else mask[..., head : head + 1, :, :, :width]
            state, part = self.attend_slots(own, tiers, head, scale=scale, mask=seen)
            states.append(state)
            if weights:
                rest = xp.zeros((*part.shape[:-1], layout.width - width), dtype=part.dtype, device=device(part))
                parts.append(xp.concat([part, rest], axis=-1))
        out = xp.concat([each.out for each in states], axis=-3)
        lse = xp.concat([each.lse for each in states], axis=-2)
        return AttentionState(out, lse), xp.concat(parts, axis=-4) if weights else None

    def attend_slots(
        self, q: Array, tiers: Tiers, head: int | None, *, scale: float, mask: Array | None
    ) -> tuple[AttentionState, Array]:
        """`attend` to the retained slots of one head, or of all heads if they have equally many."""
        if tiers.coding is None:
            return self.attend(q, *tiers.vectors(head), scale=scale, mask=mask)
        return self.attend_codes(q, tiers.records(tiers.coding, head), scale=scale, mask=mask)

    def attend_codes(
        self, q: Array, coded: Coded, *, scale: float, mask: Array | None = None
    ) -> tuple[AttentionState, Array]:
        """`attend` to tokens in records, which are not decoded: see `momentkv.codes.attend_codes`."""
        return attend_codes(q, coded, scale=scale, mask=mask)

    def prepare(self, expansion: Expansion) -> Any:
        """An expansion in the form that `decode` evaluates fastest; worth it if it is evaluated often."""
        return expansion

    def decode(
        self, q: Array, tiers: Tiers, expansion: Any, *, scale: float, weights: bool = False
    ) -> tuple[Array, Array | None]:
        """Output of queries that see all stored tokens, corrected: `attend_stored`, then `correct`, or both in one.

        Parameters
        ----------
        q, tiers, scale, weights
            As in `attend_stored`.
        expansion : Expansion, or a prepared one, or None
            Of the evicted tokens, perhaps as `prepare` gives it; None for no correction.

        Returns
        -------
        out : array, shape (..., kv_head * group, q_len, dv)
        weights : array, shape (..., kv_head, group, q_len, width + m), or None
            Over the stored tokens alone.
        """
        state, attention = self.attend_stored(q, tiers, scale=scale, weights=weights)
        return state.out if expansion is None else self.correct(state, q, expansion, scale=scale), attention

    def as_given(self) -> AbstractContextManager[object]:
        """Within it, arrays are computed with in their own dtypes, whatever the caller has told the library to do."""
        return nullcontext()

    def freezes(self) -> bool:
        """Whether arrays that are made now are frozen once the caller's mode has ended."""
        return False

    def is_frozen(self, x: Array) -> bool:
        """Whether nothing may be written into an array outside of the mode that it was made in."""
        return False

    def index_of(self, layout: Layout, name: str, x: Array) -> Array:
        """An index array of a layout, on the device of ``x``; a backend should upload it only once."""
        return array_namespace(x).asarray(getattr(layout, name), device=device(x))

    def numbers(self, layout: Layout, values: tuple[int, ...], like: Array) -> Array:
        """Numbers of the host, int32, on the device of ``like``; a backend should upload them once for a layout."""
        xp = array_namespace(like)
        return xp.asarray(values, dtype=xp.int32, device=device(like))

    def write_at(self, x: Array, start: int, new: Array, *, axis: int) -> Array:
        """``x`` with the slots from ``start`` on along ``axis`` (-1, -2) replaced by ``new``; it may consume ``x``."""
        xp = array_namespace(x, new)
        stop = start + new.shape[axis]
        before, after = (x[..., :start], x[..., stop:]) if axis == -1 else (x[..., :start, :], x[..., stop:, :])
        return xp.concat([before, xp.astype(new, x.dtype, copy=False), after], axis=axis)

    def write(self, x: Array, index: Array, new: Array, *, axis: int) -> Array:
        """``x`` with slots along ``axis`` (-1 or -2) replaced by ``new``; it may consume ``x``.

        Parameters
        ----------
        x : array, shape (..., n) or (..., n, d)
        index : int array, shape (..., m)
            Different slots for each row; of several, a negative one writes nothing.
        new : array, shape (..., m) or (..., m, d)
        """
        xp = array_namespace(x, index, new)
        if index.shape[-1] == 0:
            return x
        slots = xp.arange(x.shape[axis], device=device(x))
        hit = index[..., None, :] == slots[:, None]  # (..., n, m)
        some = xp.any(hit, axis=-1)
        source = xp.argmax(xp.astype(hit, xp.int8), axis=-1)
        new = xp.astype(new, x.dtype, copy=False)
        if axis == -1:
            return xp.where(some, xp.take_along_axis(new, source, axis=-1), x)
        return xp.where(some[..., None], xp.take_along_axis(new, source[..., None], axis=-2), x)

    def tokens(self, layout: Layout, codes: Array, step: Array, standard: Standard, bits: int) -> Array:
        """Records of packed slots as tokens, a rectangle (..., kv_head, width, d); see `Layout`.

        Slots that a head does not have are zero.
        """
        xp = array_namespace(codes, step)
        tokens = decode(layout.rectangle(codes, vectors=True), layout.rectangle(step, vectors=False), standard, bits)
        if layout.equal:
            return tokens
        return xp.where(layout.beside(tokens, "real")[..., None], tokens, xp.zeros_like(tokens))

    def rounded(self, x: Array, standard: Standard, bits: int, exact: Array) -> Array:
        """Tokens (..., n, d) as records of so many bits would give them; as they are where ``exact`` (..., n)."""
        xp = array_namespace(x)
        read = standard.restore(coarse(standard.standardise(x), standard, bits))
        return xp.where(exact[..., None], x, xp.astype(read, x.dtype))

    def overwrite(self, x: Array, new: Array) -> Array:
        """An array with all elements of ``new``, in the memory of ``x`` where arrays can be written to."""
        return new

    def at_once(self, x: Array) -> int:
        """Bytes of vectors, on the device of ``x``, that an eviction should work on at once; more take another turn."""
        return AT_ONCE

    def joined_at_once(self, x: Array) -> int:
        """Bytes of vectors that layers which evict together have in all; `at_once` are worked on at a time."""
        return JOINED * self.at_once(x)

    def overwrite_all(self, xs: Sequence[Array], new: Sequence[Array]) -> list[Array]:
        """`overwrite` of several arrays, at once where a library can."""
        return list(map(self.overwrite, xs, new))

    def split(self, x: Array, sizes: Sequence[int], *, axis: int, copy: bool) -> list[Array]:
        """Consecutive parts of these sizes along an axis; with ``copy``, they share no memory."""
        parts, start, before = [], 0, (slice(None),) * axis
        for size in sizes:
            part = x[(*before, slice(start, start + size), ...)]
            parts.append(self.copy(part) if copy else part)
            start += size
        return parts

    def fixed(self, x: Array) -> Array:
        """A copy whose place in memory later steps rely on."""
        return self.copy(x)

    def copy(self, x: Array) -> Array:
        """A copy that shares no memory with ``x``."""
        return array_namespace(x).asarray(x, copy=True)

    def compact(self, x: Array) -> Array:
        """``x``, or a copy of it if it keeps a larger array alive."""
        return x

    def detach(self, x: Array) -> Array:
        """``x`` without what a library remembers of how it was computed."""
        return x

    def differentiates(self, x: Array) -> bool:
        """Whether a gradient with respect to ``x`` is asked for."""
        return False


def share(part: AttentionState, whole: AttentionState, weights: Array) -> Array:
    """Weights (..., kv_head, group, q_len, n) over a part of the tokens, as weights over all of them."""
    xp = array_namespace(weights)
    some = whole.lse > -math.inf
    shift = xp.where(some, whole.lse, xp.zeros_like(whole.lse))
    factor = xp.exp(xp.where(some, part.lse, xp.zeros_like(shift)) - shift)
    return weights * xp.reshape(factor, weights.shape[:-1])[..., None]


def causal_mask(k: Array, q_len: int, start: int, stop: int, valid: Array | None) -> Array:
    """What queries ``start`` to ``stop`` (of the last ``q_len`` tokens) may see of the tokens up to their last.

    Returns a bool array of shape ``(stop - start, visible)``, or ``(..., kv_head, 1, stop - start, visible)`` where
    ``valid`` is given.
    """
    xp = array_namespace(k)
    first = k.shape[-2] - q_len
    tokens = xp.arange(first + stop, device=device(k))
    queries = xp.arange(first + start, first + stop, device=device(k))
    mask = tokens[None, :] <= queries[:, None]
    return mask if valid is None else mask & valid[..., None, None, : first + stop]
