"""NumPy: the reference, with the softmax done in place."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from array_api_compat import is_numpy_array

from momentkv._array import Array
from momentkv.attention import AttentionState, logits
from momentkv.backends.base import ArrayBackend

__all__ = ["NumpyBackend"]


class NumpyBackend(ArrayBackend):
    """The array-API backend without its temporaries: logits become weights where they lie."""

    name: ClassVar[str] = "numpy"

    def reads(self, x: Array) -> bool:
        return bool(is_numpy_array(x))

    def attend(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Array | None = None
    ) -> tuple[AttentionState, Array]:
        weights = logits(q, k, scale=scale, mask=mask)
        weights = weights.astype(np.promote_types(weights.dtype, v.dtype), copy=False)
        *batch, kv_heads, group, q_len, n = weights.shape
        heads = (*batch, kv_heads * group, q_len)
        v = v.astype(weights.dtype, copy=False)
        top = weights.max(axis=-1, keepdims=True, initial=-np.inf)
        shift = np.where(np.isneginf(top), 0, top)
        weights -= shift
        np.exp(weights, out=weights)
        total = weights.sum(axis=-1, keepdims=True)
        weights /= np.where(total > 0, total, 1)
        out = np.matmul(weights.reshape(*batch, kv_heads, group * q_len, n), v)
        with np.errstate(divide="ignore"):
            lse = np.log(total) + shift
        return AttentionState(out.reshape(*heads, v.shape[-1]), lse.reshape(heads)), weights

    def write_at(self, x: Array, start: int, new: Array, *, axis: int) -> Array:
        stop = start + new.shape[axis]
        if axis == -1:
            x[..., start:stop] = new
        else:
            x[..., start:stop, :] = new
        return x

    def write(self, x: Array, index: Array, new: Array, *, axis: int) -> Array:
        row = np.nonzero(index >= 0)
        x[(*row[:-1], index[row])] = np.broadcast_to(new, (*index.shape, *new.shape[index.ndim :]))[row]
        return x

    def overwrite(self, x: Array, new: Array) -> Array:
        x[...] = new
        return x

    def compact(self, x: Array) -> Array:
        return x if x.base is None else x.copy()
