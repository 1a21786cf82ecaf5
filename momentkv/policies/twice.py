"""Keep what a second reading looks for, and what the continuation is expected to attend to, in turn."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._numbers import real_number
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.expected import ExpectedAttention
from momentkv.policies.novelty import centred
from momentkv.policies.second_reading import SecondReading
from momentkv.policies.turns import in_turn
from momentkv.statistics.weights import positive

__all__ = ["Twice", "largest_changes"]


@dataclasses.dataclass(frozen=True)
class Twice(SecondReading):
    r"""Two rankings taken in turn: what a second reading looks for, and `ExpectedAttention`.

    $$ c_j = a_j\, \lVert v_j - \bar v \rVert $$

    with the score $a_j$ of `SecondReading` says what a later question may need, as the score of `Attention` does for
    the window. The second ranking says what the text's continuation needs. At every budget, a share of the retained
    tokens comes from the first ranking, mixed as in `Balanced`.

    Parameters
    ----------
    share : float
        Of the budget, for the second reading, from 0 to 1.
    observes : int
        As in `SecondReading`.

    Notes
    -----
    With ``sharing="heads"`` the second reading's share is spent where its scores are largest in the whole model
    (`momentkv.cache.second_reading`). Needs mean and variance of the recent queries.
    """

    name: ClassVar[str] = "twice"
    needs_queries: ClassVar[bool] = True
    # What ranks tokens by the continuation.
    beside: ClassVar[Policy] = ExpectedAttention()
    share: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= real_number("share", self.share) <= 1:
            raise ValueError(f"share is {self.share}; use a share of the budget from 0 to 1")

    def importance(self, tokens: Tokens) -> Array:
        real = tokens.positions >= 0
        again = largest_changes(tokens.attention, tokens.values, real)
        if self.share == 1:
            return again
        expected = self.beside.importance(tokens)
        if self.share == 0:
            return expected
        return in_turn(again, self.share, expected, 1 - self.share, real)


def largest_changes(scores: Array, values: Array, real: Array) -> Array:
    r"""What the output of some query may lose with a token, relative to the values of its head.

    $$ a_j\, \frac{\lVert v_j - \bar v \rVert}{\frac1n \sum_i \lVert v_i \rVert} $$

    Parameters
    ----------
    scores : array, shape (..., kv_head, n)
        Largest attention weight that a query gave each token.
    values : array, shape (..., kv_head, n, dv)
    real : bool array, shape (..., kv_head, n)
        False for slots that hold no token; these get zero.

    Examples
    --------
    >>> import numpy as np
    >>> largest_changes(np.array([0.5, 0.5, 0.2]), np.array([[3.0], [1.0], [2.0]]), np.ones(3, dtype=bool)).tolist()
    [0.25, 0.25, 0.0]
    """
    xp = array_namespace(scores, values)
    scores, values = accumulate(xp, scores, values)
    weight = xp.astype(real, values.dtype)
    norms = weight * xp.linalg.vector_norm(xp.where(real[..., None], values, xp.zeros_like(values)), axis=-1)
    mean = xp.sum(norms, axis=-1, keepdims=True) / positive(xp, xp.sum(weight, axis=-1, keepdims=True))
    return scores * xp.linalg.vector_norm(centred(values, real), axis=-1) / positive(xp, mean)
