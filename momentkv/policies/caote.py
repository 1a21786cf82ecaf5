"""Keep the tokens whose loss would move the attended output most."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._numbers import flag, whole_number
from momentkv.policies.base import Policy, Tokens
from momentkv.statistics.weights import positive

__all__ = ["CAOTE", "others"]


@dataclasses.dataclass(frozen=True)
class CAOTE(Policy):
    r"""Distance that the attended output moves if this token alone is evicted.

    $$ \mathrm{importance}_j = \frac{a_j}{1 - a_j} \lVert o - v_j \rVert, \qquad
       a_j = \frac{p_j}{\sum_i p_i}, \quad o = \sum_i a_i v_i $$

    Needs observed attention and values.

    Parameters
    ----------
    fast : bool
        Put the mean of all values in place of ``o`` (FastCAOTE).
    observes : int
        Length of the observation window in queries, at least 1.

    Notes
    -----
    ``p_j`` is the attention of the observation window, summed over its queries and averaged over the group. The paper
    computes ``a`` from the scores of any policy that observes attention, a query head at a time. It also sums over
    queries before it uses values. The distance is computed as ``a_j ||v_j - o_j||``, where ``o_j`` is the output of all
    other tokens. That is the same without the division by ``1 - a_j``, which has no digits left where one token has all
    attention. Where no other token has attention, ``o_j = 0``.

    Source: CAOTE (arXiv 2504.14051). Derivation: docs/derivations/eviction.md.

    Examples
    --------
    Equal attention, so the value that is far from the others decides.

    >>> import numpy as np
    >>> from momentkv import Moments, Tokens
    >>> k, v = np.zeros((1, 3, 1)), np.array([[[0.0], [3.0], [0.0]]])
    >>> score, positions = np.ones((1, 3)), np.arange(3)[None]
    >>> CAOTE().importance(Tokens(k, v, positions, score, Moments.empty(k, v), 1.0)).round(6).tolist()
    [[0.5, 1.0, 0.5]]
    """

    name: ClassVar[str] = "caote"
    observes: int | None = 32
    fast: bool = False

    def __post_init__(self) -> None:
        if self.observes is None or whole_number("observes", self.observes) < 1:
            raise ValueError(f"observes is {self.observes}; use a window of at least 1 query")
        flag("fast", self.fast)

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.values, tokens.attention)
        values, score = accumulate(xp, tokens.values, tokens.attention)
        real = tokens.positions >= 0
        values = xp.where(real[..., None], values, xp.zeros_like(values))
        score = xp.where(real, score, xp.zeros_like(score))
        share = (score / positive(xp, xp.sum(score, axis=-1, keepdims=True)))[..., None]
        rest = others(share)
        if self.fast:
            number = positive(xp, xp.sum(xp.astype(real, values.dtype), axis=-1))
            mean = xp.sum(values, axis=-2, keepdims=True) / number[..., None, None]
            floor = xp.finfo(values.dtype).eps * xp.ones_like(rest)
            off = xp.where(real[..., None], mean - values, xp.zeros_like(values)) / xp.maximum(rest, floor)
        else:
            floor = xp.finfo(values.dtype).smallest_normal * xp.ones_like(rest)
            off = others(share * values) / xp.maximum(rest, floor) - values
        return share[..., 0] * xp.linalg.vector_norm(off, axis=-1)


def others(x: Array) -> Array:
    """Sum over all tokens but the own one, shape (..., n, d), by additions alone: nothing cancels.

    Examples
    --------
    >>> import numpy as np
    >>> others(np.array([[1.0], [1e-20], [0.0]])).tolist()
    [[1e-20], [1.0], [1.0]]
    """
    xp = array_namespace(x)
    none = xp.zeros_like(x[..., :1, :])
    before = xp.cumulative_sum(xp.concat([none, x[..., :-1, :]], axis=-2), axis=-2)
    after = xp.flip(xp.cumulative_sum(xp.flip(xp.concat([x[..., 1:, :], none], axis=-2), axis=-2), axis=-2), axis=-2)
    return before + after
