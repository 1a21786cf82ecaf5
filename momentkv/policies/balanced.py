"""Keep what recent queries attend to, and what the moments of all tokens do not explain, in turn."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace
from momentkv.policies.attention import Attention
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.novelty import Novelty, ranks
from momentkv.policies.snapkv import check_kernel

__all__ = ["Balanced"]


@dataclasses.dataclass(frozen=True)
class Balanced(Policy):
    """Two rankings taken in turn: `Attention` to values that stand out, and `Novelty`.

    Of every ``1 / novelty`` tokens retained, one is the most novel of those left, the others are those with the
    largest attention half: at every budget each ranking has its share.

    Parameters
    ----------
    novelty : float
        Share of the budget for novelty, from 0 (attention alone) to 1.
    kernel, observes : int
        As in `Attention`; here wide by default, so that a span that a question points at stays whole.
    novelty_kernel : int
        As in `Novelty`: a few tokens by default, so that a fact that nothing has pointed at yet stays whole.
    """

    name: ClassVar[str] = "balanced"
    observes: int | None = 32
    novelty: float = 0.5
    kernel: int = 13
    novelty_kernel: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.novelty <= 1:
            raise ValueError(f"novelty is {self.novelty}; use a share of the budget from 0 to 1")
        check_kernel(self.kernel)
        check_kernel(self.novelty_kernel, "novelty_kernel")

    def importance(self, tokens: Tokens) -> Array:
        novelty = Novelty(kernel=self.novelty_kernel)
        if self.novelty == 1:
            return novelty.importance(tokens)
        attention = Attention(kernel=self.kernel).importance(tokens)
        if self.novelty == 0:
            return attention
        xp = array_namespace(attention)
        real = tokens.positions >= 0
        novel = novelty.importance(tokens)
        # A token's turn comes at the place that either ranking gives it, whichever is first.
        turn = xp.minimum(ranks(attention, real) / (1 - self.novelty), ranks(novel, real) / self.novelty)
        return -turn
