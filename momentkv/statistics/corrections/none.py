"""Plain eviction, as a correction like the others: a state that holds nothing, and no estimate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from momentkv._array import Array, array_namespace, device
from momentkv.statistics.corrections.base import Correction
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.window import QueryWindow

__all__ = ["NoCorrection", "NoStatistics"]


@dataclasses.dataclass(frozen=True)
class NoStatistics:
    """The state of a cache that remembers nothing of what it evicts: no numbers, whatever is folded.

    Attributes
    ----------
    keys, values : array, shape (..., 0, d) and (..., 0, dv)
        No tokens. Their shape, dtype and device are those of the cache.
    """

    keys: Array
    values: Array

    @property
    def weight(self) -> Array:
        """Zero for every head."""
        return self.moments.weight

    @property
    def moments(self) -> Moments:
        """The moments of no tokens, of order 0."""
        return Moments.empty(self.keys, self.values, order=0)

    @property
    def nbytes(self) -> int:
        """Zero: nothing is held."""
        return 0

    def arrays(self) -> dict[str, Array]:
        """An empty dictionary."""
        return {}

    def map(self, function: Callable[[Array], Array]) -> NoStatistics:
        """Apply a function to the arrays without tokens, as for every state."""
        return NoStatistics(function(self.keys), function(self.values))

    def expansion(self, *, order: int | None = None, strength: float | None = None) -> Expansion:
        """That of the empty set, whatever the order."""
        return self.moments.expansion(order=0)


@dataclasses.dataclass(frozen=True)
class NoCorrection(Correction):
    """What is evicted is forgotten: plain eviction."""

    name: ClassVar[str] = "none"
    couples_heads: ClassVar[bool] = False

    @property
    def order(self) -> None:
        return None

    def empty(self, k: Array, v: Array) -> NoStatistics:
        xp = array_namespace(k, v)
        return NoStatistics(
            *(xp.zeros((*x.shape[:-2], 0, x.shape[-1]), dtype=x.dtype, device=device(x)) for x in (k, v))
        )

    def fold(self, state: NoStatistics, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> NoStatistics:
        return state

    def expansion(self, state: NoStatistics) -> None:
        return None

    def known(self, state: NoStatistics) -> Moments:
        return state.moments
