"""The reference backend: attention primitives on any array-API namespace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from momentkv._array import Array, array_namespace, device
from momentkv.attention import AttentionState, logits, merge, softmax_state
from momentkv.statistics.expansion import Expansion, estimate_expansion

__all__ = ["ArrayBackend", "causal_mask"]


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
        Memory: ``query_block * n`` logits a query head.
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

    def decode(
        self,
        q: Array,
        k: Array,
        v: Array,
        expansion: Expansion | None,
        *,
        scale: float,
        valid: Array | None = None,
        weights: bool = False,
    ) -> tuple[Array, Array | None]:
        """Output of queries that see all tokens, corrected: `attend`, then `correct`, or both in one.

        Parameters
        ----------
        q, k, v, scale
            As in `attend`.
        expansion : Expansion or None
            Of the evicted tokens; None for no correction.
        valid : bool array, shape (..., kv_head, n), optional
            False for slots that hold no token.
        weights : bool
            Whether to return the attention weights, which a fused kernel never holds otherwise.

        Returns
        -------
        out : array, shape (..., kv_head * group, q_len, dv)
        weights : array, shape (..., kv_head, group, q_len, n), or None
            Over the retained tokens alone.
        """
        mask = None if valid is None else valid[..., None, None, :]
        state, attention = self.attend(q, k, v, scale=scale, mask=mask)
        out = state.out if expansion is None else self.correct(state, q, expansion, scale=scale)
        return out, attention if weights else None

    def decode_ragged(
        self,
        q: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        expansion: Expansion | None,
        *,
        scale: float,
        valid: Sequence[Array | None],
        weights: bool = False,
    ) -> tuple[Array, list[Array] | None]:
        """`decode` where each KV head has tokens of its own number.

        Parameters
        ----------
        q : array, shape (..., kv_head * group, q_len, d)
        keys, values : sequence of array, shape (..., 1, n, d) and (..., 1, n, dv), one for each KV head
        expansion : Expansion or None
            Of all heads together.
        scale, weights
            As in `decode`.
        valid : sequence of bool array or None, shape (..., 1, n), one for each KV head

        Returns
        -------
        out : array, shape (..., kv_head * group, q_len, dv)
        weights : list of array, shape (..., 1, group, q_len, n), one for each KV head, or None
        """
        xp, group = array_namespace(q), q.shape[-3] // len(keys)
        states, attention = [], []
        for head, (k, v, seen) in enumerate(zip(keys, values, valid, strict=True)):
            mask = None if seen is None else seen[..., None, None, :]
            own = q[..., head * group : (head + 1) * group, :, :]
            state, of_head = self.attend(own, k, v, scale=scale, mask=mask)
            states.append(state)
            attention.append(of_head)
        state = AttentionState(
            xp.concat([each.out for each in states], axis=-3), xp.concat([each.lse for each in states], axis=-2)
        )
        out = state.out if expansion is None else self.correct(state, q, expansion, scale=scale)
        return out, attention if weights else None


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
