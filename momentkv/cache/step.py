"""One step of a layer's cache, the same whatever it stores: append, attend, evict, and all or nothing of it."""

from __future__ import annotations

import abc
from typing import Any

from momentkv._array import Array, check_mask
from momentkv.attention import check_keys

__all__ = ["CacheStep"]


class CacheStep(abc.ABC):
    """The parts of a step, and the step itself."""

    @abc.abstractmethod
    def append(self, k: Array, v: Array) -> None:
        """Store new tokens (first part of `step`)."""

    @abc.abstractmethod
    def attend(self, q: Array, *, valid: Array | None = None) -> Array:
        """Attend from the queries of the tokens appended last (second part of `step`)."""

    @abc.abstractmethod
    def evict(self) -> None:
        """Evict down to the budget (last part of `step`)."""

    def step(self, q: Array, k: Array, v: Array, *, valid: Array | None = None) -> Array:
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
        """
        check_keys(q, k)
        if q.shape[-2] != k.shape[-2]:
            raise ValueError(f"q has {q.shape[-2]} tokens but k has {k.shape[-2]}; a step needs one query a token")
        if q.shape[:-3] != k.shape[:-3] or q.shape[-3] % k.shape[-3]:
            raise ValueError(
                f"q has {q.shape[-3]} heads in shape {tuple(q.shape)}, k has {k.shape[-3]} in {tuple(k.shape)}; batch "
                "axes must be equal, and the number of query heads a multiple of the number of KV heads"
            )
        if valid is not None:
            check_mask("valid", valid, k.shape[:-1], k)
        before = self.snapshot()
        try:
            self.append(k, v)
            out = self.attend(q, valid=valid)
            self.evict()
        except BaseException:
            self.restore(before)
            raise
        return out

    def snapshot(self) -> dict[str, Any]:
        """The whole state, to go back to with `restore`. Nothing is copied: no array is ever changed in place."""
        return dict(self.__dict__)

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a state that `snapshot` gave."""
        self.__dict__.update(state)
