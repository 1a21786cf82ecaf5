"""Keep the keys that point away from the others."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._rows import real_rows
from momentkv.policies.base import Policy, Tokens

__all__ = ["KeyDiff"]


@dataclasses.dataclass(frozen=True)
class KeyDiff(Policy):
    r"""Dissimilarity of a key from the mean direction of the keys at hand.

    $$ \mathrm{importance}_j = -\cos(k_j, \bar u), \qquad \bar u = \tfrac1n \sum_i k_i / \|k_i\| $$

    Needs keys only. Source: KeyDiff (arXiv 2504.15364).
    """

    name: ClassVar[str] = "keydiff"

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys)
        (keys,) = accumulate(xp, tokens.keys)
        real = tokens.positions >= 0
        valid = xp.astype(real, keys.dtype)[..., None]
        directions = unit(real_rows(keys, real))
        mean = xp.sum(directions, axis=-2, keepdims=True) / xp.maximum(
            xp.sum(valid, axis=-2, keepdims=True), xp.ones_like(valid[..., :1, :])
        )
        return -xp.sum(directions * unit(mean), axis=-1)


def unit(x: Array) -> Array:
    """Vectors of length one along the last axis; zero stays zero."""
    xp = array_namespace(x)
    # Scaled by the largest entry first, so that the squares of huge keys do not overflow.
    top = xp.max(xp.abs(x), axis=-1, keepdims=True)
    x = x / xp.where(top > 0, top, xp.ones_like(top))
    length = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))
    return x / xp.where(length > 0, length, xp.ones_like(length))
