"""Keep what a second reading looks for, and what the continuation is expected to attend to, in turn."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.expected import ExpectedAttention
from momentkv.policies.novelty import ranks
from momentkv.policies.second_reading import SecondReading

__all__ = ["Twice"]


@dataclasses.dataclass(frozen=True)
class Twice(SecondReading):
    """Two rankings taken in turn: `SecondReading` and `ExpectedAttention`.

    The first says what a later question may need, the second what the text itself goes on with. Of every
    ``1 / share`` tokens retained one is the best of the second reading, as `Balanced` mixes its rankings.

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
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; use a share of the budget from 0 to 1")

    def importance(self, tokens: Tokens) -> Array:
        if self.share == 1:
            return tokens.attention
        expected = self.beside.importance(tokens)
        if self.share == 0:
            return expected
        xp = array_namespace(expected)
        real = tokens.positions >= 0
        turn = xp.minimum(ranks(tokens.attention, real) / self.share, ranks(expected, real) / (1 - self.share))
        return -turn
