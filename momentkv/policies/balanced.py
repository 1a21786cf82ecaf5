"""Keep what queries are expected to attend to, and what the moments of all tokens do not explain, in turn."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array
from momentkv._numbers import real_number
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.expected import ExpectedAttention
from momentkv.policies.novelty import Novelty
from momentkv.policies.turns import in_turn

__all__ = ["Balanced"]


@dataclasses.dataclass(frozen=True)
class Balanced(Policy):
    """Two rankings taken in turn: `ExpectedAttention` and `Novelty`.

    A share ``novelty`` of the retained tokens are the most novel ones. The others are those to which queries like the
    recent ones are expected to attend most. At every budget each ranking has its share.

    Parameters
    ----------
    novelty : float
        Share of the budget for novelty, from 0 (expected attention alone) to 1.
    kernel : int
        As in `Novelty`: a few tokens by default, so that a fact stays whole although nothing has attended to it yet.

    Notes
    -----
    Needs mean and variance of the recent queries, as `ExpectedAttention` does; observes no attention.
    Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "balanced"
    needs_queries: ClassVar[bool] = True
    novelty: float = 0.3
    kernel: int = 5

    def __post_init__(self) -> None:
        if not 0 <= real_number("novelty", self.novelty) <= 1:
            raise ValueError(f"novelty is {self.novelty}; use a share of the budget from 0 to 1")
        Novelty(kernel=self.kernel)  # refuses a kernel that is none

    def importance(self, tokens: Tokens) -> Array:
        novelty = Novelty(kernel=self.kernel)
        if self.novelty == 1:
            return novelty.importance(tokens)
        expected = ExpectedAttention().importance(tokens)
        if self.novelty == 0:
            return expected
        real = tokens.positions >= 0
        novel = novelty.importance(tokens)
        return in_turn(expected, 1 - self.novelty, novel, self.novelty, real)
