"""Any correction, its state in 16 bits."""

from __future__ import annotations

import dataclasses
from typing import Any

from momentkv._array import Array, array_namespace
from momentkv.statistics.corrections.base import Correction
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.narrow import NarrowStatistics
from momentkv.statistics.window import QueryWindow

__all__ = ["NarrowCorrection"]


@dataclasses.dataclass(frozen=True)
class NarrowCorrection(Correction):
    """A correction whose state is rounded to 16 bits wherever it is stored, and added to in full precision.

    See `momentkv.statistics.narrow.NarrowStatistics`.

    Parameters
    ----------
    inner : Correction
        The correction without rounding.
    """

    inner: Correction

    def __post_init__(self) -> None:
        for name in ("name", "anchored", "calibration", "vectors", "couples_heads"):
            object.__setattr__(self, name, getattr(self.inner, name))

    @property
    def order(self) -> int | None:
        return self.inner.order

    @property
    def exact(self) -> Correction:
        return self.inner

    def of_order(self, order: int) -> Correction:
        return dataclasses.replace(self, inner=self.inner.of_order(order))

    def empty(self, k: Array, v: Array) -> NarrowStatistics:
        return self.rounded(self.inner.empty(k, v))

    def fold(
        self, state: NarrowStatistics, k: Array, v: Array, *, mask: Array, window: QueryWindow | None
    ) -> NarrowStatistics:
        new = self.inner.fold(state.restored(), k, v, mask=mask, window=window)
        return where_any(mask, self.rounded(new), state)

    def calibrate(self, state: NarrowStatistics, q: Array, k: Array, *, scale: float, mask: Array) -> NarrowStatistics:
        new = self.inner.calibrate(state.restored(), q, k, scale=scale, mask=mask)
        return where_any(mask, self.rounded(new), state)

    def expansion(self, state: NarrowStatistics) -> Expansion | None:
        return self.inner.expansion(state.restored())

    def known(self, state: NarrowStatistics) -> Moments:
        return self.inner.known(state.restored())

    def stand_in(self) -> Correction:
        return self.inner.stand_in()

    def statistics(self, state: NarrowStatistics) -> Any:
        return state.restored()

    def rounded(self, state: Any) -> NarrowStatistics:
        """The state in 16 bits."""
        return NarrowStatistics.of(state, self.inner.vectors)


def where_any(mask: Array, new: NarrowStatistics, old: NarrowStatistics) -> NarrowStatistics:
    """The new state of heads with a token in the mask; the others keep theirs to the last bit."""
    xp = array_namespace(mask)
    changed = xp.any(mask, axis=-1)
    former, names = old.arrays(), iter(new.arrays())

    def chosen(x: Array) -> Array:
        return xp.where(xp.reshape(changed, (*changed.shape, *(1,) * (x.ndim - changed.ndim))), x, former[next(names)])

    return new.map(chosen)
