"""What recent queries look like."""

from __future__ import annotations

from typing import NamedTuple

from momentkv._array import Array, accumulate, check_computed
from momentkv._numbers import whole_number
from momentkv.attention import group_queries, scale_of

__all__ = ["QueryWindow"]


class QueryWindow(NamedTuple):
    """What recent queries look like, per KV head; they are scaled (``s q``), so that products with keys are logits.

    Attributes
    ----------
    mean : array, shape (..., kv_head, d)
    variance : array, shape (..., kv_head, d)
        Of each coordinate.
    """

    mean: Array
    variance: Array

    @classmethod
    def from_queries(cls, q: Array, kv_heads: int, *, scale: float | None = None) -> QueryWindow:
        """Window of the given queries, shape (..., kv_head * group, q_len, d); ``scale`` as in attention.

        Raises
        ------
        ValueError
            If there is no query, or shapes do not fit.
        """
        xp = check_computed(q=q)
        if q.ndim < 3 or q.shape[-2] == 0:
            raise ValueError(f"q has shape {tuple(q.shape)}; give at least one query, (..., q_head, q_len, d)")
        kv_heads = whole_number("kv_heads", kv_heads)
        (grouped,) = accumulate(xp, group_queries(q, kv_heads))
        grouped = grouped * scale_of(scale, q.shape[-1])
        return cls(xp.mean(grouped, axis=-2), xp.var(grouped, axis=-2))
