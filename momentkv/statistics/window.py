"""What recent queries look like."""

from __future__ import annotations

from typing import NamedTuple

from momentkv._array import Array, accumulate, check_arrays
from momentkv.attention import default_scale, group_queries

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
        """Window of the given queries, shape (..., kv_head * group, q_len, d); ``scale`` as in attention."""
        xp = check_arrays(q=q)
        (grouped,) = accumulate(xp, group_queries(q, kv_heads))
        grouped = grouped * (default_scale(q.shape[-1]) if scale is None else scale)
        return cls(xp.mean(grouped, axis=-2), xp.var(grouped, axis=-2))
