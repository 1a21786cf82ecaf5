"""Keep the tokens that the others do not span."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._numbers import flag
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.novelty import centred, mahalanobis
from momentkv.statistics.weights import positive

__all__ = ["Leverage"]


@dataclasses.dataclass(frozen=True)
class Leverage(Policy):
    r"""Statistical leverage of each key among the keys at hand.

    $$ \mathrm{importance}_j = k_j^\top (K^\top K + \lambda I)^{-1} k_j, \qquad
       \lambda = \frac{\lVert K \rVert_F^2}{1000\, d} $$

    It is from 0 to 1. A key that repeats others has little. A key whose direction no other key has is near 1. Needs
    keys, and values if they count.

    Parameters
    ----------
    values : bool
        Multiply by the leverage of the value among the values, as CurDKV does.
    centred : bool
        Take vectors less their mean first. With ``values`` this ranks as the novelty of `Balanced` does.

    Notes
    -----
    Source: leverage scores choose the rows of a CUR decomposition (Drineas, Mahoney, Muthukrishnan, arXiv 0708.3696).
    Compactor (arXiv 2507.08143) evicts by those of centred keys before RoPE, after a random projection, blended with
    attention; CurDKV (arXiv 2509.15038) by those of keys times those of values, approximated by squared norms. Here
    they are exact, and those of the keys that attention uses, except for a ridge: a thousandth of the mean eigenvalue,
    which few or equal tokens need. Sinks and window are the cache's.

    Examples
    --------
    The third key is the only one in its direction.

    >>> import numpy as np
    >>> from momentkv import Moments, Tokens
    >>> k = np.array([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    >>> tokens = Tokens(k, k, np.arange(3)[None], None, Moments.empty(k, k), 1.0)
    >>> Leverage().importance(tokens).round(2).tolist()
    [[0.5, 0.5, 1.0]]
    """

    name: ClassVar[str] = "leverage"
    values: bool = False
    centred: bool = False

    def __post_init__(self) -> None:
        flag("values", self.values)
        flag("centred", self.centred)

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys, tokens.values)
        keys, values = accumulate(xp, tokens.keys, tokens.values)
        real = tokens.positions >= 0
        leverage = self._of(keys, real)
        return leverage * self._of(values, real) if self.values else leverage

    def _of(self, x: Array, real: Array) -> Array:
        xp = array_namespace(x)
        x = centred(x, real) if self.centred else xp.where(real[..., None], x, xp.zeros_like(x))
        number = positive(xp, xp.sum(xp.astype(real, x.dtype), axis=-1, keepdims=True))
        return mahalanobis(x, real) / number
