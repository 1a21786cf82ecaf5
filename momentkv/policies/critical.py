"""Keep what is attended to, then what is attended to and has a large value."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._numbers import real_number, whole_number
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.snapkv import check_kernel, pool_neighbours
from momentkv.policies.turns import in_turn
from momentkv.statistics.weights import positive

__all__ = ["CriticalKV"]


@dataclasses.dataclass(frozen=True)
class CriticalKV(Policy):
    r"""Two rankings taken in turn: attention, and attention times the size of the value.

    $$ a_j = \frac{p_j}{\sum_i p_i}, \qquad b_j = (a_j + \epsilon) \lVert v_j \rVert_1 $$

    Of the tokens retained, a share ``first`` is taken by ``a_j``, the others by ``b_j``. The attention of the window
    may miss what later queries ask for; the first stage bounds what that can cost, the second bounds the change of the
    output. Needs observed attention and values.

    Parameters
    ----------
    first : float
        Share of the tokens that attention alone decides, from 0 to 1.
    epsilon : float
        Attention that every token has at least in the second ranking, as a share of all attention; not negative.
    kernel : int
        Odd width of the average of ``p_j`` over neighbouring positions, as in `SnapKV`; 1 for none.
    observes : int
        Length of the observation window in queries, at least 1.

    Notes
    -----
    Source: CriticalKV (arXiv 2502.03805). Three things differ. The paper takes the norm of the value after the output
    projection, $\lVert W_O v_j \rVert_1$; a policy does not see that matrix, so this is the norm of the value
    itself, exact only for a projection that keeps the norms' ratios. A policy does not know the budget either: instead
    of half of it, then the rest, both rankings are served in turn (as in `Balanced`), so that a token that both would
    keep makes room for more of both. And ``a_j`` is a share of the attention, so that ``epsilon`` means the same
    however many queries were observed. Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "criticalkv"
    observes: int | None = 32
    first: float = 0.5
    epsilon: float = 1e-4
    kernel: int = 5

    def __post_init__(self) -> None:
        if self.observes is None or whole_number("observes", self.observes) < 1:
            raise ValueError(f"observes is {self.observes}; use a window of at least 1 query")
        if not 0 <= real_number("first", self.first) <= 1:
            raise ValueError(f"first is {self.first}; use a share of the tokens from 0 to 1")
        if not 0 <= real_number("epsilon", self.epsilon) < math.inf:
            raise ValueError(f"epsilon is {self.epsilon}; use a share of attention, finite and at least 0")
        check_kernel(self.kernel)

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.values, tokens.attention)
        values, score = accumulate(xp, tokens.values, tokens.attention)
        real = tokens.positions >= 0
        score = xp.where(real, score, xp.zeros_like(score))
        values = xp.where(real[..., None], values, xp.zeros_like(values))
        share = score / positive(xp, xp.sum(score, axis=-1, keepdims=True))
        if self.kernel > 1:
            share = pool_neighbours(share, tokens.positions, self.kernel)
        if self.first == 1:
            return share
        both = (share + self.epsilon) * xp.linalg.vector_norm(values, axis=-1, ord=1)
        if self.first == 0:
            return both
        return in_turn(share, self.first, both, 1 - self.first, real)
